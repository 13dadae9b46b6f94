"""launch/annotate.sh: the flags of each runner, a run through a job server and a worker pool."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "launch" / "annotate.sh"
NEEDS = {
    "dataflow": {"PROJECT": "p", "REGION": "r", "BUCKET": "gs://b", "IMAGE": "host/image:1"},
    "flink": {"FLINK": "head:8081", "WORKERS": "8"},
    "spark": {"JOBS": "head:8099", "POOL": "localhost:7"},
}


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(SCRIPT), *words],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def flags(runner: str, tmp_path: pathlib.Path, **environment: str) -> list[str]:
    """Beam's words as the script hands them to `kaleido annotate`."""
    fake = tmp_path / "kaleido"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n', "utf-8")
    fake.chmod(0o755)
    settings = {**NEEDS[runner], "KALEIDO": str(fake), **environment}
    result = launch(runner, "--data", "a b", "--out", "o", "--", "--job_name=n", **settings)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    assert words[:6] == ["annotate", "--data", "a b", "--out", "o", "--"]
    assert words[-1] == "--job_name=n"
    return words[6:]


def test_without_words_it_says_how():
    for result in (launch(), launch("flink"), launch("sparkle", "--data")):
        assert result.returncode == 2
        assert "launch/annotate.sh dataflow|flink|spark" in result.stderr
        assert "Set KALEIDO" in result.stderr
        assert "set -euo" not in result.stderr


@pytest.mark.parametrize("runner", NEEDS)
def test_what_a_runner_needs_is_asked_for(runner):
    result = launch(runner, "--data", "d")
    assert result.returncode == 2
    assert f"set {next(iter(NEEDS[runner]))}" in result.stderr


@pytest.mark.parametrize("runner", NEEDS)
def test_beam_knows_every_flag(runner, tmp_path):
    pytest.importorskip("apache_beam", reason="needs Beam: install the extra 'annotate'")
    from apache_beam.options.pipeline_options import PipelineOptions

    given = flags(runner, tmp_path)
    known = PipelineOptions(given).get_all_options(drop_default=True)
    for flag in given:
        name, _, value = flag.removeprefix("--").partition("=")
        found = known[name]
        assert value in found if isinstance(found, list) else str(found) == value


def test_dataflow_without_an_accelerator(tmp_path):
    assert [f for f in flags("dataflow", tmp_path) if "worker_accelerator" in f]
    assert not [f for f in flags("dataflow", tmp_path, ACCELERATOR="") if "accelerator" in f]


@pytest.mark.slow
def test_a_job_server_and_a_worker_pool(tmp_path, monkeypatch):
    """The way of Flink and Spark, with the job server that Beam has in Python."""
    pytest.importorskip("apache_beam", reason="needs Beam: install the extra 'annotate'")
    from tests.test_annotate_pipeline import files, run, shards

    shards(tmp_path / "data", 3, 4)
    run(tmp_path / "data", tmp_path / "here")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # The pool starts its workers as `python`.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    path = f"{pathlib.Path(sys.executable).parent}:{tmp_path / 'bin'}:/usr/bin:/bin"
    common = {"env": {**os.environ, "PATH": path}, "cwd": tmp_path, "stderr": subprocess.DEVNULL}
    module = "apache_beam.runners"
    services = [
        [f"{module}.portability.local_job_service_main", "-p", "0", "--port_file", "port"],
        [f"{module}.worker.worker_pool_main", f"--service_port={port}"],
    ]
    started = [subprocess.Popen([sys.executable, "-m", *words], **common) for words in services]
    try:
        limit = time.monotonic() + 60
        while not ((tmp_path / "port").exists() and (tmp_path / "port").read_text("utf-8")):
            assert time.monotonic() < limit, "the job server does not start"
            time.sleep(0.2)
        kaleido = tmp_path / "kaleido"
        kaleido.write_text(f'#!/bin/sh\nexec {sys.executable} -m kaleido_jax.cli "$@"\n', "utf-8")
        kaleido.chmod(0o755)
        result = launch(
            "spark", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "there"),
            "--stages", "bbox",
            JOBS=f"localhost:{(tmp_path / 'port').read_text('utf-8')}", POOL=f"localhost:{port}",
            KALEIDO=str(kaleido), PYTHONPATH=str(ROOT),
        )  # fmt: skip
    finally:
        for process in started:
            process.terminate()
            process.wait()
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert json.loads((tmp_path / "there" / "manifest.json").read_text())["totals"]["records"] == 12
