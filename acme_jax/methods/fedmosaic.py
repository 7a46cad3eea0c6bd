"""FedMosaic (arXiv 2506.11024): Co-LoRA cores averaged by the relevance of clients' tasks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from acme_jax.blocks import Params
from acme_jax.methods.fedmosaic_bases import MODULES, aligned_bases, held_units, run_layers
from acme_jax.methods.method import Built, Method, MethodError, Payload
from acme_jax.methods.problem import Problem, weighted_loss
from fed import co_lora, gradient_sketch
from fed.algorithms.fedmosaic import Adapters, MosaicClient, MosaicServer, fedmosaic, start_clients
from fed.clients import Batch, replicate, take_row
from fed.co_lora import Basis

RANK = 16
SCALE = 2.0
"""The paper's alpha / r, and its rank for text models."""
RATE = 3e-3
"""Of Adam. Chosen, as is the rank, on the digits by a part of the devices' training samples. From
1e-2 on losses jump in some runs: what aligned B of wide clients add has up to 20 times the norm."""
EVERY = 10
SHARE = 0.4
"""Of the task vector's rows that travel."""


def build(problem: Problem) -> Built:
    """Each client adapts the frozen sub-header that it can hold.

    All three layers have Co-LoRA modules; a client's bases are those of its own units, aligned on
    the edge's public samples with the basis of the smallest client's sub-header, which is random.
    Sketches come from that sub-header, which all clients hold.

    Bytes each way and round: 4 (r^2 + r) a module, and up 4 D floor(0.4 D) of a sketch, D the
    smallest client's units. With 128 units and ten classes 2.6 kB down and 4.2 kB up, where the
    header has 137 kB; once before the first round down 30 kB of bases to a client with all units.

    Deviations: no layer is left for ordinary LoRA; the first layer's A and the last one's B are the
    same for all, since their widths are; the public samples of all backbones are one pool, so what
    differs between backbones is not aligned; the sketch's model reads each client's own features.
    A client predicts with the shared cores beside which it trained last.

    Raises:
      MethodError: no public samples to align the bases on.
    """
    if problem.public is None:
        raise MethodError(
            "fedmosaic needs public samples at the edge to align its bases on, and this problem "
            "has none; heterofl, fedvtc and acme do without"
        )
    header, count = problem.header, problem.num_clients
    units = np.asarray([header.units(float(c)) for c in problem.capacities])
    distinct, level_of = np.unique(units, return_inverse=True)
    levels = tuple(map(int, distinct))
    smallest = levels[0]
    key = jax.random.fold_in(problem.key, 7)
    bases = aligned_bases(header, levels, RANK, problem.start, problem.public.features, key)
    cores = {name: co_lora.zero_core(basis.a.shape[1]) for name, basis in bases.items()}
    gates = {name: jnp.zeros(basis.a.shape[2]) for name, basis in bases.items()}
    small = _sub_header(problem.start, smallest)
    rows = gradient_sketch.num_rows(smallest, SHARE)

    def logits_of(adapters: Adapters, features: Array) -> Array:
        bases, held = adapters.fixed

        def added(name: str, inputs: Array) -> Array:
            beta = co_lora.gate_value(adapters.private[name], inputs)
            own, shared = adapters.local[name], adapters.shared[name]
            return co_lora.apply(bases[name], own, shared, beta, inputs, SCALE)

        return run_layers(problem.start, held, features, added)["last"].outputs

    def task_vector(batch: Batch) -> Array:
        layer = run_layers(small, jnp.ones(smallest), batch.inputs)["second"]
        return gradient_sketch.task_vector(
            *layer,
            small["last"]["kernel"],
            small["last"]["bias"],
            batch.labels,
            batch.weight,
            between=gradient_sketch.relu,
            rows=rows,
        )

    algorithm = fedmosaic(
        lambda adapters, batch, key: weighted_loss(logits_of(adapters, batch.inputs), batch),
        optax.adam(RATE),
        task_vector,
        every=EVERY,
    )
    own = take_row((bases, held_units(header, levels)), jnp.asarray(level_of))
    own_cores = replicate(cores, count)
    adapters = Adapters(own_cores, own_cores, replicate(gates, count), own)
    sketch_shape = (rows, smallest)

    def logits(server: MosaicServer, client: MosaicClient, row: Array, features: Array) -> Array:
        del server, row
        return logits_of(client.adapters, features)

    sent = jax.tree.map(np.asarray, bases)

    def setup_down(row: int) -> Payload:
        # The reference's bases, the first A and the last B come from the shared seed.
        level, own = int(level_of[row]), int(units[row])
        if level == 0:
            return ()
        first, second, last = (take_row(sent[name], level) for name in MODULES)
        return [first.b[:own], second.a[:, :own], second.b[:own], last.a[:, :own]]

    return Built(
        algorithm,
        algorithm.server_init(cores, sketch_shape, count),
        start_clients(adapters, sketch_shape, count),
        logits,
        _flops(problem, bases, rows),
        setup_down=setup_down,
    )


def _sub_header(params: Params, units: int) -> Params:
    """The dense header of the first units of both hidden layers."""
    first, second, last = (params[name] for name in MODULES)
    return {
        "first": {"kernel": first["kernel"][:, :units], "bias": first["bias"][:units]},
        "second": {"kernel": second["kernel"][:units, :units], "bias": second["bias"][:units]},
        "last": {"kernel": last["kernel"][:units], "bias": last["bias"]},
    }


def _flops(problem: Problem, bases: dict[str, Basis], rows: int) -> np.ndarray:
    """[C] of training on one sample.

    Frozen layers forward and back to their inputs, adapters with both of their cores, and what
    task vectors cost in the mean.
    """
    header, schedule = problem.header, problem.schedule
    smallest = float(problem.capacities.min())
    sketch = header.flops(smallest) + 2 * rows * header.units(smallest)
    batches = np.ceil(np.asarray(problem.data.size) / schedule.batch_size) * schedule.epochs
    found = []
    for capacity, number in zip(problem.capacities, batches, strict=True):
        units = header.units(float(capacity))
        sizes = (header.num_features, units, units, header.num_classes)
        adapters = sum(
            2 * basis.a.shape[1] * (d_in + d_out + 2 * basis.a.shape[1])
            for basis, d_in, d_out in zip(bases.values(), sizes[:-1], sizes[1:], strict=True)
        )
        taken = np.ceil(number / EVERY) / number
        found.append(2 * header.flops(float(capacity)) + 3 * adapters + taken * sketch)
    return np.asarray(found)


METHOD = Method(
    "fedmosaic",
    "FedMosaic",
    "Small cores of aligned low-rank adapters travel; clients mix those of relevant tasks.",
    build,
    needs_public=True,
)
