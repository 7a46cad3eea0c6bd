"""The end of a run: final evaluation on the test splits, exported models, results, report.

The only module that reads test data, once, after every choice has been made.
"""

from __future__ import annotations

import functools
import json
import statistics
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import (
    benchmark,
    cloud,
    concrete,
    data_quality,
    device_folder,
    device_model,
    header_slots,
    messages,
    performance,
    report,
    supernet,
    tables,
)
from acme_jax import device as device_tier
from acme_jax.bert import BertConfig
from acme_jax.blocks import Params
from acme_jax.context import BYTES_PER_PARAM, Context
from acme_jax.device import DeviceState
from acme_jax.encoders import EncoderConfig
from acme_jax.fleet import Device, edge_devices
from acme_jax.header_layout import gate_layout, num_flops, num_params
from acme_jax.post import Post
from acme_jax.progress import peak_memory_bytes
from acme_jax.refine import METHODS, initial_cohort
from acme_jax.run_dir import write_json
from acme_jax.slicing import kept_blocks
from fed.clients import ClientData
from nas.arch import Arch, full

if TYPE_CHECKING:
    from acme_jax.system import Cloud, Edge

_CARD_FACTS = (
    "device", "edge", "labels", "num_train", "num_test", "budget_bytes", "size_bytes",
    "num_flops", "latency_s", "energy_j",
)  # fmt: skip
"""Of a device's row, what its model's card tells."""

LOADING = """from acme_jax import device_model

model = device_model.load("{path}")
classes = model.predict(inputs)  # {inputs}"""


def finish(context: Context, post: Post, made: Cloud, edges: list[Edge]) -> dict[str, Any]:
    """Evaluates, exports every device's model, writes results, report and pictures.

    Returns:
      The results, as in `results.json`.
    """
    session, run = context.session, context.session.run
    with session.phase("final evaluation"):
        results = evaluate(context, post, made, edges)
        for device in results["devices"]:
            run.append_metrics(
                "final evaluation", device=device["device"], edge=device["edge"],
                **device["accuracy"],
            )  # fmt: skip
    with session.phase("models of the devices"):
        export(context, made, edges, results)
    with session.phase("matmul peak"):
        peak = performance.measured_peak(context.mesh)
    timing = measure_timing(context, peak)
    with session.phase("report"):
        loading = LOADING.format(
            path=run.path / results["devices"][0]["model"],
            inputs=_describe_inputs(context.encoder),
        )
        report.write_report(results, timing, run.path, context.config.to_dict(), loading)
    timing = measure_timing(context, peak)
    write_json(run.path / "timing.json", timing)
    write_json(run.path / "results.json", results)
    tables.print_results(results, timing, session.reporter.console)
    session.say(f"report: {run.path / 'report.html'}")
    return results


def _describe_inputs(encoder: EncoderConfig) -> str:
    shape = ", ".join(str(n) for n in encoder.input_shape)
    if isinstance(encoder, BertConfig):
        return f"token ids [B, {shape}]"
    return f"images [B, {shape}] in [0, 1], or uint8"


def evaluate(context: Context, post: Post, made: Cloud, edges: list[Edge]) -> dict[str, Any]:
    """The results dictionary: every number of the run that is not a time."""
    run = context.session.run
    versions = json.loads((run.path / "versions.json").read_text())
    edge_rows, device_rows, similarity_rows, quality_rows = [], [], [], []
    for edge, outcome in enumerate(edges):
        edge_rows.append(_edge_row(context, made, edge, outcome))
        device_rows += _device_rows(context, edge, outcome, made.choices[edge].arch)
        similarity_rows.append(_similarity_row(context, edge, outcome))
        if outcome.quality is not None:
            quality_rows += data_quality.rows(edge_devices(context.devices, edge), outcome.quality)
    return {
        "preset": context.config.preset,
        "seed": context.config.seed,
        "fingerprint": context.config.fingerprint(),
        "commit": versions.pop("commit"),
        "hardware": versions.pop("hardware"),
        "versions": versions,
        "reference": _reference(context, made),
        "full": {
            "size_bytes": context.full_bytes,
            "num_params": int(concrete.num_params(context.encoder.dims, full(context.space))),
            "num_flops": int(concrete.num_flops(context.encoder.dims, full(context.space))),
        },
        "grid": _grid(context, made),
        "search": _search(context, made),
        "edges": edge_rows,
        "devices": device_rows,
        "similarity": similarity_rows,
        **({"data_quality": quality_rows} if quality_rows else {}),
        "summary": _summary(device_rows),
        "traffic": _traffic(context, post, device_rows),
    }


