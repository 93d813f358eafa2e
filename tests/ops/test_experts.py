"""Experts against a loop over experts in float64, on one device and over meshes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.ops import experts as module
from jaxllm.ops import grouped
from jaxllm.ops.experts import ExpertKernels, route
from jaxllm.ops.products import PRODUCT
from jaxllm.sharding.mesh import BATCH_AXES, MeshConfig, make_mesh

BATCH, SEQ, EXPERTS, K, EMBED, INNER = 2, 20, 4, 2, 6, 10


def expert_mlp(x, choices, weights, gate, up, down, *rest):
    kernels = map(ExpertKernels, (gate, up, down))
    return module.expert_mlp(x, choices, weights, *kernels, *rest)


@partial(jax.jit, static_argnums=(1, 2))
def routed(logits, k=K, normalise=True, counted=None):
    counted = jnp.ones(logits.shape[:2], bool) if counted is None else counted
    return route(logits, k, normalise=normalise, counted=counted)


# ---- route


@pytest.fixture(scope="module")
def logits():
    return 2 * jax.random.normal(jax.random.key(0), (3, 7, 5))


@pytest.fixture(scope="module")
def counted():
    """Rows of 7, 4 and no tokens."""
    return jnp.arange(7) < jnp.array([[7], [4], [0]])


def test_weights_are_the_largest_probabilities_or_the_softmax_over_the_chosen(logits):
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    largest = -np.sort(-probabilities, axis=-1)[..., :3]
    for normalise in (False, True):
        routing = routed(logits, 3, normalise)
        wanted = largest / largest.sum(axis=-1, keepdims=True) if normalise else largest
        np.testing.assert_allclose(routing.weights, wanted, rtol=1e-5)
        chosen = np.take_along_axis(probabilities, np.asarray(routing.choices), axis=-1)
        np.testing.assert_array_equal(chosen, largest)


def test_the_losses_of_a_row_are_those_of_the_papers_over_its_counted_tokens(logits, counted):
    routing = routed(logits, counted=counted)
    scores = np.asarray(logits, np.float64)
    for row, n in enumerate((7, 4, 0)):
        probabilities = np.exp(scores[row, :n])
        sums = probabilities.sum(axis=-1)
        mean = (probabilities / sums[:, None]).sum(axis=0) / max(n, 1)
        chosen = np.argsort(-scores[row, :n], axis=-1)[:, :K]
        share = np.bincount(chosen.ravel(), minlength=5) / max(n * K, 1)
        np.testing.assert_allclose(routing.load_balance[row], n * 5 * share @ mean, rtol=1e-5)
        np.testing.assert_allclose(routing.router_z[row], np.sum(np.log(sums) ** 2), rtol=1e-5)


def test_a_balanced_row_has_a_balance_loss_of_its_tokens_and_a_collapsed_one_far_more():
    balanced = 50 * jnp.eye(4)[None, jnp.array([0, 1, 2, 3, 0, 1, 2, 3])]
    np.testing.assert_allclose(routed(balanced, 1).load_balance, [8.0], rtol=1e-5)
    collapsed = 50 * jnp.eye(4)[None, jnp.zeros(8, int)]
    np.testing.assert_allclose(routed(collapsed, 1).load_balance, [32.0], rtol=1e-5)
    # Indifferent between all experts: 1, however ties are broken.
    np.testing.assert_allclose(routed(jnp.zeros((1, 8, 4)), 2).load_balance, [8.0], rtol=1e-5)


def test_padding_neither_counts_nor_learns(logits, counted):
    def losses(logits):
        routing = routed(logits, counted=counted)
        return jnp.stack([routing.load_balance, routing.router_z])

    other = jnp.where(counted[..., None], logits, 9 * logits + 1)
    np.testing.assert_array_equal(losses(logits), losses(other))
    gradient = jax.grad(lambda x: jnp.sum(losses(x)))(logits)
    assert (gradient[~counted] == 0).all()
    assert (gradient[counted] != 0).all()


def test_the_balance_loss_moves_probabilities_alone_and_a_step_against_it_balances(logits):
    def balance(logits):
        return jnp.sum(routed(logits).load_balance)

    choices = routed(logits).choices
    share = jnp.mean(jax.nn.one_hot(choices, 5), axis=(1, 2))

    def with_fixed_shares(logits):
        return 5 * jnp.sum(share[:, None] * jax.nn.softmax(logits, axis=-1))

    gradient = jax.grad(balance)(logits)
    np.testing.assert_allclose(gradient, jax.grad(with_fixed_shares)(logits), atol=1e-5)
    assert balance(logits - 5 * gradient) < balance(logits)


def test_routing_of_bfloat16_scores_is_float32(logits):
    routing = routed(logits.astype(jnp.bfloat16))
    assert {array.dtype for array in routing[1:]} == {jnp.dtype("float32")}
    np.testing.assert_allclose(jnp.sum(routing.weights, axis=-1), 1.0, rtol=1e-6)


# ---- grouped products


ROWS, GROUPS = 37, 4


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(sorted),
    seed=st.integers(0, 100),
)
def test_native_and_blocked_products_equal_a_loop_over_groups(cuts, seed):
    sizes = np.diff(cuts, prepend=0).astype(np.int32)  # and rows of no group at the end
    rng = np.random.default_rng(seed)
    rows, cotangent = rng.normal(size=(ROWS, 3)), rng.normal(size=(ROWS, 5))
    kernels = rng.normal(size=(GROUPS, 3, 5))
    product, back, outer = np.zeros((ROWS, 5)), np.zeros((ROWS, 3)), np.zeros((GROUPS, 3, 5))
    for group in range(GROUPS):
        own = slice(cuts[group] - sizes[group], cuts[group])
        product[own] = rows[own] @ kernels[group]
        back[own] = cotangent[own] @ kernels[group].T
        outer[group] = rows[own].T @ cotangent[own]
    arrays = (jnp.asarray(x, jnp.float32) for x in (rows, cotangent, kernels))
    for found in _both_paths(*arrays, jnp.asarray(sizes)):
        for ours, wanted in zip(found, (product, back, outer), strict=True):
            np.testing.assert_allclose(ours, wanted, atol=1e-5)


@jax.jit
def _both_paths(rows, cotangent, kernels, sizes):
    return [
        (
            product(rows, kernels, sizes, transposed=False),
            product(cotangent, kernels, sizes, transposed=True),
            outer(rows, cotangent, sizes, dtype="float32"),
        )
        for product, outer in (
            (grouped.native_product, grouped.native_outer),
            (grouped.blocked_product, grouped.blocked_outer),
        )
    ]


def test_a_block_is_about_half_a_group_within_bounds():
    assert grouped.block_length(8192, 8) == 256
    assert grouped.block_length(1024, 8) == 64
    assert grouped.block_length(1024, 1024) == 8
    assert grouped.block_length(2, 8) == 2


def test_only_a_tpu_is_given_the_native_product():
    arguments = (jnp.ones((8, 3)), jnp.ones((2, 3, 5)), jnp.array([3, 5]))
    gradient = jax.grad(lambda *a: jnp.sum(grouped.grouped_matmul(*a) ** 2), argnums=(0, 1))
    traced = jax.jit(gradient).trace(*arguments)
    for platform, expected in (("tpu", 3), ("cpu", 0), ("cuda", 0)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count('chlo.ragged_dot"') + text.count("chlo.ragged_dot ") == expected, text
        assert ("stablehlo.while" in text) == (expected == 0)


# ---- expert_mlp


def reference(x, choices, weights, gate, up, down, cotangent):
    """Output and gradients by x, weights, gate, up, down in float64; the activation is tanh."""
    x, weights, gate, up, down, cotangent = (
        np.asarray(a, np.float64) for a in (x, weights, gate, up, down, cotangent)
    )
    out, by_x, by_weights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    by_gate, by_up, by_down = np.zeros_like(gate), np.zeros_like(up), np.zeros_like(down)
    for *place, j in np.ndindex(weights.shape):
        place = tuple(place)
        e = choices[(*place, j)]
        token, weight = x[place], weights[(*place, j)]
        activated, linear = np.tanh(token @ gate[e]), token @ up[e]
        result = (activated * linear) @ down[e]
        out[place] += weight * result
        by_weights[(*place, j)] = cotangent[place] @ result
        by_down[e] += np.outer(activated * linear, weight * cotangent[place])
        by_inner = down[e] @ (weight * cotangent[place])
        by_up[e] += np.outer(token, by_inner * activated)
        by_hidden = by_inner * linear * (1 - activated**2)
        by_gate[e] += np.outer(token, by_hidden)
        by_x[place] += gate[e] @ by_hidden + up[e] @ (by_inner * activated)
    return out, by_x, by_weights, by_gate, by_up, by_down


@pytest.fixture(scope="module")
def arrays():
    """x, weights, gate, up, down and a cotangent."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.25, jnp.float32)

    kernels = [draw(EXPERTS, EMBED, INNER) for _ in range(2)] + [draw(EXPERTS, INNER, EMBED)]
    weights = jnp.asarray(rng.uniform(0.1, 1, (BATCH, SEQ, K)), jnp.float32)
    return draw(BATCH, SEQ, EMBED), weights, *kernels, draw(BATCH, SEQ, EMBED)


