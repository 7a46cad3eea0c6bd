"""Label skew and FedDH: known values, closed forms in float64, defects of the published code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.spatial.distance

from fed import aggregate, clients, label_skew, simulate
from fed.algorithms import feddh
from fed.algorithms.fedavg import fedavg
from fed.participation import Participation

skew_degree = jax.jit(label_skew.skew_degree)
pairwise_skew = jax.jit(label_skew.pairwise_skew)
descend = jax.jit(feddh.descend, static_argnames="scaling")

RNG = np.random.default_rng(0)
SIZES = (7, 12, 3, 9, 5)
NUM_CLIENTS, DIMS = len(SIZES), 3
IDS = jnp.asarray([11, 3, 8, 0, 25])
KEY = jax.random.key(4)
PARAMS = {"w": jnp.asarray([0.1, -0.2, 0.3]), "b": jnp.float32(0.05)}
DATA = clients.stack_clients(
    [(RNG.normal(size=(n, DIMS)).astype(np.float32), RNG.integers(0, 3, n)) for n in SIZES]
)
SKEW = jnp.asarray([0.0, 0.3, 0.9, 0.1, 0.5])
SGD = optax.sgd(0.1)


def loss_fn(params, batch, key):
    del key
    errors = batch.inputs @ params["w"] + params["b"] - batch.labels
    loss = (batch.weight * errors**2).sum() / batch.weight.sum()
    return loss, {"loss": loss}


def learned(scale, offset):
    return feddh.SkewWeights(jnp.asarray(scale, jnp.float32), jnp.asarray(offset, jnp.float32))


def closed_form(sizes, skew, own, tree, gradient, epsilon):
    """Step 4 of the specification in float64; rows of [K, P] are the clients' vectors."""
    sizes, skew, scale, offset = (np.asarray(x, np.float64) for x in (sizes, skew, *own))
    quotients = sizes / (scale * skew + offset + epsilon)
    total = quotients.sum()
    mean = quotients @ tree / total
    inner = (tree - mean) @ gradient
    by_offset = -quotients / (scale * skew + offset + epsilon) * inner / total
    return mean, by_offset * skew, by_offset


@pytest.mark.parametrize(("num_labels", "expected"), [(1, 0.7583), (2, 0.6100), (10, 0.0)])
def test_skew_of_few_labels_in_ten(num_labels, expected):
    few = jnp.where(jnp.arange(10) < num_labels, 1 / num_labels, 0.0)
    assert float(label_skew.js_divergence(few, jnp.full(10, 0.1))) == pytest.approx(
        expected, abs=5e-5
    )


def test_skew_equals_scipy_and_disjoint_labels_are_1_apart():
    counts = RNG.integers(0, 50, (6, 8)).astype(np.float32)
    counts[0, :4], counts[1, 4:] = 0, 0
    whole = counts.sum(axis=0) / counts.sum()
    expected = [
        scipy.spatial.distance.jensenshannon(row / row.sum(), whole, base=2) ** 2 for row in counts
    ]
    np.testing.assert_allclose(skew_degree(counts), expected, rtol=1e-5)
    pairs = np.asarray(pairwise_skew(counts))
    for i, j in [(0, 1), (2, 3), (4, 5)]:
        wanted = scipy.spatial.distance.jensenshannon(*counts[[i, j]], base=2) ** 2
        assert pairs[i, j] == pytest.approx(wanted, abs=1e-6)
    assert pairs[0, 1] == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(pairs, pairs.T)
    np.testing.assert_array_equal(np.diag(pairs), 0)


def test_counts_ignore_padding_and_strange_labels():
    labels = np.asarray([[2, 0, 2, 7, -1, 1], [1, 1, 0, 0, 0, 0]], np.int32)
    sizes = np.asarray([5, 2])
    count = functools.partial(label_skew.label_counts, num_labels=3)
    counts = jax.jit(jax.vmap(lambda row, n: count(row, size=n)))(labels, sizes)
    np.testing.assert_array_equal(counts, [[1, 0, 2], [0, 2, 0]])
    with_empty = np.concatenate([counts, np.zeros((1, 3), np.float32)])
    whole = np.asarray([1, 2, 2]) / 5
    expected = [
        scipy.spatial.distance.jensenshannon(row, whole, base=2) ** 2 for row in with_empty[:2]
    ]
    np.testing.assert_allclose(skew_degree(with_empty), [*expected, 0], rtol=1e-5)
    np.testing.assert_array_equal(pairwise_skew(with_empty)[2], [1, 1, 0])


