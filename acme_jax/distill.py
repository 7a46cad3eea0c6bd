"""Losses and gradients of the three cloud phases: reference, width and depth.

The supernet is trained as DynaBERT is (Hou et al., 2020), which ACME builds on: every step
adds up the gradients of several sub-networks of the uniform grid. Sub-networks run dense
(left-out blocks, heads and neurons are skipped), never masked at full size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from acme_jax import supernet
from acme_jax.blocks import Params
from acme_jax.config import TrainConfig
from acme_jax.encoders import EncoderConfig
from acme_jax.training import GradFn
from nas.arch import ArchSpace, keep_mask

LABEL_SMOOTHING = 0.1
"""Of the reference model only: softer teachers transfer more."""

Apply = Callable[[Params, Array, EncoderConfig], supernet.Outputs]


class Lesson(NamedTuple):
    """What a distillation phase teaches. All traced: both phases share one program."""

    teacher: Params
    full_width: Array  # bool []: the teacher runs at full width, not at the student's
    depths: Array  # int32 [K], what each width's depth is drawn from, without repetition
    logit_loss: Array  # [] coefficient of the soft cross-entropy
    hidden_loss: Array  # [] coefficient of the hidden-state term


def width_lesson(space: ArchSpace, teacher: Params, train: TrainConfig) -> Lesson:
    """DynaViT_W: every width at full depth, taught by the reference network at full width."""
    depths = np.full(len(space.depth_choices), space.num_layers)
    return _lesson(teacher, True, depths, train)


def depth_lesson(space: ArchSpace, teacher: Params, train: TrainConfig) -> Lesson:
    """DynaViT: every width at every depth, taught by the frozen DynaViT_W at the *same* width.

    As DynaBERT's paper has it; both code bases leave the teacher at full width.
    """
    return _lesson(teacher, False, np.asarray(space.depth_choices), train)


def _lesson(teacher: Params, full_width: bool, depths: np.ndarray, train: TrainConfig) -> Lesson:
    return Lesson(
        teacher,
        jnp.asarray(full_width),
        jnp.asarray(depths, jnp.int32),
        jnp.float32(train.logit_loss),
        jnp.float32(train.hidden_loss),
    )


def soft_cross_entropy(student: Array, teacher: Array) -> Array:
    """-mean_b sum_c softmax(teacher)_c log_softmax(student)_c of logits [B, C]."""
    log_probs = jax.nn.log_softmax(student)
    return -jnp.mean(jnp.sum(jax.nn.softmax(teacher) * log_probs, axis=-1))


def hidden_state_loss(student: supernet.Outputs, teacher: supernet.Outputs, keep: Array) -> Array:
    """Sum over kept blocks of MSE(input, teacher's input), plus MSE of the final states.

    The teacher runs at full depth; each kept block of the student is compared with the
    teacher's block of the same index (ACME after DynaBERT: states `kept + [L]`).

    Args:
      student: `inputs` [L, B, T, D]; entries of blocks that are not kept are ignored.
      teacher: the same shapes.
      keep: bool [L].
    """
    # Means in at least float32: millions of small squares add up.
    wide = jnp.promote_types(student.final.dtype, jnp.float32)
    squares = jnp.square(student.inputs - teacher.inputs).astype(wide)
    per_block = jnp.mean(squares, axis=(1, 2, 3))
    final = jnp.mean(jnp.square(student.final - teacher.final).astype(wide))
    return jnp.sum(jnp.where(keep, per_block, 0.0)) + final


def reference_grad(config: EncoderConfig, apply: Apply = supernet.apply) -> GradFn:
    """Cross-entropy of a network alone; the phase's `lesson` is unused.

    Args:
      config: static sizes of the full network.
      apply: (params, inputs, config) -> outputs; of the full network unless said otherwise.
    """

    def loss_fn(params: Params, inputs: Array, labels: Array) -> tuple[Array, Array]:
        logits = apply(params, inputs, config).logits
        targets = optax.smooth_labels(jax.nn.one_hot(labels, config.num_classes), LABEL_SMOOTHING)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        return loss, jnp.mean(jnp.argmax(logits, -1) == labels)

    def grad_fn(
        key: Array, params: Params, lesson: None, inputs: Array, labels: Array
    ) -> tuple[dict[str, Array], Params]:
        del key, lesson
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, inputs, labels)
        return {"loss": loss, "accuracy": accuracy}, grads

    return grad_fn


def distillation_grad(config: EncoderConfig, space: ArchSpace, depths_per_step: int) -> GradFn:
    """Summed distillation gradient over sub-networks of the uniform grid.

    Every step trains each width (head choice i with neuron choice i) at `depths_per_step` of
    the lesson's depths, drawn so that, over the widths, all depths take part. With as many
    as there are depths this is DynaBERT's rule, all pairs; fewer give the same gradient in
    the mean, up to its scale, for a fraction of the cost. Loss of one sub-network:
    `logit_loss * soft cross-entropy + hidden_loss * hidden-state term`.

    Args:
      config: static sizes.
      space: the choices.
      depths_per_step: at most the number of the lesson's depths.
    """
    full_depth = jnp.ones(space.num_layers, bool)

    def grad_fn(
        key: Array, params: Params, lesson: Lesson, inputs: Array, labels: Array
    ) -> tuple[dict[str, Array], Params]:
        del labels
        num_depths = lesson.depths.shape[0]
        order = jax.random.permutation(key, num_depths)
        total, grads = jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params)
        widest: supernet.Outputs | None = None
        # Widest first: its teacher is the full-width teacher that all widths may share.
        for width, (heads, neurons) in reversed(list(enumerate(space.widths))):

            def teach(heads: int = heads, neurons: int = neurons) -> supernet.Outputs:
                return supernet.apply_width(
                    lesson.teacher, inputs, config, heads, neurons, full_depth
                )

            if widest is None:
                target = widest = teach()
            else:
                target = lax.cond(lesson.full_width, lambda full=widest: full, teach)

            def loss_fn(
                params: Params,
                keep: Array,
                target: supernet.Outputs = target,
                heads: int = heads,
                neurons: int = neurons,
            ) -> Array:
                student = supernet.apply_width(params, inputs, config, heads, neurons, keep)
                soft = soft_cross_entropy(student.logits, target.logits)
                hidden = hidden_state_loss(student, target, keep)
                return lesson.logit_loss * soft + lesson.hidden_loss * hidden

            def add(
                carry: tuple[Array, Params],
                depth: Array,
                loss_fn: Callable[[Params, Array], Array] = loss_fn,
            ) -> tuple[tuple[Array, Params], None]:
                total, grads = carry
                keep = keep_mask(space.num_layers, depth) > 0
                loss, grad = jax.value_and_grad(loss_fn)(params, keep)
                return (total + loss, jax.tree.map(jnp.add, grads, grad)), None

            draw = order[(width + jnp.arange(depths_per_step)) % num_depths]
            # A scan over depths, not a vmap: blocks that are left out are then really skipped.
            (total, grads), _ = lax.scan(add, (total, grads), lesson.depths[draw])
        return {"loss": total / (len(space.widths) * depths_per_step)}, grads

    return grad_fn
