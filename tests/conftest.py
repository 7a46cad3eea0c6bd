"""Strict switches for every test; they must be set before JAX starts its backends."""

import os
from importlib.metadata import version

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

jax.config.update("jax_numpy_rank_promotion", "raise")
