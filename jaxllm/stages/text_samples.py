"""How a model that is being trained continues a text, at each evaluation."""

from collections.abc import Callable
from typing import Any

from jaxllm.inference.engine import Engine, check_prompt
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.objective import Params
from jaxllm.reporting.samples import append_samples
from jaxllm.sharding.processes import is_main
from jaxllm.stages.training_run import TrainingRun
from jaxllm.tokenizers.tokenizer import Tokenizer

_SAMPLES = 2


def text_samples(
    run: TrainingRun[Any],
    tokenizer: Tokenizer,
    model: TransformerConfig,
    context: int,
    prompt_is_prefix: bool = False,
) -> Callable[[int, Params], None]:
    """What writes a few continuations of the configured prompt; nothing, of a model that sees both
    ways.

    Args:
        run: whose configuration, with `SamplingFields`, says what to write.
        tokenizer: of the model.
        model: what writes.
        context: tokens of a text at most, if the model has no limit.
        prompt_is_prefix: whether the tokens of a prompt see each other both ways.

    Raises:
        UserError: the prompt leaves no room.
    """
    config = run.config
    context = model.max_positions or context
    check_prompt(1 + len(tokenizer.encode(config.prompt)), context, "config.prompt")

    def write(step: int, params: Params) -> None:
        if not model.causal:
            return
        engine = Engine(
            model, params, tokenizer, context=context, prompt_is_prefix=prompt_is_prefix
        )
        texts = engine.generate([config.prompt] * _SAMPLES, config.sampling(), config.seed)
        if is_main():
            samples = [(config.prompt, text) for text in texts]
            append_samples(run.directory.samples, step, samples)

    return write
