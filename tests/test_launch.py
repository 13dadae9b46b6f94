"""The launch scripts: sound shell, and the words and variables that they hand on.

What only a cluster has (srun, gcloud) is stood in for by scripts that show what they were given.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from kaleido_jax import cli, config
from kaleido_jax.distributed import Settings, detect

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def command(folder, name, text):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n", "utf-8")
    path.chmod(0o755)
    return path


def launch(script, *words, path="", **environ):
    return subprocess.run(
        [str(LAUNCH / script), *words], capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": f"{path}:/usr/bin:/bin"} | {k: str(v) for k, v in environ.items()},
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_tell_how_they_are_used(script):
    assert script.stat().st_mode & 0o111
    told = launch(script.name)
    assert told.returncode == 2
    assert f"launch/{script.name}" in told.stderr and "kaleido" in told.stderr
    assert "set -euo" not in told.stderr
    beside = shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    checker = beside or shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed (extra 'test')")
    found = subprocess.run([checker, str(script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_local_starts_numbered_processes_and_ends_them_all_when_one_fails(tmp_path):
    shows = command(
        tmp_path, "shows", 'echo "$KALEIDO_PROCESS_INDEX/$KALEIDO_PROCESS_COUNT $* $XLA_FLAGS"'
    )
    told = launch("local.sh", "--config", "a b", KALEIDO=shows, PROCESSES=3, DEVICES=4)
    assert told.returncode == 0, told.stderr
    flag = "--xla_force_host_platform_device_count=4"
    assert sorted(told.stdout.splitlines()) == [f"{i}/3 train --config a b  {flag}" for i in "012"]
    # The second fails; the first does not even listen to SIGTERM.
    fails = command(
        tmp_path,
        "fails",
        '[ "$KALEIDO_PROCESS_INDEX" = 1 ] && exit 3\n'
        "trap '' TERM\nfor _ in {1..300}; do sleep 0.1; done",
    )
    began = time.monotonic()
    told = launch("local.sh", "--config", "x", KALEIDO=fails, PROCESSES=2, GRACE=1)
    assert told.returncode == 3
    assert time.monotonic() - began < 25
    alone = launch("local.sh", "--config", "x", KALEIDO=shows)
    assert alone.stdout.strip() == "/ train --config x"


def test_ctrl_c_reaches_both_of_compare_once_and_waits_until_they_saved(tmp_path):
    trains = command(
        tmp_path,
        "trains",
        f"exec {sys.executable} -c '\n"
        "import signal, sys, time\n"
        "seen = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda number, frame: seen.append(number))\n"
        'print("up", flush=True)\n'
        "while not seen:\n"
        "    time.sleep(0.05)\n"
        "time.sleep(1)\n"
        'print("signals", len(seen), flush=True)\n'
        "sys.exit(75)'",
    )
    logs = [tmp_path / "runs" / f"{name}.log" for name in ("kaleido", "baseline")]
    process = subprocess.Popen(
        [str(LAUNCH / "compare.sh"), "shapes", str(tmp_path / "runs")], start_new_session=True,
        env={**os.environ, "KALEIDO": str(trains)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 50
    while not all(log.exists() and "up" in log.read_text() for log in logs):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(30) == 75
    assert [log.read_text() for log in logs] == ["up\nsignals 1\n"] * 2


def test_slurm_queues_again_after_a_saved_end_only(tmp_path):
    command(tmp_path, "srun", 'echo "srun $*"; exit "$CODE"')
    command(tmp_path, "scontrol", 'echo "scontrol $*"')
    runs = {
        code: launch("slurm.sh", "--workdir", "w", path=tmp_path, CODE=code, SLURM_JOB_ID=7)
        for code in (0, 1, 75)
    }
    assert {code: run.returncode for code, run in runs.items()} == {0: 0, 1: 1, 75: 75}
    started = "srun --kill-on-bad-exit=1 kaleido train --workdir w\n"
    assert runs[0].stdout == runs[1].stdout == started
    assert runs[75].stdout == started + "scontrol requeue 7\n"


def test_tpu_hands_the_words_on_whole(tmp_path):
    command(tmp_path, "gcloud", 'printf "%s\\n" "$@"')
    told = launch(
        "tpu_pod.sh", "--config.latents=('text', 'bbox')", path=tmp_path, TPU="pod", ZONE="here"
    )
    *before, last = told.stdout.splitlines()
    assert {"pod", "--zone=here", "--worker=all"} <= set(before)
    variable, *words = shlex.split(last.removeprefix("--command="))
    assert words == ["kaleido", "train", "--config.latents=('text', 'bbox')"]
    assert detect(dict([variable.split("=")])) == Settings("TPU")
    refused = launch("tpu_pod.sh", "--config", "x", path=tmp_path, TPU="pod")
    assert refused.returncode == 2 and "set ZONE" in refused.stderr


def test_the_jobset_tells_each_process_who_it_is():
    spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text("utf-8"))
    job = spec["spec"]["replicatedJobs"][0]
    inner = job["template"]["spec"]
    container = inner["template"]["spec"]["containers"][0]
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    count = int(environ["KALEIDO_PROCESS_COUNT"])
    assert inner["completions"] == inner["parallelism"] == count
    host = f"{spec['metadata']['name']}-{job['name']}-0-0.{spec['metadata']['name']}"
    for index in range(count):
        found = detect(environ | {"JOB_COMPLETION_INDEX": str(index)})
        assert (found.coordinator, found.index) == (f"{host}:12321", index)
    args = cli.parse([*container["command"][1:], *container["args"]])
    cfg = config.load_config(args.config, args.overrides)
    assert cfg.mesh.preset == "a100-64"
    assert count * container["resources"]["limits"]["nvidia.com/gpu"] == 64
