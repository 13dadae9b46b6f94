"""Prompts from people and files: bounded, normalised, free of control characters."""

from __future__ import annotations

import json
import pathlib
import unicodedata

from kaleido_jax.errors import UserError

MAX_PROMPT_CHARACTERS = 2_000
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


def read_prompts(path: str | pathlib.Path) -> list[str]:
    """Reads prompts from UTF-8 text, one a line, or from `.jsonl` lines `{"prompt": "..."}`.

    Blank lines are skipped. Further JSON fields are ignored.

    Raises:
      UserError: naming the file and, where there is one, the line.
    """
    path = pathlib.Path(path)
    text = _decode(path)
    prompts = []
    # Not splitlines(): that also cuts at form feeds and at U+2028, inside a prompt.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        where = f"{path} line {number}"
        if path.suffix == ".jsonl":
            line = _json_prompt(line, where)
        prompts.append(clean_prompt(line, where))
    if not prompts:
        raise UserError(f"{path}: no prompt in it; write one prompt a line")
    return prompts


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


def _json_prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f'{where}: not JSON; expected {{"prompt": "..."}}') from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{where}: no text under "prompt"; expected {{"prompt": "..."}}')
    return record["prompt"]
