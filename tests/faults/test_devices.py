"""Fault 9: going on with other devices, on another mesh, in another number of processes.

Parameters are the same to the bit; losses agree within 1e-4 (sums are taken in another order); no
example is skipped or repeated.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from kaleido_jax import bundle, checkpoint, train
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TOLERANCE = 1e-4


def toy(*mesh):
    names = ("data", "fsdp", "tensor")
    sizes = [f"mesh.{name}={size}" for name, size in zip(names, mesh, strict=True)]
    return tiny_config("optim.decay=constant", *sizes, name="toy")


def some_steps(trainer, state, first, last):
    """(state, losses, hashes of the examples' keys) of steps first..last - 1."""
    cfg = trainer.config
    loader = train.make_loader(cfg, bundle.make_vocabulary(cfg), trainer.rows)
    losses, keys = [], []
    for step in range(first, last):
        batch = trainer.put(loader.batch(step))
        keys.append(np.asarray(batch.key_hash))
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses, np.stack(keys)


MESHES = {(1, 4, 1): 4, (1, 1, 1): 1, (2, 2, 2): 8}


@pytest.mark.parametrize(
    "trained", [[], pytest.param([(1, 1, 1), (1, 4, 1), (2, 2, 2)], marks=pytest.mark.slow)]
)
def test_any_mesh_goes_on_from_what_any_other_saved(tmp_path, trained):
    """8 devices -> 4 -> 1, and another mesh of 8."""
    trainer = train.Trainer(toy(2, 4, 1))
    state, _, before = some_steps(trainer, trainer.init(), 0, 2)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(2, state.as_dict(), {})
    checkpoints.wait()
    saved = jax.device_get(state.as_dict())
    _, losses, keys = some_steps(trainer, state, 2, 4)
    assert len(np.unique(np.concatenate([before, keys]))) == 32  # none twice
    for mesh, count in MESHES.items():
        other = train.Trainer(toy(*mesh), devices=jax.devices()[:count])
        restored = checkpoints.restore(2, other.abstract_state().as_dict())
        jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(restored))
        for leaf in jax.tree.leaves(restored):
            assert leaf.sharding.device_set == set(jax.devices()[:count])
        if mesh in trained:
            _, now, same = some_steps(other, train.TrainState(**restored), 2, 4)
            np.testing.assert_array_equal(same, keys)
            np.testing.assert_allclose(now, losses, rtol=TOLERANCE)
    checkpoints.close()


def local(workdir, processes, devices, *words):
    """`launch/local.sh` of the toy, in a group of processes that can be killed at once."""
    kaleido = workdir.parent / "kaleido"
    kaleido.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.faults.child "$@"\n')
    kaleido.chmod(0o755)
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environ = os.environ | {
        "KALEIDO": str(kaleido),
        "PROCESSES": str(processes),
        "DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick,
        "PYTHONPATH": str(ROOT),
    }
    command = [str(ROOT / "launch" / "local.sh"), "--config", "tests/faults/toy.py", *words]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir)], cwd=ROOT, env=environ, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(process):
    told, _ = process.communicate(timeout=900)
    assert process.returncode == 0, told[-3000:]
    return told


def metrics(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def same_losses(workdir, wanted):
    found = metrics(workdir)
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    worst = max(
        abs(line[name] / other[name] - 1)
        for line, other in zip(found, wanted, strict=True)
        for name in other
        if name.startswith("loss")
    )
    print(f"{workdir.name}: largest relative difference of a loss {worst:.1e}")
    assert worst < TOLERANCE


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_processes_give_the_losses_of_one_and_go_on_in_another_number(tmp_path):
    """2 processes x 4 devices; killed, then 4 processes x 2 devices; against one device."""
    steps = ["--config.train.num_steps=20", "--config.train.checkpoint_every=5"]
    finished(local(tmp_path / "one", 1, 1, *steps))
    wanted = metrics(tmp_path / "one")
    assert len(wanted) == 20
    two = [*steps, "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    told = finished(local(tmp_path / "two", 2, 4, *two))
    assert "2 processes (KALEIDO_*), 4 devices in this one, 8 in all" in told
    same_losses(tmp_path / "two", wanted)

    workdir = tmp_path / "killed"
    process = local(workdir, 2, 4, *two)
    while process.poll() is None and len(metrics(workdir)) < 8:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0][-3000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert 8 <= len(metrics(workdir)) < 20
    told = finished(local(workdir, 4, 2, *steps, "--config.mesh.fsdp=8", "--config.mesh.data=1"))
    assert "4 processes (KALEIDO_*), 2 devices in this one, 8 in all" in told
    assert "going on from step 5 " in told
    same_losses(workdir, wanted)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_processes_begin_alike_with_a_decoder_that_gets_vokens(tmp_path):
    """A table of tokens that grows, divided over 2 processes x 2 devices, against one device."""
    tied = "--config.model.latent_decoder.logits_via_embedding=True"
    finished(local(tmp_path / "before", 1, 1, "--config.train.num_steps=2", tied))
    grown = [
        tied,
        "--config.train.num_steps=6",
        f"--config.init_from={tmp_path / 'before'}",
        "--config.vocabulary.num_vokens=100",
        "--config.model.latent_decoder.vocab_size=1664",
    ]
    told = finished(local(tmp_path / "one", 1, 1, *grown))
    assert "tokens after the first 1536 start anew" in told
    wanted = metrics(tmp_path / "one")
    assert len(wanted) == 6
    finished(local(tmp_path / "two", 2, 2, *grown, "--config.mesh.data=1", "--config.mesh.fsdp=4"))
    same_losses(tmp_path / "two", wanted)
