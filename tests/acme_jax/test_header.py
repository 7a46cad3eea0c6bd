"""Header: a NumPy float64 reference with channels really deleted, supernet = chosen header."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from acme_jax import header, header_ops
from acme_jax.config import ConfigError
from acme_jax.header import HeaderDims
from nas import cells
from nas.cells import OPS

DIMS = HeaderDims(
    grid_height=3, grid_width=4, embed_dim=7, channels=6, num_classes=5, blocks=2, num_layers=2
)
MIXED = ((0, 0, 1, 3), (2, 1, 1, 2))  # sep3x3, maxpool3; sep5x5, avgpool3: node 0 and 1 used
LOOSE = ((0, 4, 0, 5), (0, 4, 0, 0))  # input 1 and block 0 are loose ends
CELLS = [MIXED, LOOSE]


def convolve(kernel, grid):
    """Plain loops: zero-padded cross-correlation of one channel."""
    size, (height, width) = len(kernel), grid.shape[1:]
    out = np.zeros_like(grid)
    for y in range(height):
        for x in range(width):
            for i in range(size):
                for j in range(size):
                    v, u = y + i - size // 2, x + j - size // 2
                    if 0 <= v < height and 0 <= u < width:
                        out[:, y, x] += kernel[i, j] * grid[:, v, u]
    return out


def pool(grid, reduce):
    height, width = grid.shape[1:3]
    out = np.zeros_like(grid)
    for y in range(height):
        for x in range(width):
            window = grid[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            out[:, y, x] = reduce(window, axis=(1, 2))
    return out


class Deleted:
    """The chosen header on smaller tensors: pruned channels do not exist. Counts its weights."""

    def __init__(self, params, cell, dims, mask, gates):
        as64 = functools.partial(np.asarray, dtype=np.float64)
        self.params, self.cell, self.dims = jax.tree.map(as64, params), cell, dims
        points = np.asarray(mask).reshape(-1, dims.channels) > 0.5
        self.points = iter([np.flatnonzero(point) for point in points])
        self.gates = iter(np.asarray(gates, np.float64).reshape(points.shape))
        self.weights = 0

    def use(self, array):
        self.weights += array.size
        return array

    def norm(self, params, grid, kept):
        """`grid` has the kept channels only."""
        gate = next(self.gates)[kept]
        scale, bias = self.use(params["scale"][kept]), self.use(params["bias"][kept])
        if not kept.size:
            return grid
        mean, variance = grid.mean(-1, keepdims=True), grid.var(-1, keepdims=True)
        return ((grid - mean) / np.sqrt(variance + 1e-5) * scale + bias) * gate

    def sep(self, params, grid, channels):
        for repetition in range(2):
            kept = next(self.points)
            kernel = self.use(params["depthwise"][repetition][:, :, channels])
            grid = np.maximum(grid, 0)
            columns = [convolve(kernel[:, :, c], grid[..., c]) for c in range(len(channels))]
            grid = np.stack(columns, -1) if columns else grid
            grid = grid @ self.use(params["pointwise"][repetition][np.ix_(channels, kept)])
            affine = {name: params[name][repetition] for name in ("scale", "bias")}
            grid, channels = self.norm(affine, grid, kept), kept
        return grid, channels

    def __call__(self, features):
        dims, p = self.dims, self.params
        kept = next(self.points)
        grid = np.asarray(features, np.float64) @ self.use(p["stem"]["kernel"][:, kept])
        grid = grid.reshape(-1, dims.grid_height, dims.grid_width, len(kept))
        older = newer = (self.norm(p["stem"]["norm"], grid, kept), kept)
        for layer in range(dims.num_layers):
            at = jax.tree.map(lambda leaf, i=layer: leaf[i], {"ops": p["ops"], "loose": p["loose"]})
            nodes = [older, newer]
            for index, block in enumerate(self.cell):
                sides = []
                for side, (node, op) in enumerate((block[:2], block[2:])):
                    grid, channels = nodes[node]
                    if OPS[op].startswith("sep"):
                        sides.append(self.sep(at["ops"][str(2 * index + side)], grid, channels))
                    elif OPS[op] == "identity":
                        sides.append((grid, channels))
                    else:
                        reduce = np.max if OPS[op] == "maxpool3" else np.mean
                        sides.append((pool(grid, reduce), channels))
                union = np.union1d(sides[0][1], sides[1][1]).astype(int)
                total = np.zeros((*sides[0][0].shape[:3], len(union)))
                for grid, channels in sides:
                    total[..., np.searchsorted(union, channels)] += grid
                nodes.append((total, union))
            kept = next(self.points)
            used = {n for block in self.cell for n in (block[0], block[2])}
            loose = [n for n in range(len(nodes)) if n not in used]
            mixed = 0.0
            for index, node in enumerate(loose):
                grid, channels = nodes[node]
                kernel = self.use(at["loose"]["kernel"][index][np.ix_(channels, kept)])
                mixed = mixed + np.maximum(grid, 0) @ kernel
            older, newer = newer, (self.norm(at["loose"]["norm"], mixed, kept), kept)
        pooled = np.maximum(newer[0], 0).mean((1, 2))
        kernel = self.use(p["classifier"]["kernel"][newer[1]])
        return pooled @ kernel + self.use(p["classifier"]["bias"])


def perturbed(params, seed=3):
    """No weight at its special initial value (scale one, bias zero)."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


