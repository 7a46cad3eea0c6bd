"""Functions of `nas` on concrete sub-networks, for host code.

They are under jit, because outside it each of their two dozen arithmetic operations would be
compiled as a program of its own, half a second at every first use.
"""

from __future__ import annotations

import jax

from nas import arch, cost

grid = jax.jit(arch.grid, static_argnums=0)
num_params = jax.jit(cost.num_params, static_argnums=0)
num_flops = jax.jit(cost.num_flops, static_argnums=0)
size_bytes = jax.jit(cost.size_bytes, static_argnums=0)
latency_s = jax.jit(cost.latency_s, static_argnums=0)
energy_j = jax.jit(cost.energy_j, static_argnums=0)
