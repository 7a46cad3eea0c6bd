"""What a sub-network costs: parameters, operations, bytes, modelled latency and energy.

Everything is a pure function of one genome (`Arch`) or mask (`ArchMask`), traceable, and
differentiable in relaxed masks; `vmap` over populations and over devices. Parameters,
operations and bytes are those of the sliced network, the last two as floats. Latency and
energy have one call form for three models of a device: a roofline (`DeviceProfile`), a measured
table (`LatencyTable`), and ACME's own (`PaperConstants`); `nas.cost_fit` fits each to
measurements. Shape letters: L layers, D embedding, H heads, K head size, F neurons, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nas import latency_table
from nas.arch import Arch, ArchMask, keep_mask
from nas.latency_table import LatencyTable

_INT32_LIMIT = 2**31


@dataclasses.dataclass(frozen=True)
class ModelDims:
    """Sizes of the full Transformer encoder; static and hashable.

    Of images, whose patches go through one matrix and whose last LayerNorm counts, or, where
    `vocab_size` is given, of texts, whose embedded tokens go through a LayerNorm first.

    Attributes:
      num_layers: L.
      embed_dim: D.
      num_heads: H.
      head_size: K.
      num_neurons: F.
      num_tokens: T that the blocks see, prefix tokens included.
      patch_dim: input numbers of a patch (height * width * channels); 0 of texts.
      num_classes: outputs of the classifier; 0: no classifier.
      num_prefix_tokens: tokens before the patches: the class token and the like.
      vocab_size: rows of the word embedding; 0 of images.

    Raises:
      ValueError: a size that is not positive, both or neither of `patch_dim` and `vocab_size`,
        or 2^31 parameters or more (counts are int32).
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    head_size: int
    num_neurons: int
    num_tokens: int
    patch_dim: int
    num_classes: int = 0
    num_prefix_tokens: int = 1
    vocab_size: int = 0

    def __post_init__(self) -> None:
        optional = {"num_classes", "num_prefix_tokens", "vocab_size"}
        optional |= {"patch_dim"} if self.vocab_size else set()
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name not in optional)
            if value < least:
                raise ValueError(f"ModelDims.{field.name} must be at least {least}, got {value}")
        if self.vocab_size and self.patch_dim:
            raise ValueError(
                f"ModelDims has patches of {self.patch_dim} numbers and a vocabulary of "
                f"{self.vocab_size}; an encoder reads images or texts, so one of them must be 0"
            )
        block = _block_params(self)
        total = self.num_layers * (
            block.fixed + block.per_head * self.num_heads + block.per_neuron * self.num_neurons
        ) + _shared_params(self)
        if total >= _INT32_LIMIT:
            raise ValueError(
                f"the model has {total} parameters; expected fewer than {_INT32_LIMIT}, because "
                "counts are int32. Use smaller dimensions"
            )


class DeviceProfile(NamedTuple):
    """Constants of a roofline and its energy; floats, or arrays to `vmap` over."""

    flops_per_s: float | jax.Array
    bytes_per_s: float | jax.Array
    overhead_s: float | jax.Array  # per block
    idle_power_w: float | jax.Array
    energy_per_flop_j: float | jax.Array
    energy_per_byte_j: float | jax.Array


class PaperConstants(NamedTuple):
    """Constants of ACME's own cost models, with its defaults; a unit is a kept head."""

    static_power_w: float = 100.0
    power_per_unit_w: float = 10.0
    memory_power_w: float = 128.0 * 50.0
    base_latency_s: float = 1.0
    latency_per_unit_s: float = 0.1
    epochs: float = 10.0
    size_per_width: float = 768.0
    size_per_depth: float = 3_060_000.0


CostModel = DeviceProfile | LatencyTable | PaperConstants
"""A device, as `latency_s` and `energy_j` take it. All are records of arrays."""


class _Linear(NamedTuple):
    """A quantity of a block that is linear in its heads and neurons."""

    fixed: int
    per_head: int
    per_neuron: int