def test_gradients_equal_closed_form_and_vjp_of_the_aggregation():
    """To 1e-6, also where the models differ by little from each other."""
    num = 6
    with jax.enable_x64(True):
        sizes = jnp.asarray(RNG.integers(10, 500, num).astype(float))
        skew = jnp.asarray(RNG.uniform(0, 1, num))
        own = feddh.SkewWeights(*(jnp.asarray(RNG.uniform(0, 2, num)) for _ in range(2)))
        tree = {
            "a": jnp.asarray(RNG.normal(size=(num, 4, 2))),
            "b": jnp.asarray(RNG.normal(size=num)),
        }
        gradient = {"a": jnp.asarray(RNG.normal(size=(4, 2))), "b": jnp.asarray(RNG.normal())}
        flat = np.concatenate([tree["a"].reshape(num, -1), tree["b"][:, None]], axis=1)
        slope = np.append(gradient["a"].reshape(-1), gradient["b"])
        mean, by_scale, by_offset = closed_form(sizes, skew, own, flat, slope, 1e-3)
        found = jax.jit(feddh.weight_gradients)(sizes, skew, own, tree, gradient)
        np.testing.assert_allclose(found.scale, by_scale, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.offset, by_offset, rtol=1e-5, atol=1e-6)
        aggregated, pull_back = jax.vjp(lambda o: feddh.aggregate(sizes, skew, o, tree), own)
        np.testing.assert_allclose(aggregated["a"].reshape(-1), mean[:-1], atol=1e-6)
        (direct,) = pull_back(gradient)
        np.testing.assert_allclose(found.scale, direct.scale, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.offset, direct.offset, rtol=1e-5, atol=1e-6)
    near = jnp.asarray(100 + 1e-3 * RNG.normal(size=(num, 50)), jnp.float32)
    slope = RNG.normal(size=50).astype(np.float32)
    single = learned(*own)
    arguments = np.asarray(sizes, np.float32), np.asarray(skew, np.float32), single
    _, by_scale, _ = closed_form(*arguments, np.asarray(near, np.float64), slope, 1e-3)
    found = feddh.weight_gradients(*arguments, near, slope)
    np.testing.assert_allclose(found.scale, by_scale, rtol=1e-3, atol=1e-4 * np.abs(by_scale).max())


def test_constant_denominators_are_fedavg():
    sizes, skew = jnp.asarray([5.0, 1.0, 14.0]), jnp.asarray([0.2, 0.4, 0.8])
    weights = feddh.aggregation_weights(sizes, skew, learned(0.2 / skew, jnp.full(3, 0.1)))
    np.testing.assert_allclose(weights, sizes / 20, rtol=1e-6)
    importances = {"gates": jnp.asarray(RNG.uniform(size=(3, 7)), jnp.float32)}
    flat = learned(jnp.zeros(3), jnp.ones(3))
    found = feddh.aggregate(sizes, skew, flat, importances)
    expected = aggregate.weighted_mean(sizes, importances)
    np.testing.assert_allclose(found["gates"], expected["gates"], rtol=1e-6)


def test_a_client_without_skew_counts_but_is_finite():
    """With lambda = 1 and b = 0 the code divides by zero."""
    sizes = jnp.asarray([10.0, 10.0, 0.0])
    weights = feddh.aggregation_weights(
        sizes, jnp.asarray([0.0, 0.4, 0.0]), feddh.initial_weights(3)
    )
    np.testing.assert_allclose(weights, [0.401 / 0.402, 0.001 / 0.402, 0], rtol=1e-5)


