"""Entropies of sequences: known values, plain loops, padding, and the trap of short ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import entropy


def _approximate(sequence, window=2, tolerance=0.2):
    def phi(m):
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(sequence, float), m)
        distance = np.abs(windows[:, None] - windows[None]).max(axis=2)
        return np.mean(np.log(np.mean(distance <= tolerance, axis=1)))

    return abs(phi(window + 1) - phi(window))


def _lempel_ziv(sequence):
    items, total = list(sequence), 0
    for i in range(len(items)):
        past = [tuple(items[a:b]) for a in range(i) for b in range(a + 1, i + 1)]
        run = 0
        while i + run < len(items) and tuple(items[i : i + run + 1]) in past:
            run += 1
        total += run + 1
    return len(items) * np.log(len(items)) / total


@pytest.mark.parametrize(
    ("sequence", "expected", "tolerance"),
    [
        (np.zeros(50, int), 0.0, 1e-7),
        (np.arange(50) % 2, 2.1e-4, 1e-5),
        (np.arange(50), np.log(49 / 48), 1e-6),
    ],
)
def test_known_values(sequence, expected, tolerance):
    assert float(entropy.approximate_entropy(sequence)) == pytest.approx(expected, abs=tolerance)


def test_short_sequences_measure_their_length():
    """The trap: iid symbols come near their limit ln 4 only when the sequence is long."""
    rng = np.random.default_rng(0)
    short = jax.vmap(entropy.approximate_entropy)(rng.integers(0, 4, (50, 50)))
    assert float(jnp.mean(short)) == pytest.approx(0.83, abs=0.02)
    long = entropy.approximate_entropy(rng.integers(0, 4, 2000))
    assert float(long) == pytest.approx(1.376, abs=0.015)
    # Lempel-Ziv tells all distinct from constant where ApEn does not.
    distinct, constant = np.arange(50), np.zeros(50, int)
    assert float(entropy.approximate_entropy(distinct)) < 0.03
    assert float(entropy.lempel_ziv_entropy(distinct)) == pytest.approx(np.log(50), rel=1e-6)
    assert float(entropy.lempel_ziv_entropy(constant)) < 0.3


@pytest.mark.parametrize(("window", "tolerance"), [(1, 0.2), (2, 0.2), (2, 1.0), (3, 0.0)])
def test_approximate_entropy_is_the_plain_loop(window, tolerance):
    sequence = np.random.default_rng(window).integers(0, 3, 30)
    ours = entropy.approximate_entropy(sequence, window=window, tolerance=tolerance)
    np.testing.assert_allclose(ours, _approximate(sequence, window, tolerance), atol=1e-6)


def test_padded_sequences_under_vmap_are_their_beginnings():
    rng = np.random.default_rng(3)
    sequences, lengths = rng.integers(0, 3, (6, 20)), np.array([20, 13, 7, 3, 2, 1])
    apen = jax.vmap(entropy.approximate_entropy)(sequences, lengths)
    lempel = jax.vmap(entropy.lempel_ziv_entropy)(sequences, lengths)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        start = sequence[:length]
        np.testing.assert_allclose(lempel[row], _lempel_ziv(start), rtol=1e-5, atol=1e-7)
        if length >= 3:
            np.testing.assert_allclose(apen[row], _approximate(start), atol=1e-6)
        else:
            assert np.isnan(apen[row])


def test_label_entropy_is_shannons():
    labels = np.array([0, 0, 1, 2, 2, 2, 5, -1])
    share = np.array([2, 1, 3]) / 6
    expected = -np.sum(share * np.log(share))  # 5 and -1 are no labels
    np.testing.assert_allclose(entropy.label_entropy(labels, 4), expected, rtol=1e-6)
    np.testing.assert_allclose(entropy.label_entropy(np.arange(8) % 4, 4), np.log(4), rtol=1e-6)
    assert float(entropy.label_entropy(labels, 4, 2)) == 0.0
    assert np.isnan(entropy.label_entropy(labels, 4, 0))


def test_data_term_in_all_three_readings():
    tokens, value = jnp.array([100.0, 10.0]), jnp.array([0.5, 0.25])
    np.testing.assert_allclose(entropy.data_term(tokens, value, "entropy"), [50, 2.5])
    np.testing.assert_allclose(entropy.data_term(tokens, value, "inverse"), [200, 40])
    normalised = entropy.data_term(tokens, value, "normalised", 4)
    np.testing.assert_allclose(normalised, np.array([50, 2.5]) / np.log(4), rtol=1e-6)


def test_wrong_arguments_are_refused():
    for function in (entropy.approximate_entropy, entropy.lempel_ziv_entropy):
        with pytest.raises(ValueError, match="a sequence has shape"):
            function(np.zeros((2, 3)))
        with pytest.raises(ValueError, match="a sequence has shape"):
            function(np.zeros(0))
    with pytest.raises(ValueError, match="window must be at least 1"):
        entropy.approximate_entropy(np.zeros(3), window=0)
    with pytest.raises(ValueError, match="unknown form"):
        entropy.data_term(1.0, 1.0, "other")
    with pytest.raises(ValueError, match="give num_symbols"):
        entropy.data_term(1.0, 1.0, "normalised")
