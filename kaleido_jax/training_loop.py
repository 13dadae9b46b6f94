"""The loop around the train step: checkpoints, metrics, sample grids, going on, and ending well."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kaleido_jax import bundle, checkpoint, locks, optim, quantize, runlog, trainable, warm_start
from kaleido_jax import config as config_lib
from kaleido_jax.data import Loader
from kaleido_jax.errors import PREEMPTED, StopRun, UserError
from kaleido_jax.preemption import Signals
from kaleido_jax.tokens import Vocabulary
from kaleido_jax.train import Trainer, TrainState, make_loader
from kaleido_jax.trainable import Trainable
from kaleido_jax.types import Batch, Params
from kaleido_jax.watchdog import Watchdog

# Called with (step, bundle of the averaged parameters); returns a picture [H, W, 3] or None.
SampleHook = Callable[[int, bundle.Bundle], np.ndarray | None]

# Steps that are dispatched while an earlier one is still computed. More would keep their batches
# on the device, and a signal could not be answered before all of them are done.
AHEAD = 2
_NONE_YET, _REFUSED = -1, -2


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    sample_hook: SampleHook | None = None,
    say: Callable[[str], None] | None = None,
    *,
    allow_config_change: bool = False,
    start_anew: bool = False,
) -> TrainState:
    """Trains until `config.train.num_steps`, going on from the newest whole checkpoint.

    Args:
      config: a checked config.
      workdir: gets config.json, tokenizer.model, metrics.jsonl, TensorBoard events (where clu
        is installed), samples/ and checkpoints/.
      sample_hook: draws the sample grid every `train.sample_every` steps.
      say: receives one line at a time for people; printed by default.
      allow_config_change: go on although the config differs from the workdir's.
      start_anew: start at step 0 where there are checkpoints but none is whole.

    Returns:
      The last state.

    Raises:
      UserError: the workdir was made by another config or from other data, is in use or has no
        whole checkpoint left, or the data cannot be read.
      StopRun: the run ended early: a signal (status PREEMPTED, after saving), a checkpoint that
        could not be written, too many bad steps in a row.
    """
    workdir = pathlib.Path(workdir)
    if say is None:
        say = functools.partial(print, flush=True)  # a killed process leaves what it said
    if jax.process_index():
        say = _silent
    trainer = Trainer(config)
    vocabulary = bundle.make_vocabulary(config)
    loader = make_loader(config, vocabulary, trainer.rows)
    checkpoints = checkpoint.Checkpoints(workdir, config.train.keep_checkpoints)
    with contextlib.ExitStack() as stack:

        def prepare() -> int:
            stack.enter_context(locks.sole_writer(workdir, "kaleido train"))
            bundle.check_workdir(workdir, config, vocabulary, allow_config_change, say)
            newest = checkpoints.recover(say, start_anew)
            return _NONE_YET if newest is None else newest

        def write() -> int:
            bundle.start_workdir(workdir, config, vocabulary)
            return 0

        newest = _from_first_process(prepare)
        stack.enter_context(contextlib.closing(checkpoints))
        state, start, before = _begin(trainer, loader, checkpoints, newest, workdir, say)
        # Not before: data or parameters that do not fit the new config leave the workdir its own.
        _from_first_process(write)
        t = config.train
        if start >= t.num_steps:
            say(f"nothing to do: step {start} of {t.num_steps} is done")
            return state
        run = _Run(
            trainer=trainer,
            loader=loader,
            vocabulary=vocabulary,
            checkpoints=checkpoints,
            sample_hook=sample_hook,
            signals=stack.enter_context(Signals()),
            watchdog=stack.enter_context(_watchdog(t, workdir)),
            log=stack.enter_context(runlog.RunLog(workdir, start, config, say, before)),
            batches=stack.enter_context(contextlib.closing(loader.batches(start))),
            say=say,
        )
        try:
            return run.steps(state, start)
        except OSError as error:
            where = error.filename or workdir
            raise StopRun(f"cannot go on: {where}: {error.strerror or error}") from error


def _silent(line: str) -> None:
    """Says nothing: of several processes the first one speaks."""


def _from_first_process(prepare: Callable[[], int]) -> int:
    """What `prepare` gives on the first process, on all; where it fails there, all end."""
    if jax.process_count() == 1:
        return prepare()
    answer, failure = _REFUSED, None
    if jax.process_index() == 0:
        try:
            answer = prepare()
        except Exception as error:
            failure = error
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
    if failure is not None:
        raise failure
    if answer == _REFUSED:
        raise UserError("the first process cannot start; its output says why")
    return answer


def _watchdog(t: ConfigDict, workdir: pathlib.Path) -> Watchdog:
    stacks = workdir / f"stacks_{jax.process_index()}.txt"
    seconds, patience = t.get("watchdog_seconds", 0.0), t.get("watchdog_patience", 0.0)
    return Watchdog(seconds, patience, stacks)


def _begin(
    trainer: Trainer,
    loader: Loader,
    checkpoints: checkpoint.Checkpoints,
    newest: int,
    workdir: pathlib.Path,
    say: Callable[[str], None],
) -> tuple[TrainState, int, dict[str, Any]]:
    """State and step to go on with, and what the log kept of the steps before."""
    config = trainer.config
    if newest == _NONE_YET:
        state = trainer.init()
        if config.get("init_from"):
            state = _start_from(state, config, say)
        say(
            f"parameters: {optim.count_parameters(state.params):,} trained, "
            f"{optim.count_parameters(state.frozen):,} frozen"
        )
        return state, 0, {}
    meta = checkpoints.meta(newest)
    # Before anything is restored: other data would not be the same stream.
    position = meta.get("loader_position")
    if isinstance(position, dict):  # earlier checkpoints only tell their step
        loader.resume(position)
    template = trainer.abstract_state()
    if template.norms is not None and "norms" not in checkpoints.saved_shapes(newest):
        # `train.skip_spike` was switched on since: the mean begins now.
        template = template.replace(norms=None)
    state = TrainState(**checkpoints.restore(newest, template.as_dict()))
    if trainer.skip_spike and state.norms is None:
        state = state.replace(norms=trainer.init_norms())
    say(f"going on from step {newest} of {workdir}")
    return state, newest, meta.get("log", {})


def _start_from(state: TrainState, config: ConfigDict, say: Callable[[str], None]) -> TrainState:
    """A new state with the parameters that `config.init_from` names.

    The average goes on from a workdir's average, and so does what is frozen, as it will be sampled
    with the average; imports and exports have one set for both.
    """
    what = Trainable.from_config(config)
    merged = trainable.merge(state.ema, quantize.restore(state.frozen))
    averaged = warm_start.warm_start(merged, config, config.init_from, say)
    ema, frozen = trainable.split(averaged, what)
    merged = trainable.merge(state.params, frozen)
    trained = warm_start.warm_start(merged, config, config.init_from, average=False)
    params, _ = trainable.split(trained, what)
    frozen = quantize.of_encoder(quantize.store, frozen, quantize.storage_of(config))
    new = state.replace(params=params, frozen=frozen, ema=ema)
    # Layers that were cut out of an array are placed anew.
    return jax.tree.map(lambda leaf, old: jax.device_put(leaf, old.sharding), new, state)


@dataclasses.dataclass
class _Run:
    """What the steps of one run share."""

    trainer: Trainer
    loader: Loader
    vocabulary: Vocabulary
    checkpoints: checkpoint.Checkpoints
    sample_hook: SampleHook | None
    signals: Signals
    watchdog: Watchdog
    log: runlog.RunLog
    batches: Iterator[Batch]
    say: Callable[[str], None]

    def steps(self, state: TrainState, start: int) -> TrainState:
        """Runs the steps from `start` to the end, or until a signal or bad steps end them."""
        t = self.trainer.config.train
        flying: collections.deque = collections.deque()
        for step in range(start, t.num_steps):
            state, metrics = self.trainer.step(state, self.trainer.put(next(self.batches)))
            done, last = step + 1, step + 1 == t.num_steps
            # Metrics stay on the device until a log step: the loop runs ahead of the device.
            self.log.add(metrics)
            flying.append(metrics["loss"])
            # The first step compiles: only what comes after it is timed as a step.
            # A line waits for all steps: each of them has the watchdog's time to itself.
            logs = done % t.log_every == 0 or last
            while flying and (logs or len(flying) > AHEAD or step == start):
                jax.block_until_ready(flying.popleft())
                self.watchdog.beat()
            self.checkpoints.tell()
            if logs:
                self.log.write(done)
                self._stop_if_bad(done)
            stop = self.signals.reached(done)
            if done % t.checkpoint_every == 0 or last or stop:
                with self._beside():
                    self._save(state, done, always=last or stop)
                    if stop or last:
                        self._settle()
            if stop and not last:
                raise StopRun(
                    f"stopped by {self.signals.name or 'a signal'} after step "
                    f"{done}, which is saved; the same command goes on there",
                    PREEMPTED,
                )
            every = t.sample_every
            if self.sample_hook and every and (done % every == 0 or last):
                with self._beside():
                    self._draw(state, done)
        return state

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Work that is no step: not counted as speed, and it may take longer."""
        started = time.monotonic()
        with self.watchdog.patient():
            yield
        self.log.exclude(time.monotonic() - started)

    def _save(self, state: TrainState, step: int, always: bool) -> None:
        meta = checkpoint_meta(self.trainer.config, step, self.loader) | {"log": self.log.state()}
        self._stop_if_bad(step)
        if self.log.dropped and not always:
            # What is dropped step after step may come from the parameters: older ones are kept.
            self.say(f"step {step}: not saved, as the last update was dropped")
            return
        self.checkpoints.save(step, state.as_dict(), meta)

    def _settle(self) -> None:
        """Waits for the save; where it failed on one process, all end as failed."""
        failure = None
        try:
            self.checkpoints.wait()
        except StopRun as error:
            failure = error
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(np.int32(failure is not None)).any()
            if failed and failure is None:
                raise StopRun("another process could not save the checkpoint; its output says why")
        if failure is not None:
            raise failure

    def _stop_if_bad(self, step: int) -> None:
        most = self.trainer.config.train.get("max_bad_steps", 0)
        if most and self.log.most_dropped >= most:
            self.checkpoints.wait()
            saved = self.checkpoints.steps()
            kept = f"step {saved[-1]} is the newest checkpoint" if saved else "nothing is saved yet"
            raise StopRun(
                f"stopped at step {step}: {self.log.most_dropped} updates in a row had a "
                f"non-finite loss or gradient, or a spike (train.max_bad_steps is {most}); {kept}"
            )

    def _draw(self, state: TrainState, step: int) -> None:
        params = trainable.merge(state.ema, quantize.restore(state.frozen))
        several = jax.process_count() > 1
        if several:
            params = multihost_utils.process_allgather(params, tiled=True)
        if jax.process_index() == 0:
            self._draw_grid(params, step)
        if several:  # the others wait here, where the watchdog is patient
            multihost_utils.sync_global_devices(f"drawn {step}")

    def _draw_grid(self, params: Params, step: int) -> None:
        model = bundle.plain_model(self.trainer.config, params)
        image = self.sample_hook(step, bundle.Bundle(*model, self.vocabulary, f"step {step}"))
        if image is not None:
            self.log.image(step, image)


def checkpoint_meta(config: ConfigDict, step: int, loader: Loader) -> dict[str, Any]:
    """What a checkpoint tells of itself, the loader's position among it."""
    return {
        "step": step,
        "loader_position": loader.position(step),
        "config_fingerprint": config_lib.fingerprint(config),
        "versions": runlog.versions(),
    }
