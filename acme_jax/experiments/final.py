"""The final evaluation of the experiments: the only module of them that reads test data.

Every function takes what has been chosen and trained already, and returns accuracies only, so
that nothing can be chosen by test data (a test looks for other readers).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import cloud, supernet
from acme_jax.blocks import Params
from acme_jax.encoders import EncoderConfig
from acme_jax.experiments.study import Study
from acme_jax.fleet import Device
from acme_jax.system import compute_features
from fed.clients import ClientData, stack_clients
from nas.arch import Arch

Evaluate = Callable[[ClientData], Array]
"""Accuracies [..., C] of devices on the samples given, e.g. `acme_jax.device.evaluate` with the
devices' states bound."""


def subnetworks(study: Study, params: Params, archs: Sequence[Arch]) -> np.ndarray:
    """Accuracy [P] on the public test split of sub-networks with their own classifier."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *archs)
    context, test = study.context, study.context.splits.test
    measure = _subnetwork_program(context.encoder, context.space, context.mesh, context.eval_batch)
    return np.asarray(
        measure(params, jnp.asarray(test.inputs), jnp.asarray(test.labels), stacked), np.float64
    )


@functools.lru_cache(maxsize=4)
def _subnetwork_program(encoder: EncoderConfig, space, mesh, batch_size):  # type: ignore[no-untyped-def]
    def measure(params: Params, inputs: Array, labels: Array, archs: Arch) -> Array:
        return cloud.accuracy(params, inputs, labels, encoder, space, archs, mesh, batch_size)

    return jax.jit(measure)


def full_network(study: Study, params: Params) -> float:
    """Accuracy on the public test split of the full network."""
    context, test = study.context, study.context.splits.test
    classes = _classes(params, jnp.asarray(test.inputs), context.encoder, context.eval_batch)
    return float(np.mean(np.asarray(classes) == test.labels))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _classes(params: Params, inputs: Array, encoder: EncoderConfig, batch_size: int) -> Array:
    return cloud.in_batches(
        lambda rows: jnp.argmax(supernet.apply(params, rows, encoder).logits, axis=-1),
        batch_size,
        inputs,
    )


def network(study: Study, classify: Callable[[Array], Array]) -> float:
    """Accuracy on the public test split of any network.

    Args:
      study: whose test split.
      classify: inputs [B, ...] -> logits [B, num_classes]; compiled by the caller, and called with
        batches of one shape.
    """
    test = study.context.splits.test
    predicted = predict(classify, test.inputs, study.context.eval_batch)
    return float(np.mean(predicted == test.labels))


def predict(
    classify: Callable[[Array], Array], inputs: np.ndarray | Array, batch_size: int
) -> np.ndarray:
    """Classes [N] of inputs [N, ...], in batches of one shape; `classify` as for `network`."""
    count = len(inputs)
    # The last batch begins again at the first sample.
    rows = (np.arange(count + -count % batch_size) % count).reshape(-1, batch_size)
    logits = [np.asarray(classify(jnp.asarray(inputs[batch]))) for batch in rows]
    found: np.ndarray = np.concatenate(logits).argmax(axis=-1)[:count]
    return found


def header(study: Study, backbone: Params, classify: Callable[[Array], Array]) -> float:
    """Accuracy on the public test split of a header on a frozen backbone.

    Args:
      study: whose test split.
      backbone: sliced.
      classify: tokens [N, T, D] -> logits [N, num_classes].
    """
    tokens_of = functools.partial(_tokens, study, backbone)
    return headers(study, tokens_of, {"header": classify})["header"]


def headers(
    study: Study,
    features: Callable[[np.ndarray], np.ndarray],
    classifiers: Mapping[str, Callable[[Array], Array]],
) -> dict[str, float]:
    """Accuracies on the public test split of several headers that read the same features.

    Args:
      study: whose test split.
      features: inputs [N, ...] -> what the headers read [N, ...].
      classifiers: by name: features [N, ...] -> logits [N, num_classes].
    """
    test = study.context.splits.test
    seen = jnp.asarray(features(test.inputs))
    return {
        name: float(np.mean(np.asarray(classify(seen)).argmax(axis=-1) == test.labels))
        for name, classify in classifiers.items()
    }


def _tokens(study: Study, backbone: Params, inputs: np.ndarray) -> np.ndarray:
    return compute_features(study.context, backbone, inputs)[0]


def devices(
    study: Study, backbone: Params | None, fleet: Sequence[Device], evaluate: Evaluate
) -> np.ndarray:
    """Accuracies [..., C] of devices on their own test samples.

    Args:
      study: whose context computes features.
      backbone: sliced; what `evaluate` sees are its tokens. None: it sees the raw inputs.
      fleet: the devices, in the order of their rows.
      evaluate: of devices that are completely trained.
    """
    if backbone is None:
        return devices_with(lambda place, inputs: inputs, fleet, evaluate)
    return devices_with(
        lambda place, inputs: compute_features(study.context, backbone, inputs)[0], fleet, evaluate
    )


def devices_with(
    prepare: Callable[[int, np.ndarray], np.ndarray], fleet: Sequence[Device], evaluate: Evaluate
) -> np.ndarray:
    """As `devices`, where every device has features of its own.

    Args:
      prepare: (place in the fleet, raw inputs [N, ...]) -> what `evaluate` sees [N, ...].
      fleet: the devices, in the order of their rows.
      evaluate: of devices that are completely trained.
    """
    rows = [
        (prepare(place, device.test.inputs), device.test.labels)
        for place, device in enumerate(fleet)
    ]
    return np.asarray(evaluate(stack_clients(rows)), np.float64)
