"""What might give the searched header its lead on the smallest backbone, tried one by one.

Each remedy is given to the searched header and to the best hand-made one (by the select split, on
the frozen backbone) alike:

* "all states": the header also sees the embedding, the middle state and the class token, and the
  cell is searched for on these.
* "all public data": the edge holds all public training samples instead of a part.
* "backbone trained": header and backbone train on together, as the original code does.

"tokens for channels" is no remedy: the CNN as the original code fed it, for comparison.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import slicing
from acme_jax.blocks import Params
from acme_jax.encoders import EncoderConfig
from acme_jax.experiments import backbone_states, final, header_contest
from acme_jax.experiments.experiment import Row
from acme_jax.experiments.header_backbones import (
    Frozen,
    Kind,
    frozen,
    full_params,
    smallest,
    tokens,
)
from acme_jax.experiments.header_contest import SEARCHED, Trained
from acme_jax.experiments.header_runs import Predict, Setting
from acme_jax.experiments.study import EdgeData, Study
from acme_jax.header_layout import HeaderDims
from acme_jax.system import FEATURE_BATCH
from nas import cells
from nas.cells import StaticCell

WHOLE_RATES = (1e-3, 3e-3)
"""Learning rates when the backbone trains too, which begins trained."""


def rows(study: Study, kind: Kind) -> list[Row]:
    """Every remedy on the smallest backbone of a kind."""
    base = frozen(study, smallest(study.config, kind))
    fixed = [name for name in base.headers if name != SEARCHED]
    best = max(fixed, key=lambda name: base.headers[name].select_accuracy)
    chosen = {name: [one.setting] for name, one in base.headers.items()}
    rivals = {name: chosen[name] for name in (best, SEARCHED)}
    return [
        *_all_states(study, kind, base, rivals),
        *_all_data(study, kind, base, rivals),
        *_backbone_trained(study, kind, base, tuple(rivals)),
        *_tokens_for_channels(study, kind, base, {"cnn": chosen["cnn"]}),
    ]


def _all_states(
    study: Study, kind: Kind, base: Frozen, rivals: Mapping[str, list[Setting]]
) -> list[Row]:
    context = study.context
    # with its classifier, which the forward pass that returns all states wants
    place = smallest(study.config, kind)
    arch = study.point(place.depth, place.width).arch
    backbone = slicing.slice_params(jax.device_get(full_params(study, kind)), arch)
    features = functools.partial(
        backbone_states.wide_tokens, backbone, encoder=context.encoder, batch_size=FEATURE_BATCH
    )
    dims = dataclasses.replace(
        context.header_dims, embed_dim=backbone_states.NUM_STATES * context.encoder.embed_dim
    )
    data = _edge_data(study, features, study.config.header.proxy_fraction)
    found = _contest(study, kind, "all states", data, dims, rivals)
    return _judged(study, base, "all states", found, features)


def _all_data(
    study: Study, kind: Kind, base: Frozen, rivals: Mapping[str, list[Setting]]
) -> list[Row]:
    """The cell is the one found on the edge's part of the data."""
    features = functools.partial(tokens, study, base.backbone)
    cell = cells.to_static(base.headers[SEARCHED].contender.choice)
    dims, data = study.context.header_dims, _edge_data(study, features, 1.0)
    found = _contest(study, kind, "all public data", data, dims, rivals, cell)
    return _judged(study, base, "all public data", found, features)


def _backbone_trained(study: Study, kind: Kind, base: Frozen, names: Sequence[str]) -> list[Row]:
    """From the trained header and the backbone as it is, for as long as a winner trains."""
    config, data = (
        study.config.header,
        _edge_data(study, np.asarray, study.config.header.proxy_fraction),
    )
    devices = list(study.context.mesh.devices.flat)
    choices = [Setting(rate, config.final_epochs) for rate in WHOLE_RATES]
    under_way = []
    for index, name in enumerate(names):
        header = base.headers[name]
        whole = header.contender._replace(
            predict=_with_backbone(header.contender.predict, study.context.encoder)
        )
        start = {"backbone": base.backbone, "header": header.params}
        key = study.key(f"header remedies {kind} backbone trained", index)
        device = devices[-1 - index % len(devices)]
        under_way.append(
            (
                whole,
                header_contest.begin(key, whole, choices, data, config.batch_size, device, start),
            )
        )
    found = {whole.name: header_contest.finish(whole, runs, choices) for whole, runs in under_way}
    return _judged(study, base, "backbone trained", found, np.asarray)


def _tokens_for_channels(
    study: Study, kind: Kind, base: Frozen, rivals: Mapping[str, list[Setting]]
) -> list[Row]:
    """The CNN on rows of the [T, D] matrix taken for pictures, as the original code reads them."""

    def features(inputs: np.ndarray) -> np.ndarray:
        return mistaken(tokens(study, base.backbone, inputs))

    data = _edge_data(study, features, study.config.header.proxy_fraction)
    name = "tokens for channels"
    found = _contest(study, kind, name, data, study.context.header_dims, rivals)
    return _judged(study, base, name, found, features)


def mistaken(seen: np.ndarray) -> np.ndarray:
    """Tokens [B, T, D] read as D pictures of T positions without a transposition: [B, T, D]."""
    batch, count, size = seen.shape
    return np.ascontiguousarray(seen.reshape(batch, size, count).swapaxes(1, 2))


def _edge_data(
    study: Study, features: Callable[[np.ndarray], np.ndarray], fraction: float
) -> EdgeData:
    """Features of a part of the public training samples, and of the select split."""
    train, select = study.context.splits.train, study.context.splits.select
    count = int(len(train) * fraction)
    return EdgeData(
        jnp.asarray(features(train.inputs[:count])),
        jnp.asarray(train.labels[:count]),
        jnp.asarray(features(select.inputs)),
        jnp.asarray(select.labels),
    )


def _contest(
    study: Study,
    kind: Kind,
    remedy: str,
    data: EdgeData,
    dims: HeaderDims,
    rivals: Mapping[str, list[Setting]],
    cell: StaticCell | None = None,
) -> dict[str, Trained]:
    return header_contest.contest(
        study.key(f"header remedies {kind} {remedy}"),
        data,
        dims,
        study.config.header,
        rivals,
        list(study.context.mesh.devices.flat),
        cell,
    )


def _judged(
    study: Study,
    base: Frozen,
    remedy: str,
    found: Mapping[str, Trained],
    features: Callable[[np.ndarray], np.ndarray],
) -> list[Row]:
    accuracies = final.headers(study, features, header_contest.classifiers(found))
    return [
        {"variant": remedy, **base.described, **one.row(), "test_accuracy": accuracies[name]}
        for name, one in found.items()
    ]


@functools.lru_cache(maxsize=8)
def _with_backbone(predict: Predict, encoder: EncoderConfig) -> Predict:
    """A header together with its backbone, on raw inputs."""

    def whole(params: Params, choice: Any, inputs: Array) -> Array:
        features = slicing.features(params["backbone"], inputs, encoder)
        return predict(params["header"], choice, features)

    return whole
