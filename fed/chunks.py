"""How many clients share one `vmap`: the largest chunk whose compiled round fits the memory.

    def compile_for(chunk):
        step = partial(run_round, algorithm, batch_size=16, epochs=1, chunk_size=chunk, mesh=mesh)
        return jax.jit(step).lower(server_state, (), data, key, 0, client_ids=ids).compile()

    plan = plan_chunk(compile_for, num_clients, mesh=mesh)
    print(plan.text)
    server_state, _, metrics = plan.compiled(server_state, (), data, key, 0, client_ids=ids)

Nothing runs for this: XLA says of a compiled program what it will allocate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.stages import Compiled

USABLE = 0.9
"""Part of the free memory that is planned for; the rest is for fragments and other arrays."""

_UNLIMITED = 1e300  # finite: what the compiler could not place (infinite) never fits
_ATTEMPTS = 6
_WORTHWHILE = 1.25  # a chunk that is larger by less than this is not worth another compilation


class ChunkPlan(NamedTuple):
    """A chunk size and what it rests on; bytes are those of one device."""

    chunk_size: int
    bytes_needed: int | None  # by the whole round; None: the backend does not say
    bytes_available: int | None  # None: unknown
    text: str  # one sentence, to be printed
    compiled: Compiled  # the round at this chunk size


def plan_chunk(
    compile_for: Callable[[int], Compiled],
    num_clients: int,
    *,
    memory_bytes: int | None = None,
    requested: int | None = None,
    platform: str | None = None,
    mesh: Mesh | None = None,
    arguments_on_device: bool = False,
) -> ChunkPlan:
    """Chooses, or checks, the number of clients in one `vmap`.

    The default on CPU is 1, which is fastest there (see `fed.cohort.run_clients`). On
    accelerators the round is compiled for 1 and 2 clients, a line through both says which chunk
    should fit, and that one is compiled and verified; up to four more compilations correct it.
    Chunks are evened out: of 8 clients, 4 + 4 are as fast as 7 + 1.

    Args:
      compile_for: lowers and compiles the caller's round for a chunk size.
      num_clients: of the round, on all devices together.
      memory_bytes: free on each device; None: `free_bytes(mesh)`. Several processes have to
        give the same number (their smallest), or they would compile different programs.
      requested: use this chunk size, if it fits; more than there are clients on a device are
        those.
      platform: None: that of the mesh or the default device.
      mesh: over which the round spreads its clients; None: one device.
      arguments_on_device: the round's arguments are in memory already, so they are not counted
        a second time.

    Returns:
      The plan. Where the backend says nothing of its memory, or of a program's, the chunk is
      `requested` or `run_clients`' default, and the text says that it is unchecked.

    Raises:
      ValueError: nothing fits, `requested` does not (the message names a chunk that would), or
        a number that is not positive.
    """
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}")
    if requested is not None and requested < 1:
        raise ValueError(f"a chunk must have at least 1 client, got {requested}")
    if platform is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    per_device = -(-num_clients // (1 if mesh is None else mesh.size))
    available = free_bytes(mesh) if memory_bytes is None else memory_bytes
    programs = _Programs(compile_for, arguments_on_device)
    limit = _UNLIMITED if available is None else USABLE * available
    if requested is not None:
        chunk = min(requested, per_device)
    elif platform == "cpu":
        chunk = 1
    elif available is None or programs.size(1) is None:
        chunk = per_device
    else:
        chunk = _largest(programs, limit, per_device, per_device + 1)
    needed = programs.size(chunk)
    if needed is not None and needed > limit:
        raise ValueError(_refusal(programs, chunk, available, per_device))
    text = f"{_clients(chunk)} in a chunk, {-(-per_device // chunk)} chunk(s) on each device"
    if needed is None:
        text += "; whether they fit is unchecked: the backend does not say what a program needs"
    elif available is None:
        text += f": {_bytes(needed)} are needed; the backend does not say what is free"
    else:
        text += f": {_bytes(needed)} of {_bytes(available)} free memory"
    size = None if needed is None else int(needed)
    return ChunkPlan(chunk, size, available, text, programs.compiled(chunk))


def free_bytes(mesh: Mesh | None = None) -> int | None:
    """Memory that is free on the fullest of this process's devices; None where unknown.

    Args:
      mesh: whose devices; None: the default device. Host (CPU) devices share what is free.
    """
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    if devices[0].platform == "cpu":
        free = _available_host_bytes()
        return None if free is None else free // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in stat for stat in stats):
        return None
    return min(int(stat["bytes_limit"]) - int(stat.get("bytes_in_use", 0)) for stat in stats)


class _Programs:
    """The compiled rounds, each made once."""

    def __init__(self, compile_for: Callable[[int], Compiled], arguments_on_device: bool) -> None:
        self._compile_for = compile_for
        self._arguments_on_device = arguments_on_device
        self._made: dict[int, Compiled | None] = {}

    def compiled(self, chunk: int) -> Compiled:
        program = self._get(chunk)
        assert program is not None  # its size would be infinite, which is refused before
        return program

    def size(self, chunk: int) -> float | None:
        """Bytes on one device; None: unknown; infinite: the compiler could not place it."""
        program = self._get(chunk)
        if program is None:
            return math.inf
        stats = program.memory_analysis()
        if stats is None:
            return None
        # Outputs that take the place of donated arguments need no memory of their own.
        own = stats.output_size_in_bytes + stats.temp_size_in_bytes - stats.alias_size_in_bytes
        return float(own + (0 if self._arguments_on_device else stats.argument_size_in_bytes))

    def _get(self, chunk: int) -> Compiled | None:
        if chunk not in self._made:
            try:
                self._made[chunk] = self._compile_for(chunk)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                self._made[chunk] = None
        return self._made[chunk]


def _largest(programs: _Programs, limit: float, per_device: int, over: int) -> int:
    """The largest chunk below `over` that is known to fit; 1 even if that does not.

    Linear in the chunk's size but for what the compiler changes, hence the loop.
    """

    def size(chunk: int) -> float:
        found = programs.size(chunk)
        return math.inf if found is None else found

    if over <= 2 or size(1) > limit or size(2) > limit:
        return 1
    before, fits = 1, 2
    for _ in range(_ATTEMPTS - 2):
        # Inwards where a larger chunk is known not to fit, else onwards.
        other = over if over <= per_device else before
        per_client = (size(other) - size(fits)) / (other - fits)
        if math.isinf(per_client):
            room = (over - fits) // 2
        else:
            room = int((limit - size(fits)) / per_client) if per_client > 0 else per_device
        guess = _even(min(fits + room, over - 1), per_device)
        if guess < _WORTHWHILE * fits:
            break
        if size(guess) <= limit:
            before, fits = fits, guess
        else:
            over = guess
    return fits


def _even(chunk: int, per_device: int) -> int:
    """The smallest chunk with which a device's clients take no more passes."""
    return -(-per_device // -(-per_device // chunk))


def _refusal(programs: _Programs, chunk: int, available: int | None, per_device: int) -> str:
    """Why nothing or not this chunk fits, and what would."""
    alone, limit, have = programs.size(1), _UNLIMITED, "the compiler found no room for that"
    if available is not None:
        limit = USABLE * available
        have = (
            f"{_bytes(limit)} may be used ({USABLE:.0%} of the {_bytes(available)} that are free)"
        )
    if alone is not None and alone > limit:
        return (
            f"a round needs {_bytes(alone)} on each device even with one client at a time, but "
            f"{have}; take fewer clients or samples in a round, a smaller batch or model, or "
            "more devices"
        )
    needed = programs.size(chunk)
    assert needed is not None
    fits = _largest(programs, limit, per_device, chunk)
    return (
        f"{_clients(chunk)} in one chunk need {_bytes(needed)} on each device, but {have}; a "
        f"chunk of {fits} would fit"
    )


def _available_host_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    kibibytes = next(found, None)
    return None if kibibytes is None else 1024 * int(kibibytes)


def _clients(count: int) -> str:
    return f"{count} client{'' if count == 1 else 's'}"


def _bytes(size: float) -> str:
    if math.isinf(size):
        return "more than the compiler could place"
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000.0
    return f"{size:.1f} GB"
