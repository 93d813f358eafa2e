"""Generated tasks: right answers, no prompt twice, the same records everywhere."""

import ast
import collections
import hashlib
import itertools
import json
import math
import re

import pytest

from jaxllm.data.tasks import TASKS, TASKS_VERSION, Draw, Level, Task

OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if a % b == 0 else pytest.fail(f"{a} / {b} is not whole"),
}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def records(name, size=1500, seed=0):
    return list(TASKS[name].records(range(size), seed))


def worth(expression):
    """The value of an expression of whole numbers, and the numbers in it."""
    used = collections.Counter()

    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATIONS[SIGNS[type(node.op)]](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant) and type(node.value) is int
        used[node.value] += 1
        return node.value

    return value(ast.parse(expression, mode="eval").body), used


def test_arithmetic_is_right():
    for record in records("arithmetic"):
        a, sign, b = re.fullmatch(r"(\d+) (.) (\d+) =", record["prompt"]).groups()
        assert record["answer"] == record["response"] == str(OPERATIONS[sign](int(a), int(b)))
        assert record["text"] == f"{record['prompt']} {record['response']}"


def test_arithmetic_has_every_operation_at_every_number_of_digits():
    levels = len(TASKS["arithmetic"].levels)
    seen = [
        (len(a), sign, len(b)) if sign != "/" else (len(str(int(a) // int(b))), sign, len(b))
        for a, sign, b, _ in (record["prompt"].split() for record in records("arithmetic", levels))
    ]
    small = itertools.product((1, 2), "+-*/", (1, 2))
    large = (case for case in itertools.product((1, 2, 3), "+-", (1, 2, 3)) if 3 in case)
    assert sorted(seen) == sorted([*small, *large])


def test_a_chain_reaches_its_answer_by_the_steps_it_asks_for():
    words = {"Add": "+", "Subtract": "-", "Multiply by": "*"}
    for record in records("chain"):
        start = re.match(r"Start with (\d+)\.", record["question"])[1]
        steps = re.findall(r"(Add|Subtract|Multiply by) (\d)\.", record["question"])
        value, lines = int(start), record["reasoning"].split("\n")
        for (word, operand), line in zip(steps, lines, strict=True):
            after = OPERATIONS[words[word]](value, int(operand))
            assert line == f"{value} {words[word]} {operand} = {after}"
            value = after
        assert record["answer"] == str(value)
        assert record["response"] == f"{record['reasoning']}\n#### {value}"


def test_a_last_digit_is_that_of_the_steps_asked_for():
    words = {"Add": "+", "Multiply by": "*"}
    seen = collections.Counter()
    for record in records("last_digit"):
        start = re.match(r"Start with (\d)\.", record["question"])[1]
        steps = re.findall(r"(Add|Multiply by) (\d)\.", record["question"])
        whole = digit = int(start)
        for (word, operand), line in zip(steps, record["reasoning"].split("\n"), strict=True):
            sign, operand = words[word], int(operand)
            assert line == f"{digit} {sign} {operand} = {OPERATIONS[sign](digit, operand)}"
            digit = OPERATIONS[sign](digit, operand) % 10
            whole = OPERATIONS[sign](whole, operand)
        assert record["answer"] == str(digit) == str(whole)[-1]
        assert record["response"] == f"{record['reasoning']}\n#### {digit}"
        seen[digit] += 1
    # So none is worth guessing.
    assert max(seen.values()) < 1.3 * 150


def test_a_countdown_solution_reaches_its_target_with_the_numbers_given():
    for record in records("countdown"):
        value, used = worth(record["solution"])
        assert value == record["target"]
        assert used <= collections.Counter(record["numbers"])
        assert record["target"] not in record["numbers"]
        assert 1 <= record["target"] <= 999
        asked = [int(number) for number in re.findall(r"\d+", record["prompt"])]
        assert asked == [record["target"], *record["numbers"]]


def test_copying_the_target_of_a_countdown_is_not_an_answer():
    for record in records("countdown", 100):
        assert "answer" not in record
        assert str(record["target"]) in record["prompt"]
        assert record["response"] == record["solution"] != str(record["target"])


def test_copies_and_sorted_numbers_are_right():
    for record in records("copying"):
        assert record["prompt"] == f"Copy: {record['answer']}"
    for record in records("sorting"):
        numbers = [int(number) for number in record["prompt"].removeprefix("Sort: ").split()]
        assert [int(number) for number in record["answer"].split()] == sorted(numbers)


@every_task
def test_a_record_serves_as_text_as_an_example_and_as_a_verified_prompt(task):
    verified = "target" if task.name == "countdown" else "answer"
    for record in task.records(range(50), 0):
        for field in ("text", "prompt", "response", verified):
            assert str(record[field]).strip()
        assert record["text"].startswith(record["prompt"])
        assert record["text"].endswith(record["response"])


@every_task
def test_the_rejected_response_has_one_sign_wrong(task):
    for record in task.records(range(200), 0):
        chosen, rejected = record["chosen"], record["rejected"]
        assert chosen == record["response"]
        assert len(rejected) == len(chosen)
        (pair,) = [(a, b) for a, b in zip(chosen, rejected, strict=True) if a != b]
        assert all(map(str.isdigit, pair)) or all(map(str.islower, pair))


@every_task
def test_no_prompt_comes_twice(task):
    assert len({record["prompt"] for record in task.records(range(5000), 1)}) == 5000


@every_task
def test_a_level_has_as_many_records_as_it_says(task):
    class Recorded(Draw):
        def own(self, low, high):
            ranges.append(high - low + 1)
            return super().own(low, high)

    for level in task.levels:
        ranges = []
        level.make(Recorded(0, "key"))
        assert math.prod(ranges) == level.count


def small_task():
    """13 records: three of one level, ten of the other."""

    def level(name, high):
        def make(draw):
            return {"prompt": f"{name}{draw.own(1, high)}", "response": "a"}

        return Level(make, high)

    return Task("small", (level("a", 3), level("b", 10)))


def test_a_task_gives_every_record_once_and_ends():
    task = small_task()
    prompts = [record["prompt"] for record in task.records(range(100), 0)]
    assert len(prompts) == task.count == 13
    assert set(prompts) == {f"a{n}" for n in range(1, 4)} | {f"b{n}" for n in range(1, 11)}
    assert [prompt[0] for prompt in prompts] == list("abababbbbbbbb")


def test_parts_are_those_of_the_whole_wherever_they_begin():
    task = small_task()
    whole = list(task.records(range(13), 0))
    for begin, end in itertools.combinations(range(14), 2):
        assert list(task.records(range(begin, end), 0)) == whole[begin:end]


@every_task
def test_parts_that_do_not_overlap_share_no_prompt(task):
    whole = list(task.records(range(3000), 2))
    parts = [list(task.records(range(*ends), 2)) for ends in [(0, 2500), (2500, 3000)]]
    assert parts[0] + parts[1] == whole
    train, held_out = ({record["prompt"] for record in part} for part in parts)
    assert not train & held_out


@every_task
def test_another_seed_gives_other_records(task):
    first, second = ({r["prompt"] for r in task.records(range(500), seed)} for seed in (0, 1))
    assert len(first & second) < 250


@every_task
def test_a_part_begins_anywhere_at_once_and_takes_no_memory_for_what_is_to_come(task):
    assert next(task.records(range(task.count // 2, task.count), 0))["prompt"]
    assert len(list(task.records(range(task.count - 3, task.count), 0))) == 3


def test_the_records_are_those_of_this_version():
    digest = hashlib.sha256()
    for name in ("arithmetic", "chain", "countdown", "copying", "sorting"):
        digest.update(json.dumps(records(name, 200, 7)).encode())
    # Where this fails, runs made with other records must not be resumed: raise TASKS_VERSION.
    assert (TASKS_VERSION, digest.hexdigest()[:16]) == (2, "9bdd1825f514f3b4")
