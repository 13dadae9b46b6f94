"""Records as captions, references and true pictures of an evaluation; what is refused at once."""

from __future__ import annotations

import dataclasses
import pathlib
import threading

import numpy as np
import pytest

from kaleido_jax import cli, config
from kaleido_jax.data import RecordError, task_table
from kaleido_jax.demo.shapes import shipped
from kaleido_jax.errors import UserError
from kaleido_jax.evaluate import adherence, measure, run
from kaleido_jax.evaluate.data import Data, _one_task
from kaleido_jax.evaluate.features import make_feature
from kaleido_jax.evaluate.pictures import Pictures
from kaleido_jax.evaluate.protocols import PROTOCOLS
from kaleido_jax.evaluate.references import open_references
from kaleido_jax.evaluate.subjects import Truth
from kaleido_jax.locks import sole_writer
from kaleido_jax.models.voken_tokenizer import PatchTokenizer
from tests import builds


def records(folder: pathlib.Path, latents=(), held_out=None, **source) -> Data:
    settings = config.load_config("cifar10", [f"data.source.path={folder}"])
    settings.data.source.update(source)
    return Data(settings, latents, held_out={} if held_out is None else {"path": str(held_out)})


def recaption(folder: pathlib.Path, *captions: str) -> None:
    """One shard whose first records have these captions."""
    held = {}
    for number in range(12):
        members = builds.members(number)
        if number < len(captions):
            members[f"k{number:03d}.txt"] = captions[number].encode()
        held |= members
    folder.mkdir(parents=True, exist_ok=True)
    builds.write_shard(folder / "00000.tar", held)


def test_true_pictures_are_apart_from_all_references(tmp_path):
    builds.write_shards(tmp_path / "train")
    builds.write_shards(tmp_path / "other", 1, 3)
    data = records(tmp_path / "train")
    with pytest.raises(UserError, match="8 references and 1 true pictures are more than the 8"):
        data.check_apart(0, 1)
    data.check_apart(5, 3)
    apart = records(tmp_path / "train", held_out=tmp_path / "other")
    apart.check_apart(0, 3)
    assert len({apart.reference(i).tobytes() for i in range(8)}) == 8
    with pytest.raises(UserError, match="--samples 4: --held-out has 3 true pictures"):
        apart.check_apart(0, 4)
    feature = make_feature("pixels")
    hashes = {open_references(tmp_path / "r", d, feature, 8).hash for d in (data, apart)}
    assert len(hashes) == 1 and len(list((tmp_path / "r").glob("[!.]*"))) == 1
    # The same records by another name are not apart.
    again = records(tmp_path / "train", held_out=f"{tmp_path}/other/../train")
    with pytest.raises(UserError, match="8 references and 1 true"):
        again.check_apart(0, 1)
    assert {apart.held_out(i)["key"] for i in range(6)} == {f"00000/k00{i}" for i in range(3)}
    assert apart.describe()["captions"] != data.describe()["captions"]
    assert apart.fingerprint() == data.fingerprint()
    with pytest.raises(UserError, match="--held-out name=toy: must be the training's"):
        Data(config.load_config("shapes"), held_out={"name": "toy"})


def test_captions_that_no_prompt_may_be_have_stand_ins(tmp_path):
    recaption(tmp_path, "two\nlines", "", "x" * 2001, "bell \x07")
    data = records(tmp_path)
    captions = {data.held_out(i)["caption"] for i in range(12)}
    assert "two lines" in captions and len(captions) == 9
    assert len({data.held_out(i, ask=False)["key"] for i in range(12)}) == 12
    recaption(tmp_path / "none", *[""] * 12)
    none = Truth(records(tmp_path / "none"), (), 0).draw(range(2))[1]
    assert [document.caption for document in none] == ["", ""]
    with pytest.raises(UserError, match=r"unusable records; the last: .*k0.*the prompt is empty"):
        records(tmp_path / "none").held_out(0)


def test_other_captions_and_latents_are_other_data(tmp_path):
    codes = PatchTokenizer.default()
    codes.save(tmp_path / "vokens.npz")
    found = []
    for folder, captions in (("a", ["one"]), ("b", ["one"]), ("c", ["other"])):
        recaption(tmp_path / "data", *captions)
        data = records(tmp_path / "data")
        assert folder != "c" or data.fingerprint() == found[0][0]
        found.append((data.fingerprint(), data.held_out_fingerprint()))
    assert found[0] == found[1] and found[0][1] != found[2][1]
    path = str(tmp_path / "vokens.npz")
    before = records(tmp_path / "data", ("voken",), vokens=path).held_out_fingerprint()
    judge = adherence.make_detector(f"patch:{path}").identity
    PatchTokenizer(codes.mean, codes.basis, codes.centres[::-1]).save(tmp_path / "vokens.npz")
    after = records(tmp_path / "data", ("voken",), vokens=path).held_out_fingerprint()
    assert before != after and judge != adherence.make_detector(f"patch:{path}").identity


