"""Losses and gradients of the three cloud phases: reference, width and depth.

The supernet is trained as DynaBERT is (Hou et al., 2020), which ACME builds on: every step
adds up the gradients of all sub-networks of the uniform grid. Sub-networks run dense
(static width prefixes, skipped blocks), never masked at full size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from acme_jax import supernet
from acme_jax.config import TrainConfig
from acme_jax.training import GradFn
from acme_jax.vit import Params, ViTConfig
from nas.arch import ArchSpace, keep_mask


def soft_cross_entropy(student: Array, teacher: Array) -> Array:
    """-mean_b sum_c softmax(teacher)_c log_softmax(student)_c of logits [B, C]."""
    log_probs = jax.nn.log_softmax(student)
    return -jnp.mean(jnp.sum(jax.nn.softmax(teacher) * log_probs, axis=-1))


def hidden_state_loss(
    student: supernet.Outputs, teacher: supernet.Outputs, keep: Array
) -> Array:
    """Sum over kept blocks of MSE(input, teacher's input), plus MSE of the final states.

    The teacher runs at full depth; each kept block of the student is compared with the
    teacher's block of the same index (ACME after DynaBERT: states `kept + [L]`).

    Args:
      student: `inputs` [L, B, T, D]; entries of blocks that are not kept are ignored.
      teacher: the same shapes.
      keep: bool [L].
    """
    per_block = jnp.mean((student.inputs - teacher.inputs) ** 2, axis=(1, 2, 3))
    final = jnp.mean((student.final - teacher.final) ** 2)
    return jnp.sum(jnp.where(keep, per_block, 0.0)) + final


def reference_grad(config: ViTConfig, label_smoothing: float = 0.1) -> GradFn:
    """Cross-entropy of the full network; `teacher` is unused."""

    def loss_fn(params: Params, images: Array, labels: Array) -> tuple[Array, Array]:
        logits = supernet.apply(params, images, config).logits
        targets = optax.smooth_labels(jax.nn.one_hot(labels, config.num_classes), label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        return loss, jnp.mean(jnp.argmax(logits, -1) == labels)

    def grad_fn(
        key: Array, params: Params, teacher: None, images: Array, labels: Array
    ) -> tuple[dict[str, Array], Params]:
        del key, teacher
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, images, labels)
        return {"loss": loss, "accuracy": accuracy}, grads

    return grad_fn


def distillation_grad(
    config: ViTConfig,
    space: ArchSpace,
    train: TrainConfig,
    *,
    elastic_depth: bool,
) -> GradFn:
    """Summed distillation gradient over the uniform grid of sub-networks.

    Width phase (`elastic_depth=False`, DynaViT_W): every width at full depth; the teacher
    is the reference network at full width. Depth phase (DynaViT): every width at every
    depth; the teacher is the frozen width-adaptive network at the *same* width. Loss of one
    sub-network: `logit_loss * soft cross-entropy + hidden_loss * hidden-state term`.

    `train.depths_per_step` may be lower than the number of depths: then every step draws a
    random Latin assignment, so that each width and each depth still takes part (equally
    often in the long run), for a fraction of the cost.

    Args:
      config: static sizes.
      space: the choices; widths pair head choice i with neuron choice i.
      train: the two coefficients.
      elastic_depth: which phase.
    """
    depths = space.depth_choices if elastic_depth else (space.num_layers,)
    keeps = jnp.stack([keep_mask(space.num_layers, jnp.int32(d)) > 0 for d in depths])
    per_step = min(train.depths_per_step, len(depths))
    widths = list(zip(space.head_choices, space.neuron_choices, strict=True))
    full_depth = jnp.ones(space.num_layers, bool)

    def grad_fn(
        key: Array, params: Params, teacher: Params, images: Array, labels: Array
    ) -> tuple[dict[str, Array], Params]:
        total_loss = jnp.float32(0.0)
        grads = jax.tree.map(jnp.zeros_like, params)
        target = supernet.apply(teacher, images, config)
        order = jax.random.permutation(key, len(depths))
        for width, (heads, neurons) in enumerate(widths):
            drawn = keeps[order[(width + jnp.arange(per_step)) % len(depths)]]
            if elastic_depth:
                target = supernet.apply_width(
                    teacher, images, config, heads, neurons, full_depth
                )

            def loss_fn(
                params: Params,
                keep: Array,
                target: supernet.Outputs = target,
                heads: int = heads,
                neurons: int = neurons,
            ) -> Array:
                student = supernet.apply_width(params, images, config, heads, neurons, keep)
                soft = soft_cross_entropy(student.logits, target.logits)
                hidden = hidden_state_loss(student, target, keep)
                return train.logit_loss * soft + train.hidden_loss * hidden

            def add(carry: tuple[Array, Params], keep: Array) -> tuple[tuple[Array, Params], None]:
                loss, grads = carry
                value, grad = jax.value_and_grad(loss_fn)(params, keep)
                return (loss + value, jax.tree.map(jnp.add, grads, grad)), None

            # A scan over depths, not a vmap: blocks that are not kept are then really skipped.
            (total_loss, grads), _ = lax.scan(add, (total_loss, grads), drawn)
        count = len(widths) * per_step
        return {"loss": total_loss / count}, grads

    return grad_fn
