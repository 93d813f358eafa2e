"""Parameters of a model, counted by the conventions of scaling laws."""

import re

from jaxllm import trees

_EMBEDDINGS = r"(position_)?embedding|output"


def embedding_parameters(shapes: trees.Tree) -> int:
    """Those of the embeddings of tokens and positions and of an output matrix of its own, which
    Kaplan et al. 2020 (section 2.1, https://arxiv.org/abs/2001.08361) leave out of N, and Hoffmann
    et al. 2022 (https://arxiv.org/abs/2203.15556) count.

    Args:
        shapes: of all parameters.
    """
    return trees.size(
        {path: leaf for path, leaf in trees.leaves_with_paths(shapes) if _is_embedding(path)}
    )


def _is_embedding(path: str) -> bool:
    return re.fullmatch(_EMBEDDINGS, path) is not None
