"""Checkpoints under fire: killed saves, full disks, damage. Rows 1, 3, 4 and 14."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaleido_jax import cli
from kaleido_jax.checkpoint import Checkpoints
from kaleido_jax.errors import StopRun, UserError
from kaleido_jax.training_loop import train
from tests.faults import runs


@pytest.fixture(autouse=True)
def _no_tensorboard(monkeypatch):
    """Its import takes seconds."""
    monkeypatch.setitem(sys.modules, "clu", None)


def quiet(line: str) -> None:
    del line


# ---- row 1: kill -9 in an asynchronous save ------------------------------------------------------


def kill_in_saves(workdir, kills: int) -> tuple[int, int]:
    """Kills a run again and again at random moments of its saves.

    Returns:
      How many kills left an unfinished save behind, and the newest whole step in the end.
    """
    moments, hits = random.Random(7), 0
    checkpoints = Checkpoints(workdir)

    def saving(seen: Collection[str] = ()) -> str | None:
        names = [path.name for path in checkpoints.folder.glob("step_*.saving")]
        return next((name for name in names if name not in seen), None)

    for _ in range(kills):
        before = checkpoints.steps()[-1:]
        process = runs.start(workdir, "train.num_steps=100000")
        seen = {saving()}  # what an earlier kill left
        for _ in range(moments.choice((2, 3))):  # one save at least comes to its end
            seen.add(runs.wait_for(partial(saving, seen), process, f"{workdir}.log"))
        time.sleep(moments.uniform(0, 0.3))
        runs.kill(process)
        hits += saving() is not None
        assert checkpoints.steps()[-1:] > before, "no progress"
    newest = checkpoints.newest_whole()
    assert newest == checkpoints.steps()[-1], "a kill left a step that is called whole and is not"
    return hits, newest


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)]
)
def test_killed_in_saves_and_gone_on_with_to_the_bit(tmp_path, kills):
    workdir, said = tmp_path / "killed", []
    hits, newest = kill_in_saves(workdir, kills)
    assert hits >= max(1, kills // 4), "the kills missed the saves"
    end = f"train.num_steps={newest + 3}"
    left = any(workdir.glob("checkpoints/*.saving"))
    killed = train(runs.toy(end), workdir, say=said.append)
    assert f"going on from step {newest} of {workdir}" in said
    assert left == any("left behind by a run that was killed" in line for line in said)
    assert not [p.name for p in (workdir / "checkpoints").iterdir() if "." in p.name]
    whole = train(runs.toy(end), tmp_path / "whole", say=quiet)
    runs.assert_same_state(killed, whole)
    assert runs.metrics(workdir) == runs.metrics(tmp_path / "whole")


def test_a_save_keeps_what_training_overwrites_meanwhile(tmp_path):
    """The step reuses the state's memory: the save must not see the next steps' numbers."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"a": jnp.zeros((512, 512)), "b": jnp.zeros((3,)), "ema": {"c": jnp.zeros(1 << 20)}}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for number in range(3):
            checkpoints.save(number, state, {})
            for _ in range(10):
                state = step(state)
        checkpoints.wait()
        for number in range(3):
            saved = checkpoints.restore(number, checkpoints.saved_shapes(number))
            for leaf in jax.tree.leaves(saved):
                np.testing.assert_array_equal(leaf, np.float32(10 * number))


# ---- row 3: no space left ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB: orbax needs room for twice a state while it writes one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(small_disk, capfd):
    workdir = small_disk / "run"
    train(runs.toy("train.num_steps=2"), workdir, say=quiet)
    before = Checkpoints(workdir).step_folder(2)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "others").write_bytes(bytes(free - 300_000))  # a save takes more
    words = ["train", "--config", str(runs.ROOT / runs.CONFIG), "--workdir", str(workdir)]
    capfd.readouterr()
    assert cli.main([*words, "--config.train.num_steps=8"]) == 1
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "cannot save the checkpoint of step 4" in lines[0]
    assert "No space left on device" in lines[0] and "step 2 stays the newest" in lines[0]
    assert Checkpoints(workdir).newest_whole() == 2
    assert [path.name for path in before.parent.iterdir()] == [before.name]
    # With room again it goes on.
    (small_disk / "others").unlink()
    said = []
    train(runs.toy("train.num_steps=4"), workdir, say=said.append)
    assert f"going on from step 2 of {workdir}" in said


