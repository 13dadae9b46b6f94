"""Low-rank adapters of linear layers (LoRA, Hu et al. 2021, Section 4.1).

A frozen kernel W is used as W + alpha / rank * A B, of which A and B learn. B starts at 0, so the
model starts as it was. In a tree of parameters A and B lie beside their kernel as 'lora_a' and
'lora_b'; with scanned layers all three have the layers on axis 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float

A, B = "lora_a", "lora_b"


def delta(
    a: Float[Array, "i *layers r"], b: Float[Array, "r *layers o"], alpha: float
) -> Float[Array, "i *layers o"]:
    """alpha / rank * A B, in the type of A; numpy arrays give a numpy array."""
    # The operator alone serves numpy and jax: the layers go first, where a product batches them.
    first, second = (a, b) if a.ndim == 2 else (a.swapaxes(0, 1), b.swapaxes(0, 1))
    product = (first @ second) * np.asarray(alpha / a.shape[-1], a.dtype)
    return product if a.ndim == 2 else product.swapaxes(0, 1)


def merge(params: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Parameters without adapters, whose kernels W are W + alpha / rank * A B.

    Args:
      params: nested dictionaries of arrays; what has no adapter is kept as it is.
    """
    merged = {}
    for name, value in params.items():
        if not isinstance(value, Mapping):
            merged[name] = value
        elif A in value:
            kernel = value["kernel"]
            change = delta(value[A], value[B], alpha)
            merged[name] = {"kernel": (kernel + change).astype(kernel.dtype)}
        else:
            merged[name] = merge(value, alpha)
    return merged
