"""The devices of one unit of the personalisation experiment, and how alike their data are."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import number_formats
from acme_jax.blocks import Params
from acme_jax.config import Distribution
from acme_jax.experiments import held_out
from acme_jax.experiments.study import Study
from acme_jax.fleet import Device, make_fleet
from acme_jax.idx import DataError
from acme_jax.splits import TrainSplit
from acme_jax.system import compute_features
from fed import similarity
from fed.clients import ClientData

FEWER_STREAM = 7
"""Host random stream of which samples a device keeps where it has fewer."""
ATTEMPTS = 50
_NEXT_SEED = 1000

FORMS = ("js", "flat", "per_dimension", "sliced", "oracle")
"""Distances between devices: Jensen-Shannon; Wasserstein as the original code has it, by
dimension, and sliced, all of the sketches; total variation of the true label histograms."""


class Cohort(NamedTuple):
    """C devices of one edge."""

    fleet: list[Device]
    parts: held_out.Parts  # features of their training samples; 20 % are for choices
    histograms: np.ndarray  # [C, K] labels that each device trains on
    distances: dict[str, np.ndarray]  # by form, [C, C]

    @property
    def fit(self) -> ClientData:
        """What the devices train on."""
        return self.parts.fit


def make_cohort(
    study: Study, backbone: Params, distribution: str, count: int, samples: int | None
) -> Cohort:
    """Draws devices and computes their features and distances.

    Args:
      study: whose device pool.
      backbone: sliced.
      distribution: "iid", "c2", "c3", "c4" or "dirichlet_ALPHA".
      count: C.
      samples: training samples that each device keeps, the 20 % set aside included; None: all.

    Raises:
      ConfigError, DataError: a distribution that these data cannot give.
    """
    fleet = draw_fleet(study, distribution, count)
    if samples is not None:
        fleet = [fewer(device, samples, study.config.seed) for device in fleet]
    ends = np.cumsum([len(device.train) for device in fleet])[:-1]
    inputs = np.concatenate([np.asarray(device.train.inputs) for device in fleet])
    tokens, summaries = (
        np.split(feature, ends) for feature in compute_features(study.context, backbone, inputs)
    )
    parts = held_out.divide(tokens, fleet, study.config.seed)
    parts = parts._replace(
        everything=_longest(study, parts.everything), fit=_longest(study, parts.fit)
    )
    # The same order, so the same samples; the sketch says nothing of those set aside.
    sketched = held_out.divide(summaries, fleet, study.config.seed).fit
    classes = study.context.encoder.num_classes
    histograms = _histograms(parts.fit, classes)
    config = study.config.refine
    compare = _compare(config.num_quantiles)
    distances = compare(sketched.inputs, sketched.size, study.key("personalization sketch"))
    shares = histograms / histograms.sum(axis=1, keepdims=True)
    oracle = 0.5 * np.abs(shares[:, None] - shares[None]).sum(axis=-1)
    return Cohort(
        fleet, parts, histograms, {**jax.tree.map(np.asarray, distances), "oracle": oracle}
    )


def draw_fleet(study: Study, distribution: str, count: int) -> list[Device]:
    """One edge's devices. A draw that leaves a device with one class is drawn again.

    The first draw has the study's seed; the next ones have others, because a Dirichlet
    distribution of 0.1 gives most of a device's samples one label.

    Raises:
      ConfigError, DataError: as `acme_jax.fleet.make_fleet`, of the last of `ATTEMPTS`.
    """
    name, _, alpha = distribution.partition("_")
    base = study.config
    fleet = dataclasses.replace(
        base.fleet,
        num_edges=1,
        devices_per_edge=count,
        distribution=cast(Distribution, name),
        dirichlet_alpha=float(alpha) if alpha else base.fleet.dirichlet_alpha,
    )
    context = study.context
    draw = functools.partial(
        make_fleet,
        context.splits.device_pool,
        num_classes=context.encoder.num_classes,
        full_bytes=context.full_bytes,
    )
    for attempt in range(ATTEMPTS):
        config = dataclasses.replace(base, fleet=fleet, seed=base.seed + _NEXT_SEED * attempt)
        try:
            return draw(config)
        except DataError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def fewer(device: Device, samples: int, seed: int) -> Device:
    """The device with a random part of its training samples; its test samples stay."""
    train = device.train
    rng = np.random.default_rng((seed, FEWER_STREAM, device.id))
    rows = rng.permutation(len(train))[:samples]
    return device._replace(
        train=TrainSplit(train.inputs[rows], train.labels[rows], train.indices[rows])
    )


def listening(cohort: Cohort, source: str, temperature: float | None) -> np.ndarray:
    """How much each device listens to each other one: row-stochastic [C, C].

    Args:
      cohort: of the devices.
      source: "alone", "avg" (by samples), "farthest" (only to the device whose labels are
        most unlike its own, as a control), or one of `FORMS`.
      temperature: tau, for a form.

    Raises:
      ValueError: another source.
    """
    sizes = np.asarray(cohort.fit.size, np.float64)
    count = sizes.size
    if source == "alone":
        return np.eye(count, dtype=np.float32)
    if source == "avg":
        return np.broadcast_to(sizes / sizes.sum(), (count, count)).astype(np.float32)
    if source == "farthest":
        farthest: np.ndarray = np.eye(count, dtype=np.float32)[
            cohort.distances["oracle"].argmax(axis=1)
        ]
        return farthest
    if source not in FORMS or temperature is None:
        raise ValueError(
            f"unknown source {source!r} at temperature {temperature}; expected alone, avg, "
            f"farthest, or with a temperature one of {', '.join(FORMS)}"
        )
    distance = jnp.asarray(cohort.distances[source], jnp.float32)
    return np.asarray(similarity.weights(distance, temperature=temperature))


def _longest(study: Study, data: ClientData) -> ClientData:
    """Padded as if every device had all its samples, so that units share their programs."""
    config = study.config.fleet
    longest = round(config.samples_per_device * (1.0 - config.test_fraction))
    # Every label is divided by itself, so rounding may leave half a sample of each.
    longest += study.context.encoder.num_classes // 2
    return held_out.pad_rows(data, longest + -longest % held_out.ROWS)


def _histograms(data: ClientData, num_classes: int) -> np.ndarray:
    labels, sizes = np.asarray(data.labels), np.asarray(data.size)
    return np.stack(
        [
            np.bincount(row[:size], minlength=num_classes)
            for row, size in zip(labels, sizes, strict=True)
        ]
    )


@functools.lru_cache(maxsize=4)
def _compare(num_quantiles: int):  # type: ignore[no-untyped-def]
    def compare(summaries: Array, sizes: Array, key: Array) -> dict[str, Array]:
        def sketch(rows: Array, size: Array) -> Array:
            quantiles = similarity.quantile_sketch(rows, num_quantiles, size=size)
            return number_formats.sketch_as_read(quantiles, "float16")

        sketches = jax.vmap(sketch)(summaries, sizes)
        wasserstein = functools.partial(similarity.pairwise_wasserstein, sketches, key=key)
        return {
            "js": similarity.pairwise_js(sketches),
            "flat": wasserstein(method="flat"),
            "per_dimension": wasserstein(method="per_dimension"),
            "sliced": wasserstein(method="sliced"),
        }

    return jax.jit(compare)
