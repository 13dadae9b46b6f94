"""What keeps one bad batch from spoiling a run: updates are judged inside the jitted step.

An update is dropped where the loss or a gradient is not finite, and, if `train.skip_spike` asks for
it, where the gradient is many times longer than usual. A dropped update leaves parameters, average
and optimizer as they were; the step and with it the position in the data go on.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Updates before the mean is trusted, and the least share of a new one in it.
_LEAST_SEEN, _LEAST_SHARE = 50, 0.01


@flax.struct.dataclass
class NormMean:
    """The running mean of gradient norms of the updates that were kept, and their number."""

    mean: Float[Array, ""]
    count: Int[Array, ""]

    @classmethod
    def zero(cls) -> NormMean:
        """Nothing seen yet."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def judge(
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    norms: NormMean | None,
    factor: float,
) -> tuple[Bool[Array, ""], NormMean | None, dict[str, Float[Array, ""]]]:
    """Whether an update may be kept; pure.

    Args:
      loss: of the batch.
      grad_norm: of the whole gradient, before clipping: not finite if any part of it is not.
      norms: of earlier updates; None where spikes are not looked for.
      factor: a norm above so many times its mean is a spike.

    Returns:
      The verdict, the new mean, and what to count: `bad` (1 where something is not finite) and,
      with `norms`, `spike`.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    counts = {"bad": 1.0 - finite.astype(jnp.float32)}
    if norms is None:
        return finite, None, counts
    spike = finite & (norms.count >= _LEAST_SEEN) & (grad_norm > factor * norms.mean)
    keep = finite & ~spike
    share = jnp.maximum(1.0 / (norms.count + 1), _LEAST_SHARE)
    new = NormMean(norms.mean + share * (grad_norm - norms.mean), norms.count + 1)
    return keep, choose(keep, new, norms), counts | {"spike": spike.astype(jnp.float32)}


def choose(keep: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The tree `new` where `keep`, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
