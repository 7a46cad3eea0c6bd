"""Measures how long sliced sub-networks take on the machine at hand, and fits cost models.

What is timed is what a device runs under its header: the sliced backbone, from images to the
last hidden state, its weights as arguments of one compiled program. Energy is not measured;
it is modelled from the latency and assumed power constants.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acme_jax import encoders, latency_csv, slicing, supernet
from acme_jax.config import ConfigError
from acme_jax.encoders import EncoderConfig
from acme_jax.idx import DataError
from acme_jax.latency_csv import Measurements, genome, identity, make_genome, stack
from nas import cost, cost_fit
from nas.arch import Arch, ArchSpace, sample
from nas.cost import CostModel, DeviceProfile, ModelDims
from nas.latency_table import LatencyTable


class Networks(NamedTuple):
    """Which networks are measured, and what for."""

    roles: np.ndarray  # [P]
    archs: Arch  # NumPy, leading [P]


def choose_networks(space: ArchSpace, num_held_out: int, seed: int) -> Networks:
    """Uniform networks to fit on, and random per-layer ones that are held out; all distinct.

    The first are every pair of head and neuron choices, one block deep and at full depth. Of
    the others one half comes from the search space, the other has any numbers of heads and
    neurons between the least and the greatest choice, so that interpolation is tested.

    Args:
      space: the search space.
      num_held_out: networks of each of the two halves, as far as there are so many.
      seed: of the random ones.
    """
    layers = space.num_layers
    fit = [
        make_genome(depth, np.full(layers, heads), np.full(layers, neurons))
        for depth in sorted({1, layers})
        for heads in sorted(set(space.head_choices))
        for neurons in sorted(set(space.neuron_choices))
    ]
    drawn = jax.jit(sample, static_argnums=(1, 2))(jax.random.key(seed), space, 4 * num_held_out)
    sampled = jax.tree.map(np.asarray, drawn)
    rng = np.random.default_rng(seed)

    def between() -> Arch:
        ends = (space.head_choices[0], space.neuron_choices[0])
        return make_genome(
            rng.choice(space.depth_choices),
            rng.integers(ends[0], space.num_heads + 1, layers),
            rng.integers(ends[1], space.num_neurons + 1, layers),
        )

    candidates = {
        "fit": fit,
        "held_out": [genome(sampled, i) for i in range(4 * num_held_out)],
        "between": [between() for _ in range(4 * num_held_out)],
    }
    roles, chosen, seen = [], [], set()
    for role, offered in candidates.items():
        left = len(offered) if role == "fit" else num_held_out
        for arch in offered:
            if left and identity(arch) not in seen:
                seen.add(identity(arch))
                roles.append(role)
                chosen.append(arch)
                left -= 1
    return Networks(np.array(roles), stack(chosen))


def measure(
    encoder: EncoderConfig,
    networks: Networks,
    batch_size: int,
    *,
    rounds: int,
    calls: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Measurements:
    """Times every network: compiled and warmed up first, then in interleaved rounds.

    A round visits all networks in a random order, so that a busy moment of the machine falls
    on all alike; a visit is one call that does not count and `calls` that do.

    Args:
      encoder: sizes of the full network; its weights are random, which does not matter.
      networks: from `choose_networks`.
      batch_size: examples in a call.
      rounds: visits of every network, at least 2.
      calls: timed calls of a visit.
      seed: of weights, images and order.
      say: told of the progress.

    Raises:
      ConfigError: fewer than 2 rounds, or no calls or examples.
    """
    if rounds < 2 or calls < 1 or batch_size < 1:
        raise ConfigError(
            f"expected at least 2 rounds, 1 call and 1 example, got {rounds} rounds of {calls} "
            f"calls with {batch_size} examples"
        )
    made = jax.jit(supernet.init, static_argnums=1)(jax.random.key(seed), encoder)
    params = jax.tree.map(np.asarray, made)
    rng = np.random.default_rng(seed)
    inputs = jnp.asarray(encoders.random_inputs(encoder, batch_size, seed))
    programs: list[Callable[[], jax.Array]] = []
    count = len(networks.roles)
    for i in range(count):
        sliced = jax.device_put(slicing.slice_params(params, genome(networks.archs, i)))
        program = jax.jit(lambda weights, inputs: slicing.final_state(weights, inputs, encoder))
        programs.append(functools.partial(program, sliced, inputs))
        programs[-1]().block_until_ready()
        if (i + 1) % 10 == 0 or i + 1 == count:
            say(f"compiled {i + 1} of {count} networks, batch size {batch_size}")
    seconds = np.zeros((count, rounds, calls))
    for round in range(rounds):
        for i in rng.permutation(count):
            programs[i]().block_until_ready()
            for call in range(calls):
                start = time.perf_counter()
                programs[i]().block_until_ready()
                seconds[i, round, call] = time.perf_counter() - start
    half = rounds // 2
    medians = [
        np.median(part, axis=(1, 2)) / batch_size
        for part in (seconds, seconds[:, :half], seconds[:, half:])
    ]
    return Measurements(_backbone(encoder.dims), batch_size, *networks, *medians)


def fit_models(measured: Measurements, power: DeviceProfile) -> dict[str, CostModel]:
    """The measured table, a roofline and ACME's form, each fitted to the rows of role "fit".

    Args:
      measured: latencies.
      power: whose power constants the models take; assumed, not measured.

    Raises:
      DataError: rows that do not determine a model.
    """
    archs, seconds = measured.where("fit")
    try:
        return {
            "table": _fit_table(measured, power),
            "roofline": cost_fit.fit_roofline(measured.dims, archs, seconds, power),
            "paper": cost_fit.fit_paper(measured.dims, archs, seconds),
        }
    except ValueError as error:
        raise DataError(f"the measurements do not determine the cost models: {error}") from None


def predict(dims: ModelDims, archs: Arch, model: CostModel) -> np.ndarray:
    """Predicted seconds [P] of one example, float64."""
    latency = jax.jit(jax.vmap(lambda arch: cost.latency_s(dims, arch, model)))
    return np.asarray(latency(archs), np.float64)


def summarise(measured: Measurements, models: dict[str, CostModel]) -> dict[str, Any]:
    """Constants and errors of fitted models, JSON-ready.

    `repeatability` compares the two halves of the rounds: no model can be expected to predict
    better than the machine repeats itself.
    """
    roles = [role for role in latency_csv.ROLES if np.sum(measured.roles == role) > 1]
    repeat = cost_fit.prediction_error(measured.second_half_s, measured.first_half_s)
    return {
        "batch_size": measured.batch_size,
        "networks": {role: int(np.sum(measured.roles == role)) for role in roles},
        "repeatability": _plain(repeat._asdict()),
        "models": {
            name: {
                "constants": _plain(model._asdict()),
                "error": {
                    role: _plain(
                        cost_fit.prediction_error(
                            predict(measured.dims, archs, model), seconds
                        )._asdict()
                    )
                    for role in roles
                    for archs, seconds in [measured.where(role)]
                },
            }
            for name, model in models.items()
        },
    }


def load_table(
    path: str | Path,
    dims: ModelDims,
    space: ArchSpace,
    power: DeviceProfile,
    batch_size: int = 1,
) -> LatencyTable:
    """The measured table of a file, for searching `space`.

    Args:
      path: a file of `scripts/profile_device.py`.
      dims: the model to be searched; whether it has a classifier does not matter, because a
        backbone was measured.
      space: its sub-networks, all of which the table must cover.
      power: whose power constants the table takes.
      batch_size: of the measurements to use.

    Raises:
      DataError: the file is missing or malformed, or does not determine a table.
      ConfigError: it is of another model or batch size, or does not cover the space.
    """
    found = {part.batch_size: part for part in latency_csv.read(path)}
    measured = next(iter(found.values()))
    ours, theirs = (
        {k: v for k, v in vars(_backbone(d)).items() if k != "num_classes"}
        for d in (dims, measured.dims)
    )
    if ours != theirs:
        other = ", ".join(f"{k} {theirs[k]} there, {v} here" for k, v in ours.items()
                          if theirs[k] != v)  # fmt: skip
        raise ConfigError(
            f"search.latency_table {path} was measured with another model: {other}; measure this "
            "one with scripts/profile_device.py"
        )
    if batch_size not in found:
        raise ConfigError(
            f"search.latency_table {path} has no measurements at batch size {batch_size}, only "
            f"at {', '.join(str(size) for size in sorted(found))}"
        )
    try:
        table = _fit_table(found[batch_size], power)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    for name, choices, grid in (
        ("heads", space.head_choices, np.asarray(table.head_counts)),
        ("neurons", space.neuron_choices, np.asarray(table.neuron_counts)),
    ):
        if choices[0] < grid[0] or choices[-1] > grid[-1]:
            raise ConfigError(
                f"search.latency_table {path} was measured with {grid[0]:g} to {grid[-1]:g} "
                f"{name}, but the search offers {choices[0]} to {choices[-1]}; measure again"
            )
    return table


def _fit_table(measured: Measurements, power: DeviceProfile) -> LatencyTable:
    archs, seconds = measured.where("fit")
    if not seconds.size:
        raise ValueError("no measurement has the role 'fit'; measure again")
    kept = [block for i in range(seconds.size) for block in identity(genome(archs, i))]
    heads, neurons = (np.unique([block[place] for block in kept]) for place in (1, 2))
    return cost_fit.fit_latency_table(measured.dims, archs, seconds, heads, neurons, power)


def _backbone(dims: ModelDims) -> ModelDims:
    return ModelDims(**{**vars(dims), "num_classes": 0})


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Plain Python numbers and lists, rounded to what a JSON file should hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if np.isnan(value) else float(f"{value:.6g}")

    return {name: plain(np.asarray(value).tolist()) for name, value in record.items()}
