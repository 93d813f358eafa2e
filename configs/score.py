"""Tells what texts are, by a classifier that configs/classify.py has trained.

    python -m jaxllm.main --config=configs/score.py --config.init=runs/topic --config.text="A file."
    python -m jaxllm.main --config=configs/score.py --config.init=runs/topic \
        --config.texts=mine.jsonl --workdir=runs/scored

The second line writes a line of JSON for each record of the file to runs/scored/scores.jsonl.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.score import ScoreConfig


def get_config() -> ConfigDict:
    """Every field at its default."""
    return config_dict(ScoreConfig())
