"""Preferences: reward models beside simple rules, and policies that learn from pairs.

    python experiments/preferences/run.py --workdir=runs/preferences --data=FOLDER

Trains, one run after another, with three seeds each,

- reward models on real preferences in English and Chinese, from a model that is pretrained and
  tuned here, beside always preferring the longer response and a Bradley-Terry model of words;
- reward models and policies (DPO, KTO) on `builtin:copying`, where an exact check judges what the
  policies and the model that they began from write (`judge.py`).

Prints the tables as Markdown. What is finished is not made again, and what was cut off goes on.
`--only=REGEX` makes runs whose whole name matches, with those they begin from. FOLDER holds JSON
lines: the files named below. The model of words wants scikit-learn.
"""

import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from judge import Judge

from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.preferences import PreferenceReader
from jaxllm.data.selection import split_documents
from jaxllm.data.split import HELD_OUT, TRAIN

sys.path.append(str(Path(__file__).parents[1]))
import copying
import stages
from stages import Run

SEEDS = (0, 1, 2)
TEXT = (
    "pretrain_en_c4",
    "pretrain_en_wiki",
    "pretrain_en_speeches",
    "pretrain_zh_poetry_simplified",
)
INSTRUCTIONS = ("instruct_alpaca_en", "instruct_gpt4_alpaca_zh", "chat_oasst_zh")
PREFERENCES = {
    "english": ("pref_llmsfromscratch_en", "pref_dpo_mix_en"),
    "chinese": ("pref_oasst_zh", "pref_dpo_mix_zh"),
}
LOSSES = ("sigmoid", "kto")
PAIRS = ("data.train=builtin:copying:45k-55k", f"data.eval={copying.HELD_OUT}")
EVAL_FRACTION = 0.2


def runs(data: Path) -> dict[str, Run]:
    """All runs by name, each after the one that it begins from."""

    def sources(files: tuple[str, ...]) -> str:
        return "data.train=" + ",".join(str(data / f"{file}.jsonl") for file in files)

    size = ("tokenizer.vocab_size=4096", "model.width=256", "model.heads=4", "references=False")
    made = {
        "base": Run(
            "pretrain", "", (sources(TEXT), *size, "batch_size=8", "steps=4000", "eval.every=1000")
        ),
        "tuned": Run(
            "sft",
            "base",
            (sources(INSTRUCTIONS), "steps=600", "eval.every=200", "optimizer.learning_rate=3e-3"),
        ),
        # Ended when it has begun to copy, but is seldom right.
        "copier-base": Run("pretrain", "", (*copying.BASE, "model.layers=2", "steps=1500")),
        "copier": Run("sft", "copier-base", (*copying.TUNED, "steps=200")),
        **copying.READER,
    }
    for seed in SEEDS:
        for language, files in PREFERENCES.items():
            given = (sources(files), f"seed={seed}", f"data.eval_fraction={EVAL_FRACTION}")
            made[f"{language}-{seed}"] = Run("reward", "tuned", given)
        made[f"copying-{seed}"] = copying.judge(seed)
        given = (f"seed={seed}", "data.seq_len=256", "batch_size=16")
        for loss in LOSSES:
            policy = (*PAIRS, *given, "steps=300", f"dpo.loss={loss}")
            made[f"{loss}-{seed}"] = Run("dpo", "copier", policy)
    return made


def main() -> int:
    """Makes what is missing, and returns the exit code."""
    options = stages.parser(__doc__.splitlines()[0]).parse_args()
    folder, data = options.workdir.resolve(), options.data.resolve()
    planned = runs(data)
    code = stages.make(planned, folder, options.only)
    if code:
        return code
    done = stages.done(planned, folder)
    print("\n".join(_rewards(done, data, folder)), end="\n\n")
    print("\n".join(_policies(done, folder)))
    return 0


def _rewards(done: Mapping[str, Mapping[str, float]], data: Path, folder: Path) -> Iterator[str]:
    """The table of reward models, each with the spread over seeds, beside simpler rules."""
    yield "| | held-out rankings | accuracy | longer is better | words | explained by length |"
    yield "|---|---|---|---|---|---|"
    for name in (*PREFERENCES, "copying"):
        found = [done[run] for seed in SEEDS if (run := f"{name}-{seed}") in done]
        if not found:
            continue
        words = _words(PREFERENCES[name], data, folder) if name in PREFERENCES else ""
        yield (
            f"| {name} | {found[0]['eval/rankings']:.0f} | {_spread(found, 'eval/accuracy')} "
            f"| {found[0]['eval/longer_is_better']:.1%} | {words} "
            f"| {_spread(found, 'eval/explained_by_length')} |"
        )


def _policies(done: Mapping[str, Mapping[str, float]], folder: Path) -> Iterator[str]:
    """The table of policies, judged by what they write."""
    planned = {loss: [f"{loss}-{seed}" for seed in SEEDS] for loss in LOSSES}
    made = {loss: [name for name in names if name in done] for loss, names in planned.items()}
    if not any(made.values()):
        return
    judge = Judge(folder / "copier", copying.HELD_OUT)
    yield "| | accuracy | margin | right | win rate | KL, nats a response | its standard error |"
    yield "|---|---|---|---|---|---|---|"
    yield f"| the model it began from | | | {judge.reference_right:.1%} | | | |"
    formats = {
        "eval/accuracy": ".1%",
        "eval/margin": ".2f",
        "right": ".1%",
        "win_rate": ".1%",
        "kl": ".2f",
        "kl_error": ".2f",
    }
    for loss, names in made.items():
        found = [{**done[name], **judge(folder / name)._asdict()} for name in names]
        if found:
            yield f"| {loss} | {' | '.join(_spread(found, *each) for each in formats.items())} |"


def _spread(found: list[Mapping[str, float]], name: str, form: str = ".1%") -> str:
    values = [scores[name] for scores in found]
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _words(files: tuple[str, ...], data: Path, folder: Path) -> str:
    """Accuracy of a Bradley-Terry model of words, on the pairs that the runs hold out.

    It is logistic regression on the difference of two responses' TF-IDF, of words and of single
    characters, which Chinese needs.
    """
    if importlib.util.find_spec("sklearn") is None:
        return ""
    from scipy.sparse import hstack, vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    config = DataConfig(
        train=",".join(str(data / f"{file}.jsonl") for file in files),
        eval_fraction=EVAL_FRACTION,
        packing="best_fit",
        cleaning=CleaningConfig(near_duplicates=0.0),
    )
    split = split_documents(
        config, folder / "store", folder / "words", lambda *_: None, PreferenceReader("")
    )
    pairs: dict[int, list[list[str]]] = {TRAIN: [], HELD_OUT: []}
    for document, side in split.documents():
        if side in pairs:
            pairs[side].append(json.loads(document.text)["responses"][:2])
    counts = [
        TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2)),
        TfidfVectorizer(sublinear_tf=True, min_df=2, analyzer="char", ngram_range=(1, 2)),
    ]
    for count in counts:
        count.fit([text for pair in pairs[TRAIN] for text in pair])

    def differences(side: int):
        better, worse = (
            hstack([count.transform([pair[place] for pair in pairs[side]]) for count in counts])
            for place in (0, 1)
        )
        return better - worse

    trained = differences(TRAIN)
    model = LogisticRegression(C=10, max_iter=3000, fit_intercept=False)
    model.fit(vstack([trained, -trained]), np.repeat([1, 0], trained.shape[0]))
    right = model.decision_function(differences(HELD_OUT)) > 0
    return f"{right.mean():.1%}"


if __name__ == "__main__":
    sys.exit(main())
