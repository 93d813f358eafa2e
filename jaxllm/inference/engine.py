"""The batching engine: a queue of requests written by a fixed number of slots, always full.

A finished slot is refilled while the others go on (continuous batching: Yu et al. 2022, Orca), so
nothing waits for the longest text. Prompts, slots and cache have few sizes, so that few programs
are compiled; and the host waits once a burst of steps, never once a token.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxllm.errors import UserError
from jaxllm.inference.adapters import check_known, joined
from jaxllm.inference.decoding import LONGEST_BURST, Choice, Slots, decode, fill, prefill, shrink
from jaxllm.inference.requests import Completion, Request, Sampling, seed_of
from jaxllm.inference.writing import Writing
from jaxllm.models.config import TransformerConfig
from jaxllm.models.kv_cache import Cache, empty_cache
from jaxllm.models.stacks import restacked, unrolled
from jaxllm.objectives.objective import Params
from jaxllm.ops.sampling import Limits
from jaxllm.sharding.mesh import batch_shards
from jaxllm.tokenizers.tokenizer import Tokenizer

_Asked = tuple[tuple[int, ...], int]
"""A prompt, and the number of the adapter that reads it."""
_CHUNK = 512
"""Tokens of a prompt that are read at once."""
_SHORT_BURST = 16
"""Steps after which texts are searched for stop strings."""
_SHOWN_BURST = 4
"""Steps after which a text is shown while it is written."""
_WORTH_COMPILING = 512
"""Steps that an engine makes with half of its slots empty before it compiles programs for fewer
slots: from then on the end of every call takes less time. An engine that is used once does not come
to it."""
_SMALLEST = 16


class Engine:
    """Writes with one model; the mesh that its parameters lie on must be set at every call."""

    def __init__(
        self,
        model: TransformerConfig,
        params: Params,
        tokenizer: Tokenizer,
        *,
        context: int,
        slots: int = 32,
        prompt_is_prefix: bool = False,
        adapters: Mapping[str, Params] | None = None,
        tempered: bool = False,
    ) -> None:
        """Takes a model into service.

        Args:
            model: a causal one.
            params: its parameters.
            tokenizer: its tokenizer.
            context: tokens of a text at most, prompt included; 0: no limit is known.
            slots: texts written at once.
            prompt_is_prefix: see a prompt both ways, as a model trained by `prefix_lm` has learnt.
            adapters: low-rank pairs by the names that requests call them by
                (`adapters.load_adapters`).
            tempered: tell log-probabilities at the temperature that tokens are chosen at, where it
                is not 0, rather than at 1.

        Raises:
            UserError: the model sees both ways, and cannot write.
        """
        if not model.causal:
            raise UserError(
                "the model sees both ways (config.model.causal=False): it fills in masked words, "
                "and cannot continue a text; take the run of a causal model."
            )
        self._tokenizer, self._context, self._prefix = tokenizer, context, prompt_is_prefix
        self._slots, self._half_empty_steps, self._tempered = slots, 0, tempered
        self._model, self._params = _prepared(model, params)
        self._adapters = list(adapters or ())
        self._pairs = _joined_pairs(tuple((adapters or {}).values()), model) if adapters else None

    def generate(self, prompts: Sequence[str], sampling: Sampling, seed: int = 0) -> list[str]:
        """Continues each prompt, read as the beginning of a document, and returns what is new.

        Text i depends on its prompt and on (seed, i), not on the other prompts.

        Raises:
            UserError: a prompt leaves no room in the context.
        """
        opened = self._tokenizer.encode_batch(list(prompts))
        requests = [
            Request((self._tokenizer.bos_id, *ids), sampling, seed_of(seed, number))
            for number, ids in enumerate(opened)
        ]
        return [completion.text for completion in self.complete(requests)]

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """What is written for each request.

        Raises:
            UserError: a prompt is empty, or leaves no room in the context.
        """
        done: dict[int, Completion] = {}
        for number, writing in self._run(requests, LONGEST_BURST):
            if writing.finish:
                done[number] = writing.completion()
        return [done[number] for number in range(len(requests))]

    def stream(self, request: Request) -> Iterator[str]:
        """The text of one request in pieces, as it is written; together they are its `text`.

        Raises:
            UserError: as `complete`.
        """
        shown = 0
        for _, writing in self._run([request], _SHOWN_BURST, shown=True):
            text = writing.settled_text()
            if len(text) > shown:
                yield text[shown:]
            shown = len(text)

    def _run(
        self, requests: Sequence[Request], burst: int, shown: bool = False
    ) -> Iterator[tuple[int, Writing]]:
        """Goes through all requests; gives each one's number and text after every burst."""
        requests = [self._fitting(request) for request in requests]
        if not requests:
            return
        shards = batch_shards(jax.sharding.get_mesh())
        count = min(_slots_for(len(requests), shards), _multiple(self._slots, shards))
        slots, cache = self._empty(requests, count)
        # Those that may become long begin first, so that none of them is left alone at the end.
        order = sorted(enumerate(requests), key=lambda pair: -pair[1].sampling.max_new_tokens)
        queue, busy = deque(order), dict[int, tuple[int, Writing]]()
        while queue or busy:
            count = slots.left.shape[0]
            free = [slot for slot in range(count) if slot not in busy]
            taken = [(slot, *queue.popleft()) for slot in free[: len(queue)]]
            slots, cache = self._filled(slots, cache, taken, shards)
            for slot, number, request in taken:
                busy[slot] = number, Writing(request, self._tokenizer, shown)
            searched = any(writing.is_searched for _, writing in busy.values())
            slots, cache, written = decode(
                self._params,
                slots,
                cache,
                _on_device(np.array([slot in busy for slot in range(count)])),
                _index(min(burst, _SHORT_BURST) if searched else burst),
                _index(self._until(len(busy), count, shards, bool(queue))),
                self._pairs,
                model=self._model,
                tempered=self._tempered,
            )
            tokens, log_probs, steps = jax.device_get(written)
            for slot, (number, writing) in list(busy.items()):
                writing.extend(tokens[:steps, slot], log_probs[:steps, slot])
                if writing.finish:
                    del busy[slot]
                yield number, writing
            self._half_empty_steps += int(np.sum(2 * np.sum(tokens[:steps] >= 0, axis=1) <= count))
            if busy and not queue and self._shrinks and _slots_for(len(busy), shards) < count:
                kept = _with_others(list(busy), _slots_for(len(busy), shards))
                slots, cache = shrink(slots, cache, _on_device(np.array(kept, np.int32)))
                busy = {number: busy[slot] for number, slot in enumerate(kept) if slot in busy}

    @property
    def _shrinks(self) -> bool:
        return self._half_empty_steps >= _WORTH_COMPILING

    def _until(self, busy: int, count: int, shards: int, waiting: bool) -> int:
        """With how many busy slots there is something to do: to fill one, or to leave some out."""
        if waiting:
            return busy - 1
        fewer = _slots_for(-(-count // 2), shards)
        return fewer if self._shrinks and fewer < min(count, busy) else 0

    def _fitting(self, request: Request) -> Request:
        """The request, of no more new tokens than there is room for; the last is never read.

        Raises:
            UserError: there is no prompt, or no room.
        """
        length, most = len(request.prompt), request.sampling.max_new_tokens
        check_prompt(length, self._context)
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._model.vocab_size:
            raise UserError(
                f"prompt: has token ids outside of the vocabulary of {self._model.vocab_size:,}; "
                "encode it with the model's own tokenizer."
            )
        check_known(request.adapter, self._adapters, "adapter")
        if self._context:
            most = min(most, self._context - length + 1)
        stop_ids = tuple(dict.fromkeys((self._tokenizer.eos_id, *request.stop_ids)))
        sampling = dataclasses.replace(request.sampling, max_new_tokens=most)
        return dataclasses.replace(request, sampling=sampling, stop_ids=stop_ids)

    def _empty(self, requests: Sequence[Request], count: int) -> tuple[Slots, Cache]:
        """Free slots, with what these requests need, and a cache with room for each of them."""
        needs = [r.sampling for r in requests]
        limited = any(s.top_k or s.top_p < 1 or s.min_p for s in needs)
        penalised = any(s.repetition_penalty != 1 for s in needs)

        def empty(dtype: str, *shape: int) -> Array:
            return _on_device(np.zeros((count, *shape), dtype))

        choice = Choice(
            empty("float32") if any(s.temperature for s in needs) else None,
            Limits(empty("int32"), empty("float32"), empty("float32")) if limited else None,
            empty("float32") if penalised else None,
            empty("bool", self._model.vocab_size) if penalised else None,
        )
        most = _rounded_up(max(len(request.stop_ids) for request in requests), least=4)
        slots = Slots(
            empty("int32"),
            empty("int32"),
            empty("int32"),
            empty("uint32"),
            empty("int32", most),
            choice,
            empty("int32") if self._adapters else None,
        )
        length = max(len(r.prompt) + r.sampling.max_new_tokens - 1 for r in requests)
        return slots, _empty_cache(self._model, count, _rounded_up(length))

    def _filled(
        self, slots: Slots, cache: Cache, taken: Sequence[tuple[int, int, Request]], shards: int
    ) -> tuple[Slots, Cache]:
        """The slots given to requests; equal prompts are read once."""
        if not taken:
            return slots, cache
        if not self._prefix and all(len(request.prompt) == 1 for _, _, request in taken):
            return self._put(slots, cache, taken)  # the first step reads all that there is
        prompts = list(dict.fromkeys(self._asked(request) for _, _, request in taken))
        # All at once, or one by one: two sizes of batch, so that few programs are compiled.
        all_slots: int = slots.left.shape[0]
        size = shards if 2 * len(prompts) <= all_slots else all_slots
        for begin in range(0, len(prompts), size):
            some = prompts[begin : begin + size]
            those = [one for one in taken if self._asked(one[2]) in some]
            rows = [some.index(self._asked(request)) for _, _, request in those]
            slots, cache = self._put(slots, cache, those, self._read(some, size), rows)
        return slots, cache

    def _put(
        self,
        slots: Slots,
        cache: Cache,
        taken: Sequence[tuple[int, int, Request]],
        read: Cache | None = None,
        rows: Sequence[int] = (),
    ) -> tuple[Slots, Cache]:
        """The slots with requests, whose prompts are `rows` of what has been read."""
        # Filled up to a power of two with requests for no slot: few programs.
        missing = (0,) * (_slots_for(len(taken), 1) - len(taken))
        places = [slot for slot, _, _ in taken] + [slots.left.shape[0] for _ in missing]
        entries = [_entry(request, slots, self._number(request)) for _, _, request in taken]
        entries += entries[:1] * len(missing)
        together = jax.tree.map(lambda *values: _on_device(np.stack(values)), *entries)
        of_rows = None if read is None else _indices([*rows, *missing])
        return fill(slots, cache, _indices(places), together, read, of_rows)

    def _number(self, request: Request) -> int:
        """The number of a request's adapter; 0 is none."""
        return 1 + self._adapters.index(request.adapter) if request.adapter else 0

    def _asked(self, request: Request) -> "_Asked":
        return request.prompt, self._number(request)

    def _read(self, prompts: Sequence["_Asked"], size: int) -> Cache:
        """A cache of `size` rows that has read prompts, but for what the first step will read."""
        # A power of two; beyond the chunk, what is padded is not read.
        length = 1 << (max(_SMALLEST, *(len(ids) for ids, _ in prompts)) - 1).bit_length()
        tokens, lengths = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
        adapters = np.zeros(size, np.int32)
        for row, (ids, adapter) in enumerate(prompts):
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids) if self._prefix else len(ids) - 1
            adapters[row] = adapter
        chunk = length if self._prefix else min(length, _CHUNK)
        return prefill(
            self._params,
            _on_device(tokens),
            _on_device(lengths),
            model=self._model,
            chunk=chunk,
            prefix=self._prefix,
            pairs=self._pairs,
            adapters=_on_device(adapters) if self._adapters else None,
        )


def check_prompt(length: int, context: int, field: str = "prompt") -> None:
    """Checks that a prompt of so many tokens, `field`, is there and fits a context (0: no limit).

    Raises:
        UserError: it does not.
    """
    if not length:
        raise UserError(f"{field}: is empty; a text begins with the token that opens it, at least.")
    if context and length > context:
        raise UserError(
            f"{field}: {length:,} tokens are more than the {context:,} that the model sees at "
            "once; shorten it."
        )


def _prepared(model: TransformerConfig, params: Params) -> tuple[TransformerConfig, Params]:
    """The model as it decodes fastest: on a CPU, which copies what a loop slices, unrolled, and
    with a transposed embedding of its own where that is the output matrix."""
    model = dataclasses.replace(model, remat="none")
    if jax.default_backend() != "cpu":
        return model, params
    return unrolled(model), _unrolled_params(params, model=model)


@partial(jax.jit, static_argnames="model")
def _unrolled_params(params: Params, *, model: TransformerConfig) -> Params:
    params = restacked(params, model.stacks, unrolled(model).stacks)
    return params if "output" in params else params | {"output": params["embedding"].T}


@partial(jax.jit, static_argnames="model")
def _joined_pairs(adapters: tuple[Params, ...], model: TransformerConfig) -> Params:
    """The pairs of all adapters beside the layers as they are decoded."""
    pairs = joined(adapters)
    if jax.default_backend() != "cpu":
        return pairs
    return restacked(pairs, model.stacks, unrolled(model).stacks)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_cache(model: TransformerConfig, batch: int, length: int) -> Cache:
    return empty_cache(model, batch, length)


def _entry(request: Request, slots: Slots, adapter: int) -> Slots:
    """A request as its slot begins, of arrays on the host."""
    sampling, begun = request.sampling, slots.choice

    def number(value: int | float | Sequence[int] | np.ndarray, like: Array) -> Any:
        return np.array(value, like.dtype)

    def wanted(value: int | float, like: Array | None) -> Any:
        return None if like is None else number(value, like)

    limits, seen = begun.limits, begun.seen
    if limits is not None:
        values = (sampling.top_k, sampling.top_p, sampling.min_p)
        limits = Limits(*map(number, values, limits))
    if seen is not None:
        seen = number(np.isin(np.arange(seen.shape[1]), request.prompt), seen)
    missing = slots.stop_ids.shape[1] - len(request.stop_ids)
    return Slots(
        number(request.prompt[-1], slots.token),
        number(len(request.prompt) - 1, slots.position),
        number(sampling.max_new_tokens, slots.left),
        number(request.seed % 2**32, slots.seed),
        number((*request.stop_ids, *(-1,) * missing), slots.stop_ids),
        Choice(
            wanted(sampling.temperature, begun.temperature),
            limits,
            wanted(sampling.repetition_penalty, begun.penalty),
            seen,
        ),
        wanted(adapter, slots.adapter),
    )


def _index(value: int) -> Array:
    return _on_device(np.array(value, np.int32))


def _indices(values: Sequence[int]) -> Array:
    return _on_device(np.array(values, np.int32))


def _on_device(array: np.ndarray) -> Array:
    """A copy on the device, made without a program, which `jnp.array` would compile."""
    return jax.device_put(array, may_alias=False)


def _slots_for(requests: int, shards: int) -> int:
    """Slots for so many requests: a power of two on each shard of the batch, that there are few
    numbers of them."""
    return shards << (-(-requests // shards) - 1).bit_length()


def _with_others(busy: list[int], count: int) -> list[int]:
    """The busy slots, and as many others as make `count`."""
    others = (slot for slot in itertools.count() if slot not in busy)
    return [*busy, *itertools.islice(others, count - len(busy))]


def _rounded_up(length: int, least: int = _SMALLEST) -> int:
    """`length` as a multiple of a quarter of the power of two below it: at most a quarter more,
    and four sizes from one power to the next."""
    step = max(least, 1 << max(length - 1, 4).bit_length() - 3)
    return _multiple(length, step)


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of
