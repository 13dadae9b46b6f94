"""One stage on one shard: pictures in order, an engine's answers, a sidecar. No Beam here."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaleido_jax import sidecars
from kaleido_jax.annotate import inputs
from kaleido_jax.annotate.inputs import OpenShard, Shard
from kaleido_jax.annotate.protocols import Engine, Example, Result
from kaleido_jax.annotate.storage import Folder
from kaleido_jax.data.sources import RecordError
from kaleido_jax.data.transforms import ImageError
from kaleido_jax.sidecars import Row

# Raise it when the same engines would write other sidecars: every shard is then done again.
FORMAT = 2
# A shard whose every picture makes the engine fail, and not one or two by chance, is not written.
_LEAST_TO_JUDGE = 8
_READERS = 4  # threads that read and decode; the engine waits for one batch only at the start


class AnnotationFailed(RuntimeError):
    """The run went wrong as a whole; the message says where to look, in one line."""


@dataclass(frozen=True)
class Plan:
    """One stage of a run: all that a worker needs, and that decides the output.

    Attributes:
      stage: text, bbox, blob or voken.
      spec: the engine's string, for the manifest.
      engine: made by `make_engine`.
      seed: of engines that draw; each answer depends on it and the example's key.
      image_size: side of the pictures that the engine sees, at most.
      after: config hash of the stage `bbox` where the engine reads its boxes, else "".
    """

    stage: str
    spec: str
    engine: Engine
    seed: int
    image_size: int
    after: str = ""

    @property
    def config_hash(self) -> str:
        """Hexadecimal hash of all that decides the output but the input."""
        made = {
            "format": FORMAT,
            "stage": self.stage,
            "provenance": self.engine.provenance,
            "seed": self.seed,
            "image_size": self.image_size,
            "after": self.after,
        }
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def reads_boxes(engine: Engine) -> bool:
    """Whether an engine starts from the boxes of the stage `bbox`; the oracle knows its own."""
    return engine.stage == "blob" and engine.provenance.get("engine") != "oracle"


def annotate_shard(
    plan: Plan,
    engine: Engine,
    shard: Shard,
    folder: Folder,
    again: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
    lock: threading.Lock | None = None,
) -> dict[str, Any]:
    """Annotates a shard and writes its sidecar.

    Args:
      plan: the stage.
      engine: the plan's, after `setup`.
      shard: what to read.
      folder: OUT.
      again: keep the finished shard's good rows, and try its rejected and failed ones again with
        another seed.
      tell: called with (examples done, examples in the shard) after every batch.
      lock: held while the engine works, where threads share it.

    Returns:
      What `sidecars.write_sidecar` returns.

    Raises:
      AnnotationFailed: the engine failed on every picture of a shard.
      UserError: a shard that is refused, boxes that are missing, a folder that cannot be written.
    """
    names = sidecars.file_names(plan.stage, shard.name, plan.config_hash)
    with folder.local() as local, tempfile.TemporaryDirectory(prefix="kaleido-shard-") as copies:
        boxes = _boxes(plan, shard, folder, local)
        before: dict[str, Row] = {}
        attempt = 1
        if again:
            folder.pull(local, *names)
            before, attempt = _before(plan, shard, local)
        opened = inputs.open_shard(shard, copies)
        rows, letters = _rows(plan, engine, opened, boxes, before, attempt, tell, lock)
        letters += [_letter(key, plan.stage, why, "", attempt) for key, why in opened.lost]
        source = {**inputs.fingerprint(shard), "whole": opened.whole}
        done = sidecars.write_sidecar(
            local, plan.stage, shard.name, plan.config_hash, rows, letters, source
        )
        folder.push(local, *names)
    return done


def _rows(
    plan: Plan,
    engine: Engine,
    opened: OpenShard,
    boxes: Mapping[str, str],
    before: Mapping[str, Row],
    attempt: int,
    tell: Callable[[int, int], None],
    lock: threading.Lock | None,
) -> tuple[list[Row], list[dict[str, Any]]]:
    wanted = [i for i in range(len(opened)) if opened.key(i) not in before]
    found: dict[str, Row] = {}
    letters: list[dict[str, Any]] = []
    failures = 0
    for batch in _batches(opened, wanted, plan.image_size, boxes, max(1, engine.batch_size)):
        examples = [example for _, example in batch if isinstance(example, Example)]
        with lock or threading.Lock():
            results = engine.annotate(examples, plan.seed + attempt - 1)
        if len(results) != len(examples):
            raise AnnotationFailed(
                f"engine '{plan.spec}' gave {len(results)} answers to {len(examples)} pictures"
            )
        answers = iter(results)
        for key, example in batch:
            result = next(answers) if isinstance(example, Example) else example
            failures += isinstance(example, Example) and result.status == "failed"
            found[key] = Row(key, result.latent, result.status, tuple(result.issues))
            if result.status in ("rejected", "failed"):
                why = "; ".join(result.issues) or result.status
                letters.append(_letter(key, plan.stage, why, result.raw, attempt))
        tell(len(before) + len(found), len(opened))
    if failures == len(wanted) >= _LEAST_TO_JUDGE and attempt == 1:
        first = letters[0]
        raise AnnotationFailed(
            f"engine '{plan.spec}' failed on all {failures} pictures of a shard; "
            f"the first: {first['key']}: {first['error']}"
        )
    keys = [opened.key(i) for i in range(len(opened))]
    return [before.get(key) or found[key] for key in keys], letters


def _batches(
    opened: OpenShard,
    wanted: Sequence[int],
    image_size: int,
    boxes: Mapping[str, str],
    batch_size: int,
) -> Iterator[list[tuple[str, Example | Result]]]:
    """(key, example or why there is none) in order; the next batch is read during this one."""

    def read(index: int) -> tuple[str, Example | Result]:
        key = opened.key(index)
        try:
            stored = opened.stored(index)
            return key, inputs.read_example(stored, image_size, boxes.get(key))
        except (RecordError, ImageError) as error:
            return key, Result("", "failed", (str(error)[:500],))

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        ahead = [pool.submit(read, index) for index in wanted[:batch_size]]
        for start in range(0, len(wanted), batch_size):
            batch = [future.result() for future in ahead]
            following = wanted[start + batch_size : start + 2 * batch_size]
            ahead = [pool.submit(read, index) for index in following]
            yield batch


def _boxes(plan: Plan, shard: Shard, folder: Folder, local: Path) -> dict[str, str]:
    """key -> bbox of the shard, where the plan's engine reads them."""
    if not plan.after:
        return {}
    folder.pull(local, *sidecars.file_names("bbox", shard.name, plan.after))
    rows = sidecars.read_sidecar(local, "bbox", shard.name, plan.after)
    return {row.key: row.latent for row in rows}


def _before(plan: Plan, shard: Shard, local: Path) -> tuple[dict[str, Row], int]:
    """The rows of a finished shard that need no other try, and the number of the next try."""
    rows = sidecars.read_sidecar(local, plan.stage, shard.name, plan.config_hash)
    letters = sidecars.read_dead_letters(local, plan.stage, shard.name, plan.config_hash)
    attempt = 1 + max((letter["attempt"] for letter in letters), default=0)
    return {row.key: row for row in rows if row.status not in ("rejected", "failed")}, attempt


def _letter(key: str, stage: str, error: str, raw: str, attempt: int) -> dict[str, Any]:
    return {
        "key": key,
        "stage": stage,
        "error": error,
        "raw": raw,
        "attempt": attempt,
    }
