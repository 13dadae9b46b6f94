"""`kaleido annotate`: stages one after another, each over the shards that are not yet done.

A stage at a time, so that one model is in memory at a time and `blob` finds the boxes of `bbox`.
A shard whose sidecar is whole and made by the same engine from the same input is left alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import kaleido_jax
from kaleido_jax import locks, sidecars
from kaleido_jax.annotate import inputs, progress
from kaleido_jax.annotate.engines import make_engine
from kaleido_jax.annotate.inputs import Shard
from kaleido_jax.annotate.protocols import STAGES
from kaleido_jax.annotate.stages import AnnotationFailed, Plan, reads_boxes
from kaleido_jax.annotate.storage import Folder
from kaleido_jax.errors import UserError


@dataclass(frozen=True)
class Run:
    """What `kaleido annotate` was asked for.

    Attributes:
      data: shards as `inputs.find_shards` reads them.
      out: folder of the sidecars.
      engines: stage -> engine string.
      options: stage -> settings of its engine.
      seed: of engines that draw.
      image_size: side of the pictures that engines see, at most; smaller ones stay as they are.
      max_failure_rate: share of rejected, failed and lost examples that a stage may have.
      data_dir: TFDS's folder.
      again: try the dead letters of finished shards once more.
      flags: Beam's own.
    """

    data: str
    out: str
    engines: Mapping[str, str]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    image_size: int = inputs.IMAGE_SIZE
    max_failure_rate: float = 0.02
    data_dir: str = ""
    again: bool = False
    flags: Sequence[str] = ()


def run(settings: Run) -> dict[str, Any]:
    """Annotates, and writes the manifest when every stage has passed.

    Returns:
      The manifest.

    Raises:
      UserError: a wrong setting, unreadable or refused input, another run in the same folder.
      AnnotationFailed: a stage with too many failures, an engine that always fails; the sidecars
        and dead letters stay, the manifest is left as it was.
    """
    unknown = [stage for stage in settings.engines if stage not in STAGES]
    if unknown or not settings.engines:
        raise UserError(
            f"annotate: no stage {unknown[0]!r}" if unknown else "annotate: no stage is asked for"
        )
    if not settings.data or not settings.out:
        raise UserError(f"annotate: --{'out' if settings.data else 'data'} is empty")
    folder = Folder(settings.out)
    shards = inputs.find_shards(settings.data, settings.data_dir)
    with _sole(folder), folder.local() as local:
        folder.pull(local, sidecars.MANIFEST)
        known = _known_stages(local)
        plans = _plans(settings, known)
        for plan in plans:
            dones = _annotate(plan, shards, folder, local, settings)
            _judge(plan, dones, settings)
            known[plan.stage] = {
                "engine": plan.spec,
                "provenance": plan.engine.provenance,
                "code_version": kaleido_jax.__version__,
                "seed": plan.seed,
                "image_size": plan.image_size,
                "config_hash": plan.config_hash,
                "after": plan.after,
                "input": settings.data,
                "shards": dones,
            }
        stages = {name: known[name] for name in STAGES if name in known}
        sidecars.write_manifest(local, stages)
        folder.push(local, sidecars.MANIFEST)
        manifest = sidecars.read_manifest(local)
    _warn(manifest)
    return manifest


def _plans(settings: Run, known: Mapping[str, Mapping[str, Any]]) -> list[Plan]:
    """The stages in their order, every engine made before the first picture is read."""
    plans: dict[str, Plan] = {}
    for stage in STAGES:
        if stage not in settings.engines:
            continue
        spec = settings.engines[stage]
        engine = make_engine(stage, spec, settings.options.get(stage, {}))
        after = ""
        if reads_boxes(engine):
            if "bbox" in plans:
                after = plans["bbox"].config_hash
            elif "bbox" in known:
                after = known["bbox"]["config_hash"]
            else:
                raise UserError(
                    f"stage blob with engine '{spec}' starts from boxes, and {settings.out} has no "
                    "stage bbox; annotate bbox too"
                )
        plans[stage] = Plan(stage, spec, engine, settings.seed, settings.image_size, after)
    return list(plans.values())


def _annotate(
    plan: Plan, shards: Sequence[Shard], folder: Folder, local: Path, settings: Run
) -> dict[str, dict[str, Any]]:
    """Runs a stage on what is not done; every shard's done record, in order."""
    before = _done(plan, shards, folder, local)
    todo = [(shard, False) for shard in shards if shard.name not in before]
    if settings.again:
        todo += [
            (shard, True)
            for shard in shards
            if shard.name in before and before[shard.name]["dead_letters"]
        ]
    if todo:
        runner = _beam()
        new = [shard.name for shard, again in todo if not again]
        with progress.watch(plan, new, folder):
            runner.run_stage(plan, todo, settings.out, settings.flags)
    dones = _done(plan, shards, folder, local)
    missing = [shard.name for shard in shards if shard.name not in dones]
    if missing:
        raise AnnotationFailed(
            f"stage {plan.stage}: the runner finished, but {len(missing)} shards have no sidecar "
            f"in {settings.out} ({', '.join(missing[:3])}); do all workers reach that folder?"
        )
    return dones


