"""Any number of pictures, batch by batch: the pictures of a call, written while others are drawn,
and gone on with after a stop."""

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

from kaleido_jax import bundle, cli, picture_folder, runner
from kaleido_jax.errors import UserError
from kaleido_jax.latents import load_document, read_png
from kaleido_jax.prompts import Request
from tests.test_generate import PROMPT, TOLERANCE, _bundle, _config, _pipe

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _few_shapes(monkeypatch):
    monkeypatch.setattr(runner, "DEFAULT_BATCH", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bundle.save(tmp_path_factory.mktemp("model") / "export", _bundle(_config()))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def sample(model: pathlib.Path, out: pathlib.Path, *words: str) -> int:
    return cli.main(["sample", "--checkpoint", str(model), "--out", str(out), *words])


def test_a_stream_gives_the_pictures_of_a_call():
    pipe = _pipe()
    prompts = [PROMPT, "dusk: a blue shape", "noon: a green shape"]
    whole = pipe(prompts, num_images=1, seed=3)
    requests = [prompts[0], Request(prompts[1], settings={"guidance_weight": 4.0}), prompts[2]]
    got = {n: (o, i) for numbers, o in pipe.stream(requests, seed=3) for i, n in enumerate(numbers)}
    assert sorted(got) == [0, 1, 2]
    for number in (0, 2):
        output, row = got[number]
        assert output.documents[row].to_json() == whole.documents[number].to_json()
        np.testing.assert_allclose(output.samples[row], whole.samples[number], **TOLERANCE)
    # What stands alone has a batch of its own size.
    output, row = got[1]
    assert (output.documents[row].guidance_weight, output.documents[row].batch_size) == (4.0, 1)
    rest = [numbers for numbers, _ in pipe.stream(requests, seed=3, done={0, 1})]
    assert rest == [[2]]


def test_a_document_in_a_stream_is_drawn_as_it_records():
    pipe = _pipe()
    out = pipe(PROMPT, num_images=3, batch_size=3, seed=5)
    requests = [Request(PROMPT, document=out.documents[1]), Request(PROMPT, num=1, seed=9)]
    (first, again), (second, other) = pipe.stream(requests, num_images=4)
    assert (first, second) == ([0], [1])
    assert again.documents[0].to_json() == out.documents[1].to_json()
    np.testing.assert_array_equal(again.images[0], out.images[1])
    assert other.documents[0].seed == 9


def test_what_is_asked_wrongly_is_refused_before_the_first_picture():
    pipe = _pipe()
    for requests, words in (
        ([Request(PROMPT, "p.jsonl line 3", settings={"top_q": 1})], "p.jsonl line 3: unknown"),
        ([Request(PROMPT, settings={"guidance_weight": float("nan")})], "guidance"),
        ([], "0 pictures"),
        ([Request(PROMPT, num=10_000)] * 101, "1010000 pictures"),
    ):
        with pytest.raises(UserError, match=words):
            pipe.stream(requests)


def test_sample_writes_what_is_asked(model, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        f'{{"caption": "{PROMPT}", "num": 3}}\n{{"caption": "a cat", "seed": 7, "guidance": 4}}\n'
    )
    words = ["--prompts", str(path), "--num", "2", "--steps", "2", "--sampler", "ddim"]
    assert sample(model, tmp_path / "out", *words) == 0
    assert capsys.readouterr().out == f"5 pictures and their documents: {tmp_path / 'out'}\n"
    documents = [load_document(tmp_path / "out" / f"{i:06d}.json") for i in range(5)]
    assert [d.caption for d in documents] == [PROMPT] * 3 + ["a cat"] * 2
    assert [d.sample_index for d in documents] == [0, 1, 2, 0, 1]
    assert [d.seed for d in documents] == [0, 0, 0, 7, 7]
    assert [d.guidance_weight for d in documents] == [2.0, 2.0, 2.0, 4.0, 4.0]
    assert {(d.steps, d.sampler) for d in documents} == {(2, "ddim")}
    for i, document in enumerate(documents):
        assert read_png(tmp_path / "out" / f"{i:06d}.png")[1] == document
        assert (tmp_path / "out" / "panels" / f"{i:06d}.png").is_file()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["pictures"] == 5 and ".lock" not in manifest["files"]
    assert manifest["files"].keys() == contents(tmp_path / "out").keys() - {"manifest.json"}
    # One of its documents as a prompt: the same file again.
    path.write_text(documents[3].to_json() + "\n")
    assert sample(model, tmp_path / "again", "--prompts", str(path)) == 0
    again = (tmp_path / "again" / "000000.png").read_bytes()
    assert again == (tmp_path / "out" / "000003.png").read_bytes()


def test_a_stopped_run_goes_on_to_the_same_files(model, tmp_path, monkeypatch, capsys):
    words = ["--prompt", PROMPT, "--prompt", "a cat", "--num", "3", "--steps", "2"]
    assert sample(model, tmp_path / "whole", *words) == 0
    add = picture_folder.PictureFolder.add

    def stop(self, numbers, output):
        add(self, numbers, output)
        if max(numbers) >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(picture_folder.PictureFolder, "add", stop)
    assert sample(model, tmp_path / "out", *words) == 130
    monkeypatch.undo()
    monkeypatch.setattr(runner, "DEFAULT_BATCH", 2)
    left = contents(tmp_path / "out")
    assert "000001.png" in left and "000005.png" not in left and "manifest.json" not in left
    # What a kill in the middle of a file would leave.
    (tmp_path / "out" / ".000004.png.1.tmp").write_bytes(b"half")
    assert sample(model, tmp_path / "out", *words) == 2
    assert "--resume" in capsys.readouterr().err
    assert sample(model, tmp_path / "out", *words, "--seed", "1", "--resume") == 2
    assert "was begun with seed 0, not 1" in capsys.readouterr().err
    assert sample(model, tmp_path / "out", *words, "--resume") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sample(model, tmp_path / "out", *words, "--resume") == 0
    assert "nothing to do: 6 pictures" in capsys.readouterr().out


def test_what_cannot_be_written_ends_the_run(tmp_path):
    pipe = _pipe()
    numbers, output = next(pipe.stream([PROMPT]))
    with picture_folder.PictureFolder(tmp_path / "out", {}) as folder:
        (tmp_path / "out" / "panels").write_text("a file in the way")
        folder.add(numbers, output)
        with pytest.raises(UserError, match="out cannot be written"):
            folder.add(numbers, output)
    with pytest.raises(UserError, match="already holds files"):
        picture_folder.PictureFolder(tmp_path / "out", {})


def test_one_writer_at_a_time(tmp_path):
    with (
        picture_folder.PictureFolder(tmp_path / "out", {}),
        pytest.raises(UserError, match="another"),
    ):
        picture_folder.PictureFolder(tmp_path / "out", {}, resume=True)


@pytest.mark.slow
def test_killed_runs_leave_whole_files_and_go_on(model, tmp_path):
    words = ["sample", "--checkpoint", str(model), "--num", "40", "--batch-size", "2"]
    words += ["--prompt", PROMPT, "--resume", "--steps", "2"]
    command = [sys.executable, "-m", "kaleido_jax.cli", *words, "--out"]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, cwd=ROOT, check=True)
    out = tmp_path / "out"
    kills = 0
    for wanted in (3, 11, 24):
        process = subprocess.Popen([*command, str(out)], env=environment, cwd=ROOT)
        while process.poll() is None and len(list(out.glob("0*.png"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        for path in out.glob("0*.png"):
            assert read_png(path)[1] == load_document(path.with_suffix(".json"))
    assert kills == 3
    subprocess.run([*command, str(out)], env=environment, cwd=ROOT, check=True)
    assert contents(out) == contents(tmp_path / "whole")
