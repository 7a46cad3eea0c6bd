"""Tables and the picture of the methods' comparison, on a made-up document."""

import sys
from pathlib import Path

import pytest

from acme_jax.experiments.methods import DISTRIBUTIONS
from acme_jax.methods.registry import METHODS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import results_methods

NAMES = ("start", *METHODS)
SEEDS = (0, 1)


def _row(name, seed, unit):
    place = NAMES.index(name)
    accuracy = 0.5 + 0.01 * place + 0.1 * seed + 0.02 * list(DISTRIBUTIONS).index(unit)
    return {
        "seed": seed,
        "unit": unit,
        "method": name,
        "test_accuracy": accuracy,
        "worst_tenth_accuracy": accuracy - 0.2,
        "up_bytes": 1000.0 * place,
        "down_bytes": 2000.0 * place,
        "device_flops": 1e9 * place,
        "seconds": 2.0 * place,
        "num_devices": 12,
    }


@pytest.fixture(scope="module")
def document():
    rows = [_row(name, seed, unit) for name in NAMES for seed in SEEDS for unit in DISTRIBUTIONS]
    return {"seeds": SEEDS, "rows": rows}


def _cells(lines, title):
    (line,) = [line for line in lines if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_accuracies_are_means_over_seeds_and_differences_are_paired(document):
    cells = _cells(results_methods.accuracy(document), "FedAvg")
    # 0.52, 0.62 under the first distribution; 0.04 more in the mean over all five.
    assert cells[1].startswith("57.0 ±")
    assert cells[-2].startswith("61.0 ±")
    assert cells[-1] == "+1.0 ± 0.0"


def test_costs_are_compared_with_fedavg(document):
    cells = _cells(results_methods.costs(document), "Ditto")
    place, base = NAMES.index("ditto"), NAMES.index("fedavg")
    assert cells[2:5] == [f"{place:.1f}", f"{2 * place:.1f}", f"{place:.2f}"]
    assert cells[5:8] == [f"{12 / (2 * place):.3g}", f"{base / place:.2f}", "1.00"]
    assert cells[8] == "no"


def test_every_headline_is_of_a_method_and_is_answered(document):
    lines = results_methods.headlines(document)
    assert len(lines) == 2 + len(results_methods.HEADLINES.keys() & METHODS.keys())
    places = [NAMES.index(name) for name in ("fedprox", "fedavg")]
    assert _cells(lines, "FedProx")[2] == f"+{places[0] - places[1]:.1f} ± 0.0 against FedAvg"


def test_the_picture_names_every_method(document):
    figure = results_methods.bytes_figure(document)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert sorted(texts) == sorted([m.title for m in METHODS.values()] + ["the start"])
