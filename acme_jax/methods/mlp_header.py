"""The model of the comparison: two hidden layers on pooled features, elastic in their width.

Small and dense, because every one of the compared methods is defined on dense layers: masked,
rolled, factorised, adapted, dropped out, stitched or pruned. A client's capacity is the part of
the hidden units that it holds.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax.blocks import Params


@dataclasses.dataclass(frozen=True)
class MlpHeader:
    """Sizes of the full header; static and hashable."""

    num_features: int
    num_hidden: int
    num_classes: int

    def init(self, key: Array) -> Params:
        """Parameters: `first`, `second` and `last`, each a kernel [in, out] and a bias [out]."""
        sizes = (self.num_features, self.num_hidden, self.num_hidden, self.num_classes)
        params = {}
        names = ("first", "second", "last")
        for name, rows, columns in zip(names, sizes[:-1], sizes[1:], strict=True):
            key, own = jax.random.split(key)
            kernel = jax.random.normal(own, (rows, columns)) * math.sqrt(2.0 / rows)
            params[name] = {"kernel": kernel, "bias": jnp.zeros(columns)}
        return params

    def hidden(self, params: Params, features: Array, gates: Array | None = None) -> Array:
        """What the last layer reads: features [B, F] -> [B, H].

        Args:
          params: of the header.
          features: of samples.
          gates: [2 H], multiply the units of both hidden layers; None: all ones.
        """
        ones = jnp.ones((1, self.num_hidden))
        first, second = (ones, ones) if gates is None else gates.reshape(2, 1, -1)
        inner = jax.nn.relu(dense(params["first"], features)) * first
        return jax.nn.relu(dense(params["second"], inner)) * second

    def logits(self, params: Params, features: Array, gates: Array | None = None) -> Array:
        """Features [B, F] -> [B, num_classes]."""
        return dense(params["last"], self.hidden(params, features, gates))

    def units(self, capacity: float) -> int:
        """Hidden units of each layer that a client of this capacity holds, at least one."""
        return max(1, round(capacity * self.num_hidden))

    def mask(self, first: Array, second: Array) -> Params:
        """The parameters that belong to given hidden units, as a 0/1 tree.

        Args:
          first: [H] 0/1, units of the first layer.
          second: [H] 0/1.
        """
        ones = jnp.ones
        return {
            "first": {"kernel": ones((self.num_features, 1)) * first[None], "bias": first},
            "second": {"kernel": first[:, None] * second[None], "bias": second},
            "last": {
                "kernel": second[:, None] * ones((1, self.num_classes)),
                "bias": ones(self.num_classes),
            },
        }

    def flops(self, capacity: float = 1.0) -> int:
        """Forward FLOPs of one sample, multiply-add = 2, of a dense header of that capacity."""
        units = self.units(capacity)
        rows = self.num_features + units + self.num_classes
        return 2 * units * rows

    def num_params(self, capacity: float = 1.0) -> int:
        """Parameters of a dense header of that capacity."""
        units = self.units(capacity)
        return self.flops(capacity) // 2 + 2 * units + self.num_classes


def prefix_masks(header: MlpHeader, capacities: np.ndarray) -> Params:
    """Masks of HeteroFL's sub-headers, stacked: leaves [C, ...]."""
    counts = jnp.asarray([header.units(float(capacity)) for capacity in capacities])
    kept = (jnp.arange(header.num_hidden)[None] < counts[:, None]).astype(jnp.float32)
    return jax.vmap(header.mask)(kept, kept)


def dense(layer: Params, inputs: Array) -> Array:
    """One layer before its nonlinearity: [B, in] -> [B, out]."""
    return inputs @ layer["kernel"] + layer["bias"][None]
