"""Latent documents: strict reading, edits, and pictures that carry them."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from kaleido_jax.errors import UserError
from kaleido_jax.latents import (
    DocumentError,
    LatentDocument,
    LatentTypeError,
    load_document,
    read_png,
    save_document,
    save_png,
)
from kaleido_jax.latents.document import MAX_BYTES, PNG_KEY

TEXT = "In the image, a small pug dog is sitting on top of a dog house."
BBOX = "Dog (1, 33, 995, 995) resting head on owner’s lap (1, 630, 785, 998)."
VOKEN = "#7" * 32
DOCUMENT = LatentDocument(
    caption='a "pug"\n<script>犬</script>',
    latents={"text": TEXT, "bbox": BBOX, "voken": VOKEN},
    model_config_hash="sha256:0af3",
    checkpoint_hash="77",
    seed=2**40,
    sample_index=3,
    batch_size=16,
    guidance_weight=7.5,
    sampler="ddim",
    steps=50,
    sampler_settings={"eta": 0.1, "interval": [0.3, 0.85], "clip": "static"},
    decoding={"temperature": 1.0, "top_k": None, "top_p": 0.9, "constrained": False},
    log_prob=-123.0625,
)
quick = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
thorough = settings(quick, max_examples=10_000)


def picture(seed: int = 0, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_json_round_trip() -> None:
    for indent in (None, 2):
        read = LatentDocument.from_json(DOCUMENT.to_json(indent))
        assert read == DOCUMENT
        assert hash(read) == hash(DOCUMENT)
        for field in dataclasses.fields(DOCUMENT):
            assert getattr(read, field.name) == getattr(DOCUMENT, field.name), field.name
    assert LatentDocument.from_json(DOCUMENT.to_json().encode()) == DOCUMENT
    assert list(read.latents) == ["text", "bbox", "voken"]
    assert pickle.loads(pickle.dumps(DOCUMENT)) == DOCUMENT


def test_what_the_json_holds() -> None:
    data = json.loads(DOCUMENT.to_json())
    assert list(data) == [
        "version",
        "caption",
        "latents",
        "coordinates",
        "model_config_hash",
        "checkpoint_hash",
        "seed",
        "sample_index",
        "batch_size",
        "guidance_weight",
        "sampler",
        "steps",
        "sampler_settings",
        "decoding",
        "log_prob",
    ]
    assert data["version"] == 1
    assert data["coordinates"]["range"] == [0, 1000]
    assert [entry["name"] for entry in data["latents"]] == ["text", "bbox", "voken"]
    assert data["latents"][1] == {
        "name": "bbox",
        "string": BBOX,
        "parts": [
            {"phrase": "Dog", "boxes": [[1, 33, 995, 995]]},
            {"phrase": "resting head on owner’s lap", "boxes": [[1, 630, 785, 998]]},
            {"phrase": ".", "boxes": []},
        ],
    }


def test_numbers_of_numpy_are_taken_as_numbers() -> None:
    document = LatentDocument(
        "",
        {},
        seed=np.int64(4),
        guidance_weight=np.float32(2),
        log_prob=np.float32(-0.1),
        decoding={"top_k": np.int32(5), "greedy": np.bool_(True), "pair": (1, np.float64(0.5))},
    )
    read = LatentDocument.from_json(document.to_json())
    assert (read.seed, read.guidance_weight, read.decoding) == (
        4,
        2.0,
        {"top_k": 5, "greedy": True, "pair": [1, 0.5]},
    )
    assert read.log_prob == float(np.float32(-0.1))
    assert read == document


def test_documents_differ_by_every_field_and_by_order() -> None:
    changes = {
        "caption": "x",
        "latents": {"bbox": BBOX, "text": TEXT, "voken": VOKEN},
        "model_config_hash": "x",
        "checkpoint_hash": "x",
        "seed": 1,
        "sample_index": 1,
        "batch_size": 1,
        "guidance_weight": 1,
        "sampler": "x",
        "steps": 1,
        "sampler_settings": {},
        "decoding": {},
        "log_prob": None,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(LatentDocument)}
    for name, value in changes.items():
        assert dataclasses.replace(DOCUMENT, **{name: value}) != DOCUMENT, name
    assert DOCUMENT != "document"


def test_replace_checks_again_and_forgets_the_probability() -> None:
    edited = DOCUMENT.replace(text="a shiba", bbox="Owl (1, 2, 3, 4)")
    assert edited.latents == {"text": "a shiba", "bbox": "Owl (1, 2, 3, 4)", "voken": VOKEN}
    assert list(edited.latents) == list(DOCUMENT.latents)
    assert edited.log_prob is None
    assert DOCUMENT.latents["text"] == TEXT
    assert DOCUMENT.replace(text=TEXT) == DOCUMENT.replace() == DOCUMENT
    assert edited.seed == DOCUMENT.seed
    with pytest.raises(DocumentError, match=r"bbox: x1 = 9 must be less than x2 = 3"):
        DOCUMENT.replace(bbox="Owl (9, 2, 3, 4)")
    with pytest.raises(DocumentError, match=r"no latent 'blob' .* it has text, bbox, voken"):
        DOCUMENT.replace(blob="Owl (9, 8, 3, 2, 4)")
    with pytest.raises(DocumentError):
        DOCUMENT.replace(text=7)


def change(**changes: object) -> str:
    return json.dumps({**json.loads(DOCUMENT.to_json()), **changes})


def entry(**changes: object) -> str:
    return change(latents=[{"name": "text", "string": "a", "parts": "a", **changes}])


def without(key: str) -> str:
    data = json.loads(DOCUMENT.to_json())
    del data[key]
    return json.dumps(data)


WRONG = {
    "version 2": (change(version=2), "version 2 is unknown; this program reads version 1"),
    "version true": (change(version=True), "version bool is unknown"),
    "version text": (change(version="1"), "version '1' is unknown"),
    "version first": ('{"version": 3, "other": 1}', "version 3 is unknown"),
    "no version": (without("version"), "key version is missing"),
    "no seed": (without("seed"), "key seed is missing"),
    "no log_prob": (without("log_prob"), "key log_prob is missing"),
    "unknown key": (change(colour=1), "unknown key 'colour'"),
    "not an object": ("[]", "must be an object, not list"),
    "nothing": ("", "is not JSON"),
    "half": (DOCUMENT.to_json()[:-5], "is not JSON"),
    "twice": (DOCUMENT.to_json()[:-1] + ', "seed": 1}', "a key stands twice"),
    "NaN": (change(guidance_weight=math.nan), "holds NaN"),
    "Infinity": (change(guidance_weight=-math.inf), "holds -Infinity"),
    "overflow": (change().replace("7.5", "1e999"), "guidance_weight: inf is not a finite number"),
    "long integer": (change().replace("7.5", "9" * 400), "guidance_weight: inf is not a finite"),
    "endless integer": (change().replace("7.5", "9" * 9999), "is not JSON"),
    "nesting": ("[" * 100_000, "is not JSON"),
    "nested version": ('{"version":' + "[" * 400 + "]" * 400 + "}", "version list is unknown"),
    "too long": (" " * (MAX_BYTES + 1), "has 524289 characters"),
    "broken UTF-8": (b'{"version": "\xff"}', "is not JSON"),
    "bytes of UTF-16": ("é".encode("utf-16"), "is not JSON"),
    "no string": (None, "must be a JSON string, not NoneType"),
    "caption": (change(caption=1), "caption: must be a string"),
    "long caption": (change(caption="x" * 5000), "caption: has 5000 characters"),
    "surrogate": (change(caption="\ud800"), "caption: holds a lone surrogate"),
    "seed float": (change(seed=1.0), "seed must be a whole number, not float"),
    "seed true": (change(seed=True), "seed must be a whole number, not bool"),
    "seed negative": (change(seed=-1), "seed = -1 is not in 0"),
    "no batch": (change(batch_size=0), "batch_size = 0 is not in 1"),
    "no steps": (change(steps=0), "steps = 0 is not in 1"),
    "many steps": (change(steps=10**9), "steps = 1000000000 is not in"),
    "guidance text": (change(guidance_weight="7"), "guidance_weight: must be a number"),
    "log_prob text": (change(log_prob="7"), "log_prob: must be a number"),
    "sampler": (change(sampler="../x"), "sampler: '../x' does not match"),
    "hash": (change(checkpoint_hash="x y"), "checkpoint_hash: 'x y' does not match"),
    "decoding list": (change(decoding=[]), "decoding: must be an object"),
    "decoding nested": (change(decoding={"a": {}}), "decoding.a: must be a number, not dict"),
    "decoding key": (change(decoding={"A b": 1}), "decoding, a key: 'A b' does not match"),
    "long setting": (change(decoding={"a": "x" * 300}), "decoding.a: has 300 characters"),
    "long list": (change(decoding={"a": [1] * 2049}), "decoding.a: a list of 2049"),
    "many settings": (
        change(sampler_settings={f"a{i}": 1 for i in range(33)}),
        "sampler_settings: must be an object of at most 32",
    ),
    "coordinates": (change(coordinates={"range": [0, 1]}), "coordinates: not the convention"),
    "latents object": (change(latents={}), "latents: must be a list"),
    "latent string": (change(latents=["a"]), r"latents\[0\]: must be an object"),
    "latent name": (entry(name="depth"), "there is no latent 'depth'"),
    "latent name number": (entry(name=1), r"latents\[0\].name: must be a string"),
    "latent key": (entry(extra=1), r"latents\[0\]: unknown key 'extra'"),
    "latent invalid": (entry(string="a  b"), "text: string holds a double space"),
    "latent no string": (entry(string=None), "text: string must be a str"),
    "other parts": (entry(parts="b"), r"latents\[0\]: parts are not those of its string"),
    "parts of another type": (
        change(latents=[{"name": "voken", "string": "#1" * 32, "parts": [1.0] * 32}]),
        "parts are not those",
    ),
    "latent twice": (
        change(latents=[{"name": "text", "string": "a", "parts": "a"}] * 2),
        "latent text stands there twice",
    ),
}


@pytest.mark.parametrize(("string", "message"), WRONG.values(), ids=WRONG)
def test_refused_documents(string: object, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as caught:
        LatentDocument.from_json(string)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_refused_values() -> None:
    with pytest.raises(DocumentError, match="must map names to strings"):
        LatentDocument("", [("text", "a")])
    with pytest.raises(DocumentError, match="no latent"):
        LatentDocument("", {7: "a"})
    with pytest.raises(DocumentError, match="seed"):
        LatentDocument("", {}, seed=10**5000)
    with pytest.raises(DocumentError, match="finite"):
        LatentDocument("", {}, guidance_weight=math.inf)
    with pytest.raises(DocumentError, match="must be an object"):
        LatentDocument.from_dict({1: 2, "version": 1, 10**5000: 3}.keys())
    with pytest.raises(DocumentError, match="is missing"):
        LatentDocument.from_dict({1: 2, "version": 1, 10**5000: 3})
    with pytest.raises(DocumentError, match="unknown key"):
        LatentDocument.from_dict({**DOCUMENT.to_dict(), 10**5000: 3})


def test_the_largest_document_can_be_read(tmp_path: Path) -> None:
    wide = "\U0001f415"
    grounded = "(" * 3500 + wide * 1000
    bbox = grounded.replace("(", "((") + " (1, 2, 3, 4)"
    text = wide * 4096
    whole = f"[text] {text} [bbox] {bbox} [voken] " + "#65535" * 32
    document = LatentDocument(
        "\x01" * 4096,
        {
            "text": text,
            "bbox": wide * 8170 + " (1, 2, 3, 4)",
            "blob": wide * 8170 + " (1, 2, 4, 3, 0)",
            "voken": "#65535" * 32,
            "combined": whole,
        },
        sampler_settings={f"a{i}": [wide * 256] * 15 for i in range(4)},
        decoding={f"a{i}": [wide * 256] * 15 for i in range(4)},
    )
    save_document(tmp_path / "a.json", document)
    assert load_document(tmp_path / "a.json") == document
    assert LatentDocument.from_json(document.to_json().encode()) == document
    save_png(tmp_path / "a.png", picture(), document)
    assert read_png(tmp_path / "a.png")[1] == document


def test_settings_are_bounded_so_that_every_document_can_be_read() -> None:
    with pytest.raises(DocumentError, match=r"decoding: \d+ characters of JSON, at most 16384"):
        LatentDocument("", {}, decoding={f"a{i}": ["x" * 256] * 16 for i in range(4)})


def test_files(tmp_path: Path) -> None:
    image = picture()
    save_png(tmp_path / "a.png", image, DOCUMENT)
    save_document(tmp_path / "a.json", DOCUMENT)
    read, document = read_png(tmp_path / "a.png")
    np.testing.assert_array_equal(read, image)
    assert read.dtype == np.uint8
    assert document == DOCUMENT
    assert load_document(tmp_path / "a.png") == load_document(str(tmp_path / "a.json")) == DOCUMENT
    # Written beside and renamed: nothing else remains, and an older file is replaced.
    save_png(tmp_path / "a.png", picture(1), DOCUMENT.replace(text="b"))
    assert read_png(tmp_path / "a.png")[1].latents["text"] == "b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"missing/a\.png: cannot be written"):
        save_png(tmp_path / "missing" / "a.png", picture(), DOCUMENT)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DocumentError, match="cannot be written"):
        save_document(tmp_path / "file" / "a.json", DOCUMENT)
    with pytest.raises(LatentTypeError, match="float64"):
        save_png(tmp_path / "a.png", np.zeros((4, 4, 3)), DOCUMENT)
    with pytest.raises(DocumentError, match="more than"):
        save_png(tmp_path / "a.png", np.zeros((1, 2**24 + 1, 3), np.uint8), DOCUMENT)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DocumentError, match="cannot be written"):
        save_document(tmp_path / "folder.json", DOCUMENT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.json"]


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"

    def refused(message: str) -> None:
        for function in (read_png, load_document):
            with pytest.raises(DocumentError, match=message) as caught:
                function(path)
            assert "a.png" in str(caught.value)

    refused("No such file")
    path.write_bytes(b"\x89PNG")
    refused("cannot be read as PNG")
    Image.fromarray(picture()).save(path)
    refused("carries no latent document")
    text = PngImagePlugin.PngInfo()
    text.add_text(PNG_KEY, '{"version": 2}')
    Image.fromarray(picture()).save(path, pnginfo=text)
    refused("version 2 is unknown")
    text = PngImagePlugin.PngInfo()
    text.add_itxt(PNG_KEY, "x" * 3_000_000)
    Image.fromarray(picture()).save(path, pnginfo=text)
    refused("has 3000000 characters")
    # A compressed chunk that would unfold to gigabytes.
    whole = path.read_bytes()
    bomb = chunk(b"zTXt", PNG_KEY.encode() + b"\0\0" + zlib.compress(b"x" * 50_000_000, 9))
    path.write_bytes(whole[:33] + bomb + whole[33:])
    refused("cannot be read as PNG")
    # A header that claims a picture of a million by a million.
    header = (10**6).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    path.write_bytes(whole[:8] + chunk(b"IHDR", header) + whole[33:])
    refused("cannot be read as PNG|pixels")
    path.unlink()
    path.mkdir()
    refused("is not a file")
    with pytest.raises(DocumentError, match="not the name of a file"):
        read_png("a\0b")
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DocumentError, match="cannot be read as PNG"):
        read_png(tmp_path / "a.jpg")
    with pytest.raises(DocumentError, match=r"a.jpg: is not JSON"):
        load_document(tmp_path / "a.jpg")


def test_a_truncated_or_flipped_picture_never_raises_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(path, picture(), DOCUMENT)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(DocumentError):
            read_png(path)
    refused = 0
    for position in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[position] ^= 0x41
        path.write_bytes(flipped)
        try:
            read_png(path)
        except DocumentError:
            refused += 1
    assert refused > 100


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner)),
    max_leaves=5,
)


def check_nothing_else_escapes(data: st.DataObject) -> None:
    """A document with one value exchanged or a slice of its JSON torn."""
    values = DOCUMENT.to_dict()
    if data.draw(st.booleans()):
        values[data.draw(st.sampled_from(list(values)))] = data.draw(PLAIN)
    else:
        values["latents"] = [
            {
                **values["latents"][1],
                data.draw(st.sampled_from(["name", "string", "parts"])): data.draw(PLAIN),
            }
        ]
    string = json.dumps(values)
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(string)))
        string = string[:start] + data.draw(st.text(max_size=3)) + string[start + 3 :]
    for read in (
        lambda: LatentDocument.from_json(string),
        lambda: LatentDocument.from_dict(values),
    ):
        try:
            document = read()
        except DocumentError:
            continue
        assert LatentDocument.from_json(document.to_json()) == document


@quick
@given(st.data())
def test_nothing_else_escapes(data: st.DataObject) -> None:
    check_nothing_else_escapes(data)


@pytest.mark.long
@pytest.mark.timeout(1800)
@thorough
@given(st.data())
def test_nothing_else_escapes_thoroughly(data: st.DataObject) -> None:
    check_nothing_else_escapes(data)
