"""Hostile and damaged weights: never run, never half loaded, one line each."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import struct

import msgpack
import numpy as np
import pytest
from safetensors.numpy import save_file

from kaleido_jax import bundle, checkpoint, cli, tensor_files
from kaleido_jax.errors import UserError
from kaleido_jax.generate import Pipeline
from kaleido_jax.interop import imports, sources, t5x
from tests import foreign
from tests.test_generate import _bundle, _config

PLAIN = {"a": np.ones((2, 3), np.float32)}


class Attack:
    """Unpickled, it would leave a file behind."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_not_run(tmp_path, capsys, zipped):
    torch = pytest.importorskip("torch", reason="PyTorch files need torch")
    mark, path = tmp_path / "mark", tmp_path / "vis_model.pth"
    content = {"state_dict": {"a": torch.ones(2)}, "args": Attack(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert cli.main(["import", "mdm", str(path), str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert "could run code" in line and "save its state_dict alone" in line
    assert line.count("\n") == 1 and not mark.exists() and not (tmp_path / "out").exists()
    # The attack is real: what trusts the file does run it.
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_bare_pickle_is_not_run(tmp_path):
    pytest.importorskip("torch", reason="PyTorch files need torch")
    path = tmp_path / "vis_model.pth"
    path.write_bytes(pickle.dumps({"a": Attack(tmp_path / "mark")}))
    with pytest.raises(UserError, match=r"vis_model\.pth"):
        sources.open_state(path)
    assert not (tmp_path / "mark").exists()


def test_old_objects_beside_the_weights_are_named(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch files need torch")
    path = tmp_path / "vis_model.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}, "args": argparse.Namespace(x=1)}, path)
    with pytest.raises(UserError, match=r"argparse\.Namespace"):
        sources.open_state(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a PyTorch file"),
        (b"PK\x03\x04" + b"\0" * 100, "is not a PyTorch file|could run code"),
        (b"\x80\x02]q\x00.", "not a dictionary|could run code|is not a PyTorch file"),
    ],
)
def test_broken_torch_files(tmp_path, content, message):
    pytest.importorskip("torch", reason="PyTorch files need torch")
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        sources.open_state(tmp_path / "m.pth")


def test_a_torch_file_of_other_things(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch files need torch")
    torch.save({"state_dict": {"a": torch.ones(2), "b": "text"}}, tmp_path / "m.pth")
    with pytest.raises(UserError, match="b are no tensors"):
        sources.open_state(tmp_path / "m.pth")
    torch.save({"a": torch.ones(2).to_sparse()}, tmp_path / "m.pth")
    with pytest.raises(UserError, match="sparse"):
        sources.open_state(tmp_path / "m.pth")


def test_object_arrays_are_refused(tmp_path):
    mark = tmp_path / "mark"
    np.savez(tmp_path / "m.npz", a=np.array([Attack(mark)], object))
    with pytest.raises(UserError, match="not an npz of plain arrays"):
        sources.open_state(tmp_path / "m.npz")
    assert not mark.exists()


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.pkl", 3, None]
)
def test_shards_lie_beside_their_index(tmp_path, shard):
    (tmp_path / "hf").mkdir()
    save_file(PLAIN, tmp_path / "model.safetensors")
    index = {"weight_map": {"a": shard}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not the name of a shard beside it"):
        sources.open_state(tmp_path / "hf")


def test_an_index_that_does_not_fit_is_listed(tmp_path):
    foreign.huggingface_folder(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["shared.weight"]
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"ghost is not in .*shared.weight is in no line"):
        sources.open_state(tmp_path / "hf")
    (tmp_path / "hf" / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="there is no file"):
        sources.open_state(tmp_path / "hf")


def safetensors(header: bytes | dict, data: bytes = b"\0" * 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 1 << 62) + b"{}",
        safetensors(b"[" * 100_000),
        safetensors({"a": {**ENTRY, "data_offsets": [0, 48]}}),
        safetensors({"a": {**ENTRY, "data_offsets": [-24, 0]}}),
        safetensors({"a": {**ENTRY, "shape": [1 << 62, 1 << 62]}}),
        safetensors({"a": {**ENTRY, "shape": [2]}}),
        safetensors({"a": ENTRY, "b": ENTRY}),
        safetensors({"a": {**ENTRY, "dtype": "object"}}),
        safetensors({"a": {**ENTRY, "dtype": "F8_E5M2", "shape": [24]}}),
        safetensors({"a": 3}),
    ],
    ids=range(11),
)
def test_broken_safetensors(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not a safetensors file|is of type"):
        tensor_files.read(path)


@pytest.mark.parametrize("what", ["link", "missing", "object", "noise", "ocdbt"])
def test_orbax_layouts_are_held_to_their_folder(tmp_path, what):
    foreign.t5x_orbax(tmp_path / "t5x", foreign.t5_params(), ocdbt=what == "ocdbt")
    state = tmp_path / "t5x" / "checkpoint_7" / "state"
    array = state / "target.encoder.encoder_norm.scale"
    if what == "link":
        shutil.move(array / "0", tmp_path / "secret")
        (array / "0").symlink_to(tmp_path / "secret")
    elif what == "missing":
        (array / "0").unlink()
    elif what == "object":
        header = json.loads((array / ".zarray").read_text())
        (array / ".zarray").write_text(json.dumps(header | {"dtype": "|O"}))
    elif what == "noise":
        (array / "0").write_bytes(b"\xff" * 50)
    else:
        (state / "manifest.ocdbt").write_bytes(b"\0" * 64)
    with pytest.raises(UserError, match=r"link out|cannot read|not numbers|not an OCDBT"):
        t5x.read_t5x(tmp_path / "t5x")


def test_object_arrays_in_msgpack_are_refused(tmp_path):
    folder = tmp_path / "t5x" / "checkpoint_1000"
    shutil.copytree(foreign.REFERENCE / "t5x_square" / "checkpoint_1000", folder)
    keep = {"raw": False, "ext_hook": msgpack.ExtType, "strict_map_key": False}
    content = msgpack.unpackb((folder / "checkpoint").read_bytes(), **keep)
    objects = msgpack.ExtType(1, msgpack.packb(((24,), "object", b"\0" * 192)))
    content["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"] = objects
    (folder / "checkpoint").write_bytes(msgpack.packb(content))
    with pytest.raises(UserError, match="not a t5x checkpoint: cannot create an OBJECT array"):
        t5x.read_t5x(folder)


# Exports


@pytest.fixture
def exported(tmp_path):
    return bundle.save(tmp_path / "export", _bundle(_config()))


def rewrite(folder, change):
    """Changes an export's config as someone who also mends its manifest would."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    files = checkpoint.hash_files(folder, bundle.ESSENTIAL)
    checkpoint.write_json(folder / "manifest.json", {"version": 1, "files": files})


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"]["denoiser"].update(name="../../evil"),
        lambda c: c["model"]["denoiser"].update(name="os"),
        lambda c: c["model"]["text_encoder"].update(emb_dim=10**9),
        lambda c: c["model"].update(text_encoder="__import__('os')"),
        lambda c: c.update(latents=["../x"]),
        lambda c: c.update(latents={"text": 1}),
        lambda c: c["sample"].update(sampler="eval"),
        lambda c: c["data"].update(image_size=True),
        lambda c: c["data"].pop("caption_length"),
        lambda c: c["diffusion"].update(schedule="nowhere"),
        lambda c: c.pop("model"),
    ],
    ids=range(11),
)
def test_configs_name_nothing_but_what_is_known(exported, change):
    rewrite(exported, change)
    with pytest.raises(UserError):
        Pipeline.from_pretrained(exported)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "\xff", "3", '{"data": NaN}'], ids=range(5)
)
def test_configs_that_are_none(exported, text):
    (exported / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        Pipeline.from_pretrained(exported)


def test_names_of_parameters_cannot_clash(exported):
    save_file({"a": np.ones(2), "a/b": np.ones(2)}, exported / "model.safetensors")
    rewrite(exported, lambda config: None)
    with pytest.raises(UserError, match="is not the name of a parameter"):
        Pipeline.from_pretrained(exported)


def test_a_folder_of_another_kind_is_no_export(exported):
    (exported / "manifest.json").write_text('{"files": {"config.json": "x"}}')
    with pytest.raises(UserError, match="is damaged"):
        Pipeline.from_pretrained(exported)


def test_nothing_is_written_where_a_tensor_cannot_be_read(tmp_path):
    """A chunk that is missing shows only when it is read: the folder does not appear."""
    foreign.t5x_orbax(tmp_path / "t5x", foreign.t5_params())
    array = tmp_path / "t5x" / "checkpoint_7" / "state" / "target.decoder.decoder_norm.scale"
    (array / "0").unlink()
    plan = imports.plan_t5x(tmp_path / "t5x", vokens=0)
    with pytest.raises(UserError, match="cannot read"):
        plan.write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["t5x"]
