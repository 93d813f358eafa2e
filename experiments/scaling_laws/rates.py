"""Where the best learning rate lies as models grow wider, by AdamW and by Muon.

    python experiments/scaling_laws/rates.py --workdir=runs/rates

Trains models of four widths with several rates each for as many updates on `builtin:pydocs`, prints
the losses as Markdown, and what power of the width the best rate follows: the vertex of a parabola
through the three rates around the best. What is finished is not made again; `--only=REGEX` makes
runs whose whole name matches.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
import stages
from stages import Run

WIDTHS = (32, 64, 128, 256)
RATES = {
    "adamw": ("1e-3", "2e-3", "4e-3", "8e-3", "16e-3", "32e-3"),
    "muon": ("25e-4", "5e-3", "1e-2", "2e-2", "4e-2"),
}
SHARED = (
    *("steps=400", "batch_size=4", "tokenizer.vocab_size=1024", "model.layers=2"),
    *("optimizer.schedule=linear", "optimizer.warmup_steps=20", "optimizer.final_fraction=0.0"),
    *("eval.every=400", "checkpoint.every=1000", "references=False", "log.every=50"),
)


def main() -> int:
    """Makes what is missing, and returns the exit code."""
    options = stages.parser(__doc__.splitlines()[0], has_data=False).parse_args()
    folder = options.workdir.resolve()
    planned = {
        f"{name}-{width}-{rate}": _run(name, width, rate, folder)
        for name, rates in RATES.items()
        for width in WIDTHS
        for rate in rates
    }
    if code := stages.make(planned, folder, options.only):
        return code
    done = stages.done(planned, folder)
    for name in RATES:
        print("\n".join(_table(name, done)), end="\n\n")
    return 0


def _run(name: str, width: int, rate: str, folder: Path) -> Run:
    model = (f"model.width={width}", f"model.heads={max(1, width // 32)}")
    fitted = (f"optimizer.name={name}", f"optimizer.learning_rate={rate}")
    return Run("pretrain", "", (*SHARED, f"data.store={folder / 'text'}", *model, *fitted))


def _table(name: str, done: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    rates = RATES[name]
    yield f"| {name}, width | " + " | ".join(f"{float(rate):g}" for rate in rates) + " | best |"
    yield "|---" * (len(rates) + 2) + "|"
    best = {}
    for width in WIDTHS:
        found = [done.get(f"{name}-{width}-{rate}", {}).get("eval/loss") for rate in rates]
        cells = ["" if loss is None else f"{loss:.3f}" for loss in found]
        if None not in found:
            best[width] = _vertex(np.asarray(rates, float), np.asarray(found, float))
        told = f"{best[width]:.2g}" if width in best else ""
        yield f"| {width} | " + " | ".join(cells) + f" | {told} |"
    if len(best) > 1:
        slope = np.polyfit(np.log(list(best)), np.log(list(best.values())), 1)[0]
        yield ""
        yield f"The best rate goes as width^{slope:.2f}."


def _vertex(rates: np.ndarray, losses: np.ndarray) -> float:
    """The rate of least loss, between those that were tried where it is not at an end."""
    at = int(np.argmin(losses))
    if at in (0, len(rates) - 1):
        return float(rates[at])
    near = slice(at - 1, at + 2)
    curvature, slope, _ = np.polyfit(np.log(rates[near]), losses[near], 2)
    return float(np.exp(-slope / (2 * curvature)))


if __name__ == "__main__":
    sys.exit(main())