@jax.jit
def output_and_gradients(x, choices, weights, gate, up, down, cotangent):
    def run(x, weights, gate, up, down):
        return expert_mlp(x, choices, weights, gate, up, down, jnp.tanh)

    out, pull = jax.vjp(run, x, weights, gate, up, down)
    return out, *pull(cotangent)


def routings():
    random = np.argsort(np.random.default_rng(1).uniform(size=(BATCH, SEQ, EXPERTS)))[..., :K]

    def everywhere(*pair):
        return np.broadcast_to(pair, (BATCH, SEQ, K))

    one_elsewhere = np.where(np.arange(SEQ)[:, None] == 3, [3, 1], [0, 2])
    return {
        "random": random,
        "all to the first two": everywhere(0, 1),
        "all to the last two": everywhere(3, 2),
        "all to a single one": everywhere(1, 1),
        "one token elsewhere": np.stack([one_elsewhere] * BATCH),
    }


@pytest.mark.parametrize("routing", routings())
def test_output_and_all_gradients_equal_a_loop_over_tokens_and_experts(arrays, routing):
    x, *rest = arrays
    choices = jnp.asarray(routings()[routing], jnp.int32)
    found = output_and_gradients(x, choices, *rest)
    for ours, wanted in zip(found, reference(x, np.asarray(choices), *rest), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_an_expert_that_no_token_chose_is_not_even_read(arrays):
    x, weights, gate, up, down, cotangent = arrays
    choices = jnp.asarray(routings()["all to the first two"], jnp.int32)
    broken = [kernel.at[2:].set(jnp.nan) for kernel in (gate, up, down)]
    wanted = output_and_gradients(x, choices, weights, gate, up, down, cotangent)
    found = output_and_gradients(x, choices, weights, *broken, cotangent)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_more_experts_take_no_more_temporary_memory(arrays):
    x, weights, *_, cotangent = arrays
    choices = jnp.zeros(weights.shape, jnp.int32)

    def temporary(experts):
        to_inner = jnp.zeros((experts, EMBED, INNER))
        kernels = (to_inner, to_inner, to_inner.swapaxes(1, 2))
        lowered = output_and_gradients.lower(x, choices, weights, *kernels, cotangent)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # Float32 rows of all tokens for each expert would be 80 · (EMBED + 2 · INNER) · 4 bytes more.
    assert temporary(64) - temporary(4) < 60 * 80 * EMBED * 4 / 4


def test_bfloat16_products_have_bfloat16_operands_and_float32_sums_forward_and_backward(
    arrays, all_equations
):
    x, weights, gate, up, down, cotangent = arrays
    choices = jnp.asarray(routings()["random"], jnp.int32)
    x, cotangent = x.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)
    arguments = (x, choices, weights, gate, up, down, cotangent)
    program = jax.make_jaxpr(output_and_gradients)(*arguments).jaxpr
    names = ("dot_general", "ragged_dot_general")
    products = [e for e in all_equations(program) if e.primitive.name in names]
    # Three forward and six backward, on a TPU and elsewhere.
    assert len(products) == 18
    for equation in products:
        assert {v.aval.dtype for v in equation.invars[:2]} == {jnp.dtype("bfloat16")}
        result = equation.outvars[0].aval
        # On a TPU what is no gradient of kernels is rounded by the operation itself.
        if equation.primitive.name == "dot_general" or result.shape[0] == EXPERTS:
            assert result.dtype == jnp.float32

    found = output_and_gradients(*arguments)
    assert [a.dtype.name for a in found] == ["bfloat16"] * 2 + ["float32"] * 4
    wanted = reference(x, np.asarray(choices), weights, gate, up, down, cotangent)
    for ours, theirs in zip(found, wanted, strict=True):
        error = np.abs(np.asarray(ours, np.float64) - theirs)
        assert error.max() < 0.02 * np.abs(theirs).max()
    for by_kernel in found[3:]:
        assert (by_kernel != by_kernel.astype(jnp.bfloat16)).any()  # never rounded to that


