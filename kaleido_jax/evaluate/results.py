"""Results: a JSON line each, in a file that grows by whole lines only."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from kaleido_jax import beside
from kaleido_jax.errors import UserError
from kaleido_jax.runlog import tensorboard_writer

RESULTS = "results.jsonl"


def entry(value: float, bounds: tuple[float, float], samples: int, **more: Any) -> dict[str, Any]:
    """A value as a result says it: with its interval and what it was computed from."""
    return {"value": value, "low": bounds[0], "high": bounds[1], "samples": samples, **more}


def plain(value: Any, digits: int = 9) -> Any:
    """A copy for JSON: numbers with so many digits, NaN and infinity as None, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def identify(what: Mapping[str, Any]) -> str:
    """A short hash of what shapes a result."""
    text = json.dumps(plain(what), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_results(path: pathlib.Path) -> list[dict[str, Any]]:
    """All results of a file, [] where there is none.

    Raises:
      UserError: a line that is no result.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            result = json.loads(line)
            result["id"], result["metrics"].items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} line {number} is no result of `kaleido evaluate`") from error
        found.append(result)
    return found


def append(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Adds a line, beside and renamed, unless a result of the same id is there.

    Raises:
      UserError: the file cannot be written or holds other things.
    """
    line = json.dumps(plain(result), allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # short: another one writes a line
            if any(old["id"] == result["id"] for old in read_results(path)):
                return
            before = path.read_bytes() if path.exists() else b""
            if before and not before.endswith(b"\n"):
                before += b"\n"
            beside.write_bytes(path, before + line.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def write_tensorboard(
    folder: pathlib.Path,
    result: Mapping[str, Any],
    asked: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Writes a result's values as TensorBoard scalars over the training step, where clu is.

    What was asked alike but for checkpoint, guidance and seed is one of TensorBoard's runs.
    """
    along = ("checkpoint_hash", "step", "seed", "guidance_weight", "settings")
    identity = asked["identity"]
    alike = {k: v for k, v in identity.items() if k not in along}
    settings = {k: v for k, v in identity.get("settings", {}).items() if k not in along}
    name = re.sub(r"[^\w.-]", "_", result["name"] or result["subject"])
    run = f"{name}-{identify({**asked, 'identity': alike, 'settings': settings})[:8]}"
    writer = tensorboard_writer(folder, say, run)
    if writer is None:
        return
    tag = f"guidance_{result['guidance_weight']}/seed_{result['seed']}"
    values = {
        f"{tag}/{part}/{key}": entry["value"]
        for part in ("metrics", "adherence")
        for key, entry in result[part].items()
        if entry["value"] is not None
    }
    writer.write_scalars(result.get("step") or 0, values)
    writer.close()
