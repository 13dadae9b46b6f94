"""The demo's folder, its progress, and the verb that starts it."""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from kaleido_jax import cli, demo
from kaleido_jax.demo import folder, shapes
from kaleido_jax.demo.progress import Progress
from kaleido_jax.errors import UserError


def test_time_left_follows_the_pace():
    now = [0.0]
    lines = []
    progress = Progress(lines.append, {"a": 10.0, "b": 30.0}, clock=lambda: now[0])
    progress.start("a", "first")
    assert lines == ["[a] first · about 0:40 left"]
    now[0] = 20.0  # twice as slow as expected
    progress.start("b", "second")
    assert progress.seconds == {"a": 20.0}
    assert 45 < progress.remaining(0.0) <= 60
    now[0] = 80.0
    progress.finish()
    assert progress.seconds == {"a": 20.0, "b": 60.0}
    assert progress.remaining(0.0) == 0.0
    with pytest.raises(KeyError):
        progress.start("c", "unknown")


def former_demo(where: pathlib.Path) -> pathlib.Path:
    where.mkdir()
    (where / "index.html").write_text("old")
    results = {"made_by": folder.MADE_BY, "files": ["index.html"]}
    (where / folder.RESULTS).write_text(json.dumps(results))
    return where


def test_folders_that_may_be_written(tmp_path):
    assert folder.check(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    folder.check(tmp_path / "empty")
    folder.check(former_demo(tmp_path / "former"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"mine.txt": "x"}, "no former demo"),
        ({"results.json": "{}"}, "no former demo"),
        ({"results.json": '{"made_by": "kaleido demo"}'}, "no former demo"),
        ({"results.json": "[1]"}, "no former demo"),
        ({"results.json": b"\xff"}, "no former demo"),
    ],
)
def test_other_folders_are_refused_unless_told(tmp_path, content, words):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        folder.check(out)
    assert folder.check(out, overwrite=True) == out


def test_a_former_demo_with_a_file_of_somebody_else_is_refused(tmp_path):
    out = former_demo(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        folder.check(out)


def test_the_folder_one_is_in_is_refused_even_with_overwrite(tmp_path, monkeypatch):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for out in (".", "..", tmp_path):
        with pytest.raises(UserError, match="the folder you are in"):
            folder.check(out, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        folder.check(tmp_path / "file", overwrite=True)


def test_replacing_keeps_what_is_not_ours(tmp_path):
    def finished() -> pathlib.Path:
        place = folder.begin(tmp_path / "out")
        (place / "index.html").write_text("new")
        return place

    out = former_demo(tmp_path / "out")
    assert folder.replace(finished(), out) is None
    assert (out / "index.html").read_text() == "new"
    (out / folder.RESULTS).unlink(missing_ok=True)
    assert folder.replace(finished(), out) == tmp_path / "out.old"
    assert folder.replace(finished(), out) == tmp_path / "out.old2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.old", "out.old2"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_place_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        folder.begin(tmp_path / "out")


def test_the_demo_looks_at_its_folder_before_it_trains(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"mine|former demo"):
        demo.run(tmp_path, quick=True, say=lambda line: None)
    with pytest.raises(UserError, match="seed"):
        demo.run(tmp_path / "new", quick=True, seed=-1, say=lambda line: None)
    models = dict.fromkeys(shapes.MODELS, tmp_path / "none")
    with pytest.raises(UserError, match="does not exist"):
        demo.run(tmp_path / "new", quick=True, say=lambda line: None, models=models)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_verb_hands_on_what_it_was_told(monkeypatch, tmp_path):
    found = {}
    monkeypatch.setattr(demo, "run", lambda out, **given: found.update(given, out=out))
    words = ["demo", "--out", str(tmp_path / "x"), "--quick", "--seed", "5", "--overwrite"]
    assert cli.main(words) == 0
    assert found == {"out": tmp_path / "x", "quick": True, "seed": 5, "overwrite": True}


def test_what_a_killed_run_left_is_not_in_the_way(tmp_path):
    """In a container each run has the same process id."""
    out = tmp_path / "demo"
    assert folder.begin(out) != folder.begin(out)
