"""Compares accuracy predictors, and searches with and without early rejection.

    python scripts/compare_surrogates.py [--results docs/bench_main.json ...] [--seeds 10]
        [--out docs/surrogates.json]

Part 1: leave-one-out error, rank correlation and calibration of polynomials and of the
Performance Law on 16 uniform sub-networks: those the ACME paper (ICDCS 2025) publishes for
its linear header, and those of each run given (select split). (The mean of the other
points orders points exactly backwards: the control's correlation of -1 is no defect.) Part 2:
hypervolume of all evaluated points at equal numbers of true evaluations, on an elastic
Transformer with the synthetic error of `synthetic_error`. Prints Markdown tables; about two
minutes on 2 cores.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from acme_jax.run_dir import versions
from nas import arch, cost, early_rejection, nsga2, pareto, surrogate, validation
from nas.performance_law import performance_law
from nas.surrogate import Surrogate, polynomial

# Test accuracy of the paper's linear header; rows: depth 3, 6, 9, 12, columns: width 3 to 12.
PAPER = np.asarray([
    [0.2262, 0.3375, 0.3990, 0.4381],
    [0.4236, 0.6401, 0.7337, 0.7921],
    [0.6206, 0.8075, 0.8723, 0.8955],
    [0.7054, 0.8677, 0.9060, 0.9207],
])  # fmt: skip
UNITS = 12  # fractions times 12, as the paper counts depth and width
PREDICTORS: dict[str, Surrogate] = {
    "mean (control)": surrogate.constant(),
    "polynomial 1": polynomial(1),
    "polynomial 2": polynomial(2),
    "polynomial 2, no penalty (ACME)": polynomial(2, penalty=1e-6),
    "polynomial 3": polynomial(3),
    "Performance Law": performance_law(),
}

SPACE = arch.ArchSpace.from_fractions(12, 12, 96)
DIMS = cost.ModelDims(12, 96, 12, 8, 96, 17, 48, 10)
FULL_PARAMS = cost.num_params(DIMS, arch.full(SPACE))
FULL_FLOPS = cost.num_flops(DIMS, arch.full(SPACE))
REFERENCE = jnp.asarray([1.0, 1.0, 1.0])
POPULATION = 32
ROUGHNESS = (0.0, 0.02, 0.1)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compare."""

    results: tuple[Path, ...] = ()
    """results.json of runs, for their 16 uniform sub-networks."""
    seeds: int = 10
    generations: int = 20
    """Populations of 32 evaluated by each search."""
    factor: int = 4
    out: Path | None = None
    """JSON file to write; None prints only."""


def grids(paths: tuple[Path, ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (depth and width [N, 2] in units, accuracy [N]) of every grid given."""
    pairs = [(depth, width) for depth in (3, 6, 9, 12) for width in (3, 6, 9, 12)]
    found = {"paper, linear header": (np.asarray(pairs, float), PAPER.ravel())}
    for path in paths:
        document = json.loads(path.read_text())
        if "grid" in document:
            measured = {str(path): document["grid"]}
        elif "grids" in document:
            names = [f"{document['preset']}, seed {seed}" for seed in document["seeds"]]
            measured = dict(zip(names, document["grids"], strict=True))
        else:
            sys.exit(
                f"{path} holds no grid of sub-networks; expected the results.json of a run, or "
                "what scripts/bench_main.py writes"
            )
        for name, rows in measured.items():
            x = np.asarray([(UNITS * row["depth"], UNITS * row["width"]) for row in rows])
            found[name] = (x, np.asarray([row["select_accuracy"] for row in rows]))
    return found


def judge_predictors(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Leave-one-out quality of every predictor."""
    report = {}
    for name, model in PREDICTORS.items():
        # Bound now: a lambda in a loop would see the last model.
        left_out = jax.jit(lambda x, y, model=model: validation.leave_one_out(model, x, y))
        quality = validation.assess(left_out(x, y), jnp.asarray(y))
        report[name] = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), quality._asdict())
    return report


