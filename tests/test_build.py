"""`kaleido build`: the join of pictures and latents, who can read what it wrote, reruns."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from kaleido_jax import cli, cli_build, sidecars
from kaleido_jax.data import RecordSource, ShapesSource, datasets
from kaleido_jax.data.transforms import training_picture
from kaleido_jax.errors import UserError
from tests import builds
from tests.test_webdataset import encoded

for module in ("tensorflow_datasets", "array_record", "apache_beam", "pyarrow"):
    pytest.importorskip(module, reason="kaleido build needs the extras [annotate] and [data]")

from kaleido_jax.data import build_inputs, records  # noqa: E402

STATUSES = (*sidecars.STATUSES, "absent")


def adds_up(manifest: dict) -> None:
    """The counts of a manifest agree with one another."""
    for split in manifest["splits"].values():
        shards = split["shards"].values()
        assert split["listed"] == split["records"] + sum(split["skipped"].values())
        assert split["records"] == sum(shard["records"] for shard in shards)
        assert split["lost"] == sum(shard["lost"] for shard in shards)
        for statuses in split["latents"].values():
            assert tuple(statuses) == STATUSES
            assert sum(statuses.values()) == split["records"]
        for shard in shards:
            assert (shard["file"] is None) == (shard["records"] == 0)
            if shard["file"]:
                assert manifest["files"][shard["file"]]["records"] == shard["records"]
    totals = manifest["totals"]
    assert totals["records"] == sum(file["records"] for file in manifest["files"].values())
    assert totals["listed"] == totals["records"] + totals["skipped"]


# ---- the join ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two shards with boxes for both and a text for some: (build, manifest, shards)."""
    root = tmp_path_factory.mktemp("built")
    shards = builds.write_shards(root / "shards")
    latents = builds.annotate_shards(root / "latents")
    text = {
        f"{s:05d}": [
            sidecars.Row(f"{s:05d}/k{4 * s + n:03d}", *given)
            for n, given in enumerate(
                [("A dog.", "ok"), ("A cat.", "repaired"), ("", "empty"), ("", "failed")]
            )
        ]
        for s in range(2)
    }
    builds.annotate(root / "latents", text, "text")
    settings = builds.settings(root / "out", str(root / "shards"), annotations={"train": latents})
    return settings, records.build(settings), shards


def test_pictures_captions_and_latents_meet_by_key(built):
    settings, _, _ = built
    source = RecordSource(settings.out)
    assert source.folder == settings.folder
    assert len(source) == 8
    for i in range(8):
        example = source[i]
        assert example["key"] == f"0000{i // 4}/k{i:03d}"
        assert example["caption"] == f"picture {i}"
        assert example["latents"]["bbox"] == builds.box(example["key"])
        assert example["latents"]["text"] == ["A dog.", "A cat.", "", ""][i % 4]
        assert example["latents"]["blob"] == example["latents"]["voken"] == ""
        want, _, _ = training_picture(encoded(builds.photograph(i)), 16)
        np.testing.assert_array_equal(example["image"], want)


def test_the_manifest_says_what_became_of_everything(built):
    settings, manifest, shards = built
    adds_up(manifest)
    split = manifest["splits"]["train"]
    assert split["latents"]["text"] == dict(zip(STATUSES, (2, 2, 2, 0, 2, 0)))
    assert split["latents"]["bbox"] == dict(zip(STATUSES, (8, 0, 0, 0, 0, 0)))
    assert split["latents"]["voken"] == dict(zip(STATUSES, (0, 0, 0, 0, 0, 8)))
    assert split["shards"]["00001"]["source"] == {"bytes": shards[1].stat().st_size}
    assert split["annotation"]["stages"]["bbox"] == {"engine": "hand", "config_hash": builds.HASH}
    hashes = builds.tree(settings.folder)
    assert {n: f["sha256"] for n, f in manifest["files"].items()}.items() <= hashes.items()
    assert not (settings.folder / "quarantine.jsonl").exists()
    names = {path.name for path in settings.folder.parent.iterdir()}
    assert names == {"1.0.0", ".lock"}


def test_tfds_reads_the_records(built):
    import tensorflow_datasets as tfds

    settings, _, _ = built
    builder = tfds.builder_from_directory(settings.folder)
    assert builder.info.full_name == "tiny/16/1.0.0"
    assert builder.info.splits["train"].num_examples == 8
    source = RecordSource(settings.out)
    for mine, theirs in zip(map(source.__getitem__, range(8)), builder.as_data_source("train")):
        assert theirs["key"].decode() == mine["key"]
        assert theirs["bbox"].decode() == mine["latents"]["bbox"]
        assert (theirs["height"], theirs["width"]) == (16, 16)
        np.testing.assert_array_equal(theirs["image"], mine["image"])


