"""What a run trains of its model, told as a table where that is not all of it."""

import math
import re
from typing import Any

import jax

from jaxllm import trees
from jaxllm.models.lora import adapted_path
from jaxllm.reporting import quantities
from jaxllm.reporting.tables import print_table


def trained_scores(shapes: trees.Tree, pattern: str, opt_state: Any) -> dict[str, float]:
    """How many parameters are trained, and the bytes that the optimizer keeps for them.

    Args:
        shapes: of all parameters.
        pattern: of those that are trained.
        opt_state: the optimizer's state as shapes.
    """
    trained, _ = trees.split(shapes, pattern)
    leaves = jax.tree.leaves(opt_state)
    return {
        "model/trained_parameters": float(trees.size(trained)),
        "model/optimizer_bytes": float(
            sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        ),
    }


def print_trained(shapes: trees.Tree, pattern: str, opt_state: Any) -> None:
    """Prints on standard error what is trained of each kind of matrix, over all layers, and of the
    whole; nothing where all is."""
    _, frozen = trees.divide(shapes, pattern)
    if not frozen:
        return
    rows: dict[str, list[int]] = {}
    for path, leaf in trees.leaves_with_paths(shapes):
        of = adapted_path(path)
        kind = "/".join(part for part in of.split("/") if not re.fullmatch(r"\w+_\d+", part))
        row = rows.setdefault(kind, [0, 0])
        size = math.prod(leaf.shape)
        row[0] += size if re.fullmatch(pattern, path) else 0
        row[1] += size if of == path else 0
    scores = trained_scores(shapes, pattern, opt_state)
    cells = [_cells(kind, *row) for kind, row in rows.items() if row[0]]
    total = sum(row[1] for row in rows.values())
    cells.append(_cells("all of the model", int(scores["model/trained_parameters"]), total))
    header = ("trained", "numbers", "of a model of", "share")
    held = quantities.byte_count(scores["model/optimizer_bytes"])
    title = f"What is trained; the optimizer keeps {held} for it"
    print_table(header, cells, title=title, stderr=True)


def _cells(kind: str, trained: int, whole: int) -> tuple[str, ...]:
    share = quantities.share(trained / whole) if whole else ""
    return kind, quantities.number(trained), quantities.number(whole), share