def _block_params(dims: ModelDims) -> _Linear:
    d, k = dims.embed_dim, dims.head_size
    return _Linear(
        fixed=2 * (2 * d) + d + d,  # two layer norms; biases of the two output projections
        per_head=3 * (d * k + k) + k * d,  # query, key, value with bias; output rows
        per_neuron=d + 1 + d,  # up with bias, down
    )


def _shared_params(dims: ModelDims) -> int:
    d = dims.embed_dim
    patches = dims.patch_dim * d + d + dims.num_prefix_tokens * d  # with bias; class token
    inputs = dims.vocab_size * d if dims.vocab_size else patches
    classifier = d * dims.num_classes + dims.num_classes
    return inputs + dims.num_tokens * d + 2 * d + classifier  # positions, a LayerNorm


def _block_flops(dims: ModelDims) -> _Linear:
    t, d, k = dims.num_tokens, dims.embed_dim, dims.head_size
    return _Linear(
        fixed=0,
        per_head=2 * (t * d * 3 * k + 2 * t * t * k + t * k * d),
        per_neuron=2 * (2 * t * d),
    )


def _counts(dims: ModelDims, arch: Arch | ArchMask) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Kept blocks, heads and neurons, each [L]; int32 of a genome, float of a mask."""
    shape = arch.heads.shape if isinstance(arch, Arch) else arch.block.shape
    if shape != (dims.num_layers,):
        raise ValueError(
            f"expected one genome or mask of {dims.num_layers} layers, got a leading shape of "
            f"{shape}; use jax.vmap over a population"
        )
    if isinstance(arch, Arch):
        block = keep_mask(dims.num_layers, arch.depth).astype(jnp.int32)
        return block, arch.heads, arch.neurons
    return arch.block, arch.head.sum(-1), arch.neuron.sum(-1)


def _float(count: jax.Array) -> jax.Array:
    """A count as JAX's default float: exact below 2^24, with jax_enable_x64 below 2^53."""
    return count.astype(jnp.result_type(float))


def num_params(dims: ModelDims, arch: Arch | ArchMask) -> jax.Array:
    """Parameters [] of the sliced network, embedding, final norm and classifier included.

    Exact int32 of an `Arch`; of an `ArchMask` float32, differentiable (exact below 2^24).
    Equal to the sizes of the sliced network's leaves: the embedding width D stays full.
    """
    block, heads, neurons = _counts(dims, arch)
    unit = _block_params(dims)
    per_block = unit.fixed + unit.per_head * heads + unit.per_neuron * neurons
    return jnp.sum(block * per_block) + _shared_params(dims)


def num_flops(dims: ModelDims, arch: Arch | ArchMask) -> jax.Array:
    """Floating-point operations [] of a forward pass of one example, as a float.

    Matrix products only, a multiply-add counting 2: exactly the `dot_general`s of the sliced
    network. Norms, softmax, activations and biases are left out, as is usual; XLA's own cost
    analysis counts them, which adds about 20 % at an embedding of 64 (GELU 30 operations a
    neuron) and shrinks as 1 / D. The classifier reads the class token alone.
    """
    block, heads, neurons = (_float(count) for count in _counts(dims, arch))
    unit = _block_flops(dims)
    per_block = float(unit.per_head) * heads + float(unit.per_neuron) * neurons
    num_patches = dims.num_tokens - dims.num_prefix_tokens
    patches = 2.0 * num_patches * dims.patch_dim * dims.embed_dim
    classifier = 2.0 * dims.embed_dim * dims.num_classes
    return jnp.sum(block * per_block) + (patches + classifier)


def size_bytes(
    dims: ModelDims, arch: Arch | ArchMask, bytes_per_param: float | jax.Array = 4
) -> jax.Array:
    """Bytes [] of the sliced network's parameters, as a float.

    Exact below 2^24, with jax_enable_x64 below 2^53; so are operations.
    """
    return _float(num_params(dims, arch)) * bytes_per_param


