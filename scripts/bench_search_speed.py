"""Speed of `nas.nsga2` beside pymoo and QDax, and of the alternatives that were tried.

    python scripts/bench_search_speed.py [--qdax-python PYTHON] [--alternatives] [--out FILE]

All minimise the same objective (`analytic`: three objectives, 36 genes in 0..3) for 100
generations. Contenders run in turn, each in a process of its own, for several rounds; medians
and ratios are printed, compile time apart. The rows compared keep no archive and track no
hypervolume, as the others do not; "nas, all on" has both. QDax wants an environment of its own
(`pip install qdax==0.5.0 jax==0.10.2`), whose interpreter is given; a contender that is not
installed is skipped. About four minutes on two cores, three more with the alternatives.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from search_problems import PROBLEMS

PROBLEM = PROBLEMS["analytic"]
GENERATIONS = 100

CONTENDERS = ("nas", "pymoo", "qdax", "nas, all on")
ALTERNATIVES = {
    "nas, operators genome by genome": "mutate and crossover under vmap, a key for each genome",
    "nas, categorical genes": "uniform crossover and resampling instead of SBX and polynomial",
    "nas, no retries": "repeated children are not changed again (worse fronts)",
    "nas, rbg keys": "random bits by XLA's generator instead of threefry",
    "nas, unsafe_rbg keys": "the same, key splitting too",
    "nas, sorts of several operands": "rows carried along in the sorts of survival",
    "nas, float dominance, bits": "two float comparisons per objective; fronts from bits",
    "nas, float dominance, bools": "the same; fronts from a matrix of bools",
    "nas, one core": "the same program bound to one core",
}

Search = Callable[[int], np.ndarray]
"""From a seed to the final objectives [P, M]."""


def build_nas(name: str, population: int) -> tuple[Search, float]:
    """A compiled search and the seconds that compiling took."""
    import jax
    import jax.numpy as jnp
    from search_alternatives import float_dominance, many_operand_sorts

    from nas import integer, nsga2, survival

    kind = "categorical" if "categorical" in name else PROBLEM.kind
    leaf = integer.Genes((0,) * len(PROBLEM.high), PROBLEM.high, kind)  # type: ignore[arg-type]
    operators = integer.integer_operators(leaf)
    if "genome by genome" in name:
        operators = operators._replace(vary=None, change=None)
    all_on = "all on" in name
    searcher = nsga2.nsga2(
        operators,
        population_size=population,
        archive_capacity=256 if all_on else 0,
        track_hypervolume=all_on,
        num_retries=0 if "no retries" in name else 1,
    )
    survive = {
        "nas, sorts of several operands": lambda: many_operand_sorts(population),
        "nas, float dominance, bits": lambda: float_dominance(population, packed=True),
        "nas, float dominance, bools": lambda: float_dominance(population, packed=False),
    }.get(name)
    if survive is not None:
        tell = survival.elitist_tell(survive(), track_hypervolume=False)
        searcher = searcher._replace(tell=tell)

    def search(key: jax.Array) -> nsga2.SearchResult:
        return nsga2.search(
            key, searcher, lambda genes: PROBLEM.evaluate(jnp, genes), num_generations=GENERATIONS
        )

    impl = next((i for i in ("unsafe_rbg", "rbg") if f"{i} keys" in name), "threefry2x32")
    start = time.perf_counter()
    compiled = jax.jit(search).lower(jax.random.key(0, impl=impl)).compile()
    seconds = time.perf_counter() - start

    def run(seed: int) -> np.ndarray:
        result = jax.block_until_ready(compiled(jax.random.key(seed, impl=impl)))
        return np.asarray(result.objectives)

    return run, seconds


def build_pymoo(name: str, population: int) -> tuple[Search, float]:
    """NSGA-II of pymoo in its integer setting; nothing is compiled."""
    del name
    from bench_search_quality import search_pymoo

    search = search_pymoo(PROBLEM, population, GENERATIONS)
    return lambda seed: PROBLEM.evaluate(np, search(seed))[0], 0.0


def build_qdax(name: str, population: int) -> tuple[Search, float]:
    """NSGA-II of QDax in one scan; its genomes are floats, which the objective rounds."""
    del name
    import functools

    import jax
    import jax.numpy as jnp
    from qdax.baselines.nsga2 import NSGA2
    from qdax.core.emitters.mutation_operators import polynomial_crossover, polynomial_mutation
    from qdax.core.emitters.standard_emitters import MixingEmitter

    high, num_genes = float(PROBLEM.high[0]), len(PROBLEM.high)

    def score(genomes: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        del key
        return -PROBLEM.evaluate(jnp, jnp.round(genomes))[0], {}

    emitter = MixingEmitter(
        mutation_fn=functools.partial(
            polynomial_mutation, proportion_to_mutate=0.1, eta=1.0, minval=0.0, maxval=high
        ),
        variation_fn=functools.partial(polynomial_crossover, proportion_var_to_change=0.5),
        variation_percentage=0.5,
        batch_size=population,
    )
    algorithm = NSGA2(scoring_function=score, emitter=emitter, metrics_function=lambda _: {})

    def search(key: jax.Array) -> jax.Array:
        first, second, third = jax.random.split(key, 3)
        genomes = jax.random.uniform(first, (population, num_genes), maxval=high)
        repertoire, state, _ = algorithm.init(genomes, population, second)
        carry = (repertoire, state, third)
        carry, _ = jax.lax.scan(algorithm.scan_update, carry, (), length=GENERATIONS - 1)
        return -carry[0].fitnesses

    start = time.perf_counter()
    compiled = jax.jit(search).lower(jax.random.key(0)).compile()
    seconds = time.perf_counter() - start
    return lambda seed: np.asarray(compiled(jax.random.key(seed))), seconds


def work(name: str, population: int, repeats: int, path: str) -> None:
    """One contender: the seconds of each search and the last one's objectives."""
    if "one core" in name:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    build = (
        build_nas if name.startswith("nas") else {"pymoo": build_pymoo, "qdax": build_qdax}[name]
    )
    search, compile_seconds = build(name, population)
    if compile_seconds:
        search(0)  # the first call also allocates
    seconds = []
    for seed in range(repeats):
        start = time.perf_counter()
        objectives = search(seed)
        seconds.append(time.perf_counter() - start)
    outcome = {"compile_seconds": compile_seconds, "seconds": seconds}
    Path(path).write_text(json.dumps({**outcome, "objectives": objectives.tolist()}))


