"""The file of measured latencies: written and read, with every row checked.

A text file that documents itself: comment lines with the columns' meaning, the command, the
commit, the hardware and the model's sizes, then comma-separated rows, one for each network
and batch size.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from acme_jax import concrete
from acme_jax.idx import DataError
from acme_jax.slicing import kept_blocks
from nas.arch import Arch
from nas.cost import ModelDims

ROLES = ("fit", "held_out", "between")
COLUMNS = (
    "role",
    "depth",
    "heads",
    "neurons",
    "num_params",
    "batch_size",
    "latency_s",
    "first_half_s",
    "second_half_s",
)
_TIMES = COLUMNS[-3:]
_MEANING = """\
Measured latencies of sliced sub-networks (backbones: patches in, last hidden state out).
Columns:
  role: fit (uniform; the models are fitted to these), held_out (random per-layer networks of
    the search space), between (random per-layer networks with any numbers of heads and neurons)
  depth: blocks kept, block i being kept where i is floor(j * num_layers / depth) for some j
  heads, neurons: one number for each block of the full network; of dropped blocks without effect
  num_params: parameters of the network, without a classifier
  batch_size: examples in one call
  latency_s: seconds of one example: the median call of all rounds / batch_size
  first_half_s, second_half_s: the same of the first and the second half of the rounds
Nothing here is a power or an energy: those are modelled, not measured."""


class Measurements(NamedTuple):
    """Latencies of the networks [P] of one model at one batch size."""

    dims: ModelDims
    batch_size: int
    roles: np.ndarray  # [P] of ROLES
    archs: Arch  # NumPy, leading [P]
    latency_s: np.ndarray  # [P] of one example
    first_half_s: np.ndarray  # [P]
    second_half_s: np.ndarray  # [P]

    def where(self, role: str) -> tuple[Arch, np.ndarray]:
        """Genomes and latencies of one role."""
        rows = self.roles == role
        return Arch(*(leaf[rows] for leaf in self.archs)), self.latency_s[rows]


def genome(archs: Arch, index: int) -> Arch:
    """One genome of a population."""
    return Arch(*(leaf[index] for leaf in archs))


def make_genome(depth: int, heads: np.ndarray, neurons: np.ndarray) -> Arch:
    """A genome of NumPy arrays, int32."""
    leaves: list[Any] = [np.asarray(leaf, np.int32) for leaf in (depth, heads, neurons)]
    return Arch(*leaves)


def stack(archs: Sequence[Arch]) -> Arch:
    """A population [P] of NumPy genomes, int32."""
    population: Arch = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.int32), *archs)
    return population


def identity(arch: Arch) -> tuple[tuple[int, int, int], ...]:
    """What makes a network: each kept block's place, heads and neurons."""
    return tuple((i, int(arch.heads[i]), int(arch.neurons[i])) for i in kept_blocks(arch))


def write(path: Path, measured: Sequence[Measurements], facts: Mapping[str, str]) -> None:
    """Writes all measurements of one model.

    Args:
      path: the file; its directory must exist.
      measured: one for each batch size.
      facts: command, commit and the like, one comment line each.
    """
    dims = " ".join(f"{k}={v}" for k, v in dataclasses.asdict(measured[0].dims).items())
    comments = [*_MEANING.splitlines(), *(f"{k}: {v}" for k, v in facts.items()), f"dims: {dims}"]
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in comments)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for part in measured:
            for i, role in enumerate(part.roles):
                arch = genome(part.archs, i)
                writer.writerow(
                    [
                        role,
                        int(arch.depth),
                        *(" ".join(str(int(n)) for n in genes) for genes in arch[1:]),
                        int(concrete.num_params(part.dims, arch)),
                        part.batch_size,
                        *(f"{getattr(part, name)[i]:.4e}" for name in _TIMES),
                    ]
                )


