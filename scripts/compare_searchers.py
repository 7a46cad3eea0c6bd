"""NSGA-II, NSGA-III, plain evolution and random search side by side, at equal evaluations.

    python scripts/compare_searchers.py [--seeds 10] [--generations 100] [--cases zdt1 ...]
        [--out docs/compare_searchers.json] [--picture docs/compare_searchers.png]

Every searcher keeps the same kind of archive; its hypervolume, as a share of the box between
the ideal and the reference point, is followed over the evaluations. Problems: ZDT1 (2
objectives), DTLZ2 (3 and 4), and the sub-networks of a ViT-B whose size, latency and energy
are those of `nas.cost` (4), with a made-up error. Prints mean and deviation over seeds; the
JSON has every seed's end and the curves. Ten seeds take some minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from search_problems import PROBLEMS

from acme_jax import run_dir
from acme_jax.plot_style import COLOURS, GREY, RC
from nas import arch, controls, cost, genomes, integer, nsga2, nsga3, pareto, searcher, stopping

NAMES = {"nsga2": "NSGA-II", "nsga3": "NSGA-III", "evolution": "evolution", "random": "random"}
LINES = dict(zip(NAMES, (*COLOURS[:3], GREY), strict=True))
"""The colour of each."""
CAPACITY = 256
NUM_SAMPLES = 2**15

SPACE = arch.ArchSpace.from_fractions(12, 12, 3072)
DIMS = cost.ModelDims(12, 768, 12, 64, 3072, 197, 768, 100)
PROFILE = cost.DeviceProfile(
    flops_per_s=2e12,
    bytes_per_s=2e10,
    overhead_s=5e-5,
    idle_power_w=3.0,
    energy_per_flop_j=2e-12,
    energy_per_byte_j=2e-10,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem: genomes [P] -> objectives [P, M], all minimised, from 0 to `reference`."""

    title: str
    space: arch.ArchSpace | genomes.Operators
    evaluate: searcher.Evaluate
    reference: tuple[float, ...]


def integer_case(title: str, name: str) -> Case:
    """A problem of the quality benchmark."""
    problem = PROBLEMS[name]
    leaf = integer.Genes((0,) * len(problem.high), problem.high)
    return Case(
        title,
        integer.integer_operators(leaf),
        lambda genes: problem.evaluate(jnp, genes)[0],
        problem.reference,
    )


def dtlz2_in_four() -> Case:
    """DTLZ2 (Deb et al. 2002) with 4 objectives, 13 genes of 101 values each."""

    def evaluate(genes: jax.Array) -> jax.Array:
        x = genes / 100.0
        radius = 1 + jnp.sum(jnp.square(x[:, 3:] - 0.5), axis=1)
        # Cosines as sines, which are exactly 0 at the end.
        sine, cosine = jnp.sin(x[:, :3] * (jnp.pi / 2)), jnp.sin((1 - x[:, :3]) * (jnp.pi / 2))
        columns = [radius * sine[:, 0]]
        for axis in (1, 2):
            radius = radius * cosine[:, axis - 1]
            columns.append(radius * sine[:, axis])
        return jnp.stack([*columns, radius * cosine[:, 2]], axis=1)

    operators = integer.integer_operators(integer.genes(13, 101))
    return Case("DTLZ2, 4 objectives", operators, evaluate, (1.1,) * 4)


def transformer_objectives(genome: arch.Arch) -> jax.Array:
    """Error, size [MB], latency [ms] and energy [mJ] of one sub-network, [4].

    The error is made up: 0.05 + 0.85 exp(-3 c), where the capacity c is the mean over all
    blocks of s_l (h_l^0.4 + f_l^0.4) / 2, h and f the shares of heads and neurons kept, 0 for
    dropped blocks; the sensitivity s falls from 1.5 at the first block to 0.5 at the last.
    It is smooth, has diminishing returns, and makes early blocks worth more than late ones.
    """
    kept = arch.keep_mask(SPACE.num_layers, genome.depth)
    heads, neurons = genome.heads / SPACE.num_heads, genome.neurons / SPACE.num_neurons
    sensitivity = jnp.linspace(1.5, 0.5, SPACE.num_layers)
    capacity = jnp.mean(kept * sensitivity * 0.5 * (heads**0.4 + neurons**0.4))
    return jnp.stack(
        [
            0.05 + 0.85 * jnp.exp(-3 * capacity),
            cost.size_bytes(DIMS, genome) / 1e6,
            cost.latency_s(DIMS, genome, PROFILE) * 1e3,
            cost.energy_j(DIMS, genome, PROFILE) * 1e3,
        ]
    )


def transformer() -> Case:
    """The elastic Transformer; its reference is error 1 and the costs of the full network."""
    worst = np.asarray(transformer_objectives(arch.full(SPACE)))[1:] * 1.01
    reference = (1.0, *(float(value) for value in worst))
    return Case("Elastic ViT-B, 4 objectives", SPACE, jax.vmap(transformer_objectives), reference)