def test_tfrecord_holds_the_same(built, tmp_path):
    import tensorflow_datasets as tfds

    first, _, _ = built
    settings = builds.settings(
        tmp_path, first.images["train"], annotations=first.annotations, file_format="tfrecord"
    )
    records.build(settings)
    mine, theirs = RecordSource(settings.out), RecordSource(first.out)
    for i in range(8):
        assert mine.encoded(i) == theirs.encoded(i)
    dataset = tfds.builder_from_directory(settings.folder).as_dataset("train")
    keys = {bytes(example["key"]).decode() for example in tfds.as_numpy(dataset)}
    assert keys == {mine.encoded(i)["key"] for i in range(8)}


def test_jpeg_has_the_stated_quality(built, tmp_path):
    first, _, _ = built
    sizes = []
    for size, quality in ((16, 95), (144, 95), (144, 50)):
        settings = builds.settings(
            tmp_path, first.images["train"], size=size, encoding="jpeg", quality=quality,
            version=f"1.0.{quality}",
        )  # fmt: skip
        manifest = records.build(settings)
        assert manifest["settings"]["quality"] == quality
        data = RecordSource(str(settings.folder)).encoded(0)["image"]
        sizes.append(len(data))
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.size) == ("JPEG", (size, size))
        # Chroma at half resolution only above 128 pixels.
        assert (image.layer[1][1:3], image.layer[0][1:3]) == (
            (1, 1),
            (2, 2) if size > 128 else (1, 1),
        )
    assert sizes[2] < sizes[1] / 2


def test_a_rerun_changes_nothing_and_another_input_is_refused(built):
    settings, manifest, _ = built
    before = {path: path.stat().st_mtime_ns for path in settings.folder.iterdir()}
    assert records.build(settings) == manifest
    assert {path: path.stat().st_mtime_ns for path in settings.folder.iterdir()} == before
    for change in ({"encoding": "jpeg"}, {"annotations": {}}, {"class_names": {"a": "b"}}):
        with pytest.raises(UserError, match=r"1\.0\.0 was built from other input or settings"):
            records.build(dataclasses.replace(settings, **change))


def test_a_version_that_is_not_whole_is_told(built, tmp_path):
    settings = builds.settings(tmp_path, built[0].images["train"])
    records.build(settings)
    file = next(settings.folder.glob("*-of-*"))
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match="00000-of-00002 is missing or not whole"):
        records.build(settings)
    (settings.folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"its manifest\.json cannot be read"):
        records.build(settings)


# ---- keys that do not match -------------------------------------------------------------------


def test_mismatches_are_errors_that_name_keys(tmp_path):
    shards = builds.write_shards(tmp_path / "shards")
    keys = {f"{s:05d}": [f"k{4 * s + n:03d}" for n in range(4)] for s in range(2)}

    def build(name, rows, **source):
        latents = builds.annotate(tmp_path / name, rows, **source)
        records.build(
            builds.settings(
                tmp_path / "out", str(tmp_path / "shards"), annotations={"train": latents}
            )
        )

    good = {shard: builds.rows(shard, names) for shard, names in keys.items()}
    with pytest.raises(
        UserError, match=r"stage bbox says nothing of 00001/k005, 00001/k007 in .*1.tar"
    ):
        build("a", {**good, "00001": builds.rows("00001", ["k004", "k006"])})
    with pytest.raises(UserError, match=r"keys that are not in .*00000\.tar: 00000/k900"):
        build("b", {**good, "00000": builds.rows("00000", [*keys["00000"], "k900"])})
    with pytest.raises(UserError, match="stage bbox has no shard '00001'"):
        build("c", {"00000": good["00000"]})
    with pytest.raises(UserError, match=r"has \d+ bytes, but had 1 when stage bbox was annotated"):
        build("d", good, bytes=1)
    many = builds.rows("00000", [*keys["00000"], *(f"x{n:03d}" for n in range(7))])
    with pytest.raises(UserError, match=r"x000, .*x004 and 2 more; annotate the same shards"):
        build("e", {**good, "00000": many})
    assert not list((tmp_path / "out").rglob("manifest.json"))
    build("f", good, bytes=shards[0].stat().st_size)  # nothing of the failures is in the way
    assert len(RecordSource(str(tmp_path / "out"))) == 8


# ---- what is built from -----------------------------------------------------------------------


