"""All federated methods on the same devices: the experiment behind `scripts/compare_methods.py`.

Devices have four budgets: their frozen backbones are the supernet's sub-networks of a quarter, a
half, three quarters and all of depth and width, and they hold as much of the header. All backbones
have the same width of features, so one header can be averaged across them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from acme_jax.blocks import Params
from acme_jax.config import Config
from acme_jax.context import proxy_indices
from acme_jax.experiments import final
from acme_jax.experiments.experiment import Experiment, Row
from acme_jax.experiments.study import Study
from acme_jax.fleet import Device
from acme_jax.methods import running
from acme_jax.methods.mlp_header import MlpHeader
from acme_jax.methods.problem import Problem, Public, Schedule
from acme_jax.methods.registry import METHODS
from acme_jax.system import compute_features
from fed.clients import ClientData, stack_clients

CAPACITIES = (0.25, 0.5, 0.75, 1.0)
DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "iid": {"distribution": "iid"},
    "c2": {"distribution": "c2"},
    "c3": {"distribution": "c3"},
    "c4": {"distribution": "c4"},
    "dirichlet0.1": {"distribution": "dirichlet", "dirichlet_alpha": 0.1},
}
NUM_DEVICES = 12
NUM_HIDDEN = 128
START_EPOCHS = 5
START_BATCH = 64
START_RATE = 1e-3


def pooled(study: Study, backbone: Params, inputs: np.ndarray) -> np.ndarray:
    """Features [N, 2 D] of samples: mean token and summary."""
    tokens, summaries = compute_features(study.context, backbone, inputs)
    return np.concatenate([tokens.mean(axis=1), summaries], axis=1)


def run(study: Study, unit: str) -> list[Row]:
    """Every method on one distribution of labels."""
    context = study.context
    fleet = study.fleet(num_edges=1, devices_per_edge=NUM_DEVICES, **DISTRIBUTIONS[unit])
    backbones = [study.backbone(study.point(c, c).arch) for c in CAPACITIES]
    data = _padded(
        stack_clients(
            [
                (pooled(study, backbones[i % len(backbones)], d.train.inputs), d.train.labels)
                for i, d in enumerate(fleet)
            ]
        ),
        study.config,
    )
    header = MlpHeader(int(data.inputs.shape[2]), NUM_HIDDEN, context.encoder.num_classes)
    public = _public(study, backbones)
    start, _ = study.cached(
        "comparison_start", lambda: (_start(study.key("comparison start"), header, public), {})
    )
    problem = Problem(
        key=study.key("comparison", list(DISTRIBUTIONS).index(unit)),
        header=header,
        start=start,
        data=data,
        capacities=np.asarray([CAPACITIES[i % len(CAPACITIES)] for i in range(len(fleet))]),
        public=public,
        schedule=Schedule(),
        mesh=context.mesh,
    )
    rows: list[Row] = [{"method": "start", **_accuracies(_test(study, backbones, fleet, problem))}]
    for name, method in METHODS.items():
        context.session.say(f"  {method.title} ...")
        outcome = running.run(method, problem)
        found = final.devices_with(
            lambda place, inputs: pooled(study, backbones[place % len(backbones)], inputs),
            fleet,
            running.evaluator(outcome),
        )
        rows.append(
            {
                "method": name,
                **_accuracies(found),
                "up_bytes": float(outcome.up_bytes.mean()),
                "down_bytes": float(outcome.down_bytes.mean()),
                "device_flops": float(outcome.flops.mean()),
                "seconds": outcome.seconds,
                "num_devices": len(fleet),
                "serves_capacities": method.serves_capacities,
            }
        )
    return rows


def _padded(data: ClientData, config: Config) -> ClientData:
    """One length for all distributions and seeds, so that they share compiled programs."""
    fleet = config.fleet
    # Rounded for each label, at most ten of which a device has.
    longest = math.ceil(fleet.samples_per_device * (1.0 - fleet.test_fraction)) + 10
    extra = max(longest - data.labels.shape[1], 0)
    return ClientData(
        jnp.pad(data.inputs, ((0, 0), (0, extra), (0, 0))),
        jnp.pad(data.labels, ((0, 0), (0, extra))),
        data.size,
    )


def _test(
    study: Study, backbones: list[Params], fleet: list[Device], problem: Problem
) -> np.ndarray:
    """Accuracy of the header that every method starts from."""

    @jax.jit
    def evaluate(data: ClientData) -> Array:
        def one(args: tuple[Array, Array, Array]) -> Array:
            features, labels, size = args
            found = jnp.argmax(problem.header.logits(problem.start, features), axis=-1)
            valid = jnp.arange(labels.shape[0]) < size
            return jnp.sum((found == labels) & valid) / size

        return lax.map(one, (data.inputs, data.labels, data.size))

    return final.devices_with(
        lambda place, inputs: pooled(study, backbones[place % len(backbones)], inputs),
        fleet,
        evaluate,
    )


def _accuracies(values: np.ndarray) -> dict[str, float]:
    worst = np.sort(values)[: max(1, len(values) // 10)]
    return {"test_accuracy": float(values.mean()), "worst_tenth_accuracy": float(worst.mean())}


def _public(study: Study, backbones: list[Params]) -> Public:
    """The edge's shared data as every backbone sees them, one after the other."""
    parts = []
    for backbone in backbones:
        splits = study.context.splits
        rows = proxy_indices(study.context)
        parts.append(
            (pooled(study, backbone, splits.train.inputs[rows]), splits.train.labels[rows])
        )
    return Public(*(jnp.asarray(np.concatenate(part)) for part in zip(*parts, strict=True)))


def _start(key: Array, header: MlpHeader, public: Public) -> Params:
    """The header trained on the edge's shared data: AdamW with cosine decay."""
    count = public.labels.shape[0]
    steps = count // START_BATCH
    schedule = optax.cosine_decay_schedule(START_RATE, START_EPOCHS * steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-4)

    @jax.jit
    def train(key: Array, public: Public) -> Params:
        init_key, order_key = jax.random.split(key)

        def loss_fn(params: Params, rows: Array) -> Array:
            logits = header.logits(params, public.features[rows])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, public.labels[rows]
            ).mean()

        def step(carry: tuple[Params, Any], rows: Array) -> tuple[tuple[Params, Any], None]:
            params, state = carry
            grads = jax.grad(loss_fn)(params, rows)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        orders = [
            jax.random.permutation(k, count)[: steps * START_BATCH].reshape(steps, START_BATCH)
            for k in jax.random.split(order_key, START_EPOCHS)
        ]
        params = header.init(init_key)
        (params, _), _ = lax.scan(step, (params, optimizer.init(params)), jnp.concatenate(orders))
        return params

    return train(key, public)


def _units(config: Config) -> list[str]:
    del config
    return list(DISTRIBUTIONS)


EXPERIMENT = Experiment("methods", "all federated methods on devices of four budgets", _units, run)
