"""The objective that docs/objectives.md shows does what the page says."""

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_the_example_predicts_the_token_after_next_and_adds_up_over_rows(
    tiny_model, tiny_params, packed_rows, tmp_path, monkeypatch
):
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "example.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny_model(layers=1)
    objective = importlib.import_module("example").token_after_next(model)
    params = tiny_params(model)
    batch = jax.tree.map(jnp.asarray, packed_rows([[5, 4], [8], [1, 2, 3]], 9))

    # A document of n tokens has n - 2 such targets.
    assert float(objective.weights(batch)["token_after_next"]) == 3 + 2 + 6 + 0 + 0 + 1
    measure = jax.jit(lambda batch: objective.sums(params, batch, {}, None))
    rows = [{name: array[row : row + 1] for name, array in batch.items()} for row in range(3)]
    parts = [measure(row) for row in rows]
    whole = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    for ours, theirs in zip(jax.tree.leaves(measure(batch)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    # Without weight are: the next token of the first, and what the end of a document stands for.
    whole = measure(batch)
    for place, counts in ((0, False), (1, True), (6, True), (7, False)):
        changed = batch["targets"].at[1, place].add(1)
        other = measure(batch | {"targets": changed})
        assert (other[0]["token_after_next"] != whole[0]["token_after_next"]) == counts
