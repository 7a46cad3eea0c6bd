"""Choices of the refinement beside what they replace: similarities by accuracy, codings by bytes.

    python scripts/compare_components.py [--dataset digits] [--seeds 0 1 2]
                                         [--out docs/results/components.json]

One edge with eight devices refines a searched header on a frozen backbone of half depth and width
with each similarity, from equal starts and on equal data; the devices' own test samples give the
accuracy. The messages that it sent up with similarity per_dimension are then encoded in every
format and coding. Digits run on the network of the preset `smoke`, about a minute a seed on 2 free
cores. `scripts/results_components.py` makes the tables.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from acme_jax import layout
from acme_jax.config import (
    Config,
    FleetConfig,
    ImportanceFormat,
    RefineConfig,
    Similarity,
    SketchFormat,
)
from acme_jax.experiments.settings import settings

SIMILARITIES: tuple[Similarity, ...] = ("per_dimension", "flat", "kde")
BASELINES = ("no_pruning", "alone", "avg")
FORMATS: dict[str, tuple[ImportanceFormat, SketchFormat]] = {
    "float": ("float32", "float16"),
    "8 bits": ("log8", "linear8"),
    "4 bits": ("log4", "linear4"),
}
"""Importances and sketches, by the name in the table."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compare."""

    dataset: Literal["digits", "mnist5k"] = "digits"
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every seed draws its own splits, devices and weights."""
    root: Path = Path("runs/components")
    """What is made on the way, below a directory of the data set's name; kept for a later start."""
    out: Path | None = None
    """JSON file to write; None prints only."""


def configuration(dataset: str, root: Path) -> Config:
    """One edge, eight devices, ten rounds; the defaults of `RefineConfig`."""
    base = settings("tiny" if dataset == "digits" else dataset)
    return dataclasses.replace(
        base,
        preset=f"components-{dataset}",
        fleet=FleetConfig(num_edges=1, devices_per_edge=8, budgets=(0.9,), samples_per_device=80),
        refine=RefineConfig(),
        compute=dataclasses.replace(
            base.compute, checkpoint_every=10, compilation_cache=str(root / "compiled")
        ),
    )


