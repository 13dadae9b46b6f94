"""The commands of docs/data.md as printed: photographs, latents, records, model, pictures."""

from __future__ import annotations

import json
import pathlib
import re
import shlex

import pytest

from kaleido_jax import cli
from kaleido_jax.latents import read_png

pytest.importorskip("apache_beam", reason="annotate and build need the extra 'annotate'")
pytest.importorskip("tensorflow_datasets", reason="build needs the extra 'data'")

ROOT = pathlib.Path(__file__).resolve().parent.parent
COCO = ROOT.parent / "shared" / "data" / "coco100"
SETTINGS = ("('text',)", "('bbox',)", "('blob',)", "('voken',)", "('text','bbox','voken')")
# Everything small: the commands are proved here, not the model.
SMALL = (
    "--config.train.num_steps=2 --config.train.batch_size=8 --config.train.log_every=1"
    " --config.train.sample_every=0 --config.model.denoiser.resolution_channels=(16,16)"
    " --config.model.denoiser.num_resnets_per_resolution=(1,1)"
    " --config.model.denoiser.num_attention_layers=(0,0)"
    " --config.model.denoiser.inner.resolution_channels=(16,16)"
    " --config.model.denoiser.inner.num_attention_layers=(0,0)"
    " --config.model.text_encoder.num_encoder_layers=1"
    " --config.model.latent_decoder.num_decoder_layers=1"
).split()


def commands() -> list[list[str]]:
    section = (ROOT / "docs" / "data.md").read_text("utf-8").split("## From photographs")[1]
    block = re.search(r"```sh\n(.*?)```", section, re.S)[1]
    return [shlex.split(line)[1:] for line in block.strip().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not COCO.is_dir(), reason="no photographs beside the project")
def test_the_printed_commands_run_with_every_latent(tmp_path, monkeypatch):
    (tmp_path / "shared").symlink_to(COCO.parent.parent)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    annotate, build, train, sample = commands()
    assert cli.main(annotate) == 0
    assert cli.main(build) == 0
    manifest = json.loads(
        next(pathlib.Path("records/coco100/64").glob("*/manifest.json")).read_text("utf-8")
    )
    split = manifest["splits"]["train"]
    assert split["listed"] == split["records"] + sum(split["skipped"].values()) == 98
    for counts in split["latents"].values():
        assert sum(counts.values()) == 98
    for number, latents in enumerate(SETTINGS):
        train[train.index("--workdir") + 1] = f"runs/{number}"
        sample[sample.index("--checkpoint") + 1] = f"runs/{number}"
        sample[sample.index("--out") + 1] = f"out/{number}"
        here = [word.replace("('bbox',)", latents) for word in train]
        assert cli.main(here + SMALL) == 0
        assert cli.main([*sample, "--steps", "2"]) == 0
        _, document = read_png(f"out/{number}/000000.png")
        assert document.caption == "a photo of 2 dogs"
    lines = pathlib.Path("runs/0/metrics.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 2
