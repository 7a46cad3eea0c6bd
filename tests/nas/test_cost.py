"""Costs of nas.cost against an independent NumPy count, finite differences and the paper."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import arch, cost, latency_table

SPACE = arch.ArchSpace.from_fractions(6, 4, 64)
DIMS = cost.ModelDims(
    num_layers=6,
    embed_dim=32,
    num_heads=4,
    head_size=8,
    num_neurons=64,
    num_tokens=17,
    patch_dim=49,
    num_classes=10,
)
VIT_B = cost.ModelDims(12, 768, 12, 64, 3072, 197, 768)
PROFILE = cost.DeviceProfile(2e9, 1e9, 1e-5, 2.0, 1e-10, 2e-9)


def _leaves(dims, genome):
    """Shapes of the sliced network's parameters, written out."""
    d, k = dims.embed_dim, dims.head_size
    shapes = [(dims.patch_dim, d), (d,), (d,), (dims.num_tokens, d), (d,), (d,)]
    if dims.num_classes:
        shapes += [(d, dims.num_classes), (dims.num_classes,)]
    depth = int(genome.depth)
    for block in {j * dims.num_layers // depth for j in range(depth)}:
        h, f = int(genome.heads[block]), int(genome.neurons[block])
        shapes += [(d,)] * 4 + [(d, h, k), (h, k)] * 3 + [(h, k, d), (d,)]
        shapes += [(d, f), (f,), (f, d), (d,)]
    return shapes


def _flops(dims, genome):
    t, d, k = dims.num_tokens, dims.embed_dim, dims.head_size
    total = 2 * (t - 1) * dims.patch_dim * d + 2 * d * dims.num_classes
    depth = int(genome.depth)
    for block in {j * dims.num_layers // depth for j in range(depth)}:
        h, f = int(genome.heads[block]), int(genome.neurons[block])
        for rows, inner, columns in (
            *[(t, d, h * k)] * 3,
            *[(t, k, t)] * h,
            *[(t, t, k)] * h,
            (t, h * k, d),
            (t, d, f),
            (t, f, d),
        ):
            total += 2 * rows * inner * columns
    return total


def _rows(population):
    for i in range(population.depth.shape[0]):
        yield jax.tree.map(lambda leaf, i=i: leaf[i], population)


def test_counts_match_an_independent_count_for_genomes_and_masks():
    population = arch.sample(jax.random.key(0), SPACE, 20)
    params = jax.vmap(lambda a: cost.num_params(DIMS, a))(population)
    flops = jax.vmap(lambda a: cost.num_flops(DIMS, a))(population)
    masks = jax.vmap(lambda a: arch.to_mask(SPACE, a))(population)
    assert params.dtype == jnp.int32
    for i, genome in enumerate(_rows(population)):
        expected = sum(int(np.prod(shape)) for shape in _leaves(DIMS, genome))
        assert int(params[i]) == expected
        assert int(flops[i]) == _flops(DIMS, genome)
        np.testing.assert_equal(float(cost.size_bytes(DIMS, genome)), 4.0 * expected)
    for function in (cost.num_params, cost.num_flops):
        of_masks = jax.vmap(lambda m, f=function: f(DIMS, m))(masks)
        of_genomes = jax.vmap(lambda a, f=function: f(DIMS, a))(population)
        np.testing.assert_array_equal(of_masks, of_genomes.astype(jnp.float32))
    for function in (cost.latency_s, cost.energy_j):
        of_masks = jax.vmap(lambda m, f=function: f(DIMS, m, PROFILE))(masks)
        of_genomes = jax.vmap(lambda a, f=function: f(DIMS, a, PROFILE))(population)
        np.testing.assert_allclose(of_masks, of_genomes, rtol=1e-6)


def test_vit_b_has_its_published_sizes():
    space = arch.ArchSpace.from_fractions(12, 12, 3072)
    params = jax.vmap(lambda a: cost.num_params(VIT_B, a))(arch.grid(space)).reshape(4, 4)
    table = [
        [6.1, 11.4, 16.7, 22.0],
        [11.4, 22.0, 32.7, 43.3],
        [16.7, 32.6, 48.6, 64.5],
        [22.0, 43.3, 64.5, 85.8],
    ]
    np.testing.assert_array_equal(np.round(np.asarray(params).T / 1e6, 1), table)
    assert int(params[3, 3]) == 85_798_656
    flops = float(cost.num_flops(VIT_B, arch.full(space)))
    np.testing.assert_allclose(flops / 2, 17.56e9, rtol=2e-3)  # multiply-adds, as published


def test_with_64_bits_operations_and_bytes_are_exact_at_any_size():
    space = arch.ArchSpace.from_fractions(12, 12, 3072)
    full = arch.full(space)
    params = sum(int(np.prod(shape)) for shape in _leaves(VIT_B, full))
    flops = float(_flops(VIT_B, full))
    np.testing.assert_allclose(cost.num_flops(VIT_B, full), flops, rtol=2**-23)
    with jax.enable_x64(True):
        assert float(cost.num_flops(VIT_B, full)) == flops
        assert float(cost.size_bytes(VIT_B, full)) == 4.0 * params


TABLE = latency_table.latency_table(
    [1, 2, 4],
    [16, 32, 64],
    1e-5 * np.array([[1.0, 4.0, 5.0], [2.0, 5.5, 6.0], [2.5, 7.0, 9.0]]),
    3e-5,
    idle_power_w=2.0,
    energy_per_flop_j=1e-10,
    energy_per_byte_j=2e-9,
)
PAPER = cost.PaperConstants()
# Far from the roofline's kink on either side of it, and with other constants than the rest.
COMPUTE_BOUND = PROFILE._replace(bytes_per_s=1e12)
MEMORY_BOUND = PROFILE._replace(flops_per_s=1e12)


def _relaxed_mask():
    """Float64 mask, between the points of the table's grid in every block."""
    rng = np.random.default_rng(0)
    full = arch.to_mask(SPACE, arch.full(SPACE))
    mask = jax.tree.map(lambda leaf: rng.uniform(0.3, 0.9, leaf.shape), full)
    heads, neurons = mask.head.sum(-1), mask.neuron.sum(-1)
    assert np.abs(heads[:, None] - [[1, 2, 4]]).min() > 1e-3
    assert np.abs(neurons[:, None] - [[16, 32, 64]]).min() > 1e-3
    return jax.tree.map(jnp.asarray, mask)


@pytest.mark.parametrize(
    "function",
    [
        lambda m: cost.num_params(DIMS, m),
        lambda m: cost.num_flops(DIMS, m),
        lambda m: cost.size_bytes(DIMS, m),
        *(
            lambda m, f=function, p=profile: f(DIMS, m, p)
            for function in (cost.latency_s, cost.energy_j)
            for profile in (COMPUTE_BOUND, MEMORY_BOUND, TABLE, PAPER)
        ),
    ],
)
def test_gradients_in_relaxed_masks_match_finite_differences(function):
    """All partial derivatives, in float64, by central differences."""
    with jax.enable_x64(True):
        mask = _relaxed_mask()
        leaves, structure = jax.tree.flatten(mask)
        grads = jax.tree.leaves(jax.jit(jax.grad(function))(mask))
        sizes = [leaf.size for leaf in leaves]
        flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])

        def of_flat(values):
            parts = jnp.split(values, np.cumsum(sizes)[:-1])
            shaped = [p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)]
            return function(jax.tree.unflatten(structure, shaped))

        step = 1e-5
        moves = step * jnp.eye(flat.size)
        up, down = (jax.jit(jax.vmap(of_flat))(flat[None] + s * moves) for s in (1, -1))
        expected = np.asarray((up - down) / (2 * step))
        found = np.concatenate([np.asarray(g).reshape(-1) for g in grads])
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())
        assert np.abs(expected).max() > 0


