"""Masked words: a model that sees both ways fills in what was hidden from it."""

import math
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxllm.errors import UserError
from jaxllm.models.config import TransformerConfig
from jaxllm.models.transformer import Output, Transformer
from jaxllm.objectives.cross_entropy import CrossEntropyConfig, Predicted, cross_entropy
from jaxllm.objectives.objective import Batch, Objective, Params, RowKeys
from jaxllm.tokenizers.tokenizer import Tokenizer

# Of the chosen tokens these shares are hidden and exchanged; the rest stay as they are, so that
# the model has to have an opinion of every token (Devlin et al. 2018, section 3.1).
_HIDDEN, _EXCHANGED = 0.8, 0.1


class Masked(NamedTuple):
    """Rows with some tokens hidden."""

    tokens: Int[Array, "batch seq"]
    """What the model sees."""
    places: Int[Array, "batch places"]
    """Where the chosen tokens stand, and after them places that are not in use."""
    labels: Int[Array, "batch places"]
    """What stood there."""
    chosen: Bool[Array, "batch places"]
    """Whether the place is in use."""


def masked_word(
    model: TransformerConfig, config: CrossEntropyConfig, tokenizer: Tokenizer, fraction: float
) -> Objective:
    """The loss of `next_token` on the original of some tokens that the model does not see
    (Devlin et al. 2018, section 3.1, https://arxiv.org/abs/1810.04805).

    Of the n tokens of a row that may be chosen, round(`fraction` · n) are, at least one.
    Padding, and the tokens that open and close documents, never are: where those stand tells
    nothing of a language. Of the chosen, 80 % become the tokenizer's mask, 10 % a random token
    that is not special, and 10 % stay. How many are chosen follows from the batch; which, and
    what becomes of each, is drawn from the row's key, in evaluation from the row's own tokens.

    A batch holds `tokens`, `positions` and `segment_ids` int32 [batch, seq]; `targets` and
    `loss_weights`, which are of the next token, are not read.

    Raises:
        UserError: the tokenizer has no mask.
    """
    mask_id(tokenizer)

    def weight(batch: Batch) -> Float[Array, ""]:
        return jnp.sum(_counts(_candidates(batch, tokenizer), fraction))

    def predict(params: Params, batch: Batch, row_keys: RowKeys) -> Predicted:
        keys = evaluation_keys(batch) if row_keys is None else row_keys
        masked = mask_words(batch, keys, fraction, tokenizer)
        output = Transformer(model).apply(
            {"params": params},
            masked.tokens,
            batch["positions"],
            batch["segment_ids"],
            dropout_keys=row_keys,
        )
        assert isinstance(output, Output)
        # The vocabulary is compared with these few places only, not with the whole row.
        hidden = jnp.take_along_axis(output.hidden, masked.places[..., None], axis=1)
        weights = masked.chosen.astype(jnp.float32)
        return Predicted(hidden, masked.labels, weights, output.router)

    return cross_entropy("masked_word", model, config, weight, predict)


def mask_id(tokenizer: Tokenizer) -> int:
    """The token that hides others.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.mask_id is None:
        raise UserError(
            "config.objective.kind: masked_word needs a token that hides others, and this "
            "tokenizer has none; name one of its tokens in config.tokenizer.mask_token."
        )
    return tokenizer.mask_id


def mask_words(
    batch: Batch, keys: Key[Array, " batch"], fraction: float, tokenizer: Tokenizer
) -> Masked:
    """Chooses tokens of each row, and hides, exchanges or keeps each; every row by its own key."""
    tokens = batch["tokens"]
    candidates = _candidates(batch, tokenizer)
    counts = _counts(candidates, fraction)
    # Rounded up: as many as a row of nothing but candidates can have.
    most = min(tokens.shape[1], math.floor(fraction * tokens.shape[1]) + 1)

    def one_row(
        key: Key[Array, ""],
        tokens: Int[Array, " seq"],
        candidates: Bool[Array, " seq"],
        count: Float[Array, ""],
    ) -> Masked:
        own = jax.random.fold_in(key, zlib.crc32(b"masked_word"))
        order_key, fate_key, random_key = jax.random.split(own, 3)
        order = jnp.where(candidates, jax.random.uniform(order_key, tokens.shape), 2.0)
        places = jnp.argsort(order)[:most]
        labels = tokens[places]
        chosen = jnp.arange(most) < count
        fate = jax.random.uniform(fate_key, (most,))
        random = _random_tokens(random_key, most, tokenizer)
        replaced = jnp.where(fate < _HIDDEN + _EXCHANGED, random, labels)
        replaced = jnp.where(fate < _HIDDEN, mask_id(tokenizer), replaced)
        seen = tokens.at[places].set(jnp.where(chosen, replaced, labels))
        return Masked(seen, places, labels, chosen)

    return jax.vmap(one_row)(keys, tokens, candidates, counts)


def _candidates(batch: Batch, tokenizer: Tokenizer) -> Bool[Array, "batch seq"]:
    """The tokens that may be chosen."""
    tokens = batch["tokens"]
    marks = (tokens == tokenizer.bos_id) | (tokens == tokenizer.eos_id)
    return (batch["segment_ids"] > 0) & ~marks


def _counts(candidates: Bool[Array, "batch seq"], fraction: float) -> Float[Array, " batch"]:
    """How many tokens of each row are chosen."""
    available = jnp.sum(candidates, axis=1).astype(jnp.float32)
    return jnp.minimum(available, jnp.maximum(1.0, jnp.round(fraction * available)))


def evaluation_keys(batch: Batch) -> Key[Array, " batch"]:
    """A key for each row, made of its tokens: the same in whatever batch the row comes."""
    tokens = jnp.where(batch["segment_ids"] > 0, batch["tokens"], 0).astype(jnp.uint32)
    multipliers = jax.random.bits(jax.random.key(0), tokens.shape[1:], jnp.uint32)
    numbers = jnp.sum(tokens * multipliers, axis=1, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)


def _random_tokens(key: Key[Array, ""], count: int, tokenizer: Tokenizer) -> Int[Array, " count"]:
    """Ids drawn evenly from those that are not special."""
    special = np.array(sorted(tokenizer.special_ids))
    # The n-th ordinary id, counted from 0, is n and the number of special ids below it.
    ordinary_below = special - np.arange(len(special))
    drawn = jax.random.randint(key, (count,), 0, tokenizer.vocab_size - len(special))
    return drawn + jnp.searchsorted(jnp.asarray(ordinary_below), drawn, side="right")
