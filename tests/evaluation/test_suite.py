"""Scores of models that know everything, of models that guess, and of two against each other."""

import json
import math

import pytest

from jaxllm.errors import UserError
from jaxllm.evaluation.contamination import ContaminationConfig
from jaxllm.evaluation.statistics import standard_error
from jaxllm.evaluation.suite import TasksConfig, item_lines, look_for, measure, scores

BUILTIN = "builtin:arithmetic:30,builtin:copying:30,builtin:chain:30"


def _choices(count, options=4):
    return [
        {"query": f"q{n}", "choices": [f"c{n}{o}" for o in range(options)], "gold": n % options}
        for n in range(count)
    ]


@pytest.mark.parametrize("reasoned", [False, True])
def test_who_knows_every_answer_is_always_right(prepared, fake, reasoned):
    tasks = prepared(tasks=BUILTIN, chain_of_thought=reasoned, most_shots=2)
    known = {
        item.prompt: item.answer for each in tasks for item in each.task.items
    }  # fmt: skip
    oracle = fake(text=lambda prompt: known[prompt.split("\n\n")[-1]] + "\n\n1 + 1 = 9")
    found = scores(measure(tasks, oracle, (0, 2)))
    assert len(found) == 3 * 2 * 4
    assert {value for name, value in found.items() if name.endswith("/score")} == {1.0}
    assert {value for name, value in found.items() if name.endswith("/stderr")} == {0.0}
    assert {how.temperature for _, how in oracle.asked} == {0.0}
    assert {how.max_new_tokens for _, how in oracle.asked} == {256 if reasoned else 32}


def test_who_finds_the_right_choice_likeliest_is_always_right(prepared, fake, jsonl):
    winogrande = [
        {"context_options": [f"a{n}", f"b{n}"], "continuation": "c", "gold": n % 2}
        for n in range(9)
    ]
    lambada = [{"context": f"c{n}", "continuation": f"w{n}"} for n in range(9)]
    tasks = prepared(
        tasks=f"{jsonl('a', *_choices(9))},{jsonl('b', *winogrande)},{jsonl('c', *lambada)}"
    )
    right = {
        (item.prompt + item.options[item.gold][0], item.options[item.gold][1])
        for each in tasks
        for item in each.task.items
    }
    found = scores(measure(tasks, fake(lambda *text: 0.0 if text in right else -9.0), (0,)))
    assert [found[f"evaluate/{name}/score"] for name in "abc"] == [1, 1, 1]
    assert found["evaluate/a/acc_norm"] == found["evaluate/c/perplexity"] == 1
    wrong = scores(measure(tasks, fake(lambda *text: -2.0 if text in right else 0.0), (0,)))
    assert [wrong[f"evaluate/{name}/score"] for name in "abc"] == [0, 0, 0]
    assert wrong["evaluate/c/perplexity"] == pytest.approx(math.exp(2))


def test_who_guesses_is_right_by_chance(prepared, guessing, jsonl):
    found = scores(measure(prepared(tasks=jsonl("a", *_choices(2000))), guessing, (0,)))
    score, error = found["evaluate/a/score"], found["evaluate/a/stderr"]
    assert found["evaluate/a/chance"] == found["evaluate/a/majority"] == 0.25
    assert abs(score - 0.25) < 3 * error
    assert error == pytest.approx(math.sqrt(score * (1 - score) / 1999))
    assert found["evaluate/a/items"] == 2000