def test_a_full_mask_has_a_gradient_in_the_table():
    """The edge of the measured range, where a search over relaxed masks begins."""
    mask = arch.to_mask(SPACE, arch.full(SPACE))
    grads = jax.grad(lambda m: cost.latency_s(DIMS, m, TABLE))(mask)
    np.testing.assert_allclose(grads.neuron, np.full((6, 64), 2e-5 / 32), rtol=1e-5)
    np.testing.assert_allclose(grads.head, np.full((6, 4), 3e-5 / 2), rtol=1e-5)
    np.testing.assert_allclose(grads.block, np.full(6, 9e-5), rtol=1e-5)


def test_latency_is_a_roofline_and_energy_adds_up():
    genome = arch.uniform(SPACE, 0.5, 0.5)
    flops, size = float(cost.num_flops(DIMS, genome)), float(cost.size_bytes(DIMS, genome))
    slow_memory = PROFILE._replace(bytes_per_s=1.0)
    slow_compute = PROFILE._replace(flops_per_s=1.0)
    np.testing.assert_allclose(cost.latency_s(DIMS, genome, slow_memory), size + 3e-5, rtol=1e-6)
    np.testing.assert_allclose(cost.latency_s(DIMS, genome, slow_compute), flops, rtol=1e-6)
    latency = max(flops / 2e9, size / 1e9) + 3 * 1e-5
    np.testing.assert_allclose(cost.latency_s(DIMS, genome, PROFILE), latency, rtol=1e-6)
    energy = 2.0 * latency + 1e-10 * flops + 2e-9 * size
    np.testing.assert_allclose(cost.energy_j(DIMS, genome, PROFILE), energy, rtol=1e-6)


def test_table_adds_what_was_measured_of_the_kept_blocks():
    genome = arch.Arch(
        jnp.int32(3), jnp.array([1, 4, 2, 4, 4, 4]), jnp.array([16, 1, 32, 1, 64, 1])
    )
    latency = 3e-5 + 1e-5 * (1.0 + 5.5 + 9.0)  # blocks 0, 2 and 4
    np.testing.assert_allclose(cost.latency_s(DIMS, genome, TABLE), latency, rtol=1e-6)
    flops, size = float(cost.num_flops(DIMS, genome)), float(cost.size_bytes(DIMS, genome))
    energy = 2.0 * latency + 1e-10 * flops + 2e-9 * size
    np.testing.assert_allclose(cost.energy_j(DIMS, genome, TABLE), energy, rtol=1e-6)
    assert bool(cost.in_range(DIMS, genome, TABLE))  # the one neuron is of dropped blocks
    narrow = genome._replace(neurons=genome.neurons.at[2].set(15))
    assert not bool(cost.in_range(DIMS, narrow, TABLE))


