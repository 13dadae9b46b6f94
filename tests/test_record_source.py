"""Records by number: the wire format, both file formats, what is missing, broken or hostile."""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_jax.data import Loader, RecordError, RecordSource, make_source, tf_example
from kaleido_jax.data.record_files import FORMATS, RecordFile
from kaleido_jax.errors import UserError
from kaleido_jax.tokens import Vocabulary
from tests.records import jpeg, record, write_folder

pytest.importorskip("array_record", reason="ArrayRecord needs the extra [data]")


def picture(number: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), 10 * number, np.uint8)


def key(number: int) -> str:
    return f"s/{number:03d}"


def box(number: int) -> str:
    return f"dog ({number}, 1, 9, 9)"


def records(count: int = 10, side: int = 16) -> list[dict]:
    return [
        record(
            f"s/{i:03d}", jpeg(picture(i, side)), side, f"picture {i}", bbox=f"dog ({i}, 1, 9, 9)"
        )
        for i in range(count)
    ]


# ---- the wire format --------------------------------------------------------------------------

values = st.lists(st.binary(max_size=300), min_size=1, max_size=3) | st.lists(
    st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4
)


@given(st.dictionaries(st.text(max_size=20), values, max_size=6))
@settings(max_examples=200, deadline=None)
def test_examples_come_back(features):
    assert tf_example.read(tf_example.write(features)) == features


@given(
    st.binary(max_size=200) | st.binary(max_size=40).map(lambda b: b"\x0a" + bytes([len(b)]) + b)
)
@settings(max_examples=2000, deadline=None)
def test_junk_raises_the_one_error(data):
    with contextlib.suppress(tf_example.ExampleError):
        tf_example.read(data)


def test_a_cut_example_is_told():
    data = tf_example.write(records(1)[0])
    broken = 0
    for end in range(len(data)):
        try:
            tf_example.read(data[:end])
        except tf_example.ExampleError:
            broken += 1
    assert broken == len(data) - 1  # zero bytes are an empty example


def test_the_wire_format_is_protobufs():
    proto = pytest.importorskip(
        "tensorflow_datasets.proto", reason="protobuf's own classes come with the extra [data]"
    ).tf_example_pb2
    features = {"b": [b"x", b""], "a": [1, -5, 2**62], "é": [b"\xff\x00"]}
    theirs = proto.Example.FromString(tf_example.write(features))
    assert list(theirs.features.feature["a"].int64_list.value) == features["a"]
    assert list(theirs.features.feature["b"].bytes_list.value) == features["b"]
    assert tf_example.read(theirs.SerializeToString()) == features
    theirs.features.feature["f"].float_list.value.append(1.0)
    with pytest.raises(tf_example.ExampleError, match="'f' holds neither"):
        tf_example.read(theirs.SerializeToString())


# ---- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", FORMATS)
def test_records_by_number(tmp_path, file_format):
    folder = write_folder(tmp_path / "tiny" / "1.0.0", records(), 3, file_format)
    source = RecordSource(str(tmp_path), latents=("bbox", "text"))
    assert source.folder == folder
    assert len(source) == 10
    for i in (9, 0, 3, 2, 6):
        example = source[i]
        assert example["key"] == f"s/{i:03d}"
        assert example["caption"] == f"picture {i}"
        assert example["latents"] == {"bbox": f"dog ({i}, 1, 9, 9)", "text": ""}
        assert np.all(example["image"] == 10 * i)
    assert source.encoded(4)["image"] == jpeg(picture(4))
    with pytest.raises(IndexError):
        source[10]


def test_sizes_and_the_config(tmp_path):
    write_folder(tmp_path, records(), 1)
    source = make_source({"name": "records", "path": str(tmp_path)}, 8, ("bbox",))
    assert source[2]["image"].shape == (8, 8, 3)
    assert source[2]["latents"] == {"bbox": "dog (2, 1, 9, 9)"}
    assert RecordSource(str(tmp_path))[2]["image"].shape == (16, 16, 3)


def test_the_newest_version_is_read(tmp_path):
    for version, count in (("1.9.0", 2), ("1.10.0", 3)):
        write_folder(tmp_path / "tiny" / version, records(count), 1)
    assert len(RecordSource(str(tmp_path / "tiny"))) == 3
    write_folder(tmp_path / "other" / "1.0.0", records(2), 1)
    with pytest.raises(UserError, match="several data sets; name one of"):
        RecordSource(str(tmp_path))


@pytest.mark.parametrize("file_format", FORMATS)
def test_threads_and_copies_read_the_same(tmp_path, file_format):
    write_folder(tmp_path, records(25), 2, file_format)
    source = pickle.loads(pickle.dumps(RecordSource(str(tmp_path))))
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: source.encoded(i % 25)["key"], range(500)))
    assert keys == [f"s/{i % 25:03d}" for i in range(500)]


