"""Fine-tuning a small model of one's own: instructions, low-rank pairs, classification.

    python experiments/fine_tuning/run.py --workdir=runs/fine_tuning --data=FOLDER

Pretrains a model of 2.6 million parameters, and one of 4.2 that reads twice as much, then trains
them further in each way that README.md tells of, one run after another; prints the tables as
Markdown and draws `curves.png`. What is finished is not made again, and what was cut off goes on.
`--only=REGEX` makes runs whose whole name matches, with those they begin from.

FOLDER holds JSON lines: the files named below. Logistic regression on TF-IDF wants scikit-learn,
and its columns stay empty without it.
"""

import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from curves import draw

from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.labels import LabelledKind, LabelsConfig
from jaxllm.data.selection import split_documents
from jaxllm.data.split import HELD_OUT, TRAIN
from jaxllm.models.lora import LoraConfig

sys.path.append(str(Path(__file__).parents[1]))
import stages
from stages import Run

TEXT = (
    "pretrain_en_c4",
    "pretrain_en_wiki",
    "pretrain_en_speeches",
    "pretrain_zh_poetry_simplified",
)


def _pretraining(width: int, steps: int) -> tuple[str, ...]:
    return (
        "tokenizer.vocab_size=4096",
        f"model.width={width}",
        f"model.heads={width // 64}",
        "batch_size=8",
        f"steps={steps}",
        "eval.every=1000",
        "checkpoint.every=500",
        "references=False",
        "prompt=The",
    )


BASES = {"base": _pretraining(192, 2000), "larger": _pretraining(256, 4000)}

UNTRAINED = ("steps=1", "optimizer.learning_rate=1e-9")
"""One step that changes nothing, and then the evaluation."""
_WITH_VOCABULARY = "embedding|.*(query|value)/kernel|.*mlp/.*/kernel"
WAYS: dict[str, tuple[str, ...]] = {
    "full": (),
    "pairs": ("lora.rank=8",),
    "vocabulary": ("lora.rank=8", f"lora.pattern={_WITH_VOCABULARY}"),
    "everything": ("lora.rank=8", f"lora.pattern=embedding|{LoraConfig.pattern}"),
}
"""All parameters; pairs beside all matrices of attention and MLP; pairs beside the vocabulary's
too, and not beside keys and outputs of attention, so that they are as many; and beside all."""
RATES = {
    "full": ("1e-3", "3e-3", "1e-2"),
    "pairs": ("3e-3", "1e-2", "3e-2"),
    "vocabulary": ("3e-3", "1e-2", "3e-2"),
    "everything": ("3e-3", "1e-2", "3e-2"),
}
"""Between which the best lies."""


class Tuning(NamedTuple):
    """Instructions, learnt in several ways from one base."""

    files: tuple[str, ...]
    base: str
    steps: tuple[int, ...]
    ways: tuple[str, ...]
    all_rates: bool = True
    """Whether each way is tried with all of its learning rates, or with the middle one."""


_ALPACA = ("instruct_alpaca_en",)
_CHINESE = ("instruct_gpt4_alpaca_zh", "chat_oasst_zh")
TUNINGS = {
    "english": Tuning(_ALPACA, "base", (100, 300), ("full", "pairs", "vocabulary")),
    "larger": Tuning(_ALPACA, "larger", (100, 300), ("full", "everything")),
    "chinese": Tuning(_CHINESE, "base", (300,), ("full", "pairs", "vocabulary"), False),
}


class Task(NamedTuple):
    """Labelled texts."""

    file: str
    fields: tuple[str, ...]
    label: str = "label"
    counted: str = "word"
    """What TF-IDF counts: words and pairs of them, or one to three characters."""


TASKS = {
    "spam": Task("cls_sms_spam_en", ("steps=400", "classify.prompting=0,4")),
    "poems": Task("pretrain_zh_poetry_simplified", ("steps=450",), "source", "char"),
    "polarity": Task("cls_movie_sentence_polarity_en", ("steps=450",)),
}


def runs(data: Path, store: Path) -> dict[str, Run]:
    """All runs by name, each after the one that it begins from."""

    def sources(files: Sequence[str]) -> str:
        return "data.train=" + ",".join(str(data / f"{file}.jsonl") for file in files)

    kept = f"data.store={store}"
    made = {name: Run("pretrain", "", (sources(TEXT), *given)) for name, given in BASES.items()}
    made["published"] = Run("export_hf", "base", ())
    for name, tuning in TUNINGS.items():
        shared = (sources(tuning.files), kept)
        made[f"{name}-untrained"] = Run("sft", tuning.base, (*shared, *UNTRAINED))
        for steps, way in itertools.product(tuning.steps, tuning.ways):
            every = (f"steps={steps}", f"eval.every={min(steps, 150)}")
            for rate in RATES[way] if tuning.all_rates else RATES[way][1:2]:
                given = (*shared, *every, *WAYS[way], f"optimizer.learning_rate={rate}")
                made[f"{name}-{way}-{rate}-{steps}"] = Run("sft", tuning.base, given)
    for name, task in TASKS.items():
        given = (sources([task.file]), kept, "eval.every=150", *task.fields)
        made[name] = Run("classify", "base", (*given, f"classify.label={task.label}"))
    for name in ("english-full-3e-3-300", "spam"):
        made[f"published-{name}"] = made[name]._replace(init="published")
    return made


