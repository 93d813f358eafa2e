"""Pretrains a decoder on text: from a first run on a laptop to 8 B parameters on a pod.

    python -m jaxllm.main --config=configs/pretrain.py --workdir=runs/first

The default trains a model of a million parameters on `builtin:pydocs` (the documentation and
sources of the Python that runs, so nothing is downloaded). On 2 CPU cores it takes under 4 minutes
from start to summary, and reaches about 1.84 bits per byte of held-out text; gzip -9 takes 1.89.

Presets, chosen as `--config=configs/pretrain.py:PRESET`:

    tiny   a model of 50 thousand parameters, for seconds: does everything work?
    dN     one dial, the depth N: all else follows from it by the rules of `dial`; :d4 trains
           5 M parameters (a night on a laptop), :d12 110 M (1.5e18 FLOPs: a GPU)
    124m   the size of GPT-2 (12 layers of 768); one large GPU
    350m   24 layers of 1024; one large GPU, or eight
    1b     the shape of Llama 3.2 1B; as in --config.mesh.fsdp=8 on eight
    8b     the shape of Llama 3 8B; a pod, as in --config.mesh.fsdp=64 --config.mesh.tensor=4

The last four want your text, `--config.data.train=my_text.jsonl`, and hold few rows at once:
raise `micro_batch_size` as far as memory goes. Nobody has trained them to the end with this code
yet; that their programs compile, what memory they take, and how fast 124m is on a GPU, is tested
and measured (docs/performance.md).
"""

import re

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.errors import UserError
from jaxllm.stages.pretrain import PretrainConfig


def get_config(preset: str = "") -> ConfigDict:
    """The configuration of a preset; the empty one is the default."""
    config = config_dict(PretrainConfig())
    if preset in PRESETS:
        PRESETS[preset](config)
    elif re.fullmatch(r"d[1-9]\d*", preset):
        dial(config, depth=int(preset[1:]))
    else:
        known = ", ".join(f":{name}" for name in PRESETS if name)
        raise UserError(f"configs/pretrain.py has no preset {preset!r}; it has {known} and :dN.")
    return config


def first(config: ConfigDict) -> None:
    """A first run, for the machine in front of you.

    Small and short by choice: with some 10^13 FLOPs to spend, a million parameters and many
    small updates learn the most (docs/performance.md has what was tried).
    """
    config.steps = 700
    config.batch_size = 4
    config.tokenizer.vocab_size = 2048
    config.model.layers = 4
    config.model.width = 128
    config.model.heads = 2
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.01
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.checkpoint.every = 100
    config.eval.every = 350
    config.prompt = "Return the"
    config.max_new_tokens = 96
    config.temperature = 0.8


def tiny(config: ConfigDict) -> None:
    """The whole road in seconds."""
    first(config)
    config.steps = 20
    config.tokenizer.vocab_size = 512
    config.model.layers = 2
    config.model.width = 32
    config.model.heads = 2
    config.data.seq_len = 64
    config.optimizer.warmup_steps = 2
    config.checkpoint.every = 10
    config.eval.every = 10
    config.max_new_tokens = 16
    config.references = False


def dial(config: ConfigDict, depth: int) -> None:
    """Everything from the depth N.

    - Width 64·N in heads of 64: about 49,000·N³ parameters beside the vocabulary's.
    - 20 tokens a parameter (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556).
    - The batch grows with the square root of the tokens, through half a million tokens for
      2.5 billion (GPT-2's size), rounded down to a power of two.
    - The learning rate falls as 1/width, through 6e-4 at width 768; this is near what Brown et
      al. 2020 (https://arxiv.org/abs/2005.14165, table 2.1) used from 125 M to 6.7 B.
    - A vocabulary of 8,192 up to depth 8, else 32,768; rows of 256 tokens up to depth 4, 1,024
      up to depth 12, else 2,048.
    """
    width = 64 * depth
    config.model.layers = depth
    config.model.width = width
    config.model.heads = depth
    config.tokenizer.vocab_size = 8192 if depth <= 8 else 32_768
    config.data.seq_len = 256 if depth <= 4 else 1024 if depth <= 12 else 2048
    # Attention 4·width², gated MLP 3·width·(8/3·width), and the tied output matrix.
    parameters = 12 * depth * width**2 + config.tokenizer.vocab_size * width
    tokens = 20 * parameters
    batch_tokens = 2**19 * (tokens / 2.5e9) ** 0.5
    config.batch_size = _power_of_two(batch_tokens / config.data.seq_len)
    config.steps = round(tokens / (config.batch_size * config.data.seq_len))
    config.optimizer.learning_rate = 6e-4 * 768 / width
    config.optimizer.warmup_steps = config.steps // 50
    config.checkpoint.every = config.eval.every = max(50, config.steps // 20)


def _gpt2_like(config: ConfigDict, layers: int, width: int, steps: int) -> None:
    _large(config, steps)
    config.tokenizer.vocab_size = 50_304
    config.model.layers = layers
    config.model.width = width
    config.model.heads = width // 64
    config.data.seq_len = 1024
    config.batch_size = 512
    config.micro_batch_size = 16
    config.model.remat = "full"
    config.optimizer.learning_rate = 6e-4 * 768 / width


def _llama3_like(config: ConfigDict, layers: int, width: int, mlp_width: int, steps: int) -> None:
    _large(config, steps)
    config.tokenizer.vocab_size = 128_256
    config.model.layers = layers
    config.model.width = width
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.mlp_width = mlp_width
    config.model.rope_theta = 500_000.0
    config.model.remat = "full"
    config.data.seq_len = 2048
    config.batch_size = 512
    config.micro_batch_size = 64 if layers > 16 else 16
    config.optimizer.learning_rate = 6e-4 * 768 / width


def _large(config: ConfigDict, steps: int) -> None:
    """What the sizes beyond a laptop share; they want text of your own."""
    config.data.train = ""
    config.steps = steps
    config.optimizer.warmup_steps = steps // 50
    config.checkpoint.every = config.eval.every = 1000


def gpt2_124m(config: ConfigDict) -> None:
    """124 M parameters on 2.5 B tokens."""
    _gpt2_like(config, layers=12, width=768, steps=4_750)


def gpt2_350m(config: ConfigDict) -> None:
    """355 M parameters on 7 B tokens."""
    _gpt2_like(config, layers=24, width=1024, steps=13_500)


def llama_1b(config: ConfigDict) -> None:
    """1.24 B parameters on 25 B tokens."""
    _llama3_like(config, layers=16, width=2048, mlp_width=8192, steps=23_600)


def llama_8b(config: ConfigDict) -> None:
    """8.03 B parameters on 160 B tokens; the output matrix is not tied."""
    _llama3_like(config, layers=32, width=4096, mlp_width=14_336, steps=153_000)
    config.model.tied = False


def _power_of_two(value: float) -> int:
    return 1 << max(0, round(value).bit_length() - 1)


PRESETS = {
    "": first,
    "tiny": tiny,
    "124m": gpt2_124m,
    "350m": gpt2_350m,
    "1b": llama_1b,
    "8b": llama_8b,
}
