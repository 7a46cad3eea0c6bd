"""Task vectors in closed form, their similarity, and the weights of relevance."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fed import gradient_sketch

D_IN, WIDTH, CLASSES = 5, 6, 4
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


INPUTS, RESIDUAL = draw(7, D_IN), draw(7, WIDTH)
LAYER, KERNEL, BIAS, NORM = draw(WIDTH, D_IN), draw(WIDTH, CLASSES), draw(CLASSES), draw(WIDTH)
LABELS = jnp.asarray(RNG.integers(CLASSES, size=7))
WEIGHT = jnp.asarray([1, 1, 1, 0, 1, 1, 0], jnp.float32)


def rms(outputs):
    mean = (outputs**2).mean(axis=-1, keepdims=True)
    return NORM[None] * outputs / jnp.sqrt(mean + 1e-6)


@pytest.mark.parametrize(
    ("between", "plain"),
    [(gradient_sketch.relu, jax.nn.relu), (gradient_sketch.rms_norm(NORM), rms)],
    ids=["relu", "rms_norm"],
)
@pytest.mark.parametrize("rows", [WIDTH, 2])
def test_closed_form_is_the_gradient(between, plain, rows):
    def loss(layer):
        logits = plain(RESIDUAL + INPUTS @ layer.T) @ KERNEL + BIAS[None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return (losses * WEIGHT).sum() / WEIGHT.sum()

    @jax.jit
    def both():
        outputs = RESIDUAL + INPUTS @ LAYER.T
        found = gradient_sketch.task_vector(
            INPUTS, outputs, KERNEL, BIAS, LABELS, WEIGHT, between=between, rows=rows
        )
        return found, jax.grad(loss)(LAYER)

    found, expected = both()
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected[:rows], atol=1e-6)


def test_forty_percent_of_the_rows_travel():
    assert [gradient_sketch.num_rows(n, 0.4) for n in (100, 32, 8, 1)] == [40, 12, 3, 1]


def test_smoothing_over_rounds():
    past, new = jnp.ones((2, 2)), jnp.full((2, 2), 3.0)
    smooth = jax.jit(gradient_sketch.smooth)
    np.testing.assert_array_equal(smooth(past, new, 0, 0.5), new)
    np.testing.assert_array_equal(smooth(past, new, 1, 0.25), np.full((2, 2), 2.5))


def test_similarity_is_the_mean_cosine_of_columns():
    sketches = RNG.normal(size=(3, 4, 5))
    sketches[1, :, 2] = 0  # an input that is always 0 on this client
    found = jax.jit(gradient_sketch.column_similarity)(jnp.asarray(sketches, jnp.float32))
    for i in range(3):
        for j in range(3):
            cosines = []
            for x, y in zip(sketches[i].T, sketches[j].T, strict=True):
                norms = np.linalg.norm(x) * np.linalg.norm(y)
                cosines.append(x @ y / norms if norms else 0)
            assert found[i, j] == pytest.approx(np.mean(cosines), abs=1e-6)


def test_clients_of_one_task_are_more_alike_than_of_two():
    """Of the same inputs, so that distances of features would see no difference."""
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.normal(size=(4, 500, D_IN)), jnp.float32)
    teachers = rng.normal(size=(2, D_IN, CLASSES))
    labels = jnp.stack([(inputs[c] @ teachers[c % 2]).argmax(axis=1) for c in range(4)])

    @jax.jit
    def weights():
        def sketch(inputs, labels):
            return gradient_sketch.task_vector(
                inputs,
                inputs @ LAYER.T,
                KERNEL,
                BIAS,
                labels,
                jnp.ones(500),
                between=gradient_sketch.relu,
                rows=4,
            )

        similarity = gradient_sketch.column_similarity(jax.vmap(sketch)(inputs, labels))
        return gradient_sketch.relevance_weights(similarity, jnp.ones(4, bool))

    np.testing.assert_array_equal(np.asarray(weights()).argmax(axis=1), [2, 3, 0, 1])


def test_weights_are_a_softmax_over_the_others():
    similarity = RNG.uniform(-1, 1, size=(4, 4))
    known = np.asarray([True, True, False, True])
    weigh = jax.jit(gradient_sketch.relevance_weights)
    found = weigh(jnp.asarray(similarity, jnp.float32), jnp.asarray(known))
    for i in range(4):
        scores = np.where(known & (np.arange(4) != i), np.exp(similarity[i] / 0.5), 0)
        np.testing.assert_allclose(found[i], scores / scores.sum(), atol=1e-6)
    same = weigh(jnp.full((5, 5), 0.7), jnp.ones(5, bool))
    np.testing.assert_allclose(same, (1 - np.eye(5)) / 4, atol=1e-7)


def test_a_client_without_others_listens_to_itself():
    weigh = gradient_sketch.relevance_weights
    np.testing.assert_array_equal(weigh(jnp.ones((1, 1)), jnp.ones(1, bool)), [[1]])
    first = weigh(jnp.ones((3, 3)), jnp.asarray([False, True, False]))
    np.testing.assert_array_equal(first, [[0, 1, 0], [0, 1, 0], [0, 1, 0]])
