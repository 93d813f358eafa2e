"""Pretrains a decoder on text, from a laptop's first run to 8 B parameters.

    python -m jaxllm.main --config=configs/pretrain.py --workdir=runs/first

The default trains a model of about a million parameters on `builtin:pydocs`, the documentation
and sources of the Python that runs, so nothing is downloaded.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.pretrain import PretrainConfig


def get_config(preset: str = "") -> ConfigDict:
    """The default, or one of the presets `tiny`, `124m`, `350m`, `1b`, `8b`, `dN`."""
    config = config_dict(PretrainConfig())
    config.prompt = "def "
    config.steps = 60
    config.batch_size = 8
    config.tokenizer.vocab_size = 4096
    config.model.width = 192
    config.model.heads = 6
    config.model.kv_heads = 2
    config.eval.every=20
    config.checkpoint.every=20
    return config
