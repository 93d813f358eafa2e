"""What of a teacher makes a small model better than training it alone, by as many of its FLOPs.

    python experiments/distillation/run.py --workdir=runs/distillation --text=FILE,FILE

For `builtin:pydocs`, and for the text of the files (JSON lines with `text`): pretrains a teacher of
a million parameters, has it go on with as many pieces of text as a student reads, and trains
students of a quarter of its size in each of `WAYS`; with three learning rates, and the best of them
(by what is held out, for all ways alike) with two seeds more. Those of `BESIDE` vary forward KL and
take its best rate. A student takes 400 updates of 8 sequences of 256 tokens; one that writes itself
takes fewer, by the FLOPs of writing. FLOPs of the teacher are not counted, and what inner states
cost is left out.

Prints the tables as Markdown, and draws `scores.png` into the work directory. What is finished is
not made again, and what was cut off goes on. `--only=REGEX` makes runs whose whole name matches;
names begin with `pydocs-` or `text-`, which need nothing of each other.
"""

import itertools
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from scores import draw
from texts import BEGINNINGS, HELD, TRAINED_ON, WRITTEN, keep_written, split

sys.path.append(str(Path(__file__).parents[1]))
import stages
from stages import Run

SEEDS = (0, 1, 2)
RATES = ("4e-3", "8e-3", "16e-3")
STEPS, ROWS, SEQ_LEN = 400, 8, 256
PROMPT = 64
OWN = 0.5
"""Share of the sequences that a student on its own texts writes."""
# Writing is a forward pass, a third of an update's FLOPs on the same tokens.
STEPS_WRITING = round(STEPS / (1 + OWN * (1 - PROMPT / SEQ_LEN) / 3))
TEACHER = (
    *("steps=1500", "batch_size=8", "tokenizer.vocab_size=2048", "model.layers=4"),
    *("model.width=128", "model.heads=2", "optimizer.name=muon", "optimizer.learning_rate=0.01"),
    *("eval.every=500", "references=False", "data.cleaning.near_duplicates=0.0"),
)
SMALL = ("model.layers=2", "model.width=64", "model.heads=2")
WAYS = {
    "alone": (*SMALL, "distill.alpha=1.0"),
    "black box": (*SMALL, "distill.alpha=1.0"),
    "forward KL": SMALL,
    "reverse KL": (*SMALL, "distill.divergence=reverse_kl"),
    "JSD": (*SMALL, "distill.divergence=jsd"),
    "on policy": (
        *(*SMALL, f"distill.on_policy_fraction={OWN}", f"distill.max_prompt={PROMPT}"),
        *(f"max_new_tokens={SEQ_LEN - PROMPT}", f"steps={STEPS_WRITING}"),
    ),
}
VARIED = "forward KL"
BESIDE = {
    # A head of the teacher is as wide as two of the other students.
    "a part of the teacher": (
        *("model.layers=2", "model.width=64", "model.heads=1", "distill.pruned_start=True"),
    ),
    "half forward KL, half labels": (*SMALL, "distill.alpha=0.5"),
    "hidden states too": (*SMALL, "distill.hidden_coef=1.0"),
    "attention too": (*SMALL, "distill.attention_coef=1.0"),
}


def main() -> int:
    """Makes what is missing, and returns the exit code."""
    parser = stages.parser(__doc__.splitlines()[0], has_data=False)
    parser.add_argument("--text", default="", help="files of text, separated by commas")
    options = parser.parse_args()
    folder = options.workdir.resolve()
    sources = {"pydocs": "builtin:pydocs"} | ({"text": options.text} if options.text else {})
    sources = {name: text for name, text in sources.items() if _may_match(options.only, name)}
    if not sources:
        parser.error("--only is of the text that --text names")
    for corpus, source in sources.items():
        split(source, folder / f"{corpus}-texts", STEPS * ROWS)
    planned = {name: run for corpus in sources for name, run in _teachers(corpus, folder).items()}
    if code := stages.make(planned, folder, options.only):
        return code
    for corpus in sources:
        written = folder / f"{corpus}-texts" / WRITTEN
        keep_written(folder / f"{corpus}-writing" / "generations.jsonl", written)
    for ways, rates, seeds in (
        (WAYS, RATES, SEEDS[:1]),
        (WAYS, (), SEEDS[1:]),
        (BESIDE, (), SEEDS[:1]),
        (BESIDE, (), SEEDS[1:]),
    ):
        for corpus in sources:
            best = _best(corpus, stages.done(planned, folder))
            for way, seed in itertools.product(ways, seeds):
                for rate in rates or best.get(way, ()):
                    name = _name(corpus, way, rate, seed)
                    planned[name] = _student(corpus, way, rate, seed, folder)
        if code := stages.make(planned, folder, options.only):
            return code
    done = stages.done(planned, folder)
    for corpus in sources:
        print("\n".join(_table(corpus, done)), end="\n\n")
    draw({corpus: _of_ways(corpus, done) for corpus in sources}, folder / "scores.png")
    return 0


