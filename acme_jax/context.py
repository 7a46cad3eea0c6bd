"""What every phase of a run reads: configuration, sizes, data, devices, layout.

Everything here is made again, identically, when a run resumes; nothing is checkpointed.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from acme_jax import cloud, concrete, densities, layout, profiling, training
from acme_jax.blocks import Params
from acme_jax.config import Config, ConfigError
from acme_jax.encoders import EncoderConfig
from acme_jax.fleet import REFERENCE_PROFILE, Device, make_fleet
from acme_jax.header_layout import HeaderDims, max_num_params
from acme_jax.plan import Plan, make_plan
from acme_jax.session import Session
from acme_jax.splits import Splits, make_splits
from acme_jax.starting_point import make_starting_point
from nas.arch import ArchSpace, full
from nas.cost import CostModel, ModelDims
from nas.latency_table import LatencyTable, scaled

BYTES_PER_PARAM = 4


class Stream(enum.IntEnum):
    """Independent random streams of a run, folded into the seed's key."""

    INIT = 0
    REFERENCE = 1
    WIDTH = 2
    DEPTH = 3
    SEARCH = 4
    HEADER = 5
    LINEAR = 6
    REFINE = 7
    SKETCH = 8
    DENSITY = 9


class Public(NamedTuple):
    """The cloud's splits as device arrays. The test split stays in `Splits`."""

    train_inputs: Array  # images [N, height, width, channels] or token ids [N, T]
    train_labels: Array  # [N]
    select_inputs: Array
    select_labels: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """The fixed surroundings of a run."""

    config: Config
    session: Session
    mesh: Mesh
    encoder: EncoderConfig
    pretrained: Params | None
    """Weights that the reference model starts from; None: drawn at random."""
    plan: Plan
    """How training and evaluation fit into memory."""
    space: ArchSpace
    backbone_dims: ModelDims
    """Sizes of what devices receive: the network without its classifier."""
    header_dims: HeaderDims
    sample_bytes: float
    """Of one raw sample, for the centralised baseline."""
    class_names: tuple[str, ...]
    """By label; empty: their numbers."""
    tokenizer: bytes | None
    """Texts only: the tokenizer.json that belongs into every device's folder."""
    splits: Splits
    public: Public
    devices: list[Device]
    cost_model: CostModel
    """The device that the search has in mind: assumed, or measured (`search.latency_table`)."""

    @property
    def eval_batch(self) -> int:
        """Samples in one forward pass: at most as many as the plan made room for."""
        return self.plan.eval_batch or len(self.splits.select)

    @property
    def key(self) -> Array:
        """The run's root key."""
        return jax.random.key(self.config.seed)

    def stream(self, stream: Stream, index: int = 0) -> Array:
        """Key of one random stream; `index` tells edges apart."""
        return jax.random.fold_in(jax.random.fold_in(self.key, int(stream)), index)

    @property
    def full_bytes(self) -> int:
        """Size of the full backbone and the largest header: budgets are fractions of it."""
        return _full_bytes(self.backbone_dims, self.space, self.header_dims)

    def device_cost_model(self, device: Device) -> CostModel:
        """`cost_model` for one device: a measured table is as much slower as its profile."""
        if not isinstance(self.cost_model, LatencyTable):
            return device.profile
        profile = device.profile
        table = scaled(self.cost_model, REFERENCE_PROFILE.flops_per_s / profile.flops_per_s)
        return table._replace(
            idle_power_w=profile.idle_power_w,
            energy_per_flop_j=profile.energy_per_flop_j,
            energy_per_byte_j=profile.energy_per_byte_j,
        )

    @property
    def header_reserve_bytes(self) -> int:
        """What the largest header can take; a backbone must leave this much of a budget."""
        return BYTES_PER_PARAM * max_num_params(self.header_dims)


def make_context(config: Config, session: Session) -> Context:
    """Loads the data, divides it and checks everything that can be checked before training.

    Raises:
      DataError: unusable data, or a device without enough of it.
      ConfigError: an impossible combination, such as a budget that no sub-network fits.
    """
    start = make_starting_point(config, session.decoding)
    dataset, encoder = start.dataset, start.encoder
    space = ArchSpace.from_fractions(
        encoder.num_layers,
        encoder.num_heads,
        encoder.num_neurons,
        fractions=config.search.fractions,
        per_layer=config.search.per_layer,
    )
    rows, columns = encoder.grid
    header_dims = HeaderDims(
        grid_height=rows,
        grid_width=columns,
        embed_dim=encoder.embed_dim,
        channels=config.header.channels,
        num_classes=encoder.num_classes,
        blocks=config.header.blocks,
        num_layers=config.header.repeats + 2,
    )
    backbone_dims = dataclasses.replace(encoder.dims, num_classes=0)
    cost_model: CostModel = REFERENCE_PROFILE
    if config.search.latency_table is not None:
        path = config.search.latency_table
        cost_model = profiling.load_table(path, backbone_dims, space, REFERENCE_PROFILE)
    splits = make_splits(dataset, config.data, config.seed)
    for phase in (config.reference, config.distill.width, config.distill.depth):
        training.steps_per_epoch(len(splits.train), phase)
    proxy = int(len(splits.train) * config.header.proxy_fraction)
    if proxy < config.header.batch_size:
        raise ConfigError(
            f"header.proxy_fraction leaves {proxy} samples at the edge, fewer than one batch of "
            f"{config.header.batch_size}; raise it or lower header.batch_size"
        )
    densities.check(config.refine, proxy, encoder.embed_dim)
    full_bytes = _full_bytes(backbone_dims, space, header_dims)
    devices = make_fleet(splits.device_pool, config, dataset.num_classes, full_bytes)
    cloud.check_importance_samples(len(splits.select))
    mesh = layout.make_mesh(config.compute.num_devices)
    plan = make_plan(
        encoder,
        space,
        config,
        mesh,
        num_train=len(splits.train),
        num_select=len(splits.select),
        sample_bytes=splits.train.inputs[0].nbytes,
    )
    for line in plan.lines:
        session.say(line)
    context = Context(
        config=config,
        session=session,
        mesh=mesh,
        encoder=dataclasses.replace(encoder, remat=plan.remat),
        # On the host, because only the reference phase begins with them.
        pretrained=None if start.params is None else jax.device_get(start.params),
        plan=plan,
        space=space,
        backbone_dims=backbone_dims,
        header_dims=header_dims,
        sample_bytes=dataset.sample_bytes,
        class_names=dataset.class_names or (),
        tokenizer=start.tokenizer,
        splits=splits,
        public=Public(
            *layout.replicate(
                (
                    splits.train.inputs,
                    splits.train.labels,
                    splits.select.inputs,
                    splits.select.labels,
                ),
                mesh,
            )
        ),
        devices=devices,
        cost_model=cost_model,
    )
    cloud.check_limits(
        backbone_dims,
        space,
        [
            min(d.budget_bytes for d in devices if d.edge == edge) - context.header_reserve_bytes
            for edge in range(config.fleet.num_edges)
        ],
    )
    return context


def proxy_indices(context: Context) -> np.ndarray:
    """Rows of the public training split that every edge holds as its shared data."""
    count = int(len(context.splits.train) * context.config.header.proxy_fraction)
    return np.arange(count)


def _full_bytes(dims: ModelDims, space: ArchSpace, header_dims: HeaderDims) -> int:
    backbone = int(concrete.size_bytes(dims, full(space)))
    return backbone + BYTES_PER_PARAM * max_num_params(header_dims)
