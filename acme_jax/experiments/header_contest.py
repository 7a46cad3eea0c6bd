"""One contest of headers: the hand-made ones and the searched one on the same features.

All train from random weights for the same number of epochs in the same batches. Every kind's
learning rate is chosen on the select split, once for each kind of backbone, at the middle of the
grid. Three quarters of all cells have smaller headers than the hand-made ones (but the linear one).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from acme_jax.blocks import Params
from acme_jax.config import HeaderConfig
from acme_jax.experiments import fixed_headers, header_runs, searched_header
from acme_jax.experiments.header_runs import Predict, Run, Setting
from acme_jax.experiments.study import EdgeData
from acme_jax.header_layout import HeaderDims, num_params
from nas import cells
from nas.cells import CellSpace, StaticCell

SEARCHED = "searched"
NAMES: tuple[str, ...] = (*fixed_headers.KINDS, SEARCHED)
RATES: dict[str, tuple[float, ...]] = {
    name: (1e-2, 3e-2) if name == "linear" else (3e-3, 1e-2) for name in NAMES
}
"""Learning rates to choose from; the linear header, without hidden layer, takes larger ones."""
SIZE_QUANTILE = 0.75


class Contender(NamedTuple):
    """One header that can be trained."""

    name: str
    predict: Predict
    init: Callable[[Array], Params]
    choice: Any  # a `Cell`, or None
    facts: dict[str, Any]  # of its row: parameters, FLOPs, channels or cell


class Trained(NamedTuple):
    """One header after its training."""

    contender: Contender
    params: Params
    setting: Setting
    select_accuracy: float
    tried: tuple[float, ...]  # select accuracies in all its settings

    def row(self) -> dict[str, Any]:
        """What its row says, without the test accuracy."""
        return {
            "header": self.contender.name,
            **self.contender.facts,
            "learning_rate": self.setting.learning_rate,
            "epochs": self.setting.epochs,
            "select_accuracy": self.select_accuracy,
        }


def epochs(config: HeaderConfig) -> int:
    """Of every header: as many as the search and the winner's training have together."""
    return config.search_epochs + config.final_epochs


@functools.lru_cache(maxsize=16)
def fair_size(dims: HeaderDims) -> int:
    """Parameters that three quarters of uniformly drawn cells' headers do not exceed."""
    space, keys = CellSpace(dims.blocks), jax.random.split(jax.random.key(0), 200)
    drawn = jax.device_get(jax.vmap(lambda key: cells.sample(key, space))(keys))
    sizes = [
        num_params(dims, cells.to_static(cells.Cell(inputs, ops)))
        for inputs, ops in zip(drawn.inputs, drawn.ops, strict=True)
    ]
    return int(np.quantile(sizes, SIZE_QUANTILE))


def fixed(name: fixed_headers.Kind, dims: HeaderDims) -> Contender:
    """A hand-made header of fair size."""
    spec = fixed_headers.sized(name, dims, fair_size(dims))
    facts = {
        "channels": spec.channels,
        "params": fixed_headers.num_params(spec),
        "flops": fixed_headers.num_flops(spec),
    }
    predict, init = fixed_headers.predictor(spec), fixed_headers.initialiser(spec)
    return Contender(name, predict, init, None, facts)


def searched(cell: StaticCell, dims: HeaderDims) -> Contender:
    """The header of a cell."""
    facts = {"channels": dims.channels, **searched_header.describe(cell, dims)}
    init = functools.partial(searched_header.start, cell=cell, dims=dims)
    predict = searched_header.predictor(dims)
    return Contender(SEARCHED, predict, init, cells.from_static(cell), facts)


def contender(name: str, dims: HeaderDims, cell: StaticCell) -> Contender:
    """A header by its name; the cell is the searched one's."""
    if name == SEARCHED:
        return searched(cell, dims)
    return fixed(next(kind for kind in fixed_headers.KINDS if kind == name), dims)


def begin(
    key: Array,
    contender: Contender,
    settings: Sequence[Setting],
    data: EdgeData,
    batch_size: int,
    device: jax.Device,
    start: Params | None = None,
) -> list[Run]:
    """Starts training a header in each setting, from the same weights: random, or `start`."""
    init_key, train_key = jax.random.split(key)
    start = contender.init(init_key) if start is None else start
    return [
        header_runs.train(
            contender.predict, train_key, start, contender.choice, one, data, batch_size, device
        )
        for one in settings
    ]


def finish(contender: Contender, runs: Sequence[Run], settings: Sequence[Setting]) -> Trained:
    """The best run of a header, the first of equals; waits for all."""
    tried = [float(run.select_accuracy) for run in runs]
    params = runs[int(np.argmax(tried))].params
    return trained(contender, jax.device_get(params), settings, tried)


def trained(
    contender: Contender, params: Params, settings: Sequence[Setting], tried: Sequence[float]
) -> Trained:
    """A header of which the best run's weights are known."""
    best = int(np.argmax(tried))
    return Trained(contender, params, settings[best], tried[best], tuple(tried))


def contest(
    key: Array,
    data: EdgeData,
    dims: HeaderDims,
    config: HeaderConfig,
    settings: Mapping[str, Sequence[Setting]],
    devices: Sequence[jax.Device],
    cell: StaticCell | None = None,
) -> dict[str, Trained]:
    """Trains every header named in `settings`, in each of its settings.

    The hand-made headers train on the last device while the first one searches.

    Args:
      key: consumed.
      data: features of the edge.
      dims: of the searched header; the others are as large.
      config: of the search, and the batches of all.
      settings: by header.
      devices: one or more.
      cell: of the searched header; None: it is searched for on these data.
    """
    search_key, *keys = jax.random.split(key, 1 + len(NAMES))
    start_keys = dict(zip(NAMES, keys, strict=True))
    under_way: dict[str, tuple[Contender, list[Run]]] = {}

    def enter(contender: Contender, device: jax.Device) -> None:
        name = contender.name
        runs = begin(start_keys[name], contender, settings[name], data, config.batch_size, device)
        under_way[name] = (contender, runs)

    for kind in fixed_headers.KINDS:
        if kind in settings:
            enter(fixed(kind, dims), devices[-1])
    if SEARCHED in settings:
        if cell is None:
            cell = searched_header.find_cell(search_key, data, dims, config)
        enter(searched(cell, dims), devices[0])
    return {
        name: finish(contender, runs, settings[name])
        for name, (contender, runs) in under_way.items()
    }


def classifiers(trained: Mapping[str, Trained]) -> dict[str, Callable[[Array], Array]]:
    """For `final.headers`."""
    return {
        name: header_runs.classifier(one.contender.predict, one.params, one.contender.choice)
        for name, one in trained.items()
    }
