"""ACME end to end against other ways to get a model onto every device.

Three edges with devices of different memory (the configuration's fleet), each with a few images of
its own. ACME: the cloud's supernet, for every edge a backbone within its devices' limit and a
searched header, refinement with pruning by importances that are mixed by Wasserstein similarity.
The rivals are in `acme_jax.experiments.rival_plans`, and models of the cloud that no device
trains. All have the same local samples, the same number of local epochs and batches; the rivals'
rates are chosen on a part of the training samples set aside, ACME's is its configuration's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from acme_jax import device as device_tier
from acme_jax import exchange, refine
from acme_jax.config import Config, RefineConfig
from acme_jax.device import DeviceState
from acme_jax.experiments import (
    cohorts,
    device_costs,
    final,
    held_out,
    rival_headers,
    rival_networks,
    rival_plans,
)
from acme_jax.experiments.device_costs import Cost, Link
from acme_jax.experiments.experiment import Experiment, Row
from acme_jax.experiments.rival_headers import Rates
from acme_jax.experiments.rival_plans import EdgeSamples, Sizes
from acme_jax.experiments.study import GridPoint, Study
from acme_jax.experiments.system_edges import SystemEdge, best_within, edge_limit, make_edges
from acme_jax.fleet import Device, edge_devices
from acme_jax.post import Post
from acme_jax.system import compute_features
from fed.clients import ClientData, stack_clients
from nas import cells
from nas.arch import full

UNITS = ("c3", "dirichlet")
"""How labels differ between devices: four of ten classes each, or Dirichlet of 0.5."""

ACME = ("edge_header", "acme_unpruned", "acme")
"""Before the devices refine; local training of the header only; with pruning: ACME."""


class Samples(NamedTuple):
    """The devices' training samples of one unit."""

    networks: held_out.Parts  # raw
    edges: list[EdgeSamples]  # features
    summaries: list[ClientData]  # of each edge's devices, for their sketches


class Found(NamedTuple):
    """What came of one way to get a model onto every device."""

    accuracies: np.ndarray  # [C] on the devices' own test samples
    costs: list[Cost]  # [C]
    learning_rate: float | None


def units(config: Config) -> list[str]:
    """The distributions; the same for every configuration."""
    del config
    return list(UNITS)


def run(study: Study, unit: str) -> list[Row]:
    """Every way under one distribution of labels."""
    fleet = study.fleet(distribution=unit)
    edges = make_edges(study, fleet)
    dims = study.context.encoder.dims
    own = [best_within(study, edge_limit(fleet, e.number), dims) for e in edges]
    smallest = best_within(study, min(d.budget_bytes for d in fleet), dims)
    sizes = Sizes([own[device.edge].arch for device in fleet], smallest.arch)
    samples = draw_samples(study, edges, unit)

    network_rates, tried = rival_plans.choose_network_rates(
        study, "whole_system_rates", sizes, lambda: draw_networks(study, UNITS[0])
    )
    header_rates, headers_tried = rival_plans.choose_header_rates(
        study, f"whole_system_rates_{unit}", samples.edges
    )
    session = study.context.session
    with session.phase(f"{unit}: whole sub-networks"):
        found = _networks(study, fleet, sizes, samples, network_rates)
    with session.phase(f"{unit}: ACME and other headers"):
        found |= _headers(study, fleet, edges, samples, header_rates)
    rows = [_row(name, way, fleet) for name, way in found.items()]
    rows += [
        _edge_row(edge, edge_limit(fleet, edge.number), rival, smallest)
        for edge, rival in zip(edges, own, strict=True)
    ]
    options = (tried if unit == UNITS[0] else []) + headers_tried
    return rows + [{"kind": "option", **option} for option in options]


def draw_networks(study: Study, unit: str) -> held_out.Parts:
    """The raw training samples of a unit's devices."""
    fleet = study.fleet(distribution=unit)
    return held_out.divide([device.train.inputs for device in fleet], fleet, study.config.seed)


def draw_samples(study: Study, edges: Sequence[SystemEdge], unit: str) -> Samples:
    """The training samples of a unit's devices, raw and as features of their backbones."""
    fleet, seed = study.fleet(distribution=unit), study.config.seed
    drawn, summaries = [], []
    for edge in edges:
        devices = edge_devices(fleet, edge.number)
        features = [
            compute_features(study.context, edge.model.backbone, device.train.inputs)
            for device in devices
        ]
        parts = held_out.divide([tokens for tokens, _ in features], devices, seed)
        drawn.append(EdgeSamples(edge.number, edge.model, parts))
        pairs = [(s, d.train.labels) for (_, s), d in zip(features, devices, strict=True)]
        summaries.append(held_out.pad_rows(stack_clients(pairs)))
    return Samples(draw_networks(study, unit), drawn, summaries)


def refine_edge(
    study: Study, edge: EdgeSamples, summaries: ClientData
) -> tuple[dict[str, DeviceState], RefineConfig]:
    """ACME's devices of one edge at their start and refined, and what the edge prunes a round."""
    context, model = study.context, edge.model
    config = context.config.refine
    pruned = refine.gates_per_round(context, model.cell)
    mixing = exchange.compare(context, Post(), edge.number, summaries)
    count = summaries.size.shape[0]
    states = cohorts.refine(
        study.key("whole_system refinement", edge.number),
        config,
        context.header_dims,
        model.cell,
        model.params,
        edge.parts.everything,
        {
            "acme_unpruned": cohorts.Method(np.eye(count), 0),
            "acme": cohorts.Method(np.asarray(mixing.wasserstein), pruned),
        },
        context.mesh,
    )
    one = device_tier.init_device(model.params, model.cell, context.header_dims, 0, config)
    start: DeviceState = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * count), one)
    return {"edge_header": start, **states}, dataclasses.replace(config, prune_per_round=pruned)


