"""Records become items: what is asked, what an example shows, and what is wrong with a record."""

import pytest

from jaxllm.evaluation.items import KINDS, Layout, kind_of

PLAIN, REASONED, TEXTS = Layout(), Layout(chain_of_thought=True), Layout(letters=False)
MMLU = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": 1}
GSM8K = {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7\n7 * 200 = 1,400\n#### 1,400"}


def item(fields, layout=PLAIN):
    return kind_of(fields).parse(fields, layout)


def test_a_query_stands_as_it_is_and_its_choices_follow():
    found = item({"query": "It rained, so", "choices": ["it was wet.", "he sang."], "gold": 1})
    assert found.prompt == "It rained, so"
    assert found.options == (("", " it was wet."), ("", " he sang."))
    assert (found.gold, found.answer) == (1, " he sang.")


@pytest.mark.parametrize(
    ("query", "prompt"),
    [
        ("Question: why?\n", "Question: why?\nAnswer:"),
        ("Passage: so.\nQuestion: why?", "Passage: so.\nQuestion: why?\nAnswer:"),
        ("Question: why?\nA. so\nAnswer:", "Question: why?\nA. so\nAnswer:"),
        ("No Question: why?", "No Question: why?"),
    ],
)
def test_a_query_that_is_a_question_is_followed_by_answer(query, prompt):
    assert item({"query": query, "choices": ["a", "b"], "gold": 0}).prompt == prompt


def test_choices_of_a_question_are_listed_by_letters():
    found = item(MMLU)
    assert found.prompt == "2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer:"
    assert found.options == (("", " A"), ("", " B"), ("", " C"))
    assert found.text == "2 + 2?\nA. 3\nB. 4\nC. 5\nAnswer: B"
    assert item(MMLU | {"answer": "B"}) == item(MMLU | {"answer": "b"}) == found


def test_without_letters_the_choices_texts_are_scored():
    found = item(MMLU, TEXTS)
    assert found.prompt == "Question: 2 + 2?\nAnswer:"
    assert found.options == (("", " 3"), ("", " 4"), ("", " 5"))


def test_a_chinese_question_is_asked_in_chinese():
    fields = {"question": "二加二？", "choices": ["三", "四"], "answer": 1}
    assert item(fields).prompt == "二加二？\nA. 三\nB. 四\n答案："
    assert item(fields, TEXTS).prompt == "问题：二加二？\n答案："


def test_of_several_contexts_the_same_continuation_is_scored():
    found = item({"context_options": ["Al ran since Al", "Al ran since Bo"],
                  "continuation": "was late.", "gold": 0})  # fmt: skip
    assert found.options == (("Al ran since Al", " was late."), ("Al ran since Bo", " was late."))
    assert found.text == "Al ran since Al was late."


def test_a_continuation_is_its_only_option():
    found = item({"context": "He met the", "continuation": "queen"})
    assert (found.prompt, found.options) == ("He met the", (("", " queen"),))


def test_a_result_is_asked_with_or_without_its_reasoning():
    plain, reasoned = item(GSM8K), item(GSM8K, REASONED)
    assert plain.prompt == reasoned.prompt == "Question: How many?\nAnswer:"
    assert plain.target == reasoned.target == plain.answer.strip() == "1400"
    assert reasoned.answer == " 3 + 4 = <<3+4=7>>7\n7 * 200 = 1,400\n#### 1400"
    assert (plain.stop, plain.cue) == (("\n",), "")
    assert (reasoned.stop, reasoned.cue) == (("Question:",), " Let's think step by step.")


def test_reasoning_may_stand_in_fields_of_its_own():
    svamp = {"context": "How many?", "chain_of_thought": "( 3 + 4 )", "answer": "7"}
    apart = {"question": "How many?", "reasoning": "( 3 + 4 )", "answer": 7}
    assert item(svamp, REASONED) == item(apart, REASONED)
    assert item(svamp, REASONED).answer == " ( 3 + 4 )\n#### 7"
    assert item(svamp) == item(apart)


def test_a_prompt_is_followed_as_in_the_text_it_was_trained_on():
    same_line = item({"prompt": "1 + 2 =", "response": "3", "answer": "3", "text": "1 + 2 = 3"})
    next_line = item({"prompt": "Copy: a", "response": "a", "answer": "a", "text": "Copy: a\na"})
    assert (same_line.prompt, same_line.text) == ("1 + 2 =", "1 + 2 = 3")
    assert (next_line.prompt, next_line.text) == ("Copy: a\n", "Copy: a\na")


def test_the_response_of_a_prompt_is_its_reasoning():
    fields = {"prompt": "Add.", "response": "1 + 1 = 2\n#### 2", "answer": "2"}
    assert item(fields).answer == "2"
    assert item(fields, REASONED).answer == "1 + 1 = 2\n#### 2"


def test_reasoning_may_be_missing_or_blank():
    for blank in (None, "", " \n"):
        assert item({"prompt": "a", "answer": "b", "response": blank}, REASONED).answer == "b"
        svamp = {"context": "a", "answer": "b", "chain_of_thought": blank}
        assert item(svamp, REASONED).answer == " #### b"


@pytest.mark.parametrize("broken", ["\ud800", 5, ["a"]])
def test_reasoning_that_is_no_text_is_told(broken):
    with pytest.raises(ValueError, match="`response` is not"):
        item({"prompt": "a", "answer": "b", "response": broken}, REASONED)
    with pytest.raises(ValueError, match="`chain_of_thought` is not"):
        item({"context": "a", "answer": "b", "chain_of_thought": broken})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (MMLU | {"choices": []}, "`choices` has 0 texts"),
        (MMLU | {"choices": ["one"]}, "`choices` has 1 texts"),
        (MMLU | {"choices": ["a", " "]}, "`choices` holds an empty text"),
        (MMLU | {"choices": ["a", 3]}, "`choices` is not a list of strings"),
        (MMLU | {"choices": "abc"}, "`choices` is not a list of strings"),
        (MMLU | {"choices": ["a"] * 27}, "more than there are letters"),
        (MMLU | {"answer": 3}, "`answer` is 3, and there are 3 choices"),
        (MMLU | {"answer": -1}, "`answer` is -1"),
        (MMLU | {"answer": "D"}, "`answer` is 'D', and there are 3 choices"),
        (MMLU | {"answer": True}, "`answer` is True, which is no index"),
        (MMLU | {"answer": 1.0}, "`answer` is 1.0, which is no index"),
        (MMLU | {"answer": None}, "`answer` is None, which is no index"),
        (MMLU | {"question": " "}, "`question` holds an empty text"),
        (MMLU | {"question": 7}, "`question` is not a string but int"),
        (MMLU | {"question": "\ud800"}, "`question` is not Unicode text"),
        (GSM8K | {"answer": "so it is 7"}, "`answer` does not end in `#### `"),
        ({"prompt": "a", "answer": ""}, "`answer` holds an empty text"),
        ({"prompt": "a", "answer": ["b"]}, "`answer` is not a string but list"),
    ],
)
def test_what_is_wrong_with_a_record_is_told(fields, reason):
    with pytest.raises(ValueError, match=reason):
        item(fields)


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"query": "Question: why?\n", "choices": ["a", "b"], "gold": 0}, "Question: why?"),
        (MMLU, "2 + 2?"),
        (GSM8K, "How many?"),
        ({"context": "He met the", "continuation": "queen"}, "He met the queen"),
        ({"prompt": "Add 1 and 2.", "answer": 3}, "Add 1 and 2."),
    ],
)
def test_an_item_is_recognised_by_the_records_own_words(fields, content):
    assert item(fields).content == item(fields, REASONED).content == content


def test_every_kind_is_told_by_its_own_fields():
    for kind in KINDS:
        assert kind_of(dict.fromkeys(kind.fields)) is kind
    assert kind_of({"text": "a"}) is None