def _done(
    plan: Plan, shards: Sequence[Shard], folder: Folder, local: Path
) -> dict[str, dict[str, Any]]:
    """The done records of shards that are finished and whose input is the same still."""
    there = folder.names(plan.stage, ".done.json")
    found = {}
    for shard in shards:
        name = sidecars.file_names(plan.stage, shard.name, plan.config_hash)[-1]
        if name.rpartition("/")[2] not in there:
            continue
        folder.pull(local, name)
        done = sidecars.read_done(
            local, plan.stage, shard.name, plan.config_hash, verify=not folder.remote
        )
        if done is None:
            continue
        source = {key: value for key, value in done["source"].items() if key != "whole"}
        if source == inputs.fingerprint(shard):
            found[shard.name] = done
    return found


def _judge(plan: Plan, dones: Mapping[str, Mapping[str, Any]], settings: Run) -> None:
    """Raises AnnotationFailed where too large a share of a stage has no usable answer."""
    bad, total = failures(list(dones.values()))
    if bad > settings.max_failure_rate * total:
        letters = [
            sidecars.file_names(plan.stage, name, plan.config_hash)[1]
            for name, done in dones.items()
            if done["dead_letters"]
        ]
        raise AnnotationFailed(
            f"stage {plan.stage}: about {bad} of {total} examples were rejected, failed or lost "
            f"({bad / total:.1%}), more than the share of {settings.max_failure_rate:g} allowed; "
            f"see {settings.out.rstrip('/')}/{letters[0]}"
        )


def failures(dones: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """(examples without a usable answer, all examples) of a stage.

    What a broken shard would have held is judged by the whole ones.
    """
    whole = [done["records"] for done in dones if done["source"]["whole"]]
    usual = round(sum(whole) / len(whole)) if whole else 0
    bad = total = 0
    for done in dones:
        lost = done["dead_letters"] - done["counts"]["rejected"] - done["counts"]["failed"]
        if not done["source"]["whole"]:
            lost = max(1, lost - 1, usual - done["records"])  # one letter is the shard's own
        bad += lost + done["counts"]["rejected"] + done["counts"]["failed"]
        total += lost + done["records"]
    return bad, total


def _warn(manifest: Mapping[str, Any]) -> None:
    stages = manifest["stages"]
    for name, stage in stages.items():
        if stage["records"] and stage["counts"]["empty"] == stage["records"]:
            print(
                f"kaleido: stage {name}: engine '{stage['engine']}' had nothing to say of any "
                "picture",
                file=sys.stderr,
            )
        if stage["after"] and stage["after"] != stages.get("bbox", {}).get("config_hash"):
            print(
                f"kaleido: stage {name} was made from other boxes than those of stage bbox; "
                "annotate it again",
                file=sys.stderr,
            )


def _known_stages(local: Path) -> dict[str, Any]:
    """The stages of an earlier run in the folder; none where there is no manifest."""
    if not (local / sidecars.MANIFEST).exists():
        return {}
    return dict(sidecars.read_manifest(local)["stages"])


@contextlib.contextmanager
def _sole(folder: Folder) -> Iterator[None]:
    """Keeps a second run out of the folder, and clears what a killed one left half-written."""
    if folder.remote:
        yield
        return
    path = Path(folder.place)
    with locks.sole_writer(path, "kaleido annotate"):
        for leftover in [*path.glob(".*.tmp"), *path.glob("*/.*.tmp")]:
            leftover.unlink(missing_ok=True)
        yield


def _beam() -> ModuleType:
    """The module of Beam's half, which takes seconds to load."""
    for module, package in (("apache_beam", "apache-beam"), ("pyarrow", "pyarrow")):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"annotate needs {package}: pip install -c constraints.txt 'kaleido_jax[annotate]'"
            )
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of clouds that nobody asked for
    try:
        return importlib.import_module("kaleido_jax.annotate.runner")
    finally:
        logging.disable(before)
