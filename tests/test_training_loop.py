"""The loop: going on to the bit, one line a step, and what is refused when a run goes on."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from kaleido_jax import checkpoint
from kaleido_jax.data import ToySource
from kaleido_jax.errors import UserError
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


def test_both_losses_fall(tmp_path):
    cfg = quick_config("train.num_steps=60", "train.log_every=20", "train.checkpoint_every=60")
    train(cfg, tmp_path, say=lambda _: None)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss_dm"] < 0.8 * lines[0]["loss_dm"]
    assert lines[-1]["loss_ar"] < 0.8 * lines[0]["loss_ar"]
