"""What a device knows of its own classes before it trains: the log prior of its labels.

A header that the edge trains on balanced public data gives every class the same chance; a device
that sees four of ten classes can do better at once. By Bayes' rule the logits of a classifier
change by the logarithm of each class's share over 1 / K when the shares do, which is added to the
classifier's bias. Nothing travels. It helps where a device will meet the classes that it trains on,
and hurts where it will meet others. Not in the paper; docs/RESULTS.md section 5 measures it.
(FedRS, Li and Zhan, KDD 2021, scales the logits of absent classes instead.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from acme_jax.blocks import Params
from fed.clients import ClientData
from fed.label_skew import label_counts


def log_prior(counts: Array, pseudo_count: float) -> Array:
    """Logarithm of each class's smoothed share over 1 / K: float32 [..., K].

    Args:
      counts: [..., K] how many training samples of each class a device has.
      pseudo_count: samples added to every class, more than 0; the larger, the weaker the prior.
    """
    smoothed = counts + pseudo_count
    shares = smoothed / smoothed.sum(axis=-1, keepdims=True)
    return jnp.log(shares * counts.shape[-1]).astype(jnp.float32)


def log_priors(data: ClientData, num_classes: int, pseudo_count: float) -> Array:
    """`log_prior` of every device's own labels: float32 [C, K].

    Args:
      data: training data of C devices.
      num_classes: K.
      pseudo_count: see `log_prior`.
    """
    counts = jax.vmap(lambda labels, size: label_counts(labels, num_classes, size))(
        data.labels, data.size
    )
    return log_prior(counts, pseudo_count)


def add_to_classifier(params: Params, prior: Array) -> Params:
    """Parameters of a header whose classifier's bias has the prior added.

    Args:
      params: of any header with a `classifier`; leaves may have leading axes, as `prior` has.
      prior: [..., K].
    """
    classifier: Any = params["classifier"]
    return {**params, "classifier": {**classifier, "bias": classifier["bias"] + prior}}