def test_shapes_bring_their_own_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(build_inputs, "_SHAPES_PER_UNIT", 4)
    settings = builds.settings(tmp_path, "shapes:10:3", size=32)
    manifest = records.build(settings)
    adds_up(manifest)
    assert [s["records"] for s in manifest["splits"]["train"]["shards"].values()] == [4, 4, 2]
    source = RecordSource(settings.out)
    truth = ShapesSource(10, seed=3, size=32, latents=("text", "bbox", "blob", "voken"))
    for i in (0, 5, 9):
        mine, theirs = source[i], truth[i]
        np.testing.assert_array_equal(mine.pop("image"), theirs.pop("image"))
        assert mine == theirs


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A small prepared TFDS data set with ImageNet's labels; returns its folder."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")

    class TinyClasses(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            label = tfds.features.ClassLabel(names=["n01440764", "n01443537"])
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(6), "validation": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": builds.photograph(i), "label": i % 2}

    TinyClasses(data_dir=folder).download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return folder


def test_classes_of_tfds_become_captions(classes, tmp_path):
    settings = builds.settings(
        tmp_path,
        {"train": "tfds:tiny_classes/train", "validation": "tfds:tiny_classes/validation"},
        class_names=datasets.imagenet_class_names(),
        data_dir=str(classes),
    )
    manifest = records.build(settings)
    adds_up(manifest)
    assert {name: split["records"] for name, split in manifest["splits"].items()} == {
        "train": 6,
        "validation": 2,
    }
    source = RecordSource(settings.out)
    examples = [source[i] for i in range(6)]
    assert sorted(e["caption"] for e in examples) == ["goldfish"] * 3 + ["tench"] * 3
    pictures = [training_picture(encoded(builds.photograph(i)), 16)[0] for i in range(6)]
    for example in examples:
        number = next(i for i, p in enumerate(pictures) if np.array_equal(p, example["image"]))
        assert example["caption"] == ["tench", "goldfish"][number % 2]
    assert len(RecordSource(settings.out, split="validation")) == 2
    with pytest.raises(UserError, match="there is no name for its class 'n01443537'"):
        records.build(
            dataclasses.replace(settings, out=str(tmp_path / "b"), class_names={"n01440764": "x"})
        )


def test_imagenet_has_a_name_for_every_class():
    names = datasets.imagenet_class_names()
    assert len(names) == 1000
    assert names["n02123045"] == "tabby"
    assert all(name and name == name.strip() for name in names.values())


def test_class_names_of_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("n01440764 tench, Tinca tinca\n\nn01443537\tgoldfish\n")
    assert datasets.read_class_names(str(path)) == {"n01440764": "tench", "n01443537": "goldfish"}
    for text, reason in (("n1\n", "line 1"), ("a b\na c\n", "line 2"), ("\n", "names no class")):
        path.write_text(text)
        with pytest.raises(UserError, match=reason):
            datasets.read_class_names(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        datasets.read_class_names(str(tmp_path / "none"))


# ---- the verb ---------------------------------------------------------------------------------


def test_the_verb_builds_and_prints(tmp_path, capsys):
    builds.write_shards(tmp_path / "shards")
    latents = builds.annotate_shards(tmp_path / "latents")
    words = ["build", "mine", "--images", str(tmp_path / "shards"), "--latents", latents]
    assert cli.main([*words, "--size", "16", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "train: 8 records of 8 examples, 0 skipped, 0 lost in broken shards"
    assert out[3].split() == ["bbox", "8", "0", "0", "0", "0", "0"]
    assert out[-1] == f"records and manifest: {tmp_path / 'out' / 'mine' / '16' / '1.0.0'}"
    manifest = json.loads((tmp_path / "out/mine/16/1.0.0/manifest.json").read_text())
    assert manifest["settings"]["encoding"] == "jpeg"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["Mine", "--images", "x"], "'Mine' cannot name a data set"),
        (["mine"], "name --images"),
        (["mine", "--images", "none"], "no such folder or shard: none"),
        (["mine", "--images", "a=x", "--images", "a=y"], "--images gives split 'a' twice"),
        (["mine", "--images", "train="], "names nothing"),
        (["mine", "--images", "all=x"], "'all' cannot name a split"),
        (["mine", "--images", "x", "--version", "1"], "three numbers are needed"),
        (["mine", "--images", "x", "--latents", "val=y"], "split 'val', which has no --images"),
        (["mine", "--images", "x", "--latents", "none"], "none/manifest.json is missing"),
        (
            ["mine", "--images", "gs://a/b.tar"],
            "gs://a/b.tar is not on a file system of this machine",
        ),
        (["mine", "--images", "shapes:0"], "at least one example"),
        (["mine", "--images", "shapes:1", "--", "--direct_num_workers=x"], "invalid int value"),
        (["mine", "--images", "shapes:1", "--", "--wrong=2"], "there is no option --wrong"),
        (["mine", "--images", "shapes:x"], "write shapes:COUNT"),
        (["mine", "--images", "tfds:cifar10"], "write tfds:NAME/SPLIT"),
        (["mine", "--images", "x", "--class-names", "none"], "none cannot be read"),
        (["mine", "--images", "x", "--qualty", "9"], "did you mean '--quality'"),
    ],
)
def test_misuse_is_one_line(words, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["build", "--out", "out", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert "\n" not in error


def test_splits_of_the_command_line():
    assert cli_build.by_split(["a/b=c.tar"], "--images") == {"train": "a/b=c.tar"}
    assert cli_build.by_split(["x", "validation=y"], "--images") == {
        "train": "x",
        "validation": "y",
    }


def test_what_a_worker_finds_wrong_is_one_line(tmp_path, capsys):
    builds.write_shards(tmp_path / "shards")
    latents = builds.annotate(tmp_path / "latents", {"00000": builds.rows("00000", ["k000"])})
    words = ["build", "mine", "--images", str(tmp_path / "shards"), "--latents", latents]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert "says nothing of 00000/k001, 00000/k002, 00000/k003" in error
    assert "\n" not in error
