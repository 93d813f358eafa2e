"""Tells what texts are, or what responses are worth.

    python -m jaxllm.main --config=configs/score.py --config.init=runs/topic --config.text="A file."
    python -m jaxllm.main --config=configs/score.py --config.init=runs/topic \
        --config.texts=mine.jsonl --workdir=runs/scored
    python -m jaxllm.main --config=configs/score.py --config.init=runs/reward \
        --config.texts=answers.jsonl --workdir=runs/scored
    python -m jaxllm.main --config=configs/score.py --config.rewards=numeric,format:0.2 \
        --config.texts=answers.jsonl --workdir=runs/scored

The first two ask a classifier of configs/classify.py, the third a reward model of
configs/reward.py, and the last functions that judge responses (docs/rewards.md), among which
`reward_model` may stand beside `init`. A line of JSON for each record of a file goes to
runs/scored/scores.jsonl.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.score import ScoreConfig


def get_config() -> ConfigDict:
    """Every field at its default."""
    return config_dict(ScoreConfig())
