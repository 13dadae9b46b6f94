"""Figure 5: FID and recall against the guidance weight, from results of `kaleido evaluate`.

Or against the training step, which shows what longer training would bring.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kaleido_jax.errors import UserError
from kaleido_jax.figures.comparing import (
    bounds,
    check_detectors,
    check_metrics,
    check_same,
    entry_of,
    model_name,
    open_results,
    seeds_once,
)
from kaleido_jax.figures.style import BASELINE, COLOURS, FAINT, GREY, INK, KALEIDO, plain

METRICS = ("fid", "recall_3")
_OTHERS = ("#7b3294", "#1b7837", "#b2182b")
_MARKS = ("o-", "s--", "^:", "D-.")
_LABELS = {"fid": "FID", "tv": "total variation to the true modes", "is": "Inception score"}


def rows(
    paths: Sequence[pathlib.Path], metrics: Sequence[str], along: str = "guidance"
) -> list[dict[str, Any]]:
    """A row for each model, metric, guidance weight and training step.

    Keys: model ("truth" and "theory" among them), metric, guidance (None for the truth), step (of
    training; None where a result names none), value (the mean over seeds), low and high (the lowest
    and highest end of the seeds' intervals), seeds, samples, feature, references, latents. A metric
    is a key of a result's `metrics` or `adherence`.

    Args:
      along: 'guidance', or 'step' to leave out what has no training step but the truth.

    Raises:
      UserError: no results, none that names its step, no such metric, or results that cannot be
        compared because protocol, feature, references, data or settings differ.
    """
    results = open_results(paths)
    if along == "step":
        results = [r for r in results if r.get("step") is not None or r["subject"] == "truth"]
        if all(result["subject"] == "truth" for result in results):
            raise UserError(
                "no result names its training step, as those of RUN/checkpoints/step_N do and "
                "those of exports do not"
            )
    _check_alike(results)
    check_metrics(results, metrics)
    check_detectors(results, metrics)
    _check_names(results)
    found: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        for metric in metrics:
            if entry_of(result, metric) is not None:
                key = metric, model_name(result), result["guidance_weight"], result.get("step")
                found.setdefault(key, []).append(result)
    return [_row(*key, own) for key, own in sorted(found.items(), key=_order)]


def _order(item: tuple) -> tuple:
    metric, name, weight, step = item[0]
    return metric, name, -1.0 if weight is None else weight, -1 if step is None else step


def _row(
    metric: str, name: str, weight: float | None, step: int | None, results: list[dict]
) -> dict[str, Any]:
    pairs = seeds_once(results, metric)
    result, entries = results[0], [entry for _, entry in pairs]
    return {
        "model": name,
        "metric": metric,
        "guidance": weight,
        "step": step,
        "value": float(np.mean([entry["value"] for entry in entries])),
        **bounds(entries),
        "seeds": " ".join(str(own["seed"]) for own, _ in pairs),
        "samples": entries[0]["samples"],
        "feature": result["feature"]["name"],
        "references": (result["references"] or {}).get("hash", ""),
        "latents": " ".join(result.get("latents", [])),
    }


def _check_alike(results: Sequence[Mapping[str, Any]]) -> None:
    """Only results that differ in model, weight and seed alone stand in one figure."""

    def settings(result: Mapping[str, Any]) -> dict:
        kept = {k: v for k, v in result["settings"].items() if k != "guidance_weight"}
        kept |= {name: result.get(name, 1) for name in ("per_caption", "per_latent")}
        return kept | {"true_latents": result.get("true_latents", False)}

    check_same(results, "protocols", lambda r: {**r["protocol"], "name": ""})
    check_same(results, "features", lambda r: r["feature"])
    check_same(results, "references", lambda r: r["references"])
    check_same(results, "data", lambda r: r.get("captions"))
    check_same(results, "intervals", lambda r: r.get("interval"))
    check_same([r for r in results if r["subject"] == "model"], "settings", settings)


def _check_names(results: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError where results of one name and step are of several checkpoints."""
    checkpoints: dict[tuple, str | None] = {}
    for result in results:
        line, own = (model_name(result), result.get("step")), result.get("checkpoint_hash")
        known = checkpoints.setdefault(line, own)
        if known != own:
            raise UserError(
                f"the results named {line[0]!r} are of several checkpoints ({known} and {own}); "
                "evaluate them with other names (--name)"
            )


def draw(table: Sequence[Mapping[str, Any]], along: str = "guidance") -> Figure:
    """A panel for each metric; bars reach over the intervals of all seeds.

    Args:
      along: 'guidance' or 'step', a line then being one guidance weight of one model.
    """
    metrics = list(dict.fromkeys(row["metric"] for row in table))
    figure = Figure(figsize=(4.3 * len(metrics), 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(metrics)))
    labels = _labels(table, along)
    looks = _looks(table, labels)
    for ax, metric in zip(axes, metrics, strict=True):
        lines: dict[str, list[Mapping[str, Any]]] = {}
        for row, label in zip(table, labels, strict=True):
            if row["metric"] == metric:
                lines.setdefault(label, []).append(row)
        _panel(ax, metric, lines, looks, along)
    labelled = {}
    for ax in axes:
        labelled |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(
        labelled.values(),
        labelled.keys(),
        loc="outside lower center",
        ncols=max(1, len(labelled)),
        frameon=False,
        fontsize=10,
    )
    return figure


def _labels(table: Sequence[Mapping[str, Any]], along: str) -> list[str]:
    """The line that each row belongs to: a model, and what of it is not along the axis."""
    steps: dict[str, set] = {}
    for row in table:
        steps.setdefault(row["model"], set()).add(row["step"])
    found = []
    for row in table:
        label, weight = row["model"], row["guidance"]
        if along == "step" and weight is not None:
            label += f", guidance {weight:g}"
        elif along == "guidance" and len(steps[row["model"]]) > 1:
            label += f", step {row['step']}"
        found.append(label)
    return found


def _looks(table: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and mark of each line, the same in all panels: a colour for each model."""
    others = itertools.cycle(_OTHERS)
    colours: dict[str, str] = {}
    looks: dict[str, dict[str, str]] = {}
    for row, label in zip(table, labels, strict=True):
        name = row["model"]
        if name not in colours:
            colours[name] = _colour(name) or next(others)
        if label not in looks:
            own = sum(look["color"] == colours[name] for look in looks.values())
            looks[label] = {"color": colours[name], "fmt": _MARKS[own % len(_MARKS)]}
    return looks


def _panel(
    ax: Axes,
    metric: str,
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    looks: Mapping[str, Mapping[str, str]],
    along: str,
) -> None:
    for label, own in lines.items():
        value = np.array([row["value"] for row in own])
        if label == "truth":
            ax.axhline(value[0], ls=":", color=GREY, lw=1.6, label="true pictures")
            continue
        places = [row[along] for row in own]
        if label == "theory":
            ax.plot(places, value, "--", color=GREY, lw=1.4, label="theory without z (Eq. 6)")
            continue
        # NaN, and so no bar, where a row has no interval.
        low, high = (np.array([row[k] for row in own], np.float64) for k in ("low", "high"))
        ax.errorbar(
            places,
            value,
            yerr=np.maximum(0, [value - low, high - value]),
            ms=5,
            lw=2,
            elinewidth=1,
            capsize=2,
            label=plain(label),
            **looks[label],
        )
    if along == "guidance":
        weights = sorted({row["guidance"] for own in lines.values() for row in own} - {None})
        if weights and min(weights) > 0:
            ax.set_xscale("log", base=2)
        ax.set_xticks(weights, [f"{weight:g}" for weight in weights])
    ax.minorticks_off()
    ax.set_xlabel("training step" if along == "step" else "guidance", fontsize=10, color=INK)
    ax.set_title(_LABELS.get(metric, metric.replace("_", " ")), fontsize=12, color=INK)
    ax.grid(axis="y", color=FAINT, lw=0.7)
    ax.tick_params(colors=INK, labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _colour(name: str) -> str | None:
    """The two models of the paper's comparison keep their colours in all figures."""
    if name in COLOURS:
        return COLOURS[name]
    return BASELINE if "baseline" in name else KALEIDO if "kaleido" in name else None