def measure(python: str, name: str, population: int) -> dict[str, Any] | str:
    """A contender in a process of its own: its outcome, or why there is none."""
    repeats = 1 if name == "pymoo" else 5
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "outcome.json"
        root = str(Path(__file__).resolve().parent.parent)
        command = [python, __file__, "--work", name, str(population), str(repeats), str(path)]
        environment = {**os.environ, "PYTHONPATH": root}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
        return json.loads(path.read_text())


def compare(names: list[str], populations: list[int], rounds: int, qdax: str) -> list[dict]:
    """Every contender in turn, again and again; medians over all repeats."""
    import jax.numpy as jnp

    from nas import pareto

    rows: list[dict] = []
    for population in populations:
        outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in list(outcomes):
                outcome = measure(qdax if name == "qdax" else sys.executable, name, population)
                if isinstance(outcome, str):
                    print(f"skipped: {name} at {population}: {outcome}", file=sys.stderr)
                    del outcomes[name]
                else:
                    outcomes[name].append(outcome)
        for name, runs in outcomes.items():
            points, reference = jnp.asarray(runs[-1]["objectives"]), jnp.asarray(PROBLEM.reference)
            times = [1e3 / GENERATIONS * s for run in runs for s in run["seconds"]]
            rows.append(
                {
                    "name": name,
                    "population": population,
                    "ms": statistics.median(times),
                    "ms_best": min(times),
                    "ms_all": times,
                    "compile_seconds": statistics.median(run["compile_seconds"] for run in runs),
                    "hypervolume": float(pareto.hypervolume(points, reference)),
                }
            )
            ours = next(row["ms"] for row in rows if row["population"] == population)
            row = rows[-1]
            row["ratio"] = row["ms"] / ours
            print(
                f"{population:>6}  {name:<34}{row['ms']:9.3f} ms a generation (best "
                f"{row['ms_best']:.3f}), {row['ratio']:6.2f} x, compile "
                f"{row['compile_seconds']:.1f} s, hypervolume {row['hypervolume']:.4f}",
                flush=True,
            )
    return rows


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--populations", nargs="+", type=int, default=[128, 1024],
                        help="8192 is for a GPU")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--alternatives", action="store_true", help="measure those too")
    parser.add_argument("--qdax-python", default=sys.executable, help="interpreter with QDax")
    parser.add_argument("--out", type=Path, help="JSON file to write; without it, prints only")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, population, repeats, path = arguments.work
        work(name, int(population), int(repeats), path)
        return

    from acme_jax import run_dir

    names = ["nas", *(name for name in arguments.contenders if name != "nas")]
    contest = (arguments.populations, arguments.rounds, arguments.qdax_python)
    document: dict[str, Any] = {
        "command": "python " + shlex.join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "generations": GENERATIONS,
        "rounds": arguments.rounds,
        **run_dir.versions(),
        "rows": compare(names, *contest),
    }
    if arguments.alternatives:
        names = ["nas", *ALTERNATIVES]
        measured = compare(names, arguments.populations, 1, arguments.qdax_python)
        document["alternatives"] = [
            {
                "name": name,
                **{f"ms_{row['population']}": row["ms"] for row in measured if row["name"] == name},
                "note": note,
            }
            for name, note in {"nas": "as released", **ALTERNATIVES}.items()
        ]
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
