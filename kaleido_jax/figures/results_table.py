"""Results of `kaleido evaluate` as a table: in Markdown for people, in CSV for programs."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kaleido_jax.figures.comparing import (
    bounds,
    check_detectors,
    check_metrics,
    check_same,
    model_name,
    open_results,
    seeds_once,
)
from kaleido_jax.figures.guidance import METRICS


def rows(paths: Sequence[pathlib.Path], metrics: Sequence[str] = METRICS) -> list[dict[str, Any]]:
    """A row for each kind of result, in order of the files: the mean over its seeds.

    Keys: model, the guidance weight, everything else that is not the same in all results (step,
    settings, sizes of the protocol, data; the hash of the checkpoint where one name has several),
    seeds, samples, and for each metric METRIC, METRIC_low and METRIC_high (the lowest and highest
    end of the seeds' intervals; None where a result has not the metric).

    Raises:
      UserError: no results, no such metric, or results with other features or references.
    """
    results = open_results(paths)
    check_same(results, "features", lambda r: r.get("feature"))
    check_same(results, "references", lambda r: r.get("references"))
    check_metrics(results, metrics)
    check_detectors(results, metrics)
    described = [_described(result) for result in results]
    varied = _varied(results, described)
    groups: dict[tuple, list[int]] = {}
    for number, (result, settings) in enumerate(zip(results, described, strict=True)):
        key = model_name(result), *(repr(settings.get(name)) for name in varied), result["samples"]
        groups.setdefault(key, []).append(number)
    return [
        _row([results[i] for i in own], described[own[0]], varied, metrics)
        for own in groups.values()
    ]


def _described(result: Mapping[str, Any]) -> dict[str, Any]:
    """What shaped a result, but for its seed."""
    settings = {"guidance_weight": result["guidance_weight"], **result.get("settings", {})}
    if result["subject"] == "model":
        settings |= {name: result.get(name, 1) for name in ("per_caption", "per_latent")}
        settings |= {"true_latents": result.get("true_latents", False)}
        settings |= {"step": result.get("step"), "checkpoint": result.get("checkpoint_hash")}
    sizes = {k: v for k, v in result["protocol"].items() if k not in ("name", "samples")}
    if result["subject"] == "truth":
        settings |= {"latents": " ".join(result.get("latents", []))}
    captions = result.get("captions") or {}
    found = settings | sizes
    for part, key in (("data", "source"), ("held_out", "held_out")):
        found |= {f"{part}.{name}": value for name, value in captions.get(key, {}).items()}
    return found


def _varied(
    results: Sequence[Mapping[str, Any]], described: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What differs between results that have it; step and checkpoint where one name has several."""
    found = []
    for name in dict.fromkeys(name for settings in described for name in settings):
        values: dict[str, set[str]] = {}
        for result, settings in zip(results, described, strict=True):
            if name in settings:
                owner = model_name(result) if name in ("checkpoint", "step") else ""
                if name == "checkpoint":
                    owner += f" {settings['step']}"
                values.setdefault(owner, set()).add(repr(settings[name]))
        if name == "guidance_weight" or any(len(own) > 1 for own in values.values()):
            found.append(name)
    return found


def _row(
    results: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    varied: Sequence[str],
    metrics: Sequence[str],
) -> dict[str, Any]:
    row = {
        "model": model_name(results[0]),
        **{key: settings.get(key) for key in varied},
        "seeds": " ".join(dict.fromkeys(str(result["seed"]) for result in results)),
        "samples": results[0]["samples"],
    }
    for metric in metrics:
        entries = [entry for _, entry in seeds_once(results, metric)]
        row[metric] = float(np.mean([e["value"] for e in entries])) if entries else None
        row |= {f"{metric}_{end}": value for end, value in bounds(entries).items()}
    return row


def markdown(table: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """The rows of `rows` as Markdown: each value with its interval in brackets."""
    heads = [key for key in table[0] if not _of_metric(key, metrics)]
    lines = [
        [*heads, *metrics],
        ["---"] * (len(heads) + len(metrics)),
        *([*(_text(row[h]) for h in heads), *(_value(row, m) for m in metrics)] for row in table),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _of_metric(key: str, metrics: Sequence[str]) -> bool:
    return any(key in (m, f"{m}_low", f"{m}_high") for m in metrics)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_text, value))
    return str(value).replace("|", "\\|")


def _value(row: Mapping[str, Any], metric: str) -> str:
    value, low, high = (row[key] for key in (metric, f"{metric}_low", f"{metric}_high"))
    if value is None:
        return ""
    return f"{value:.3g}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")
