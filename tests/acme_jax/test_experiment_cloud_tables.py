"""Tables, pictures and claims of `backbone_grid` and `ablations`, from hand-made rows."""

import sys
from pathlib import Path

from acme_jax.experiments import ablations
from acme_jax.experiments.statistics import Estimate, estimate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import results_ablations
import results_backbone_grid

SEEDS = (0, 1, 2)


def grid_document():
    """Alone is 1 point worse with the same compute, 2 points better with the same epochs."""
    gains = {
        "trained": -0.4, "reordered": -0.3, "width_adaptive": -0.1, "elastic": 0.0,
        "same_compute": -0.01, "same_epochs": 0.02,
    }  # fmt: skip
    rows = [
        {"seed": seed, "budget": name, "epochs": epochs, "train_flops": flops}
        for seed in SEEDS
        for name, epochs, flops in (
            ("supernet", 28, 2e13), ("same_compute", 7, 1.9e13), ("same_epochs", 28, 7.6e13),
        )
    ]  # fmt: skip
    for seed in SEEDS:
        for depth in (0.5, 1.0):
            for width in (0.5, 1.0):
                for stage, gain in gains.items():
                    if stage == "same_epochs" and depth != width:
                        continue
                    narrow = 1.0 if width < 1 or not stage.endswith("ed") else 0.0
                    accuracy = 0.7 + 0.1 * depth * width + gain * narrow + 0.001 * seed
                    accuracy += 0.0005 * seed * (stage == "same_compute")
                    rows.append(
                        {
                            "seed": seed, "stage": stage, "depth": depth, "width": width,
                            "select_accuracy": accuracy, "test_accuracy": accuracy,
                        }
                    )  # fmt: skip
    return {"seeds": list(SEEDS), "rows": rows}


def test_tables_of_the_grid():
    document = grid_document()
    tables = {name: make(document) for name, make in results_backbone_grid.TABLES.items()}
    assert len(tables["backbone_grid"]) == 2 + 4 + 1
    assert "| 80.1 ± 0.2 |" in tables["backbone_grid"][5]  # the supernet at (1, 1)
    assert tables["backbone_grid"][3].count("|  |") == 1  # (0.5, 1): not trained alone for long
    assert "+1.0 ± 0.1" in tables["backbone_grid_differences"][2]
    assert "-2.0 ± 0.0" in tables["backbone_grid_differences"][2]
    assert tables["backbone_grid_budget"][-1].endswith("| 28 | 76.0 T | 3.80 |")
    for lines in tables.values():
        assert len({line.count("|") for line in lines}) == 1
    for make in results_backbone_grid.FIGURES.values():
        make(document).draw_without_rendering()


def test_claims_of_the_grid_follow_the_numbers():
    document = grid_document()
    verdicts = {claim.claim: claim.verdict for claim in results_backbone_grid.claims(document)}
    of = {key: value for claim, value in verdicts.items() for key in [claim[:18]]}
    assert of["Reordering helps w"] == "holds"
    against = [value for claim, value in verdicts.items() if "not worse" in claim]
    assert against == ["exceeds", "fails"]
    for row in document["rows"]:  # now at one sub-network alone is better
        if row.get("stage") == "same_compute" and row["depth"] == row["width"] == 0.5:
            row["test_accuracy"] += 0.02
    claims = results_backbone_grid.claims(document)
    against = [claim.verdict for claim in claims if "not worse" in claim.claim]
    assert against == ["partly", "fails"]


def ablations_document():
    rows = []
    for seed in SEEDS:
        for number, (variant, spec) in enumerate(ablations.VARIANTS.items()):
            noise = 0.002 * ((seed + number) % 3)
            worse = 0.0 if variant in ("full", "average") else 0.03
            if spec.cloud or variant == "full":
                rows.append(
                    {
                        "seed": seed, "variant": variant, "grid_select_accuracy": 0.8,
                        "grid_test_accuracy": 0.8 - worse + noise, "width_seconds": 20.0,
                        "depth_seconds": 100.0,
                        **({"reordering_seconds": 1.0} if variant == "full" else {}),
                    }
                )  # fmt: skip
            for size in (0.5, 1.0):
                row = {
                    "seed": seed, "variant": variant, "depth": size, "width": size,
                    "header_select_accuracy": 0.8, "header_params": 1000,
                    "test_accuracy": 0.85 + 0.1 * size - worse + noise,
                    "header_seconds": 10.0 if variant == "full" else 4.0,
                    "similarity_seconds": 0.01, "refine_seconds": 2.0,
                }  # fmt: skip
                if spec.cloud or variant == "full":
                    row["network_test_accuracy"] = 0.8
                rows.append(row)
    return {"seeds": list(SEEDS), "rows": rows}


def test_tables_and_claims_of_the_ablations():
    document = ablations_document()
    tables = {name: make(document) for name, make in results_ablations.TABLES.items()}
    for lines in tables.values():
        assert len({line.count("|") for line in lines}) == 1
    devices = {line.split(" | ")[0][2:]: line for line in tables["ablations_devices"][2:]}
    assert devices["without reordering"].endswith("| 1 |")
    assert devices["with a fixed cell instead of header search"].endswith("| 6 |")
    assert devices["without smoothing"].endswith("|  |")
    assert len(tables["ablations_networks"]) == 2 + 4
    results_ablations.differences_figure(document).draw_without_rendering()
    verdicts = [claim.verdict for claim in results_ablations.claims(document)]
    assert verdicts == ["holds"] * 5 + ["fails", "holds"]


def test_not_worse_needs_an_interval_that_says_so():
    cases = {
        "exceeds": Estimate(0.02, 0.01, 0.0, 3),
        "holds": Estimate(-0.002, 0.005, 0.0, 3),
        "partly": Estimate(-0.002, 0.05, 0.0, 3),
        "fails": Estimate(-0.03, 0.01, 0.0, 3),
    }
    for expected, gain in cases.items():
        assert results_backbone_grid.not_worse(gain) == expected
    assert results_backbone_grid.not_worse(estimate([-0.03])) == "fails"  # one seed
    assert results_backbone_grid.not_worse(estimate([0.01])) == "holds"
