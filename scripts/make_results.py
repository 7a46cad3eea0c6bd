"""Writes the tables and pictures of docs/RESULTS.md and docs/METHODS.md from committed JSON.

    python scripts/make_results.py [EXPERIMENT ...] [--dataset fashion_mnist]

The JSON is what `scripts/reproduce.py ... --out docs/results` writes. Each experiment has a module
`results_EXPERIMENT` with TABLES, FIGURES and `claims`; so has the comparison `components` of
`scripts/compare_components.py`, whose JSON is components.json whatever its data set is.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import page
import tyro
from results_claims import Claim

from acme_jax.experiments.registry import EXPERIMENTS
from acme_jax.plot_style import RC

COMPONENTS = "components"
ON_METHODS_PAGE = ("methods", COMPONENTS)
DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to make."""

    experiments: Annotated[tuple[str, ...], tyro.conf.Positional] = (*EXPERIMENTS, COMPONENTS)
    """Whose tables and pictures; the table of claims needs all of docs/RESULTS.md's."""
    dataset: str = "fashion_mnist"
    results: Path = DOCS / "results"
    """Where the JSON lies and the pictures go."""
    pages: Path = DOCS
    """Directory of RESULTS.md and METHODS.md, with a place for every table."""


def load(directory: Path, experiment: str, dataset: str) -> dict[str, Any]:
    """One experiment's document.

    Raises:
      SystemExit: it is not there; says how to make it.
    """
    path = directory / f"{experiment}-{dataset}.json"
    command = f"reproduce.py {experiment} --dataset {dataset} --out {directory}"
    if experiment == COMPONENTS:
        path = directory / f"{COMPONENTS}.json"
        command = f"compare_components.py --out {path}"
    if not path.exists():
        raise SystemExit(f"error: {path} is missing; make it: python scripts/{command}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def source(document: dict[str, Any]) -> list[str]:
    """How one experiment's numbers came about."""
    commits = ", ".join(
        ("changed after " if "-dirty" in commit else "") + commit[:9]
        for commit in document.get("commits") or [document["commit"]]
    )
    hardware = document["hardware"]
    packages = document.get("packages") or document["versions"]
    return [
        f"`{document['command']}`, {document['date']}, commit {commits}, "
        f"{document['seconds'] / 60 / len(document['seeds']):.1f} minutes a seed (the supernet's "
        f"training apart) on {hardware['cpu_cores']} cores of {hardware['cpu']}, JAX "
        f"{packages['jax']}."
    ]


def claims_table(claims: list[Claim]) -> list[str]:
    """Every claim beside what was measured."""
    return [
        "| claim | paper | here | verdict |",
        "|---|---|---|---|",
        *(f"| {c.claim} | {c.paper} | {c.ours} | **{c.verdict}** |" for c in claims),
    ]


def main() -> None:
    """Fills the pages and draws every picture."""
    arguments = tyro.cli(Arguments)
    results: dict[str, list[str]] = {}
    methods: dict[str, list[str]] = {}
    claims: list[Claim] = []
    for name in arguments.experiments:
        document = load(arguments.results, name, arguments.dataset)
        module = importlib.import_module(f"results_{name}")
        tables = methods if name in ON_METHODS_PAGE else results
        tables[f"{name}_source"] = source(document)
        tables |= {title: table(document) for title, table in module.TABLES.items()}
        seeds = " (one seed)" if len(document["seeds"]) == 1 else ""
        claims += [claim._replace(ours=claim.ours + seeds) for claim in module.claims(document)]
        for title, draw in module.FIGURES.items():
            with mpl.rc_context(RC):
                path = arguments.results / f"{title}.png"
                draw(document).savefig(path, dpi=110, metadata={"Software": None})
    if set(arguments.experiments) >= set(EXPERIMENTS) - set(ON_METHODS_PAGE):
        results["claims"] = claims_table(claims)
    if results:
        page.fill(arguments.pages / "RESULTS.md", results)
    if methods:
        page.fill(arguments.pages / "METHODS.md", methods)


if __name__ == "__main__":
    main()
