"""Engines by string: `oracle`, `hf:MODEL@REVISION`, `patch:default`, ..."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.resources
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kaleido_jax.annotate.describe import hf_engine
from kaleido_jax.annotate.features import kmeans_engine
from kaleido_jax.annotate.fsq import fsq_engine
from kaleido_jax.annotate.models import file_sha256
from kaleido_jax.annotate.protocols import STAGES, Engine
from kaleido_jax.annotate.qwen_vl import qwen_vl_engine
from kaleido_jax.annotate.seed import seed_engine
from kaleido_jax.annotate.segment import hf_blob_engine
from kaleido_jax.annotate.synthetic import OracleEngine
from kaleido_jax.annotate.visual_tokens import VokenEngine
from kaleido_jax.annotate.vllm import vllm_engine
from kaleido_jax.errors import UserError
from kaleido_jax.models.voken_tokenizer import PatchTokenizer


def make_engine(stage: str, spec: str, options: Mapping[str, Any] | None = None) -> Engine:
    """The engine that a string names, for one stage.

    Args:
      stage: text, bbox, blob or voken.
      spec: `NAME` or `NAME:ARGUMENT`, the names being those of ENGINES.
      options: settings of the engine, such as `batch_size`; each engine knows its own.

    Raises:
      UserError: an unknown stage, engine or option, a value of another kind than the option's
        default, an engine that cannot do the stage, a file that is missing.
    """
    if stage not in STAGES:
        raise UserError(f"no annotation stage {stage!r}; there are {', '.join(STAGES)}")
    name, _, argument = spec.partition(":")
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ENGINES)}"
        raise UserError(f"no engine {name!r} in '{spec}'; {hint}")
    if stage not in ENGINES[name]:
        can = [engine for engine, makers in ENGINES.items() if stage in makers]
        raise UserError(f"engine '{spec}' cannot do {stage}; {', '.join(can)} can")
    make = ENGINES[name][stage]
    options = dict(options or {})
    known = dict(list(inspect.signature(make).parameters.items())[2:])
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"engine '{spec}' has no option {option!r}; {hint}")
        _check(f"engine '{spec}': option {option}", value, known[option].default)
    return make(stage, argument, **options)


def _check(what: str, value: Any, default: Any) -> None:
    """Raises UserError for a value of another kind than the default's, and for batches of none."""
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        least = 1 if what.endswith(" batch_size") else 0
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        kind = f"a whole number of at least {least}"
    elif isinstance(default, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits, kind = fits and math.isfinite(value), "a finite number"
    elif isinstance(default, tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(default)
        fits = fits and all(type(item) is int for item in value)
        kind = f"{len(default)} whole numbers, such as {list(default)}"
    else:
        fits, kind = isinstance(value, str), "a word"
    if not fits:
        raise UserError(f"{what} must be {kind}, not {value!r}")


def _oracle(
    stage: str,
    argument: str,
    max_objects: int = 6,
    num_objects: tuple[int, int] = (1, 3),
    semi_axis: tuple[int, int] = (110, 230),
) -> Engine:
    if argument:
        raise UserError(f"engine 'oracle' takes no argument, not {argument!r}")
    return OracleEngine(stage, max_objects, tuple(num_objects), tuple(semi_axis))


def _patch(stage: str, argument: str, batch_size: int = 64) -> Engine:
    if not argument:
        raise UserError("engine 'patch' needs a codebook: patch:default or patch:FILE.npz")
    if argument == "default":
        load = PatchTokenizer.default
        asset = importlib.resources.files("kaleido_jax") / "assets" / "shapes_vokens.npz"
        digest = hashlib.sha256(asset.read_bytes()).hexdigest()
    else:
        load = functools.partial(PatchTokenizer.load, argument)
        digest = file_sha256(argument)
    provenance = {
        "engine": "patch",
        "model": "default" if argument == "default" else Path(argument).name,
        "sha256": digest,
        "parameters": {"num_codes": load().num_codes},
    }
    return VokenEngine(load, provenance, batch_size)


Maker = Callable[..., Engine]

# Name -> stage -> maker(stage, argument, **options).
ENGINES: dict[str, dict[str, Maker]] = {
    "oracle": {"text": _oracle, "bbox": _oracle, "blob": _oracle},
    "hf": {"text": hf_engine, "bbox": hf_engine, "blob": hf_blob_engine},
    "vllm": {"text": vllm_engine, "bbox": vllm_engine},
    "qwen-vl": {"text": qwen_vl_engine, "bbox": qwen_vl_engine},
    "seed": {"voken": seed_engine},
    "kmeans": {"voken": kmeans_engine},
    "patch": {"voken": _patch},
    "fsq": {"voken": fsq_engine},
}
