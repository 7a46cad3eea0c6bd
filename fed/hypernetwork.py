"""A network that makes every client's personal arrays from a learnable embedding of the client.

Pa3dFL (arXiv 2405.20589, Eq. 9), after pFedHN (Shamsian et al. 2021): an encoder turns the
embeddings of all clients into E', each array attends over them with a temperature of its own, and
a linear decoder makes the array. Clients with like embeddings thus share, whatever they keep of
the array.

Shape letters: C clients, J embedding, I hidden features of the encoder.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Hypernetwork(NamedTuple):
    """All of it is trained; trees have one entry for each personal array."""

    embeddings: jax.Array  # [C, J]
    encoder: tuple[tuple[jax.Array, jax.Array], ...]  # weights [in, out] and biases [out]
    decoders: Any  # leaves [I, ...]
    start: Any  # leaves [...], the decoders' biases
    log_temperature: Any  # leaves []


def init(
    key: jax.Array,
    template: Any,
    *,
    num_clients: int,
    embedding_size: int = 64,
    hidden: tuple[int, ...] = (100, 100),
    spread: float = 0.1,
) -> Hypernetwork:
    """A hyper-network that at first makes arrays near those of the template.

    The paper's sizes are not public; 64 and two hidden layers of 100 are pFedHN's habit. Initial
    temperatures are sqrt(I), as in scaled dot-product attention.

    Args:
      key: consumed.
      template: tree of arrays, the starting values.
      num_clients: C.
      embedding_size: J.
      hidden: widths of the encoder's layers, the last is I.
      spread: size of the clients' first differences, relative to the root mean square of each
        array (to 1, where that is 0).

    Raises:
      ValueError: no hidden layer.
    """
    if not hidden:
        raise ValueError("hidden must name at least one width")
    embedding_key, encoder_key, decoder_key = jax.random.split(key, 3)
    embeddings = jax.random.normal(embedding_key, (num_clients, embedding_size))
    widths = (embedding_size, *hidden)
    encoder = tuple(
        (jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, jnp.zeros(b))
        for k, a, b in zip(
            jax.random.split(encoder_key, len(hidden)), widths[:-1], widths[1:], strict=True
        )
    )
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, template))
    keys = jax.random.split(decoder_key, max(len(leaves), 1))

    def decoder(key: jax.Array, leaf: jax.Array) -> jax.Array:
        size = jnp.sqrt((leaf**2).mean())
        scale = spread * jnp.where(size > 0, size, 1.0) * hidden[-1] ** -0.5
        return jax.random.normal(key, (hidden[-1], *leaf.shape)) * scale

    decoders = [decoder(k, leaf) for k, leaf in zip(keys[: len(leaves)], leaves, strict=True)]
    temperature = jnp.asarray(0.5 * math.log(hidden[-1]), jnp.float32)
    return Hypernetwork(
        embeddings,
        encoder,
        jax.tree.unflatten(structure, decoders),
        jax.tree.unflatten(structure, leaves),
        jax.tree.unflatten(structure, [temperature for _ in leaves]),
    )


def encode(params: Hypernetwork) -> jax.Array:
    """E', [C, I]: rectified layers, the last one linear."""
    x = params.embeddings
    for index, (weights, bias) in enumerate(params.encoder):
        x = x @ weights + bias[None]
        if index + 1 < len(params.encoder):
            x = jax.nn.relu(x)
    return x


def generate(params: Hypernetwork, row: jax.Array) -> Any:
    """The personal arrays of the client in this row.

    `s_i = E'^T e'_i`, `e_i^(l) = E' softmax(s_i / tau_l)`, `theta_v = Dec_l(e_i^(l))`.

    Args:
      params: see `Hypernetwork`.
      row: int []; map over it for several clients.

    Returns:
      A tree like the template.
    """
    encoded = encode(params)
    scores = encoded @ encoded[row]  # [C]

    def one(decoder: jax.Array, start: jax.Array, log_temperature: jax.Array) -> jax.Array:
        attended = jax.nn.softmax(scores * jnp.exp(-log_temperature)) @ encoded
        return start + jnp.tensordot(attended, decoder, axes=1)

    return jax.tree.map(one, params.decoders, params.start, params.log_temperature)
