"""FedAD: rates, probabilities, sub-models of a small network, and the spectrum of a Hessian."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from fed import clients, hessian_spectrum, simulate, unit_dropout
from fed.algorithms import fedad, fedavg
from fed.participation import Participation

RNG = np.random.default_rng(0)
SIZES = (9, 14, 6, 11)
DATA = clients.stack_clients(
    [(RNG.normal(size=(n, 5)).astype(np.float32), RNG.integers(0, 3, n)) for n in SIZES]
)
IDS, KEY = jnp.arange(4), jax.random.key(3)
PARAMS = {
    "first": jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32) / 2,
    "last": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32) / 2,
}
SCORES = {"hidden": jnp.asarray(RNG.uniform(0, 2, 8), jnp.float32)}
SGD = optax.sgd(0.1)


def loss_fn(params, batch, key, factors):
    del key
    hidden = jnp.tanh(batch.inputs @ params["first"]) * factors["hidden"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["last"], batch.labels)
    loss = (batch.weight * losses).sum() / batch.weight.sum()
    return loss, {"loss": loss}


def test_rates_of_the_specification():
    sizes = jnp.asarray([500, 400, 300, 100])
    rates = unit_dropout.dropout_rates(sizes, jnp.asarray([500, 400, 100]), 0.5)
    np.testing.assert_allclose(rates, [0.667, 0.583, 0.444, 0.05], atol=5e-4)
    np.testing.assert_allclose((sizes * (1 - rates))[:3], 500 / 3, rtol=1e-5)  # equalised
    assert float(unit_dropout.dropout_rates(jnp.zeros(1), sizes, 0.5)[0]) == pytest.approx(0.05)


def test_probabilities_equal_the_formula_and_clip():
    scores = np.asarray([0.1, 0.5, 2.0, 1.0])
    found = unit_dropout.drop_probabilities(jnp.asarray(scores), 0.4)
    expected = 0.4 * 4 * np.exp(-scores) / np.exp(-scores).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert float(found.mean()) == pytest.approx(0.4)
    steep = unit_dropout.drop_probabilities(jnp.asarray([0.0, 20.0, 20.0]), 0.5)
    np.testing.assert_allclose(steep, [1, 0, 0], atol=1e-6)


def test_factors_are_unbiased_and_drop_at_the_given_rates():
    keys = jax.random.split(jax.random.key(1), 4000)
    draw = jax.jit(jax.vmap(lambda key: unit_dropout.draw_factors(key, SCORES, 0.5)))
    factors = np.asarray(draw(keys)["hidden"])
    expected = np.asarray(unit_dropout.drop_probabilities(SCORES["hidden"], 0.5))
    assert expected.max() < 1
    np.testing.assert_allclose((factors == 0).mean(axis=0), expected, atol=0.03)
    np.testing.assert_allclose(factors.mean(axis=0), 1, atol=0.1)
    certain = unit_dropout.draw_factors(KEY, {"a": jnp.asarray([0.0, 30.0])}, 0.9)["a"]
    np.testing.assert_allclose(certain, [0, 1], atol=1e-5)
    assert float(unit_dropout.kept_share({"a": certain, "b": jnp.ones(2)})) == 0.75


def test_probes_scores_and_the_round_to_begin():
    sizes = jnp.asarray([30, 90, 10, 50])
    probe_rows = jax.jit(jax.vmap(unit_dropout.probe_rows, (0, None)))
    chosen = set(map(tuple, np.asarray(probe_rows(jax.random.split(KEY, 12), sizes)).tolist()))
    assert chosen == {(1, 2, 0), (1, 2, 3)}
    assert sorted(probe_rows(KEY[None], jnp.full(4, 7))[0, :2].tolist()) == [0, 3]
    with pytest.raises(ValueError, match="three clients"):
        unit_dropout.probe_rows(KEY, jnp.ones(2))
    maps = np.zeros((2, 3, 4, 4), np.float32)
    maps[:, 0], maps[0, 1], maps[1, 1] = np.eye(4), np.ones((4, 4)), np.diag([1, 2, 3, 0])
    np.testing.assert_array_equal(jax.jit(unit_dropout.feature_map_ranks)(maps), [4, 2, 0])
    mean = unit_dropout.mean_scores(
        {"a": jnp.asarray([[1.0, 0.0], [5.0, 4.0]])}, jnp.asarray([3, 1])
    )
    np.testing.assert_allclose(mean["a"], [2, 1])
    distance = unit_dropout.score_distance(
        {"a": mean["a"], "b": jnp.ones(1)}, {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    )
    assert float(distance) == pytest.approx(np.sqrt(6))
    distances = jnp.asarray([5.0, 3.0, 4.0, 2.0, 1.0, 1.5, 0.5])
    first_minimum = jax.jit(unit_dropout.first_minimum)
    for first, expected in ((0, 1), (2, 4), (5, -1)):
        assert int(first_minimum(distances, first)) == expected
    assert int(unit_dropout.first_minimum(distances[:2], 0)) == -1


def run(algorithm, *initial, **options):
    return jax.jit(
        partial(
            simulate.run_rounds,
            algorithm,
            num_rounds=3,
            client_ids=IDS,
            batch_size=4,
            epochs=1,
            **options,
        )
    )(algorithm.server_init(*initial), (), DATA, KEY)


def test_rates_of_zero_are_fedavg():
    def whole(params, batch, key):
        return loss_fn(params, batch, key, {"hidden": jnp.ones(8)})

    server, _, metrics = run(fedad.fedad(loss_fn, SGD), PARAMS, SCORES, jnp.zeros(4))
    expected, _, _ = run(fedavg.fedavg(whole, SGD), PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), server.params, expected)
    np.testing.assert_array_equal(metrics.server["kept_units"], 1)


def test_dropped_units_come_back_as_they_were_sent():
    algorithm = fedad.fedad(loss_fn, SGD)
    state = algorithm.server_init(PARAMS, SCORES, jnp.asarray([0.6, 0.7, 0.05, 0.5]))
    run_clients = jax.jit(
        partial(simulate.run_clients, algorithm, client_ids=IDS, batch_size=4, epochs=1)
    )
    messages = jax.vmap(lambda row: algorithm.server_message(state, row))(jnp.arange(4))
    _, updates, _ = run_clients(messages, (), DATA, KEY, 0)
    sent, found = (jax.tree.map(np.asarray, tree) for tree in (PARAMS, updates.params))
    same_in = np.all(found["first"] == sent["first"], axis=1)
    same_out = np.all(found["last"] == sent["last"], axis=2)
    np.testing.assert_array_equal(same_in, same_out)  # a unit is dropped with all it has
    np.testing.assert_allclose(1 - same_in.mean(axis=1), updates.kept)
    assert 0 < same_in.sum() < same_in.size
    # The server's mean keeps what no client trained.
    new, metrics = algorithm.server_update(state, updates, jnp.ones(4), jnp.arange(4))
    nobody = same_in.all(axis=0)
    np.testing.assert_allclose(new.params["first"][:, nobody], PARAMS["first"][:, nobody])
    assert float(metrics["kept_units"]) == pytest.approx(float(updates.kept.mean()))


def test_sampled_rounds_learn_and_clients_have_their_own_rates():
    rates = jnp.asarray([0.9, 0.0, 0.0, 0.9])
    server, _, metrics = run(
        fedad.fedad(loss_fn, SGD, temperature=2.0),
        PARAMS,
        SCORES,
        rates,
        participation=Participation(num_sampled=2),
    )
    for rows, kept in zip(
        np.asarray(metrics.roles.rows), np.asarray(metrics.server["kept_units"]), strict=True
    ):
        assert (kept == 1) == bool(np.all(np.asarray(rates)[rows] == 0))
    assert not np.allclose(server.params["last"], PARAMS["last"], atol=1e-3)


def symmetric(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return (basis * eigenvalues) @ basis.T, basis


@partial(jax.jit, static_argnums=2)
def lanczos(matrix, start, num_steps):
    matrix, start = matrix.astype(jnp.float32), start.astype(jnp.float32)
    product = partial(jnp.matmul, matrix, precision="highest")
    return hessian_spectrum.lanczos(product, start, num_steps)


def test_lanczos_with_all_steps_finds_the_spectrum():
    eigenvalues = np.sort(np.random.default_rng(1).normal(size=30)) * 5
    matrix, basis = symmetric(eigenvalues)
    start = np.random.default_rng(2).choice([-1.0, 1.0], 30)
    spectrum = lanczos(matrix, start, 30)
    np.testing.assert_allclose(spectrum.eigenvalues, eigenvalues, atol=1e-3)
    np.testing.assert_allclose(spectrum.weights, (basis.T @ start) ** 2 / 30, atol=1e-3)


def test_lanczos_ends_where_no_direction_is_left():
    """Three distinct eigenvalues: ten steps find them, and nothing else has weight."""
    eigenvalues = np.repeat([-1.0, 2.0, 7.0], 8)
    matrix, basis = symmetric(eigenvalues)
    start = np.ones(24)
    spectrum = lanczos(matrix, start, 10)
    shares = ((basis.T @ start) ** 2 / 24).reshape(3, 8).sum(axis=1)
    for value, share in zip((-1, 2, 7), shares, strict=True):
        near = np.abs(np.asarray(spectrum.eigenvalues) - value) < 1e-3
        assert np.asarray(spectrum.weights)[near].sum() == pytest.approx(share, abs=1e-4)
    assert float(spectrum.weights.sum()) == pytest.approx(1, abs=1e-5)


def test_hessian_of_a_tree_has_its_moments():
    """The quadrature is exact for v'Av and v'A^2 v; a quadratic form's Hessian is its matrix."""
    matrix, _ = symmetric(np.linspace(-2, 9, 12), seed=3)
    matrix = jnp.asarray(matrix, jnp.float32)

    def loss(params):
        flat = jnp.concatenate([params["a"].reshape(-1), params["b"]])
        return 0.5 * flat @ matrix @ flat

    params = {"a": jnp.ones((2, 4)), "b": jnp.zeros(4)}
    measure = partial(hessian_spectrum.hessian_spectrum, KEY, loss, num_steps=4)
    spectrum = jax.jit(measure)(params)
    vector = np.asarray(jax.random.rademacher(KEY, (12,), jnp.float32), np.float64)
    image = np.asarray(matrix, np.float64) @ vector
    for power, expected in ((1, vector @ image / 12), (2, image @ image / 12)):
        found = float((spectrum.weights * spectrum.eigenvalues**power).sum())
        assert found == pytest.approx(expected, rel=1e-4)


