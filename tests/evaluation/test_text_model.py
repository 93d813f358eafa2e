"""What a trained model is asked: token ids, what of a long prompt is kept, and chat templates."""

import types

import pytest

from jaxllm.errors import UserError
from jaxllm.evaluation.text_model import TrainedTextModel
from jaxllm.inference.requests import Completion, Sampling
from jaxllm.inference.trained import TrainedModel
from jaxllm.objectives.pretraining import ObjectiveConfig
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.chat_template import chat_template

CONTEXT = 20
TOKENIZER = ByteTokenizer()


@pytest.fixture
def asked(monkeypatch):
    """The requests that a model got; it writes `ok` to each."""
    requests = []

    def complete(self, given):
        requests.extend(given)
        return [Completion((1,), (0.0,), "ok", "stop") for _ in given]

    monkeypatch.setattr(TrainedModel, "complete", complete)
    return requests


def text_model(context=CONTEXT, **options):
    loaded = types.SimpleNamespace(context=context, tokenizer=TOKENIZER)
    trained = object.__new__(TrainedModel)
    object.__setattr__(trained, "loaded", loaded)
    object.__setattr__(trained, "objective", ObjectiveConfig())
    return TrainedTextModel(trained, **options)


def test_a_prompt_is_the_beginning_of_a_document(asked):
    (written,) = text_model().write([("ab", Sampling(5, stop=("\n",)))])
    assert written == ("ok", 0)
    assert asked[0].prompt == (TOKENIZER.bos_id, *TOKENIZER.encode("ab"))
    assert asked[0].sampling == Sampling(5, stop=("\n",))


@pytest.mark.parametrize(
    ("length", "new", "kept", "most"),
    [
        (15, 5, 16, 5),  # with the opener 16 tokens; 16 + 5 - 1 = 20
        (16, 5, 16, 5),
        (99, 5, 16, 5),
        (99, 50, 10, 11),
        (3, 50, 4, 17),
    ],
)
def test_a_long_prompt_keeps_what_new_tokens_leave_and_half_in_any_case(
    asked, length, new, kept, most
):
    text = "".join(chr(97 + n % 26) for n in range(length))
    (written,) = text_model().write([(text, Sampling(new))])
    ids = (TOKENIZER.bos_id, *TOKENIZER.encode(text))
    assert asked[0].prompt == ids[-kept:]
    assert asked[0].sampling.max_new_tokens == most
    assert written.left_out == len(ids) - kept


def test_a_model_that_gives_no_numbers_writes_no_answer(monkeypatch):
    completion = Completion((1,), (float("nan"),), "ok", "stop")
    monkeypatch.setattr(TrainedModel, "complete", lambda self, given: [completion])
    with pytest.raises(UserError, match="not finite numbers"):
        text_model().write([("a", Sampling())])


def test_requests_have_seeds_of_their_own(asked):
    text_model(seed=3).write([("a", Sampling())] * 2)
    text_model(seed=4).write([("a", Sampling())])
    assert len({request.seed for request in asked}) == 3


def test_a_model_of_unknown_context_reads_2048_tokens():
    assert text_model(context=0).limit == 2048


def test_a_prompt_may_be_the_message_of_a_user(asked):
    template = chat_template(TOKENIZER, "chatml")
    text_model(template=template, context=200).write([("<|im_end|>", Sampling(5))])
    messages = [{"role": "user", "content": "<|im_end|>"}]
    assert asked[0].prompt == tuple(template.encode(messages, add_generation_prompt=True))
    assert asked[0].stop_ids == template.stop_ids


def test_an_answer_to_a_message_begins_without_white_space(monkeypatch):
    scored = []
    monkeypatch.setattr(TrainedTextModel, "score", lambda self, pairs: scored.extend(pairs) or [])
    template = chat_template(TOKENIZER, "chatml")
    text_model(template=template).log_likelihoods([("why?", " so")])
    text_model().log_likelihoods([("why?", " so")])
    assert scored[0].continuation == tuple(TOKENIZER.encode("so"))
    assert scored[1].continuation == tuple(TOKENIZER.encode(" so"))
