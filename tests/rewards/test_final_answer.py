"""Where the answer of a response stands: known ones, and those that have none."""

import pytest

from jaxllm.rewards.final_answer import boxed, final_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (" 18 ", "18"),
        ("<think>7</think>\n18", "18"),
        ("7</think>18", "18"),
        ("<think>a</think>b</think> c", "c"),
        ("<think>7 and 18", ""),
        ("so <think>", ""),
        ("<think>7</think>", ""),
        ("I say <answer> 18 </answer>.", "18"),
        ("<answer>7</answer> no, <answer>18</answer>", "18"),
        ("<think><answer>7</answer></think>18", "18"),
        ("<answer>18", "<answer>18"),
        ("18</answer>", "18</answer>"),
        ("", ""),
    ],
)
def test_it_stands_behind_the_thinking_and_between_the_last_marks(response, answer):
    assert final_answer("What is 9 + 9?", response) == answer


def test_a_prompt_may_have_opened_the_thinking():
    assert final_answer("9 + 9?\n<think>\n", "it is 18") == ""
    assert final_answer("9 + 9?\n<think>\n", "it is</think>18") == "18"


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{7}, no, \boxed{18}", "18"),
        (r"\boxed{\frac{3}{4}} {x}", r"\frac{3}{4}"),
        (r"\boxed{\boxed{18}}", "18"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{[0, \{1}", r"[0, \{1"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{}", ""),
        (r"\boxed{18", None),
        (r"\boxed{7} \boxed{18", None),
        ("boxed{18}", None),
        ("", None),
    ],
)
def test_a_box_ends_with_its_own_brace(text, inside):
    assert boxed(text) == inside