# ---- meshes


MESHES = {
    "data": MeshConfig(data=8),
    "expert": MeshConfig(data=2, expert=4),
    "all but data": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}
LAYOUT = {
    "gate": PartitionSpec(None, "expert", "fsdp", "tensor"),
    "up": PartitionSpec(None, "expert", "fsdp", "tensor"),
    "down": PartitionSpec(None, "expert", "tensor", "fsdp"),
    "router": PartitionSpec(),
}


def two_layers(params, x):
    """A scalar of two routed layers, scanned and rematerialised, with their losses."""

    def layer(x, params):
        routing = routed(x @ params["router"])
        kernels = (params[name] for name in ("gate", "up", "down"))
        x = x + expert_mlp(x, routing.choices, routing.weights, *kernels, jax.nn.silu)
        return x, jnp.sum(routing.load_balance + routing.router_z)

    x, losses = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, params)
    return jnp.mean(x**2) + 0.01 * jnp.sum(losses)


@pytest.fixture(scope="module")
def layers():
    keys = jax.random.split(jax.random.key(3), 5)
    shapes = {"gate": (4, 8, 12), "up": (4, 8, 12), "down": (4, 12, 8), "router": (8, 4)}
    params = {
        name: jax.random.normal(key, (2, *shape)) * shape[-2] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    # Most tokens like one expert best.
    params["router"] = params["router"].at[..., 1].add(1.0)
    return params, jax.random.normal(keys[4], (8, 5, 8)) + 0.3


@pytest.fixture(scope="module")
def one_device(layers):
    return jax.device_get(jax.jit(jax.value_and_grad(two_layers, argnums=(0, 1)))(*layers))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_the_values_and_gradients_of_one_device(layers, one_device, mesh):
    mesh = make_mesh(MESHES[mesh])
    params, x = layers
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(kernel, NamedSharding(mesh, LAYOUT[name]))
            for name, kernel in params.items()
        }
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
        found = jax.jit(jax.value_and_grad(two_layers, argnums=(0, 1)))(params, x)
    jax.tree.map(
        lambda ours, wanted: np.testing.assert_allclose(ours, wanted, atol=1e-5),
        jax.device_get(found),
        one_device,
    )


