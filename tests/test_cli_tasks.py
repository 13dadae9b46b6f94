"""`kaleido tasks`: the list, and a look into one task."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("array_record", reason="ArrayRecord needs the extra [data]")

from kaleido_jax import cli
from kaleido_jax.data import task_table
from kaleido_jax.data.peek import peek
from kaleido_jax.tokens import Vocabulary
from tests.records import write_shapes

VOCABULARY = Vocabulary.default(8192)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_shapes(root, 15)
    return str(root)


def test_the_list_says_what_is_built(capsys, data_dir):
    assert cli.main(["tasks", "--data-dir", data_dir]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = {line.split()[0]: line for line in lines[1:-1]}
    assert set(named) == {*task_table.TASKS, *task_table.MIXTURES}
    assert named["shapes_64_combined"].endswith("text bbox voken           15 train")
    assert named["cc12m_256_combined"].endswith("not built")
    assert max(map(len, lines[:-1])) <= 100
    assert cli.main(["tasks", "--match", "coco100_64"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_a_look_into_a_task(capsys, data_dir, tmp_path):
    out = tmp_path / "peek"
    words = ["tasks", "shapes_64_mixture", "--data-dir", data_dir, "--out", str(out)]
    assert cli.main([*words, "--num", "7"]) == 0
    said = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    assert len(said) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peek"]
    source = task_table.task_source("shapes_64_mixture", data_dir)
    truth = {source[i]["key"]: source[i] for i in range(15)}
    for line in said:
        picture = np.asarray(Image.open(out / line["picture"]))
        assert min(picture.shape[:2]) >= 320  # enlarged, for words to be read
        assert line["caption"] == truth[line["key"]]["caption"]
        assert any(line["latents"].values())
        assert line["unknown_tokens"] == 0
    text = capsys.readouterr().out
    assert all(line["picture"] in text for line in said)
    assert cli.main(words) == 2
    assert "already holds files" in capsys.readouterr().err


def test_a_look_into_the_folder_where_one_stands(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["tasks", "shapes_64_text", "--data-dir", data_dir, "--num", "1"]
    assert cli.main([*words, "--start", str(10**12), "--out", "."]) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_the_list_tells_broken_records_from_missing_ones(capsys, tmp_path):
    (write_shapes(tmp_path, 3) / "dataset_info.json").write_text("{")
    assert cli.main(["tasks", "--match", "_64_text", "--data-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("shapes")).endswith("cannot be read")
    assert next(line for line in lines if line.startswith("cc12m")).endswith("not built")


def test_a_look_follows_the_stream(data_dir):
    def keys(**more):
        return [p.key for p in peek("shapes_64_bbox", VOCABULARY, data_dir=data_dir, **more)]

    assert keys(count=4, shuffle=False) == [f"shapes-3-{i}" for i in range(4)]
    assert keys(count=3, start=5) == keys(count=8)[5:]
    assert keys(count=15, seed=1) != keys(count=15, seed=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shapes_64_bbx", "--out", "{out}"], "nearest is 'shapes_64_bbox'"),
        (["shapes_64_bbox"], "--out DIR is needed"),
        (["--out", "{out}"], "--out needs the NAME"),
        (["cc12m_64_text", "--out", "{out}"], "no such folder of records"),
        (["shapes_64_text", "--out", "{out}", "--split", "test"], "has no split 'test'"),
        (["--match", "nothing"], "no task holds 'nothing'"),
        (["shapes_64_text", "--out", "{out}", "--vocabulary", "{out}"], "cannot read"),
        (["shapes_64_text", "--out", "{out}", "--start", str(2**62)], "not a whole number of 0 to"),
        (["shapes_64_text", "--out", "/proc/new"], "/proc/new cannot be written"),
    ],
)
def test_misuse_is_one_line(capsys, data_dir, tmp_path, words, message):
    words = [word.format(out=tmp_path / "new") for word in words]
    assert cli.main(["tasks", *words, "--data-dir", data_dir]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert list(tmp_path.iterdir()) == []
