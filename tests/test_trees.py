"""Trees by path: what is named, chosen, split and put together again."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import trees
from jaxllm.errors import UserError

NAMES = st.text("abc_0", min_size=1, max_size=3)
# No empty branch: a parameter tree has none, and `split` drops them.
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        st.integers(), lambda inner: st.dictionaries(NAMES, inner, min_size=1), max_leaves=8
    ),
    min_size=1,
)
TREE = {"a": {"kernel": 1, "scale": 2}, "b": {"c": {"kernel": 3}}, "output": 4}


def test_paths_are_keys_joined_in_the_order_of_insertion():
    assert list(trees.leaves_with_paths(TREE)) == [
        ("a/kernel", 1),
        ("a/scale", 2),
        ("b/c/kernel", 3),
        ("output", 4),
    ]


@settings(max_examples=40)
@given(TREES)
def test_mapping_keeps_the_nesting_and_gives_each_leaf_its_path(tree):
    named = trees.map_with_paths(lambda path, leaf: (path, leaf), tree)
    assert [leaf for _, leaf in trees.leaves_with_paths(named)] == list(
        trees.leaves_with_paths(tree)
    )


@settings(max_examples=40)
@given(TREES, st.data())
def test_merge_is_the_inverse_of_split(tree, data):
    leaves = dict(trees.leaves_with_paths(tree))
    chosen = data.draw(st.sets(st.sampled_from(sorted(leaves)), min_size=1))
    first, second = trees.split(tree, "|".join(chosen))
    assert dict(trees.leaves_with_paths(first)) == {path: leaves[path] for path in chosen}
    assert not set(dict(trees.leaves_with_paths(second))) & chosen
    assert trees.merge(first, second) == trees.merge(second, first) == tree


def test_split_and_merge_change_neither_tree():
    tree = {"a": {"x": 1, "y": 2}}
    first, second = trees.split(tree, "a/x")
    trees.merge(first, second)
    assert (tree, first, second) == ({"a": {"x": 1, "y": 2}}, {"a": {"x": 1}}, {"a": {"y": 2}})


def test_a_pattern_is_of_the_whole_path():
    first, _ = trees.split(TREE, r".*/kernel")
    assert first == {"a": {"kernel": 1}, "b": {"c": {"kernel": 3}}}
    with pytest.raises(UserError, match=r"'kernel' matches no parameter; .*'a/kernel', 'output'"):
        trees.split(TREE, "kernel")


def test_merge_refuses_two_leaves_of_one_name():
    for first, second in [({"a": 1}, {"a": 2}), ({"a": {"b": 1}}, {"a": 2})]:
        with pytest.raises(ValueError, match="'a'"):
            trees.merge(first, second)


def test_the_first_rule_that_matches_counts():
    rules = [(r"a/.*", "first"), (r".*/kernel", "second")]
    assert trees.match(rules, "a/kernel") == "first"
    assert trees.match(rules, "b/kernel") == "second"
    with pytest.raises(LookupError, match="'b/scale'"):
        trees.match(rules, "b/scale")


def test_size_counts_elements_of_arrays_and_of_shapes():
    tree = {"a": np.zeros((2, 3)), "b": {"c": jax.ShapeDtypeStruct((4,), "float32")}}
    assert trees.size(tree) == 10
