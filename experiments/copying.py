"""Runs on `builtin:copying`, where what is right is known exactly: a model that copies without a
fault, and a reward model from it."""

from stages import Run

HELD_OUT = "builtin:copying:500"
TEXTS = ("data.train=builtin:copying:5k-45k", f"data.eval={HELD_OUT}")
PAIRS = ("data.train=builtin:copying:45k-145k", f"data.eval={HELD_OUT}")
_RATE = "optimizer.learning_rate=2e-3"
BASE = (
    *(*TEXTS, "data.cleaning.near_duplicates=0.0", "data.seq_len=128", "batch_size=32"),
    *("tokenizer.kind=bytes", "model.width=128", "model.heads=4"),
    *(_RATE, "eval.every=500", "references=False"),
)
"""Of a model that reads copies, but for its layers and steps."""
TUNED = (*TEXTS, "data.seq_len=128", _RATE)
"""Of one that is tuned to copy, but for its steps."""
READER = {
    "reader-base": Run("pretrain", "", (*BASE, "model.layers=4", "steps=300")),
    # It copies without a fault.
    "reader": Run("sft", "reader-base", (*TUNED, "steps=300")),
}


def judge(seed: int) -> Run:
    """A reward model from `reader`, which sees 100,000 pairs."""
    given = (f"seed={seed}", "data.seq_len=256", "batch_size=16")
    return Run("reward", "reader", (*given, *PAIRS, "steps=2500", "optimizer.learning_rate=1e-3"))
