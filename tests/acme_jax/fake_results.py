"""A made-up but realistic run: 3 edges x 5 devices, 60 archive points, 10 rounds."""

from __future__ import annotations

from typing import Any

import numpy as np

METHODS = ("unpersonalized", "linear", "no_pruning", "alone", "avg", "js", "wasserstein")
_GAINS = {  # mean accuracy over the unpersonalised model
    "unpersonalized": 0.0,
    "linear": -0.012,
    "no_pruning": 0.021,
    "alone": 0.024,
    "avg": 0.022,
    "js": 0.026,
    "wasserstein": 0.034,
}
_LABELS = {0: [0, 1, 2, 3, 4], 1: [5, 6, 7, 8, 9], 2: [0, 1, 2, 7, 8]}
_GROUPS = (0, 1, 2, 0, 1)
FULL_BYTES = 1_205_288


def make_results(num_edges: int = 3, devices_per_edge: int = 5, seed: int = 0) -> dict[str, Any]:
    """The results dictionary of a run, as `results.json` holds it."""
    rng = np.random.default_rng(seed)
    search = _search(rng, num_edges)
    edges = [_edge(rng, edge, search) for edge in range(num_edges)]
    devices = [
        _device(rng, edge * devices_per_edge + place, edges[edge], _GROUPS[place % 5])
        for edge in range(num_edges)
        for place in range(devices_per_edge)
    ]
    accuracy = {m: np.array([d["accuracy"][m] for d in devices]) for m in METHODS}
    return {
        "preset": "mnist5k",
        "seed": seed,
        "commit": "0123abc",
        "fingerprint": "9f2c01d4e5a67b88",
        "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "numpy": "2.4.6"},
        "hardware": {"backend": "cpu", "devices": 2, "cores": 2},
        "reference": {"test_accuracy": 0.934, "select_accuracy": 0.93},
        "full": {"size_bytes": FULL_BYTES, "num_params": 301_322, "num_flops": 10_240_000},
        "grid": [_grid_point(rng, w, d) for d in (0.25, 0.5, 0.75, 1.0) for w in _WIDTHS],
        "search": search,
        "edges": edges,
        "devices": devices,
        "similarity": [_similarity(rng, edge, devices) for edge in range(num_edges)],
        "summary": {
            method: {
                "mean": float(values.mean()),
                "std": float(values.std()),
                "worst_tenth": float(np.sort(values)[: max(1, len(values) // 10)].mean()),
            }
            for method, values in accuracy.items()
        },
        "traffic": _traffic(edges, devices_per_edge),
    }


def make_timing() -> dict[str, Any]:
    """The timing dictionary of a run, as `timing.json` holds it."""
    phases = [
        ("reference", 21.4, 4.1),
        ("importance", 2.2, 1.3),
        ("width", 32.8, 6.2),
        ("depth", 44.1, 7.9),
        ("search", 14.7, 5.2),
        ("headers", 27.3, 11.8),
        ("refine", 16.2, 6.4),
        ("evaluate", 3.1, 1.0),
    ]
    return {
        "phases": [
            {"phase": name, "seconds": seconds, "compile_seconds": compile_seconds}
            for name, seconds, compile_seconds in phases
        ],
        "total_seconds": 165.3,
        "peak_memory_bytes": 2_130_000_000,
        "matmul_peak_flops_per_s": 1.92e11,
        "supernet_flops_per_s": 6.1e10,
        "supernet_fraction": 0.318,
    }


_WIDTHS = (0.25, 0.5, 0.75, 1.0)


def _grid_point(rng: np.random.Generator, width: float, depth: float) -> dict[str, float]:
    accuracy = 0.94 - 0.09 * (1 - depth) ** 2 - 0.05 * (1 - width) ** 2
    return {
        "width": width,
        "depth": depth,
        "size_bytes": int(21_000 + (FULL_BYTES - 21_000) * width * depth),
        "select_accuracy": float(accuracy + rng.normal(0, 0.004)),
        "test_accuracy": float(accuracy + rng.normal(0, 0.004)),
    }


def _search(rng: np.random.Generator, num_edges: int) -> dict[str, Any]:
    share = np.linspace(0.06, 1.0, 60) ** 1.4
    size = 21_000 + (FULL_BYTES - 21_000) * share
    error = 0.062 + 0.10 * np.exp(-5 * share) + rng.uniform(0, 0.012, 60)
    latency = 0.004 + 0.03 * share + rng.uniform(0, 0.004, 60)
    energy = 0.002 + 0.02 * share + rng.uniform(0, 0.002, 60)
    archive = np.stack([error, size, latency, energy], axis=1)
    budgets = [(0.3, 0.55, 1.0)[edge % 3] * FULL_BYTES for edge in range(num_edges)]
    trade_off = (archive / archive.max(0)).sum(1)
    choices = []
    for edge, budget in enumerate(budgets):
        score = np.where(size <= budget, error + 0.005 * trade_off, np.inf)
        choices.append(
            {
                "edge": edge,
                "index": int(np.argmin(score)),
                "rule": "trade_off",
                "budget_bytes": int(budget),
            }
        )
    return {
        "objective_names": ["error", "size_bytes", "latency_s", "energy_j"],
        "archive": archive.tolist(),
        "hypervolume": (0.71 + 0.18 * (1 - np.exp(-np.arange(20) / 4))).tolist(),
        "num_evaluations": 960,
        "ideal": archive.min(0).tolist(),
        "nadir": archive.max(0).tolist(),
        "num_divisions": 10,
        "choices": choices,
    }


def _edge(rng: np.random.Generator, edge: int, search: dict[str, Any]) -> dict[str, Any]:
    choice = search["choices"][edge]
    error, size, latency, energy = search["archive"][choice["index"]]
    kept = [[0, 2, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]][edge % 3]
    accuracies = sorted(rng.uniform(0.86, 0.935, 16).tolist(), reverse=True)
    return {
        "edge": edge,
        "budget_bytes": choice["budget_bytes"],
        "depth": len(kept),
        "heads": [1 + int(rng.integers(4)) if i in kept else 4 for i in range(6)],
        "neurons": [64 * (1 + int(rng.integers(4))) if i in kept else 256 for i in range(6)],
        "kept_layers": kept,
        "size_bytes": int(size),
        "num_params": int(size) // 4,
        "num_flops": int(size * 8.5),
        "latency_s": latency,
        "energy_j": energy,
        "select_accuracy": 1 - error,
        "cell": [[0, 0, 1, 5], [2, int(rng.integers(6)), 1, 3]],
        "header_params": 31_946,
        "header_select_accuracy": accuracies[0],
        "candidate_accuracies": accuracies,
        "linear_select_accuracy": 1 - error - 0.004,
    }


def _device(
    rng: np.random.Generator, device: int, edge: dict[str, Any], group: int
) -> dict[str, Any]:
    base = edge["select_accuracy"] + rng.normal(0, 0.025)
    num_test = 64
    accuracy = {
        method: float(np.clip(round((base + g + rng.normal(0, 0.012)) * num_test), 0, 64) / 64)
        for method, g in _GAINS.items()
    }
    slots = {0: ("block0.x.sep3x3",), 1: ("block0.x.sep3x3", "block1.x.sep1x1"), 2: ()}
    names = ["stem"]
    for layer in range(3):
        for slot in slots[edge["edge"] % 3]:
            names += [f"layer{layer}.{slot}.first", f"layer{layer}.{slot}.second"]
        names.append(f"layer{layer}.output")
    by_layer = {name: [int(rng.integers(0, 13)), 32] for name in names}
    pruned = sum(p for p, _ in by_layer.values())
    return {
        "device": device,
        "edge": edge["edge"],
        "budget_bytes": int(edge["budget_bytes"] * (1 + 0.05 * (device % 5))),
        "num_train": 96,
        "num_test": num_test,
        "labels": _LABELS[group],
        "size_bytes": edge["size_bytes"] + 4 * 31_000 - 4 * 32 * pruned,
        "num_flops": edge["num_flops"] + 820_000,
        "latency_s": edge["latency_s"] * float(rng.uniform(0.8, 1.6)),
        "energy_j": edge["energy_j"] * float(rng.uniform(0.8, 1.6)),
        "accuracy": accuracy,
        "gates_total": sum(t for _, t in by_layer.values()),
        "gates_pruned": pruned,
        "pruned_by_layer": by_layer,
        "model": f"devices/{device:03d}",
    }


def _similarity(
    rng: np.random.Generator, edge: int, devices: list[dict[str, Any]]
) -> dict[str, Any]:
    members = [d for d in devices if d["edge"] == edge]
    sets = [set(d["labels"]) for d in members]
    overlap = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    noise = rng.uniform(0, 0.02, overlap.shape)
    distance = (0.35 * (1 - overlap) + (noise + noise.T) / 2) * (1 - np.eye(len(members)))
    similarity = 1 / (1 + distance)

    def softmax(scores: np.ndarray) -> np.ndarray:
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return scores / scores.sum(1, keepdims=True)

    return {
        "edge": edge,
        "devices": [d["device"] for d in members],
        "distance": distance.tolist(),
        "similarity": similarity.tolist(),
        "weights": softmax(similarity / 0.05).tolist(),
        "js_weights": softmax(similarity / 0.8).tolist(),
    }


def _traffic(edges: list[dict[str, Any]], per_edge: int) -> dict[str, Any]:
    records = []

    def add(tier: str, direction: str, round_: int, kind: str, messages: int, size: int) -> None:
        records.append(
            {
                "tier": tier,
                "direction": direction,
                "round": round_,
                "kind": kind,
                "messages": messages,
                "bytes": size,
            }
        )

    for edge in edges:
        backbone, header = edge["size_bytes"] + 900, 4 * edge["header_params"] + 700
        add("device-edge", "up", 0, "device_profile", per_edge, 90 * per_edge)
        add("edge-cloud", "up", 0, "cluster_profile", 1, 130)
        add("edge-cloud", "down", 0, "backbone", 1, backbone)
        add("device-edge", "down", 0, "backbone", per_edge, per_edge * backbone)
        add("device-edge", "down", 0, "header", per_edge, per_edge * header)
        add("device-edge", "up", 0, "feature_sketch", per_edge, per_edge * 4_130)
        for round_ in range(1, 11):
            add("device-edge", "up", round_, "importance_set", per_edge, per_edge * 1_560)
            add("device-edge", "down", round_, "personalized_importance", per_edge, per_edge * 1560)
    up = sum(r["bytes"] for r in records if r["direction"] == "up")
    down = sum(r["bytes"] for r in records if r["direction"] == "down")
    return {
        "records": records,
        "uplink_bytes": up,
        "downlink_bytes": down,
        "centralized_uplink_bytes": len(edges) * per_edge * 96 * 785,
        "centralized_downlink_bytes": sum(
            per_edge * (e["size_bytes"] + 4 * e["header_params"]) for e in edges
        ),
    }
