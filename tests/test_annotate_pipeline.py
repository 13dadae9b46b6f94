"""`kaleido annotate`: sidecars as the engines say, restarts, failures, lost and broken input."""

from __future__ import annotations

import fcntl
import json
import pathlib
import tarfile
import threading

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="the pipeline needs Beam: install the extra 'annotate'")
pytest.importorskip("pyarrow", reason="sidecars are Parquet files: install the extra 'annotate'")

from kaleido_jax import cli, cli_annotate, sidecars
from kaleido_jax.annotate import inputs, pipeline, stages, storage
from kaleido_jax.annotate.protocols import Result
from kaleido_jax.annotate.stages import AnnotationFailed, Plan
from kaleido_jax.data import WebDatasetSource
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LATENTS, combined
from tests.test_webdataset import SHARED, encoded, record, write_shard

ORACLE = {"text": "oracle", "bbox": "oracle", "blob": "oracle", "voken": "patch:default"}
TRIANGLE = [250, 100, 750, 100, 500, 900, 250, 100]


def thing(label: str = "dog") -> dict:
    return {"label": label, "bbox_xyxy": [250, 100, 750, 900], "polygon": TRIANGLE}


def shards(folder: pathlib.Path, count: int = 2, records: int = 12) -> list[pathlib.Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for shard in range(count):
        members = {}
        for number in range(records):
            members |= record(f"{number:03d}", number, [thing(f"dog {shard} {number}")])
        paths.append(write_shard(folder / f"{shard:05d}.tar", members))
    return paths


def run(data, out, engines=("bbox",), **more):
    chosen = {stage: ORACLE[stage] for stage in engines}
    return pipeline.run(pipeline.Run(data=str(data), out=str(out), engines=chosen, **more))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_sidecars_hold_what_the_source_says(tmp_path):
    shards(tmp_path / "data")
    manifest = run(tmp_path / "data", tmp_path / "out", tuple(ORACLE))
    source = WebDatasetSource(str(tmp_path / "data"), size=40, latents=tuple(ORACLE))
    for stage in ORACLE:
        rows = list(sidecars.iterate_stage(tmp_path / "out", stage))
        assert [row.key for row in rows] == [source[i]["key"] for i in range(len(source))]
        assert [row.latent for row in rows] == [example["latents"][stage] for example in source]
        assert {row.status for row in rows} == {"ok"}
    assert manifest["totals"]["records"] == 4 * 24 == manifest["totals"]["counts"]["ok"]
    for name, stage in manifest["stages"].items():
        assert stage["engine"] == ORACLE[name]
        assert stage["records"] == sum(s["records"] for s in stage["shards"].values()) == 24
        assert stage["provenance"]["engine"] == ORACLE[name].partition(":")[0]
        assert {"code_version", "seed", "input", "config_hash"} <= set(stage)
    assert not [name for name in files(tmp_path / "out") if name.endswith(".tmp")]


def test_what_is_done_is_left_alone(tmp_path, monkeypatch):
    shards(tmp_path / "data")
    first = run(tmp_path / "data", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "bbox").iterdir()}
    monkeypatch.setattr(pipeline, "_beam", None)  # not even loaded
    assert run(tmp_path / "data", tmp_path / "out") == first
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "bbox").iterdir()}
    assert after == before


def test_a_changed_setting_redoes_one_stage(tmp_path):
    shards(tmp_path / "data", 1)
    first = run(tmp_path / "data", tmp_path / "out", ("text", "bbox"))
    begun = [path for path in files(tmp_path / "out") if path.startswith("text/")]
    both = {"options": {"bbox": {"max_objects": 2}}}
    second = run(tmp_path / "data", tmp_path / "out", ("text", "bbox"), **both)
    assert second["stages"]["text"] == first["stages"]["text"]
    assert second["stages"]["bbox"]["config_hash"] != first["stages"]["bbox"]["config_hash"]
    found = files(tmp_path / "out")
    assert [path for path in found if path.startswith("text/")] == begun
    assert len([path for path in found if path.startswith("bbox/")]) == 4


