"""The true p(mode | caption) of shapes, and what ideal guidance makes of it."""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Float

from kaleido_jax.data.shapes import FACTORS, TABLES, THEMES, Scene
from kaleido_jax.data.shapes_text import parse_caption
from kaleido_jax.errors import UserError


def mode_probabilities(caption: str, factor: str) -> Float[np.ndarray, " modes"]:
    """p(mode | caption) of one factor: "layout", "shape", "background" or "shade".

    Raises:
      UserError: an unknown factor or a text that is no caption of shapes.
    """
    _check_factor(factor)
    theme, _ = parse_caption(caption)
    return TABLES[factor][theme].copy()


def guided_probabilities(
    caption: str, factor: str, guidance_weight: float
) -> Float[np.ndarray, " modes"]:
    """What a perfect guided model without latents draws of one factor (Eq. 6).

    Guidance weighs whole pictures, that is all factors together: p(m) (p(m | c) / p(m))^gamma over
    the joint modes m = (layout, shapes, background), p(m) the mean over themes, then summed over
    the other factors. Sampling z first keeps `mode_probabilities` instead.

    Raises:
      UserError: an unknown factor or a text that is no caption of shapes.
    """
    return guided_joint(caption, (factor,), guidance_weight)


def guided_joint(
    caption: str, factors: tuple[str, ...], guidance_weight: float
) -> Float[np.ndarray, " *modes"]:
    """As `guided_probabilities`, of distinct factors together: an axis for each, in order.

    Raises:
      UserError: an unknown factor or a text that is no caption of shapes.
    """
    for factor in factors:
        _check_factor(factor)
    theme, hues = parse_caption(caption)
    if "shade" in factors:  # free of the theme and of the rest, so guidance leaves it
        if len(factors) > 1:
            raise UserError("the shade is independent of other factors; ask for it alone")
        return TABLES["shade"][theme].copy()
    names = ["shape"] * len(hues) + ["background"] + (["layout"] if len(hues) > 1 else [])
    if "layout" in factors and len(hues) < 2:
        raise UserError(f"{caption!r} has one object and so no layout")
    joint = np.stack(
        [
            np.prod(
                list(itertools.product(*(TABLES[name][row] for name in names))), axis=1
            ).reshape([TABLES[name].shape[1] for name in names])
            for row in range(len(THEMES))
        ]
    )
    weights = tilt(joint[theme], joint.mean(0), guidance_weight)
    kept = [names.index(factor) for factor in factors]
    rest = tuple(axis for axis in range(len(names)) if axis not in kept)
    # Summing keeps the axes that are left in ascending order; put them as asked.
    return np.transpose(weights.sum(rest), np.argsort(np.argsort(kept)))


def guided_marginal(
    caption: str, factor: str, guidance_weight: float
) -> Float[np.ndarray, " modes"]:
    """Eq. (6) as if the factor were all that the picture tells of its theme.

    The strongest collapse that guidance can bring about; `guided_probabilities` accounts for the
    evidence of the other factors, which relieves each.
    """
    conditional = mode_probabilities(caption, factor)
    return tilt(conditional, TABLES[factor].mean(0), guidance_weight)


def acceptance(scene: Scene, guidance_weight: float) -> float:
    """(p(m | c) / p(m))^(gamma - 1) of a scene's modes m, divided by the largest that there can be.

    Keeping scenes of the data with this probability leaves what `guided_joint` says. p(m) is the
    mean over the four themes, so the ratio is at most 4. For weights of 1 and more.
    """
    pairs = [("shape", item.shape) for item in scene.objects] + [("background", scene.background)]
    if scene.layout is not None:
        pairs.append(("layout", scene.layout))
    joint = np.prod([TABLES[name][:, mode] for name, mode in pairs], axis=0)
    ratio = joint[scene.theme] / joint.mean()
    return float((ratio / len(THEMES)) ** (guidance_weight - 1))


def tilt(
    conditional: Float[np.ndarray, " *modes"],
    marginal: Float[np.ndarray, " *modes"],
    guidance_weight: float,
) -> Float[np.ndarray, " *modes"]:
    """p(m) (p(m | c) / p(m))^gamma, normalised; modes of no probability stay without."""
    possible = conditional > 0
    ratio = np.log(np.where(possible, conditional, 1)) - np.log(np.where(possible, marginal, 1))
    logits = np.where(
        possible, np.log(np.where(possible, marginal, 1)) + guidance_weight * ratio, -np.inf
    )
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def effective_modes(weights: Float[np.ndarray, "*batch modes"]) -> Float[np.ndarray, " *batch"]:
    """exp(entropy) of counts or probabilities along the last axis; 0 where they sum to 0."""
    weights = np.asarray(weights, np.float64)
    if (weights < 0).any():
        raise ValueError("effective_modes: weights must not be negative")
    total = weights.sum(-1, keepdims=True)
    p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def _check_factor(factor: str) -> None:
    if factor not in FACTORS:
        raise UserError(f"unknown factor {factor!r} of shapes (there are {', '.join(FACTORS)})")