def export(context: Context, made: Cloud, edges: list[Edge], results: dict[str, Any]) -> None:
    """Writes every device's final model under devices/."""
    rows = {row["device"]: row for row in results["devices"]}
    more = {} if context.tokenizer is None else {"tokenizer.json": context.tokenizer}
    for edge, outcome in enumerate(edges):
        states, masks = (
            _rows(outcome.cohort.devices, "wasserstein"),
            _compact_masks(context, outcome),
        )
        cell = outcome.header.cell
        for place, device in enumerate(edge_devices(context.devices, edge)):
            slots = jax.tree.map(lambda leaf, place=place: leaf[place], states.params)
            model = device_model.from_masked(
                context.encoder,
                context.header_dims,
                cell,
                outcome.backbone,
                header_slots.from_slots(slots, cell, context.header_dims),
                masks[place],
                context.class_names,
            )
            row = rows[device.id]
            facts = {name: row[name] for name in _CARD_FACTS}
            facts |= {name: results[name] for name in ("preset", "seed", "commit", "fingerprint")}
            facts["test_accuracy"] = row["accuracy"]["wasserstein"]
            facts["arch"] = [np.asarray(leaf).tolist() for leaf in made.choices[edge].arch]
            device_folder.write(model, context.session.run.path / row["model"], facts, more)


def measure_timing(context: Context, peak_flops_per_s: float) -> dict[str, Any]:
    """Seconds by phase of this start of the run, memory, and the FLOP rate of training."""
    records = context.session.reporter.timer.records
    rates = benchmark.training_rates(context, records)
    achieved = rates.get("depth distillation")
    return {
        "phases": [record._asdict() for record in records],
        "total_seconds": sum(record.seconds for record in records),
        "peak_memory_bytes": peak_memory_bytes(),
        "matmul_peak_flops_per_s": peak_flops_per_s,
        "supernet_flops_per_s": achieved,
        "supernet_fraction": None if achieved is None else achieved / peak_flops_per_s,
    }


def _reference(context: Context, made: Cloud) -> dict[str, float]:
    select, test = context.splits.select, context.splits.test
    inputs = jnp.asarray(np.concatenate([select.inputs, test.inputs]))
    classes = np.asarray(
        _reference_classes(made.reference, inputs, context.encoder, context.eval_batch)
    )
    return {
        "test_accuracy": float(np.mean(classes[len(select) :] == test.labels)),
        "select_accuracy": float(np.mean(classes[: len(select)] == select.labels)),
    }


@functools.partial(jax.jit, static_argnums=(2, 3))
def _reference_classes(
    params: Params, inputs: Array, encoder: EncoderConfig, batch_size: int | None
) -> Array:
    def classes(inputs: Array) -> Array:
        return jnp.argmax(supernet.apply(params, inputs, encoder).logits, axis=-1)

    return cloud.in_batches(classes, batch_size, inputs)


def _grid(context: Context, made: Cloud) -> list[dict[str, Any]]:
    archs = jax.tree.map(np.asarray, concrete.grid(context.space))
    accuracy = jax.jit(
        lambda params, inputs, labels: cloud.accuracy(
            params,
            inputs,
            labels,
            context.encoder,
            context.space,
            archs,
            context.mesh,
            context.eval_batch,
        )
    )
    splits = (context.splits.select, context.splits.test)
    inputs = np.concatenate([split.inputs for split in splits])
    nobody = [np.full(len(split), -1, np.int32) for split in splits]

    def measured(number: int) -> np.ndarray:
        # Both splits in one shape, so one program; the other split's labels match nothing.
        labels = np.concatenate(
            [split.labels if i == number else nobody[i] for i, split in enumerate(splits)]
        )
        values = np.asarray(accuracy(made.supernet, inputs, labels), np.float64)
        return np.rint(values * len(inputs)) / len(splits[number])

    select, test = measured(0), measured(1)
    sizes = np.asarray(
        jax.jit(jax.vmap(functools.partial(concrete.size_bytes, context.backbone_dims)))(archs)
    )
    return [
        {
            "width": float(archs.heads[i, 0]) / context.encoder.num_heads,
            "depth": float(archs.depth[i]) / context.encoder.num_layers,
            "size_bytes": int(sizes[i]),
            "select_accuracy": float(select[i]),
            "test_accuracy": float(test[i]),
        }
        for i in range(archs.depth.shape[0])
    ]