def _headers(
    study: Study,
    fleet: list[Device],
    edges: list[SystemEdge],
    samples: Samples,
    chosen: Rates,
) -> dict[str, Found]:
    """ACME, and the rivals that train the edge's header."""
    context, config = study.context, study.config.refine
    dims, epochs = context.header_dims, config.rounds * config.local_epochs
    accuracies: dict[str, list[np.ndarray]] = {}
    costs: dict[str, list[Cost]] = {}
    for edge, drawn, summaries in zip(edges, samples.edges, samples.summaries, strict=True):
        model, devices = edge.model, edge_devices(fleet, edge.number)
        states, edge_config = refine_edge(study, drawn, summaries)
        masks = np.asarray(states["acme"].mask)
        gates = refine.header_slots.gate_positions(dims, model.cell)
        for name, params in rival_plans.train_headers(study, drawn, chosen).items():
            states[name] = rival_headers.states(params, model.params, model.cell, dims, config)
        evaluate = held_out.padded(cohorts.evaluator(states, dims))
        measured = final.devices(study, model.backbone, devices, evaluate)
        for name, row in zip(states, measured, strict=True):
            accuracies.setdefault(name, []).append(row)
        for place, device in enumerate(devices):
            mask = masks[place, gates]
            of_device = {
                "edge_header": device_costs.acme(context, model, device, edge_config, None),
                "acme_unpruned": device_costs.header(context, model, device, Link(0, 1), epochs),
                "acme": device_costs.acme(context, model, device, edge_config, mask),
            }
            for name in rival_plans.HEADER_RIVALS:
                link = rival_plans.header_link(name, config.rounds)
                trained = 2 if name == "ditto_header" else 1
                of_device[name] = device_costs.header(context, model, device, link, epochs, trained)
            for name, cost in of_device.items():
                costs.setdefault(name, []).append(cost)
    rates = dict.fromkeys(ACME, config.learning_rate) | {
        "edge_header": None,
        "local_header": chosen.personal,
        "fedavg_header": chosen.shared,
        "fedavg_header_tuned": chosen.shared,
        "ditto_header": chosen.personal,
    }
    return {
        name: Found(np.concatenate(rows), costs[name], rates[name])
        for name, rows in accuracies.items()
    }


def _networks(
    study: Study,
    fleet: list[Device],
    sizes: Sizes,
    samples: Samples,
    rates: dict[str, float],
) -> dict[str, Found]:
    """The cloud's models as they are, and the rivals that train whole sub-networks."""
    encoder, config = study.context.encoder, study.config.refine
    stages, count = study.stages, len(fleet)
    whole = jax.tree.map(np.asarray, full(study.context.space))
    small = [sizes.one_size] * count
    trained = {
        "cloud_full": rival_networks.start(stages.trained, [whole] * count),
        "cloud_one_size": rival_networks.start(stages.elastic, small),
        "cloud_fitted": rival_networks.start(stages.elastic, sizes.own),
        **rival_plans.train_networks(study, sizes, samples.networks, rates),
    }
    measured = final.devices(
        study, None, fleet, rival_networks.network_evaluator(study, list(trained.values()))
    )
    found = {}
    for (name, networks), accuracies in zip(trained.items(), measured, strict=True):
        rival = rival_plans.NETWORK_RIVALS.get(name)
        link, epochs, rate = Link(0, 1), 0, None
        if rival is not None:
            link = rival_plans.network_link(rival, config.rounds)
            epochs = config.rounds * config.local_epochs
            rate = rates[rival.tuned or name]
        archs = jax.tree.map(np.asarray, networks.arch)
        costs = [
            device_costs.network(
                encoder, jax.tree.map(lambda leaf, i=i: leaf[i], archs), device, link, epochs
            )
            for i, device in enumerate(fleet)
        ]
        found[name] = Found(accuracies, costs, rate)
    return found


def _row(name: str, way: Found, fleet: list[Device]) -> Row:
    worst = np.sort(way.accuracies)[: math.ceil(len(fleet) / 10)]
    edges = sorted({device.edge for device in fleet})
    by_edge = {
        f"edge{edge}_test_accuracy": float(
            np.mean([a for a, d in zip(way.accuracies, fleet, strict=True) if d.edge == edge])
        )
        for edge in edges
    }
    return {
        "kind": "method",
        "method": name,
        "test_accuracy": float(np.mean(way.accuracies)),
        "worst_tenth_test_accuracy": float(np.mean(worst)),
        **by_edge,
        "learning_rate": way.learning_rate,
        **device_costs.columns(way.costs, fleet),
    }


def _edge_row(edge: SystemEdge, limit: int, rival: GridPoint, one_size: GridPoint) -> Row:
    return {
        "kind": "edge",
        "edge": edge.number,
        "limit_bytes": limit,
        "depth": edge.point.depth,
        "width": edge.point.width,
        "header": cells.describe(edge.model.cell),
        "header_select_accuracy": edge.select_accuracy,
        "rival_depth": rival.depth,
        "rival_width": rival.width,
        "one_size_depth": one_size.depth,
        "one_size_width": one_size.width,
    }


EXPERIMENT = Experiment(
    "whole_system", "ACME end to end against other ways to get models onto devices", units, run
)
