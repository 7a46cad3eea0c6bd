"""Chooses a sub-network for each of 10,000 devices from one search, and draws who got what.

    python scripts/examples/select_for_fleet.py [--devices 10000] [--out fleet.png]

Searches the sub-networks of an elastic Vision Transformer for low error, few bytes and few
operations, once. Then each device, with a speed and limits of its own, gets the network of the
lowest error that fits all of its limits. Prints how many were served and what the first of the
others would need; draws the front. The error is a formula: put your model's in its place.
Takes about 10 s.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from nas import arch, archive, cost, fleet, nsga2

SPACE = arch.ArchSpace.from_fractions(num_layers=12, num_heads=12, num_neurons=3072)
DIMS = cost.ModelDims(12, 768, 12, 64, 3072, num_tokens=197, patch_dim=768, num_classes=1000)
LABELS = {"size_bytes": "size", "latency_s": "latency", "energy_j": "energy"}


def error(network: arch.Arch) -> jax.Array:
    """Stands in for a trained model's error []: more helps, ever less; early blocks matter."""
    kept = arch.keep_mask(SPACE.num_layers, network.depth)
    weight = kept * jnp.linspace(1.3, 0.7, SPACE.num_layers) / SPACE.num_layers
    heads = jnp.sum(weight * jnp.sqrt(network.heads / SPACE.num_heads))
    neurons = jnp.sum(weight * jnp.sqrt(network.neurons / SPACE.num_neurons))
    return 0.15 + 0.7 * jnp.exp(-2.0 * (heads + neurons))


def evaluate(networks: arch.Arch) -> jax.Array:
    """Objectives [P, 3]: error, bytes, FLOPs."""
    functions = (error, lambda a: cost.size_bytes(DIMS, a), lambda a: cost.num_flops(DIMS, a))
    return jnp.stack([jax.vmap(function)(networks) for function in functions], axis=1)


def make_fleet(count: int) -> tuple[cost.DeviceProfile, dict[str, jax.Array]]:
    """Random profiles and limits [C], log-uniform."""
    rng = np.random.default_rng(0)

    def between(low: float, high: float) -> jax.Array:
        return jnp.asarray(np.exp(rng.uniform(np.log(low), np.log(high), count)), jnp.float32)

    profiles = cost.DeviceProfile(
        flops_per_s=between(2e10, 5e11),
        bytes_per_s=between(5e9, 5e10),
        overhead_s=between(1e-5, 1e-4),
        idle_power_w=between(0.5, 4.0),
        energy_per_flop_j=between(5e-12, 5e-11),
        energy_per_byte_j=between(2e-11, 2e-10),
    )
    limits = {
        "size_bytes": between(2.5e7, 5e8),
        "latency_s": between(0.03, 2.0),
        "energy_j": between(0.1, 5.0),
    }
    return profiles, limits


def draw(front: archive.Archive, chosen: fleet.FleetSelection, path: Path) -> None:
    """The front, the devices on each of its networks, and the devices left without one."""
    feasible = np.asarray(chosen.feasible)
    served = np.bincount(np.asarray(chosen.index)[feasible], minlength=len(front.valid))
    figure, axes = plt.subplot_mosaic(
        [["front", "fates"], ["served", "fates"]],
        figsize=(11, 6),
        width_ratios=(3, 2),
        layout="constrained",
    )
    for number, depth in enumerate(sorted(set(SPACE.depth_choices))):
        rows = np.asarray(front.valid & (front.genomes.depth == depth))
        size, loss = np.asarray(front.objectives[rows, 1]) / 1e6, front.objectives[rows, 0]
        color = plt.get_cmap("viridis")(number / len(SPACE.depth_choices))
        axes["front"].scatter(size, loss, 12, color=color, label=f"{depth} blocks")
        axes["served"].vlines(size, 0, served[rows], color=color)
    axes["front"].set(ylabel="error (a formula)", title="Networks on the front")
    axes["front"].legend()
    axes["served"].set(xlabel="size of the network [MB]", ylabel="devices", ylim=(0, None))
    axes["served"].set_title(f"Devices on each network ({feasible.sum()} in all)")
    axes["served"].sharex(axes["front"])

    broken = np.stack([np.asarray(chosen.violated[name]) for name in LABELS])
    several = broken.sum(axis=0) > 1
    fates = {"got a network": feasible.sum()}
    for label, row in zip(LABELS.values(), broken, strict=True):
        fates[f"none: {label} limit\ntoo low"] = (row & ~several).sum()
    fates["none: several limits\ntoo low"] = several.sum()
    bars = axes["fates"].barh(list(fates), list(fates.values()), color="tab:red")
    bars[0].set_color("tab:green")
    axes["fates"].bar_label(bars, padding=3)
    axes["fates"].invert_yaxis()
    axes["fates"].set(xlabel="devices", xlim=(0, 1.2 * max(fates.values())))
    axes["fates"].set_title("Devices with and without a network")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Searches, chooses, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--generations", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("fleet.png"))
    arguments = parser.parse_args()

    searcher = nsga2.nsga2(SPACE, population_size=128, track_hypervolume=False)
    search = jax.jit(
        lambda key: (
            nsga2.search(key, searcher, evaluate, num_generations=arguments.generations).archive
        )
    )
    front = search(jax.random.key(0))
    profiles, limits = make_fleet(arguments.devices)

    def costs(profile: cost.DeviceProfile) -> dict[str, jax.Array]:
        """What every network of the front costs on one device."""
        functions = {
            "size_bytes": lambda a: cost.size_bytes(DIMS, a),
            "latency_s": lambda a: cost.latency_s(DIMS, a, profile),
            "energy_j": lambda a: cost.energy_j(DIMS, a, profile),
        }
        return {name: jax.vmap(f)(front.genomes) for name, f in functions.items()}

    chosen = jax.jit(
        lambda: fleet.select(
            front.objectives, costs, limits, rule="lowest_error", profiles=profiles
        )
    )()
    feasible = np.asarray(chosen.feasible)
    networks = len(np.unique(np.asarray(chosen.index)[feasible]))
    print(f"{int(front.valid.sum())} networks on the front")
    print(f"{feasible.sum()} of {arguments.devices} devices share {networks} of them; for example")
    print("  " + fleet.explain(chosen, limits, int(np.argmax(feasible))))
    if not feasible.all():
        print(f"{(~feasible).sum()} devices get none; for example")
        print("  " + fleet.explain(chosen, limits, int(np.argmin(feasible))))
    draw(front, chosen, arguments.out)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
