"""Genomes, masks and operators of nas.arch against plain loops and the paper's lists."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import arch

SPACE = arch.ArchSpace.from_fractions(6, 4, 64)
TIED = arch.ArchSpace.from_fractions(6, 4, 64, per_layer=False)


def test_from_fractions_rounds_halves_up_and_keeps_one_at_least():
    space = arch.ArchSpace.from_fractions(6, 2, 10, fractions=(0.05, 0.25, 0.75, 1.0))
    assert space.depth_choices == (1, 2, 5, 6)
    assert space.head_choices == (1, 1, 2, 2)
    assert space.neuron_choices == (1, 3, 8, 10)
    assert hash(space) == hash(arch.ArchSpace(6, 2, 10, (1, 2, 5, 6), (1, 1, 2, 2), (1, 3, 8, 10)))


@pytest.mark.parametrize("choices", [(), (0, 1), (2, 1), (1, 7)])
def test_bad_choices_are_refused(choices):
    with pytest.raises(ValueError, match="depth_choices"):
        arch.ArchSpace(6, 4, 8, choices, (4,), (8,))


def test_tied_space_needs_paired_choices():
    with pytest.raises(ValueError, match="equal length"):
        arch.ArchSpace(6, 4, 8, (6,), (2, 4), (8,), per_layer=False)


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (1.0, list(range(12))),
        (0.75, [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        (0.5, [0, 2, 4, 6, 8, 10]),
        (0.25, [0, 4, 8]),
        (0.83, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]),
        (0.67, [0, 1, 2, 4, 5, 7, 8, 10]),
        (0.33, [0, 3, 6, 9]),
        (0.17, [0, 5]),
    ],
)
def test_kept_layers_are_the_papers(fraction, expected):
    assert list(arch.kept_layers(12, fraction)) == expected


def test_kept_layers_refuses_zero():
    with pytest.raises(ValueError, match="fraction"):
        arch.kept_layers(12, 0.0)


@pytest.mark.parametrize("num_layers", [1, 2, 6, 7, 12])
def test_keep_mask_matches_the_rule_at_every_depth(num_layers):
    masks = jax.vmap(lambda d: arch.keep_mask(num_layers, d))(jnp.arange(1, num_layers + 1))
    for depth, mask in enumerate(np.asarray(masks), start=1):
        expected = {j * num_layers // depth for j in range(depth)}
        assert set(np.flatnonzero(mask)) == expected
        if num_layers % depth == 0 or depth * 4 % num_layers == 0:
            assert set(arch.kept_layers(num_layers, depth / num_layers)) == expected


def test_uniform_and_grid_agree():
    rows = arch.grid(SPACE)
    assert rows.depth.shape == (16,)
    assert rows.heads.shape == (16, 6)
    fractions = (0.25, 0.5, 0.75, 1.0)
    for d, depth in enumerate(fractions):
        for w, width in enumerate(fractions):
            row = jax.tree.map(lambda leaf, i=d * 4 + w: leaf[i], rows)
            chex.assert_trees_all_equal(row, arch.uniform(SPACE, width, depth))
            assert int(row.depth) == max(1, math.floor(6 * depth + 0.5))
            assert int(row.heads[0]) == w + 1
            assert int(row.neurons[0]) == 16 * (w + 1)


def test_uniform_refuses_what_is_no_choice():
    with pytest.raises(ValueError, match="depth"):
        arch.uniform(SPACE, 0.5, 0.17)
    with pytest.raises(ValueError, match="neuron"):
        arch.uniform(SPACE, 0.3, 0.5)


def test_to_mask_keeps_prefixes():
    genome = arch.Arch(jnp.int32(3), jnp.array([1, 2, 3, 4, 1, 2]), jnp.array([16] * 5 + [64]))
    mask = arch.to_mask(SPACE, genome)
    np.testing.assert_array_equal(mask.block, [1, 0, 1, 0, 1, 0])
    for layer in range(6):
        heads, neurons = int(genome.heads[layer]), int(genome.neurons[layer])
        np.testing.assert_array_equal(mask.head[layer], [1] * heads + [0] * (4 - heads))
        np.testing.assert_array_equal(mask.neuron[layer], [1] * neurons + [0] * (64 - neurons))
    chex.assert_trees_all_equal_dtypes(*mask)
    full = arch.to_mask(SPACE, arch.full(SPACE))
    assert all(bool(jnp.all(leaf == 1)) for leaf in full)


def test_to_mask_vmaps():
    population = arch.sample(jax.random.key(0), SPACE, 5)
    masks = jax.vmap(lambda a: arch.to_mask(SPACE, a))(population)
    for row in range(5):
        one = arch.to_mask(SPACE, jax.tree.map(lambda leaf, i=row: leaf[i], population))
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf, i=row: leaf[i], masks), one)


def _assert_valid(space, population):
    """Choices respected, canonical, int32."""
    chex.assert_trees_all_equal(
        population, jax.vmap(lambda a: arch.canonical(space, a))(population)
    )
    assert all(leaf.dtype == jnp.int32 for leaf in population)
    assert set(np.ravel(population.depth)) <= set(space.depth_choices)
    assert set(np.ravel(population.heads)) <= set(space.head_choices)
    assert set(np.ravel(population.neurons)) <= set(space.neuron_choices)
    if not space.per_layer:
        pairs = np.stack([population.heads, population.neurons], -1).reshape(-1, 2)
        assert {tuple(p) for p in pairs.tolist()} <= set(space.widths)


@pytest.mark.parametrize("space", [SPACE, TIED], ids=["per_layer", "tied"])
def test_operators_stay_in_the_space(space):
    keys = jax.random.split(jax.random.key(1), 300)
    population = arch.sample(jax.random.key(0), space, 300)
    _assert_valid(space, population)
    assert set(np.ravel(population.depth)) == set(space.depth_choices)
    mutants = jax.vmap(lambda k, a: arch.mutate(k, space, a, 0.5))(keys, population)
    _assert_valid(space, mutants)
    other = jax.tree.map(lambda leaf: leaf[::-1], population)
    children = jax.vmap(lambda k, a, b: arch.crossover(k, space, a, b))(keys, population, other)
    _assert_valid(space, children)
    from_parent = (children.depth == population.depth) | (children.depth == other.depth)
    assert bool(jnp.all(from_parent))


@pytest.mark.parametrize("space", [SPACE, TIED], ids=["per_layer", "tied"])
def test_mutation_rate_zero_changes_nothing_and_one_changes_every_gene(space):
    keys = jax.random.split(jax.random.key(1), 100)
    population = jax.vmap(lambda _: arch.full(space))(jnp.arange(100))
    still = jax.vmap(lambda k, a: arch.mutate(k, space, a, 0.0))(keys, population)
    chex.assert_trees_all_equal(still, population)
    mutants = jax.vmap(lambda k, a: arch.mutate(k, space, a, 1.0))(keys, population)
    assert not bool(jnp.any(mutants.depth == space.num_layers))
    assert not bool(jnp.any(mutants.heads[:, 0] == space.num_heads))
    assert set(np.ravel(mutants.depth)) == set(space.depth_choices[:-1])


def test_canonical_hides_genes_of_dropped_blocks():
    genome = arch.Arch(jnp.int32(3), jnp.full((6,), 2), jnp.full((6,), 16))
    changed = genome._replace(heads=genome.heads.at[1].set(3))
    chex.assert_trees_all_equal(arch.canonical(SPACE, genome), arch.canonical(SPACE, changed))
    np.testing.assert_array_equal(arch.canonical(SPACE, genome).heads, [2, 4, 2, 4, 2, 4])
    kept = genome._replace(heads=genome.heads.at[2].set(3))
    assert not jnp.array_equal(
        arch.canonical(SPACE, genome).heads, arch.canonical(SPACE, kept).heads
    )


def test_repeated_choices_in_small_networks_mutate_to_other_networks():
    space = arch.ArchSpace.from_fractions(2, 2, 8, per_layer=False)
    keys = jax.random.split(jax.random.key(0), 64)
    mutants = jax.vmap(lambda k: arch.mutate(k, space, arch.full(space), 1.0))(keys)
    assert set(np.ravel(mutants.depth)) == {1}
    assert set(np.ravel(mutants.neurons)) == {2, 4, 6}


def test_one_trace():
    chex.clear_trace_counter()
    mask = jax.jit(chex.assert_max_traces(lambda a: arch.to_mask(SPACE, a), n=1))
    for row in range(3):
        mask(jax.tree.map(lambda leaf, i=row: leaf[i], arch.grid(SPACE)))
