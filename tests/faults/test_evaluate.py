"""FAULTS 21: an evaluation killed at 60% goes on, draws no picture twice, and says the same."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kaleido_jax import bundle, cli
from kaleido_jax.evaluate.data import Data
from tests.test_generate import _bundle, _config

SAMPLES, BATCH, PARTS = 1000, 100, 10


def words(checkpoint: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    line = (
        f"evaluate --checkpoint {checkpoint} --out {out} --samples {SAMPLES} --references 100"
        f" --bootstrap 5 --batch-size {BATCH} --feature pixels --metrics fid,recall,similarity"
    )
    return [*line.split(), *more]


def results(out: pathlib.Path) -> list[dict]:
    lines = (out / "results.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    for result in found:
        del result["seconds"]
    return found


def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    config = _config()
    config.data.image_size = 32
    return bundle.save(tmp_path / "model", _bundle(config))


def start(line: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "kaleido_jax.cli", *line],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def parts(out: pathlib.Path) -> list[pathlib.Path]:
    return sorted(out.glob("pictures/*/part_*.npz"))


@pytest.mark.slow
def test_killed_at_sixty_percent(tmp_path):
    model = checkpoint(tmp_path)
    process = start(words(model, tmp_path / "killed"))
    limit = time.monotonic() + 200
    while len(parts(tmp_path / "killed")) < 0.6 * PARTS:
        assert process.poll() is None and time.monotonic() < limit, "it ended or stands still"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = parts(tmp_path / "killed")
    assert len(kept) < PARTS
    assert not (tmp_path / "killed" / "results.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in kept}
    # One of the parts is damaged too: it alone is made again.
    damaged = kept[2]
    damaged.write_bytes(damaged.read_bytes()[:-100])

    # The whole run, and the rest of the killed one, in processes like the killed one.
    assert start(words(model, tmp_path / "whole")).wait(timeout=200) == 0
    assert start(words(model, tmp_path / "killed")).wait(timeout=200) == 0
    for path, when in before.items():
        assert (path.stat().st_mtime_ns == when) == (path != damaged)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    seeds = []
    for one, other in zip(parts(tmp_path / "killed"), parts(tmp_path / "whole"), strict=True):
        with np.load(one) as a, np.load(other) as b:
            assert np.array_equal(a["images"], b["images"])
            assert a["documents"].tobytes() == b["documents"].tobytes()
            documents = [json.loads(line) for line in a["documents"].tobytes().splitlines()]
            seeds += [(document["seed"], document["sample_index"]) for document in documents]
    assert seeds == [(0, i) for i in range(SAMPLES)]


def test_shards_share_the_work_and_the_last_measures(tmp_path, capsys):
    """Two runs, each every second part; together the figures of one."""
    model, out = checkpoint(tmp_path), tmp_path / "shards"
    small = ("--samples", "150", "--batch-size", "50", "--steps", "1")
    assert cli.main(words(model, out, *small, "--shard", "1/2")) == 0
    assert not (out / "results.jsonl").exists()
    assert len(parts(out)) == 1
    assert cli.main(words(model, out, *small, "--shard", "0/2")) == 0
    assert cli.main(words(model, tmp_path / "one", *small)) == 0
    assert results(out) == results(tmp_path / "one")
    # Again: nothing to do, no second line, the same answer.
    assert cli.main(words(model, out, *small)) == 0
    assert "already in" in capsys.readouterr().err
    assert len(results(out)) == 1


def test_pictures_may_share_a_latent(tmp_path, capsys):
    """Six of a caption, three of each z, also where a part ends between the three."""
    model = checkpoint(tmp_path)
    small = "--samples 120 --per-caption 6 --metrics similarity --steps 1 --batch-size"
    drawn, painted = {}, {}
    for size in ("120", "50"):
        line = words(model, tmp_path / size, *small.split(), size, "--per-latent", "3")
        assert cli.main(line) == 0
        documents, images = [], []
        for path in parts(tmp_path / size):
            with np.load(path) as file:
                lines = file["documents"].tobytes().splitlines()
                documents += [json.loads(line) for line in lines]
                images += list(file["images"])
        painted[size] = np.stack(images)
        drawn[size] = [(d["caption"], d["latents"], d["sample_index"]) for d in documents]
        shared = [json.dumps(document["latents"]) for document in documents]
        assert all(len(set(shared[i : i + 3])) == 1 for i in range(0, 120, 3))
        assert len(set(shared)) > 20
        assert len({image.tobytes() for image in images}) == 120
        (result,) = results(tmp_path / size)
        assert result["metrics"]["similarity_same_z"]["captions"] == len(
            {d["caption"] for d in documents}
        )
        assert {"similarity", "similarity_other_z"} <= set(result["metrics"])
    assert drawn["120"] == drawn["50"]
    assert [index for _, _, index in drawn["50"]] == list(range(120))
    assert np.abs(painted["120"].astype(int) - painted["50"]).max() <= 1
    assert cli.main(words(model, tmp_path / "no", *small.split(), "50", "--per-latent", "4")) == 2
    assert "must be a multiple of --per-latent" in capsys.readouterr().err


def test_without_latents_none_can_be_shared(tmp_path, capsys):
    config = _config(latents=())
    config.data.image_size = 32
    model = bundle.save(tmp_path / "model", _bundle(config))
    small = "--samples 6 --per-caption 6 --metrics similarity --steps 1".split()
    assert cli.main(words(model, tmp_path / "out", *small, "--per-latent", "2")) == 2
    assert "--per-latent: this model has no latents" in capsys.readouterr().err
    assert cli.main(words(model, tmp_path / "out", *small, "--true-latents")) == 2
    assert "--true-latents: this model has no latents" in capsys.readouterr().err
    assert cli.main(words(model, tmp_path / "out", *small)) == 0
    assert list(results(tmp_path / "out")[0]["metrics"]) == ["similarity"]


def test_true_latents_are_painted_with_the_settings_asked_for(tmp_path, capsys):
    config = _config()
    config.data.image_size, config.data.latent_length = 32, 90
    model = bundle.save(tmp_path / "model", _bundle(config))
    small = "--samples 6 --per-caption 2 --metrics similarity --sampler ddim".split()
    line = words(model, tmp_path / "out", *small, "--guidance", "4")  # steps as the config has them
    assert cli.main([*line, "--true-latents", "--seeds", "5"]) == 0
    (path,) = parts(tmp_path / "out")
    with np.load(path) as file:
        documents = [json.loads(d) for d in file["documents"].tobytes().splitlines()]
    data = Data(config, ("text",))
    for i, document in enumerate(documents):
        scene = data.held_out(i // 2)
        assert document["caption"] == scene["caption"]
        (latent,) = document["latents"]
        assert scene["latents"]["text"] in latent.values()
        assert (document["sample_index"], document["seed"]) == (i, 5)
        assert (document["guidance_weight"], document["steps"]) == (4, 3)
        assert document["sampler"] == "ddim"
    (result,) = results(tmp_path / "out")
    assert result["true_latents"] and result["seed"] == 5
    assert cli.main([*line, "--true-latents", "--per-latent", "2"]) == 2
    assert "a caption has one true z" in capsys.readouterr().err
    # Drawn ones are another subject: nothing is mixed up.
    assert cli.main([*line, "--seeds", "5"]) == 0
    drawn = results(tmp_path / "out")[1]
    assert "true_latents" not in drawn and drawn["id"] != result["id"]
