"""How good a device's training data are, in four numbers: `refine.data_quality`.

* `log_likelihood`: how well the samples explain each other, the mean log density of a sample under
  a kernel density estimate of all others (`fed.kde.data_quality`), in nats a dimension of the
  edge's projection: noise and outliers lower it, and so does variety. Comparable between devices
  of one edge only. `acme_jax.densities.answers` has the same by sample: the outlier score.
* `label_entropy` of the labels, nats: 0 with one class, ln K with K balanced ones.
* `approximate_entropy` (ApEn, m = 2) and `lempel_ziv_entropy` of the token sequences of texts,
  nats, means over samples (`nas.entropy`); None for images, which are no sequences.

ApEn is the quality ApEn' of the Performance Law (arXiv 2412.00430), D' = tokens * ApEn'. Two traps:

1. A law that is fitted on runs which differ in depth and width only cannot tell what the data term
   is worth: D', its exponent and the constant merge (rank 5 of 6). Vary the data, too, or keep D'
   fixed, and report intervals.
2. ApEn of a short sequence over a large vocabulary measures its length, not its order: 50 items
   that are all different give ln(49/48) = 0.0206, next to 0 for a constant sequence; four equally
   likely symbols give 0.83 at 50 items and 1.376 at 2,000 (limit ln 4 = 1.386). Texts of a few
   dozen tokens are such sequences: read the Lempel-Ziv entropy beside it, which tells them apart.

The numbers travel (`messages.DataQuality`) and are counted; nothing else reads them. Shape letters:
C devices, N samples, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from acme_jax import bert, densities, exchange
from acme_jax.bert import BertConfig
from acme_jax.context import Context
from acme_jax.encoders import EncoderConfig
from acme_jax.fleet import Device, edge_devices
from acme_jax.message_records import DataQuality
from acme_jax.post import Post
from fed.clients import ClientData
from nas.entropy import approximate_entropy, label_entropy, lempel_ziv_entropy

_AT_ONCE = 64
"""Sequences whose [T, T] comparisons are in memory together."""


@jax.jit
def sequence_entropies(sequences: Array, lengths: Array) -> tuple[Array, Array]:
    """Mean ApEn [] and Lempel-Ziv entropy [] of identifiers [N, T], of which `lengths` [N] count.

    Sequences of fewer than three items, of which ApEn knows nothing, are left out of both; NaN
    where no other is left.
    """

    def both(args: tuple[Array, Array]) -> tuple[Array, Array]:
        return approximate_entropy(*args), lempel_ziv_entropy(*args)

    found = lax.map(both, (sequences, lengths), batch_size=_AT_ONCE)
    long = lengths >= 3
    total = jnp.sum(long)
    first, second = (jnp.sum(jnp.where(long, values, 0.0)) / total for values in found)
    return first, second


def measure(device: Device, log_likelihood: float, encoder: EncoderConfig) -> DataQuality:
    """One device's numbers.

    Args:
      device: its training samples.
      log_likelihood: of `acme_jax.densities.answers`.
      encoder: kind of the inputs. [CLS] and [SEP] are no part of a text's sequence.
    """
    labels = jnp.asarray(device.train.labels)
    values = [log_likelihood, float(label_entropy(labels, encoder.num_classes))]
    if isinstance(encoder, BertConfig):
        ids = jnp.asarray(device.train.inputs)
        lengths = bert.is_real(ids, encoder).sum(axis=1) - 2
        values += [float(value) for value in sequence_entropies(ids[:, 1:], lengths)]
    known = [np.asarray(value, np.float32) if math.isfinite(value) else None for value in values]
    return DataQuality(*known, *[None] * (4 - len(known)))


def collect(
    context: Context, post: Post, edge: int, summaries: ClientData, shared: Array
) -> list[DataQuality]:
    """Every device reports its numbers to its edge.

    Args:
      context: of the run.
      post: counts the messages.
      edge: which edge.
      summaries: one vector for each of the devices' training samples [C, N, D].
      shared: the same of the edge's shared data [S, D], for the projection.
    """
    devices = edge_devices(context.devices, edge)
    asked = exchange.density_question(context, edge, shared)
    if context.config.refine.similarity != "kde":  # else devices have it
        asked = asked._replace(references=np.asarray(asked.references)[:0])
        asked = post.send(asked, tier="edge-device", direction="down", round=0, copies=len(devices))
    quality = np.asarray(densities.answers(asked, summaries.inputs, summaries.size).quality)
    return [
        post.send_up(measure(device, float(value), context.encoder), sender=device.id, round=0)
        for device, value in zip(devices, quality, strict=True)
    ]


def rows(devices: Sequence[Device], reports: Sequence[DataQuality]) -> list[dict[str, Any]]:
    """One JSON-ready row a device, for `results.json`; null: unknown."""
    return [
        {
            "device": device.id,
            "edge": device.edge,
            **{k: None if v is None else float(v) for k, v in report._asdict().items()},
        }
        for device, report in zip(devices, reports, strict=True)
    ]