@pytest.mark.parametrize(("keep", "products"), [(PRODUCT, 9), ("nothing", 12)])
def test_the_results_of_products_can_be_kept_by_name_on_a_mesh(
    arrays, all_equations, keep, products
):
    x, weights, *kernels, _ = arrays
    choices = jnp.asarray(routings()["random"], jnp.int32)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(keep))
    def layer(x, *kernels):
        return jnp.sin(expert_mlp(x, choices, weights, *kernels, jnp.tanh))

    gradient = jax.grad(lambda *inputs: jnp.sum(layer(*inputs)), argnums=(0, 1, 2, 3))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, expert=2))):
        program = jax.make_jaxpr(gradient)(x, *kernels).jaxpr
    names = [equation.primitive.name for equation in all_equations(program)]
    # For a TPU: three forward and six backward, and what is computed again.
    assert names.count("ragged_dot_general") == products


@pytest.mark.parametrize(("reduction", "short"), [("float32", "f32"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("params", ["float32", "bfloat16"])
def test_gradients_of_kernels_travel_as_asked_and_kernels_as_the_products(
    arrays, reduction, short, params
):
    x, weights, *kernels, _ = arrays
    x, kernels = x.astype(jnp.bfloat16), [kernel.astype(params) for kernel in kernels]
    choices = jnp.asarray(routings()["random"], jnp.int32)

    def total(*kernels):
        out = expert_mlp(x, choices, weights, *kernels, jnp.tanh, reduction)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, expert=2))):
        text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*kernels).as_text()

    def kinds(operation):
        """Types of the results with the three dimensions of kernels; x has rows first."""
        types = re.findall(
            rf'"stablehlo\.{operation}"(?:.*\n)*?.*-> tensor<(\d+x\d+x\d+x\w+)>', text
        )
        sizes = {(EMBED, INNER), (EMBED // 2, INNER), (INNER, EMBED), (INNER, EMBED // 2)}
        shapes = [kind.split("x") for kind in types]
        return {shape[-1] for shape in shapes if tuple(map(int, shape[1:3])) in sizes}

    assert kinds("all_gather") == {"bf16"}
    assert kinds("reduce_scatter") == {short}
    assert kinds("all_reduce") == {short}


def test_a_batch_that_the_mesh_does_not_divide_gives_the_same(arrays):
    x, weights, *kernels, _ = arrays
    choices = jnp.asarray(routings()["random"], jnp.int32)
    run = jax.jit(lambda *rest: expert_mlp(x, choices, weights, *rest, jnp.tanh))
    expected = run(*kernels)
    with jax.set_mesh(make_mesh(MESHES["expert"])):
        found = run(*kernels)
    assert found.shape == x.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)