def test_descent_scales_reflects_and_leaves_the_unheard_alone():
    own = learned([1.0, 0.02, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0])
    gradients = learned([-2.0, 6.0, 2.0, 100.0], [-1.0, -1.0, -1.0, 5.0])
    heard = jnp.asarray([True, True, True, False])
    rates = learned(0.1, 0.2)
    found = descend(own, gradients, heard, rates)
    np.testing.assert_allclose(found.scale, [1.0, 0.08, 0.45, 3.0], rtol=1e-5)
    np.testing.assert_array_equal(found.offset, 0)  # equal gradients: no step
    found = descend(own, gradients, heard, rates, scaling="signed")
    np.testing.assert_allclose(found.scale, [1 + 0.1 / 3, 0.08, 0.5 - 0.1 / 3, 3], rtol=1e-5)
    np.testing.assert_allclose(found.offset, [0.2, 0.2, 0.2, 0.0], rtol=1e-5)
    nobody = jnp.zeros(4, bool)
    for scaling in ("min_max", "signed"):
        still = descend(own, gradients, nobody, rates, scaling=scaling)
        jax.tree.map(np.testing.assert_array_equal, still, own)


def test_signed_steps_lower_the_loss():
    """Two clients pull to 0, the third to 1, where the loss has its minimum: it must gain."""
    sizes, skew = jnp.full(3, 10.0), jnp.asarray([0.5, 0.5, 0.5])
    tree, own = jnp.asarray([[0.0], [0.0], [1.0]]), learned(jnp.ones(3), jnp.zeros(3))

    @jax.jit
    def step(own):
        mean = feddh.aggregate(sizes, skew, own, tree)
        gradients = feddh.weight_gradients(sizes, skew, own, tree, mean - 1)
        rates = learned(0.03, 0.0)  # b starts at 0, where steps down are reflected
        return feddh.descend(own, gradients, skew > 0, rates, scaling="signed"), mean[0]

    means = []
    for _ in range(20):
        own, mean = step(own)
        means.append(float(mean))
    assert means[0] == pytest.approx(1 / 3) and means[-1] > 0.42
    assert np.all(np.diff(means) > 0)


def reference_round(params, own, rows, rate, epsilon=1e-3):
    """One round of full-batch steps in float64, clients by their number."""
    vectors, steps, start = [], 2, np.append(params["w"], params["b"]).astype(np.float64)
    for row in rows:
        size = SIZES[row]
        x = np.c_[np.asarray(DATA.inputs[row, :size], np.float64), np.ones(size)]
        y, vector = np.asarray(DATA.labels[row, :size], np.float64), start.copy()
        for _ in range(steps):
            vector -= 0.1 * 2 * x.T @ (x @ vector - y) / size
        vectors.append(vector)
    vectors, sizes = np.asarray(vectors), np.asarray(SIZES, np.float64)[rows]
    gradient = (sizes / sizes.sum()) @ (start - vectors) / (0.1 * steps)
    mine = own[0][rows], own[1][rows]
    mean, *slopes = closed_form(sizes, np.asarray(SKEW)[rows], mine, vectors, gradient, epsilon)
    new = [own[0].copy(), own[1].copy()]
    for part, slope in zip(new, slopes, strict=True):
        scaled = (slope - slope.min()) / (slope.max() - slope.min())
        part[rows] = np.abs(part[rows] - rate * scaled)
    return {"w": mean[:-1], "b": mean[-1]}, new


