"""Documents of token stores cut in two: a beginning to go on from, and what followed it there."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxllm.data.prompts import Prompt, Prompts
from jaxllm.data.store import TokenStore
from jaxllm.errors import UserError

FOLLOWED = "followed"
"""Of a prompt's record: the ids that followed it."""

_Cut = Callable[[np.ndarray, np.ndarray | None], Iterator[Prompt]]


def text_beginnings(
    stores: Sequence[TokenStore], names: Sequence[str], longest: int, room: int
) -> Prompts:
    """Documents in pieces of `longest + room` tokens, each its first `longest` and what followed;
    of the last piece of a document as many as there are.

    Args:
        stores: of the training sources,
        names: and what these are called.
        longest: tokens of a prompt.
        room: tokens that follow, at most.

    Raises:
        UserError: a source has no document that is longer than a prompt.
    """

    def cut(ids: np.ndarray, trained: np.ndarray | None) -> Iterator[Prompt]:
        del trained
        for begin in range(0, len(ids) - longest, longest + room):
            yield _prompt(ids[begin : begin + longest + room], longest)

    return _prompts(stores, names, cut, f"config.distill.max_prompt={longest}")


def first_answers(
    stores: Sequence[TokenStore], names: Sequence[str], longest: int, room: int, bos_id: int | None
) -> Prompts:
    """Conversations up to their first answer, and that.

    Args:
        stores, names: as above.
        longest: tokens of a prompt at most; a conversation that begins with more is left out.
        room: tokens of an answer; what is longer loses its end.
        bos_id: a token that a prompt may end with though it is learnt; None: there is none.

    Raises:
        UserError: no conversation of a source begins with so few tokens.
    """

    def cut(ids: np.ndarray, trained: np.ndarray | None) -> Iterator[Prompt]:
        assert trained is not None
        learnt = np.flatnonzero(trained)
        if not len(learnt):
            return
        begin = int(learnt[0])
        begin += int(ids[begin]) == bos_id
        end = begin + int(np.argmin(np.append(trained[begin:], False)))
        if 0 < begin <= longest and end > begin:
            yield _prompt(ids[: min(end, begin + room)], begin)

    return _prompts(stores, names, cut, f"config.distill.max_prompt={longest}")


def _prompt(ids: np.ndarray, begin: int) -> Prompt:
    return Prompt(tuple(ids[:begin].tolist()), (), {FOLLOWED: tuple(ids[begin:].tolist())})


def _prompts(
    stores: Sequence[TokenStore],
    names: Sequence[str],
    cut: _Cut,
    field: str,
) -> Prompts:
    found = []
    dropped = 0
    for store, name in zip(stores, names, strict=True):
        prompts = []
        for number in range(len(store.shards)):
            ids, offsets = store.tokens(number), store.offsets(number)
            trained = store.trained(number) if store.masked else None
            for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                own = list(cut(ids[begin:end], None if trained is None else trained[begin:end]))
                dropped += not own
                prompts += own
        if not prompts:
            raise UserError(
                f"config.data.train: {name}: has nothing to go on from: no document fits {field}; "
                "give text that is longer than that, or let conversations begin with more."
            )
        found.append(prompts)
    return Prompts(tuple(found), (), dropped)
