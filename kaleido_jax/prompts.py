"""Prompts from people and files: bounded, normalised, free of control characters."""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument
from kaleido_jax.latents.errors import LatentError

MAX_PROMPT_CHARACTERS = 2_000
MAX_NUM = 10_000
# Fields of a line of JSON -> what they are called among the settings, where they are one.
FIELDS = {
    "caption": "",
    "prompt": "",
    "num": "",
    "seed": "",
    "settings": "",
    "guidance": "guidance_weight",
    "steps": "num_steps",
}
MAX_FILE_BYTES = 64 * 2**20


def clean_prompt(text: str, where: str = "prompt") -> str:
    """Normalises one prompt to NFC, tabs to spaces, no space at either end.

    Args:
      text: the prompt as it came.
      where: what to call it in errors, such as 'prompts.txt line 3'.

    Raises:
      UserError: empty, over 2,000 characters, or holding a control character.
    """
    text = unicodedata.normalize("NFC", text.replace("\t", " ")).strip()
    if not text:
        raise UserError(f"{where}: the prompt is empty")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UserError(
            f"{where}: the prompt has {len(text):,} characters; "
            f"{MAX_PROMPT_CHARACTERS:,} are the most"
        )
    for position, character in enumerate(text):
        # Cc: control, Cs: half of a surrogate pair, Co: private use, Cn: unassigned. Cf (joiners,
        # direction marks) belongs to the writing of real languages and stays.
        if unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn"):
            raise UserError(
                f"{where}: control character U+{ord(character):04X} at position {position}; "
                "remove it"
            )
    return text


@dataclasses.dataclass(frozen=True)
class Request:
    """What one line of a prompt file asks for.

    Attributes:
      caption: the prompt, clean.
      where: what to call it in errors.
      num: pictures of it; None is as for all. seed: theirs; None is as for all.
      settings: sampling settings by name, of this prompt alone.
      document: a whole document to draw a picture of; the caption is its own then.
    """

    caption: str
    where: str = "prompt"
    num: int | None = None
    seed: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    document: LatentDocument | None = None


def count_pictures(requests: Sequence[Request], num: int) -> int:
    """Pictures of all requests; `num` of those that do not say, one of a document."""
    return sum(1 if r.document is not None else r.num or num for r in requests)


def read_requests(path: str | pathlib.Path) -> list[Request]:
    """Reads UTF-8 text, one prompt a line, or `.jsonl`, an object a line.

        {"caption": "a cat", "num": 4, "seed": 7, "guidance": 3, "steps": 50,
         "settings": {"time_grid": "logsnr"}}

    All but `caption` (or `prompt`) may be missing. A line may also be a whole document, as
    `kaleido sample` writes it beside each picture. Blank lines are skipped; fields of other names
    are ignored unless they look like a slip of one of these.

    Raises:
      UserError: naming the file and, where there is one, the line.
    """
    path = pathlib.Path(path)
    text = _decode(path)
    found = []
    # Not splitlines(): that also cuts at form feeds and at U+2028, inside a prompt.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        where = f"{path} line {number}"
        if path.suffix == ".jsonl":
            found.append(_request(line, where))
        else:
            found.append(Request(clean_prompt(line, where), where))
    if not found:
        raise UserError(f"{path}: no prompt in it; write one prompt a line")
    return found


def _decode(path: pathlib.Path) -> str:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise UserError(f"{path} is a folder; a prompt file is needed")
        if size > MAX_FILE_BYTES:
            raise UserError(f"{path}: {size:,} bytes; a prompt file may have {MAX_FILE_BYTES:,}")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} line {line}: byte 0x{data[error.start]:02X} is not UTF-8; "
            "save the file as UTF-8"
        ) from error


def _request(line: str, where: str) -> Request:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: not JSON; expected {{"caption": "..."}}') from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: not an object; expected {{"caption": "..."}}')
    if {"version", "latents"} <= record.keys():
        try:
            document = LatentDocument.from_dict(record)
        except LatentError as error:
            raise UserError(f"{where}: {error}") from error
        return Request(clean_prompt(document.caption, where), where, document=document)
    for name in record.keys() - set(FIELDS):
        if near := difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8):
            raise UserError(f"{where}: unknown field {name[:40]!r}; did you mean {near[0]!r}?")
    text = record.get("caption", record.get("prompt"))
    if not isinstance(text, str):
        raise UserError(f'{where}: no text under "caption"; expected {{"caption": "..."}}')
    settings = record.get("settings", {})
    if not isinstance(settings, dict):
        raise UserError(f'{where}: "settings" must be an object of sampling settings')
    given = {FIELDS[name]: record[name] for name in ("guidance", "steps") if name in record}
    for name, low, high in (("num", 1, MAX_NUM), ("seed", 0, 2**32 - 1)):
        value = record.get(name, low)
        if type(value) is not int or not low <= value <= high:
            raise UserError(f'{where}: "{name}" must be a whole number of {low} to {high}')
    return Request(
        clean_prompt(text, where), where, record.get("num"), record.get("seed"), given | settings
    )