CASES = {
    "zdt1": lambda: integer_case("ZDT1, 2 objectives", "zdt1"),
    "dtlz2": lambda: integer_case("DTLZ2, 3 objectives", "dtlz2"),
    "dtlz2_4": dtlz2_in_four,
    "transformer": transformer,
}


def make_searcher(name: str, case: Case, population: int) -> searcher.Searcher:
    """One of the four, at its defaults."""
    settings: dict[str, Any] = {
        "population_size": population,
        "archive_capacity": CAPACITY,
        "track_hypervolume": False,
    }
    if name == "nsga3":
        return nsga3.nsga3(case.space, num_objectives=len(case.reference), **settings)
    factories = {
        "nsga2": nsga2.nsga2,
        "evolution": controls.evolution,
        "random": controls.random_search,
    }
    return factories[name](case.space, **settings)


def compare(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every searcher on one case: curves [G] and the ends of all seeds, as shares of the box."""
    reference = jnp.asarray(case.reference)
    box = float(np.prod(case.reference))
    exact = len(case.reference) <= 3
    # One set of points for all searchers, so that they are compared on the same ones.
    track = (
        stopping.exact()
        if exact
        else stopping.monte_carlo(
            jax.random.key(0), jnp.zeros(reference.shape), num_samples=NUM_SAMPLES
        )
    )
    keys = jax.vmap(jax.random.key)(jnp.arange(arguments.seeds))
    searchers = {}
    for name in NAMES:
        made = make_searcher(name, case, arguments.population)

        def search(
            key: jax.Array, made: searcher.Searcher = made
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            result = searcher.search(
                key,
                made,
                case.evaluate,
                num_generations=arguments.generations,
                reference=reference,
                track=track,
            )
            # Once, at the end, the exact volume is affordable in 4 objectives too.
            archived = pareto.hypervolume(result.archive.objectives, reference)
            population = pareto.hypervolume(result.objectives, reference)
            return result.archive_hypervolume, archived, population

        start = time.perf_counter()
        curves, ends, populations = (
            np.asarray(values, np.float64) / box
            for values in jax.jit(lambda keys, search=search: jax.lax.map(search, keys))(keys)
        )
        searchers[name] = {
            "archive": _summary(ends),
            "population": _summary(populations),
            "curve_mean": curves.mean(axis=0).tolist(),
            "curve_std": curves.std(axis=0, ddof=min(1, len(curves) - 1)).tolist(),
            "seconds_with_compilation": time.perf_counter() - start,
        }
        print(
            f"{case.title:<30}{NAMES[name]:<12}archive {_cell(searchers[name]['archive'])}  "
            f"population {_cell(searchers[name]['population'])}",
            flush=True,
        )
    return {
        "title": case.title,
        "reference": case.reference,
        "curve_measure": "exact" if exact else f"Monte Carlo, {NUM_SAMPLES} samples",
        "searchers": searchers,
    }


def _summary(values: np.ndarray) -> dict[str, Any]:
    listed = values.tolist()
    deviation = statistics.stdev(listed) if len(listed) > 1 else 0.0
    return {"mean": statistics.fmean(listed), "std": deviation, "seeds": listed}


def _cell(summary: dict[str, Any]) -> str:
    return f"{summary['mean']:.4f} ± {summary['std']:.4f}"


def draw(results: dict[str, Any]) -> Figure:
    """Hypervolume against evaluations, a panel for each case."""
    cases = results["cases"]
    columns = min(2, len(cases))
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[len(cases) :]:
        panel.set_visible(False)
    for panel, case in zip(panels, cases.values(), strict=False):
        for name, found in case["searchers"].items():
            mean, std = np.array(found["curve_mean"]), np.array(found["curve_std"])
            evaluations = results["population"] * np.arange(1, len(mean) + 1)
            panel.plot(evaluations, mean, color=LINES[name], label=NAMES[name])
            panel.fill_between(
                evaluations,
                np.maximum(mean - std, 0),
                mean + std,
                color=LINES[name],
                alpha=0.2,
                lw=0,
            )
        panel.set_title(case["title"])
        panel.set_xlabel("evaluations")
        panel.set_ylabel("hypervolume (share of the box)")
        panel.set_xlim(0, None)
        panel.grid(alpha=0.3)
    panels[0].legend(loc="upper left")
    figure.suptitle(
        "Volume that the archive dominates, higher is better: mean and standard deviation of "
        f"{results['seeds']} seeds"
    )
    return figure


def main() -> None:
    """Compares, prints, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0")
    parser.add_argument("--population", type=int, default=100)
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to draw")
    arguments = parser.parse_args()
    results = {
        "command": "python " + shlex.join(sys.argv),
        "date": datetime.date.today().isoformat(),
        **run_dir.versions(),
        "seeds": arguments.seeds,
        "population": arguments.population,
        "generations": arguments.generations,
        "archive_capacity": CAPACITY,
        "cases": {name: compare(CASES[name](), arguments) for name in arguments.cases},
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.picture is not None:
        with matplotlib.rc_context(RC):
            draw(results).savefig(arguments.picture, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
