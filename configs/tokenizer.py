"""Trains a tokenizer, or compares several on the same held-out text.

    python -m jaxllm.main --config=configs/tokenizer.py --workdir=runs/tokenizer \
        --config.data.train=my_text.jsonl --config.tokenizer.kind=unigram
    python -m jaxllm.main --config=configs/tokenizer.py:compare --workdir=runs/tokenizers

The first leaves a tokenizer in `runs/tokenizer/tokenizer`, for `--config.tokenizer.path=` of other
runs, and prints what it makes of the held-out text. The second trains every kind on
`builtin:pydocs` with a vocabulary of 8,192, in about two minutes on two CPU cores, and prints a
table; `--config.compare=bpe,unigram,path/of/another` chooses others (or more: what is measured
stays), and with `--config.comparison.train_bytes=1000000` one small model is trained with each
lossless one on as many bytes of text, so that bits per byte can be compared. What is trained lies
in `runs/tokenizers/compared/KIND/tokenizer`.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.errors import UserError
from jaxllm.stages.tokenizer import TrainTokenizerConfig
from jaxllm.tokenizers.trainers import TRAINERS


def get_config(preset: str = "") -> ConfigDict:
    """One tokenizer, or with `compare` every kind."""
    config = config_dict(TrainTokenizerConfig())
    if preset == "compare":
        config.compare = ",".join(TRAINERS)
    elif preset:
        raise UserError(f"configs/tokenizer.py has no preset {preset!r}; it has :compare.")
    return config
