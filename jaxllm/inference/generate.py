"""Text from a model: batched prompts, a key-value cache, one compiled loop."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxllm.errors import UserError
from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import (
    Cache,
    Output,
    Transformer,
    check_length,
    empty_cache,
    output_head,
)
from jaxllm.objectives.objective import Params
from jaxllm.ops.sampling import sample
from jaxllm.ops.vocabulary import logits
from jaxllm.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def generate_text(
    model: TransformerConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    seed: int = 0,
    prompt_is_prefix: bool = False,
) -> list[str]:
    """Continues each prompt, read as the beginning of a document, until its end or the limit.

    Row i draws from a key made of (seed, i), so that it does not depend on the other prompts.

    Args:
        model: a causal one.
        params: its parameters.
        tokenizer: its tokenizer.
        prompts: texts to continue.
        sampling: how the next token is chosen.
        seed: of the draws; the same seed gives the same text.
        prompt_is_prefix: see a prompt both ways, as a model trained by `prefix_lm` has learnt to.

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: the model sees both ways, and cannot write; or it has fewer positions.
    """
    if not model.causal:
        raise UserError(
            "the model sees both ways (config.model.causal=False): it fills in masked words, and "
            "cannot continue a text; take the run of a causal model."
        )
    if not prompts:
        return []
    encoded = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(list(prompts))]
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    # The last new token is never fed.
    longest = int(lengths.max()) + sampling.max_new_tokens - 1
    check_length(model, longest, "config.max_new_tokens: with the prompt, but for the last new one")
    # Prompts are padded to a power of two, so that few lengths are ever compiled.
    padded = np.zeros((len(encoded), _power_of_two(int(lengths.max()))), np.int32)
    for row, ids in enumerate(encoded):
        padded[row, : len(ids)] = ids
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(encoded)))
    new = generate(
        params,
        jnp.asarray(padded),
        jnp.asarray(lengths),
        keys,
        jnp.float32(sampling.temperature),
        model=model,
        max_new_tokens=sampling.max_new_tokens,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        prompt_is_prefix=prompt_is_prefix,
        eos_id=tokenizer.eos_id,
    )
    return [tokenizer.decode(_until(row, tokenizer.eos_id)) for row in np.asarray(new).tolist()]


def fitting(
    model: TransformerConfig, tokenizer: Tokenizer, prompt: str, sampling: Sampling
) -> Sampling:
    """`sampling` of as many new tokens as the model has positions for, if it asks for more.

    Raises:
        UserError: the prompt alone has more tokens.
    """
    if not model.learned_positions:
        return sampling
    length = 1 + len(tokenizer.encode(prompt))
    check_length(model, length, "config.prompt")
    most = model.learned_positions - length + 1  # the last one is never fed
    return dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, most))


@partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "top_k", "top_p", "prompt_is_prefix", "eos_id"),
)
def generate(
    params: Params,
    prompts: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"],
    keys: Key[Array, " batch"],
    temperature: Float[Array, ""],
    *,
    model: TransformerConfig,
    max_new_tokens: int,
    top_k: int = 0,
    top_p: float = 1.0,
    prompt_is_prefix: bool = False,
    eos_id: int,
) -> Int[Array, "batch new"]:
    """Continues right-padded prompts of ids; after `eos_id` a row holds `eos_id` only.

    The prompt is read in one pass; where it is a prefix, all of it sees all of it. A new token's
    slot in the cache follows its prompt's own end, so what padding left there is overwritten
    before it can be seen.
    """
    batch, prompt = prompts.shape
    cache = empty_cache(model, batch, prompt + max_new_tokens)
    positions = jnp.broadcast_to(jnp.arange(prompt), (batch, prompt))

    def decode(
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        cache: Cache,
        prefix: Int[Array, "batch seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Cache]:
        one_segment = jnp.ones_like(tokens)
        output = Transformer(model).apply(
            {"params": params}, tokens, positions, one_segment, cache, prefix=prefix
        )
        assert isinstance(output, Output) and output.cache is not None
        return output.hidden, output.cache

    prefix = jnp.broadcast_to(lengths[:, None], prompts.shape) if prompt_is_prefix else None
    hidden, cache = decode(prompts, positions, cache, prefix)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    head = output_head(model, params)

    def choose(
        index: Int[Array, ""], hidden: Float[Array, "batch 1 embed"], ended: Bool[Array, " batch"]
    ) -> Int[Array, " batch"]:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        scores = logits(hidden, head)[:, 0]
        token = sample(step_keys, scores, temperature=temperature, top_k=top_k, top_p=top_p)
        return jnp.where(ended, eos_id, token)

    first = choose(jnp.zeros((), jnp.int32), last, jnp.zeros(batch, bool))
    tokens = jnp.full((batch, max_new_tokens), eos_id, jnp.int32).at[:, 0].set(first)

    def unfinished(loop: tuple) -> Bool[Array, ""]:
        index, tokens, _ = loop
        return (index < max_new_tokens) & jnp.any(tokens[:, index - 1] != eos_id)

    def step(loop: tuple) -> tuple:
        index, tokens, cache = loop
        previous = tokens[:, index - 1]
        position = (lengths + index - 1)[:, None]
        hidden, cache = decode(previous[:, None], position, cache)
        token = choose(index, hidden, previous == eos_id)
        return index + 1, tokens.at[:, index].set(token), cache

    _, tokens, _ = jax.lax.while_loop(unfinished, step, (jnp.int32(1), tokens, cache))
    return tokens


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
