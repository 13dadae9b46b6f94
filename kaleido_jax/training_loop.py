"""The loop around the train step: checkpoints, metrics, sample grids, and going on."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from kaleido_jax import bundle, checkpoint, optim, runlog, trainable, warm_start
from kaleido_jax import config as config_lib
from kaleido_jax.data import Loader
from kaleido_jax.tokens import Vocabulary
from kaleido_jax.train import Trainer, TrainState, make_loader
from kaleido_jax.trainable import Trainable
from kaleido_jax.types import Batch

# Called with (step, bundle of the averaged parameters); returns a picture [H, W, 3] or None.
SampleHook = Callable[[int, bundle.Bundle], np.ndarray | None]


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    sample_hook: SampleHook | None = None,
    say: Callable[[str], None] = print,
) -> TrainState:
    """Trains until `config.train.num_steps`, going on from the newest whole checkpoint.

    Args:
      config: a checked config.
      workdir: gets config.json, tokenizer.model, metrics.jsonl, TensorBoard events (where clu
        is installed), samples/ and checkpoints/.
      sample_hook: draws the sample grid every `train.sample_every` steps.
      say: receives one line at a time for people.

    Returns:
      The last state.

    Raises:
      UserError: the workdir was made by another config or from other data, or the data cannot be
        read.
    """
    workdir = pathlib.Path(workdir)
    trainer = Trainer(config)
    vocabulary = bundle.make_vocabulary(config)
    loader = make_loader(config, vocabulary, trainer.rows)
    bundle.start_workdir(workdir, config, vocabulary)
    checkpoints = checkpoint.Checkpoints(workdir, config.train.keep_checkpoints)

    newest = checkpoints.newest_whole(say)
    if newest is None:
        state, start = trainer.init(), 0
        if config.get("init_from"):
            state = _start_from(state, config, say)
        say(
            f"parameters: {optim.count_parameters(state.params):,} trained, "
            f"{optim.count_parameters(state.frozen):,} frozen"
        )
    else:
        # Before anything is restored: other data would not be the same stream.
        position = checkpoints.meta(newest).get("loader_position")
        if isinstance(position, dict):  # earlier checkpoints only tell their step
            loader.resume(position)
        template = trainer.abstract_state().as_dict()
        state, start = TrainState(**checkpoints.restore(newest, template)), newest
        say(f"going on from step {newest} of {workdir}")
    if start >= config.train.num_steps:
        say(f"nothing to do: step {start} of {config.train.num_steps} is done")
        return state
    with (
        runlog.RunLog(workdir, start, config.train, say) as log,
        contextlib.closing(loader.batches(start)) as batches,
    ):
        state = _loop(
            trainer, state, start, loader, batches, checkpoints, log, sample_hook, vocabulary
        )
    return state


def _start_from(state: TrainState, config: ConfigDict, say: Callable[[str], None]) -> TrainState:
    """A new state with the parameters that `config.init_from` names.

    The average goes on from a workdir's average, and so does what is frozen, as it will be sampled
    with the average; imports and exports have one set for both.
    """
    what = Trainable.from_config(config)
    merged = trainable.merge(state.ema, state.frozen)
    averaged = warm_start.warm_start(merged, config, config.init_from, say)
    ema, frozen = trainable.split(averaged, what)
    merged = trainable.merge(state.params, frozen)
    trained = warm_start.warm_start(merged, config, config.init_from, average=False)
    params, _ = trainable.split(trained, what)
    new = state.replace(params=params, frozen=frozen, ema=ema)
    # Layers that were cut out of an array are placed anew.
    return jax.tree.map(lambda leaf, old: jax.device_put(leaf, old.sharding), new, state)


def _loop(
    trainer: Trainer,
    state: TrainState,
    start: int,
    loader: Loader,
    batches: Iterator[Batch],
    checkpoints: checkpoint.Checkpoints,
    log: runlog.RunLog,
    sample_hook: SampleHook | None,
    vocabulary: Vocabulary,
) -> TrainState:
    config, t = trainer.config, trainer.config.train
    for step in range(start, t.num_steps):
        state, metrics = trainer.step(state, trainer.put(next(batches)))
        done = step + 1
        # Metrics stay on the device until a log step: the loop runs ahead of the device.
        log.add(metrics)
        if done % t.log_every == 0 or done == t.num_steps:
            log.write(done)
        if done % t.checkpoint_every == 0 or done == t.num_steps:
            started = time.monotonic()
            checkpoints.save(done, state.as_dict(), checkpoint_meta(config, done, loader))
            log.exclude(time.monotonic() - started)
        if sample_hook and t.sample_every and (done % t.sample_every == 0 or done == t.num_steps):
            started = time.monotonic()
            params = trainable.merge(state.ema, state.frozen)
            model = bundle.plain_model(config, params)
            image = sample_hook(done, bundle.Bundle(*model, vocabulary, f"step {done}"))
            if image is not None:
                log.image(done, image)
            log.exclude(time.monotonic() - started)
    return state


def checkpoint_meta(config: ConfigDict, step: int, loader: Loader) -> dict[str, Any]:
    """What a checkpoint tells of itself, the loader's position among it."""
    return {
        "step": step,
        "loader_position": loader.position(step),
        "config_fingerprint": config_lib.fingerprint(config),
        "versions": runlog.versions(),
    }
