"""Strict switches for every test; they must be set before JAX starts its backends."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

_FLAGS = {
    "--xla_force_host_platform_device_count": "2",
    # Tests compile more than they compute: without LLVM's optimiser they take half the time.
    "--xla_backend_optimization_level": "0",
}
if version("jax").startswith("0.10."):  # later versions do not know it
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given)]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

MOST_MAPS = 30_000

jax.config.update("jax_numpy_rank_promotion", "raise")


def _num_maps() -> int:
    """Memory maps of this process; 0 where the system does not say."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


@pytest.fixture(scope="module", autouse=True)
def _forget_programs_before_the_maps_run_out():
    """Every compiled program holds some maps, and beyond Linux' 65,530 the compiler crashes."""
    yield
    if _num_maps() > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
