"""The optimizer: warm-up, clip by global norm, Adam, and the average of parameters (App. B.2)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from kaleido_jax.errors import UserError
from kaleido_jax.types import Params

DECAYS = ("constant", "cosine")


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up to `optim.learning_rate`, then constant or cosine to 0 at the last step."""
    o = config.optim
    if o.decay not in DECAYS:
        raise UserError(
            f"config key 'optim.decay' is {o.decay!r}; it must be one of {', '.join(DECAYS)}"
        )
    warmup = max(o.warmup_steps, 1)
    # The first update already moves: step 0 learns with 1 / warmup of the rate.
    ramp = optax.linear_schedule(o.learning_rate / warmup, o.learning_rate, warmup - 1)
    if o.decay == "constant":
        after = optax.constant_schedule(o.learning_rate)
    else:
        rest = max(config.train.num_steps - warmup, 1)
        after = optax.cosine_decay_schedule(o.learning_rate, rest)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clip, then Adam with decoupled weight decay (0 in the paper).

    `optim.text_rate` multiplies what T5 learns with: states that move under the denoiser faster
    than it can follow hide the small part of the loss that the boxes decide.
    """
    o = config.optim
    steps = [
        optax.clip_by_global_norm(o.clip_norm),
        optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
        optax.add_decayed_weights(o.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config)),
    ]
    if (rate := o.get("text_rate", 1.0)) != 1.0:
        steps.append(optax.masked(optax.scale(rate), _of_text))
    return optax.chain(*steps)


def _of_text(params: Params) -> Any:
    """True at the parameters of the T5 encoder and decoder."""
    return {
        part: jax.tree.map(lambda _, t5=part != "denoiser": t5, tree)
        for part, tree in params.items()
    }


def update_ema(
    ema: Params, params: Params, step: Int[Array, ""], decay: float, warmup: bool
) -> Params:
    """The running average after update number `step` (0-based).

    Args:
      decay: App. B.2 has 0.9999.
      warmup: start with decay (1 + step) / (10 + step), for runs too short for a constant one.
    """
    rate: Float[Array, ""] = jnp.asarray(decay, jnp.float32)
    if warmup:
        rate = jnp.minimum(rate, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(params, ema, 1.0 - rate)


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
