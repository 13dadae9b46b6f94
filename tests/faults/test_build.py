"""Builds over corrupt input: everything counted, named and bounded; and builds killed midway."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from kaleido_jax import sidecars
from kaleido_jax.data import RecordSource
from kaleido_jax.data.transforms import training_picture
from kaleido_jax.errors import UserError
from tests import builds
from tests.test_build import adds_up
from tests.test_webdataset import encoded

for module in ("tensorflow_datasets", "array_record", "apache_beam", "pyarrow"):
    pytest.importorskip(module, reason="kaleido build needs the extras [annotate] and [data]")

from kaleido_jax.data import build_unit, records  # noqa: E402


def quarantine(folder) -> dict[str, tuple[str, str]]:
    """key (or shard) -> kind and reason."""
    lines = (folder / "quarantine.jsonl").read_text("utf-8").splitlines()
    found = map(json.loads, lines)
    return {line["key"] or line["shard"]: (line["kind"], line["reason"]) for line in found}


# ---- pictures ---------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def cmyk() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(builds.photograph(1)).convert("CMYK").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(builds.photograph(2), exif=exif)


def deep() -> bytes:
    return encoded(np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16))


PICTURES = {
    "broken": (b"\xff\xd8\xff\xe0 no picture", "not a readable picture"),
    "cut": (encoded(builds.photograph(3), "JPEG")[:900], "not a readable picture"),
    "empty": (b"", "not a readable picture"),
    "bomb": (bomb(9_000), "9000 x 9000 pixels are too many"),
    "bombs": (bomb(60_000), "not a readable picture: Image size (3600000000 pixels) exceeds limit"),
    "dot": (encoded(np.zeros((1, 1, 3), np.uint8)), "1 x 1 pixels are too few"),
    "cmyk": (cmyk(), None),
    "deep": (deep(), None),
    "rotated": (rotated(), None),
}


def test_bad_pictures_are_counted_and_odd_ones_kept(tmp_path):
    extra = [
        (0, {f"{name}.jpg": data, f"{name}.txt": name.encode()})
        for name, (data, _) in PICTURES.items()
    ]
    builds.write_shards(tmp_path / "shards", 1, 20, extra)
    settings = builds.settings(tmp_path / "out", str(tmp_path / "shards"), max_bad_fraction=0.25)
    manifest = records.build(settings)
    adds_up(manifest)
    bad = {f"00000/{name}": reason for name, (_, reason) in PICTURES.items() if reason}
    assert manifest["totals"] == {"listed": 29, "records": 23, "skipped": 6, "lost": 0}
    assert manifest["splits"]["train"]["skipped"]["picture"] == 6
    found = quarantine(settings.folder)
    assert set(found) == set(bad)
    for key, reason in bad.items():
        assert found[key][0] == "picture"
        assert found[key][1].startswith(reason)
    again = dataclasses.replace(settings, out=str(tmp_path / "again"))
    records.build(again)
    assert builds.tree(again.folder) == builds.tree(settings.folder)
    source = RecordSource(settings.out)
    kept = {source[i]["caption"]: source[i]["image"] for i in range(20, 23)}
    for name in ("cmyk", "deep", "rotated"):
        want, _, _ = training_picture(PICTURES[name][0], 16)
        np.testing.assert_array_equal(kept[name], want)


def test_bad_texts_and_names_are_counted(tmp_path):
    picture = encoded(builds.photograph(0))
    extra = [
        (0, {"bare.png": picture}),
        (0, {"latin.png": picture, "latin.txt": b"caf\xe9"}),
        (0, {"json.png": picture, "json.txt": b"x", "json.json": b"{"}),
        (0, {"half.png": picture, "half.json": b'{"caption": "\\ud800"}'}),
        (0, {"alone.txt": b"no picture"}),
        (0, {"k\udcff.png": picture, "k\udcff.txt": b"x"}),
        (0, {"./k000.png": picture}),
    ]
    builds.write_shards(tmp_path / "shards", 1, 20, extra)
    settings = builds.settings(tmp_path / "out", str(tmp_path / "shards"), max_bad_fraction=0.3)
    manifest = records.build(settings)
    adds_up(manifest)
    found = quarantine(settings.folder)
    assert {key: kind for key, (kind, _) in found.items()} == {
        "00000/bare": "record",
        "00000/latin": "record",
        "00000/json": "record",
        "00000/half": "record",
        "00000/alone": "index",
        "00000/k\\xff": "index",
        "00000/k000 (again)": "index",
    }
    assert "no caption" in found["00000/bare"][1]
    assert manifest["splits"]["train"]["skipped"] == {
        "index": 3, "record": 4, "picture": 0, "latent": 0,
    }  # fmt: skip
    assert manifest["totals"]["records"] == 20


def test_too_much_that_is_bad_stops_the_build(tmp_path):
    extra = [(1, {"broken.png": b"no picture", "broken.txt": b"x"})]
    builds.write_shards(tmp_path / "shards", 2, 10, extra)
    settings = builds.settings(tmp_path / "out", str(tmp_path / "shards"))
    with pytest.raises(
        UserError, match=r"about 1 of 21 .* 0\.02 .*00001\.tar: 00001/broken: not a"
    ):
        records.build(settings)
    assert not settings.folder.exists()
    (kept,) = settings.folder.parent.glob(".building*/quarantine.jsonl")
    assert "00001/broken" in kept.read_text()
    records.build(dataclasses.replace(settings, max_bad_fraction=0.1))
    assert len(RecordSource(settings.out)) == 20
    assert not list(settings.folder.parent.glob(".building*"))


def test_a_latent_that_no_grammar_holds_is_quarantined(tmp_path, monkeypatch):
    """A sidecar by other hands: whole and hashed, but with a latent that cannot be parsed."""
    builds.write_shards(tmp_path / "shards", 1, 10)
    monkeypatch.setattr(sidecars, "_check", lambda stage, rows: None)
    rows = builds.rows("00000", [f"k{n:03d}" for n in range(10)])
    rows[4] = rows[4]._replace(latent="dog (1, 2, 3)")
    latents = builds.annotate(tmp_path / "latents", {"00000": rows})
    settings = builds.settings(
        tmp_path / "out", str(tmp_path / "shards"), annotations={"train": latents},
        max_bad_fraction=0.1,
    )  # fmt: skip
    adds_up(records.build(settings))
    ((key, (kind, reason)),) = quarantine(settings.folder).items()
    assert (key, kind) == ("00000/k004", "latent")
    assert reason.startswith("bbox: ")


def test_nothing_usable_is_told(tmp_path):
    builds.write_shards(tmp_path / "shards", 0, 0)
    builds.write_shard(tmp_path / "shards" / "a.tar", {"k.png": b"", "k.txt": b"x"})
    settings = builds.settings(tmp_path / "out", str(tmp_path / "shards"), max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"about 1 of 1 examples cannot be used"):
        records.build(settings)


def test_shards_without_a_single_example_are_told(tmp_path):
    (tmp_path / "shards").mkdir()
    builds.write_shard(tmp_path / "shards" / "a.tar", {})
    settings = builds.settings(tmp_path / "out", str(tmp_path / "shards"))
    with pytest.raises(UserError, match=r"no example in .*a\.tar or any other shard"):
        records.build(settings)


# ---- shards -----------------------------------------------------------------------------------


def cut(path, key: str) -> None:
    """Truncates a shard within the picture of a key."""
    with tarfile.open(path) as tar:
        member = next(m for m in tar.getmembers() if m.name == f"{key}.png")
    with open(path, "r+b") as file:
        file.truncate(member.offset_data + 10)


def test_truncated_and_missing_shards_are_counted(tmp_path):
    shards = builds.write_shards(tmp_path / "shards", 4, 10)
    latents = builds.annotate_shards(tmp_path / "latents", 4, 10)
    cut(shards[1], "k016")
    shards[2].unlink()
    images = str(tmp_path / "shards" / "{00000..00003}.tar")
    settings = builds.settings(tmp_path / "out", images, annotations={"train": latents})
    with pytest.raises(UserError, match="about 14 of 40 examples cannot be used"):
        records.build(settings)
    manifest = records.build(dataclasses.replace(settings, max_bad_fraction=0.4))
    adds_up(manifest)
    split = manifest["splits"]["train"]
    # The tenth record cut off, and three behind it that only the sidecar still knows.
    assert split["shards"]["00001"]["records"] == 6
    assert split["shards"]["00001"]["skipped"]["index"] == 1
    assert split["shards"]["00001"]["lost"] == 3
    assert (split["shards"]["00002"]["file"], split["shards"]["00002"]["lost"]) == (None, 10)
    assert manifest["totals"] == {"listed": 27, "records": 26, "skipped": 1, "lost": 13}
    found = quarantine(settings.folder)
    assert found["00001/k016"] == ("index", "the shard ends within .png")
    assert found["00002"] == ("shard", "No such file or directory")
    source = RecordSource(settings.out)
    assert len(source) == 26
    assert [source[i]["key"] for i in (5, 15, 16)] == ["00000/k005", "00001/k015", "00003/k030"]


def test_without_sidecars_losses_are_judged_by_the_whole_shards(tmp_path):
    shards = builds.write_shards(tmp_path / "shards", 4, 10)
    shards[3].unlink()
    images = str(tmp_path / "shards" / "{00000..00003}.tar")
    settings = builds.settings(tmp_path / "out", images, max_bad_fraction=0.3)
    assert records.build(settings)["totals"] == {
        "listed": 30,
        "records": 30,
        "skipped": 0,
        "lost": 10,
    }


def test_a_shard_with_a_link_is_refused(tmp_path):
    (path,) = builds.write_shards(tmp_path / "shards", 1)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("link.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    settings = builds.settings(tmp_path / "out", str(tmp_path / "shards"), max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"00000\.tar: 'link\.png' is not a regular file; refused"):
        records.build(settings)


# ---- killed -----------------------------------------------------------------------------------

SHARDS = 8
CODE = "import sys; from kaleido_jax import cli; sys.exit(cli.main(sys.argv[1:]))"


def command(root, out) -> list[str]:
    words = ["build", "mine", "--images", str(root / "shards"), "--latents", str(root / "latents")]
    return [sys.executable, "-c", CODE, *words, "--size", "192", "--out", str(out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Shards with sidecars, and what an undisturbed build makes of them."""
    root = tmp_path_factory.mktemp("whole")
    builds.write_shards(root / "shards", SHARDS, 24)
    builds.annotate_shards(root / "latents", SHARDS, 24)
    out = root / "out"
    subprocess.run(command(root, out), check=True, stdout=subprocess.DEVNULL)
    return root, builds.tree(out)