@functools.cache
def example(cell):
    params = perturbed(header.init(jax.random.key(0), cell, DIMS))
    features = 2.0 * jax.random.normal(jax.random.key(1), (3, 12, DIMS.embed_dim))
    gates = 1.0 + 0.3 * jax.random.normal(jax.random.key(2), (header.num_gates(DIMS, cell),))
    return params, features, gates


@functools.cache
def compiled(cell):
    return jax.jit(
        lambda params, features, gates, mask: header.apply(
            params, cell, DIMS, features, gates=gates, mask=mask
        )
    )


@functools.cache
def graded(cell):
    """Gradients of the squared logits in weights and gates, and the logits."""

    def loss(params, features, gates, mask):
        logits = header.apply(params, cell, DIMS, features, gates=gates, mask=mask)
        return (logits**2).sum(), logits

    return jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kept", [1.0, 0.6])
def test_masked_equals_deleted_and_counts_its_weights(cell, kept):
    params, features, gates = example(cell)
    mask = (np.random.default_rng(0).random(gates.shape) < kept).astype(np.float32)
    deleted = Deleted(params, cell, DIMS, mask, gates)
    expected = deleted(features)
    logits = compiled(cell)(params, features, gates, mask)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert header.num_params(DIMS, cell, mask) == deleted.weights
    if kept == 1.0:
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert header.num_params(DIMS, cell) == count == deleted.weights
    else:
        assert deleted.weights < header.num_params(DIMS, cell)
        assert header.num_flops(DIMS, cell, mask) < header.num_flops(DIMS, cell)


def test_gates_and_mask_default_to_ones():
    params, features, gates = example(LOOSE)
    plain = jax.jit(lambda params: header.apply(params, LOOSE, DIMS, features))(params)
    ones = jnp.ones(gates.shape)
    np.testing.assert_allclose(plain, compiled(LOOSE)(params, features, ones, ones), atol=1e-6)


def test_flops_of_a_counted_example():
    cell, tokens, size = ((0, 0, 1, 5),), 12, DIMS.channels
    dims = HeaderDims(3, 4, 7, size, 5, 1, 1)
    matrices = 7 * size + 2 * (9 * size + size * size) + size * size  # stem, sep3x3, loose end
    assert header.num_flops(dims, cell) == 2 * tokens * matrices + 2 * size * 5


def test_supernet_equals_chosen_header_for_every_operation_on_every_side():
    shared = perturbed(header.init_shared(jax.random.key(0), DIMS))
    features = example(MIXED)[1]
    every = [((0, op, 1, (op + 1) % 6), (2, (op + 2) % 6, op % 3, op)) for op in range(6)]
    stacked = jax.tree.map(lambda *genes: jnp.stack(genes), *map(cells.from_static, every))
    logits = jax.jit(
        lambda stacked: lax.map(
            lambda cell: header.apply_shared(shared, cell, DIMS, features), stacked
        )
    )(stacked)
    for cell, found in zip(every, logits, strict=True):
        params = header.extract(shared, cell, DIMS)
        fresh = header.init(jax.random.key(0), cell, DIMS)
        assert jax.tree.structure(params) == jax.tree.structure(fresh)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
        ones = np.ones(header.num_gates(DIMS, cell))
        expected = Deleted(params, cell, DIMS, ones, ones)(features)
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_supernet_gradient_equals_the_chosen_headers_and_is_zero_elsewhere():
    shared = perturbed(header.init_shared(jax.random.key(0), DIMS))
    features = example(MIXED)[1]
    genome = cells.from_static(MIXED)
    grads = jax.jit(
        jax.grad(lambda p: (header.apply_shared(p, genome, DIMS, features) ** 2).sum())
    )(shared)
    chosen = header.extract(shared, MIXED, DIMS)
    ones = jnp.ones(header.num_gates(DIMS, MIXED))
    expected = graded(MIXED)(chosen, features, ones, ones)[0][0]
    found = header.extract(grads, MIXED, DIMS)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
    touched = sum(int((jnp.abs(leaf) > 0).sum()) for leaf in jax.tree.leaves(grads["ops"]))
    possible = sum(leaf.size for leaf in jax.tree.leaves(chosen["ops"]))
    assert 0.8 * possible < touched <= possible


