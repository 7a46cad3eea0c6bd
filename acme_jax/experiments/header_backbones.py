"""The backbones of the header comparison, and the headers trained on each, frozen.

What was trained is kept in the study, because the remedies go on from it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from acme_jax.blocks import Params
from acme_jax.config import Config
from acme_jax.experiments import header_contest, searched_header
from acme_jax.experiments.header_contest import NAMES, RATES, Trained
from acme_jax.experiments.header_runs import Setting
from acme_jax.experiments.study import Study
from acme_jax.system import compute_features

Kind = Literal["dynavit", "plain", "embedding"]
KINDS: tuple[Kind, ...] = ("dynavit", "plain")
"""The distilled supernet's sub-networks, and slices of the network before any of that. The third
kind, the plain network's patch embedding without any block, has one size only."""
POINTS = (
    (1.0, 1.0),
    (1.0, 0.5),
    (1.0, 0.25),
    (0.5, 1.0),
    (0.5, 0.5),
    (0.5, 0.25),
    (0.25, 0.5),
    (0.25, 0.25),
)
"""Depths and widths; where a data set's choices are others, the nearest ones are used."""


class Place(NamedTuple):
    """One backbone."""

    kind: Kind
    depth: float = 0.0
    width: float = 0.0


class Frozen(NamedTuple):
    """Headers on one frozen backbone."""

    backbone: Params
    described: dict[str, Any]  # what rows say about the backbone
    headers: dict[str, Trained]


def places(config: Config, kind: Kind) -> list[Place]:
    """The backbones of a kind, each once, the middle one first."""
    found = [nearest(config, kind, *point) for point in POINTS]
    return list(dict.fromkeys([middle(config, kind), *found]))


def middle(config: Config, kind: Kind) -> Place:
    """The backbone on which learning rates are chosen."""
    return nearest(config, kind, 0.5, 0.5)


def smallest(config: Config, kind: Kind) -> Place:
    """The backbone on which remedies are tried."""
    return nearest(config, kind, 0.25, 0.25)


def nearest(config: Config, kind: Kind, depth: float, width: float) -> Place:
    """A backbone of a kind; only fractions that the configuration offers."""

    def offered(part: float) -> float:
        return min(config.search.fractions, key=lambda choice: abs(choice - part))

    return Place(kind, offered(depth), offered(width))


def full_params(study: Study, kind: Kind) -> Params:
    """The full network that a kind of backbone is cut from."""
    return study.stages.elastic if kind == "dynavit" else study.stages.trained


def backbone_of(study: Study, place: Place) -> tuple[Params, dict[str, Any]]:
    """The sliced backbone, and what rows say about it."""
    point = study.point(place.depth, place.width)
    backbone = study.backbone(point.arch, full_params(study, place.kind))
    depth, width = point.depth, point.width
    if place.kind == "embedding":
        backbone, depth, width = {**backbone, "blocks": []}, 0.0, 0.0
    return backbone, {"backbone": place.kind, "depth": depth, "width": width}


def tokens(study: Study, backbone: Params, inputs: np.ndarray) -> np.ndarray:
    """What a frozen backbone's headers read [N, T, D], of inputs [N, ...]."""
    return compute_features(study.context, backbone, inputs)[0]


def settings(study: Study, place: Place) -> dict[str, list[Setting]]:
    """How each header trains: on the middle backbone at every rate, elsewhere at the best one."""
    epochs = header_contest.epochs(study.config.header)
    if place == middle(study.config, place.kind):
        return {name: [Setting(rate, epochs) for rate in RATES[name]] for name in NAMES}
    kind: Kind = "plain" if place.kind == "embedding" else place.kind
    found = frozen(study, middle(study.config, kind)).headers
    return {name: [found[name].setting] for name in NAMES}


def frozen(study: Study, place: Place) -> Frozen:
    """Every header, trained on one frozen backbone."""
    backbone, described = backbone_of(study, place)
    dims, chosen = study.context.header_dims, settings(study, place)
    where = f"headers_{place.kind}_{place.depth:g}_{place.width:g}"

    def make() -> tuple[Any, dict[str, Any]]:
        found = header_contest.contest(
            study.key(where),
            study.edge_data(backbone),
            dims,
            study.config.header,
            chosen,
            list(study.context.mesh.devices.flat),
        )
        cell = searched_header.to_list(found[header_contest.SEARCHED].contender.choice)
        tried = {name: list(one.tried) for name, one in found.items()}
        return {name: one.params for name, one in found.items()}, {"cell": cell, "tried": tried}

    params, facts = study.cached(where, make)
    cell = searched_header.from_list(facts["cell"])
    headers = {
        name: header_contest.trained(
            header_contest.contender(name, dims, cell),
            params[name],
            chosen[name],
            facts["tried"][name],
        )
        for name in NAMES
    }
    return Frozen(backbone, described, headers)