def _search(context: Context, made: Cloud) -> dict[str, Any]:
    archive, config = made.search.state.archive, context.config.search
    valid = np.asarray(archive.valid)
    objectives = np.asarray(archive.objectives, np.float64)[valid]
    row = np.cumsum(valid) - 1  # place among the valid rows
    return {
        "objective_names": list(cloud.OBJECTIVES),
        "archive": objectives.tolist(),
        "hypervolume": [float(v) for v in made.search.hypervolume],
        "num_evaluations": config.population_size * config.num_generations,
        "ideal": objectives.min(axis=0).tolist(),
        "nadir": objectives.max(axis=0).tolist(),
        "num_divisions": config.num_divisions,
        "choices": [
            {
                "edge": edge,
                "index": int(row[choice.row]),
                "rule": config.rule,
                "budget_bytes": made.limits[edge],
            }
            for edge, choice in enumerate(made.choices)
        ],
    }


def _edge_row(context: Context, made: Cloud, edge: int, outcome: Edge) -> dict[str, Any]:
    choice, found = made.choices[edge], outcome.header
    error, size, latency, energy = (float(v) for v in choice.objectives)
    arch = choice.arch
    return {
        "edge": edge,
        "budget_bytes": min(d.budget_bytes for d in edge_devices(context.devices, edge)),
        "depth": int(arch.depth),
        "heads": np.asarray(arch.heads).tolist(),
        "neurons": np.asarray(arch.neurons).tolist(),
        "kept_layers": list(kept_blocks(arch)),
        "size_bytes": int(size),
        "num_params": int(concrete.num_params(context.backbone_dims, arch)),
        "num_flops": int(concrete.num_flops(context.backbone_dims, arch)),
        "latency_s": latency,
        "energy_j": energy,
        "select_accuracy": 1.0 - error,
        "cell": [list(block) for block in found.cell],
        "header_params": int(num_params(context.header_dims, found.cell)),
        "header_select_accuracy": found.select_accuracy,
        "candidate_accuracies": found.candidate_accuracies,
        "linear_select_accuracy": found.linear_select_accuracy,
    }


def _device_rows(context: Context, edge: int, outcome: Edge, arch: Arch) -> list[dict[str, Any]]:
    from acme_jax.system import compute_features, stack_devices  # system imports this module

    devices = edge_devices(context.devices, edge)
    tokens = [compute_features(context, outcome.backbone, d.test.inputs)[0] for d in devices]
    data = stack_devices(context, tokens, [d.test.labels for d in devices])
    accuracies = _accuracies(context, outcome, data)
    masks = _compact_masks(context, outcome)
    return [
        _device_row(
            context,
            device,
            arch,
            outcome,
            masks[place],
            {name: float(values[place]) for name, values in accuracies.items()},
        )
        for place, device in enumerate(devices)
    ]


def _accuracies(context: Context, outcome: Edge, data: ClientData) -> dict[str, np.ndarray]:
    """Accuracy [C] on the devices' test splits of every method."""
    cohort, count = outcome.cohort, data.size.shape[0]
    start = initial_cohort(
        context, outcome.header.cell, outcome.header.params, outcome.header.linear, outcome.mixing
    )
    rows = {"unpersonalized": _rows(start.devices, "no_pruning")} | {
        method: _rows(cohort.devices, method) for method in METHODS
    }
    everything = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *rows.values())
    tiled = ClientData(
        *(jnp.asarray(np.concatenate([np.asarray(leaf)] * len(rows))) for leaf in data)
    )
    values = np.asarray(_evaluate(everything, tiled, context.header_dims)).reshape(-1, count)
    found = dict(zip(rows, values, strict=True))
    linear = np.asarray(_evaluate_linear(cohort.linear, data))
    return {"unpersonalized": found.pop("unpersonalized"), "linear": linear} | found


