"""LatentDocument: all that made one picture, in JSON beside it or inside its PNG (DESIGN 6).

    {"version": 1, "caption": str,
     "latents": [{"name": str, "string": str, "parts": as the latent's `parts`}, ..],  (in order)
     "coordinates": COORDINATES,
     "model_config_hash": str, "checkpoint_hash": str,
     "seed": int, "sample_index": int, "batch_size": int,
     "guidance_weight": float, "sampler": str, "steps": int, "sampler_settings": {..},
     "decoding": {..}, "log_prob": float or null}

Reading is strict: every key exactly once and no other, every type as above, every latent valid for
its grammar and its parts those of its string. Documents come from strangers (a PNG sent by mail):
they are bounded in size and nothing in them is ever run.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import numbers
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

from kaleido_jax import beside
from kaleido_jax.latents.characters import check_integer
from kaleido_jax.latents.drawing import check_picture
from kaleido_jax.latents.errors import DocumentError, LatentError, excerpt
from kaleido_jax.latents.table import latent_type

VERSION = 1
COORDINATES = {
    "range": [0, 1000],
    "order": "x before y",
    "origin": "top left",
    "angle": "degrees counter-clockwise as seen from the x axis to the major axis",
}
MAX_BYTES = 1 << 19  # of JSON; the largest valid document stays below it
MAX_CAPTION = 4096
MAX_SETTINGS = 16384  # characters of JSON, each of the two
MAX_LIST = 2048  # values of one setting
MAX_FILE_BYTES = 1 << 26
MAX_PIXELS = 1 << 24
PNG_KEY = "kaleido-latents"

_HASH = re.compile(r"[0-9A-Za-z:._-]{0,128}")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_+.-]{0,63}")
_KEY = re.compile(r"[a-z][a-z0-9_]{0,63}")
_LARGEST = 2**63 - 1


@dataclass(frozen=True, eq=False)
class LatentDocument:
    """What made one picture, and enough to make it again. Raises DocumentError if not valid.

    Attributes:
      caption: c as the user wrote it; at most 4,096 characters, any but lone surrogates.
      latents: name -> string of z, in the order in which they were decoded. Not to be changed
        in place: `replace` makes an edited copy.
      model_config_hash, checkpoint_hash: which model; "" where there is none.
      seed, sample_index: the random stream of this picture.
      batch_size: how many it was rendered with (the sum of floats may depend on it).
      guidance_weight, sampler, steps, sampler_settings: how it was denoised.
      decoding: how z was decoded (temperature, top_k, ...).
      log_prob: log p(z|c) of the decoded latents; None where unknown, as after an edit.
    """

    caption: str
    latents: dict[str, str]
    model_config_hash: str = ""
    checkpoint_hash: str = ""
    seed: int = 0
    sample_index: int = 0
    batch_size: int = 1
    guidance_weight: float = 1.0
    sampler: str = "ddpm"
    steps: int = 250
    sampler_settings: dict[str, Any] = field(default_factory=dict)
    decoding: dict[str, Any] = field(default_factory=dict)
    log_prob: float | None = None

    def __post_init__(self) -> None:
        checked = {
            "caption": _text(self.caption, "caption", MAX_CAPTION),
            "latents": _latents(self.latents),
            "model_config_hash": _match(self.model_config_hash, "model_config_hash", _HASH),
            "checkpoint_hash": _match(self.checkpoint_hash, "checkpoint_hash", _HASH),
            "seed": _integer(self.seed, "seed", 0, _LARGEST),
            "sample_index": _integer(self.sample_index, "sample_index", 0, 2**31 - 1),
            "batch_size": _integer(self.batch_size, "batch_size", 1, 2**20),
            "guidance_weight": _float(self.guidance_weight, "guidance_weight"),
            "sampler": _match(self.sampler, "sampler", _WORD),
            "steps": _integer(self.steps, "steps", 1, 100_000),
            "sampler_settings": _settings(self.sampler_settings, "sampler_settings"),
            "decoding": _settings(self.decoding, "decoding"),
            "log_prob": None if self.log_prob is None else _float(self.log_prob, "log_prob"),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def replace(self, **strings: str) -> LatentDocument:
        """A copy with other strings for some latents, each checked against its grammar.

        log_prob becomes None, for the model's own z is no longer what the document holds.

        Raises:
          DocumentError: a latent that the document does not have, or a string that is not valid.
        """
        for name in strings:
            if name not in self.latents:
                have = ", ".join(self.latents) or "none"
                raise DocumentError(f"no latent {excerpt(name)} to replace; it has {have}")
        if all(self.latents[name] == string for name, string in strings.items()):
            return self
        latents = {**self.latents, **strings}
        return dataclasses.replace(self, latents=latents, log_prob=None)

    def to_dict(self) -> dict[str, Any]:
        """The document as JSON values, in the order of the module's text."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        entries = []
        for name, string in self.latents.items():
            latent = latent_type(name)
            entries.append(
                {"name": name, "string": string, "parts": latent.parts(latent.parse(string))}
            )
        plain["latents"] = entries
        order = {"version": VERSION, "caption": None, "latents": None, "coordinates": COORDINATES}
        return {**order, **plain}

    def to_json(self, indent: int | None = None) -> str:
        """The document as one JSON string; from_json(x.to_json()) == x."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, string: str | bytes) -> LatentDocument:
        """Reads a document. Raises DocumentError, nothing else, whatever the input."""
        if not isinstance(string, (str, bytes)):
            raise DocumentError(f"must be a JSON string, not {type(string).__name__}")
        if len(string) > MAX_BYTES:
            raise DocumentError(f"has {len(string)} characters, at most {MAX_BYTES} are read")
        try:
            data = json.loads(string, object_pairs_hook=_unique, parse_constant=_no_constant)
        except DocumentError:
            raise
        except (ValueError, RecursionError) as error:
            # Includes broken UTF-8, whole numbers of thousands of digits and endless nesting.
            raise DocumentError(f"is not JSON: {excerpt(str(error))}") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: object) -> LatentDocument:
        """Reads JSON values. Raises DocumentError, nothing else, whatever the input."""
        names = {f.name for f in dataclasses.fields(cls)}
        _keys(data, {"version", "coordinates", *names}, "document", first="version")
        if data["coordinates"] != COORDINATES:
            raise DocumentError("coordinates: not the convention of version 1")
        values = {name: data[name] for name in names}
        entries = data["latents"]
        if not isinstance(entries, list):
            raise DocumentError("latents: must be a list")
        latents: dict[str, str] = {}
        for number, entry in enumerate(entries):
            where = f"latents[{number}]"
            _keys(entry, {"name", "string", "parts"}, where)
            name = _text(entry["name"], f"{where}.name", 64)
            if name in latents:
                raise DocumentError(f"{where}: latent {name} stands there twice")
            latents[name] = _latents({name: entry["string"]})[name]
            latent = latent_type(name)
            if not _same(entry["parts"], latent.parts(latent.parse(latents[name]))):
                raise DocumentError(f"{where}: parts are not those of its string")
        return cls(**{**values, "latents": latents})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LatentDocument):
            return NotImplemented
        return self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.caption, tuple(self.latents.items()), self.seed, self.sample_index))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise DocumentError("a key stands twice in one object")
    return data


def _no_constant(name: str) -> None:
    raise DocumentError(f"holds {name}, which is not a JSON number")


def _keys(data: object, names: set[str], where: str, first: str | None = None) -> None:
    if not isinstance(data, dict):
        raise DocumentError(f"{where}: must be an object, not {type(data).__name__}")
    # The version goes first: an unknown one explains every other difference.
    if first and first in data and not _same(data[first], VERSION):
        found = (
            data[first]
            if type(data[first]) is int and data[first] < 10**6
            else excerpt(data[first])
        )
        raise DocumentError(f"version {found} is unknown; this program reads version {VERSION}")
    missing = sorted(names - set(data))
    if missing:
        raise DocumentError(f"{where}: key {missing[0]} is missing")
    extra = sorted(set(data) - names, key=excerpt)
    if extra:
        raise DocumentError(f"{where}: unknown key {excerpt(extra[0])}")


def _same(found: object, wanted: object) -> bool:
    """Equal and of equal types all the way down: 1, 1.0 and True are three things."""
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(_same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    return found == wanted


def _text(value: object, name: str, limit: int) -> str:
    if not isinstance(value, str):
        raise DocumentError(f"{name}: must be a string, not {type(value).__name__}")
    if len(value) > limit:
        raise DocumentError(f"{name}: has {len(value)} characters, at most {limit} are allowed")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise DocumentError(f"{name}: holds a lone surrogate (broken Unicode)")
    return value


def _match(value: object, name: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(_text(value, name, 1024)):
        raise DocumentError(f"{name}: {excerpt(value)} does not match {pattern.pattern}")
    return value


def _integer(value: object, name: str, low: int, high: int) -> int:
    try:
        return check_integer(value, name, low, high, None)
    except LatentError as error:
        raise DocumentError(error.message) from None


def _float(value: object, name: str) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise DocumentError(f"{name}: must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DocumentError(f"{name}: {number} is not a finite number")
    return number


def _latents(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise DocumentError(f"latents: must map names to strings, not {type(value).__name__}")
    for name, string in value.items():
        try:
            latent_type(name).parse(string)
        except LatentError as error:
            raise DocumentError(f"latents: {error}") from None
    return dict(value)


def _settings(value: object, name: str) -> dict[str, Any]:
    """At most 32 plain values, or lists of them, under plain keys; MAX_SETTINGS in all."""
    if not isinstance(value, dict) or len(value) > 32:
        raise DocumentError(f"{name}: must be an object of at most 32 settings")
    settings = {}
    for key, item in value.items():
        _match(key, f"{name}, a key", _KEY)
        where = f"{name}.{key}"
        if isinstance(item, (list, tuple)):
            if len(item) > MAX_LIST:
                raise DocumentError(
                    f"{where}: a list of {len(item)}, at most {MAX_LIST} are allowed"
                )
            settings[key] = [_setting(element, where) for element in item]
        else:
            settings[key] = _setting(item, where)
    length = len(json.dumps(settings, ensure_ascii=False))
    if length > MAX_SETTINGS:
        raise DocumentError(f"{name}: {length} characters of JSON, at most {MAX_SETTINGS} allowed")
    return settings


def _setting(value: object, where: str) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, str):
        return _text(value, where, 256)
    if isinstance(value, numbers.Integral):
        return _integer(value, where, -_LARGEST, _LARGEST)
    return _float(value, where)


def _write(path: Path, data: bytes) -> None:
    try:
        with beside.new_file(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise DocumentError(f"{path}: cannot be written: {error.strerror or error}") from None


def save_document(path: str | os.PathLike, document: LatentDocument) -> None:
    """Writes the document as indented JSON. Raises DocumentError if `path` cannot be written."""
    _write(Path(path), document.to_json(indent=1).encode() + b"\n")


def png_bytes(
    image: UInt8[np.ndarray, "height width 3"], document: LatentDocument, where: object = "PNG"
) -> bytes:
    """The picture as PNG with its document inside; equal inputs give equal bytes.

    Raises: LatentTypeError if `image` is not uint8 [H, W, 3]; DocumentError, naming `where`, if it
    has more than 16 million pixels.
    """
    picture = Image.fromarray(check_picture(image))
    if picture.width * picture.height > MAX_PIXELS:
        raise DocumentError(f"{where}: the picture has more than {MAX_PIXELS} pixels")
    text = PngImagePlugin.PngInfo()
    text.add_itxt(PNG_KEY, document.to_json())
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def save_png(
    path: str | os.PathLike, image: UInt8[np.ndarray, "height width 3"], document: LatentDocument
) -> None:
    """Writes `png_bytes`. Raises as it does, and DocumentError if `path` cannot be written."""
    _write(Path(path), png_bytes(image, document, path))


def read_png(
    path: str | os.PathLike,
) -> tuple[UInt8[np.ndarray, "height width 3"], LatentDocument]:
    """Reads a picture and its document. Raises DocumentError, nothing else, naming the file."""
    path = Path(path)
    _check_file(path)
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DocumentError(f"{path}: the picture has more than {MAX_PIXELS} pixels")
            picture.load()
            text = picture.text.get(PNG_KEY)
            image = np.asarray(picture.convert("RGB")).copy()
    except DocumentError:
        raise
    except Exception as error:  # a hostile file makes the decoder raise nearly anything
        raise DocumentError(f"{path}: cannot be read as PNG: {excerpt(str(error))}") from None
    if text is None:
        raise DocumentError(f"{path}: carries no latent document (text chunk {PNG_KEY})")
    return image, _named(path, str(text))


def load_document(path: str | os.PathLike) -> LatentDocument:
    """Reads a document from a .json file or out of a PNG, whichever the file is.

    Raises DocumentError, nothing else, naming the file.
    """
    path = Path(path)
    _check_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DocumentError(f"{path}: cannot be read: {error.strerror or error}") from None
    if head.startswith(b"\x89PNG"):
        return read_png(path)[1]
    return _named(path, head)


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DocumentError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise DocumentError(f"{excerpt(str(path))}: is not the name of a file") from None
    if not path.is_file():
        raise DocumentError(f"{path}: is not a file")
    if size > MAX_FILE_BYTES:
        raise DocumentError(f"{path}: has {size} bytes, at most {MAX_FILE_BYTES} are read")


def _named(path: Path, text: str | bytes) -> LatentDocument:
    try:
        return LatentDocument.from_json(text)
    except DocumentError as error:
        raise DocumentError(f"{path}: {error.message}") from None
