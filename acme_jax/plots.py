"""The pictures of a finished run, drawn from its results and saved as PNG.

Figures are made without pyplot, so nothing global changes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from acme_jax import plot_cloud, plot_fleet
from acme_jax.plot_style import RC
from acme_jax.wording import Results

_DPI = 100
FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "pareto_front": plot_cloud.figure_pareto_front,
    "grid": plot_cloud.figure_grid,
    "hypervolume": plot_cloud.figure_hypervolume,
    "accuracy": plot_fleet.figure_accuracy,
    "similarity": plot_fleet.figure_similarity,
    "pruned": plot_fleet.figure_pruned,
    "traffic": plot_fleet.figure_traffic,
}
"""Every picture's name and the function that draws it, in the report's order."""


def write_plots(results: Results, directory: Path) -> dict[str, Path]:
    """Saves every picture that the results allow as directory/name.png.

    Returns:
      The files by name, in the order in which a report shows them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    with matplotlib.rc_context(RC):
        for name, draw in FIGURES.items():
            figure = draw(results)
            if figure is not None:
                files[name] = directory / f"{name}.png"
                # No time stamp: equal results give equal files.
                figure.savefig(files[name], dpi=_DPI, metadata={"Software": None})
    return files