def test_rounds_of_sampled_clients_equal_plain_loops_in_one_trace():
    """d, lambda and b belong to a client, not to its place among the sampled."""
    algorithm = feddh.feddh(loss_fn, SGD, scale_rate=0.3, offset_rate=0.3, decay=0.9)
    traces = []

    @jax.jit
    def run(state, first_round):
        traces.append(None)
        return simulate.run_rounds(
            algorithm,
            state,
            (),
            DATA,
            KEY,
            num_rounds=3,
            first_round=first_round,
            client_ids=IDS,
            batch_size=16,
            num_steps=2,
            participation=Participation(num_sampled=3),
        )

    state = algorithm.server_init(PARAMS, SKEW)
    own = [np.ones(NUM_CLIENTS), np.zeros(NUM_CLIENTS)]
    params = jax.tree.map(np.asarray, PARAMS)
    for first_round in (0, 3):
        state, _, metrics = run(state, first_round)
        for index in range(3):
            rows = np.asarray(metrics.roles.rows[index])
            params, own = reference_round(params, own, rows, 0.3 * 0.9 ** (first_round + index))
        np.testing.assert_allclose(state.params["w"], params["w"], atol=2e-5)
        np.testing.assert_allclose(state.params["b"], params["b"], atol=2e-5)
        np.testing.assert_allclose(state.learned.scale, own[0], atol=1e-3)
        np.testing.assert_allclose(state.learned.offset, own[1], atol=1e-3)
    assert len(traces) == 1 and int(state.num_updates) == 6
    assert np.all(np.asarray(metrics.server["effective_clients"]) <= 3 + 1e-5)
    assert len({tuple(rows) for rows in np.asarray(metrics.roles.rows)}) > 1


def test_equal_skew_without_learning_is_fedavg_also_when_clients_are_late():
    participation = Participation(
        num_sampled=4, dropout=0.2, deadline_s=5.0, late="next_round", jitter=0.2
    )
    results = []
    for algorithm, initial in (
        (fedavg(loss_fn, SGD), (PARAMS,)),
        (
            feddh.feddh(loss_fn, SGD, scale_rate=0, offset_rate=0),
            (PARAMS, jnp.full(NUM_CLIENTS, 0.4)),
        ),
    ):
        server = simulate.with_late(algorithm, algorithm.server_init(*initial), (), 4)
        run = jax.jit(
            functools.partial(
                simulate.run_rounds,
                algorithm,
                num_rounds=8,
                batch_size=4,
                epochs=1,
                participation=participation,
            )
        )
        server, _, metrics = run(
            server, (), DATA, KEY, client_ids=IDS, seconds=jnp.asarray([1.0, 9.0, 2.0, 4.9, 8.0])
        )
        results.append((server.state if len(results) == 0 else server.state.params, metrics.counts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)
    assert int(results[0][1].late.sum()) > 0


def test_late_and_new_update_of_one_client_add_up():
    algorithm = feddh.feddh(loss_fn, SGD, scale_rate=0.1, offset_rate=0.1, scaling="signed")
    state = algorithm.server_init({"w": jnp.zeros(2)}, jnp.asarray([0.2, 0.5, 0.7]))
    models = jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)
    updates = feddh.Update({"w": models}, jnp.full(4, 2.0))
    weights, rows = jnp.asarray([3.0, 4.0, 3.0, 0.0]), jnp.asarray([1, 0, 1, 2])
    new, _ = jax.jit(algorithm.server_update)(state, updates, weights, rows)
    gradient = -np.asarray(weights) @ np.asarray(models, np.float64) / (10 * 2)
    own = np.ones(4), np.zeros(4)
    mean, by_scale, _ = closed_form(
        weights, state.skew[rows], own, np.asarray(models, np.float64), gradient, 1e-3
    )
    np.testing.assert_allclose(new.params["w"], mean, atol=1e-6)
    sums = np.asarray([by_scale[1], by_scale[0] + by_scale[2]])
    expected = 1 - 0.1 * sums / np.abs(sums).max()
    np.testing.assert_allclose(new.learned.scale, [*expected, 1.0], atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="unknown scaling"):
        feddh.feddh(loss_fn, SGD, scaling="sign")
    with pytest.raises(ValueError, match="epsilon"):
        feddh.feddh(loss_fn, SGD, epsilon=0.0)
    with pytest.raises(ValueError, match="unknown scaling"):
        own = feddh.initial_weights(2)
        feddh.descend(own, own, jnp.ones(2, bool), own, scaling="")
    with pytest.raises(ValueError, match=r"\[N\]"):
        label_skew.label_counts(jnp.zeros((2, 3), jnp.int32), 3)
