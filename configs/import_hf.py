"""Published weights in the Hugging Face format as a run directory.

    python -m jaxllm.main --config=configs/import_hf.py --config.init=FOLDER --workdir=runs/imported

As long as reading and writing the weights takes; memory for the model once, and one layer of one
of its parameters. The families: docs/importing.md.
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.import_hf import ImportConfig


def get_config() -> ConfigDict:
    """Every field of the stage, at its default."""
    return config_dict(ImportConfig())
