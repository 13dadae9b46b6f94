"""Results of `kaleido evaluate` as figures and tables read them: whole, and where comparable."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kaleido_jax.errors import UserError
from kaleido_jax.evaluate.results import read_results

Result = Mapping[str, Any]


def open_results(paths: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """All results of the files, none twice; UserError where a file has none."""
    results: dict[str, dict[str, Any]] = {}
    for path in paths:
        found = {r["id"]: r for r in read_results(path)}
        if not found:
            raise UserError(f"{path}: no results of `kaleido evaluate`")
        results |= found
    return list(results.values())


def model_name(result: Result) -> str:
    """The model's name; 'truth' or 'theory' of what is no model."""
    return result["name"] or result["subject"]


def entry_of(result: Result, metric: str) -> dict[str, Any] | None:
    """The entry of a key of the result's metrics or adherence, None without a value."""
    entry = {**result["metrics"], **result["adherence"]}.get(metric)
    return None if entry is None or entry["value"] is None else entry


def seeds_once(results: Sequence[Result], metric: str) -> list[tuple[Result, dict[str, Any]]]:
    """Results that have a metric, with its entry, each seed once.

    Pictures measured twice, for other metrics besides, have the same value.

    Raises:
      UserError: two values of one seed.
    """
    found: dict[int, tuple[Result, dict[str, Any]]] = {}
    for result in results:
        entry = entry_of(result, metric)
        if entry is None:
            continue
        _, known = found.setdefault(result["seed"], (result, entry))
        if not math.isclose(known["value"], entry["value"], rel_tol=1e-6):
            weight = result["guidance_weight"]
            raise UserError(
                f"{model_name(result)!r} has two values of {metric} for seed {result['seed']}"
                + ("" if weight is None else f" and guidance {weight:g}")
                + f": {known['value']:.7g} and {entry['value']:.7g}; what differs between them is"
                " not shown here: put the results into files of their own"
            )
    return list(found.values())


def bounds(entries: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The lowest and highest end of intervals; None where none has one (too few observations)."""
    return {
        "low": min((e["low"] for e in entries if e["low"] is not None), default=None),
        "high": max((e["high"] for e in entries if e["high"] is not None), default=None),
    }


def check_metrics(results: Sequence[Result], metrics: Sequence[str]) -> None:
    """Raises UserError for a metric that no result has."""
    known = sorted({n for r in results for n in (*r["metrics"], *r["adherence"])})
    for metric in metrics:
        if not any(entry_of(result, metric) for result in results):
            raise UserError(f"no result has the metric {metric!r}; there are {', '.join(known)}")


def check_detectors(results: Sequence[Result], metrics: Sequence[str]) -> None:
    """Raises UserError where two results have one measure of adherence from other detectors."""
    for metric in metrics:
        vokens = metric == "voken"
        judged = [r for r in results if metric in r["adherence"]]
        check_same(
            judged,
            f"detectors for {metric}",
            lambda r, vokens=vokens: (
                [
                    d
                    for d in r.get("detectors", [])
                    if isinstance(d, Mapping) and (d["judges"] == "vokens") == vokens
                ]
                or None
            ),  # older results have names alone
        )


def check_same(results: Sequence[Result], what: str, value: Callable[[Result], Any]) -> None:
    """Raises UserError where two results differ in a value; None differs from nothing."""
    found = [v for v in map(value, results) if v is not None]
    other = next((v for v in found if v != found[0]), None)
    if other is not None:
        raise UserError(f"the results have different {what}: {found[0]} and {other}")
