"""Bytes by kind of message for one edge: counted in a real refinement, and in the paper's shapes.

Rows of `kind` "bytes": `setting` is one of `wire_settings.SETTINGS`, or "centralized", which is raw
samples up and finished models down. `input` says of which images.
"""

from __future__ import annotations

import dataclasses
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from acme_jax import (
    exchange,
    header,
    header_layout,
    messages,
    number_formats,
    presets,
    refine,
    slicing,
    supernet,
    system,
)
from acme_jax.cloud import Choice
from acme_jax.config import Config
from acme_jax.context import Context
from acme_jax.experiments.experiment import Row
from acme_jax.experiments.study import Study
from acme_jax.experiments.wire_settings import (
    RECOMMENDED,
    SETTINGS,
    Models,
    apply_setting,
    edge_messages,
)
from acme_jax.header_layout import HeaderDims
from acme_jax.phases import EdgeHeader
from acme_jax.post import MessageT, Post
from acme_jax.progress import StopFlag
from acme_jax.run_dir import RunDirectory
from acme_jax.session import Session
from acme_jax.vit import ViTConfig
from fed.traffic import Direction
from nas import arch as nas_arch
from nas.arch import ArchSpace
from nas.cells import OPS

MEASURED = ("float32", RECOMMENDED)
"""Settings whose real messages are counted."""
PAPER_IMAGES = {"32x32x3": 32 * 32 * 3, "224x224x3": 224 * 224 * 3}
"""Bytes of one raw image, a byte a pixel and channel."""
PAPER_TRAIN, PAPER_DEVICES = 1_250, 5
PAPER_BACKBONE = (0.25, 0.25)
"""Depth and width of the ViT-B on which the paper refines."""
RAW_FEATURES = 200 * 768 * 4
"""Bytes of what the original code compares instead of sketches: 200 float32 feature vectors."""
ORIGINAL = "original"
"""The setting of that: float32 importances and these features."""


class _CountingPost(Post):
    """Counts beside every message what zlib would make of it, and how many values are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.compressed: Counter[tuple[str, ...]] = Counter()
        self.zeros: Counter[tuple[str, ...]] = Counter()
        self.values: Counter[tuple[str, ...]] = Counter()

    def send(
        self,
        message: MessageT,
        *,
        tier: str,
        direction: Direction,
        round: int,
        copies: int = 1,
        sender: int | None = None,
    ) -> MessageT:
        place = (tier, direction, messages.kind(message))
        self.compressed[place] += copies * len(zlib.compress(messages.encode(message), 9))
        if isinstance(message, messages.ImportanceSet | messages.PersonalizedImportance):
            values = number_formats.read(message.importance)
            self.values[place] += values.size
            self.zeros[place] += int(np.sum(values == 0))
        return super().send(
            message, tier=tier, direction=direction, round=round, copies=copies, sender=sender
        )


def measured(study: Study, models: Models) -> list[Row]:
    """What the run's own refinement of the first edge's devices sends, under several settings.

    Args:
      study: with its devices.
      models: of the edge.
    """
    context = study.context
    devices = [device for device in context.devices if device.edge == 0]
    fleet = dataclasses.replace(context.config.fleet, num_edges=1, devices_per_edge=len(devices))
    features = [
        system.compute_features(context, models.backbone, device.train.inputs) for device in devices
    ]
    place = "x".join(str(size) for size in context.encoder.input_shape)
    rows = _centralized(place, [len(d.train) for d in devices], context.sample_bytes, models)
    for name in MEASURED:
        config = dataclasses.replace(
            context.config, fleet=fleet, refine=apply_setting(context.config.refine, name)
        )
        changed = dataclasses.replace(context, config=config, devices=devices)
        post = _refine_once(changed, models, features)
        counts: Counter[tuple[str, ...]] = Counter()
        for record in post.to_records():
            where = (record["tier"], record["direction"], record["kind"])
            counts[where] += record["messages"]
        for where, size in post.ledger.totals_by("tier", "direction", "kind").items():
            row = _row(place, name, *where, counts[where], size)
            row["zlib_bytes"] = post.compressed[where]
            if post.values[where]:
                row["zero_share"] = post.zeros[where] / post.values[where]
            rows.append(row)
    return rows


def _refine_once(
    context: Context, models: Models, features: Sequence[tuple[np.ndarray, np.ndarray]]
) -> _CountingPost:
    """The run's code from the devices' profiles to the last personalised set, in a new session."""
    dims, post = context.header_dims, _CountingPost()
    key = context.session.run.config.seed
    linear = jax.tree.map(
        np.asarray, header.init_linear(jax.random.key(key), dims.embed_dim, dims.num_classes)
    )
    found = EdgeHeader(models.cell, models.header, linear, 0.0, 0.0, [])
    choice = Choice(0, models.arch, np.zeros(4))
    backbone = jax.tree.map(np.asarray, models.backbone)
    with tempfile.TemporaryDirectory() as directory:
        run = RunDirectory.create_or_open(directory, context.config, resume=False)
        session = Session(run, context.session.reporter, StopFlag())
        context = dataclasses.replace(context, session=session)
        try:
            system.register_devices(context, post)
            down = messages.BackboneMessage(models.arch, backbone)
            post.send(down, tier="cloud-edge", direction="down", round=0)
            received = system.send_models(post, choice, backbone, found, context.devices)
            labels = [device.train.labels for device in context.devices]
            tokens, summaries = zip(*features, strict=True)
            mixing = exchange.compare(
                context, post, 0, system.stack_devices(context, summaries, labels)
            )
            data = system.stack_devices(context, tokens, labels)
            refine.run_edge(context, post, 0, models.cell, received, linear, data, mixing)
        finally:
            run.close()
    return post


def encoded() -> list[Row]:
    """Messages in the shapes of the paper's ViT-B: 5 devices of 1,250 images, 10 rounds."""
    config, models = presets.vit_b16_cifar100(), paper_models()
    rows: list[Row] = []
    for place, sample_bytes in PAPER_IMAGES.items():
        rows += _centralized(place, [PAPER_TRAIN] * PAPER_DEVICES, sample_bytes, models)
        for name in (*SETTINGS, ORIGINAL):
            refinement = config.refine if name == ORIGINAL else apply_setting(config.refine, name)
            for sent in edge_messages(refinement, models, PAPER_DEVICES, PAPER_TRAIN):
                size = sent.size
                if name == ORIGINAL and sent.message == "feature_sketch":
                    size = RAW_FEATURES
                where = (sent.tier, sent.direction, sent.message)
                rows.append(_row(place, name, *where, sent.number, sent.number * size))
    return rows