def test_references_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    data = Data(config.load_config("shapes"))
    feature = make_feature("pixels")
    monkeypatch.setattr("kaleido_jax.evaluate.references._PART", 10)
    whole = open_references(tmp_path / "whole", data, feature, 35)

    calls = []

    def compute(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return feature.compute(images)

    broken = dataclasses.replace(feature, compute=compute)
    with pytest.raises(KeyboardInterrupt):
        open_references(tmp_path / "stopped", data, broken, 35)
    (partial,) = (tmp_path / "stopped").glob(".*.partial")
    (partial / ".000002.npy.77.tmp").write_bytes(b"half")
    again = open_references(tmp_path / "stopped", data, broken, 35)
    assert calls == [10, 10, 10, 10, 5]  # the first two were kept
    assert again.hash == whole.hash and again.count == 35
    assert not list((tmp_path / "stopped").glob(".*.partial"))


def test_bad_references_are_counted_over_all(tmp_path, monkeypatch):
    """Two of a part of ten are borne where they are two of a hundred, and told beyond that."""
    monkeypatch.setattr("kaleido_jax.evaluate.references._PART", 10)
    bad = {3, 5}
    good = Data.reference

    def reference(self, number):
        if number in bad:
            raise RecordError(f"record {number}", "broken")
        return good(self, number)

    monkeypatch.setattr(Data, "reference", reference)
    data, feature = Data(config.load_config("shapes")), make_feature("pixels")
    assert open_references(tmp_path, data, feature, 100).count == 98
    bad.add(77)
    with pytest.raises(UserError, match="3 of 149 records cannot be read; the last: record 77"):
        open_references(tmp_path, data, feature, 149)
    data.max_bad_fraction = 0.1  # as data.source.max_bad_fraction of records
    assert open_references(tmp_path, data, feature, 149).count == 146
    bad.add(1)
    with pytest.raises(UserError, match="1 references can be read"):
        open_references(tmp_path, data, feature, 2)


def test_a_part_damaged_anywhere_is_made_again(tmp_path):
    pictures = Pictures(tmp_path, Truth(Data(config.load_config("shapes")), (), 0), 10, 10)
    pictures.make(0)
    images, documents = pictures.load(0)
    path = tmp_path / "part_000000.npz"
    whole = path.read_bytes()
    for place in range(0, len(whole), 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        if not pictures.missing():  # dates and the like
            assert (pictures.load(0)[0] == images).all()
            assert pictures.load(0)[1] == documents
    path.write_bytes(whole)
    assert pictures.missing() == []


def request(tmp_path: pathlib.Path, **more) -> run.Request:
    quick = dataclasses.replace(PROTOCOLS["quick"], samples=8, references=20, bootstrap=2)
    small = {"settings": {"num_steps": 1}, "metrics": ("fid",), "batch_size": 8}
    return run.Request(shipped("baseline"), tmp_path, "b", quick, "quick", **(small | more))


def test_shards_that_end_together_lose_nothing(tmp_path, monkeypatch):
    """One measures; the other goes on with the next subject, and nothing is measured twice."""
    said: list[str] = []
    measured: list[str] = []
    original = run._Evaluation._measure

    def slow(self, key, asked, subject, *rest):
        folder = tmp_path / "pictures" / run.results.identify(subject.identity) / "measuring" / key
        measured.append(subject.label)
        if len(measured) == 1:
            other = threading.Thread(target=lambda: run.run(request(tmp_path), said.append))
            other.start()
            other.join()
            assert (folder / ".lock").exists()
        original(self, key, asked, subject, *rest)

    monkeypatch.setattr(run._Evaluation, "_measure", slow)
    found = run.run(request(tmp_path), lambda line: None)
    assert len(found) == len(measured) == 1
    assert said[-1].endswith("another process is measuring it")
    # Killed after its pictures were there, and measured meanwhile by another process.
    lines = (tmp_path / "results.jsonl").read_text()
    known, seen = run._Evaluation._known, []

    def late(self, key, subject):
        seen.append(key)
        return known(self, key, subject) if len(seen) > 1 else False

    monkeypatch.setattr(run._Evaluation, "_known", late)
    assert run.run(request(tmp_path), said.append) == found
    assert len(measured) == 1 and (tmp_path / "results.jsonl").read_text() == lines


def test_every_seed_has_true_shapes_of_its_own():
    data = Data(config.load_config("shapes"), ("bbox",))
    keys = {seed: {data.truths(seed)(i)["key"] for i in range(20)} for seed in (0, 1, 10)}
    assert len(set().union(*keys.values())) == 60
    scenes = [data.truths(seed)(0)["image"] for seed in (0, 1, 10)]
    assert np.array_equal(scenes[0], data.held_out(0)["image"])
    assert len({scene.tobytes() for scene in scenes}) == 3


def test_a_mixture_is_measured_by_one_of_its_tasks():
    """It has each record once for each task: a reference would have copies of itself."""
    mixture = {"name": "task", "task": "shapes_32_mixture", "path": "x"}
    for latents in (("bbox",), ("text",)):
        assert _one_task(mixture, latents) == mixture | {"task": f"shapes_32_{latents[0]}"}
    assert _one_task(mixture, ())["task"] in task_table.TASKS
    other = {"name": "shapes", "seed": 1}
    assert _one_task(other, ("bbox",)) == other
    with pytest.raises(UserError, match="--data task=NAME: shapes_32_text, "):
        _one_task(mixture, ("voken", "text"))


def test_true_pictures_do_not_depend_on_the_batch(tmp_path):
    for size, metric in ((8, "fid"), (128, "vendi")):
        asked = request(tmp_path, batch_size=size, metrics=(metric,), model=False, ceiling=True)
        (result,) = run.run(asked, lambda line: None)
    assert len(list((tmp_path / "pictures").iterdir())) == 1
    # TensorBoard shows requests for other metrics as two runs.
    runs = [p.name.rsplit("-", 1)[0] for p in (tmp_path / "tensorboard").iterdir()]
    assert runs == ["truth", "truth"]
    assert result["metrics"]["vendi"]["samples"] == 8 and result["references"] is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--samples 5", "--samples 5: precision, recall, density, coverage need at least 6"),
        ("--references 5", "--references 5: precision, recall"),
        ("--neighbours 3", "--neighbours 3: precision, recall"),
        ("--samples 1 --metrics fid", "--samples 1: fid needs at least 2"),
        ("--name truth", "--name truth: that is what figures call"),
        ("--name _x", "--name _x: figures leave out names that begin with _"),
        ("--metrics adherence", "--metrics adherence: this model has no latents to follow"),
        ("--detector shapes:all", "detector 'shapes' takes no argument, not 'all'"),
        ("--data num_examples=0", "num_examples 0 must be at least 1"),
        ("--held-out num_examples=9 --ceiling --samples 10", "--samples 10: the data have 9 true"),
        ("--detector shapes --detector shapes", "both judge objects"),
        ("--held-out sise=3", "did you mean 'size'"),
    ],
)
def test_what_cannot_work_is_told_before_sampling(tmp_path, capsys, words, line):
    command = f"evaluate --checkpoint {shipped('baseline')} --out {tmp_path}"
    assert cli.main([*command.split(), *words.split()]) == 2
    assert line in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "pictures").exists()