def binned_rate(eigenvalues, weights):
    """The published procedure: 10,000 bins, thresholds in steps of 0.1, halved when too coarse."""
    variance = 1e-5 * max(1, eigenvalues.max() - eigenvalues.min())
    grid = np.linspace(eigenvalues.min() - 0.1, eigenvalues.max() + 0.1, 10_000)
    normals = scipy.stats.norm.pdf(grid[:, None], eigenvalues[None], np.sqrt(variance))
    density = normals @ weights
    density /= density.sum()

    def above(threshold):
        return density[grid >= threshold].sum()

    step = 0.1
    while True:
        values, threshold = [above(0)], 0.0
        while values[-1] >= 0.5 * values[0]:
            last = values[-4:]
            if len(last) == 4 and max(last) - min(last) < 0.005:
                return values[-1]
            threshold += step
            values.append(above(threshold))
        step /= 2


@pytest.mark.parametrize(
    "eigenvalues",
    [[-1.0, 0.2, 3.0, 8.0], [-0.5, 0.01, 0.02, 0.3, 2.0], [0.05, 0.06, 0.07, 0.2], [-3.0, -1.0]],
    ids=["wide", "narrow", "below one step", "negative"],
)
def test_base_rate_equals_the_binned_procedure(eigenvalues):
    eigenvalues = np.asarray(eigenvalues)
    weights = np.random.default_rng(4).dirichlet(np.ones(len(eigenvalues)))
    spectrum = hessian_spectrum.Spectrum(
        jnp.asarray(eigenvalues, jnp.float32), jnp.asarray(weights, jnp.float32)
    )
    found = float(base_rate(spectrum))
    assert found == pytest.approx(binned_rate(eigenvalues, weights), abs=2e-3)
    assert 0 <= found <= 1


base_rate = jax.jit(hessian_spectrum.base_rate)


def test_base_rate_of_nothing_ends():
    spectrum = hessian_spectrum.Spectrum(jnp.full(3, jnp.nan), jnp.full(3, 1 / 3))
    assert np.isnan(float(base_rate(spectrum)))
    with pytest.raises(ValueError, match="num_steps"):
        hessian_spectrum.lanczos(lambda v: v, jnp.ones(3), 0)