def test_no_tensorflow_is_loaded(tmp_path):
    write_folder(tmp_path, records(), 1)
    code = (
        "import sys; from kaleido_jax.data import RecordSource; "
        f"print(RecordSource({str(tmp_path)!r})[3]['key']); "
        "print(*{'tensorflow', 'tensorflow_datasets', 'seqio', 'grain'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["s/003"]


def test_the_loader_reads_records(tmp_path):
    write_folder(tmp_path, records(10), 2)
    loader = Loader(
        RecordSource(str(tmp_path), ("bbox",)),
        Vocabulary.default(),
        latents=("bbox",),
        caption_length=8,
        latent_length=16,
        image_size=16,
        batch_size=5,
    )
    seen = [int(v) // 10 for step in (0, 1) for v in loader.batch(step).image[:, 0, 0, 0]]
    assert sorted(seen) == list(range(10))
    assert not loader.bad


# ---- what is wrong ----------------------------------------------------------------------------


def shards(folder):
    return sorted(p for p in folder.iterdir() if "-of-" in p.name)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_missing_file_keeps_the_numbers(tmp_path, file_format):
    write_folder(tmp_path, records(), 5, file_format)
    gone = shards(tmp_path)[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"{gone.name} is missing; 2 of 10 records are lost"):
        RecordSource(str(tmp_path))
    source = RecordSource(str(tmp_path), max_bad_fraction=0.3)
    assert source.bad == {str(gone): "the file is missing"}
    assert len(source) == 10
    assert [source[i]["key"] for i in (1, 4)] == ["s/001", "s/004"]
    with pytest.raises(RecordError, match="No such file") as caught:
        source[2]
    assert caught.value.where == f"{gone}: record 0"


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_truncated_file_is_told(tmp_path, file_format):
    write_folder(tmp_path, records(), 2, file_format)
    cut = shards(tmp_path)[1]
    with open(cut, "r+b") as file:
        file.truncate(cut.stat().st_size * 2 // 3)
    source = RecordSource(str(tmp_path))
    assert source[4]["key"] == "s/004"
    with pytest.raises(RecordError) as caught:
        source[7]
    assert caught.value.where.startswith(str(cut))


def test_a_flipped_byte_costs_one_record(tmp_path):
    noise = np.random.default_rng(0)
    many = [
        record(f"s/{i}", noise.bytes(3000), 32)
        for i in range(9)  # stored as they are
    ]
    write_folder(tmp_path, many, 1)
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(many[4]["image"][0]) + 300] ^= 0x10
    path.write_bytes(data)
    source = RecordSource(str(tmp_path))
    bad = []
    for i in range(9):
        try:
            source.encoded(i)
        except RecordError as error:
            bad.append((i, str(error)))
    assert [i for i, _ in bad] == [4]
    assert "hash mismatch" in bad[0][1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": [b"no picture"]}, "not a readable picture"),
        ({"height": [17]}, "the picture is 16 x 16, the record says 16 x 17"),
        ({"caption": [b"\xff\xfe"]}, "utf-8"),
        ({"caption": []}, "no single bytes in 'caption'"),
        ({"key": [b"a", b"b"]}, "no single bytes in 'key'"),
        ({"width": [b"16"]}, "no single int in 'width'"),
    ],
)
def test_hostile_records_are_skipped(tmp_path, change, reason):
    write_folder(tmp_path, [records(1)[0] | change, *records(3)[1:]], 1)
    source = RecordSource(str(tmp_path))
    with pytest.raises(RecordError, match=reason):
        source[0]
    assert source[1]["key"] == "s/001"


def test_misuse_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no such folder of records: .*none"):
        RecordSource(str(tmp_path / "none"))
    with pytest.raises(UserError, match="path' is empty"):
        RecordSource("")
    with pytest.raises(UserError, match="holds no records"):
        RecordSource(str(tmp_path))
    write_folder(tmp_path, records(), 2)
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        RecordSource(str(tmp_path), split="test")
    with pytest.raises(UserError, match="no latent 'depth'"):
        RecordSource(str(tmp_path), latents=("depth",))
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["10"]
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="1 files for the split 'train', the files' names say 2"):
        RecordSource(str(tmp_path))
    (tmp_path / "dataset_info.json").write_text("[1")
    with pytest.raises(UserError, match=r"dataset_info.json cannot be read"):
        RecordSource(str(tmp_path))


def test_files_without_metadata_are_counted(tmp_path):
    write_folder(tmp_path, records(), 2)
    (tmp_path / "dataset_info.json").unlink()
    assert len(RecordSource(str(tmp_path))) == 10
    assert len(RecordFile(shards(tmp_path)[0], "array_record")) == 5
    shards(tmp_path)[0].unlink()
    with pytest.raises(UserError, match=r"is missing, and there is no dataset_info\.json"):
        RecordSource(str(tmp_path))