@pytest.mark.slow
def test_files_that_may_not_grow_are_told_too(tmp_path):
    """Without the right to mount: a limit on the size of files, in a process of its own."""
    workdir = tmp_path / "run"
    limit = ["bash", "-c", 'ulimit -f 300; exec "$@"', "bash"]  # KiB: the vocabulary takes 241
    process = runs.start(
        workdir, "train.num_steps=8", "model.denoiser.width=256", wrapper=limit,
        environment={"JAX_COMPILATION_CACHE_DIR": ""},
    )  # fmt: skip
    assert process.wait(runs.PATIENCE) == 1
    text = (tmp_path / "run.log").read_text()
    assert "cannot save the checkpoint of step 2" in text and "File too large" in text
    assert "Traceback" not in text
    assert not list(workdir.glob("checkpoints/*"))


# ---- row 4: damage -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with whole checkpoints of steps 2 and 4, its last state."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "clu", None)
        return workdir, train(runs.toy(), workdir, say=quiet)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(folder):
    path = largest(folder / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


def truncate(folder):
    path = largest(folder / "state")
    os.truncate(path, path.stat().st_size // 2)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {"flipped": flip, "truncated": truncate, "emptied": empty}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_the_newest_step_is_found_and_told(trained, tmp_path, damage):
    shutil.copytree(trained[0], tmp_path / "run")
    checkpoints, said = Checkpoints(tmp_path / "run"), []
    DAMAGES[damage](checkpoints.step_folder(4))
    assert cli.main(["doctor", "--workdir", str(tmp_path / "run")]) == 1
    if damage == "flipped":  # through the whole of training: the same end as without damage
        state = train(runs.toy(), tmp_path / "run", say=said.append)
        runs.assert_same_state(state, trained[1])
        assert runs.metrics(tmp_path / "run") == runs.metrics(trained[0])
        assert f"going on from step 2 of {tmp_path / 'run'}" in said
    else:
        assert checkpoints.recover(said.append) == 2
    assert "checkpoint of step 4 is damaged" in said[0] and "set aside" in said[0]
    assert (checkpoints.folder / "step_00000004.damaged").is_dir()


def test_without_a_whole_step_nothing_starts_from_zero_by_itself(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    checkpoints, said = Checkpoints(workdir), []
    flip(checkpoints.step_folder(2))
    truncate(checkpoints.step_folder(4))
    assert cli.main(["doctor", "--workdir", str(workdir)]) == 1
    told = capsys.readouterr().out
    assert "step 2: DAMAGED" in told and "step 4: DAMAGED" in told and "--start-anew" in told
    for _ in range(2):  # asking twice does not help
        with pytest.raises(UserError, match=r"(?s)none|no checkpoint in .* is whole .*start-anew"):
            train(runs.toy(), workdir, say=quiet)
    assert checkpoints.steps() == [2, 4]
    state = train(runs.toy(), workdir, say=said.append, start_anew=True)
    assert sum("set aside" in line for line in said) == 2
    runs.assert_same_state(state, trained[1])
    assert cli.main(["doctor", "--workdir", str(workdir)]) == 0


def test_leftovers_and_damage_do_not_push_whole_steps_out(trained, tmp_path):
    """A damaged newer step must not count among those that are kept."""
    shutil.copytree(trained[0], tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    empty(checkpoints.step_folder(4))
    (checkpoints.folder / "step_00000006.saving").mkdir()
    assert checkpoints.recover(quiet) == 2
    with contextlib.closing(checkpoints):
        checkpoints.save(3, {"a": jnp.ones(3)}, {})
        checkpoints.wait()
    assert checkpoints.newest_whole() == 3 and checkpoints.steps() == [3]


def test_a_failed_save_is_told_by_the_next_one(tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(StopRun, match="cannot save the checkpoint of step 1"):
        Checkpoints(tmp_path).save(1, {"a": jnp.ones(3)}, {})


@pytest.mark.parametrize("where", ["under a file", "immutable"])
def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path, capsys, where):
    """Row 14. Root may write whatever the permissions say: so a path and an attribute forbid it."""
    folder = tmp_path / "folder"
    if where == "under a file":
        folder.write_text("")
    else:
        folder.mkdir()
        if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode:
            pytest.skip("no attributes of files here, or no right to set them")
    words = ["train", "--config", str(runs.ROOT / runs.CONFIG), "--workdir", str(folder / "run")]
    try:
        assert cli.main(words) == 2
    finally:
        if where == "immutable":
            subprocess.run(["chattr", "-i", folder], check=True)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"{folder / 'run'} cannot be written: " in line
