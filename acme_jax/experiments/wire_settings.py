"""Ways to send less between devices and their edge, and what each one costs in bytes.

Every number of bytes is the length of an encoded message, never a formula.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from acme_jax import messages, number_formats
from acme_jax.blocks import Params
from acme_jax.config import RefineConfig
from acme_jax.fleet import REFERENCE_PROFILE
from nas.arch import Arch
from nas.cells import StaticCell


class WireSetting(NamedTuple):
    """What is different from the run's own `RefineConfig`."""

    meaning: str
    changes: dict[str, Any]
    fewer: int = 1
    """The rounds are divided by this; each trains and prunes that much more."""


_SKETCH = {"sketch_format": "linear8", "num_quantiles": 4}
_SMALL = {"importance_format": "log4", **_SKETCH}
RECOMMENDED = "log8_fifth"
"""Within 1 % of the raw samples for any header of the study, though importances keep 8 bits."""

SETTINGS: dict[str, WireSetting] = {
    "float32": WireSetting("as the run sends it", {}),
    "log8": WireSetting("importances as 8-bit logarithms", {"importance_format": "log8"}),
    "log4": WireSetting("importances as 4-bit logarithms", {"importance_format": "log4"}),
    "log2": WireSetting("importances as 2-bit logarithms", {"importance_format": "log2"}),
    "small": WireSetting("4 bits, small sketch (4 quantiles in 8 bits)", _SMALL),
    "small_half": WireSetting("4 bits, small sketch, half as many rounds", _SMALL, 2),
    RECOMMENDED: WireSetting(
        "8 bits, small sketch, a fifth as many rounds", {"importance_format": "log8", **_SKETCH}, 5
    ),
    "small_fifth": WireSetting("4 bits, small sketch, a fifth as many rounds", _SMALL, 5),
}
"""By name, most bytes first."""


def apply_setting(config: RefineConfig, name: str) -> RefineConfig:
    """The configuration with a setting; passes over the data and gates pruned in all are equal.

    Args:
      config: of the run.
      name: of `SETTINGS`. Where the rounds do not divide, they are fewer still.
    """
    setting = SETTINGS[name]
    most = max(1, config.rounds // setting.fewer)
    rounds = max(n for n in range(1, most + 1) if config.rounds % n == 0)
    times = config.rounds // rounds
    return dataclasses.replace(
        config,
        rounds=rounds,
        local_epochs=config.local_epochs * times,
        prune_per_round=config.prune_per_round * times,
        **setting.changes,
    )


class Models(NamedTuple):
    """What an edge and its devices have in common, as the sizes of messages need it."""

    arch: Arch
    backbone: Params
    cell: StaticCell
    header: Params
    embed_dim: int
    num_gates: int


class Sent(NamedTuple):
    """Messages of one kind."""

    tier: str
    direction: str
    message: str
    """Their kind, as in the ledger."""
    number: int
    size: int  # bytes of one


def edge_messages(
    config: RefineConfig, models: Models, num_devices: int, num_train: int
) -> list[Sent]:
    """Everything that travels for one edge over all rounds, encoded with zeros for numbers.

    Args:
      config: rounds and formats.
      models: whose sizes count.
      num_devices: of the edge.
      num_train: samples of each.
    """
    importance = number_formats.importance(
        np.zeros(models.num_gates, np.float32), config.importance_format
    )
    quantiles = np.zeros((config.num_quantiles, models.embed_dim), np.float32)
    sketch = number_formats.sketch(quantiles, config.sketch_format)
    backbone = messages.BackboneMessage(models.arch, models.backbone)
    budget = 2**22  # any: an integer in the header
    limits = np.full(num_devices, budget, np.int64)
    device = messages.DeviceProfileMessage(0, budget, num_train, REFERENCE_PROFILE)
    edge, exchanges = "edge-device", num_devices * config.rounds
    sent: list[tuple[str, str, messages.Message, int]] = [
        (edge, "up", device, num_devices),
        ("cloud-edge", "up", messages.ClusterProfile(0, num_devices, limits, REFERENCE_PROFILE), 1),
        (edge, "up", messages.FeatureSketch(sketch), num_devices),
        (edge, "up", messages.ImportanceSet(importance), exchanges),
        ("cloud-edge", "down", backbone, 1),
        (edge, "down", backbone, num_devices),
        (edge, "down", messages.HeaderMessage(models.cell, models.header), num_devices),
        (edge, "down", messages.PersonalizedImportance(importance), exchanges),
    ]
    return [
        Sent(tier, direction, messages.kind(message), number, len(messages.encode(message)))
        for tier, direction, message, number in sent
    ]


def uplink_of_device(
    config: RefineConfig, models: Models, num_train: int, *, sketch: bool = True
) -> int:
    """Bytes that one device sends in all rounds together, with or without its sketch."""
    return sum(
        sent.number * sent.size
        for sent in edge_messages(config, models, 1, num_train)
        if (sent.tier, sent.direction) == ("edge-device", "up")
        and (sketch or sent.message != "feature_sketch")
    )