def latency_s(
    dims: ModelDims,
    arch: Arch | ArchMask,
    profile: CostModel,
    bytes_per_param: float | jax.Array = 4,
) -> jax.Array:
    """Seconds [] of a forward pass of one example on a device.

    * `DeviceProfile`: max(flops / flops_per_s, bytes / bytes_per_s) + overhead_s * blocks,
      where the bytes are the parameters, read once (Williams et al., "Roofline", CACM 2009).
    * `LatencyTable`: base_s plus what was measured of each kept block; see `in_range`.
    * `PaperConstants`: ACME's own, see `arch_paper_costs`.
    """
    if isinstance(profile, PaperConstants):
        return jnp.asarray(arch_paper_costs(dims, arch, profile).latency_s)
    block, heads, neurons = _counts(dims, arch)
    if isinstance(profile, LatencyTable):
        seconds = latency_table.block_seconds(profile, heads, neurons)
        return jnp.sum(block * seconds) + profile.base_s
    compute_s = num_flops(dims, arch) / profile.flops_per_s
    memory_s = size_bytes(dims, arch, bytes_per_param) / profile.bytes_per_s
    return jnp.maximum(compute_s, memory_s) + profile.overhead_s * _float(jnp.sum(block))


def energy_j(
    dims: ModelDims,
    arch: Arch | ArchMask,
    profile: CostModel,
    bytes_per_param: float | jax.Array = 4,
) -> jax.Array:
    """Modelled joules [] of a forward pass of one example; never measured.

    Idle power during the latency (which may be measured), plus a price for each operation and
    each parameter byte. Of `PaperConstants`: power * latency * epochs, as ACME has it.
    """
    if isinstance(profile, PaperConstants):
        return jnp.asarray(arch_paper_costs(dims, arch, profile).energy_j)
    idle_j = profile.idle_power_w * latency_s(dims, arch, profile, bytes_per_param)
    compute_j = profile.energy_per_flop_j * num_flops(dims, arch)
    memory_j = profile.energy_per_byte_j * size_bytes(dims, arch, bytes_per_param)
    return idle_j + compute_j + memory_j


def in_range(dims: ModelDims, arch: Arch | ArchMask, table: LatencyTable) -> jax.Array:
    """Whether every kept block [] lies within what the table measured; bool.

    Where it does not, `latency_s` answers for the nearest measured block.
    """
    block, heads, neurons = _counts(dims, arch)
    return jnp.all(latency_table.in_range(table, heads, neurons) | (block == 0))


PAPER_CONSTANTS = PaperConstants()


class PaperCosts(NamedTuple):
    """ACME's modelled costs, of the inputs' shape."""

    size: Any  # parameters
    power_w: Any
    latency_s: Any
    energy_j: Any


def paper_costs(
    width_units: Any, depth_units: Any, constants: PaperConstants = PAPER_CONSTANTS
) -> PaperCosts:
    """The cost models of ACME's published experiments, to reproduce them.

    They are not realistic (size hardly depends on width, energy follows latency); use the
    other functions of this module for anything but the comparison. Only arithmetic, so that
    NumPy float64 in gives NumPy float64 out.

    Args:
      width_units: heads kept, floor(12 w); any shape.
      depth_units: blocks kept, floor(12 m); the same shape.
      constants: those of the models.
    """
    units = width_units * depth_units
    power = constants.static_power_w + constants.power_per_unit_w * units
    power = power + constants.memory_power_w
    latency = constants.base_latency_s + constants.latency_per_unit_s * units
    size = width_units * constants.size_per_width + depth_units * constants.size_per_depth
    return PaperCosts(size, power, latency, constants.epochs * power * latency)


def arch_paper_costs(
    dims: ModelDims, arch: Arch | ArchMask, constants: PaperConstants = PAPER_CONSTANTS
) -> PaperCosts:
    """`paper_costs` of a genome or mask: depth is the kept blocks, width their mean heads.

    So width times depth is the number of heads kept. ACME's grid has one width for all blocks,
    where this is the same; neurons do not count. Differentiable in relaxed masks.
    """
    block, heads, _ = (_float(count) for count in _counts(dims, arch))
    depth = jnp.sum(block)
    return paper_costs(jnp.sum(block * heads) / depth, depth, constants)