def test_a_stage_more_keeps_the_others(tmp_path):
    shards(tmp_path / "data", 1)
    run(tmp_path / "data", tmp_path / "out", ("bbox",))
    manifest = run(tmp_path / "data", tmp_path / "out", ("text",))
    assert list(manifest["stages"]) == ["text", "bbox"]


def test_a_changed_shard_is_annotated_again(tmp_path):
    shards(tmp_path / "data", 2)
    run(tmp_path / "data", tmp_path / "out")
    write_shard(tmp_path / "data" / "00001.tar", record("new", 7, [thing("cat")]))
    manifest = run(tmp_path / "data", tmp_path / "out")
    assert sidecars.read_shard(tmp_path / "out", "bbox", "00001")[0].key == "00001/new"
    assert manifest["totals"]["records"] == 13


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    shards(tmp_path / "data", 4)
    run(tmp_path / "data", tmp_path / "one", ("bbox", "voken"))
    flags = ("--direct_num_workers=3", "--direct_running_mode=multi_threading")
    run(tmp_path / "data", tmp_path / "three", ("bbox", "voken"), flags=flags)
    assert files(tmp_path / "one") == files(tmp_path / "three")


# ---- failures ---------------------------------------------------------------------------------


def bad_shards(folder: pathlib.Path) -> None:
    """Twenty records: one broken picture, one broken JSON, one whose objects make no sense."""
    folder.mkdir()
    members = {}
    for number in range(20):
        members |= record(f"{number:03d}", number, [thing()])
    members["003.png"] = b"no picture"
    members["004.json"] = b"{"
    members["005.json"] = json.dumps({"objects": [{"label": "x"}]}).encode()
    write_shard(folder / "00000.tar", members)


def test_bad_examples_become_dead_letters(tmp_path):
    bad_shards(tmp_path / "data")
    manifest = run(tmp_path / "data", tmp_path / "out", max_failure_rate=0.2)
    stage = manifest["stages"]["bbox"]
    assert stage["counts"] | {"ok": 17, "failed": 3} == stage["counts"]
    rows = sidecars.read_shard(tmp_path / "out", "bbox", "00000")
    assert [row.key for row in rows] == [f"00000/{number:03d}" for number in range(20)]
    assert [row.status for row in rows[2:7]] == ["ok", "failed", "failed", "failed", "ok"]
    letters = sidecars.read_dead_letters(tmp_path / "out", "bbox", "00000", stage["config_hash"])
    assert [letter["key"] for letter in letters] == ["00000/003", "00000/004", "00000/005"]
    run(tmp_path / "data", tmp_path / "again", max_failure_rate=0.2)
    assert files(tmp_path / "out") == files(tmp_path / "again")
    for letter, words in zip(letters, ("picture", "JSON", "bbox_xyxy"), strict=True):
        assert words in letter["error"]
        assert letter["stage"] == "bbox"
        assert letter["attempt"] == 1


def test_too_many_failures_fail_the_run_once(tmp_path, capsys):
    bad_shards(tmp_path / "data")
    words = ["annotate", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--stages", "bbox"]) == 1
    error = capsys.readouterr().err
    assert "about 3 of 20 examples were rejected, failed or lost (15.0%)" in error
    letters = error.strip().rpartition("see ")[2]
    assert len(pathlib.Path(letters).read_text("utf-8").splitlines()) == 3
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match="has not finished"):
        sidecars.read_stage(tmp_path / "out", "bbox")
    # What was annotated is kept: a higher bound needs no second look at the pictures.
    before = files(tmp_path / "out")
    assert cli.main([*words, "--stages", "bbox", "--max-failure-rate", "0.15"]) == 0
    assert before.items() <= files(tmp_path / "out").items()
    assert "bbox              20            17" in capsys.readouterr().out


