"""Results of `kaleido evaluate` as a table: in Markdown for people, in CSV for programs."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kaleido_jax.errors import UserError
from kaleido_jax.figures.guidance import METRICS, open_results

# Settings of one batch alone, which no reader asks for.
_LEFT_OUT = ("batch_size",)


def rows(paths: Sequence[pathlib.Path], metrics: Sequence[str] = METRICS) -> list[dict[str, Any]]:
    """A row for each kind of result, in order of the files: the mean over its seeds.

    Keys: model, step (where any result has one), every setting that is not the same in all results,
    seeds, samples, and for each metric METRIC, METRIC_low and METRIC_high (the lowest and highest
    end of the seeds' intervals; None where a result has not the metric).

    Raises:
      UserError: no results, no such metric, or results with other features or references.
    """
    results = open_results(paths)
    for what in ("feature", "references"):
        distinct = [r[what] for r in results if r.get(what) is not None]
        other = next((v for v in distinct if v != distinct[0]), None)
        if other is not None:
            raise UserError(f"the results have different {what}: {distinct[0]} and {other}")
    known = sorted({n for r in results for n in (*r["metrics"], *r["adherence"])})
    for metric in metrics:
        if metric not in known:
            raise UserError(f"no result has the metric {metric!r}; there are {', '.join(known)}")
    described = [_settings(result) for result in results]
    varied = _varied(described)
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result, settings in zip(results, described, strict=True):
        key = tuple(repr(settings.get(name)) for name in varied)
        name = result["name"] or result["subject"]
        groups.setdefault((name, result["samples"], *key), []).append(result)
    return [_row(name, varied, own, metrics) for (name, *_), own in groups.items()]


def _settings(result: Mapping[str, Any]) -> dict[str, Any]:
    """What shaped a result's pictures, but for its seed and its model's weights."""
    settings = {k: v for k, v in result.get("settings", {}).items() if k not in _LEFT_OUT}
    names = ("step", "per_caption", "per_latent")
    return {**{name: result.get(name) for name in names}, **settings}


def _varied(described: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose values differ between results that have them; the guidance weight always."""
    names = dict.fromkeys(name for settings in described for name in settings)
    found = []
    for name in names:
        values = {repr(s[name]) for s in described if s.get(name) is not None}
        if len(values) > 1 or name == "guidance_weight":
            found.append(name)
    return found


def _row(
    name: str,
    varied: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
) -> dict[str, Any]:
    settings = _settings(results[0])
    row = {
        "model": name,
        **{key: settings.get(key) for key in varied},
        "seeds": " ".join(str(result["seed"]) for result in results),
        "samples": results[0]["samples"],
    }
    for metric in metrics:
        entries = [{**r["metrics"], **r["adherence"]}.get(metric) for r in results]
        entries = [e for e in entries if e is not None and e["value"] is not None]
        row[metric] = float(np.mean([e["value"] for e in entries])) if entries else None
        row[f"{metric}_low"] = min((e["low"] for e in entries), default=None)
        row[f"{metric}_high"] = max((e["high"] for e in entries), default=None)
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
