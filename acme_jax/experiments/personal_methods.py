"""The variants that the personalisation experiment compares, and what each sends up.

All start at the same header and train alike: rounds, epochs, batches, rate and order of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acme_jax import label_prior, messages
from acme_jax.blocks import Params
from acme_jax.config import RefineConfig
from acme_jax.experiments import cohorts, personal_rules
from acme_jax.experiments.cohorts import Method
from acme_jax.experiments.personal_fleet import FORMS, Cohort, listening
from acme_jax.experiments.personal_rules import Rule
from acme_jax.header_layout import HeaderDims, num_gates
from nas.cells import StaticCell

TEMPERATURE = 0.05
"""tau of the main comparison: devices of other labels hardly count, those of the same do."""
PART = 0.3
"""Of the gates, pruned in the main comparison."""
PSEUDO_COUNT = 0.1
"""Samples added to every class of a device's prior."""


class Variant(NamedTuple):
    """One way to personalise the edge's header."""

    method: str
    listens: str = "alone"
    """Source of the mixing weights, see `personal_fleet.listening`."""
    temperature: float | None = None
    part: float = 0.0
    """Of the gates, pruned in all rounds together."""
    rule: Rule = Rule()
    prior: bool = False
    """The device starts with the log prior of its own labels added to the classifier's bias."""

    @property
    def name(self) -> str:
        """Unique in every unit."""
        return f"{self.method} {self.temperature} {self.part}"


def _wasserstein(
    method: str = "wasserstein",
    form: str = "per_dimension",
    temperature: float = TEMPERATURE,
    part: float = PART,
    *,
    rule: Rule = Rule(),  # noqa: B008  (immutable)
    prior: bool = False,
) -> Variant:
    return Variant(method, form, temperature, part, rule, prior)


_SHARES = Rule(shares=True)
NO_PRUNING = Variant("no_pruning")
ALONE = Variant("alone", part=PART)
AVG = Variant("avg", "avg", part=PART)
OURS = _wasserstein()
"""ACME as the paper has it."""
PRIOR = Variant("no_pruning_prior", prior=True)
OURS_PRIOR = _wasserstein("wasserstein_prior", prior=True)
EXTENDED = _wasserstein("sharing_prior", part=0.0, rule=_SHARES, prior=True)
"""ACME's similarity on weights instead of importances, for devices that know their classes."""
RESTRICTED = Variant("avg_sharing_prior", "avg", rule=_SHARES, prior=True)
"""A rival: FedAvg with a softmax that knows each client's classes (as FedRS, Li and Zhan, KDD 2021,
with a smoothed prior where that scales the logits of absent classes)."""

FEWEST: tuple[Variant, ...] = (NO_PRUNING, OURS, EXTENDED, RESTRICTED)
FEW: tuple[Variant, ...] = (*FEWEST, ALONE, AVG, PRIOR, OURS_PRIOR)
MAIN: tuple[Variant, ...] = (
    *FEW,
    _wasserstein("js", "js"),
    _wasserstein("flat", "flat"),
    _wasserstein("sliced", "sliced"),
    _wasserstein("oracle", "oracle"),
    Variant("farthest", "farthest", part=PART),
    Variant("random", part=PART, rule=Rule(random=True)),
)
REMEDIES: tuple[Variant, ...] = (
    NO_PRUNING,
    _wasserstein("wasserstein_half", part=0.5),
    _wasserstein("one_shot", rule=Rule(one_shot=True)),
    _wasserstein("sharing", part=0.0, rule=_SHARES),
    _wasserstein("sharing_prior_pruned", rule=_SHARES, prior=True),
)
"""What else might make ACME better than no pruning."""

TEMPERATURES = (1.0, 0.3, 0.1, 0.05, 0.02)
PARTS = (0.1, 0.2, 0.3, 0.5, 0.7)

ONE_FORM: tuple[Variant, ...] = (
    NO_PRUNING,
    *(_wasserstein(temperature=tau) for tau in TEMPERATURES),
)
ALL_FORMS: tuple[Variant, ...] = (
    NO_PRUNING,
    Variant("alone", part=0.5),
    Variant("avg", "avg", part=0.5),
    *(
        _wasserstein("wasserstein" if form == "per_dimension" else form, form, tau, 0.5)
        for form in FORMS
        for tau in TEMPERATURES
    ),
)
"""Half of the gates, because a weaker pruning hardly shows whose importances are used."""
ALL_PARTS: tuple[Variant, ...] = (
    NO_PRUNING,
    *(
        variant
        for part in PARTS
        for variant in (
            Variant("random", part=part, rule=Rule(random=True)),
            Variant("alone", part=part),
            _wasserstein(part=part),
        )
    ),
    *(Variant("farthest", "farthest", part=part) for part in PARTS[-2:]),
)

CHOICES: dict[str, tuple[str, ...]] = {
    "chosen_paper": ("wasserstein", "flat", "sliced"),
    "chosen_extended": ("wasserstein", "flat", "sliced", "wasserstein_prior", "sharing_prior"),
}
"""Methods among which the samples set aside choose: ACME's own, and with the extensions."""


class Plan(NamedTuple):
    """Everything that `cohorts.refine` takes for some variants."""

    methods: dict[str, Method]
    rules: tuple[Rule, ...]


def plan(
    variants: Sequence[Variant],
    cohort: Cohort,
    config: RefineConfig,
    dims: HeaderDims,
    cell: StaticCell,
) -> Plan:
    """Mixing weights, numbers of gates and priors of some variants."""
    prior = np.asarray(label_prior.log_prior(jnp.asarray(cohort.histograms), PSEUDO_COUNT))
    return Plan(
        {
            variant.name: Method(
                listening(cohort, variant.listens, variant.temperature),
                cohorts.gates_per_round(config, dims, cell, variant.part),
                prior if variant.prior else None,
            )
            for variant in variants
        },
        tuple(variant.rule for variant in variants),
    )


def wrap_of(found: Plan, count: int, dims: HeaderDims, config: RefineConfig) -> cohorts.Wrap:
    """The change of the algorithm that the variants' rules ask for."""
    return personal_rules.wrap(found.rules, count, dims, config.rounds)


def uplink_bytes(
    variant: Variant, config: RefineConfig, dims: HeaderDims, cell: StaticCell, params: Params
) -> int:
    """What one device sends up in all rounds together, as encoded; a prior sends nothing.

    Args:
      variant: who pruned by nobody else's importances sends none.
      config: rounds and quantiles.
      dims: of the header.
      cell: of the header.
      params: of the header in compact form, which is what a device that shares sends.
    """
    listens = variant.listens != "alone"
    once: list[messages.Message] = []
    each: list[messages.Message] = []
    if variant.listens in ("oracle", "farthest"):
        once.append(messages.ImportanceSet(np.zeros(dims.num_classes, np.float32)))
    elif listens and variant.listens != "avg":
        sketch = np.zeros((config.num_quantiles, dims.embed_dim), np.float16)
        once.append(messages.FeatureSketch(sketch))
    if listens and variant.part > 0:
        each.append(messages.ImportanceSet(np.zeros(num_gates(dims, cell), np.float32)))
    if variant.rule.shares:
        each.append(messages.HeaderMessage(cell, _zeros(params)))
    return _size(once) + config.rounds * _size(each)


def header_bytes(cell: StaticCell, params: Params) -> int:
    """Of a whole header as it travels."""
    return _size([messages.HeaderMessage(cell, _zeros(params))])


def _size(sent: Sequence[messages.Message]) -> int:
    return sum(len(messages.encode(message)) for message in sent)


def _zeros(params: Params) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params)