def synthetic_error(genome: arch.Arch, roughness: jax.Array) -> jax.Array:
    """An error [] in (0, 1) with diminishing returns, unequal blocks, and a rough part.

    0.08 + 0.82 exp(-2.5 s), s being the mean over blocks of importance_l * heads^0.4 *
    neurons^0.3 (as fractions; importance falls from 1.5 to 0.5 over the blocks), plus
    roughness * z, where z is a fixed standard Gaussian of the whole genome that no smooth
    predictor can know. It resembles no measured network in particular.
    """
    kept = arch.keep_mask(SPACE.num_layers, genome.depth)
    importance = jnp.linspace(1.5, 0.5, SPACE.num_layers)
    heads, neurons = genome.heads / SPACE.num_heads, genome.neurons / SPACE.num_neurons
    strength = jnp.mean(kept * importance * heads**0.4 * neurons**0.3)
    genes = jnp.concatenate([genome.depth[None], genome.heads, genome.neurons])
    odd = 2 * np.random.default_rng(7).integers(2**31, size=genes.size, dtype=np.uint32) + 1
    key = jax.random.key(jnp.sum(genes.astype(jnp.uint32) * odd))
    return 0.08 + 0.82 * jnp.exp(-2.5 * strength) + roughness * jax.random.normal(key)


def costs(genome: arch.Arch) -> jax.Array:
    """Parameters and operations [2], as parts of the full network's."""
    params, flops = cost.num_params(DIMS, genome), cost.num_flops(DIMS, genome)
    return jnp.stack([params / FULL_PARAMS, flops / FULL_FLOPS])


def search_volumes(
    searcher: nsga2.Searcher, arguments: Arguments
) -> list[tuple[np.ndarray, dict[str, float]]]:
    """For each roughness, hypervolume [seeds, checkpoints] and the predictor's quality.

    The volume is that of all points evaluated until the checkpoint.
    """

    @jax.jit
    def one(key: jax.Array, roughness: jax.Array) -> tuple[jax.Array, Any]:
        def evaluate(genome: arch.Arch) -> jax.Array:
            return jnp.concatenate([synthetic_error(genome, roughness)[None], costs(genome)])

        def generation(state: Any, number: jax.Array) -> tuple[Any, jax.Array]:
            children = searcher.ask(jax.random.fold_in(key, number + 1), state)
            objectives = jax.vmap(evaluate)(children)
            return searcher.tell(state, children, objectives)[0], objectives

        state = searcher.init(jax.random.fold_in(key, 0), 3, REFERENCE)
        state, every = jax.lax.scan(generation, state, jnp.arange(arguments.generations))
        volumes = [
            pareto.hypervolume(every[:number].reshape(-1, 3), REFERENCE)
            for number in checkpoints(arguments)
        ]
        wrapped = isinstance(state.memory, early_rejection.RejectionMemory)
        return jnp.stack(volumes), early_rejection.mean_quality(state) if wrapped else ()

    keys = jax.random.split(jax.random.key(0), arguments.seeds)
    return [
        (np.stack(volumes), _average(quality))
        for volumes, quality in (
            zip(*(one(key, jnp.asarray(roughness)) for key in keys), strict=True)
            for roughness in ROUGHNESS
        )
    ]


def _average(quality: tuple[Any, ...]) -> dict[str, float]:
    """Mean over seeds of what is reported of a predictor; empty without one."""
    if not quality[0]:
        return {}
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *quality)
    report = {name: float(getattr(mean, name)) for name in ("kendall_tau", "spearman_rho", "rmse")}
    for level, covered in zip(early_rejection.LEVELS, mean.coverage, strict=True):
        report[f"coverage_{level}"] = float(covered)
    return report


