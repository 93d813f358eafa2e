"""Whether a student learns more of what its teacher thought than of the answers alone.

    python experiments/distillation/traces.py --workdir=runs/traces

A teacher of 839 thousand parameters is tuned on 8,000 worked examples of `builtin:last_digit`, and
answers 2,000 questions that are new to it four times each (stage `generate_data`); the first of the
four that is right is kept. A student of a seventh of its size, which has read calculations as the
teacher had, is tuned on these traces, and on their last lines alone, by as many tokens; three seeds
each. Prints a table as Markdown. What is finished is not made again, and what was cut off goes on.
`--only=REGEX` makes runs whose whole name matches, with those they begin from.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import answers
import stages
from stages import Run

SEEDS = (0, 1, 2)
HELD_OUT = "builtin:last_digit:500"
READ = (
    "data.train=builtin:arithmetic:10k-110k@0.5,builtin:chain:1k-5k@0.5",
    *("data.eval=builtin:chain:500", "data.cleaning.near_duplicates=0.0", "data.seq_len=192"),
    *("tokenizer.kind=bytes", "batch_size=32", "steps=1000", "optimizer.learning_rate=2e-3"),
    *("references=False", "eval.every=250"),
)
SIZES = {
    "teacher": ("model.layers=4", "model.width=128", "model.heads=4"),
    "student": ("model.layers=2", "model.width=64", "model.heads=2"),
}
TUNED = (
    *(f"data.eval={HELD_OUT}", "data.seq_len=192", "optimizer.learning_rate=1e-3"),
    *("max_new_tokens=96", "eval.every=200", "sft.reasoning=think"),
)
EXAMPLES = "data.train=builtin:last_digit:2500-10500"
# Among these are questions of two steps, as in what is held out; behind the 4,840th are none.
ASKED = (
    *("data.train=builtin:last_digit:500-2500", "samples=4", "rewards=numeric", "least=1"),
    *("keep=first", "max_new_tokens=96", "batch_size=64"),
)
STUDENTS = ("traces", "answers")


def runs(folder: Path) -> dict[str, Run]:
    """All runs by name, each after those that it begins from."""
    made = {f"{name}-base": Run("pretrain", "", (*READ, *size)) for name, size in SIZES.items()}
    learnt = (*TUNED, EXAMPLES, "batch_size=16", "steps=1500")
    made["teacher"] = Run("sft", "teacher-base", learnt)
    made["asked"] = Run("generate_data", "", ASKED, {"teacher.init": "teacher"})
    for seed in SEEDS:
        for name in STUDENTS:
            read = f"data.train={_file(folder, name)}"
            fields = (*TUNED, read, f"seed={seed}", "batch_size=16", "steps=600")
            made[f"{name}-{seed}"] = Run("sft", "student-base", fields)
    return made


def main() -> int:
    """Makes what is missing, and returns the exit code."""
    options = stages.parser(__doc__.splitlines()[0], has_data=False).parse_args()
    folder = options.workdir.resolve()
    planned = runs(folder)
    if code := stages.make(planned, folder, "asked|student-base"):
        return code
    _keep_answers(_file(folder, "traces"), _file(folder, "answers"))
    if code := stages.make(planned, folder, options.only):
        return code
    print("\n".join(_table(folder)))
    return 0


def _file(folder: Path, name: str) -> Path:
    """What a student reads."""
    return folder / "asked" / "data.jsonl" if name == "traces" else folder / "answers.jsonl"


def _keep_answers(traces: Path, path: Path) -> None:
    """Writes the records without what was thought."""
    with traces.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8") as file:
        for record in map(json.loads, lines):
            response = record["response"].split("</think>")[1]
            kept = {"prompt": record["prompt"], "response": response}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")


def _table(folder: Path) -> Iterator[str]:
    """Held-out answers that are right."""
    yield "| | right |"
    yield "|---|---|"
    for name, called in {
        "teacher": ["teacher"],
        **{name: [f"{name}-{seed}" for seed in SEEDS] for name in STUDENTS},
    }.items():
        done = [folder / run for run in called if (folder / run / "summary.json").exists()]
        right = [answers.mean_reward(run, HELD_OUT, "numeric", 500, 96) for run in done]
        if right:
            spread = f"{statistics.mean(right):.1%} ({min(right):.1%} to {max(right):.1%})"
            yield f"| {name} | {spread} |"


if __name__ == "__main__":
    sys.exit(main())
