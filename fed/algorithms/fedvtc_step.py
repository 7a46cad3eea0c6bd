"""What a client of FedVTC does on one batch: losses on own and synthetic samples, its generator.

See `fed.algorithms.fedvtc` for the method and its source (arXiv 2508.01669).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fed import class_statistics
from fed.class_statistics import ClassStatistics, Kind
from fed.clients import Batch
from fed.latent_generator import (
    Generator,
    Prior,
    Terms,
    Variational,
    gaussian_kl,
    variational_terms,
)


class Model(NamedTuple):
    """A client's model in two parts that read the same parameters; any structure."""

    extract: Callable[[Any, jax.Array], jax.Array]
    """(params, inputs [B, ...]) -> features [B, D]."""

    classify: Callable[[Any, jax.Array], jax.Array]
    """(params, features [B, D]) -> logits [B, Y]."""


def feature_model(classify: Callable[[Any, jax.Array], jax.Array]) -> Model:
    """A header on inputs that are features already; `classify` as in `Model`."""
    return Model(lambda params, inputs: inputs, classify)


@dataclasses.dataclass(frozen=True)
class VtcConfig:
    """Static settings.

    Raises:
      ValueError: numbers that are not positive where they must be.
    """

    num_classes: int  # Y
    num_features: int  # D
    num_synthetic: int = 32
    """Synthetic samples in a step; their labels are spread evenly over the classes."""

    synthetic_classes: Literal["all", "absent"] = "all"
    """`"absent"`: only classes of which the client has no samples of its own."""

    first_synthetic_round: int = 1
    """Statistics of all clients are known from round 1 on."""

    synthetic_weight: float = 1.0
    """Of the cross-entropy on synthetic samples; that on local samples has weight 1."""

    variance: Kind = "shared"
    variance_floor: float = 1e-2  # in squared units of the features
    prototype_weight: float = 0.0
    """Of the KL term in the model's own loss, which draws its features to the shared means
    (third-party code: 0.1). Without effect on models whose extractor has no parameters."""

    warmup_rounds: int = 10  # over which the prototype weight grows from 0
    matching_weight: float = 1.0
    share_generator: bool = False
    """True: generators travel and are averaged, as reviews of the paper say; its abstract says
    that only statistics travel."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_features", "num_synthetic", "warmup_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.variance_floor <= 0:
            raise ValueError(f"variance_floor must be positive, got {self.variance_floor}")
        if self.synthetic_classes not in ("all", "absent"):
            raise ValueError(
                f"unknown synthetic_classes {self.synthetic_classes!r}; expected 'all' or 'absent'"
            )


def prior_of(statistics: ClassStatistics, config: VtcConfig) -> Prior:
    """The shared Gaussians [Y, D]; variances are floored."""
    variance = class_statistics.class_variances(statistics, config.variance_floor)
    return Prior(statistics.mean, variance, statistics.size > 0)


def synthetic_labels(key: jax.Array, num_samples: int, num_classes: int) -> jax.Array:
    """int32 [num_samples], as even over the classes as the number allows; the key is consumed.

    The class with which they start is random, so that all are met if there are fewer samples.
    """
    start = jax.random.randint(key, (), 0, num_classes)
    return (start + jnp.arange(num_samples, dtype=jnp.int32)) % num_classes


def synthetic_batch(
    key: jax.Array,
    prior: Prior,
    deviation: jax.Array,
    wanted: jax.Array,
    config: VtcConfig,
    decode: Callable[[jax.Array], jax.Array],
) -> Batch:
    """Decoded draws of the classes' Gaussians.

    Args:
      key: consumed.
      prior: of all classes.
      deviation: from `fed.class_statistics.deviations`.
      wanted: bool [Y]; samples of other classes get weight 0.
      config: static.
      decode: latents [B, D] -> inputs [B, ...].
    """
    label_key, draw_key = jax.random.split(key)
    labels = synthetic_labels(label_key, config.num_synthetic, config.num_classes)
    latents = class_statistics.sample(draw_key, prior.mean, deviation, labels)
    return Batch(decode(latents), labels, (wanted & prior.known)[labels].astype(jnp.float32))


def model_step(
    params: Any,
    optimizer_state: Any,
    batch: Batch,
    synthetic: Batch,
    prior: Prior,
    prototype_weight: jax.Array | float,
    *,
    model: Model,
    optimizer: optax.GradientTransformation,
    config: VtcConfig,
) -> tuple[Any, Any, jax.Array, dict[str, jax.Array]]:
    """One step on local and synthetic samples, features drawn to their class's shared mean.

    `CE(local) + synthetic_weight CE(synthetic) + prototype_weight KL(N(z, s^2) || N(c, s^2))`.

    Returns:
      The new parameters and optimiser state, the local features [B, D] before the step, metrics.
    """

    def cross_entropy(params: Any, features: jax.Array, batch: Batch) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model.classify(params, features), batch.labels
        )
        return _mean(losses, batch.weight)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        features = model.extract(params, batch.inputs)
        local = cross_entropy(params, features, batch)
        made = cross_entropy(params, model.extract(params, synthetic.inputs), synthetic)
        total = local + config.synthetic_weight * made
        if config.prototype_weight > 0:
            mean, variance = prior.mean[batch.labels], prior.variance[batch.labels]
            distance = gaussian_kl(features, variance, mean, variance)
            known = batch.weight * prior.known[batch.labels]
            total += prototype_weight * _mean(distance, known)
        return total, (features, {"loss": local, "synthetic_loss": made})

    gradients, (features, metrics) = jax.grad(loss, has_aux=True)(params)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, features, metrics


def generator_step(
    key: jax.Array,
    params: Variational,
    optimizer_state: Any,
    batch: Batch,
    prior: Prior,
    extract: Callable[[jax.Array], jax.Array],
    *,
    generator: Generator,
    optimizer: optax.GradientTransformation,
    config: VtcConfig,
) -> tuple[Variational, Any, Terms]:
    """One step of the generator with the extractor held fixed; none before anything is known."""

    def loss(params: Variational) -> tuple[jax.Array, Terms]:
        terms = variational_terms(
            params,
            generator.apply,
            extract,
            batch.inputs,
            batch.labels,
            batch.weight,
            prior,
            key,
            num_matching=config.num_synthetic,
        )
        return terms.reconstruction + terms.kl + config.matching_weight * terms.matching, terms

    gradients, terms = jax.grad(loss, has_aux=True)(params)
    updates, new_state = optimizer.update(gradients, optimizer_state, params)
    known = prior.known.any()
    after, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(known, new, old),
        (optax.apply_updates(params, updates), new_state),
        (params, optimizer_state),
    )
    return after, optimizer_state, terms


def _mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Over the samples of a batch, 0 if none counts."""
    return (weight * values).sum() / jnp.maximum(weight.sum(), 1e-6)
