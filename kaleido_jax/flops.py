"""Floating point operations of a program, counted in its jaxpr: the same on every device.

Matrix products and convolutions count, a multiplication and an addition as two; the rest is small
beside them. XLA's own analysis is of no use here: it counts the body of a loop once.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

PARTS = ("encoder", "decoder", "outer", "inner", "denoiser", "other")
# What jax.checkpoint computes again in the backward pass.
RECOMPUTED = "recomputed"


def count(function: Callable[..., Any], *args: Any, trips: int = 1) -> dict[str, int]:
    """Operations of `function(*args)` by part of the model; nothing is computed.

    Parts are found by the names of the modules: 'encoder', 'decoder', 'outer' and 'inner' of a
    nested denoiser (all that lies within the outer network is 'inner'), 'denoiser' for any other,
    'other' for the rest. What rematerialisation computes a second time is under 'recomputed'
    alone, so that the sum of the others does not depend on it.

    Args:
      args: arrays or `jax.ShapeDtypeStruct`.
      trips: how often a loop runs whose end the program decides (`while_loop`).

    Returns:
      Operations by name, only of the parts that have any, in the order of PARTS. Of a branch
      (`cond`) the dearest alternative counts.
    """
    found = _walk(jax.make_jaxpr(function)(*args).jaxpr, "", trips)
    return {name: found[name] for name in (*PARTS, RECOMPUTED) if found[name]}


def useful(counts: dict[str, int]) -> int:
    """The operations that the model asks for: all but the recomputed ones."""
    return sum(value for name, value in counts.items() if name != RECOMPUTED)


def part(scope: str) -> str:
    """The part that a scope of names belongs to, such as 'jvp(Kaleido.encode)/text_encoder/..'."""
    if "rematted_computation" in scope:
        return RECOMPUTED
    # 'transpose(jvp(denoiser.run))' -> 'denoiser'
    names = {name.partition(".")[0] for name in re.split(r"[/()]", scope)}
    if "text_encoder" in names:
        return "encoder"
    if "latent_decoder" in names:
        return "decoder"
    if "inner" in names:
        return "inner"
    if names & {"outer", "to_inner", "from_inner"}:
        return "outer"
    return "denoiser" if "denoiser" in names else "other"


def _walk(jaxpr: Jaxpr, outer: str, trips: int) -> collections.Counter[str]:
    total: collections.Counter[str] = collections.Counter()
    for eqn in jaxpr.eqns:
        scope = f"{outer}/{eqn.source_info.name_stack}"
        name = eqn.primitive.name
        if name == "dot_general":
            total[part(scope)] += _dot(eqn)
        elif name == "conv_general_dilated":
            total[part(scope)] += _convolution(eqn)
        elif name.startswith("dot_product_attention_"):
            total[part(scope)] += _flash_attention(eqn)
        elif name == "cond":
            branches = [_walk(branch.jaxpr, scope, trips) for branch in eqn.params["branches"]]
            total += max(branches, key=lambda counts: counts.total())
        else:
            times = {"scan": eqn.params.get("length", 1), "while": trips}.get(name, 1)
            for inner in _inside(eqn.params):
                for key, value in _walk(inner, scope, trips).items():
                    total[key] += times * value
    return total


def _inside(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _dot(eqn: Any) -> int:
    """2 x the result's size x the length of what is summed over."""
    contracted = eqn.params["dimension_numbers"][0][0]
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _convolution(eqn: Any) -> int:
    """2 x the result's size x the kernel's taps that meet a real value x its input channels.

    A stride shows up as dilation in the backward pass, where most taps meet inserted zeros; those
    are not work, so forward and backward cost alike.
    """
    p = eqn.params
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    taps = kernel.size // kernel.shape[p["dimension_numbers"].rhs_spec[0]]
    return 2 * out.size * taps // math.prod(p["lhs_dilation"])


def _flash_attention(eqn: Any) -> int:
    """cuDNN's, as the products that it stands for: two forward, four backward."""
    batch, queries, heads, width = eqn.invars[0].aval.shape
    keys = eqn.invars[1].aval.shape[1]
    products = 4 if "_bwd" in eqn.primitive.name else 2
    return products * 2 * batch * heads * queries * keys * width
