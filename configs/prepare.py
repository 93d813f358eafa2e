"""Cleans, splits and tokenises text once, for several runs to share.

    python -m jaxllm.main --config=configs/prepare.py --workdir=runs/data \
        --config.data.train=web/*.jsonl.zst@0.7,books.parquet@0.3
    python -m jaxllm.main --config=configs/pretrain.py --workdir=runs/mine \
        --config.data.train=web/*.jsonl.zst@0.7,books.parquet@0.3 \
        --config.data.store=runs/data/store --config.tokenizer.path=runs/data/tokenizer

The second finds what the first has made, as long as the options that decide it are the same;
weights, temperature and batches may differ. Megabytes a second on a laptop.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.prepare import PrepareConfig


def get_config() -> ConfigDict:
    """Every field of the stage, at its default."""
    return config_dict(PrepareConfig())
