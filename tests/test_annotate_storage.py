"""Annotation of shards in a bucket into a bucket, and of TFDS splits."""

from __future__ import annotations

import os
import pathlib
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="buckets are Beam's: install the extra 'annotate'")
pytest.importorskip("pyarrow", reason="sidecars are Parquet files: install the extra 'annotate'")

from apache_beam.io.filesystem import FileMetadata, FileSystem

from kaleido_jax import sidecars
from kaleido_jax.annotate import inputs, pipeline, stages, storage
from kaleido_jax.annotate.engines import make_engine
from kaleido_jax.annotate.protocols import Result
from kaleido_jax.annotate.stages import AnnotationFailed, Plan
from kaleido_jax.errors import UserError
from tests.test_annotate_pipeline import ORACLE, files, shards


class Bucket(FileSystem):
    """`bucket://NAME`: a file system of Beam's kind in a folder, without folders of its own."""

    root: ClassVar[pathlib.Path]

    @classmethod
    def scheme(cls):
        return "bucket"

    def _path(self, name: str) -> pathlib.Path:
        return self.root / name.removeprefix("bucket://")

    def join(self, basepath, *paths):
        return "/".join([basepath.rstrip("/"), *paths])

    def split(self, path):
        head, _, tail = path.rpartition("/")
        return head, tail

    def mkdirs(self, path):
        raise NotImplementedError

    def has_dirs(self):
        return False

    def _list(self, dir_or_prefix):
        for path in sorted(self.root.rglob("*")):
            name = "bucket://" + path.relative_to(self.root).as_posix()
            if path.is_file() and name.startswith(dir_or_prefix):
                yield FileMetadata(name, path.stat().st_size)

    def create(self, path, mime_type="application/octet-stream", compression_type="auto"):
        self._path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(self._path(path), "wb")

    def open(self, path, mime_type="application/octet-stream", compression_type="auto"):
        return open(self._path(path), "rb")

    def exists(self, path):
        return self._path(path).is_file()

    def size(self, path):
        return self._path(path).stat().st_size

    def metadata(self, path):
        return FileMetadata(path, self.size(path))

    def last_updated(self, path):
        return self._path(path).stat().st_mtime

    def checksum(self, path):
        return str(self.size(path))

    def copy(self, source_file_names, destination_file_names):
        raise NotImplementedError

    def rename(self, source_file_names, destination_file_names):
        raise NotImplementedError

    def delete(self, paths):
        raise NotImplementedError


@pytest.fixture
def bucket(tmp_path):
    Bucket.root = tmp_path / "bucket"
    Bucket.root.mkdir()
    return Bucket.root


def run(data, out, engines=tuple(ORACLE), **more):
    chosen = {stage: ORACLE[stage] for stage in engines}
    return pipeline.run(pipeline.Run(data=str(data), out=str(out), engines=chosen, **more))


def test_from_bucket_to_bucket(bucket, tmp_path, monkeypatch):
    shards(bucket / "data", 2, 3)
    whole = run(bucket / "data", tmp_path / "here")
    there = run("bucket://data", "bucket://out/")
    assert there["totals"] == whole["totals"]
    want = {k: v for k, v in files(tmp_path / "here").items() if "/" in k}
    assert {k: v for k, v in files(bucket / "out").items() if "/" in k} == want
    assert sidecars.read_stage(bucket / "out", "bbox") == sidecars.read_stage(
        tmp_path / "here", "bbox"
    )
    monkeypatch.setattr(pipeline, "_beam", None)  # nothing is left to do
    assert run("bucket://data", "bucket://out") == there


def test_a_bucket_whose_run_was_cut_goes_on(bucket, tmp_path):
    shards(bucket / "data", 3, 3)
    run("bucket://data", "bucket://out", ("bbox",))
    want = files(bucket / "out")
    for path in (bucket / "out" / "bbox").glob("00001.*.done.json"):
        path.unlink()
    (bucket / "out" / "manifest.json").unlink()
    left = {path: path.stat().st_mtime_ns for path in (bucket / "out" / "bbox").glob("0000[02]*")}
    run("bucket://data", "bucket://out", ("bbox",))
    assert files(bucket / "out") == want
    assert {path: path.stat().st_mtime_ns for path in left} == left


