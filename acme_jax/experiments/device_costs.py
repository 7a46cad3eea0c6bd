"""What a way of getting a model costs each device: bytes on its link, operations, size.

ACME's messages are counted as they are encoded; rivals' weights as bare float32, without any
framing. A training step costs three forward passes of what it trains. Norms, activations and the
server's work are left out, on all sides. Shape letters: C devices.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from acme_jax import concrete, header_layout, messages
from acme_jax.blocks import Params
from acme_jax.config import RefineConfig
from acme_jax.context import BYTES_PER_PARAM, Context
from acme_jax.encoders import EncoderConfig
from acme_jax.fleet import Device
from acme_jax.fleet_refinement import FleetSetup, traffic
from acme_jax.messages import BackboneMessage, DeviceProfileMessage
from nas.arch import Arch
from nas.cells import StaticCell

_PASSES = 3.0
"""Forward passes that a training step costs: forward, and both gradients."""


class Cost(NamedTuple):
    """Of one device."""

    uplink_bytes: float
    downlink_bytes: float
    train_flops: float  # in all rounds together
    inference_flops: float  # of one sample
    model_bytes: float  # of the finished model


class Link(NamedTuple):
    """How often weights travel."""

    up: int
    down: int


def network(encoder: EncoderConfig, arch: Arch, device: Device, link: Link, epochs: int) -> Cost:
    """A sub-network with its classifier, trained whole.

    Args:
      encoder: sizes of the full network.
      arch: of the sub-network.
      device: whose samples are counted.
      link: how often its weights travel.
      epochs: passes over the device's samples.
    """
    size = float(concrete.size_bytes(encoder.dims, arch))
    flops = float(concrete.num_flops(encoder.dims, arch))
    train = _PASSES * flops * len(device.train) * epochs
    return Cost(link.up * size, link.down * size, train, flops, size)


class HeaderModel(NamedTuple):
    """A frozen backbone and a header, as an edge hands them out."""

    arch: Arch
    backbone: Params
    cell: StaticCell
    params: Params  # of the header, in compact form


def header(
    context: Context,
    model: HeaderModel,
    device: Device,
    link: Link,
    epochs: int,
    models_trained: int = 1,
) -> Cost:
    """A header trained on a frozen backbone, whose features are computed once.

    Args:
      context: of the study.
      model: of the device's edge.
      device: whose samples are counted.
      link: how often the header's weights travel; the backbone's come down once.
      epochs: passes over the device's samples; 0: the device computes no features either.
      models_trained: headers that the device trains side by side (Ditto: 2).
    """
    backbone_bytes, backbone_flops = _backbone(context, model)
    params = header_layout.num_params(context.header_dims, model.cell)
    flops = header_layout.num_flops(context.header_dims, model.cell)
    size = BYTES_PER_PARAM * params
    samples = len(device.train)
    train = samples * (backbone_flops * (epochs > 0) + _PASSES * flops * epochs * models_trained)
    return Cost(
        link.up * size,
        backbone_bytes + link.down * size,
        train,
        backbone_flops + flops,
        backbone_bytes + size,
    )


def acme(
    context: Context,
    model: HeaderModel,
    device: Device,
    config: RefineConfig,
    mask: np.ndarray | None,
) -> Cost:
    """ACME: encoded messages up and down, all rounds of refinement.

    Args:
      context: of the study.
      model: of the device's edge.
      device: whose samples are counted.
      config: of the refinement; `prune_per_round` is what this edge prunes.
      mask: of the finished header's gates [G], compact: pruned channels are removed on the
        device. None: the device gets backbone and header and does not refine.
    """
    profile = DeviceProfileMessage(
        device.id, device.budget_bytes, len(device.train), device.profile
    )
    up = float(len(messages.encode(profile)))
    down = float(len(messages.encode(BackboneMessage(model.arch, model.backbone))))
    dims = context.header_dims
    backbone_bytes, backbone_flops = _backbone(context, model)
    train = 0.0
    if mask is None:
        down += len(messages.encode(messages.HeaderMessage(model.cell, model.params)))
    else:
        sent = traffic(FleetSetup(model.cell, dims, config), model.params)
        up, down = up + sent.uplink, down + sent.downlink
        trained = header_layout.num_flops(dims, model.cell)
        epochs = config.rounds * config.local_epochs
        train = len(device.train) * (backbone_flops + _PASSES * trained * epochs)
    left = BYTES_PER_PARAM * header_layout.num_params(dims, model.cell, mask)
    flops = backbone_flops + header_layout.num_flops(dims, model.cell, mask)
    return Cost(up, down, train, flops, backbone_bytes + left)


def columns(costs: list[Cost], fleet: list[Device]) -> dict[str, float]:
    """A row's columns: means over the devices, and the part of them that the model fits."""
    means = {field: float(np.mean([getattr(c, field) for c in costs])) for field in Cost._fields}
    fits = [c.model_bytes <= d.budget_bytes for c, d in zip(costs, fleet, strict=True)]
    return {**means, "fits": float(np.mean(fits))}


def _backbone(context: Context, model: HeaderModel) -> tuple[float, float]:
    """Bytes and FLOPs of a frozen backbone, without a classifier."""
    dims = context.backbone_dims
    size = float(concrete.size_bytes(dims, model.arch))
    return size, float(concrete.num_flops(dims, model.arch))
