"""Configs: read a Python config file, apply typed overrides, check them, write them as JSON.

A config file defines `get_config() -> ml_collections.ConfigDict`, most often as a short
difference from `configs/base.py`, which names and explains every field.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import ml_collections

from kaleido_jax.errors import UserError

PREFIX = "--config."
LATENT_NAMES = ("text", "bbox", "blob", "voken")
# What every config that was written to a file must say before anything can be drawn.
KEPT = (
    *(f"data.{k}" for k in ("image_size", "channels", "caption_length", "latent_length")),
    *(f"data.{k}" for k in ("pixel_centre", "pixel_scale")),
    "vocabulary.num_vokens",
    *(f"diffusion.{k}" for k in ("schedule", "shifted", "shift_power", "prediction")),
    *(f"sample.{k}" for k in ("sampler", "steps", "guidance_weight", "guidance_interval")),
    *(f"sample.{k}" for k in ("threshold", "temperature", "top_k", "top_p")),
)


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
    """Reads a config and applies overrides.

    Args:
      name_or_path: a path to a Python file, or the bare name of an installed config ('shapes').
      overrides: strings '--config.a.b=VALUE' or 'a.b=VALUE'; values are Python literals or
        bare strings, and keep the type of the field that they replace.

    Returns:
      The checked, locked config.

    Raises:
      UserError: missing or broken file, unknown key (naming the nearest), value of a wrong type
        or out of range.
    """
    config = _read_file(name_or_path)
    for override in overrides:
        apply_override(config, override)
    check(config)
    return config.lock()


def _read_file(name_or_path: str) -> ml_collections.ConfigDict:
    path = pathlib.Path(name_or_path)
    if not path.is_file():
        installed = list(config_folder().glob("*.py"))
        known = {p.stem: p for p in installed if not p.stem.startswith("_")}
        if name_or_path not in known:
            names = ", ".join(sorted(known))
            raise UserError(f"config {name_or_path!r} is neither a file nor one of: {names}")
        path = known[name_or_path]
    spec = importlib.util.spec_from_file_location(f"kaleido_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config file {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"config file {path}: get_config() must return a ConfigDict")
    return config


def config_folder() -> pathlib.Path:
    """The folder of the installed configs (`configs/` of the source tree)."""
    spec = importlib.util.find_spec("kaleido_jax.configs")
    if spec is not None and spec.origin:
        return pathlib.Path(spec.origin).parent
    return pathlib.Path(__file__).resolve().parent.parent / "configs"


def apply_override(config: ml_collections.ConfigDict, override: str) -> None:
    """Sets one existing field from 'a.b=VALUE'; raises UserError naming the nearest key."""
    text = override.removeprefix(PREFIX)
    name, equals, value_text = text.partition("=")
    if not equals:
        raise UserError(f"override {override!r} needs the form {PREFIX}a.b=VALUE")
    *parents, leaf = name.split(".")
    node = config
    for depth, part in enumerate([*parents, leaf]):
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            raise UserError(_unknown_key(name, config))
        if depth < len(parents):
            node = node[part]
    old = node[leaf]
    if isinstance(old, ml_collections.ConfigDict):
        raise UserError(
            f"config key {name!r} is a group; set one of its fields, for example "
            f"{name}.{next(iter(old))}"
        )
    node[leaf] = _typed(name, old, value_text)


def _unknown_key(name: str, config: ml_collections.ConfigDict) -> str:
    keys = [key for key, _ in flatten(config)]
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.0)
    return f"unknown config key {name!r}; the nearest is {near[0]!r}"


def _typed(name: str, old: Any, text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(old, str):
        return text
    if isinstance(old, (tuple, list)) and isinstance(value, str):
        value = tuple(part.strip() for part in text.split(",") if part.strip())
    if isinstance(old, (tuple, list)):
        if isinstance(value, (tuple, list)):
            return tuple(value)
    elif isinstance(old, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(old, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(old, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    else:
        return value
    raise UserError(
        f"config key {name!r} is {text!r}; it must be a {type(old).__name__}, for example {old!r}"
    )


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ('a.b', value) of every leaf in order."""
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses values that cannot work, before anything is compiled; raises UserError."""
    positive = (
        "data.image_size",
        "data.caption_length",
        "train.batch_size",
        "train.num_steps",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "optim.learning_rate",
        "optim.clip_norm",
        "optim.eps",
    )
    leaves = dict(flatten(config))
    for name, value in leaves.items():
        mine = name.startswith(("train.", "optim."))
        if mine and isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config key {name!r} is {value}; it must be a finite number")
    if not 0 <= leaves["seed"] < 2**32:
        raise UserError(f"config key 'seed' is {leaves['seed']}; it must be in [0, {2**32 - 1}]")
    for name in positive:
        if not leaves[name] > 0:
            raise UserError(f"config key {name!r} is {leaves[name]}; it must be positive")
    _between(leaves, "train.cond_drop_rate", 0.0, 1.0)
    _between(leaves, "train.noisy_share", 0.0, 1.0)
    _between(leaves, "optim.ema_decay", 0.0, 1.0)
    for name in ("optim.b1", "optim.b2"):
        if not 0 <= leaves[name] < 1:
            raise UserError(f"config key {name!r} is {leaves[name]}; it must be in [0, 1)")
    for name in (
        "optim.warmup_steps",
        "optim.weight_decay",
        "optim.text_rate",
        "train.latent_weight",
        "train.noisy_steps",
        "train.num_samples",
        "train.sample_every",
        "train.max_bad_steps",
        "train.watchdog_seconds",
        "train.watchdog_patience",
    ):
        if leaves[name] < 0:
            raise UserError(f"config key {name!r} is {leaves[name]}; it must not be negative")
    if leaves["train.skip_spike"] and not leaves["train.skip_spike"] > 1:
        raise UserError(
            f"config key 'train.skip_spike' is {leaves['train.skip_spike']}; it must be 0 (off) or "
            "above 1"
        )
    unknown = [name for name in config.latents if name not in LATENT_NAMES]
    if unknown:
        raise UserError(
            f"config key 'latents' names {unknown[0]!r}; "
            f"each must be one of {', '.join(LATENT_NAMES)}"
        )
    if config.latents and not leaves["data.latent_length"] > 0:
        raise UserError("config key 'data.latent_length' is 0; latents need a positive length")


def _between(leaves: dict[str, Any], name: str, low: float, high: float) -> None:
    if not low <= leaves[name] <= high:
        raise UserError(f"config key {name!r} is {leaves[name]}; it must be in [{low}, {high}]")


def to_json(config: ml_collections.ConfigDict) -> str:
    """The resolved config as indented JSON, keys sorted, ending in a newline."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str, where: str) -> ml_collections.ConfigDict:
    """Reads `to_json`'s output back (lists become tuples); `where` names it in errors."""
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise UserError(f"{where}: a config must be a JSON object")
        return ml_collections.ConfigDict(_tuples(data)).lock()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from error


