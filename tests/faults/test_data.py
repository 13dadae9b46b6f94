"""Broken, missing and hostile shards, pictures and annotations."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kaleido_jax.data import Loader, RecordError, WebDatasetSource, oracle
from kaleido_jax.data.transforms import Frame, ImageError, decode_image
from kaleido_jax.errors import UserError
from kaleido_jax.latents import LATENTS
from kaleido_jax.tokens import Vocabulary
from tests.test_webdataset import encoded, record, write_shard


def shards(folder, count: int = 3, records: int = 20):
    """Whole shards of numbered records; returns their paths."""
    paths = []
    for shard in range(count):
        members = {}
        for number in range(records):
            members |= record(f"{number:03d}", number)
        paths.append(write_shard(folder / f"{shard:05d}.tar", members))
    return paths


def loader(source, **more):
    settings = {
        "latents": ("bbox",),
        "caption_length": 8,
        "latent_length": 16,
        "image_size": 32,
        "batch_size": 10,
        **more,
    }
    return Loader(source, Vocabulary.default(), **settings)


def test_a_truncated_shard_is_counted_with_its_key(tmp_path):
    paths = shards(tmp_path)
    with tarfile.open(paths[1]) as tar:
        last = next(m for m in tar.getmembers() if m.name == "019.png")
    with open(paths[1], "r+b") as file:
        file.truncate(last.offset_data + 10)
    source = WebDatasetSource(str(tmp_path), size=32, max_bad_fraction=0.1)
    assert len(source) == 59
    assert source.bad[f"{paths[1]}: 019"] == "the shard ends within .png"
    assert [source[i]["key"] for i in (38, 39)] == ["00001/018", "00002/000"]
    with pytest.raises(UserError, match=r"of 6[01] records are lost.*00001\.tar"):
        WebDatasetSource(str(tmp_path), size=32, max_bad_fraction=0.001)


def test_a_shard_cut_in_a_header_keeps_what_is_whole(tmp_path):
    paths = shards(tmp_path)
    with tarfile.open(paths[2]) as tar:
        middle = next(m for m in tar.getmembers() if m.name == "010.png")
    with open(paths[2], "r+b") as file:
        file.truncate(middle.offset + 100)
    source = WebDatasetSource(str(tmp_path), size=32, max_bad_fraction=0.3)
    assert len(source) == 50
    assert str(paths[2]) in source.bad
    with pytest.raises(UserError, match="about 10 of 60 records are lost"):
        WebDatasetSource(str(tmp_path), size=32)


def test_a_flipped_byte_in_a_header_is_seen(tmp_path):
    paths = shards(tmp_path)
    with tarfile.open(paths[0]) as tar:
        middle = next(m for m in tar.getmembers() if m.name == "010.png")
    with open(paths[0], "r+b") as file:
        file.seek(middle.offset + 3)
        file.write(b"~")
    source = WebDatasetSource(str(tmp_path), size=32, max_bad_fraction=0.3)
    assert len(source) == 50
    assert source.bad[str(paths[0])].startswith("truncated or broken after")


def test_a_missing_shard_is_counted(tmp_path):
    paths = shards(tmp_path)
    paths[1].unlink()
    names = str(tmp_path / "{00000..00002}.tar")
    source = WebDatasetSource(names, size=32, max_bad_fraction=0.4)
    assert len(source) == 40
    assert source.bad == {str(paths[1]): "No such file or directory"}
    with pytest.raises(UserError, match="about 20 of 60 records are lost"):
        WebDatasetSource(names, size=32)


def test_a_shard_truncated_while_it_is_read(tmp_path):
    (path,) = shards(tmp_path, 1)
    source = WebDatasetSource(str(path), size=32)
    with open(path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(RecordError, match="ends within") as caught:
        source[19]
    assert caught.value.where == f"{path}: 019"


def test_something_else_than_a_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match=r"no whole record.*a\.tar: not a whole tar"):
        WebDatasetSource(str(tmp_path))


def _link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "member",
    [
        _link("a.png", tarfile.SYMTYPE),
        _link("a.png", tarfile.LNKTYPE),
        _link("a.png", tarfile.CHRTYPE),
        _link("a.png", tarfile.FIFOTYPE),
        tarfile.TarInfo("../a.png"),
        tarfile.TarInfo("b/../../a.png"),
        tarfile.TarInfo("/etc/a.png"),
    ],
)
def test_links_and_outside_names_are_refused(tmp_path, member):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(member)
    with pytest.raises(UserError, match="refused"):
        WebDatasetSource(str(tmp_path))


def test_bad_records_are_skipped_and_named(tmp_path):
    members = {}
    for number in range(60):
        members |= record(f"{number:03d}", number)
    picture = members["001.png"]
    members["001.png"] = picture[: len(picture) // 2]
    members["002.json"] = b"{broken"
    members["003.txt"] = b"\xff\xfe\xfa"
    del members["004.txt"]
    del members["005.png"]
    del members["006.json"]  # fine: then there are no latents
    write_shard(tmp_path / "a.tar", members)
    source = WebDatasetSource(str(tmp_path), size=32)
    assert len(source) == 59  # a record without its picture is left out by the index
    reader = loader(source, max_bad_fraction=0.1)
    for step in range(12):
        reader.batch(step)
    assert {place.rsplit(" ", 1)[1] for place in reader.bad} == {"001", "002", "003", "004"}
    assert all(place.startswith(str(tmp_path / "a.tar")) for place in reader.bad)
    with pytest.raises(UserError, match="more than the share"):
        loader(source, max_bad_fraction=0.02, batch_size=100).batch(0)


def test_one_pixel_and_bombs_are_refused():
    with pytest.raises(ImageError, match="too few"):
        decode_image(encoded(np.zeros((1, 1, 3), np.uint8)))
    with pytest.raises(ImageError, match="too many"):
        decode_image(encoded(np.zeros((64, 64, 3), np.uint8)), max_pixels=1000)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    # Says 60,000 x 60,000 in a few bytes: refused before any pixel is decoded.
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    with pytest.raises(ImageError, match=r"too many|not a readable"):
        decode_image(bomb)


def test_oversized_members_are_left_out(tmp_path):
    members = record("000") | record("001")
    info = tarfile.TarInfo("002.json")
    info.size = 9 * 2**20
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        tar.addfile(info, io.BytesIO(bytes(info.size)))
        entry = tarfile.TarInfo("002.png")
        entry.size = len(members["000.png"])
        tar.addfile(entry, io.BytesIO(members["000.png"]))
    source = WebDatasetSource(str(tmp_path), max_bad_fraction=0.5)
    assert len(source) == 2
    assert "more than" in source.bad[f"{tmp_path / 'a.tar'}: 002"]


PICTURE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
JPEG, PNG = encoded(PICTURE, "JPEG"), encoded(PICTURE)


@given(st.sampled_from([JPEG, PNG]), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_pictures_raise_one_kind_of_error(data, draw):
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    damaged = bytes(damaged[: draw.draw(st.integers(1, len(data)))])
    try:
        pixels, orientation = decode_image(damaged)
    except ImageError:
        return
    assert pixels.ndim == 3
    assert orientation in range(1, 9)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.sampled_from(["label", "bbox_xyxy", "polygon", "objects"]), inner)
    ),
    max_leaves=12,
)


@given(
    JSON_VALUES
    | st.fixed_dictionaries(
        {
            "objects": st.lists(
                st.fixed_dictionaries(
                    {
                        "label": st.text(max_size=6) | JSON_VALUES,
                        "bbox_xyxy": st.lists(st.integers(-5, 1005) | st.floats(), max_size=5),
                        "polygon": st.lists(st.floats(-10, 1010) | st.floats(), max_size=9),
                    }
                ),
                max_size=3,
            )
        }
    )
)
@settings(max_examples=150, deadline=None)
def test_any_json_gives_latents_or_one_kind_of_error(value):
    frame = Frame.square_crop(60, 40)
    try:
        metadata = oracle.read_metadata(json.dumps(value).encode())
        seen = oracle.read_objects(metadata, frame, (60, 40))
    except oracle.AnnotationError:
        return
    for name in oracle.WRITERS:
        latent = oracle.write(name, seen)
        assert not latent or LATENTS[name].parse(latent)


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_as_json(data):
    with contextlib.suppress(oracle.AnnotationError):
        assert isinstance(oracle.read_metadata(data), dict)


@pytest.mark.parametrize(
    ("label", "count", "reason"),
    [("x" * 201, 1, "201 characters"), ("x" * 190, 60, "characters"), ("x", 129, "129 objects")],
)
def test_what_no_latent_can_hold_is_told(label, count, reason):
    objects = [{"label": f"{label}{i}"[-201:], "bbox_xyxy": [0, 0, 900, 900]} for i in range(count)]

    def latent() -> str:
        seen = oracle.read_objects({"objects": objects}, Frame.square_crop(8, 8), (8, 8))
        return oracle.write("bbox", seen)

    with pytest.raises(oracle.AnnotationError, match=reason):
        latent()


@pytest.mark.parametrize(
    "text",
    [b"1" * 5000, b'{"a": 1' + b"0" * 5000 + b"}", b'{"a": "\\ud800"}', b'{"\\uDC00": 1}'],
)
def test_numbers_and_characters_beyond_all_bounds(text):
    with pytest.raises(oracle.AnnotationError, match="cannot be read"):
        oracle.read_metadata(text)
    assert oracle.read_metadata(b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}
    item = {"label": "a", "bbox_xyxy": [10**400, 1, 2, 3]}
    with pytest.raises(oracle.AnnotationError, match="out of range"):
        oracle.read_objects({"objects": [item]}, Frame.square_crop(8, 8), (8, 8))


def test_a_million_objects_are_refused():
    with pytest.raises(oracle.AnnotationError, match="at most"):
        oracle.read_objects({"objects": [0] * 10**6}, Frame.square_crop(8, 8), (8, 8))
    nested = b'{"objects": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(oracle.AnnotationError):
        oracle.read_metadata(nested)


def test_exif_that_makes_no_sense():
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode_image(encoded(PICTURE, exif=exif))[1] == 1
