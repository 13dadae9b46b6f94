"""How many modes a model still draws: effective numbers of modes, and what theory says of them.

The effective number of modes of a caption is exp(entropy) of a factor over its pictures. Entropy
estimated from few pictures is too low, so every number in one comparison is the mean over subsets
of one size, the data's own and the theory's included: what differs is then the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from kaleido_jax.data.shapes import FACTOR_NAMES
from kaleido_jax.data.shapes_modes import effective_modes, guided_joint, guided_marginal

JOINT = "layout x background"
FACTORS = ("layout", "background", JOINT, "shape", "shade")
# What the claim is judged by: the factor that every picture shows, so that all of them count. The
# others need objects of the right hues, which so small a model often misses at guidance 1; their
# subsets are smaller, and a small subset hides a large difference.
HEADLINE = "background"
_DRAWS = 400


@dataclasses.dataclass(frozen=True)
class Codes:
    """One factor as read: for each place to draw it (a caption, or an object of one), its modes.

    Attributes:
      modes: how many there are.
      values: 0..modes-1 for each picture of each place; -1 where it could not be read.
      captions: the caption of each place.
    """

    modes: int
    values: Int[np.ndarray, "places n"]
    captions: tuple[str, ...]

    @property
    def counts(self) -> Int[np.ndarray, "places modes"]:
        """How often each mode was read."""
        return np.stack([np.bincount(row[row >= 0], minlength=self.modes) for row in self.values])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Effective modes: the mean over places, its standard error, and the size of the subsets."""

    effective: float
    error: float
    size: int


def codes(read: Mapping[str, np.ndarray], captions: Sequence[str], factor: str) -> Codes:
    """One factor of what `shapes_detector.read_modes` gives.

    Args:
      read: its result for len(captions) * n pictures, those of one caption together.
      captions: two objects each.
      factor: name in FACTORS.
    """
    captions = tuple(captions)

    def by_caption(values: np.ndarray) -> np.ndarray:
        return np.asarray(values).reshape(len(captions), -1)

    if factor in ("shape", "shade"):
        both = [by_caption(read[factor][:, place]) for place in (0, 1)]
        names = FACTOR_NAMES[factor]
        return Codes(len(names), np.concatenate(both), captions * 2)
    modes = {name: len(FACTOR_NAMES[name]) for name in ("layout", "background")}
    if factor != JOINT:
        return Codes(modes[factor], by_caption(read[factor]), captions)
    layout, background = read["layout"], read["background"]
    joint = np.where(layout < 0, -1, layout * modes["background"] + background)
    return Codes(modes["layout"] * modes["background"], by_caption(joint), captions)


def common(tables: Sequence[Codes], least: int) -> tuple[int, Bool[np.ndarray, " places"]]:
    """The size of subset that tables of the same places can all give.

    Returns:
      The size, at least `least`; and which places every table can serve with it. Places that one
      table can serve with fewer than `least` only are left out of all.
    """
    fewest = np.min([table.counts.sum(1) for table in tables], axis=0)
    places = fewest >= least
    return int(fewest[places].min()) if places.any() else least, places


def estimate(table: Codes, size: int, places: Bool[np.ndarray, " places"]) -> Estimate:
    """Effective modes of those places, from subsets of `size` pictures; NaN without any place."""
    generator = np.random.default_rng(0)
    found = [
        effective_modes(generator.multivariate_hypergeometric(row, size, _DRAWS)).mean()
        for row in table.counts[places]
    ]
    return _estimate(found, size)


def expected(captions: Sequence[str], factor: str, weight: float, size: int) -> Estimate:
    """What `estimate` would find for the theory of guidance without latents, Eq. (6).

    Guidance weight 1 is the data themselves, and what sampling z first keeps at every weight.
    """
    generator = np.random.default_rng(0)
    found = [
        effective_modes(
            generator.multinomial(size, probabilities(caption, factor, weight), _DRAWS)
        ).mean()
        for caption in captions
    ]
    return _estimate(found, size)


def probabilities(caption: str, factor: str, weight: float) -> Float[np.ndarray, " modes"]:
    """Ideal guidance of whole pictures (shapes_modes.guided_joint), flattened over modes."""
    return guided_joint(caption, tuple(factor.split(" x ")), weight).reshape(-1)


def true_modes(captions: Sequence[str], factor: str, weight: float) -> float:
    """As `expected`, of the probabilities themselves instead of a finite number of pictures."""
    found = [effective_modes(probabilities(caption, factor, weight)) for caption in captions]
    return float(np.mean(found)) if found else float("nan")


def alone(captions: Sequence[str], factor: str, weight: float) -> float | None:
    """As `true_modes`, were this factor all that a picture tells of its theme; None for a pair."""
    if factor == JOINT or not captions:
        return None
    found = [effective_modes(guided_marginal(caption, factor, weight)) for caption in captions]
    return float(np.mean(found))


def readable(read: Mapping[str, np.ndarray]) -> float:
    """Share of pictures that show every hue their captions name."""
    return float(np.mean(read["hue"] == read["count"]))


def _estimate(found: Sequence[float], size: int) -> Estimate:
    if not found:
        return Estimate(float("nan"), float("nan"), size)
    error = np.std(found, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else float("nan")
    return Estimate(float(np.mean(found)), float(error), size)