def check_kept(config: ml_collections.ConfigDict, where: str) -> None:
    """Refuses a config from a file that lacks what generation reads; raises UserError.

    KEPT must be there; it and whatever else of their groups `configs/base.py` has must be of the
    same type as there. What base.py got later may be missing. `where` names the file.
    """
    have = dict(flatten(config))
    for name in KEPT:
        if name not in have:
            raise UserError(f"{where}: config key {name!r} is missing")
    groups = {name.partition(".")[0] for name in KEPT}
    for name, value in flatten(_read_file("base")):
        if name not in have or name.partition(".")[0] not in groups or "source" in name:
            continue
        kinds = (int, float) if isinstance(value, float) else type(value)
        wrong_bool = isinstance(have[name], bool) != isinstance(value, bool)
        if not isinstance(have[name], kinds) or wrong_bool:
            raise UserError(
                f"{where}: config key {name!r} is {str(have[name])[:80]!r}; "
                f"it must be a {type(value).__name__}"
            )
    for name in ("text_encoder", "latent_decoder", "denoiser"):
        group = config.get("model")
        group = group.get(name) if isinstance(group, ml_collections.ConfigDict) else None
        if not isinstance(group, ml_collections.ConfigDict):
            raise UserError(f"{where}: config key 'model.{name}' must be a group of fields")
    latents = config.get("latents")
    if not isinstance(latents, tuple) or any(name not in LATENT_NAMES for name in latents):
        raise UserError(
            f"{where}: config key 'latents' must be a list of {', '.join(LATENT_NAMES)}"
        )


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def differences(
    old: ml_collections.ConfigDict, new: ml_collections.ConfigDict
) -> list[tuple[str, Any, Any]]:
    """('a.b', value in `old`, value in `new`) of every field that differs, by name.

    A field that `old` lacks counts as what configs/base.py says: it may have come later.
    """
    before = {**dict(flatten(_read_file("base"))), **dict(flatten(old))}
    # As a file gives it back: lists as tuples.
    known, now = dict(flatten(old)), dict(flatten(from_json(to_json(new), "the config")))
    return [
        (key, before.get(key), now.get(key))
        for key in sorted(known.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def fingerprint(config: ml_collections.ConfigDict) -> str:
    """A short hash of the resolved config."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]
