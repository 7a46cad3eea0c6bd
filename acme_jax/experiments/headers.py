"""Headers compared over backbones: linear, MLP, CNN, mixer and the searched one.

Two kinds of backbones: the distilled supernet's sub-networks (`dynavit`), and slices of the plain
fine-tuned network, without reordering or distillation (`plain`), on which the original code in fact
searched its headers. Beside them the patch embedding alone (`embedding`), to see what headers reach
without a backbone; the networks' own classifiers; and remedies (`header_remedies`).
"""

from __future__ import annotations

import functools

from acme_jax import concrete
from acme_jax.config import Config
from acme_jax.experiments import final, header_contest, header_remedies
from acme_jax.experiments.experiment import Experiment, Row
from acme_jax.experiments.header_backbones import (
    KINDS,
    Kind,
    Place,
    frozen,
    full_params,
    places,
    settings,
    tokens,
)
from acme_jax.experiments.study import Study

FROZEN, RATE, CLASSIFIER = "frozen", "rate", "own classifier"
EMBEDDING = Place("embedding")


def units(config: Config) -> list[str]:
    """Each backbone, the middle one first; then what goes beyond them."""
    return [
        *(_unit(place) for kind in KINDS for place in places(config, kind)),
        _unit(EMBEDDING),
        *(f"remedies-{kind}" for kind in KINDS),
        *(f"classifiers-{kind}" for kind in KINDS),
    ]


def run(study: Study, unit: str) -> list[Row]:
    """One unit; `variant` tells its rows apart.

    "frozen": one header on one backbone; "rate": its select accuracy at one learning rate;
    "own classifier": the network's own, without a header of the edge; else a remedy.
    """
    for kind in KINDS:
        if unit == f"remedies-{kind}":
            return header_remedies.rows(study, kind)
        if unit == f"classifiers-{kind}":
            return _classifier_rows(study, kind)
    everywhere = [place for kind in KINDS for place in places(study.config, kind)]
    place = next(place for place in [*everywhere, EMBEDDING] if _unit(place) == unit)
    return _frozen_rows(study, place)


def _unit(place: Place) -> str:
    return f"{place.kind}-{place.depth:g}-{place.width:g}"


def _frozen_rows(study: Study, place: Place) -> list[Row]:
    found = frozen(study, place)
    features = functools.partial(tokens, study, found.backbone)
    accuracies = final.headers(study, features, header_contest.classifiers(found.headers))
    rows = [
        {"variant": FROZEN, **found.described, **one.row(), "test_accuracy": accuracies[name]}
        for name, one in found.headers.items()
    ]
    tried = settings(study, place)
    rows += [
        {
            "variant": RATE,
            **found.described,
            "header": name,
            "learning_rate": setting.learning_rate,
            "select_accuracy": accuracy,
        }
        for name, one in found.headers.items()
        for setting, accuracy in zip(tried[name], one.tried, strict=True)
        if len(tried[name]) > 1
    ]
    return rows


def _classifier_rows(study: Study, kind: Kind) -> list[Row]:
    found = [study.point(place.depth, place.width) for place in places(study.config, kind)]
    params = full_params(study, kind)
    accuracies = final.subnetworks(study, params, [point.arch for point in found])
    dims = study.context.backbone_dims
    return [
        {
            "variant": CLASSIFIER,
            "backbone": kind,
            "depth": point.depth,
            "width": point.width,
            "header": CLASSIFIER,
            "backbone_params": int(concrete.num_params(dims, point.arch)),
            "backbone_flops": int(concrete.num_flops(dims, point.arch)),
            "test_accuracy": float(accuracy),
        }
        for point, accuracy in zip(found, accuracies, strict=True)
    ]


EXPERIMENT = Experiment("headers", "headers compared over backbones", units, run)