def _may_match(only: str, corpus: str) -> bool:
    """Whether the expression, which is of names of runs, is not of another corpus alone."""
    others = {"pydocs", "text"} - {corpus}
    return not any(re.match(f"{other}-", only) for other in others)


def _teachers(corpus: str, folder: Path) -> dict[str, Run]:
    """The teacher, and what it writes."""
    return {
        f"{corpus}-teacher": Run("pretrain", "", (*TEACHER, *_texts(corpus, folder, TRAINED_ON))),
        f"{corpus}-writing": Run(
            "generate",
            f"{corpus}-teacher",
            (
                f"prompts={folder}/{corpus}-texts/{BEGINNINGS}",
                *(f"max_new_tokens={SEQ_LEN - PROMPT}", "batch_size=64"),
            ),
        ),
    }


def _student(corpus: str, way: str, rate: str, seed: int, folder: Path) -> Run:
    texts = _texts(corpus, folder, WRITTEN if way == "black box" else TRAINED_ON)
    fields = (
        *(f"steps={STEPS}", f"batch_size={ROWS}", f"data.seq_len={SEQ_LEN}", "eval.every=200"),
        *(f"seed={seed}", f"optimizer.learning_rate={rate}", "checkpoint.every=1000"),
        "data.cleaning.near_duplicates=0.0",
    )
    return Run(
        "distill",
        "",
        (*fields, *texts, *(WAYS | BESIDE)[way]),
        {"teacher.init": f"{corpus}-teacher"},
        (f"{corpus}-writing",) if way == "black box" else (),
    )


def _texts(corpus: str, folder: Path, trained_on: str) -> tuple[str, ...]:
    texts = folder / f"{corpus}-texts"
    return (
        *(f"data.train={texts / trained_on}", f"data.eval={texts / HELD}"),
        "data.parse_special_tokens=False",
    )


def _name(corpus: str, way: str, rate: str, seed: int) -> str:
    return f"{corpus}-{re.sub('[ ,]+', '_', way)}-{rate}-{seed}"


def _best(corpus: str, done: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[str, ...]]:
    """Of each way whose first seed is done with every rate the best of them, and for those beside
    it that of `VARIED`."""
    found = {}
    for way in WAYS:
        names = {rate: _name(corpus, way, rate, SEEDS[0]) for rate in RATES}
        if all(name in done for name in names.values()):
            bits = {rate: done[name]["eval/bits_per_byte"] for rate, name in names.items()}
            found[way] = (min(bits, key=bits.__getitem__),)
    return found | (dict.fromkeys(BESIDE, found[VARIED]) if VARIED in found else {})


def _of_ways(
    corpus: str, done: Mapping[str, Mapping[str, float]]
) -> dict[str, list[Mapping[str, float]]]:
    """The scores of each way's seeds at its best rate; of the teacher too."""
    found = {}
    if f"{corpus}-teacher" in done:
        found["teacher"] = [done[f"{corpus}-teacher"]]
    for way, (rate,) in _best(corpus, done).items():
        names = [_name(corpus, way, rate, seed) for seed in SEEDS]
        if scores := [done[name] for name in names if name in done]:
            found[way] = scores
    return found


def _table(corpus: str, done: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    yield f"{corpus}: held-out bits per byte, and agreement with the teacher"
    yield ""
    yield "| | rate | seeds | bits per byte | agreement | parameters |"
    yield "|---|---|---|---|---|---|"
    best = _best(corpus, done)
    for way, scores in _of_ways(corpus, done).items():
        bits = _spread([each["eval/bits_per_byte"] for each in scores], ".3f")
        agreement = [each["eval/agreement"] for each in scores if "eval/agreement" in each]
        agreed = _spread(agreement, ".1%") if agreement else ""
        size = f"{scores[0]['model/parameters']:,.0f}"
        rate = "".join(best.get(way, ()))
        yield f"| {way} | {rate} | {len(scores)} | {bits} | {agreed} | {size} |"


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    sys.exit(main())
