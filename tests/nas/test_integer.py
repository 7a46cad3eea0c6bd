"""Integer spaces: bounds kept, genes changed, per-leaf operators, bad input refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import genomes, integer, nsga2

MIXED = {
    "depth": integer.Genes((1,), (12,)),
    "kernel": integer.genes(4, 3, kind="categorical"),
    "width": integer.Genes((-5, 0, 7, 3), (5, 0, 300, 4)),
}
OPERATORS = integer.integer_operators(MIXED)
NUM = 64


@jax.jit
def _breed(key, first, second):
    """One of everything that makes genomes."""
    keys = jax.random.split(key, 5)
    rate = jnp.float32(0.4)
    pair_keys = jax.random.split(keys[0], NUM)
    return (
        OPERATORS.vary(keys[1], first, second, jnp.arange(NUM) % 3 > 0, rate),
        OPERATORS.change(keys[2], first),
        jax.vmap(OPERATORS.crossover)(pair_keys, first, second),
        jax.vmap(lambda k, genome: OPERATORS.mutate(k, genome, rate))(pair_keys, first),
        OPERATORS.sample(keys[3], NUM),
    )


def _flat(population):
    return np.concatenate([np.asarray(leaf) for leaf in jax.tree.leaves(population)], axis=1)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31 - 1))
def test_every_operator_stays_in_the_space(seed):
    first, second = (OPERATORS.sample(jax.random.key(seed + i), NUM) for i in range(2))
    for population in _breed(jax.random.key(seed), first, second):
        integer.check(MIXED, population)
        assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(population))


@settings(deadline=None, max_examples=20)
@given(st.integers(-(2**20), 2**20))
def test_genes_out_of_range_are_brought_back_by_ordinal_operators(value):
    wrong = jax.tree.map(lambda leaf: jnp.full((NUM, leaf.num_genes), value, jnp.int32), MIXED)
    children, *_ = _breed(jax.random.key(0), wrong, OPERATORS.sample(jax.random.key(1), NUM))
    crossed = np.asarray(children["depth"])[np.arange(NUM) % 3 > 0]
    fixed = crossed != value
    assert np.all((crossed[fixed] >= 1) & (crossed[fixed] <= 12))


def test_change_alters_exactly_one_gene_that_has_a_choice():
    population = OPERATORS.sample(jax.random.key(0), 4000)
    changed = _flat(population) != _flat(OPERATORS.change(jax.random.key(1), population))
    np.testing.assert_array_equal(changed.sum(axis=1), 1)
    shares = changed.mean(axis=0)  # eight genes have a choice, one of the last leaf has not
    np.testing.assert_allclose(shares, [1 / 8] * 5 + [1 / 8, 0, 1 / 8, 1 / 8], atol=0.03)


def test_samples_are_uniform_and_mutation_keeps_its_rate():
    population = OPERATORS.sample(jax.random.key(0), 6000)
    counts = np.bincount(np.asarray(population["depth"])[:, 0], minlength=13)[1:]
    np.testing.assert_allclose(counts / 6000, np.full(12, 1 / 12), atol=0.02)
    for rate in (0.0, 0.1, 1.0):
        mutated = jax.vmap(lambda k, g, rate=rate: OPERATORS.mutate(k, g, rate))(
            jax.random.split(jax.random.key(1), 6000), population
        )
        changed = (_flat(population) != _flat(mutated)).mean(axis=0)
        np.testing.assert_allclose(changed, np.array([1] * 6 + [0, 1, 1]) * rate, atol=0.03)


def test_categorical_mutation_reaches_every_other_value_alike_and_ordinal_prefers_near_ones():
    names = integer.integer_operators(integer.genes(1, 5, kind="categorical"))
    numbers = integer.integer_operators(integer.genes(1, 101))
    keys = jax.random.split(jax.random.key(0), 8000)
    moved = jax.vmap(lambda k: names.mutate(k, jnp.array([2]), 1.0))(keys)
    shares = np.bincount(np.asarray(moved)[:, 0], minlength=5) / 8000
    np.testing.assert_allclose(shares, [0.25, 0.25, 0, 0.25, 0.25], atol=0.03)
    step = np.asarray(jax.vmap(lambda k: numbers.mutate(k, jnp.array([50]), 1.0))(keys))[:, 0] - 50
    assert abs((step > 0).mean() - 0.5) < 0.03
    # Deb and Goyal: |step| / span = 1 - t^(1 / (eta + 1)), of which the median has t = 1/2.
    assert np.median(np.abs(step)) == pytest.approx(100 * (1 - 0.5 ** (1 / 11)), abs=1)


def test_children_of_a_pair_share_out_the_genes_of_their_parents():
    space = integer.genes(30, 101)
    operators = integer.integer_operators(space)
    half = operators.sample(jax.random.key(0), 20), operators.sample(jax.random.key(1), 20)
    first, second = jnp.concatenate(half), jnp.concatenate(half[::-1])
    children = np.asarray(operators.vary(jax.random.key(2), first, second, jnp.ones(40, bool), 0.0))
    spread = np.asarray(children[:20] + children[20:]) - np.asarray(first[:20] + second[:20])
    inside = np.all((children[:20] > 0) & (children[:20] < 100), axis=1)
    assert np.abs(spread[inside]).max(initial=0) <= 1  # means are kept, but for rounding
    assert np.abs(spread).mean() < 0.5
    untouched = operators.vary(jax.random.key(2), first, second, jnp.zeros(40, bool), 0.0)
    np.testing.assert_array_equal(untouched, first)
    own_share = (children == np.asarray(first)).mean()
    assert 0.5 < own_share < 0.8  # half is not crossed at all, and half of the rest comes near


def test_equal_parents_have_equal_children():
    parents = OPERATORS.sample(jax.random.key(0), NUM)
    children = OPERATORS.vary(jax.random.key(1), parents, parents, jnp.ones(NUM, bool), 0.0)
    np.testing.assert_array_equal(_flat(children), _flat(parents))


def test_a_leaf_can_bring_its_own_operators():
    def largest(key, first, second):
        del key
        return jnp.maximum(first, second)

    def reverse(key, values, rate):
        return jnp.where(jax.random.uniform(key) < rate, values[::-1], values)

    own = integer.Genes((0,) * 4, (9,) * 4, mutate=reverse, crossover=largest)
    operators = integer.integer_operators((own, integer.genes(2, 3)))
    first, second = (operators.sample(jax.random.key(i), 10) for i in range(2))
    everybody = jnp.ones(10, bool)
    child = operators.vary(jax.random.key(2), first, second, everybody, 0.0)
    np.testing.assert_array_equal(child[0], np.maximum(first[0], second[0]))
    child = operators.vary(jax.random.key(2), first, second, everybody, 1.0)
    np.testing.assert_array_equal(child[0], np.maximum(first[0], second[0])[:, ::-1])
    alone = operators.crossover(jax.random.key(3), *(jax.tree.map(lambda x: x[0], p)
                                                     for p in (first, second)))  # fmt: skip
    np.testing.assert_array_equal(alone[0], np.maximum(first[0][0], second[0][0]))
    turned = operators.mutate(jax.random.key(3), alone, 1.0)
    np.testing.assert_array_equal(turned[0], alone[0][::-1])
    changed = operators.change(jax.random.key(4), first)
    assert np.all((_flat(changed) != _flat(first)).sum(axis=1) <= 1)


def test_a_space_without_a_choice_is_searched_all_the_same():
    operators = integer.integer_operators(integer.genes(3, 1))
    searcher = nsga2.nsga2(operators, population_size=4, archive_capacity=2)
    result = nsga2.search(
        jax.random.key(0), searcher, lambda g: g[:, :2].astype(jnp.float32), num_generations=2
    )
    assert int(result.archive.valid.sum()) == 1
    np.testing.assert_array_equal(result.population, np.zeros((4, 3)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"low": (), "high": ()}, "at least one"),
        ({"low": (0,), "high": (1, 2)}, "as many"),
        ({"low": (0, 3), "high": (1, 2)}, "gene 1"),
        ({"low": (0,), "high": (2**23,)}, "within"),
        ({"low": (0,), "high": (2,), "kind": "cardinal"}, "ordinal, categorical"),
        ({"low": (0,), "high": (2,), "mutation_eta": -1.0}, "negative"),
    ],
)
def test_bad_genes_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        integer.Genes(**kwargs)


@pytest.mark.parametrize("space", [{}, {"a": 3}, [integer.genes(1, 2), "b"]])
def test_bad_spaces_are_refused(space):
    with pytest.raises(ValueError, match="pytree of Genes"):
        integer.integer_operators(space)


@pytest.mark.parametrize(
    ("population", "message"),
    [
        (np.zeros((5, 2), np.int32), r"\[..., 3\]"),
        (np.zeros((5, 3)), "integers"),
        ({"a": np.zeros((5, 3), np.int32)}, "structure"),
        (np.array([[0, 1, 2], [0, 4, 0]], np.int32), r"\(1, 1\) is 4; expected 0 to 3"),
    ],
)
def test_foreign_genomes_are_refused(population, message):
    space = integer.genes(3, 4)
    with pytest.raises(ValueError, match=message):
        integer.check(space, population)
    with pytest.raises(ValueError, match=message):
        nsga2.nsga2(integer.integer_operators(space), population_size=8, initial=population)


def test_retries_leave_no_duplicate_where_the_space_has_room():
    known = OPERATORS.sample(jax.random.key(0), NUM)
    children = genomes.replace_duplicates(
        jax.random.key(1), OPERATORS, known, known, rate=0.1, num_retries=20
    )
    assert not np.any(genomes.duplicates(genomes.concatenate(known, children))[NUM:])
    same = genomes.replace_duplicates(
        jax.random.key(1), OPERATORS, known, known, rate=0.1, num_retries=0
    )
    np.testing.assert_array_equal(_flat(same), _flat(known))
