"""Checkpoints and exports: whole or not at all."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import bundle, checkpoint
from kaleido_jax import config as config_lib
from kaleido_jax.checkpoint import Checkpoints
from kaleido_jax.errors import UserError
from tests.tiny import tiny_config

TINY = config_lib.to_json(tiny_config())

STATE = {
    "ema": {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}},
    "frozen": {"c": np.ones(3, np.float32)},
    "step": np.int32(7),
}


def save(folder, *steps, keep=3):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, jax.tree.map(jnp.asarray, STATE), {"step": step})
    checkpoints.wait()
    return checkpoints


def test_what_is_saved_is_restored(tmp_path):
    checkpoints = save(tmp_path, 7)
    shapes = checkpoints.saved_shapes(7)
    restored = checkpoints.restore(7, shapes)
    np.testing.assert_array_equal(restored["ema"]["a"]["b"], STATE["ema"]["a"]["b"])
    part = checkpoints.restore(7, {"frozen": shapes["frozen"]})
    assert list(part) == ["frozen"] and checkpoints.meta(7) == {"step": 7}


def test_only_the_newest_are_kept(tmp_path):
    assert save(tmp_path, 1, 2, 3, 4, keep=2).steps() == [3, 4]


def _size(path):
    return path.stat().st_size


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no manifest", "extra"])
def test_a_damaged_step_is_passed_over_and_told(tmp_path, damage):
    checkpoints = save(tmp_path, 1, 2)
    folder = checkpoints.step_folder(2)
    victim = max((p for p in (folder / "state").rglob("*") if p.is_file()), key=_size)
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "delete":
        victim.unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "state" / "stray").write_text("x")
    said = []
    assert checkpoints.newest_whole(said.append) == 1
    assert "step_00000002" in said[0]


def test_a_template_that_does_not_fit_is_one_line(tmp_path):
    checkpoints = save(tmp_path, 1)
    with pytest.raises(UserError, match="does not fit"):
        checkpoints.restore(1, {"ema": {"z": jax.ShapeDtypeStruct((1,), np.float32)}})


def test_json_is_never_half_written(tmp_path):
    path = tmp_path / "a.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def a_bundle():
    cfg = tiny_config()
    params = {"denoiser": {"w": np.full((2, 2), 1.5, np.float32)}}
    return bundle.Bundle(cfg, params, bundle.make_vocabulary(cfg), "0123")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_opens_as_it_was(tmp_path, a_bundle, dtype):
    bundle.save(tmp_path / "out", a_bundle, dtype)
    again = bundle.load(tmp_path / "out")
    assert again.config.to_dict() == a_bundle.config.to_dict()
    assert again.vocabulary.fingerprint == a_bundle.vocabulary.fingerprint
    weights = again.params["denoiser"]["w"]
    assert weights.dtype == np.dtype({"float16": "float32"}.get(dtype, dtype))
    np.testing.assert_array_equal(weights, a_bundle.params["denoiser"]["w"])
    with pytest.raises(UserError, match="already exists"):
        bundle.save(tmp_path / "out", a_bundle)


def test_a_damaged_export_is_refused(tmp_path, a_bundle):
    folder = bundle.save(tmp_path / "out", a_bundle)
    path = folder / bundle.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is damaged: model\.safetensors"):
        bundle.load(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "does not exist"),
        (lambda d: d.mkdir(), "no config.json"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("{")), "not JSON"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text("{}")), "is missing"),
        (lambda d: (d.mkdir(), (d / "config.json").write_text(TINY)), "no tokenizer.model"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        bundle.load(tmp_path / "x")


def test_a_workdir_without_a_whole_step_is_refused(tmp_path):
    cfg = tiny_config()
    bundle.start_workdir(tmp_path, cfg, bundle.make_vocabulary(cfg))
    with pytest.raises(UserError, match="no whole checkpoint"):
        bundle.load(tmp_path)