def test_shards_of_a_bucket(bucket):
    shards(bucket / "data", 3, 1)

    def names(place):
        return [shard.name for shard in inputs.find_shards(place)]

    assert names("bucket://data") == names("bucket://data/") == ["00000", "00001", "00002"]
    assert names("bucket://data/0000[12].tar") == ["00001", "00002"]
    assert names("bucket://data/{00002..00004}.tar,bucket://data/00000.tar") == [
        "00002", "00003", "00004", "00000",
    ]  # fmt: skip
    for place, words in (
        ("bucket://none", "no shard matches"),
        ("bucket://data/{3..1}.tar", "must rise"),
        ("nowhere://data", "nowhere://data"),
    ):
        with pytest.raises(UserError, match=words):
            inputs.find_shards(place)


def test_a_missing_shard_of_a_bucket_is_lost(bucket):
    shards(bucket / "data", 1, 3)
    data = "bucket://data/{00000..00001}.tar"
    with pytest.raises(AnnotationFailed, match=r"about 3 of 6 .* see bucket://out/bbox/00001\."):
        run(data, "bucket://out", ("bbox",))


class Boxed:
    """A blob engine that starts from boxes and says which it got."""

    stage, batch_size = "blob", 2

    def __init__(self):
        self.provenance = {"engine": "boxed"}
        self.boxes: dict[str, str | None] = {}

    def setup(self) -> None:
        pass

    def annotate(self, examples, seed):
        self.boxes |= {example.key: example.bbox for example in examples}
        return [Result("", "empty") for _ in examples]


@pytest.mark.parametrize("remote", [False, True])
def test_blobs_start_from_the_boxes_of_their_shard(bucket, remote):
    shards(bucket / "data", 2, 3)
    out = "bucket://out" if remote else str(bucket / "out")
    manifest = run(bucket / "data", out, ("bbox",))
    engine = Boxed()
    assert stages.reads_boxes(engine)
    assert not stages.reads_boxes(make_engine("blob", "oracle"))
    after = manifest["stages"]["bbox"]["config_hash"]
    plan = Plan("blob", "boxed", engine, 0, 64, after)
    assert plan.config_hash != Plan("blob", "boxed", engine, 0, 64, "0").config_hash
    shard = inputs.find_shards(str(bucket / "data"))[1]
    stages.annotate_shard(plan, engine, shard, storage.Folder(out))
    rows = sidecars.read_shard(bucket / "out", "bbox", "00001")
    assert engine.boxes == {row.key: row.latent for row in rows}


def test_blobs_without_boxes_are_refused_before_anything_is_read(tmp_path):
    shards(tmp_path / "data", 1, 1)
    (tmp_path / "sam").mkdir()
    (tmp_path / "sam" / "config.json").write_text('{"model_type": "sam"}', "utf-8")
    settings = pipeline.Run(
        data=str(tmp_path / "data"),
        out=str(tmp_path / "out"),
        engines={"blob": f"hf:{tmp_path / 'sam'}"},
    )
    with pytest.raises(UserError, match="has no stage bbox; annotate bbox too"):
        pipeline.run(settings)


# ---- TFDS ---------------------------------------------------------------------------------------


