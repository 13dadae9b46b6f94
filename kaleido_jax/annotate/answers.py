"""The words of an answer: without echo and control tokens, judged for script and for loops."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

MAX_ANSWER = 20_000  # characters of an answer that are looked at
LOOP_WORDS = 8
MAX_FOREIGN = 0.2

_TURN = "<|im_start|>assistant"
_KEPT = "(?:object_ref|box|quad)_(?:start|end)"  # Qwen2-VL's tokens of boxes
_END = re.compile(r"<\|(?:endoftext|im_end|eot_id)\|>|</s>")
# What may stand before an answer, besides the prompt itself.
_HEAD = re.compile(
    rf"\s*(?:<img>[^<>]{{0,500}}</img>|<\|(?!{_KEPT})[^<>|\s]{{1,40}}\|>|<s>|<pad>"
    r"|Picture [0-9]{1,2}:|<think>.{0,8000}?</think>)",
    re.S,
)
_CONTROL = re.compile(rf"<\|(?!{_KEPT})[^<>|\s]{{1,40}}\|>|</?s>|<pad>|<unk>")


class Log:
    """What was mended, in words, and whether anything was."""

    _MOST = 20

    def __init__(self) -> None:
        self.issues: list[str] = []
        self.repaired = False

    def repair(self, issue: str) -> None:
        """Something was changed or refused."""
        self.repaired = True
        self._add(issue)

    def note(self, issue: str) -> None:
        """Something worth knowing that changed nothing."""
        self._add(f"note: {issue}")

    def _add(self, issue: str) -> None:
        if len(self.issues) < self._MOST and issue not in self.issues:
            self.issues.append(issue)


def answer(raw: object, prompt: str, truncated: bool, log: Log) -> tuple[str, bool]:
    """The answer alone, and whether it breaks off before its end."""
    if not isinstance(raw, str):
        log.repair(f"not words but {type(raw).__name__}")
        return "", False
    if len(raw) > MAX_ANSWER:
        log.repair(f"only the first {MAX_ANSWER} of {len(raw)} characters were read")
        raw, truncated = raw[:MAX_ANSWER], True
    said = raw.rpartition(_TURN)[2]
    echo = re.compile(r"\s*" + r"\s+".join(map(re.escape, prompt.split()))) if prompt else None
    while True:
        match = _HEAD.match(said)
        if match is None and echo is not None:
            match = echo.match(said)
            if match is not None:
                log.repair("the prompt was echoed")
        if match is None:
            break
        said = said[match.end() :]
    end = _END.search(said)
    if end is not None:
        said, truncated = said[: end.start()], False
    return _CONTROL.sub(" ", said), truncated


def foreign(texts: Sequence[str]) -> bool:
    """Whether more than a fifth of the letters are of another script than Latin."""
    letters = [character for text in texts for character in text if character.isalpha()]
    latin = sum(c.isascii() or unicodedata.name(c, "").startswith("LATIN") for c in letters)
    return len(letters) - latin > MAX_FOREIGN * len(letters)


def loop_start(words: Sequence[str]) -> int | None:
    """Where eight words that occur three times occur for the second time; None without."""
    seen: dict[tuple[str, ...], list[int]] = {}
    for start in range(len(words) - LOOP_WORDS + 1):
        places = seen.setdefault(tuple(words[start : start + LOOP_WORDS]), [])
        places.append(start)
        if len(places) == 3:
            return places[1]
    return None
