"""`kaleido annotate` killed at random moments: what it leaves is whole, and a rerun ends alike."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("apache_beam", reason="the pipeline needs Beam: install the extra 'annotate'")
pytest.importorskip("pyarrow", reason="sidecars are Parquet files: install the extra 'annotate'")

from kaleido_jax import sidecars
from kaleido_jax.annotate import pipeline
from tests.test_annotate_pipeline import ORACLE, files, shards

STAGES = ("text", "bbox", "blob", "voken")
SHARDS = 25
PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")


def start(data: pathlib.Path, out: pathlib.Path, *flags: str) -> subprocess.Popen:
    words = ["annotate", "--data", str(data), "--out", str(out), "--stages", ",".join(STAGES)]
    return subprocess.Popen(
        [sys.executable, "-m", "kaleido_jax.cli", *words, "--", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def done_files(out: pathlib.Path) -> list[pathlib.Path]:
    return list(out.glob("*/*.done.json"))


def kill_at(process: subprocess.Popen, out: pathlib.Path, number: int, delay: float) -> bool:
    """Kills a run and its workers a moment after `number` sidecars are done; False if it ended."""
    limit = time.monotonic() + 120
    while len(done_files(out)) < number:
        if process.poll() is not None:
            return False
        assert time.monotonic() < limit, "the run does not get on"
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def assert_whole(out: pathlib.Path) -> None:
    """Every sidecar that says it is done is whole."""
    for path in done_files(out):
        done = json.loads(path.read_text("utf-8"))
        found = sidecars.read_done(out, done["stage"], done["shard"], done["config_hash"])
        assert found == done


def kill_and_compare(folder: pathlib.Path, kills: int, seed: int, flags: tuple[str, ...]) -> None:
    moments = random.Random(seed)
    shards(folder / "data", SHARDS, 4)
    engines = {stage: ORACLE[stage] for stage in STAGES}
    settings = {"data": str(folder / "data"), "engines": engines}
    pipeline.run(pipeline.Run(out=str(folder / "whole"), **settings))
    want = files(folder / "whole")
    out = folder / "killed"
    killed = 0
    for part in range(kills):
        # Later and later, so that every stage is met; never so late that nothing is left to do.
        span = SHARDS * len(STAGES) / (kills + 1)
        number = 1 + int(span * part + moments.uniform(0, span))
        killed += kill_at(
            start(folder / "data", out, *flags), out, number, moments.uniform(0, 0.02)
        )
        assert_whole(out)
        assert not (out / "manifest.json").exists()
    assert killed == kills
    left = set(done_files(out))
    assert 0 < len(left) < SHARDS * len(STAGES)
    times = {path: path.stat().st_mtime_ns for path in left}
    pipeline.run(pipeline.Run(out=str(out), **settings))
    assert files(out) == want
    assert {path: path.stat().st_mtime_ns for path in left} == times


def test_killed_and_run_again_gives_the_same_bytes(tmp_path):
    kill_and_compare(tmp_path, 2, seed=1, flags=())


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "flags"), [(5, ()), (2, PROCESSES)], ids=["one", "two"])
def test_killed_often_and_run_again_gives_the_same_bytes(tmp_path, kills, flags):
    kill_and_compare(tmp_path, kills, seed=2, flags=flags)


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path):
    shards(tmp_path / "data", 1, 2)
    folder = tmp_path / "out" / "bbox"
    folder.mkdir(parents=True)
    for name in (".00000.0.parquet.77.tmp", ".00000.0.progress.tmp"):
        (folder / name).write_bytes(b"half")
    settings = pipeline.Run(
        data=str(tmp_path / "data"), out=str(tmp_path / "out"), engines={"bbox": "oracle"}
    )
    pipeline.run(settings)
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_damaged_sidecar_is_written_again(tmp_path):
    shards(tmp_path / "data", 2, 3)
    settings = pipeline.Run(
        data=str(tmp_path / "data"), out=str(tmp_path / "out"), engines={"bbox": "oracle"}
    )
    pipeline.run(settings)
    want = files(tmp_path / "out")
    path = next((tmp_path / "out" / "bbox").glob("00001.*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    pipeline.run(settings)
    assert files(tmp_path / "out") == want


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    shards(tmp_path / "data", 1, 2)
    (tmp_path / "out").write_text("a file", "utf-8")
    settings = pipeline.Run(
        data=str(tmp_path / "data"), out=str(tmp_path / "out"), engines={"bbox": "oracle"}
    )
    with pytest.raises(pipeline.UserError, match="out cannot be written"):
        pipeline.run(settings)