def write_tfds(folder: pathlib.Path, pictures: np.ndarray, labels=("dog", "owl")) -> None:
    """A prepared TFDS data set `tiny` of pictures labelled in turns, four to a file."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.sequential_writer import SequentialWriter

    place = folder / "tiny" / "1.0.0"
    place.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=pictures.shape[1:]),
            "label": tfds.features.ClassLabel(names=list(labels)),
        }
    )
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="tiny", version=tfds.core.Version("1.0.0"), data_dir=str(place), module_name=""
    )
    writer = SequentialWriter(tfds.core.DatasetInfo(builder=identity, features=features), 4)
    writer.initialize_splits(["train"])
    examples = [{"image": image, "label": i % len(labels)} for i, image in enumerate(pictures)]
    writer.add_examples({"train": examples})
    writer.close_all()


@pytest.mark.slow
def test_a_tfds_split_shard_by_shard(tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="TFDS: install the extra 'data'")
    pictures = np.random.default_rng(0).integers(0, 256, (10, 24, 20, 3), np.uint8)
    write_tfds(tmp_path, pictures)
    found = inputs.find_shards("tfds:tiny/train", str(tmp_path))
    assert [shard.name for shard in found] == [f"tiny-train-0000{n}" for n in range(3)]
    opened = inputs.open_shard(found[1], "")
    assert len(opened) == 4
    stored = opened.stored(1)
    assert stored["caption"] == "a photo of an owl"
    assert stored["metadata"] == {"label": "owl"}
    np.testing.assert_array_equal(inputs.read_example(stored, 99).image, pictures[5][2:22])
    manifest = run("tfds:tiny/train", tmp_path / "out", ("voken",), data_dir=str(tmp_path))
    assert manifest["totals"]["counts"]["ok"] == 10
    keys = list(sidecars.read_stage(tmp_path / "out", "voken"))
    assert keys == [f"tiny-train.tfrecord-0000{n // 4}__{n % 4}" for n in range(10)]
    for name, words in (
        ("tfds:tiny/test", "no split 'test'"),
        ("tfds:tinny/train", "no such data set"),
        ("tfds:tiny", "write tfds:NAME/SPLIT"),
    ):
        with pytest.raises(UserError, match=words):
            inputs.find_shards(name, str(tmp_path))
    os.truncate(next((tmp_path / "tiny").rglob("*.tfrecord-00001")), 100)
    bad = inputs.open_shard(found[1], "")
    assert (len(bad), bad.whole, bad.lost[0][0]) == (0, False, "tiny-train-00001")


@pytest.mark.slow
def test_classes_of_imagenet_have_names(tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="TFDS: install the extra 'data'")
    write_tfds(tmp_path, np.zeros((3, 16, 16, 3), np.uint8), ("n01440764", "n99999999"))
    opened = inputs.open_shard(inputs.find_shards("tfds:tiny/train", str(tmp_path))[0], "")
    assert [opened.stored(i)["metadata"]["label"] for i in range(2)] == ["tench", "n99999999"]
    assert opened.stored(2)["caption"] == "a photo of a tench"


# ---- models -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_work_in_beams_workers(tmp_path):
    """Real classes with random weights: words that reject, boxes by the oracle, masks by SAM."""
    pytest.importorskip("torch", reason="models need torch: install the extra 'annotate'")
    pytest.importorskip("transformers", reason="models: install the extra 'annotate'")
    from tests import tiny_annotators as tiny

    shards(tmp_path / "data", 2, 3)
    engines = {
        "text": f"hf:{tiny.qwen(tmp_path / 'qwen')}",
        "bbox": "oracle",
        "blob": f"hf:{tiny.sam(tmp_path / 'sam')}",
    }
    settings = {
        "data": str(tmp_path / "data"),
        "engines": engines,
        "options": {
            "text": {"max_new_tokens": 4},
            "blob": {"min_iou": -100.0, "min_inside": 0.0},
        },
        "max_failure_rate": 1.0,
    }
    outs = [str(tmp_path / name) for name in ("one", "two")]
    threads = ("--direct_num_workers=2", "--direct_running_mode=multi_threading")
    manifest = pipeline.run(pipeline.Run(out=outs[0], **settings))
    pipeline.run(pipeline.Run(out=outs[1], flags=threads, **settings))
    assert files(pathlib.Path(outs[0])) == files(pathlib.Path(outs[1]))
    stages_ = manifest["stages"]
    assert stages_["text"]["provenance"]["model"] == "qwen"
    assert stages_["blob"]["after"] == stages_["bbox"]["config_hash"]
    assert [stages_[name]["counts"]["failed"] for name in engines] == [0, 0, 0]
    for row in sidecars.iterate_stage(outs[0], "text"):
        assert row.status in ("ok", "repaired", "empty", "rejected"), row
