"""Which modes pictures of shapes show, held against the true p(mode | caption) and the theory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kaleido_jax.data.shapes import FACTOR_NAMES, FACTORS, TABLES, THEMES
from kaleido_jax.data.shapes_modes import effective_modes, guided_joint
from kaleido_jax.data.shapes_text import parse_caption, read_grounded
from kaleido_jax.latents import LatentDocument, latent_type
from kaleido_jax.metrics import bootstrap

Read = Mapping[str, np.ndarray]  # of shapes_detector.read_modes, or of `written`

_OPPOSITE = (1, 0, 3, 2)  # of LAYOUTS: the other way round


def written(documents: Sequence[LatentDocument]) -> Read:
    """Factors as z states them, in the form of shapes_detector.read_modes.

    Held against the tables they show how well the decoder knows p(z | c), whatever is painted.
    Objects are in the order of the caption's hues, whatever the order in z; -1 stands for what z
    does not say, and for all that a document without boxes and blobs does not.
    """
    count = len(documents)
    read = {name: np.full(count, -1) for name in ("background", "layout")}
    read |= {name: np.full((count, 3), -1) for name in ("shape", "shade")}
    for row, document in enumerate(documents):
        name = next((name for name in ("bbox", "blob") if name in document.latents), None)
        if name is None:
            continue
        segments = latent_type(name).parse(document.latents[name])
        claims, layout, background = read_grounded(segments)
        hues = parse_caption(document.caption)[1]
        read["background"][row] = -1 if background is None else background
        if layout is not None and len(hues) > 1:
            order = [claim.hue for claim in claims[:2]]
            known = {tuple(hues[:2]): layout, tuple(hues[1::-1]): _OPPOSITE[layout]}
            read["layout"][row] = known.get(tuple(order), -1)
        for place, hue in enumerate(hues):
            claim = next((claim for claim in claims if claim.hue == hue), None)
            for factor in ("shape", "shade") if claim is not None else ():
                value = getattr(claim, factor)
                read[factor][row, place] = -1 if value is None else value
    return read


def observations(
    read: Read, captions: Sequence[str], factor: str
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """(theme, mode, picture) of every place where a factor could be read.

    Shapes and shades are read of each object that is seen, layout where both objects are.
    """
    themes = np.array([parse_caption(caption)[0] for caption in captions])
    values = np.asarray(read[factor]).reshape(len(captions), -1)
    pictures, places = np.nonzero(values >= 0)
    return themes[pictures], values[pictures, places], pictures


def shares(
    themes: Int[np.ndarray, " n"],
    modes: Int[np.ndarray, " n"],
    number: int,
    weights: Float[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, "themes modes"]:
    """Share of each mode among the observations of each theme; NaN for a theme without any."""
    table = np.zeros((len(THEMES), number))
    np.add.at(table, (themes, modes), 1.0 if weights is None else weights)
    total = table.sum(1, keepdims=True)
    return np.divide(table, total, out=np.full_like(table, np.nan), where=total > 0)


def total_variation(
    a: Float[np.ndarray, "themes modes"], b: Float[np.ndarray, "themes modes"]
) -> float:
    """Half the sum of absolute differences, the mean over the themes that both have."""
    apart = np.abs(a - b).sum(1) / 2
    return float(np.nanmean(apart)) if np.isfinite(apart).any() else float("nan")


def _mean_modes(table: Float[np.ndarray, "themes modes"]) -> float:
    present = table[np.isfinite(table).all(1)]
    return float(effective_modes(present).mean()) if len(present) else float("nan")


def theory(
    captions: Sequence[str], factor: str, weight: float
) -> Float[np.ndarray, "themes modes"]:
    """What ideal guidance without latents draws of a factor, over the captions of each theme."""
    table = np.zeros((len(THEMES), TABLES[factor].shape[1]))
    known: dict[tuple[int, int], np.ndarray] = {}
    for caption in captions:
        theme, hues = parse_caption(caption)
        if factor == "layout" and len(hues) < 2:
            continue
        kind = theme, len(hues)
        if kind not in known:
            known[kind] = guided_joint(caption, (factor,), weight)
        places = len(hues) if factor in ("shape", "shade") else 1
        table[theme] += places * known[kind]
    total = table.sum(1, keepdims=True)
    return np.divide(table, total, out=np.full_like(table, np.nan), where=total > 0)


def measure(
    read: Read,
    captions: Sequence[str],
    weight: float,
    draws: int,
    seed: int,
    each: int,
    entry: Callable[..., dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distances to the true tables, and the tables.

    Args:
      weight: guidance, for the theory.
      draws, seed: of the bootstrap, which draws runs of `each` pictures, those of one caption.
      entry: (value, (low, high), samples) to what a result says.

    Returns:
      Entries tv_FACTOR (to the true p(mode | theme)), modes_FACTOR (effective number, the mean over
      themes), theory_FACTOR (total variation to ideal guidance without latents) for each factor,
      tv (the mean of those that guidance moves: layout, shape, background), and readable (share of
      pictures that show every hue of their captions); and the tables by factor.
    """
    found, tables = {}, {}
    moved = []
    counts = list(bootstrap.resamples(len(captions), draws, seed, each))
    for factor in FACTORS:
        themes, modes, pictures = observations(read, captions, factor)
        number = TABLES[factor].shape[1]
        ideal = theory(captions, factor, weight)
        table = shares(themes, modes, number)
        drawn = [shares(themes, modes, number, c[pictures].astype(float)) for c in counts]
        for name, statistic in (
            ("tv", lambda t, factor=factor: total_variation(t, TABLES[factor])),
            ("theory", lambda t, ideal=ideal: total_variation(t, ideal)),
            ("modes", _mean_modes),
        ):
            values = [statistic(t) for t in drawn]
            value = statistic(table)
            found[f"{name}_{factor}"] = entry(value, bootstrap.interval(value, values), len(modes))
            if name == "tv" and factor != "shade":
                moved.append((value, values))
        tables[factor] = {
            "modes": list(FACTOR_NAMES[factor]),
            "found": np.round(table, 4).tolist(),
            "true": TABLES[factor].tolist(),
            "theory": np.round(ideal, 4).tolist(),
        }
    mean = float(np.mean([value for value, _ in moved]))
    drawn_mean = np.mean([values for _, values in moved], axis=0)
    found["tv"] = entry(mean, bootstrap.interval(mean, drawn_mean), len(captions))
    if "hue" in read:
        shown = np.asarray(read["hue"]) == np.asarray(read["count"])
        of = np.arange(len(captions)) // each
        found["readable"] = entry(*bootstrap.of_mean(shown, draws, seed, of), len(captions))
    return found, tables
