"""Tables, pictures and claims of `personalization`, from a made-up document."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import results_personalization as results
from results_personalization_numbers import METHODS

from acme_jax.experiments import personal_rivals, personalization
from acme_jax.experiments.statistics import Estimate


def made_up(seeds=(0, 1, 2)):
    """ACME 5 points over no pruning, the extended one 10, everything else equal."""
    level = {"wasserstein": 0.85, "sharing_prior": 0.9, "unequal": 0.7, "random": 0.5}
    rows = []

    def add(unit, method, seed, **more):
        value = level.get(method, 0.8) + 0.001 * seed
        if method == "wasserstein":
            value += 0.0001 * seed**2
        rows.append(
            {
                "seed": seed, "unit": unit, "kind": "method", "method": method,
                "test_accuracy": value, "worst_tenth_test_accuracy": value - 0.1,
                "uplink_bytes": 1000, "train_samples": 40.0 if "samples" in unit else 200.0,
                **more,
            }
        )  # fmt: skip

    for seed in seeds:
        for unit, setting in personalization._UNITS.items():
            for v in setting.variants:
                add(unit, v.method, seed, temperature=v.temperature, part=v.part)
            for method in METHODS:
                if setting.rivals and method not in {v.method for v in setting.variants}:
                    add(unit, method, seed)
            evidence = dict.fromkeys(results.EVIDENCE, 0.5)
            rows.append({"seed": seed, "unit": unit, "kind": "evidence", **evidence})
        for name in personal_rivals.RATES:
            add("c3_remedies", name, seed)
    return {"seeds": list(seeds), "rows": rows}


def test_tables_and_claims_of_a_made_up_document():
    document = made_up()
    tables = {name: table(document) for name, table in results.TABLES.items()}
    for lines in tables.values():
        assert len({line.count("|") for line in lines}) == 1 and "nan" not in "".join(lines)
    ours = next(x for x in tables["personalization_differences"] if METHODS["wasserstein"] in x)
    assert ours.split("|")[2].strip() == "+5.0 ± 0.1"
    plain = next(x for x in tables["personalization_methods"] if x.startswith("| no pruning |"))
    assert plain.split("|")[2].strip() == "80.1 ± 0.2"
    for figure in results.FIGURES.values():
        assert figure(document).axes
    found = {claim.claim: claim for claim in results.claims(document)}
    assert found["ACME over no pruning, IID, equal schedule"].verdict == "holds"
    assert found["extended ACME best or tied with every rival"].verdict == "holds"
    assert found["importance prunes better than chance"].verdict == "holds"
    assert found["similar devices' importances beat the average of all"].verdict == "holds"


def test_verdicts():
    assert results.best_or_tied([1, 1]) == "holds"
    assert results.best_or_tied([1, 0]) == "holds"
    assert results.best_or_tied([1, -1]) == "fails"
    assert results.best([1, 1]) == "holds"
    assert results.best([1, 0]) == "partly"
    assert results.best([0, 0]) == results.best([1, -1]) == "fails"
    for mean, width, expected in (
        (0.05, 0.01, "holds"),
        (0.02, 0.01, "partly"),
        (0.05, 0.06, "fails"),
    ):
        value = Estimate(mean, width, 0.0, 3)
        assert results.gain_verdict(value, 0.04) == expected
