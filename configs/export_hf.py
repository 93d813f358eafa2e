"""A run's model as a folder that Hugging Face Transformers loads.

    python -m jaxllm.main --config=configs/export_hf.py --config.init=runs/first \
        --workdir=exported

As long as reading and writing the weights takes.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.export_hf import ExportConfig


def get_config() -> ConfigDict:
    """Every field of the stage, at its default."""
    return config_dict(ExportConfig())
