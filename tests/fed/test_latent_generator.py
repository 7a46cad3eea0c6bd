"""Generators and their variational loss: against NumPy, Monte Carlo and plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fed import class_statistics, clients, latent_generator
from fed.algorithms import fedvtc_step
from fed.algorithms.fedvtc import VtcConfig, start_generator
from fed.latent_generator import Prior, Variational


def test_kl_is_zero_for_equal_gaussians_and_equals_a_monte_carlo_estimate():
    rng = np.random.default_rng(1)
    mean, other = rng.normal(size=(2, 4))
    variance, other_variance = rng.uniform(0.3, 2, size=(2, 4))
    arguments = [jnp.asarray(x, jnp.float32) for x in (mean, variance, other, other_variance)]
    found = latent_generator.gaussian_kl(*arguments)
    np.testing.assert_allclose(
        latent_generator.gaussian_kl(*arguments[:2], *arguments[:2]), 0, atol=1e-6
    )
    draws = mean + np.sqrt(variance) * rng.normal(size=(100_000, 4))
    log_density = [
        -0.5 * (np.log(v) + (draws - m) ** 2 / v).sum(1)
        for m, v in ((mean, variance), (other, other_variance))
    ]
    gap = log_density[0] - log_density[1]
    assert abs(found - gap.mean()) < 4 * gap.std() / 100_000**0.5 < 0.05


def test_transposed_convolution_equals_plain_loops_and_has_no_convolution():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 3, 5, 4))
    kernels = rng.normal(size=(3, 4, 4, 4, 2))

    def loops(x, kernel):
        batch, height, width, _ = x.shape
        padded = np.zeros((batch, 2 * height + 2, 2 * width + 2, kernel.shape[-1]))
        for i in range(height):
            for j in range(width):
                for a in range(4):
                    for b in range(4):
                        padded[:, 2 * i + a, 2 * j + b] += x[:, i, j] @ kernel[:, a, b]
        return padded[:, 1:-1, 1:-1]

    call = jax.vmap(latent_generator.transposed_convolution, (None, 0))
    found = call(jnp.asarray(x, jnp.float32), jnp.asarray(kernels, jnp.float32))
    assert found.shape == (3, 2, 6, 10, 2)
    np.testing.assert_allclose(found, [loops(x, kernel) for kernel in kernels], atol=1e-5)
    assert "conv" not in str(jax.make_jaxpr(call)(x, kernels))


def test_generators_shapes():
    images = latent_generator.image_generator(6, (8, 12, 3), channels=(16, 8))
    params = jax.jit(images.init)(jax.random.key(0))
    latents = jax.random.normal(jax.random.key(1), (5, 6))
    made = jax.jit(images.apply)(params, latents)
    assert made.shape == (5, 8, 12, 3)
    size = np.abs(np.asarray(made))
    assert size.mean() > 0.05 and size.max() < 1
    features = latent_generator.dense_generator(6, hidden=4)
    untrained = jax.jit(lambda key: features.apply(features.init(key), latents))(jax.random.key(2))
    np.testing.assert_array_equal(untrained, latents)
    with pytest.raises(ValueError, match="multiples of 4"):
        latent_generator.image_generator(6, (10, 8, 3))
    with pytest.raises(ValueError, match="multiples of 8"):
        latent_generator.image_generator(6, (8, 8, 3), channels=(12, 8))


def test_variational_terms_equal_a_numpy_reference():
    """A linear decoder and extractor; a filler and a class that nobody knows do not count."""
    rng = np.random.default_rng(3)
    decode, extract = rng.normal(size=(3, 4)), rng.normal(size=(4, 3))
    inputs, labels = rng.normal(size=(4, 4)), np.asarray([0, 1, 0, 2])
    inputs[2] = np.nan
    weight = np.asarray([1.0, 1.0, 0.0, 1.0])
    mean, variance = rng.normal(size=(3, 3)), rng.uniform(0.5, 1, (3, 3))
    log_ratio = np.asarray([0.1, -0.4, 0.2])
    key = jax.random.key(4)
    as_float32 = functools.partial(jnp.asarray, dtype=jnp.float32)

    @jax.jit
    def terms(params, extract, *arguments):
        return latent_generator.variational_terms(
            params,
            lambda params, latents: latents @ params,
            lambda inputs: inputs @ extract,
            *arguments,
            num_matching=6,
        )

    found = terms(
        Variational(as_float32(decode), as_float32(log_ratio)),
        as_float32(extract),
        as_float32(inputs),
        jnp.asarray(labels),
        as_float32(weight),
        Prior(as_float32(mean), as_float32(variance), jnp.asarray([True, True, False])),
        key,
    )
    noise_key, class_key, draw_key = jax.random.split(key, 3)
    label = int(jax.random.categorical(class_key, jnp.asarray([0.0, 0.0, -jnp.inf])))
    assert label < 2
    noise = np.asarray(jax.random.normal(noise_key, (4, 3)))
    reconstruction, divergence = [], []
    for row in (0, 1):
        z, s2, c = inputs[row] @ extract, variance[labels[row]], mean[labels[row]]
        own = s2 * np.exp(log_ratio) ** 2
        decoded = (z + np.sqrt(own) * noise[row]) @ decode
        reconstruction.append(((decoded - inputs[row]) ** 2).sum())
        divergence.append(0.5 * (np.log(s2 / own) + (own + (z - c) ** 2) / s2 - 1).sum())
    draws = np.asarray(jax.random.normal(draw_key, (6, 3)))
    v = mean[label] + np.sqrt(variance[label]) * draws
    matching = (((v @ decode @ extract).mean(0) - mean[label]) ** 2).sum()
    expected = [np.mean(reconstruction), np.mean(divergence), matching]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_generator_of_images_learns_to_reconstruct():
    """Four clients mapped over their own kernels; the extractor is a fixed projection."""
    generator = latent_generator.image_generator(4, (8, 8, 1), channels=(8, 8))
    rng = np.random.default_rng(4)
    labels = np.arange(16) % 2
    stripes = np.where((np.arange(8)[:, None] + np.zeros(8) + 2) % 4 < 2, 0.8, -0.8)
    patterns = np.stack([stripes, stripes.T])[..., None]
    images = jnp.asarray(
        np.clip(patterns[labels] + 0.05 * rng.normal(size=(4, 16, 8, 8, 1)), -1, 1), jnp.float32
    )
    projection = jnp.asarray(rng.normal(size=(64, 4)) / 8, jnp.float32)
    features = images[0].reshape(16, -1) @ projection
    statistics = class_statistics.from_samples(
        features, jnp.asarray(labels), jnp.ones(16), num_classes=2, kind="shared"
    )
    config = VtcConfig(num_classes=2, num_features=4, num_synthetic=8)
    prior = fedvtc_step.prior_of(statistics, config)
    optimizer = optax.adam(1e-2, 0.5)

    def train(key, images):
        params = start_generator(key, generator, config)
        batch = clients.Batch(images, jnp.asarray(labels), jnp.ones(16))

        def step(carry, key):
            params, state, terms = fedvtc_step.generator_step(
                key,
                *carry,
                batch,
                prior,
                lambda inputs: inputs.reshape(inputs.shape[0], -1) @ projection,
                generator=generator,
                optimizer=optimizer,
                config=config,
            )
            return (params, state), terms

        _, terms = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 60))
        return terms

    terms = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 4), images)
    assert (terms.reconstruction[:, 0] > 30).all()  # 64 pixels of 0.64 and more
    assert (terms.reconstruction[:, -1] < 4).all(), terms.reconstruction[:, -1]
    assert (terms.matching[:, -10:].mean(1) < terms.matching[:, :10].mean(1)).all()