def compressors() -> dict[str, Callable[[bytes], bytes]]:
    """General compressors, each of one message; zstd where this Python has it."""
    found: dict[str, Callable[[bytes], bytes]] = {"zlib": lambda data: zlib.compress(data, 9)}
    for name in ("compression.zstd", "zstandard"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found["zstd"] = functools.partial(module.compress, level=19)
        break
    return found


def coded_bytes(streams: Sequence[Sequence[Any]]) -> list[Row]:
    """Bytes of all messages up, by format, kind and coding.

    Args:
      streams: of every device the messages in the order sent, their numbers as floats.
    """
    from acme_jax import message_coding, messages, number_formats

    general, sums = compressors(), dict[tuple[str, str, str], list[int]]()
    for form, (importance_format, sketch_format) in FORMATS.items():
        for stream in streams:
            memories: dict[str, message_coding.Memory] = {}
            for message in stream:
                kind = messages.kind(message)
                values = number_formats.read(message[0])
                plain = messages.encode(
                    messages.FeatureSketch(number_formats.sketch(values, sketch_format))
                    if kind == "feature_sketch"
                    else messages.ImportanceSet(
                        number_formats.importance(values, importance_format)
                    )
                )
                memories[kind], adaptive = message_coding.encode(memories.get(kind), plain)
                sizes = {"none": plain, "adaptive": adaptive}
                sizes |= {name: compress(plain) for name, compress in general.items()}
                for coding, data in sizes.items():
                    total = sums.setdefault((form, kind, coding), [0, 0])
                    total[0] += 1
                    total[1] += len(data)
    return [
        {"format": form, "message": kind, "coding": coding, "messages": count, "bytes": size}
        for (form, kind, coding), (count, size) in sums.items()
    ]


def run_seed(config: Config, directory: Path, reporter: Any, stop: Any) -> list[Row]:
    """Rows of one seed, told apart by `kind`: "accuracy" of a device, "bytes" of all."""
    import jax
    import jax.numpy as jnp

    from acme_jax import exchange, header, refine, system
    from acme_jax.experiments import cohorts, final, traffic
    from acme_jax.experiments.study import open_study
    from acme_jax.post import Post
    from acme_jax.run_dir import RunDirectory
    from acme_jax.session import Session

    class Listening(Post):
        """Keeps what every device sends up."""

        def __init__(self) -> None:
            super().__init__()
            self.streams: dict[int, list[Any]] = {}

        def send_up(self, message: Any, *, sender: int, round: int) -> Any:
            self.streams.setdefault(sender, []).append(message)
            return super().send_up(message, sender=sender, round=round)

    with open_study(config, directory, reporter, stop) as study:
        context, fleet, seed = study.context, study.context.devices, config.seed
        models = traffic.searched(study)
        labels = [device.train.labels for device in fleet]
        features = [
            system.compute_features(context, models.backbone, device.train.inputs)
            for device in fleet
        ]
        tokens, summaries = (
            system.stack_devices(context, part, labels) for part in zip(*features, strict=True)
        )
        proxy = context.splits.train.inputs[system.proxy_indices(context)]
        shared = jnp.asarray(system.compute_features(context, models.backbone, proxy)[1])
        dims = context.header_dims
        linear = header.init_linear(study.key("linear"), dims.embed_dim, dims.num_classes)
        streams: list[list[Any]] = []
        states: dict[str, Any] = {}
        traffic_of: dict[str, dict[str, float]] = {}
        for name in SIMILARITIES:
            post = Listening()
            changed = dataclasses.replace(config.refine, similarity=name)
            mixing = exchange.compare(
                dataclasses.replace(context, config=dataclasses.replace(config, refine=changed)),
                post, 0, summaries, shared,
            )  # fmt: skip
            traffic_of[name] = {
                "up_bytes": post.ledger.total(direction="up") / len(fleet),
                "down_bytes": post.ledger.total(direction="down") / len(fleet),
            }
            with tempfile.TemporaryDirectory() as place:
                run = RunDirectory.create_or_open(place, config, resume=False)
                session = Session(run, reporter, stop)
                cohort = refine.run_edge(
                    dataclasses.replace(context, session=session),
                    post, 0, models.cell, models.header, linear, tokens, mixing,
                )  # fmt: skip
                run.close()
            methods: dict[str, str] = {name: "wasserstein"}
            if name == SIMILARITIES[0]:
                methods |= {baseline: baseline for baseline in BASELINES}
                streams = list(post.streams.values())
            for label, method in methods.items():
                first = refine.METHODS.index(method) * len(fleet)
                states[label] = jax.tree.map(
                    lambda leaf, first=first: np.asarray(leaf)[first : first + len(fleet)],
                    cohort.devices,
                )
        found = final.devices(study, models.backbone, fleet, cohorts.evaluator(states, dims))
    rows = [
        {
            "kind": "accuracy", "seed": seed, "similarity": name, "device": device.id,
            "test_accuracy": float(accuracy), **traffic_of.get(name, {}),
        }
        for name, accuracies in zip(states, found, strict=True)
        for device, accuracy in zip(fleet, accuracies, strict=True)
    ]  # fmt: skip
    return rows + [{"kind": "bytes", "seed": seed, **row} for row in coded_bytes(streams)]


def main(arguments: Arguments) -> int:
    """Runs every seed and writes the document."""
    root = arguments.root / arguments.dataset
    config = configuration(arguments.dataset, root)
    layout.configure(config.compute)
    # Imported late: the layout must be set before JAX starts.
    import results_components

    from acme_jax.progress import Reporter, stop_on_signals
    from acme_jax.run_dir import versions, write_json

    start, rows, software = time.perf_counter(), list[Row](), versions()
    with Reporter() as reporter, stop_on_signals() as stop:
        for seed in arguments.seeds:
            seeded = dataclasses.replace(config, seed=seed)
            rows += run_seed(seeded, root / f"seed{seed}", reporter, stop)
    seeds = " ".join(str(seed) for seed in arguments.seeds)
    document = {
        "command": f"python scripts/compare_components.py --dataset {arguments.dataset} "
        f"--seeds {seeds}",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        **software,
        "seconds": time.perf_counter() - start,
        "seeds": list(arguments.seeds),
        "config": {name: part for name, part in config.to_dict().items() if name != "compute"},
        "rows": rows,
    }
    for table in results_components.TABLES.values():
        print("\n".join(table(document)), end="\n\n")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