def kill_at(process: subprocess.Popen, out, number: int, delay: float) -> bool:
    """Kills a build a moment after `number` shards are done; False if it ended before."""
    limit = time.monotonic() + 120
    while len(list(out.glob("mine/192/.building*/*.array_record"))) < number:
        if process.poll() is not None:
            return False
        assert time.monotonic() < limit, "the build does not get on"
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    return process.wait() == -signal.SIGKILL


def kill_and_rerun(whole, out, seed: int, kills: int) -> None:
    """Kills a build `kills` times at random moments, each time going on where it was left."""
    root, want = whole
    chance = random.Random(seed)
    killed = 0
    for part in range(kills):
        # Later and later; never so late that nothing is left to do.
        span = (SHARDS - 2) / kills
        number = int(span * part + chance.uniform(0, span))
        process = subprocess.Popen(command(root, out), stdout=subprocess.DEVNULL)
        killed += kill_at(process, out, number, chance.uniform(0, 0.05))
        # Whatever was left: the version is not there, or it is whole.
        folder = out / "mine" / "192" / "1.0.0"
        assert not folder.exists() or builds.tree(folder) == builds.tree(
            root / "out/mine/192/1.0.0"
        )
    result = subprocess.run(command(root, out), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert builds.tree(out) == want
    assert killed, "every build was over before it could be killed"


def test_a_killed_build_ends_with_the_same_bytes(whole, tmp_path):
    kill_and_rerun(whole, tmp_path / "out", seed=1, kills=2)


@pytest.mark.slow
def test_builds_killed_many_times_end_with_the_same_bytes(whole, tmp_path):
    for seed in range(2, 5):
        kill_and_rerun(whole, tmp_path / str(seed), seed, kills=3)


def test_finished_shards_are_not_built_again(tmp_path, monkeypatch):
    builds.write_shards(tmp_path / "shards", 3)
    settings = builds.settings(tmp_path / "out", str(tmp_path / "shards"))
    original, worked = build_unit._build, []

    def failing(job, unit):
        if unit.name == "00002" and len(worked) < 3:
            worked.append(unit.name)
            raise RuntimeError("the machine went away")
        worked.append(unit.name)
        original(job, unit)

    monkeypatch.setattr(build_unit, "_build", failing)
    with pytest.raises(Exception, match="the machine went away"):
        records.build(settings)
    assert not settings.folder.exists()
    assert sorted(worked)[:2] == ["00000", "00001"]
    worked[:] = [*worked, "", ""]
    before = len(worked)
    (staging,) = settings.folder.parent.glob(".building*")
    file = staging / "train.00000.array_record"
    file.write_bytes(file.read_bytes()[:-1])  # one of them was damaged meanwhile
    records.build(settings)
    assert sorted(worked[before:]) == ["00000", "00002"]
    assert len(RecordSource(settings.out)) == 12


def test_leftovers_of_other_settings_are_cleared(tmp_path):
    builds.write_shards(tmp_path / "shards", 1)
    settings = builds.settings(tmp_path / "out", str(tmp_path / "shards"))
    parent = settings.folder.parent
    for name in ("incomplete.ABCDEF_1.0.0", ".building-1.0.0-01234567"):
        (parent / name).mkdir(parents=True)
        (parent / name / "dataset_info.json").write_text("{}")
    (parent / "incomplete.ABCDEF_2.0.0").mkdir()
    records.build(settings)
    names = {path.name for path in parent.iterdir()}
    assert names == {"1.0.0", "incomplete.ABCDEF_2.0.0", ".lock"}
    shutil.copy(settings.folder / "dataset_info.json", parent / "incomplete.ABCDEF_2.0.0")
    assert RecordSource(str(parent)).folder == settings.folder


def test_a_second_build_in_the_same_folder_is_refused(tmp_path):
    builds.write_shards(tmp_path / "shards", 1)
    settings = builds.settings(tmp_path / "out", str(tmp_path / "shards"))
    settings.folder.parent.mkdir(parents=True)
    with open(settings.folder.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `kaleido build` is writing to"):
            records.build(settings)
    records.build(settings)
