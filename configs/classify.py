"""Trains a model to tell what texts are: one class each, several, or a number.

    python -m jaxllm.main --config=configs/classify.py --workdir=runs/topic --config.init=runs/first

The default teaches the model of configs/pretrain.py to tell by a docstring which part of the Python
standard library it is from (eight topics, `builtin:pydocs_classify`); nothing is downloaded. On 2
CPU cores it takes half a minute, and tells about 33 % rightly: modules are held out whole, and a
logistic regression on words tells 38 %. With texts of your own, records of `text` and `label`:

    --config.data.train=mine.jsonl
    --config.classify.label=stars --config.classify.kind=regression
    --config.train.trainable=head                  only the head; or last:2; or with lora.rank=8
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.classify import ClassifyConfig


def get_config() -> ConfigDict:
    """For the machine in front of you."""
    config = config_dict(ClassifyConfig())
    config.steps = 300
    config.batch_size = 8
    config.data.seq_len = 128
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.checkpoint.every = 100
    config.eval.every = 100
    return config
