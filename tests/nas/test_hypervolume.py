"""Hypervolume of any input, against SciPy-free loops and its own laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.hypervolume import hypervolume

NUM = 6
REFERENCE = np.array([3.0, 3.0, 3.0], np.float32)
_volume = jax.jit(hypervolume)
_row = st.lists(st.integers(-1, 5), min_size=3, max_size=3)
_points = st.lists(_row, min_size=NUM, max_size=NUM).map(lambda rows: np.array(rows, np.float32))


def _cells(points):
    """Unit cells below the reference that some point dominates; the points are integers."""
    cells = itertools.product(*(range(-1, int(limit)) for limit in REFERENCE))
    return sum(any(np.all(point <= cell) for point in points) for cell in cells)


@settings(deadline=None, max_examples=40)
@given(_points)
def test_counts_cells_wherever_the_reference_lies(points):
    """Also inside the front, or better than all points."""
    assert float(_volume(points, REFERENCE)) == _cells(points)


@settings(deadline=None, max_examples=40)
@given(_points, st.integers(0, NUM - 1), st.integers(0, 2),
       st.sampled_from([np.nan, np.inf, -np.inf]))  # fmt: skip
def test_rows_that_are_not_finite_add_nothing(points, row, column, value):
    broken = points.copy()
    broken[row, column] = value
    assert float(_volume(broken, REFERENCE)) == _cells(np.delete(points, row, axis=0))


@settings(deadline=None, max_examples=20)
@given(_points, st.permutations(range(NUM)))
def test_order_duplicates_and_worse_points_change_nothing(points, order):
    volume = float(_volume(points, REFERENCE))
    assert float(_volume(points[order], REFERENCE)) == volume
    doubled = points.copy()
    doubled[0] = points[1]
    worse = points.copy()
    worse[0] = points[1] + 1
    assert float(_volume(doubled, REFERENCE)) == float(_volume(worse, REFERENCE)) <= volume


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_no_points_have_no_volume_and_a_bad_reference_shows(num_objectives):
    reference = jnp.ones(num_objectives)
    assert float(hypervolume(jnp.zeros((0, num_objectives)), reference)) == 0
    one = jnp.full((1, num_objectives), 0.5)
    assert float(hypervolume(one, reference)) == 0.5**num_objectives
    assert float(hypervolume(one, 0.5 * reference)) == 0
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert np.isnan(hypervolume(one, reference.at[0].set(bad)))
