"""Part three: a short training on shapes, stopped, gone on with, and sampled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache as compiled
from jaxtyping import UInt8

from kaleido_jax import bundle, checkpoint, generate, training_loop
from kaleido_jax.demo import configs
from kaleido_jax.demo.checks import Check
from kaleido_jax.demo.shapes import BATCH, CAPTIONS

STEPS, STOP = 40, 24
CHANGES = (
    "train.batch_size=16",
    "train.log_every=1",
    "train.keep_checkpoints=2",
    "optim.warmup_steps=10",
)
QUICK_STEPS, QUICK_STOP = 3, 2
QUICK = (
    "train.batch_size=2",
    "data.latent_length=16",
    "model.denoiser.resolution_channels=(16,)",
    "model.denoiser.num_resnets_per_resolution=(1,)",
    "model.denoiser.num_attention_layers=(0,)",
    "sample.steps=2",
)
GUIDANCE, PICTURES = 2.0, 2  # of each caption


@dataclasses.dataclass(frozen=True)
class Scratch:
    """What a short run gave.

    Attributes:
      steps, stop: length of the run, and where the second run began.
      losses: one dict (step, loss, loss_dm, loss_ar) per step of the unbroken run.
      resumed: the same of the second run, from step `stop` + 1 on.
      same_arrays: share of the arrays of the two last states that are equal, bit for bit.
      images: a few pictures of each caption, from the model as it is after these few steps.
    """

    steps: int
    stop: int
    losses: Sequence[dict[str, float]]
    resumed: Sequence[dict[str, float]]
    same_arrays: float
    images: UInt8[np.ndarray, "n h w 3"]


def run(
    folder: pathlib.Path, quick: bool, seed: int, note: Callable[[str, float], None]
) -> Scratch:
    """Trains in `folder`/whole, goes on from its first checkpoint in `folder`/resumed, samples.

    Args:
      folder: for the workdirs.
      quick: a few steps of a smaller model.
      seed: of training and sampling.
      note: receives a line and the share of this part that is done.
    """
    steps, stop = (QUICK_STEPS, QUICK_STOP) if quick else (STEPS, STOP)
    changes = (f"seed={seed}", f"train.num_steps={steps}", f"train.checkpoint_every={stop}")
    config = configs.load("shapes", (*changes, *CHANGES, *(QUICK if quick else ())))
    whole, resumed = folder / "whole", folder / "resumed"

    def say(line: str) -> None:
        if not line.startswith("step "):
            return
        step = int(line.split()[1].partition("/")[0])
        if step % 8 == 0 or step == steps:
            note("  ".join(line.split("  ")[:4]), 0.6 * step / steps)

    # The second run is the same program: it need not be compiled again.
    with compilation_cache(folder / "compiled"):
        first = training_loop.train(config, whole, say=say)
        interrupt(whole, resumed, stop)
        note(f"going on from the checkpoint of step {stop}", 0.7)
        second = training_loop.train(config, resumed, say=lambda line: None)
    same = jax.tree.map(np.array_equal, jax.device_get(first), jax.device_get(second))
    note("sampling", 0.85)
    pipe = generate.Pipeline(bundle.load(resumed))
    output = pipe(list(CAPTIONS), PICTURES, seed=seed, guidance_weight=GUIDANCE, batch_size=BATCH)
    return Scratch(
        steps=steps,
        stop=stop,
        losses=read_losses(whole),
        resumed=read_losses(resumed)[stop:],
        same_arrays=float(np.mean(jax.tree.leaves(same))),
        images=output.images,
    )


def interrupt(whole: pathlib.Path, broken: pathlib.Path, step: int) -> None:
    """Copies a workdir as if its run had been killed after the checkpoint of `step`."""
    shutil.copytree(whole, broken)
    checkpoints = checkpoint.Checkpoints(broken)
    for later in checkpoints.steps():
        if later > step:
            shutil.rmtree(checkpoints.step_folder(later))


def read_losses(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Step and losses of each line of metrics.jsonl."""
    lines = (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
    names = ("step", "loss", "loss_dm", "loss_ar")
    return [{name: row[name] for name in names} for row in map(json.loads, lines)]


@contextlib.contextmanager
def compilation_cache(folder: pathlib.Path) -> Iterator[None]:
    """Keeps compiled programs in `folder` meanwhile, where jax does not keep them already."""
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compiled.reset_cache()  # a cache is opened once, at the first program after this
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compiled.reset_cache()


def checks(result: Scratch) -> list[Check]:
    """That the loss falls, and that a stopped run goes on as if it had not been."""
    third = max(1, len(result.losses) // 3)
    first, last = (
        float(np.mean([row["loss"] for row in rows]))
        for rows in (result.losses[:third], result.losses[-third:])
    )
    pairs = zip(result.losses[result.stop :], result.resumed, strict=False)
    repeated = sum(a == b for a, b in pairs) / (result.steps - result.stop)
    again = "from scratch: stopped and started again, the run"
    return [
        Check("from scratch: the loss falls (its last third over its first)", last / first, "<", 1),
        Check(f"{again} repeats its losses digit for digit", repeated, ">=", 1.0, True),
        Check(
            f"{again} ends in the same numbers, bit for bit", result.same_arrays, ">=", 1.0, True
        ),
    ]


def rows(result: Scratch) -> list[dict[str, float | str]]:
    """One row per step of both runs."""
    return [
        {"run": name} | row
        for name, losses in (("unbroken", result.losses), ("resumed", result.resumed))
        for row in losses
    ]
