"""Loss, perplexity and bits per byte of a trained model.

    python -m jaxllm.main --config=configs/evaluate.py --config.init=runs/first
    python -m jaxllm.main --config=configs/evaluate.py --config.init=runs/first \
        --config.data.eval=my_text.jsonl

The first line measures on the text that the run held out, and gives the scores of its summary.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.evaluate import EvaluateConfig


def get_config() -> ConfigDict:
    """Every field of the stage, at its default."""
    return config_dict(EvaluateConfig())
