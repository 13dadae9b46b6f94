"""Sidecars: what is written is read, what is damaged or half-written is not there."""

from __future__ import annotations

import json

import pytest

from kaleido_jax import sidecars
from kaleido_jax.errors import UserError
from kaleido_jax.sidecars import Row

pytest.importorskip("pyarrow", reason="sidecars are Parquet files: install the extra 'data'")

HASH = "0123456789abcdef" * 4
ROWS = [
    Row("00000/b", "a dog", "ok"),
    Row("00000/a", "a cät", "repaired", ("cut", "clipped")),
    Row("00000/c", "", "empty"),
    Row("00000/d", "", "failed", ("not a readable picture",)),
]
LETTER = {"key": "00000/d", "stage": "text", "error": "x\ny", "raw": "ü", "attempt": 1}


def whole(folder, shards=("00000",)):
    dones = {}
    for shard in shards:
        rows = [row._replace(key=row.key.replace("00000", shard)) for row in ROWS]
        dones[shard] = sidecars.write_sidecar(
            folder, "text", shard, HASH, rows, [LETTER], {"bytes": 3}
        )
    sidecars.write_manifest(folder, {"text": {"config_hash": HASH, "shards": dones}})
    return dones


def test_rows_come_back_in_order(tmp_path):
    done = whole(tmp_path)["00000"]
    assert sidecars.read_sidecar(tmp_path, "text", "00000", HASH) == ROWS
    assert sidecars.read_shard(tmp_path, "text", "00000") == ROWS
    assert sidecars.read_done(tmp_path, "text", "00000", HASH) == done
    assert done["records"] == 4
    assert done["counts"] == {"ok": 1, "repaired": 1, "empty": 1, "rejected": 0, "failed": 1}
    assert done["source"] == {"bytes": 3}
    assert sidecars.read_dead_letters(tmp_path, "text", "00000", HASH) == [LETTER]


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        whole(tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_stage_is_its_shards_in_order_and_totals_add_up(tmp_path):
    whole(tmp_path, ("00001", "00000"))
    assert sidecars.stage_names(tmp_path) == ["text"]
    assert sidecars.shard_names(tmp_path, "text") == ["00001", "00000"]
    found = sidecars.read_stage(tmp_path, "text")
    assert list(found)[:2] == ["00001/b", "00001/a"]
    assert found["00000/a"] == ("a cät", "repaired")
    manifest = sidecars.read_manifest(tmp_path)
    assert manifest["stages"]["text"]["records"] == 8
    assert manifest["stages"]["text"]["counts"]["failed"] == 2
    assert manifest["totals"]["records"] == sum(manifest["totals"]["counts"].values()) == 8


def test_a_key_in_two_shards_is_an_error(tmp_path):
    dones = {
        shard: sidecars.write_sidecar(tmp_path, "text", shard, HASH, ROWS) for shard in ("0", "1")
    }
    sidecars.write_manifest(tmp_path, {"text": {"config_hash": HASH, "shards": dones}})
    with pytest.raises(UserError, match="'00000/b' twice"):
        sidecars.read_stage(tmp_path, "text")


@pytest.mark.parametrize("ending", ["parquet", "done.json", "dead.jsonl"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damage_is_seen(tmp_path, ending, damage):
    whole(tmp_path)
    path = tmp_path / "text" / f"00000.{HASH[:8]}.{ending}"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[data.index(b'"') if ending != "parquet" else 9] ^= 4
        path.write_bytes(data)
    assert sidecars.read_done(tmp_path, "text", "00000", HASH) is None
    with pytest.raises(UserError, match="missing or damaged"):
        sidecars.read_stage(tmp_path, "text")


def test_another_hash_is_another_sidecar(tmp_path):
    whole(tmp_path)
    assert sidecars.read_done(tmp_path, "text", "00000", HASH[:8] + "f" * 56) is None
    assert sidecars.read_done(tmp_path, "text", "00000", "f" * 64) is None


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([Row("a", "x", "ok"), Row("a", "y", "ok")], "comes twice"),
        ([Row("a", "", "fine")], "no status 'fine'"),
        ([Row("a", "", "ok")], "status ok with latent ''"),
        ([Row("a", "x", "failed")], "status failed with latent 'x'"),
        ([Row("a", " two  spaces", "ok")], "a: "),
    ],
)
def test_wrong_rows_are_refused(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        sidecars.write_sidecar(tmp_path, "text", "00000", HASH, rows)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("shard", ["../x", "a/b", "", ".x", "a\\b"])
def test_names_cannot_lead_out(tmp_path, shard):
    with pytest.raises(UserError, match="cannot be part of"):
        sidecars.write_sidecar(tmp_path / "out", "text", shard, HASH, ROWS)


def test_a_folder_without_a_manifest_is_not_finished(tmp_path):
    with pytest.raises(UserError, match="has not finished"):
        sidecars.read_stage(tmp_path, "text")
    whole(tmp_path)
    with pytest.raises(UserError, match=r"no stage 'bbox' \(there are text\)"):
        sidecars.read_stage(tmp_path, "bbox")
    with pytest.raises(UserError, match="no shard '7'"):
        sidecars.read_shard(tmp_path, "text", "7")


@pytest.mark.parametrize("text", ["[]", "{", '{"version": 2, "stages": {}}', '{"stages": []}'])
def test_a_foreign_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"manifest\.json"):
        sidecars.read_manifest(tmp_path)


@pytest.mark.parametrize("stage", [{"shards": {}}, [], None])
def test_a_stage_without_its_hash_is_refused(tmp_path, stage):
    manifest = {"version": 1, "stages": {"text": stage}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(UserError, match="stage 'text' has no shards, config_hash"):
        sidecars.stage_names(tmp_path)