def paper_models() -> Models:
    """Zeros in the shapes of the paper's refinement: ViT-B at (0.25, 0.25), 1,024 gates.

    The paper's header is one fixed block; ours of one layer and one separable 5 x 5 convolution
    has as many gates (4 points of 256 channels) and about as many parameters (0.43 M, the paper's
    0.37 M).
    """
    config: Config = presets.vit_b16_cifar100()
    model = config.model
    encoder = ViTConfig(
        (224, 224, 3), model.patch_size, model.embed_dim, model.num_layers, model.num_heads,
        model.num_neurons, num_classes=100,
    )  # fmt: skip
    space = ArchSpace.from_fractions(model.num_layers, model.num_heads, model.num_neurons)
    depth, width = PAPER_BACKBONE
    arch = jax.tree.map(
        np.asarray,
        jax.jit(lambda: nas_arch.uniform(space, width=width, depth=depth))(),
    )
    shapes = jax.eval_shape(lambda key: supernet.init(key, encoder), jax.random.key(0))
    # Zeros that nobody reads take no memory.
    full = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    sliced = slicing.slice_params(full, arch)
    backbone = {name: leaf for name, leaf in sliced.items() if name != "classifier"}
    rows, columns = encoder.grid
    dims = HeaderDims(
        rows, columns, model.embed_dim, channels=256, num_classes=100, blocks=1, num_layers=1
    )
    cell = ((0, OPS.index("sep5x5"), 1, OPS.index("maxpool3")),)
    parts = jax.eval_shape(lambda key: header.init(key, cell, dims), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), parts)
    gates = header_layout.num_gates(dims, cell)
    return Models(arch, backbone, cell, params, model.embed_dim, gates)


def _centralized(
    place: str, num_train: Sequence[int], sample_bytes: float, models: Models
) -> list[Row]:
    """All raw samples up, every device's finished model down (backbone and header, float32)."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((models.backbone, models.header)))
    up, down = messages.centralized_baseline(num_train, sample_bytes, [size] * len(num_train))
    return [
        _row(place, "centralized", "cloud-device", "up", "raw_samples", sum(num_train), up),
        _row(place, "centralized", "cloud-device", "down", "model", len(num_train), down),
    ]


def _row(
    place: str, setting: str, tier: str, direction: str, message: str, count: int, size: int
) -> Row:
    return {
        "kind": "bytes",
        "input": place,
        "setting": setting,
        "tier": tier,
        "direction": direction,
        "message": message,
        "messages": count,
        "bytes": size,
    }
