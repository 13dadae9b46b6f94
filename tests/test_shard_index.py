"""The index of a shard: duplicate keys, foreign names, and what is kept on disk between runs."""

from __future__ import annotations

import io
import json
import os
import tarfile

import pytest

from kaleido_jax.data import WebDatasetSource, shard_index
from kaleido_jax.data.shard_index import Lost, index_shard, list_shards
from kaleido_jax.errors import UserError
from tests.test_webdataset import record, write_shard


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, in which every shard is kept."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(shard_index, "CACHE_FROM", 1)
    return folder / "kaleido_jax" / "shards"


def append(path, members):
    with tarfile.open(path, "a") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_of_duplicate_keys_the_first_is_kept(tmp_path):
    path = write_shard(tmp_path / "a.tar", {**record("k0", 1), **record("k1", 2)})
    append(path, record("k0", 9))
    for _ in range(2):  # the second time from the cache
        index = index_shard(path)
        reason = "the key comes again in the shard; the first record is kept"
        assert index.lost == [Lost("k0 (again)", reason)]
        assert [r.key for r in index.records] == ["k0", "k1"]
    with pytest.raises(UserError, match="about 1 of 3 records are lost"):
        WebDatasetSource(str(path), size=16)
    source = WebDatasetSource(str(path), size=16, max_bad_fraction=0.4)
    assert source[0]["image"][0, 0, 0] == 1
    assert source.bad == {f"{path}: k0 (again)": reason}


def test_names_that_are_not_utf8_are_left_out(tmp_path):
    path = write_shard(tmp_path / "a.tar", record("k0", 1))
    append(path, {name.replace("k1", "k\udcff"): data for name, data in record("k1").items()})
    for _ in range(2):
        index = index_shard(path)
        assert [r.key for r in index.records] == ["k0"]
        assert index.lost == [Lost("k\\xff", "the name is not UTF-8")]


def test_two_shards_of_one_name_are_refused(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "00000.tar", record("k0"))
    with pytest.raises(UserError, match=r"x/00000\.tar and .*y/00000\.tar have the same name"):
        list_shards(f"{tmp_path / 'x'},{tmp_path / 'y'}")


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "1,x", "GNU.sparse.major": "0"},
        {"GNU.sparse.size": "q"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "q"},
        {"size": "9" * 30},
    ],
)
def test_extended_headers_that_make_no_sense(tmp_path, headers):
    path = write_shard(tmp_path / "a.tar", record("k0", 1))
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("k1.jpg")
        info.size, info.pax_headers = 4, headers
        tar.addfile(info, io.BytesIO(b"data"))
    for _ in range(2):
        index = index_shard(path)
        assert [r.key for r in index.records] == ["k0"]
        assert not index.whole
        assert "not a whole tar" in index.lost[-1].reason


def test_hidden_files_of_a_folder_are_no_shards(tmp_path):
    path = write_shard(tmp_path / "a.tar", record("k0", 1))
    (tmp_path / "._a.tar").write_bytes(b"what macOS lays beside a file")
    assert list_shards(str(tmp_path)) == [path]


def test_shards_whose_names_are_not_utf8_are_refused(tmp_path):
    os.rename(
        write_shard(tmp_path / "a.tar", record("k0", 1)), os.fsencode(tmp_path) + b"/b\xff.tar"
    )
    with pytest.raises(UserError, match=r"b\\xff\.tar has a name that is not UTF-8"):
        list_shards(str(tmp_path))


# ---- the kept index ---------------------------------------------------------------------------


def headers_read(monkeypatch) -> list:
    """Fills with the shards whose headers are read from now on."""
    read, original = [], shard_index._read_headers

    def count(shard):
        read.append(shard)
        return original(shard)

    monkeypatch.setattr(shard_index, "_read_headers", count)
    return read


def test_a_kept_index_is_used_until_the_shard_changes(tmp_path, cache, monkeypatch):
    path = write_shard(tmp_path / "a.tar", record("k0"))
    read = headers_read(monkeypatch)
    first = index_shard(path)
    assert index_shard(path) == first
    assert len(read) == 1
    assert len(list(cache.iterdir())) == 1

    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert index_shard(path) == first
    assert len(read) == 2  # another time of change

    append(path, {**record("k1"), "k1.other": bytes(20_000)})  # over the padding of the tar
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert [r.key for r in index_shard(path).records] == ["k0", "k1"]
    assert len(read) == 3  # another size
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.tar"]


def test_a_truncated_shard_stays_truncated_in_the_cache(tmp_path):
    path = write_shard(tmp_path / "a.tar", {**record("k0"), **record("k1")})
    with tarfile.open(path) as tar:
        last = tar.getmembers()[3]
    with open(path, "r+b") as file:
        file.truncate(last.offset_data + 10)
    first = index_shard(path)
    assert not first.whole
    assert [r.key for r in first.records] == ["k0"]
    assert index_shard(path) == first


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: b"",
        lambda kept: b"[1, 2",
        lambda kept: b"\xff\xfe",
        lambda kept: json.dumps([1]).encode(),
        lambda kept: json.dumps({**kept, "records": [["k0", {"png": [-5, 10]}]]}).encode(),
        lambda kept: json.dumps({**kept, "records": [["k0", {"png": "ab"}]]}).encode(),
        lambda kept: json.dumps({**kept, "records": [["k0", 7]]}).encode(),
        lambda kept: json.dumps({"state": kept["state"]}).encode(),
    ],
)
def test_a_damaged_index_is_made_again(tmp_path, cache, damage, monkeypatch):
    path = write_shard(tmp_path / "a.tar", record("k0"))
    first = index_shard(path)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(json.loads(whole)))
    read = headers_read(monkeypatch)
    assert index_shard(path) == first
    assert len(read) == 1
    assert kept.read_bytes() == whole


def test_without_a_place_to_keep_it_the_index_is_read_again(tmp_path, cache, monkeypatch):
    path = write_shard(tmp_path / "a.tar", record("k0"))
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    read = headers_read(monkeypatch)
    assert index_shard(path) == index_shard(path)
    assert len(read) == 2


def test_small_shards_leave_nothing_behind(tmp_path, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index_shard(write_shard(tmp_path / "a.tar", record("k0")))
    assert not cache.exists()
