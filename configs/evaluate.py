"""Measures a trained model on text, and on tasks.

    python -m jaxllm.main --config=configs/evaluate.py --config.init=runs/first
    python -m jaxllm.main --config=configs/evaluate.py --config.init=runs/first \
        --config.data.eval=my_text.jsonl
    python -m jaxllm.main --config=configs/evaluate.py --config.init=runs/first \
        --workdir=runs/scores --config.tasks=arc.jsonl,gsm8k=test.jsonl --config.fewshot=5

The first line measures loss, perplexity and bits per byte on the text that the run held out, and
gives the scores of its summary; the second on other text; the third how many items of tasks the
model has right (docs/evaluating.md).

Presets, chosen as `--config=configs/evaluate.py:PRESET`. Each has generated tasks, so it runs
without a file, in about a minute with a small model; `--config.tasks=` takes yours:

    tasks         arithmetic, copying and sorting, each asked without an example
    icl           in-context learning: the same with 0, 1, 2, 4 and 8 examples, and a curve of it
    cot           chain of thought: worked chains of sums; without, --config.chain_of_thought=False
    tuning        prompting against tuning: `init` asked without examples, against
                  --config.baseline.init=RUN (or, without, itself) asked with 4
    instructions  whether responses keep to instructions that can be checked
"""

from importlib import resources

from ml_collections import ConfigDict

from jaxllm.config import config_dict
from jaxllm.errors import UserError
from jaxllm.stages.evaluate import EvaluateConfig


def get_config(preset: str = "") -> ConfigDict:
    """The configuration of a preset; the empty one has every field at its default."""
    config = config_dict(EvaluateConfig())
    if preset in PRESETS:
        PRESETS[preset](config)
    elif preset:
        known = ", ".join(f":{name}" for name in PRESETS)
        raise UserError(f"configs/evaluate.py has no preset {preset!r}; it has {known}.")
    return config


def tasks(config: ConfigDict) -> None:
    """Generated problems; a thousand of each are held out of `builtin:NAME:1k-11k`."""
    config.tasks = "builtin:arithmetic:1k,builtin:copying:1k,builtin:sorting:1k"
    config.max_items = 100


def icl(config: ConfigDict) -> None:
    """A curve over the number of examples."""
    tasks(config)
    config.fewshot = "0,1,2,4,8"


def cot(config: ConfigDict) -> None:
    """Problems of several steps, worked out before they are answered."""
    config.tasks = "builtin:chain:1k"
    config.max_items = 100
    config.fewshot = "4"
    config.chain_of_thought = True


def tuning(config: ConfigDict) -> None:
    """The paired difference of a tuned model and one that is only prompted."""
    tasks(config)
    config.fewshot = "0"
    config.baseline.fewshot = 4


def instructions(config: ConfigDict) -> None:
    """Prompts in English and Chinese, each with rules to be kept."""
    prompts = resources.files("jaxllm.evaluation") / "instruction_prompts.jsonl"
    config.tasks = f"instructions={prompts}"


PRESETS = {
    "tasks": tasks,
    "icl": icl,
    "cot": cot,
    "tuning": tuning,
    "instructions": instructions,
}