def test_fewer_references_leave_the_protocols_neighbours(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "run", lambda request, say: asked.append(request) or [])
    command = f"evaluate --checkpoint {shipped('baseline')} --out {tmp_path} --protocol"
    for words in ("adm", "adm --references 50000", "adm --references 500", "paper"):
        assert cli.main([*command.split(), *words.split()]) == 0
    sizes = [(r.protocol.references, r.protocol.neighbours, r.protocol_name) for r in asked]
    assert sizes == [
        (0, 10_000, "adm"),
        (50_000, 10_000, "adm, changed"),
        (500, 500, "adm, changed"),
        (0, 0, "paper"),
    ]


def test_a_lock_is_another_error_than_a_full_disk(tmp_path):
    from kaleido_jax.locks import BusyError

    with sole_writer(tmp_path, "x"), pytest.raises(BusyError, match="another `x` is writing"):
        with sole_writer(tmp_path, "x"):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught, sole_writer(tmp_path / "file", "x"):
        pass
    assert not isinstance(caught.value, BusyError)


def test_sizes_of_zero_are_all():
    everything = PROTOCOLS["paper"]
    measure.check_sizes(("fid", "recall"), everything, 6)
    with pytest.raises(UserError, match="--references 5: recall need"):
        measure.check_sizes(("recall",), everything, 5)
