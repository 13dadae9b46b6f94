"""The loop: going on to the bit, one line a step, and what is refused when a run goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
import types

import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import checkpoint, runlog, training_loop
from kaleido_jax.data import ToySource
from kaleido_jax.errors import StopRun, UserError
from kaleido_jax.training_loop import train
from tests.test_train import leaves, quick_config


def test_going_on_is_equal_to_the_bit_and_keeps_one_line_a_step(tmp_path):
    cfg = quick_config()
    whole = train(cfg, tmp_path / "whole", say=lambda _: None)
    train(quick_config("train.num_steps=2"), tmp_path / "parts", say=lambda _: None)
    said = []
    parts = train(cfg, tmp_path / "parts", say=said.append)
    assert any("going on from step 2" in line for line in said)
    for name, value in leaves(whole.params).items():
        np.testing.assert_array_equal(value, leaves(parts.params)[name])
    lines = {
        run: [json.loads(x) for x in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    }
    assert [x["step"] for x in lines["parts"]] == [1, 2, 3, 4]
    for a, b in zip(lines["whole"], lines["parts"], strict=True):
        a.pop("images_per_second"), b.pop("images_per_second")
        assert a == b


def test_a_killed_run_goes_on_from_the_last_whole_step(tmp_path):
    cfg = quick_config("train.num_steps=3")

    class Killed(Exception):
        pass

    def kill_at_three(line):
        if line.startswith("step 3"):
            raise Killed

    with pytest.raises(Killed) as killed:
        train(cfg, tmp_path / "run", say=kill_at_three)
    # Nor do threads go on reading, even while the error and with it the loop's frame lives.
    assert killed.value.__traceback__ is not None
    assert not [t for t in threading.enumerate() if t.name.startswith("kaleido-loader")]
    again = train(cfg, tmp_path / "run", say=lambda _: None)
    straight = train(cfg, tmp_path / "straight", say=lambda _: None)
    for name, value in leaves(straight.params).items():
        np.testing.assert_array_equal(value, leaves(again.params)[name])
    steps = [json.loads(x)["step"] for x in (tmp_path / "run/metrics.jsonl").open()]
    assert steps == [1, 2, 3]


def test_a_changed_config_and_changed_data_are_refused_and_the_difference_shown(
    tmp_path, monkeypatch
):
    train(quick_config("train.num_steps=1"), tmp_path, say=lambda _: None)
    changed = quick_config("train.num_steps=1", "optim.learning_rate=0.5")
    with pytest.raises(UserError, match=r"optim\.learning_rate: 0\.002 -> 0\.5"):
        train(changed, tmp_path, say=lambda _: None)
    saved = checkpoint.Checkpoints(tmp_path).meta(1)["loader_position"]
    assert saved["step"] == 1
    assert len(json.dumps(saved)) < 1000
    # The same config, but the data under it have become others.
    monkeypatch.setattr(ToySource, "__len__", lambda source: 999)
    with pytest.raises(UserError, match=r"examples was .* now it is 999; use a new workdir"):
        train(quick_config("train.num_steps=2"), tmp_path, say=lambda _: None)


def quiet(line):
    del line


class Killed(Exception):
    pass


def killed_after(monkeypatch, step, cfg, workdir):
    """Trains until after `step`, which is not saved."""

    def reached(signals, done):
        if done == step:
            raise Killed
        return False

    with monkeypatch.context() as patch:
        patch.setattr(training_loop.Signals, "reached", reached)
        with pytest.raises(Killed):
            train(cfg, workdir, say=quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.batch_size=16", "batch_size was 8, now it is 16"),
        ("model.denoiser.width=64", "does not fit this config"),
    ],
)
def test_a_config_that_cannot_go_on_leaves_the_workdir_its_own(tmp_path, change, message):
    train(quick_config("train.num_steps=1"), tmp_path, say=quiet)
    before = (tmp_path / "config.json").read_bytes()
    changed = quick_config("train.num_steps=2", change)
    with pytest.raises(UserError, match=message):
        train(changed, tmp_path, say=quiet, allow_config_change=True)
    assert (tmp_path / "config.json").read_bytes() == before


def test_another_tokenizer_at_the_same_path_is_a_changed_config(tmp_path):
    train(quick_config("train.num_steps=1"), tmp_path, say=quiet)
    own = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(own + b"other")  # as if the package's were new
    said, cfg = [], quick_config("train.num_steps=1")
    with pytest.raises(UserError, match=r"tokenizer\.model: 'its own' -> \"the package's\""):
        train(cfg, tmp_path, say=quiet)
    assert (tmp_path / "tokenizer.model").read_bytes() == own + b"other"
    train(cfg, tmp_path, say=said.append, allow_config_change=True)
    assert any("config changed: tokenizer.model" in line for line in said)
    assert (tmp_path / "tokenizer.model").read_bytes() == own


def test_a_line_of_steps_before_and_after_spikes_were_looked_for(tmp_path, monkeypatch):
    more = ("train.num_steps=4", "train.log_every=4", "train.checkpoint_every=2")
    killed_after(monkeypatch, 3, quick_config(*more, "train.skip_spike=20.0"), tmp_path)
    train(quick_config(*more), tmp_path, say=quiet, allow_config_change=True)
    (line,) = [json.loads(x) for x in (tmp_path / "metrics.jsonl").open()]
    assert line["step"] == 4 and line["bad"] == 0 and "spike" not in line


def no_space(path, value):
    del value
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_failed_save_is_told_before_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_json", no_space)
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(3)}, {})
        with contextlib.suppress(OSError):
            checkpoints._pending.result()
        with pytest.raises(StopRun, match=r"step 1 .* No space left on device"):
            checkpoints.tell()
        checkpoints.tell()  # once


def stub_run(**parts):
    names = training_loop._Run.__dataclass_fields__
    return training_loop._Run(**{name: parts.get(name) for name in names})


def test_all_processes_fail_where_one_could_not_save(monkeypatch):
    run = stub_run(checkpoints=types.SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(training_loop.jax, "process_count", lambda: 2)
    for flags in ([0, 0], [1, 0]):
        monkeypatch.setattr(
            training_loop.multihost_utils, "process_allgather", lambda own, f=flags: np.array(f)
        )
        if any(flags):
            with pytest.raises(StopRun, match="another process could not save") as stopped:
                run._settle()
            assert stopped.value.status == 1
        else:
            run._settle()


def test_each_step_before_a_line_has_the_watchdogs_time_to_itself():
    waited, beats, asked = [], [], []

    class Loss:
        def block_until_ready(self):
            waited.append(self)

    def write(done):
        assert len(waited) == len(beats) == done  # nothing is left to wait for

    run = stub_run(
        trainer=types.SimpleNamespace(
            config=quick_config("train.num_steps=8", "train.log_every=4", "train.sample_every=0"),
            put=lambda batch: batch,
            step=lambda state, batch: (state, {"loss": Loss()}),
        ),
        batches=iter(range(8)),
        log=types.SimpleNamespace(add=lambda metrics: None, write=write),
        watchdog=types.SimpleNamespace(beat=lambda: beats.append(1)),
        checkpoints=types.SimpleNamespace(tell=lambda: asked.append(1)),
        signals=types.SimpleNamespace(reached=lambda step: False),
    )
    run._stop_if_bad = run._save = run._settle = lambda *args, **words: None
    run._beside = contextlib.nullcontext
    run.steps(None, 0)
    assert len(beats) == len(asked) == 8  # nor is a failed save found later than a step


def test_a_sample_grid_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "tensorboard_writer", lambda workdir, say: None)

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with runlog.RunLog(tmp_path, 0, quick_config(), quiet) as log:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "fsync", fail)
            with pytest.raises(OSError, match="No space"):
                log.image(1, np.zeros((4, 4, 3), np.uint8))
        assert list((tmp_path / "samples").iterdir()) == []
        log.image(1, np.zeros((4, 4, 3), np.uint8))
        assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_00000001.png"]


def test_both_losses_fall(tmp_path):
    cfg = quick_config("train.num_steps=60", "train.log_every=20", "train.checkpoint_every=60")
    train(cfg, tmp_path, say=lambda _: None)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss_dm"] < 0.8 * lines[0]["loss_dm"]
    assert lines[-1]["loss_ar"] < 0.8 * lines[0]["loss_ar"]