def test_chance_is_the_mean_over_items_and_majority_the_commonest_place(prepared, guessing, jsonl):
    path = jsonl("a", *_choices(2, options=2), *_choices(2, options=4))
    found = scores(measure(prepared(tasks=path), guessing, (0,)))
    assert found["evaluate/a/chance"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["evaluate/a/majority"] == 0.5


def test_length_normalisation_is_by_bytes_of_the_choice(prepared, fake, jsonl):
    record = {"query": "q", "choices": ["abcd", "éééé"], "gold": 1}
    # -1.25 a byte against -0.75; by characters it would be -1.25 against -1.5.
    model = fake(lambda _, text: -5.0 if text == " abcd" else -6.0)
    found = scores(measure(prepared(tasks=jsonl("a", record)), model, (0,)))
    assert (found["evaluate/a/score"], found["evaluate/a/acc_norm"]) == (0, 1)


def test_how_probable_the_right_choice_is_among_the_others(prepared, fake, jsonl):
    record = {"query": "q", "choices": ["a", "b", "c"], "gold": 1}
    model = fake(lambda _, text: {" a": -800.0, " b": -801.0, " c": -5000.0}[text])
    found = scores(measure(prepared(tasks=jsonl("a", record)), model, (0,)))
    assert found["evaluate/a/score"] == 0
    assert found["evaluate/a/gold_probability"] == pytest.approx(1 / (1 + math.e))


def test_examples_stand_before_the_question_and_are_told(prepared, fake):
    tasks = prepared(tasks="builtin:arithmetic:20", most_shots=2)
    model = fake()
    results = measure(tasks, model, (0, 2))
    prompts = [prompt for prompt, _ in model.asked]
    assert [prompt.count("\n\n") for prompt in prompts] == [0] * 20 + [2] * 20
    lines = [json.loads(line) for line in item_lines(tasks, results, "runs/a")]
    assert [line["prompt"] for line in lines] == prompts
    items = tasks[0].task.items
    for line in lines[20:]:
        shown = [items[number - 1].text for number in line["examples"]]
        assert line["prompt"].split("\n\n")[:-1] == shown
        assert line["line"] not in line["examples"]
    assert {(line["model"], line["task"], line["exact_match"]) for line in lines} == {
        ("runs/a", "arithmetic", 0.0)
    }


def test_without_examples_reasoning_is_asked_for(prepared, fake, jsonl):
    records = [{"question": f"{n}?", "answer": f"so\n#### {n}"} for n in range(3)]
    tasks = prepared(tasks=jsonl("a", *records), chain_of_thought=True, most_shots=1)
    model = fake()
    measure(tasks, model, (0, 1))
    zero, one = model.asked[0][0], model.asked[3][0]
    assert zero == "Question: 0?\nAnswer: Let's think step by step."
    assert one.endswith("Question: 0?\nAnswer:")


def test_two_models_are_compared_item_by_item(prepared, fake):
    tasks = prepared(tasks="builtin:copying:40", most_shots=3)
    targets = {item.prompt: item.target for item in tasks[0].task.items}
    some = set(list(targets)[:10])

    def answers(prompt):
        own = prompt.split("\n\n")[-1]
        return targets[own] if own in some or "\n\n" not in prompt else "no"

    tuned, prompted = (
        measure(tasks, fake(text=answers), (0,)),
        measure(tasks, fake(text=answers), (3,)),
    )
    found = scores(tuned, prompted)
    assert found["evaluate/copying/score"] == 1
    assert found["evaluate/copying/baseline_score"] == 0.25
    assert found["evaluate/copying/difference"] == 0.75
    differences = [0.0] * 10 + [1.0] * 30
    assert found["evaluate/copying/difference_stderr"] == standard_error(differences)


def test_items_in_the_training_text_are_counted_and_scored_apart(prepared, fake, jsonl, tmp_path):
    def question(word):
        return " ".join(f"{word}{n}" for n in range(15))

    records = [{"prompt": question(word), "answer": word} for word in "abcd"]
    tasks = prepared(tasks=jsonl("a", *records))
    path = jsonl("train", {"text": f"before {question('b')} after"}, {"text": question("z")})
    looked = look_for(tasks, ContaminationConfig(train=path), 0.0)
    results = measure(tasks, fake(text=lambda prompt: prompt[0] if prompt[0] in "ab" else ""), (0,))
    found = scores(results, contamination=looked)
    assert found["evaluate/a/score"] == 0.5
    assert found["evaluate/a/contaminated"] == 0.25
    assert found["evaluate/a/clean_score"] == pytest.approx(1 / 3)
    lines = [json.loads(line) for line in item_lines(tasks, results, "", looked)]
    assert ["in_training_text" in line for line in lines] == [False, True, False, False]
    assert found["evaluate/a/clean_score_stderr"] == standard_error([1.0, 0.0, 0.0])
    assert found["evaluate/a/unchecked"] == 0
    assert look_for(tasks, ContaminationConfig(), 0.0) == {}


def test_items_too_short_to_be_looked_for_count_as_neither(prepared, fake, jsonl):
    long = " ".join(f"w{n}" for n in range(15))
    records = [{"prompt": prompt, "answer": "a"} for prompt in (long, f"other {long}", "short")]
    tasks = prepared(tasks=f"{jsonl('a', *records)},{jsonl('b', records[2])}")
    training = ContaminationConfig(train=jsonl("train", {"text": long}), ngram=16)
    looked = look_for(tasks, training, 0.0)
    model = fake(text=lambda prompt: "a" if prompt.startswith("other") else "b")
    found = scores(measure(tasks, model, (0,)), contamination=looked)
    assert found["evaluate/a/unchecked"] == pytest.approx(1 / 3)
    assert (found["evaluate/a/contaminated"], found["evaluate/a/clean_score"]) == (0.5, 1)
    assert found["evaluate/b/unchecked"] == 1
    for name in ("b/contaminated", "b/clean_score"):
        assert math.isnan(found[f"evaluate/{name}"])


def test_what_is_estimated_has_a_standard_error(prepared, guessing, jsonl):
    lambada = [{"context": f"c{n}", "continuation": f"w{n}"} for n in range(50)]
    tasks = prepared(tasks=f"{jsonl('a', *_choices(50))},{jsonl('b', *lambada)}")
    results = measure(tasks, guessing, (0,))
    found = scores(results, results)
    values = [outcome.scores["acc_norm"] for outcome in results["a", 0]]
    assert found["evaluate/a/acc_norm_stderr"] == standard_error(values) > 0
    assert found["evaluate/a/baseline_score_stderr"] == found["evaluate/a/stderr"]
    logs = [outcome.scores["log_likelihood"] for outcome in results["b", 0]]
    expected = found["evaluate/b/perplexity"] * standard_error(logs)
    assert found["evaluate/b/perplexity_stderr"] == pytest.approx(expected)
    assert not {"evaluate/a/chance_stderr", "evaluate/a/majority_stderr"} & found.keys()


def test_a_line_of_an_item_is_json_or_none_at_all(prepared, fake, jsonl):
    tasks = prepared(tasks=jsonl("a", *_choices(1)))
    results = measure(tasks, fake(lambda *text: math.nan), (0,))
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(item_lines(tasks, results, ""))


def test_instructions_are_kept_or_not(prepared, fake, jsonl):
    rules = [{"rule": "words_at_least", "n": 3}, {"rule": "keywords", "keywords": ["red"]}]
    tasks = prepared(tasks=jsonl("a", *({"prompt": p, "rules": rules} for p in "abcd")))
    responses = {"a": "a red house here", "b": "red", "c": "a house stands here", "d": ""}
    model = fake(text=responses.__getitem__)
    results = measure(tasks, model, (0,))
    found = scores(results)
    assert found["evaluate/a/score"] == found["evaluate/a/loose"] == 0.25
    assert found["evaluate/a/rules"] == found["evaluate/a/rules_loose"] == 0.5
    assert found["evaluate/a/loose_stderr"] == standard_error([1.0, 0.0, 0.0, 0.0])
    error = standard_error([1.0, 0.5, 0.5, 0.0])
    assert found["evaluate/a/rules_stderr"] == pytest.approx(error)
    lines = [json.loads(line) for line in item_lines(tasks, results, "")]
    assert [line["kept"] for line in lines] == [
        [True, True],
        [False, True],
        [True, False],
        [False, False],
    ]
    assert model.asked[0][1].stop == ()
    with pytest.raises(UserError, match=r"config.fewshot: a is of instructions"):
        prepared(tasks=tasks[0].task.source, most_shots=1)


def test_instructions_of_ifeval_are_read(prepared, jsonl):
    record = {
        "prompt": "Write.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    (each,) = prepared(tasks=jsonl("a", record))
    assert each.task.kind.measure == "instructions"
    with pytest.raises(UserError, match="none of IFEval's instructions"):
        prepared(tasks=jsonl("b", record | {"instruction_id_list": ["no:such"]}))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"fewshot": "two"}, "fewshot: is a list of whole numbers"),
        ({"fewshot": "-1"}, "fewshot: is a list of whole numbers"),
        ({"fewshot": ","}, "fewshot: names no number"),
        ({"max_items": -1}, "max_items: must not be negative"),
        ({"max_new_tokens": -1}, "max_new_tokens: must not be negative"),
    ],
)
def test_wrong_fields_are_told(fields, reason):
    with pytest.raises(ValueError, match=reason):
        TasksConfig(**fields)


def test_numbers_of_examples_are_in_order_and_once():
    assert TasksConfig(fewshot="4, 0,4,1").shots() == (0, 1, 4)