_evaluate = jax.jit(device_tier.evaluate, static_argnums=2)
_evaluate_linear = jax.jit(device_tier.evaluate_linear)


def _rows(states: DeviceState, method: str) -> DeviceState:
    """One method's rows of a cohort, as NumPy."""
    count = states.mask.shape[0] // len(METHODS)
    first = METHODS.index(method) * count
    return jax.tree.map(lambda leaf: np.asarray(leaf)[first : first + count], states)


def _compact_masks(context: Context, outcome: Edge) -> np.ndarray:
    """ACME's gate masks [C, G] in the compact form."""
    gates = header_slots.gate_positions(context.header_dims, outcome.header.cell)
    return np.asarray(_rows(outcome.cohort.devices, "wasserstein").mask)[:, gates]


def _device_row(
    context: Context,
    device: Device,
    arch: Arch,
    outcome: Edge,
    mask: np.ndarray,
    accuracy: dict[str, float],
) -> dict[str, Any]:
    dims, cell = context.header_dims, outcome.header.cell
    backbone_flops = int(concrete.num_flops(context.backbone_dims, arch))
    header_flops = int(num_flops(dims, cell, mask))
    header_bytes = BYTES_PER_PARAM * int(num_params(dims, cell, mask))
    profile, model = device.profile, context.device_cost_model(device)
    latency = float(concrete.latency_s(context.backbone_dims, arch, model))
    energy = float(concrete.energy_j(context.backbone_dims, arch, model))
    # A measured table knows no headers: they run at the rate that the backbone reaches.
    rate = float(profile.flops_per_s) if model is profile else backbone_flops / latency
    header_latency = header_flops / rate
    return {
        "device": device.id,
        "edge": device.edge,
        "budget_bytes": device.budget_bytes,
        "num_train": len(device.train),
        "num_test": len(device.test),
        "labels": device.labels,
        "size_bytes": int(concrete.size_bytes(context.backbone_dims, arch)) + header_bytes,
        "num_flops": backbone_flops + header_flops,
        "latency_s": latency + header_latency,
        "energy_j": energy
        + header_latency * float(profile.idle_power_w)
        + header_flops * float(profile.energy_per_flop_j)
        + header_bytes * float(profile.energy_per_byte_j),
        "accuracy": accuracy,
        "gates_total": int(mask.size),
        "gates_pruned": int((mask == 0).sum()),
        "pruned_by_layer": {
            point.name: [int((mask[point.start : point.stop] == 0).sum()), point.stop - point.start]
            for point in gate_layout(dims, cell)
        },
        "model": f"devices/{device.id:03d}",
    }


def _similarity_row(context: Context, edge: int, outcome: Edge) -> dict[str, Any]:
    mixing = outcome.mixing
    return {
        "edge": edge,
        "measure": context.config.refine.similarity,
        "devices": [device.id for device in edge_devices(context.devices, edge)],
        "distance": mixing.distance.tolist(),
        "similarity": mixing.similarity.tolist(),
        "weights": mixing.wasserstein.tolist(),
        "js_weights": mixing.js.tolist(),
    }


def _summary(devices: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    summary = {}
    for method in devices[0]["accuracy"]:
        values = sorted(device["accuracy"][method] for device in devices)
        worst = values[: max(1, len(values) // 10)]
        summary[method] = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "worst_tenth": statistics.fmean(worst),
        }
    return summary


def _traffic(context: Context, post: Post, devices: list[dict[str, Any]]) -> dict[str, Any]:
    uplink, downlink = messages.centralized_baseline(
        [device["num_train"] for device in devices],
        context.sample_bytes,
        [device["size_bytes"] for device in devices],
    )
    return {
        "records": post.to_records(),
        "uplink_bytes": post.ledger.total(direction="up"),
        "downlink_bytes": post.ledger.total(direction="down"),
        "centralized_uplink_bytes": uplink,
        "centralized_downlink_bytes": downlink,
    }
