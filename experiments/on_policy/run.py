"""Policies that learn from their own answers: PPO by what is exact and by a model, and reasoning.

    python experiments/on_policy/run.py --workdir=runs/on_policy

Trains, one run after another, with three seeds each,

- PPO by an exact reward (`exact`), from a model that copies letters, seldom without a fault;
- PPO by a learnt reward model, with the exact reward measured beside it: held to where it began
  (`held`), and not (`free`);
- a model that thinks before it answers, tuned on 70 worked examples (`traces`) until more steps
  help no more (`plateau`), and from there GRPO by whether answers are right (`grpo`), or from
  `traces` (`early`); beside it the tuning gone on with for as long (`longer`), and that on the
  answers of these examples alone (`answers`, as many steps as `traces`).

Prints the tables as Markdown, and draws `curves.png` into the work directory. What is finished is
not made again, and what was cut off goes on. `--only=REGEX` makes runs whose whole name matches,
with those they begin from.
"""

import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from curves import draw

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.reporting.metrics_file import read_metrics

sys.path.append(str(Path(__file__).parents[1]))
import answers
import copying
import stages
from stages import Run

SEEDS = (0, 1, 2)
PPO = (
    *("data.train=builtin:copying:200k-220k", f"data.eval={copying.HELD_OUT}"),
    *("rl.max_prompt=64", "max_new_tokens=24", "batch_size=128", "rl.minibatches=2"),
    *("rl.epochs=2", "optimizer.learning_rate=2e-4", "optimizer.learning_rates=value/.*:10"),
    *("checkpoint.every=200", "log.every=4"),
)
HELD_OUT = "builtin:last_digit:500"
TRACES = (
    *("data.train=builtin:last_digit:500-570", f"data.eval={HELD_OUT}", "data.seq_len=192"),
    *("batch_size=8", "optimizer.learning_rate=1e-3", "eval.every=40", "max_new_tokens=96"),
)
TUNED = {
    "traces": ("base", "think", 160),
    "answers": ("base", "leave_out", 160),
    "plateau": ("traces", "think", 1300),
    "longer": ("plateau", "think", 900),
}
"""What it begins from, how answers are written, and steps."""
GRPO = (
    *("data.train=builtin:last_digit:1k-40k", f"data.eval={HELD_OUT}", "rewards=numeric"),
    *("rl.max_prompt=128", "max_new_tokens=96", "batch_size=128", "rl.epochs=2"),
    *("rl.minibatches=2", "steps=80", "optimizer.learning_rate=1e-4"),
    *("optimizer.warmup_steps=10", "optimizer.schedule=constant"),
    *("checkpoint.every=100", "eval.every=20", "log.every=2"),
)
# What has been tuned for long says nearly the same each time at a temperature of 1.
LEARNING = {"grpo": ("plateau", 1.5), "early": ("traces", 1.0)}
"""What GRPO begins from, and the temperature at which it writes."""


def runs() -> dict[str, Run]:
    """All runs by name, each after those that it begins from."""
    worked = ("data.cleaning.near_duplicates=0.0", "optimizer.learning_rate=2e-3")
    size = ("tokenizer.kind=bytes", "model.layers=4", "model.width=128", "model.heads=4")
    made = {
        **copying.READER,
        "judge": copying.judge(0),
        # It has begun to copy, and makes a fault in most answers.
        "student": Run("sft", "reader-base", (*copying.TUNED, "steps=28", "eval.every=1000")),
        "base": Run(
            "pretrain",
            "",
            (
                *(*worked, *size, "data.seq_len=192", "batch_size=32", "steps=1000"),
                *("data.train=builtin:arithmetic:10k-110k@0.5,builtin:chain:1k-5k@0.5",),
                *("data.eval=builtin:chain:500", "references=False", "eval.every=250"),
            ),
        ),
    }
    for seed in SEEDS:
        given = (*PPO, f"seed={seed}")
        exact = ("rewards=exact_match", "ppo.lam=1", "steps=240", "eval.every=20")
        made[f"exact-{seed}"] = Run("ppo", "student", (*given, *exact))
        by_model = (
            *("rewards=reward_model:1,exact_match:0", "steps=120", "eval.every=20"),
            "optimizer.schedule=constant",
        )
        # The judge tells right from wrong by 26 in the mean: 1 a nat would not hold anything.
        for name, coefficient in (("free", 0), ("held", 5)):
            fields = (*given, *by_model, f"rl.kl_coef={coefficient}")
            made[f"{name}-{seed}"] = Run("ppo", "student", fields, {"reward.init": "judge"})
        for name, (begun, layout, steps) in TUNED.items():
            init = begun if begun == "base" else f"{begun}-{seed}"
            fields = (*TRACES, f"seed={seed}", f"sft.reasoning={layout}", f"steps={steps}")
            made[f"{name}-{seed}"] = Run("sft", init, fields)
        for name, (begun, temperature) in LEARNING.items():
            fields = (*GRPO, f"seed={seed}", f"temperature={temperature}")
            made[f"{name}-{seed}"] = Run("grpo", f"{begun}-{seed}", fields)
    return made


def main() -> int:
    """Makes what is missing, and returns the exit code."""
    options = stages.parser(__doc__.splitlines()[0], has_data=False).parse_args()
    folder, planned = options.workdir.resolve(), runs()
    code = stages.make(planned, folder, options.only)
    if code:
        return code
    done = stages.done(planned, folder)
    print("\n".join(_ppo(done, folder)), end="\n\n")
    print("\n".join(_reasoning(done, folder)))
    draw(folder, done, SEEDS, folder / "curves.png")
    return 0


def _ppo(done: Mapping[str, Mapping[str, float]], folder: Path) -> Iterator[str]:
    """What policies are worth where they began, at their best by the exact reward, and at the
    end."""
    yield "| | exactly right at the beginning | at the best evaluation | its step | at the end |"
    yield "|---|---|---|---|---|"
    begun = answers.mean_reward(folder / "student", copying.HELD_OUT, "exact_match", 500, 24)
    for name in ("exact", "held", "free"):
        best, at, last = [], [], []
        for seed in SEEDS:
            if f"{name}-{seed}" in done:
                metrics = read_metrics(RunDirectory(folder / f"{name}-{seed}").metrics)
                right = "eval/rewards/exact_match"
                lines = [line for line in metrics if right in line]
                highest = max(lines, key=lambda line: line["eval/rewards/exact_match"])
                best.append(highest[right])
                at.append(highest["step"])
                last.append(lines[-1][right])
        if best:
            told = f"{_spread(best)} | {_spread(at, '.0f')} | {_spread(last)}"
            yield f"| {name} | {begun:.1%} | {told} |"


def _reasoning(done: Mapping[str, Mapping[str, float]], folder: Path) -> Iterator[str]:
    """Held-out answers that are right, and how long it took."""
    yield "| | right | seconds |"
    yield "|---|---|---|"
    for name in ("answers", "traces", "plateau", "longer", "grpo", "early"):
        found = [run for seed in SEEDS if (run := f"{name}-{seed}") in done]
        if found:
            right = [
                answers.mean_reward(folder / run, HELD_OUT, "numeric", 500, 96) for run in found
            ]
            seconds = [done[run]["time/total"] for run in found]
            yield f"| {name} | {_spread(right)} | {_spread(seconds, '.0f')} |"


def _spread(values: list[float], form: str = ".1%") -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    sys.exit(main())