def test_an_engine_that_always_fails_stops_the_run(tmp_path):
    members = {}
    for number in range(8):
        members |= record(f"{number:03d}", number, [{"label": "x"}])
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "00000.tar", members)
    with pytest.raises(AnnotationFailed, match="'oracle' failed on all 8 pictures") as caught:
        run(tmp_path / "data", tmp_path / "out", max_failure_rate=1.0)
    assert "\n" not in str(caught.value)
    assert "00000/000: AnnotationError" in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_refused_shard_is_one_line_from_any_worker(tmp_path, capsys):
    shards(tmp_path / "data", 1)
    with tarfile.open(tmp_path / "data" / "00001.tar", "w") as tar:
        link = tarfile.TarInfo("x.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    words = ["annotate", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--stages", "bbox"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("'x.jpg' is not a regular file; refused\n")


def test_lost_records_and_shards_count(tmp_path):
    paths = shards(tmp_path / "data", 4, 10)
    with tarfile.open(paths[1]) as tar:
        last = next(m for m in tar.getmembers() if m.name == "009.png")
    with open(paths[1], "r+b") as file:
        file.truncate(last.offset_data + 10)
    paths[2].unlink()
    data = str(tmp_path / "data" / "{00000..00003}.tar")
    with pytest.raises(AnnotationFailed, match="about 11 of 40 examples"):
        run(data, tmp_path / "out")
    manifest = run(data, tmp_path / "out", max_failure_rate=0.3)
    stage = manifest["stages"]["bbox"]
    assert [s["records"] for s in stage["shards"].values()] == [10, 9, 0, 10]
    config_hash = stage["config_hash"]
    for shard, words in (("00001", "ends"), ("00002", "No such file")):
        letters = sidecars.read_dead_letters(tmp_path / "out", "bbox", shard, config_hash)
        assert words in letters[0]["error"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_shard_without_records_loses_nothing(tmp_path, alone):
    shards(tmp_path / "data", 0 if alone else 1, 3)
    write_shard(tmp_path / "data" / "00009.tar", {})
    manifest = run(tmp_path / "data", tmp_path / "out", max_failure_rate=0.0)
    empty = manifest["stages"]["bbox"]["shards"]["00009"]
    assert (empty["records"], empty["dead_letters"], empty["source"]["whole"]) == (0, 0, True)
    assert manifest["totals"]["records"] == (0 if alone else 3)


HOSTILE = {
    "half a surrogate pair": b'{"objects": [{"label": "a\\ud800", "bbox_xyxy": [0, 0, 900, 900]}]}',
    "digits": b'{"objects": ' + b"1" * 5000 + b"}",
    "number": b'{"objects": [{"label": "a", "bbox_xyxy": [1' + b"0" * 400 + b", 1, 2, 3]}]}",
    "label": b'{"objects": [{"label": "' + b"x" * 5000 + b'", "bbox_xyxy": [0, 0, 900, 900]}]}',
    "nesting": b"[" * 100_000,
}


def test_hostile_json_costs_one_record_each(tmp_path):
    shards(tmp_path / "data", 1, 8)
    members = {}
    for name, data in HOSTILE.items():
        members |= record(name, 1) | {f"{name}.json": data}
    write_shard(tmp_path / "data" / "00009.tar", members | record("good", 1, [thing()]))
    manifest = run(tmp_path / "data", tmp_path / "out", ("text", "bbox"), max_failure_rate=0.5)
    for stage in ("text", "bbox"):
        counts = manifest["stages"][stage]["counts"]
        assert (counts["ok"], counts["failed"]) == (9, len(HOSTILE))


class Moody:
    """Rejects some keys with even seeds, so that another try succeeds."""

    stage = "text"
    batch_size = 4

    def __init__(self):
        self.provenance = {"engine": "moody"}
        self.seen: list[list[str]] = []

    def setup(self) -> None:
        pass

    def annotate(self, examples, seed):
        self.seen.append([example.key for example in examples])
        return [
            Result("", "rejected", ("mumbles",), "mhm " * 2000)
            if example.key.endswith(("2", "7")) and seed % 2 == 0
            else Result(example.caption, "ok")
            for example in examples
        ]


def test_dead_letters_are_tried_again_on_demand(tmp_path):
    path = shards(tmp_path / "data", 1, 10)[0]
    engine = Moody()
    plan = Plan("text", "moody", engine, seed=0, image_size=64)
    shard, folder = inputs.find_shards(str(path))[0], storage.Folder(str(tmp_path / "out"))
    done = stages.annotate_shard(plan, engine, shard, folder)
    assert done["counts"]["rejected"] == done["dead_letters"] == 2
    assert [len(batch) for batch in engine.seen] == [4, 4, 2]
    letters = sidecars.read_dead_letters(folder.place, "text", "00000", plan.config_hash)
    assert {(x["key"], len(x["raw"]), x["attempt"]) for x in letters} == {
        ("00000/002", 2000, 1),
        ("00000/007", 2000, 1),
    }
    again = stages.annotate_shard(plan, engine, shard, folder, again=True)
    assert engine.seen[3:] == [["00000/002", "00000/007"]]
    assert again["counts"]["ok"] == 10
    assert again["dead_letters"] == 0
    rows = sidecars.read_sidecar(folder.place, "text", "00000", plan.config_hash)
    assert [row.latent for row in rows] == [f"picture {number}" for number in range(10)]
    assert not list(pathlib.Path(folder.place).rglob("*.dead.jsonl"))


# ---- around it --------------------------------------------------------------------------------


def test_engines_see_the_training_crop_no_larger_than_it_is(tmp_path):
    stored = {
        "key": "k",
        "image": encoded(np.zeros((40, 60, 3), np.uint8)),
        "caption": "c",
        "metadata": {},
    }
    assert inputs.read_example(stored, 512).image.shape == (40, 40, 3)
    small = inputs.read_example(stored, 16, "dog (0, 0, 9, 9)")
    assert small.image.shape == (16, 16, 3)
    assert small.stored == (60, 40)
    assert small.bbox == "dog (0, 0, 9, 9)"


def test_two_runs_never_share_a_folder(tmp_path):
    shards(tmp_path / "data", 1, 2)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `kaleido annotate`"):
            run(tmp_path / "data", tmp_path / "out")


def test_shards_of_one_name_are_refused(tmp_path):
    for name in ("a", "b"):
        shards(tmp_path / name, 1, 2)
    with pytest.raises(UserError, match="2 shards are called 00000"):
        run(f"{tmp_path / 'a'},{tmp_path / 'b'}", tmp_path / "out")


def test_a_pattern_names_shards(tmp_path):
    shards(tmp_path / "data", 3, 2)
    found = inputs.find_shards(str(tmp_path / "data" / "0000[12].tar"))
    assert [shard.name for shard in found] == ["00001", "00002"]
    with pytest.raises(UserError, match="no shard matches"):
        inputs.find_shards(str(tmp_path / "data" / "x*.tar"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "name --stages"),
        ("--stages ,", "--stages names none"),
        ("--stages text,boxes", "no stage 'boxes'"),
        ("--stages text --engine.bbox oracle", "bbox, which is not in --stages"),
        ("--stages text --option.text x", "write NAME=VALUE, not 'x'"),
        ("--stages text --option.text max_object=2", "did you mean max_objects?"),
        ("--stages text --option.text max_objects=few", "whole number of at least 0, not 'few'"),
        ("--stages voken --option.voken batch_size=0", "whole number of at least 1, not 0"),
        ("--stages text --option.text num_objects=[1]", "2 whole numbers, such as [1, 3]"),
        ("--stages blob --engine.blob hf:m --option.blob min_iou=NaN", "a finite number"),
        ("--engine.bbox hf:m --option.bbox dialect=3", "must be a word, not 3"),
        ("--engine.bbox qwen-vl:m --option.bbox trust_remote_code=1", "must be true or false"),
        ("--engine.text orcale", "did you mean oracle?"),
        ("--engine.voken oracle", "patch"),
        ("--stages text --max-failure-rate 2", "finite number from 0 to 1"),
        ("--stages text --data=", "--data is empty"),
        ("--stages text --out=", "--out is empty"),
        ("--stages text --option.text max_objects=" + "[" * 100_000, "whole number"),
        ("--stages text -- --direct_num_workers=x", "invalid int value: 'x'"),
        ("--stages text -- --direct_num_worker=2", "there is no option --direct_num_worker"),
        ("--stages text -- --runner=NoRunner", "Unexpected pipeline runner: NoRunner"),
    ],
)
def test_misuse_is_one_line(tmp_path, capsys, words, expected):
    shards(tmp_path / "data", 1, 1)
    common = ["annotate", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert cli.main([*common, *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error


def test_options_are_read_as_json_or_words():
    given = dict.fromkeys([f"engine.{stage}" for stage in ORACLE])
    given |= {f"option.{stage}": [] for stage in ORACLE} | {"stages": "text,blob"}
    given["option.text"] = ["a=3", "b=2.5", "c=[1, 2]", "d=x=y", "e=True", "f=false", "g="]
    engines, options = cli_annotate.engines_of(given)
    assert engines == {"text": "oracle", "blob": "oracle"}
    want = {"a": 3, "b": 2.5, "c": [1, 2], "d": "x=y", "e": True, "f": False, "g": ""}
    assert options == {"text": want, "blob": {}}


def test_beams_words_are_for_verbs_that_run_beam(capsys):
    assert cli.main(["train", "--config", "toy", "--", "--runner=FlinkRunner"]) == 2
    assert "only annotate and build take Beam's words" in capsys.readouterr().err


def test_an_engine_without_anything_to_say_is_noticed(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "0.tar", record("a", 1) | record("b", 2))
    manifest = run(tmp_path / "data", tmp_path / "out")
    assert manifest["stages"]["bbox"]["counts"]["empty"] == 2
    assert "had nothing to say of any picture" in capsys.readouterr().err


def test_progress_counts_shards_under_way(tmp_path):
    from kaleido_jax.annotate import progress, runner

    path = shards(tmp_path / "data", 1, 9)[0]
    engine = Moody()
    plan = Plan("text", "moody", engine, seed=1, image_size=64)
    shard, folder = inputs.find_shards(str(path))[0], storage.Folder(str(tmp_path / "out"))
    seen = []
    with runner._Teller(plan, shard, folder) as teller:
        teller._told = -10.0  # long ago

        def tell(done, total):
            teller(done, total)
            seen.append(progress.done_share(plan, ["00000"], folder))

        stages.annotate_shard(plan, engine, shard, folder, tell=tell, lock=threading.Lock())
    assert seen == [pytest.approx(4 / 9)] * 3  # the later ones came within a second
    assert progress.done_share(plan, ["00000"], folder) == 1
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.skipif(not (SHARED / "coco100").is_dir(), reason="needs ../shared/data/coco100")
def test_photographs_in_all_five_settings(tmp_path):
    manifest = run(SHARED / "coco100", tmp_path / "out", tuple(ORACLE))
    assert {stage["records"] for stage in manifest["stages"].values()} == {98}
    assert manifest["totals"]["counts"]["ok"] == 4 * 98
    latents = {stage: sidecars.read_stage(tmp_path / "out", stage) for stage in ORACLE}
    for key, (string, _) in latents["text"].items():
        parts = {name: latents[name][key][0] for name in ("text", "bbox", "voken")}
        assert string.startswith("There is a ")
        value = combined.Combined(**{name: LATENTS[name].parse(s) for name, s in parts.items()})
        assert combined.split(combined.write(value)) == parts