def test_all_models_of_a_device_share_one_call_form():
    population = arch.sample(jax.random.key(5), SPACE, 8)
    masks = jax.vmap(lambda a: arch.to_mask(SPACE, a))(population)

    @jax.jit
    def both(genome, profile):
        return jnp.stack([f(DIMS, genome, profile) for f in (cost.latency_s, cost.energy_j)])

    for profile in (PROFILE, TABLE, PAPER):
        profile = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), profile)
        fleet = jax.tree.map(lambda x: jnp.stack([x] * 3), profile)
        values = jax.jit(jax.vmap(jax.vmap(both, (0, None)), (None, 0)))(population, fleet)
        expected = np.stack([both(row, profile) for row in _rows(population)])
        assert values.shape == (3, 8, 2)
        np.testing.assert_allclose(values, np.tile(expected, (3, 1, 1)), rtol=1e-5)
        of_masks = jax.jit(jax.vmap(both, (0, None)))(masks, profile)
        np.testing.assert_allclose(of_masks, expected, rtol=1e-5)


def test_profiles_vmap_and_one_trace_serves_all_genomes():
    genome = arch.full(SPACE)
    profiles = cost.DeviceProfile(*(jnp.array([x, 2 * x]) for x in PROFILE))
    energies = jax.vmap(lambda p: cost.energy_j(DIMS, genome, p))(profiles)
    np.testing.assert_allclose(energies[0], cost.energy_j(DIMS, genome, PROFILE), rtol=1e-6)
    chex.clear_trace_counter()
    count = jax.jit(chex.assert_max_traces(lambda a: cost.num_params(DIMS, a), n=1))
    for row in _rows(arch.sample(jax.random.key(2), SPACE, 3)):
        count(row)


def test_bad_shapes_and_sizes_are_refused():
    population = arch.sample(jax.random.key(0), SPACE, 3)
    with pytest.raises(ValueError, match="vmap"):
        cost.num_params(DIMS, population)
    with pytest.raises(ValueError, match="embed_dim"):
        cost.ModelDims(6, 0, 4, 8, 64, 17, 49)
    with pytest.raises(ValueError, match="int32"):
        cost.ModelDims(96, 12288, 96, 128, 49152, 2048, 768)


def test_paper_costs_give_the_published_energy_ratios_by_depth():
    depth = np.arange(1, 13, dtype=np.float64)
    constants = cost.PaperConstants(
        static_power_w=1.0,
        power_per_unit_w=0.1,
        memory_power_w=0.2 * 0.5 * 1.0,
        base_latency_s=0.0,
        latency_per_unit_s=1.0,
        epochs=1.0,
    )
    energy = cost.paper_costs(np.ones(12), depth, constants).energy_j
    np.testing.assert_allclose(energy / energy[-1], (1.1 * depth + 0.1 * depth**2) / 27.6)
    published = [0.04, 0.09, 0.15, 0.22, 0.29, 0.37, 0.46, 0.55, 0.65, 0.76, 0.88, 1.0]
    np.testing.assert_allclose(energy / energy[-1], published, atol=0.0051)


def test_paper_costs_at_the_full_network():
    costs = cost.paper_costs(12.0, 12.0)
    assert costs.size == 12 * 768 + 12 * 3_060_000
    assert costs.power_w == pytest.approx(100 + 10 * 144 + 6400)
    assert costs.latency_s == pytest.approx(15.4)
    assert costs.energy_j == pytest.approx(10 * 7940 * 15.4)


def test_paper_costs_of_a_genome_count_its_kept_heads():
    space = arch.ArchSpace.from_fractions(12, 12, 3072)
    for width, depth in ((0.25, 0.5), (0.75, 1.0), (1.0, 0.25)):
        genome = arch.uniform(space, width, depth)
        expected = cost.paper_costs(12.0 * width, 12.0 * depth)
        np.testing.assert_allclose(cost.arch_paper_costs(VIT_B, genome), expected, rtol=1e-6)
        latency = cost.latency_s(VIT_B, genome, PAPER)
        np.testing.assert_allclose(latency, expected.latency_s, rtol=1e-6)
        np.testing.assert_allclose(
            cost.energy_j(VIT_B, genome, PAPER), expected.energy_j, rtol=1e-6
        )
    mixed = arch.Arch(jnp.int32(2), jnp.arange(12) + 1, jnp.full(12, 7))  # blocks 0 and 6
    np.testing.assert_allclose(cost.latency_s(VIT_B, mixed, PAPER), 1 + 0.1 * (1 + 7), rtol=1e-6)