def read(path: str | Path) -> list[Measurements]:
    """Reads what `write` wrote, one entry for each batch size.

    Raises:
      DataError: missing, not such a file, or a row that is malformed, duplicated, of another
        model, or whose times are not positive and finite.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; make it with scripts/profile_device.py") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a file of measured latencies ({error})") from None
    dims = _dims(path, lines)
    rows = [(i, line) for i, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not rows or rows[0][1].split(",") != list(COLUMNS):
        raise DataError(
            f"{path} has no line {','.join(COLUMNS)!r} before its data; it is not a file of "
            "measured latencies, or of another version: measure again"
        )
    if len(rows) == 1:
        raise DataError(f"{path} has no measurements; run scripts/profile_device.py again")
    found: dict[int, list[_Row]] = {}
    seen: dict[object, int] = {}
    for number, line in rows[1:]:
        row = _row(f"{path}, line {number}", dims, line)
        first = seen.setdefault((row.batch_size, identity(row.arch)), number)
        if first != number:
            raise DataError(
                f"{path}, line {number}: the network of line {first} again; remove one of them"
            )
        found.setdefault(row.batch_size, []).append(row)
    return [_stack(dims, batch_size, part) for batch_size, part in found.items()]


class _Row(NamedTuple):
    role: str
    arch: Arch
    batch_size: int
    times: list[float]


def _dims(path: Path, lines: list[str]) -> ModelDims:
    line = next((x for x in lines if x.startswith("# dims: ")), "")
    try:
        sizes = dict(word.split("=") for word in line.removeprefix("# dims: ").split())
        return ModelDims(**{name: int(size) for name, size in sizes.items()})
    except (ValueError, TypeError):
        raise DataError(
            f"{path} does not say which model was measured (a line '# dims: num_layers=... ...'); "
            "it is not a file of measured latencies, or was cut: measure again"
        ) from None


def _row(where: str, dims: ModelDims, line: str) -> _Row:
    fields = line.split(",")
    if len(fields) != len(COLUMNS):
        raise DataError(f"{where}: {len(fields)} fields, expected {len(COLUMNS)}: {line!r}")
    values = dict(zip(COLUMNS, fields, strict=True))
    try:
        depth, num_params, batch_size = (
            int(values[name]) for name in ("depth", "num_params", "batch_size")
        )
        heads, neurons = (
            np.array([int(gene) for gene in values[name].split()], np.int32)
            for name in ("heads", "neurons")
        )
        times = [float(values[name]) for name in _TIMES]
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: {error}") from None
    if values["role"] not in ROLES:
        raise DataError(f"{where}: role {values['role']!r}; expected one of {', '.join(ROLES)}")
    for name, genes, limit in (
        ("depth", np.array([depth]), dims.num_layers),
        ("heads", heads, dims.num_heads),
        ("neurons", neurons, dims.num_neurons),
    ):
        length = 1 if name == "depth" else dims.num_layers
        if genes.size != length or genes.min() < 1 or genes.max() > limit:
            raise DataError(
                f"{where}: {name} is {values[name]!r}; expected {length} numbers from 1 to {limit}"
            )
    for name, time in zip(_TIMES, times, strict=True):
        if not (math.isfinite(time) and time > 0):
            raise DataError(
                f"{where}: {name} is {values[name]}; a latency must be positive and finite. "
                "Measure again or remove the row"
            )
    arch = make_genome(depth, heads, neurons)
    expected = int(concrete.num_params(dims, arch))
    if num_params != expected or batch_size < 1:
        raise DataError(
            f"{where}: {num_params} parameters at batch size {batch_size}, but a network of "
            f"these blocks has {expected}; the row does not belong to this model"
        )
    return _Row(values["role"], arch, batch_size, times)


def _stack(dims: ModelDims, batch_size: int, rows: list[_Row]) -> Measurements:
    roles, archs = np.array([row.role for row in rows]), stack([row.arch for row in rows])
    return Measurements(dims, batch_size, roles, archs, *np.array([row.times for row in rows]).T)