def checkpoints(arguments: Arguments) -> list[int]:
    """Generations after which searches are compared: a quarter, half and all."""
    total = arguments.generations
    return [max(1, total // 4), max(1, total // 2), total]


def searchers(arguments: Arguments) -> dict[str, nsga2.Searcher]:
    """NSGA-II as it is, and wrapped; the control predicts nothing but knows the costs."""
    inner = nsga2.nsga2(SPACE, population_size=POPULATION, archive_capacity=0,
                        track_hypervolume=False)  # fmt: skip

    def wrap(
        model: Surrogate, features: Callable[..., jax.Array], rule: early_rejection.Rule
    ) -> nsga2.Searcher:
        return early_rejection.with_early_rejection(
            inner,
            model,
            lambda genome: features(SPACE, genome),
            costs,
            factor=arguments.factor,
            capacity=256,
            rule=rule,
            margin=1.0 if rule == "dominated" else 0.0,
        )

    genes, sizes = surrogate.gene_features, surrogate.depth_and_width
    return {
        "NSGA-II": inner,
        "mean of all errors (control), promising": wrap(surrogate.constant(), genes, "promising"),
        "polynomial 1 of genes, promising": wrap(polynomial(1), genes, "promising"),
        "polynomial 1 of genes, dominated": wrap(polynomial(1), genes, "dominated"),
        "polynomial 2 of depth and width, promising": wrap(polynomial(2), sizes, "promising"),
        "Performance Law, promising": wrap(performance_law(), sizes, "promising"),
        "Performance Law, dominated": wrap(performance_law(), sizes, "dominated"),
    }


def compare_searches(arguments: Arguments) -> dict[str, Any]:
    """Every searcher on every roughness: volumes, and differences to plain NSGA-II by seed."""
    report: dict[str, Any] = {f"roughness {roughness}": {} for roughness in ROUGHNESS}
    plain: list[np.ndarray] = []
    for name, searcher in searchers(arguments).items():
        print(name, file=sys.stderr)
        found = search_volumes(searcher, arguments)
        plain = plain or [volumes for volumes, _ in found]
        for rows, (volumes, quality), base in zip(report.values(), found, plain, strict=True):
            gain = volumes - base
            rows[name] = {
                "hypervolume": volumes.tolist(),
                "mean": volumes.mean(0).tolist(),
                "gain_mean": gain.mean(0).tolist(),
                "gain_standard_error": (gain.std(0, ddof=1) / np.sqrt(len(gain))).tolist(),
                "seeds_above_plain": (gain > 0).sum(0).tolist(),
                "predictor": quality,
            }
    return report


def print_tables(report: dict[str, Any]) -> None:
    """The two parts as Markdown."""
    for name, rows in report["grids"].items():
        print(f"\n{name}, leave-one-out\n")
        print("| predictor | RMSE | worst | Kendall | Spearman | cover 50/80/90/95 % |")
        print("|---|---|---|---|---|---|")
        for predictor, q in rows.items():
            covered = "/".join(f"{100 * share:.0f}" for share in q["coverage"])
            print(
                f"| {predictor} | {q['rmse']:.4f} | {q['worst_error']:.4f} | "
                f"{q['kendall_tau']:.2f} | {q['spearman_rho']:.2f} | {covered} |"
            )
    evaluations = [POPULATION * number for number in report["checkpoints"]]
    for name, rows in report["searches"].items():
        print(f"\n{name}: hypervolume, and gain over NSGA-II (standard error; seeds above)\n")
        print("| search | " + " | ".join(f"{n} evaluations" for n in evaluations)
              + " | Kendall | cover 90 % |")  # fmt: skip
        print("|---" * (len(evaluations) + 3) + "|")
        for searcher, row in rows.items():
            cells = [
                f"{mean:.4f}, {gain:+.4f} ({error:.4f}; {above})"
                for mean, gain, error, above in zip(
                    row["mean"], row["gain_mean"], row["gain_standard_error"],
                    row["seeds_above_plain"], strict=True,
                )
            ]  # fmt: skip
            q = row["predictor"]
            cells += [f"{q['kendall_tau']:.2f}", f"{q['coverage_0.9']:.2f}"] if q else ["", ""]
            print(f"| {searcher} | " + " | ".join(cells) + " |")


def main() -> None:
    """Compares, prints and writes."""
    arguments = tyro.cli(Arguments)
    if arguments.seeds < 2:
        sys.exit("--seeds must be at least 2: the standard error needs them")
    found = versions()
    report = {
        "command": " ".join(["python scripts/compare_surrogates.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": found.pop("commit"),
        "hardware": found.pop("hardware"),
        "versions": found,
        "seeds": arguments.seeds,
        "population": POPULATION,
        "checkpoints": checkpoints(arguments),
        "levels": list(validation.LEVELS),
        "grids": {name: judge_predictors(*grid) for name, grid in grids(arguments.results).items()},
        "searches": compare_searches(arguments),
    }
    print_tables(report)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
