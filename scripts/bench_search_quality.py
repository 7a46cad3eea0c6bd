"""Quality of `nas.nsga2` against pymoo's NSGA-II at equal evaluations and population.

    python scripts/bench_search_quality.py [--seeds 10] [--first-seed 0] [--problems zdt1 ...]
        [--out FILE]

For every problem, population and seed both search; genomes of the final population are
evaluated again in NumPy, and the hypervolume of the feasible ones is computed by one
function. Prints mean, deviation and ratio; the JSON has every seed's value. Needs pymoo. Ten
seeds take about ten minutes on two cores, most of it pymoo's.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from search_problems import PROBLEMS, Problem

from acme_jax import run_dir
from nas import integer, nsga2, pareto

SETTINGS = {100: 100, 1024: 100}
"""Generations for each population."""


def search_ours(problem: Problem, population: int, generations: int) -> Callable[[int], np.ndarray]:
    """A function from a seed to the final genomes [P, G]; compiled once. Defaults throughout."""
    leaf = integer.Genes((0,) * len(problem.high), problem.high, problem.kind)  # type: ignore[arg-type]
    operators = integer.integer_operators(leaf)
    searcher = nsga2.nsga2(
        operators, population_size=population, archive_capacity=0, track_hypervolume=False
    )

    def search(key: jax.Array) -> jax.Array:
        return nsga2.search(
            key,
            searcher,
            lambda genes: problem.evaluate(jnp, genes),
            num_generations=generations,
        ).population

    compiled = jax.jit(search)
    return lambda seed: np.asarray(compiled(jax.random.key(seed)))


def search_pymoo(
    problem: Problem, population: int, generations: int
) -> Callable[[int], np.ndarray]:
    """The same by pymoo, in the setting that its documentation gives for such variables."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem as Base
    from pymoo.operators.crossover.pntx import TwoPointCrossover
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.bitflip import BitflipMutation
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import BinaryRandomSampling, IntegerRandomSampling
    from pymoo.optimize import minimize

    binary = problem.kind == "categorical"

    class Wrapped(Base):
        def __init__(self) -> None:
            super().__init__(
                n_var=len(problem.high),
                n_obj=len(problem.reference),
                n_ieq_constr=int(problem.constrained),
                xl=np.zeros(len(problem.high)),
                xu=np.array(problem.high),
                vtype=bool if binary else int,
            )

        def _evaluate(self, genes: np.ndarray, out: dict[str, Any], *_: Any, **__: Any) -> None:
            objectives, violation = problem.evaluate(np, genes.astype(np.int64))
            out["F"] = objectives
            if problem.constrained:
                out["G"] = violation[:, None]

    if binary:
        operators = {
            "sampling": BinaryRandomSampling(),
            "crossover": TwoPointCrossover(),
            "mutation": BitflipMutation(),
        }
    else:
        operators = {
            "sampling": IntegerRandomSampling(),
            "crossover": SBX(vtype=float, repair=RoundingRepair()),
            "mutation": PM(vtype=float, repair=RoundingRepair()),
        }

    def search(seed: int) -> np.ndarray:
        algorithm = NSGA2(pop_size=population, eliminate_duplicates=True, **operators)
        result = minimize(Wrapped(), algorithm, ("n_gen", generations), seed=seed)
        assert result.algorithm.evaluator.n_eval == population * generations
        return result.pop.get("X").astype(np.int64)

    return search


def hypervolume(problem: Problem, genes: np.ndarray) -> float:
    """Of the feasible rows of a population, evaluated in NumPy."""
    objectives, violation = problem.evaluate(np, genes)
    usable = np.where((violation <= 0)[:, None], objectives, np.nan)
    return float(_hypervolume(jnp.asarray(usable), jnp.asarray(problem.reference)))


_hypervolume = jax.jit(pareto.hypervolume)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--populations", nargs="+", type=int, default=list(SETTINGS))
    parser.add_argument("--out", type=Path, help="JSON file to write; without it, prints only")
    arguments = parser.parse_args()

    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    contenders = {"nas": search_ours, "pymoo": search_pymoo}
    rows = []
    print(f"{'problem':<10}{'P':>6}{'G':>5}  {'nas':<18}{'pymoo':<18}ratio")
    for population in arguments.populations:
        generations = SETTINGS.get(population, 100)
        for name in arguments.problems:
            problem = PROBLEMS[name]
            row: dict[str, Any] = {
                "problem": name, "population": population, "generations": generations,
                "num_genes": len(problem.high), "reference": problem.reference,
                "kind": problem.kind,
            }  # fmt: skip
            for contender, build in contenders.items():
                start = time.perf_counter()
                search = build(problem, population, generations)
                values = [hypervolume(problem, search(seed)) for seed in seeds]
                row[contender] = {
                    "hypervolume": values,
                    "mean": statistics.fmean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                    "seconds": time.perf_counter() - start,
                }
            row["ratio"] = row["nas"]["mean"] / row["pymoo"]["mean"]
            rows.append(row)
            cells = [f"{row[c]['mean']:.4f} ± {row[c]['std']:.4f}" for c in contenders]
            print(f"{name:<10}{population:>6}{generations:>5}  {cells[0]:<18}{cells[1]:<18}"
                  f"{row['ratio']:.4f}", flush=True)  # fmt: skip
    if arguments.out is not None:
        document = {
            "command": "python " + shlex.join(sys.argv),
            "date": datetime.date.today().isoformat(),
            "seeds": list(seeds),
            **run_dir.versions(),
            "pymoo": importlib.metadata.version("pymoo"),
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