def test_gate_gradient_matches_finite_differences_and_is_zero_where_pruned():
    params, features, gates = example(MIXED)
    mask = (np.random.default_rng(1).random(gates.shape) < 0.7).astype(np.float32)
    grads = graded(MIXED)(params, features, gates, mask)[0][1]
    assert (np.asarray(grads)[mask == 0] == 0).all()
    rng = np.random.default_rng(2)
    for index in rng.choice(np.flatnonzero(mask), 6, replace=False):
        values = []
        for sign in (1, -1):
            shifted = np.asarray(gates, np.float64)
            shifted[index] += sign * 1e-6
            values.append((Deleted(params, MIXED, DIMS, mask, shifted)(features) ** 2).sum())
        numeric = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(grads[index], numeric, rtol=2e-3, atol=1e-3)


def test_pruning_a_whole_gate_point_gives_zeros_not_nan():
    params, features, gates = example(MIXED)
    for point in (*header.gate_layout(DIMS, MIXED), None):
        mask = np.ones(gates.shape, np.float32)
        mask[slice(point.start, point.stop) if point else slice(None)] = 0
        grads, logits = graded(MIXED)(params, features, gates, mask)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, logits)))
        assert (np.asarray(grads[1])[mask == 0] == 0).all()
    np.testing.assert_allclose(logits, params["classifier"]["bias"][None].repeat(3, 0))
    assert header.num_params(DIMS, MIXED, np.zeros(gates.shape)) == DIMS.num_classes


def test_gate_layout_covers_the_vector_in_order():
    layout = header.gate_layout(DIMS, MIXED)
    assert layout[0].start == 0
    assert all(a.stop == b.start for a, b in itertools.pairwise(layout))
    assert layout[-1].stop == header.num_gates(DIMS, MIXED) == 6 * (1 + 2 * (2 * 2 + 1))
    assert [point.name for point in layout[:6]] == [
        "stem",
        "layer0.block0.x.sep3x3.first",
        "layer0.block0.x.sep3x3.second",
        "layer0.block1.x.sep5x5.first",
        "layer0.block1.x.sep5x5.second",
        "layer0.output",
    ]


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (9, 8)])  # matrix form, and shifted form
def test_depthwise_matches_plain_loops(size, grid):
    rng = np.random.default_rng(0)
    kernel, inputs = rng.standard_normal((size, size, 4)), rng.standard_normal((2, *grid, 4))
    expected = np.stack([convolve(kernel[:, :, c], inputs[..., c]) for c in range(4)], -1)
    found = header_ops.depthwise(jnp.asarray(kernel, jnp.float32), jnp.asarray(inputs, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (3, 5)])
def test_pools_match_plain_loops_over_valid_positions(grid):
    inputs = np.random.default_rng(0).standard_normal((2, *grid, 3)).astype(np.float32)
    np.testing.assert_array_equal(header_ops.max_pool3(jnp.asarray(inputs)), pool(inputs, np.max))
    mean = header_ops.avg_pool3(jnp.asarray(inputs))
    np.testing.assert_allclose(mean, pool(inputs, np.mean), atol=1e-6)


def test_clients_with_their_own_weights_vmap():
    params, features, gates = example(MIXED)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), params)
    masks = (np.random.default_rng(5).random((2, *gates.shape)) < 0.8).astype(np.float32)
    both = jax.vmap(compiled(MIXED), in_axes=(0, None, None, 0))(stacked, features, gates, masks)
    for client in range(2):
        own = jax.tree.map(lambda leaf, i=client: leaf[i], stacked)
        one = compiled(MIXED)(own, features, gates, masks[client])
        np.testing.assert_allclose(both[client], one, atol=2e-5)


def test_linear_header_matches_numpy():
    params = perturbed(header.init_linear(jax.random.key(0), 7, 5))
    features = np.asarray(example(MIXED)[1], np.float64)
    mean, variance = features.mean(-1, keepdims=True), features.var(-1, keepdims=True)
    norm, last = (jax.tree.map(np.asarray, params[name]) for name in ("norm", "classifier"))
    scaled = (features - mean) / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]
    expected = scaled.mean(1) @ last["kernel"] + last["bias"]
    found = header.apply_linear(params, jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_sizes_that_do_not_fit_are_refused():
    params, features, gates = example(MIXED)
    with pytest.raises(ValueError, match="drop the class token"):
        header.apply(params, MIXED, DIMS, features[:, :11])
    with pytest.raises(ValueError, match=f"{len(gates)} gates"):
        header.apply(params, MIXED, DIMS, features, mask=gates[1:])
    with pytest.raises(ValueError, match="has 1 blocks"):
        header.init(jax.random.key(0), MIXED[:1], DIMS)
    with pytest.raises(ValueError, match="gates"):
        header.num_params(DIMS, MIXED, np.ones(3))
    with pytest.raises(ConfigError, match="channels must be positive"):
        HeaderDims(4, 4, 8, 0, 10, 2, 3)
