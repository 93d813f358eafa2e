"""Responses that ask a calculator go on with its results."""

import pytest

from jaxllm.data.prompts import Prompt
from jaxllm.inference.requests import Completion, Sampling
from jaxllm.rollouts.calculator import result_of
from jaxllm.rollouts.writer import Writer
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


class Script:
    """An engine that writes what it is told to, and pauses as the real one does."""

    def __init__(self, *texts):
        self._texts, self.prompts = list(texts), []

    def complete(self, requests):
        found = []
        for request in requests:
            self.prompts.append(TOKENIZER.decode(request.prompt))
            text = self._texts.pop(0)
            ids = TOKENIZER.encode(text)[: request.sampling.max_new_tokens]
            finish = "length" if len(ids) < len(TOKENIZER.encode(text)) else "stop"
            if finish == "stop" and text.endswith("=") and request.pause:
                finish = "pause"
            found.append(Completion(tuple(ids), (-1.0,) * len(ids), TOKENIZER.decode(ids), finish))
        return found


def respond(script, count=1, room=100, calculator=True):
    prompt = Prompt(tuple(TOKENIZER.encode("How many? ")), [], {})
    writer = Writer(
        lambda number: prompt, lambda params: script, TOKENIZER, Sampling(), (), 1, calculator
    )
    return writer({}, [prompt] * count, [0] * count, Sampling(room))


def test_a_result_is_put_behind_its_call():
    script = Script("6 boxes: <<6*8=", " and <<48/5=", " done")
    (found,) = respond(script)
    assert found.text == "6 boxes: <<6*8=48>> and <<48/5=9.6>> done"
    assert TOKENIZER.decode(found.ids) == found.text
    assert found.ended
    inserted = [byte for byte, chosen in zip(found.ids, found.chosen, strict=True) if not chosen]
    assert TOKENIZER.decode(inserted) == "48>>9.6>>"
    assert [value for value in found.log_probs if not value] == [0.0] * len(inserted)
    assert script.prompts[1] == "How many? 6 boxes: <<6*8=48>>"


def test_each_response_goes_on_for_itself():
    one, other = respond(Script("<<1+1=", "none", "."), count=2)
    assert (one.text, other.text) == ("<<1+1=2>>.", "none")


def test_what_is_no_calculation_is_left_as_it_is():
    (found,) = respond(Script("<<import os=", "?"))
    assert found.text == "<<import os=?"
    assert all(found.chosen)
    (found,) = respond(Script("<<1+1="), calculator=False)
    assert found.text == "<<1+1="


def test_a_response_is_no_longer_than_it_may_be():
    (found,) = respond(Script("<<6*8="), room=8)
    # The result, `48>>`, does not fit, and half of it would be judged as a whole.
    assert found.text == "<<6*8="
    assert len(found.ids) == 6
    assert not found.ended


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("<<2*(3+4)=", "14>>"),
        ("a <<1/3=", "0.333333>>"),
        ("<<1.50*2=", "3>>"),
        ("<<-7=", "-7>>"),
        ("<<0-1/10000000=", "0>>"),
        ("<<1/0=", ""),
        ("<<9**9=", ""),
        ("<<__import__('os')=", ""),
    ],
)
def test_results(text, result):
    assert result_of(text) == result
