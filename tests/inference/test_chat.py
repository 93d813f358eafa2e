"""A conversation: layout, seeds, and what is left out of one that grows too long."""

import pytest

from jaxllm.errors import UserError
from jaxllm.inference.chat import Chat
from jaxllm.inference.requests import Sampling
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.chat_template import ChatTemplate, chat_template

TOKENIZER = ByteTokenizer()
TEMPLATE = chat_template(TOKENIZER)


def make_chat(context=1000, seed=0, **sampling):
    return Chat(TEMPLATE, context, Sampling(**sampling), seed)


def messages(*contents, system=""):
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * len(contents)
    turns = zip(roles, contents, strict=False)
    return [*first, *({"role": role, "content": content} for role, content in turns)]


def text(asked):
    return TOKENIZER.decode(asked.request.prompt, skip_special_tokens=False)


def test_the_prompt_is_the_conversation_up_to_the_answer():
    asked = make_chat().ask(messages("a", "b", "c", system="s"))
    assert text(asked) == (
        "<s><|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert asked.left_out == 0
    assert set(asked.request.stop_ids) == {2, 5}  # </s> and <|im_end|>


def test_tools_are_told_also_when_old_turns_are_left_out():
    source = "{{ tools | tojson }}{% for message in messages %}{{ message.content }}{% endfor %}"
    template = ChatTemplate(source, TOKENIZER)
    tools = [{"name": "look"}]
    asked = Chat(template, 40, Sampling(max_new_tokens=8)).ask(messages("1" * 20, "2", "3"), tools)
    assert asked.left_out == 2
    assert text(asked) == '[{"name": "look"}]3'


def test_each_turn_has_its_own_seed_and_the_same_one_each_time():
    def seed(of, count):
        return make_chat(seed=of).ask(messages(*["x"] * (2 * count - 1))).request.seed

    assert len({seed(of, count) for of in range(3) for count in (1, 2, 3)}) == 9
    assert seed(1, 2) == seed(1, 2)
    assert 0 <= seed(1, 2) < 2**31


def test_the_oldest_turns_are_left_out_and_the_system_message_stays():
    history = messages("1" * 40, "2" * 40, "3" * 40, "4" * 40, "5", system="s")
    asked = make_chat(context=230, max_new_tokens=8).ask(history)
    assert asked.left_out == 2
    assert text(asked) == text(make_chat().ask([history[0], *history[3:]]))
    assert len(asked.request.prompt) + 8 <= 230
    assert make_chat(max_new_tokens=8).ask(history).left_out == 0
    assert make_chat(context=120, max_new_tokens=8).ask(history).left_out == 4


def test_without_a_known_limit_nothing_is_left_out():
    asked = make_chat(context=0, max_new_tokens=77).ask(messages("1" * 5000, "2", "3"))
    assert asked.left_out == 0
    assert asked.request.sampling.max_new_tokens == 77


def test_an_answer_gets_what_room_there_is_but_turns_go_for_half_of_the_context_at_most():
    asked = make_chat(context=100, max_new_tokens=128).ask(messages("1" * 30))
    assert asked.request.sampling.max_new_tokens == 100 - len(asked.request.prompt)
    short = make_chat(context=100, max_new_tokens=3).ask(messages("1"))
    assert short.request.sampling.max_new_tokens == 3
    long = make_chat(context=100, max_new_tokens=128).ask(messages("1", "2", "3" * 60))
    assert long.left_out == 2
    assert make_chat(context=200, max_new_tokens=500).ask(messages("1", "2", "3")).left_out == 0


def test_a_message_longer_than_the_context_is_told():
    with pytest.raises(UserError, match=r"can see 100: too long"):
        make_chat(context=100).ask(messages("1", "2", "3" * 100, system="s"))


def test_the_one_that_is_too_long_is_named():
    with pytest.raises(UserError, match=r"^the message makes"):
        make_chat(context=100).ask(messages("1", "2", "3" * 100, system="s"))
    with pytest.raises(UserError, match=r"^the system message makes"):
        make_chat(context=100).ask(messages("1", "2", "3", system="s" * 100))


def test_a_template_that_writes_nothing_is_told():
    chat = Chat(ChatTemplate("{# nothing #}", TOKENIZER, "mine.jinja"), 100)
    with pytest.raises(UserError, match=r"mine\.jinja.*writes nothing"):
        chat.ask(messages("a"))
