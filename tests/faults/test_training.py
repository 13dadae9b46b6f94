"""Signals, bad batches, changed configs, hangs, several processes. Rows 2, 7, 8, 10 to 14."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from kaleido_jax import cli, data
from kaleido_jax.bundle import make_vocabulary
from kaleido_jax.checkpoint import Checkpoints
from kaleido_jax.data import ToySource
from kaleido_jax.errors import HUNG, PREEMPTED, StopRun, UserError
from kaleido_jax.train import Trainer, make_loader
from kaleido_jax.training_loop import train
from tests.faults import runs
from tests.test_train import leaves


@pytest.fixture(autouse=True)
def _no_tensorboard(monkeypatch):
    """Its import takes seconds."""
    monkeypatch.setitem(sys.modules, "clu", None)


# Compiles sooner than the eight devices of other tests.
ONE_DEVICE = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def quiet(line: str) -> None:
    del line


# ---- rows 2 and 13 -------------------------------------------------------------------------------


def test_sigterm_saves_and_the_rerun_goes_on_there_and_a_second_job_is_refused(tmp_path, capsys):
    workdir, log = tmp_path / "run", tmp_path / "run.log"
    rare = ("train.checkpoint_every=100000", "train.log_every=7")
    process = runs.start(workdir, "train.num_steps=100000", *rare)
    runs.wait_for(lambda: runs.steps_logged(workdir) >= 2, process, log)
    words = ["train", "--config", str(runs.ROOT / runs.CONFIG), "--workdir", str(workdir)]
    assert cli.main(words) == 2
    assert f"another `kaleido train` is writing to {workdir}" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    assert process.wait(runs.PATIENCE) == PREEMPTED
    (step,) = Checkpoints(workdir).steps()
    assert Checkpoints(workdir).newest_whole() == step
    assert f"stopped by SIGTERM after step {step}, which is saved" in log.read_text()
    assert "Traceback" not in log.read_text()
    said, end = [], f"train.num_steps={step + 5}"
    state = train(runs.toy(end, *rare), workdir, say=said.append)
    assert f"going on from step {step} of {workdir}" in said
    whole = train(runs.toy(end, *rare), tmp_path / "whole", say=quiet)
    runs.assert_same_state(state, whole)
    # Lines are means of seven steps: those before the signal are in them.
    assert runs.metrics(workdir) == runs.metrics(tmp_path / "whole")


# ---- rows 7 and 8 --------------------------------------------------------------------------------


class Scaled(ToySource):
    """The toy, its points multiplied by `factor` in the rows of some steps (of batches of 8)."""

    def __init__(self, seed: int, num_examples: int, factor: float, first: int, last: int):
        super().__init__(num_examples, seed)
        self._factor = factor
        loader = make_loader(runs.toy(), make_vocabulary(runs.toy()))
        self._bad = {int(i) for step in range(first, last + 1) for i in loader.indices(step - 1)}

    def __getitem__(self, index: int):
        example = super().__getitem__(index)
        if index in self._bad:
            example["image"] = example["image"] * np.float32(self._factor)
        return example


def with_scaled(monkeypatch, factor: float, first: int, last: int, *overrides: str):
    """A config whose batches of steps first..last are multiplied."""
    monkeypatch.setitem(data.SOURCES, "scaled", Scaled)
    config = runs.toy("train.num_steps=12", *overrides)
    with config.unlocked():
        config.data.source.update(name="scaled", factor=factor, first=first, last=last)
    return config


def test_a_nan_batch_changes_nothing_but_the_step(monkeypatch):
    config = with_scaled(monkeypatch, float("nan"), 3, 3)
    trainer = Trainer(config)
    loader = make_loader(config, make_vocabulary(config))
    state = trainer.init()
    for step in range(4):
        before = jax.device_get(state)
        state, metrics = trainer.step(state, trainer.put(loader.batch(step)))
        after = jax.device_get(state)
        assert after.step == step + 1
        assert metrics["bad"] == (step == 2)
        parts = [(before.params, after.params), (before.ema, after.ema)]
        slots = [jax.tree.leaves(s.opt_state) for s in (before, after)]
        for old, new in parts:
            same = [np.array_equal(a, leaves(new)[k]) for k, a in leaves(old).items()]
            assert all(same) if step == 2 else not all(same)
        same = [np.array_equal(a, b) for a, b in zip(*slots, strict=True)]
        assert all(same) if step == 2 else not all(same)


def test_nan_batches_are_counted_and_bearable(monkeypatch, tmp_path):
    said = []
    config = with_scaled(monkeypatch, float("nan"), 4, 6, "train.log_every=4")
    state = train(config, tmp_path, say=said.append)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))
    lines = runs.metrics(tmp_path)
    assert [(line["step"], line["bad"]) for line in lines] == [(4, 1), (8, 2), (12, 0)]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert "step 8: 2 updates with a non-finite loss or gradient dropped" in said
    assert "step 4: not saved, as the last update was dropped" in said


def test_many_nan_batches_stop_the_run_and_the_last_good_checkpoint_stays(monkeypatch, tmp_path):
    config = with_scaled(
        monkeypatch, float("inf"), 3, 99, "train.log_every=10", "train.max_bad_steps=6",
        "train.keep_checkpoints=1",
    )  # fmt: skip
    message = r"stopped at step 8: 6 updates in a row .* step 2 is the newest checkpoint"
    for _ in range(2):  # the same command stops there again, and overwrites nothing
        with pytest.raises(StopRun, match=message) as stopped:
            train(config, tmp_path, say=quiet)
        assert stopped.value.status == 1
        assert Checkpoints(tmp_path).newest_whole() == 2


@pytest.mark.slow
def test_a_spike_is_clipped_and_told(monkeypatch, tmp_path):
    said = []
    config = with_scaled(monkeypatch, 1e4, 9, 9, "train.log_every=12", "optim.clip_norm=2.0")
    state = train(config, tmp_path, say=said.append)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))
    (line,) = runs.metrics(tmp_path)
    assert line["grad_norm_max"] > 100 and line["clipped"] >= 1 and line["bad"] == 0
    assert any("a gradient of norm" in x and "clipped to 2" in x for x in said)


@pytest.mark.slow
def test_a_spike_is_dropped_if_asked_for(monkeypatch, tmp_path):
    said, more = [], ("train.num_steps=64", "train.log_every=64", "train.skip_spike=20.0")
    config = with_scaled(monkeypatch, 1e4, 60, 60, *more, "train.checkpoint_every=60")
    train(config, tmp_path, say=said.append)
    (line,) = runs.metrics(tmp_path)
    assert line["spike"] == 1 and line["bad"] == 0
    assert "step 64: 1 updates with a spike of the gradient dropped" in said
    # The mean is part of the state; where it is not saved yet, it begins when it is asked for.
    assert "norms" in Checkpoints(tmp_path).saved_shapes(64)


# ---- rows 10 and 11 ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.bach_size=4", "'train.bach_size'; the nearest is 'train.batch_size'"),
        ("optim.learning_rate=-1.0", "'optim.learning_rate' is -1.0; it must be positive"),
        ("train.skip_spike=0.5", "'train.skip_spike' is 0.5; it must be 0 (off) or above 1"),
        ("train.num_steps=many", "'train.num_steps' is 'many'; it must be a int"),
    ],
)
def test_bad_config_words_are_refused_before_anything_is_made(tmp_path, capsys, word, message):
    words = ["train", "--config", str(runs.ROOT / runs.CONFIG), "--workdir", str(tmp_path / "run")]
    assert cli.main([*words, f"--config.{word}"]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_changed_config_is_shown_field_by_field_and_needs_a_flag(tmp_path, monkeypatch, capsys):
    train(runs.toy("train.num_steps=2"), tmp_path, say=quiet)
    changes = ["optim.learning_rate=0.5", "optim.b1=0.5", "train.cond_drop_rate=0.2"]
    changed = runs.toy("train.num_steps=3", "train.log_every=2", *changes)
    with pytest.raises(UserError) as refused:
        train(changed, tmp_path, say=quiet)
    told = str(refused.value)
    for part in (
        "optim.b1: 0.9 -> 0.5", "optim.learning_rate: 0.002 -> 0.5",
        "train.cond_drop_rate: 0.1 -> 0.2", "--allow-config-change",
    ):  # fmt: skip
        assert part in told
    assert "log_every" not in told and "\n" not in told
    words = ["train", "--config", str(runs.ROOT / runs.CONFIG), "--workdir", str(tmp_path)]
    words += ["--config.train.num_steps=3", *(f"--config.{c}" for c in changes)]
    assert cli.main(words) == 2
    assert cli.main([*words, "--allow-config-change"]) == 0
    said = capsys.readouterr().out
    assert "config changed: optim.b1: 0.9 -> 0.5" in said and "going on from step 2" in said
    assert Checkpoints(tmp_path).newest_whole() == 3


# ---- row 12 --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hung_loader_ends_with_stacks(tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "run.log"
    config = tmp_path / "hanging.py"
    config.write_text(
        "from tests.faults import toy\n"
        "def get_config():\n"
        "    c = toy.get_config()\n"
        "    with c.unlocked():\n"
        "        c.data.source = dict(name='hanging', seed=0, num_examples=1000, reads=200)\n"
        "    return c\n"
    )
    process = runs.start(
        workdir, "train.watchdog_seconds=4.0", "train.num_steps=99", config=config,
        environment=ONE_DEVICE,
    )  # fmt: skip
    assert process.wait(runs.PATIENCE) == HUNG
    text = log.read_text()
    assert f"no step finished in 4 seconds; stacks: {workdir / 'stacks_0.txt'}" in text
    for stacks in (text, (workdir / "stacks_0.txt").read_text()):
        assert "tests/faults/child.py" in stacks and "in __getitem__" in stacks
        assert "training_loop.py" in stacks


# ---- row 14: no network --------------------------------------------------------------------------


@pytest.mark.slow
def test_training_needs_no_network(tmp_path):
    alone = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a process without network needs the right to unshare")
    process = runs.start(
        tmp_path / "run", "train.num_steps=2", wrapper=alone, environment=ONE_DEVICE
    )
    assert process.wait(runs.PATIENCE) == 0, (tmp_path / "run.log").read_text()
    assert Checkpoints(tmp_path / "run").newest_whole() == 2


# ---- several processes ---------------------------------------------------------------------------


def start_two(workdir, *overrides):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        runs.start(workdir, *overrides, place=[f"{i}/2:{port}"], environment=ONE_DEVICE)
        for i in range(2)
    ]


@pytest.mark.long
def test_two_processes_stop_at_the_same_step_and_a_frozen_one_ends_the_other(tmp_path):
    workdir = tmp_path / "run"
    rare = ("train.num_steps=100000", "train.checkpoint_every=100000")
    both = start_two(workdir, *rare)
    try:
        runs.wait_for(lambda: runs.steps_logged(workdir) >= 3, both[1], f"{workdir}1.log")
        both[1].send_signal(signal.SIGTERM)  # the cluster takes one machine away
        assert [process.wait(runs.PATIENCE) for process in both] == [PREEMPTED] * 2
        (step,) = Checkpoints(workdir).steps()
        assert Checkpoints(workdir).newest_whole() == step
        # Again, with saves in between; then one process is frozen.
        both = start_two(
            workdir, "train.num_steps=100000", "train.checkpoint_every=2",
            "train.watchdog_seconds=5.0", "train.watchdog_patience=60.0",
        )  # fmt: skip
        runs.wait_for(
            lambda: Checkpoints(workdir).steps()[-1] >= step + 4, both[0], f"{workdir}0.log"
        )
        both[1].send_signal(signal.SIGSTOP)
        assert both[0].wait(runs.PATIENCE) == HUNG
        assert "training_loop.py" in (workdir / "stacks_0.txt").read_text()
    finally:
        for process in both:
            runs.kill(process)
    assert Checkpoints(workdir).newest_whole() >= step + 2