def main() -> int:
    """Makes what is missing, and returns the exit code."""
    options = stages.parser(__doc__.splitlines()[0]).parse_args()
    folder, data = options.workdir.resolve(), options.data.resolve()
    planned = runs(data, folder / "store")
    code = stages.make(planned, folder, options.only)
    if code:
        return code
    done = stages.done(planned, folder)
    print("\n".join(_instructions(done)), end="\n\n")
    print("\n".join(_classification(done, data, folder)))
    draw(folder, done, folder / "curves.png")
    return 0


def _instructions(done: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The table of held-out losses, each way with its best learning rate."""
    yield "| | steps | way | learning rates | losses | over all parameters | trained |"
    yield "|---|---|---|---|---|---|---|"
    for tuned, tuning in TUNINGS.items():
        if found := done.get(f"{tuned}-untrained"):
            yield f"| {tuned} | 0 | | | {found['eval/loss']:.3f} | | |"
        for steps in tuning.steps:
            full = None
            for way in tuning.ways:
                by_rate = {
                    rate: done[name]
                    for rate in RATES[way]
                    if (name := f"{tuned}-{way}-{rate}-{steps}") in done
                }
                if not by_rate:
                    continue
                losses = [found["eval/loss"] for found in by_rate.values()]
                full = min(losses) if way == "full" else full
                more = f"{min(losses) / full - 1:+.1%}" if full and way != "full" else ""
                trained = int(next(iter(by_rate.values()))["model/trained_parameters"])
                shown = " / ".join(
                    f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses
                )
                told = " / ".join(by_rate)
                yield f"| {tuned} | {steps} | {way} | {told} | {shown} | {more} | {trained:,} |"
    if found := done.get("published-english-full-3e-3-300"):
        yield f"| english, published | 300 | full | 3e-3 | {found['eval/loss']:.3f} | | |"


def _classification(
    done: Mapping[str, Mapping[str, float]], data: Path, workdir: Path
) -> Iterator[str]:
    """The table of classifiers beside logistic regression on the same split."""
    yield "| | seconds | accuracy | macro-F1 | always the commonest | TF-IDF | TF-IDF, macro-F1 |"
    yield "|---|---|---|---|---|---|---|"
    for name, task in TASKS.items():
        for prefix in ("", "published-"):
            if found := done.get(prefix + name):
                told = f"{found['time/total']:.0f} | {found['eval/accuracy']:.1%} "
                told += f"| {found['eval/macro_f1']:.3f} | {found['eval/majority']:.1%}"
                other = " | " if prefix else _tf_idf(task, data, workdir)
                yield f"| {prefix}{name} | {told} | {other} |"


def _tf_idf(task: Task, data: Path, workdir: Path) -> str:
    """Accuracy and macro-F1 of logistic regression on the texts that a run of `classify` splits."""
    if importlib.util.find_spec("sklearn") is None:
        return " | "
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    config = DataConfig(
        train=str(data / f"{task.file}.jsonl"),
        eval_fraction=0.2,
        packing="best_fit",
        cleaning=CleaningConfig(near_duplicates=0.0),
    )
    reader = LabelledKind(LabelsConfig(label=task.label)).reader
    split = split_documents(config, workdir / "store", workdir / "tf_idf", lambda *_: None, reader)
    texts: dict[int, list[str]] = {TRAIN: [], HELD_OUT: []}
    labels: dict[int, list[str]] = {TRAIN: [], HELD_OUT: []}
    for document, side in split.documents():
        record = json.loads(document.text)
        texts[side].append(record["text"])
        labels[side].append(str(record["label"]))
    longest = 3 if task.counted == "char" else 2
    count = TfidfVectorizer(
        analyzer=task.counted, ngram_range=(1, longest), sublinear_tf=True, min_df=2
    )
    model = LogisticRegression(C=10, max_iter=3000)
    model.fit(count.fit_transform(texts[TRAIN]), labels[TRAIN])
    chosen = model.predict(count.transform(texts[HELD_OUT]))
    right = sum(a == b for a, b in zip(chosen, labels[HELD_OUT], strict=True))
    macro = f1_score(labels[HELD_OUT], chosen, average="macro")
    return f"{right / len(chosen):.1%} | {macro:.3f}"


if __name__ == "__main__":
    sys.exit(main())
