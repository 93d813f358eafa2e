"""Trains a small model to predict as a larger one does (white-box distillation).

    python -m jaxllm.main --config=configs/distill.py --workdir=runs/student \
        --config.teacher.init=runs/first

The default learns of the model of configs/pretrain.py, on the same `builtin:pydocs`, with a quarter
of its parameters (238 thousand). On 2 CPU cores it takes two and a half minutes, and reaches about
1.93 bits per byte of held-out text; the teacher has 1.83. What it comes to otherwise, by as many
steps at the same learning rate:

                                                  bits per byte    agrees with the teacher
    forward_kl, the default                       1.931            69 % of tokens
    --config.distill.on_policy_fraction=0.5       1.957            66 %
    --config.distill.alpha=1.0, so by itself      1.985            50 %
    --config.distill.divergence=jsd               1.998            65 %
    --config.distill.divergence=reverse_kl        2.160            48 %

Of conversations answers are learnt, as configs/sft.py reads them:

    --config.distill.records=conversations --config.data.packing=best_fit
    --config.data.train=builtin:pydocs_instruct --config.teacher.init=runs/sft
"""

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.stages.distill import DistillConfig


def get_config() -> ConfigDict:
    """For the machine in front of you."""
    config = config_dict(DistillConfig())
    config.steps = 600
    config.batch_size = 8
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 2
    config.temperature = 1.0
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.final_fraction = 0.1
    config.checkpoint.every = 200
    config.eval.every = 200
    return config
