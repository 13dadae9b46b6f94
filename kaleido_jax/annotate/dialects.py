"""How vision-language models write boxes, each read into the same mentions.

Tags (`qwen-vl`, `qwen2-vl`): the words of a caption with `<ref>a dog</ref><box>(1,2),(3,4)</box>`
or `<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>`, corners in
thousandths. JSON (`qwen2.5-vl`, `qwen3-vl`): a sentence and a list of
`{"bbox_2d": [1, 2, 3, 4], "label": "a dog"}`, in pixels of the resized picture or in thousandths.
Readers never raise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kaleido_jax.annotate.answers import Log
from kaleido_jax.latents.characters import clean

Corners = tuple[float, float, float, float]


@dataclass
class Mention:
    """Words and the boxes that follow them.

    Attributes:
      words: all words since the last box, the phrase at their end.
      name: the phrase that the boxes show, "" where the model did not mark it.
      corners: (x, y, x, y) as written, in the dialect's units, any order, any range.
    """

    words: str
    name: str = ""
    corners: list[Corners] = field(default_factory=list)


@dataclass
class Reading:
    """An answer read.

    Attributes:
      mentions: in order.
      tail: the words after the last of them.
      incomplete: the answer breaks off within a tag or before it names anything.
      tail_ends: the tail is the answer's end, so it breaks off where the answer does.
    """

    mentions: list[Mention]
    tail: str = ""
    incomplete: bool = False
    tail_ends: bool = True


def corners_of(numbers: list[float], log: Log) -> Corners | None:
    """Four numbers as they are, a quad's eight as the box around it, else None."""
    if len(numbers) not in (4, 8):
        log.repair(f"a box with {len(numbers)} numbers was dropped")
        return None
    if any(not abs(number) < 10_000 for number in numbers):
        log.repair("a box with a number of more than 4 digits was dropped")
        return None
    if len(numbers) == 8:
        xs, ys = numbers[::2], numbers[1::2]
        return min(xs), min(ys), max(xs), max(ys)
    return tuple(numbers)


# ---- tags ----------------------------------------------------------------------------------------

_TAG = re.compile(
    r"(</?(?:ref|box|quad)>|<\|(?:object_ref|box|quad)_(?:start|end)\|>)", re.IGNORECASE
)
_NUMBERS = re.compile(r"[\s()\[\],;]*(?:[-+]?[0-9]{1,12}(?:\.[0-9]{0,12})?[\s()\[\],;]*)*")
_NUMBER = re.compile(r"[-+]?[0-9]{1,12}(?:\.[0-9]{0,12})?")


def _tag(token: str) -> tuple[str, bool]:
    """(ref | box | quad, whether it opens)."""
    name = token.lower().strip("<>|/")
    return name.split("_")[-2 if "_" in name else 0], not ("_end" in name or "/" in token)


class _TagReader:
    """Walks through tags and words; at most one phrase and one box are open at a time."""

    def __init__(self, log: Log):
        self.log = log
        self.mentions: list[Mention] = []
        self.words, self.name = "", ""
        self.ref: str | None = None
        self.box: tuple[str, str] | None = None

    def read(self, answer: str) -> Reading:
        for token in _TAG.split(answer):
            if not _TAG.fullmatch(token):
                self._text(token)
                continue
            name, opens = _tag(token)
            if name == "ref":
                self._open_ref() if opens else self._close_ref()
            elif opens:
                self._open_box(name)
            else:
                self._close_box()
        incomplete = self.ref is not None or self.box is not None
        if incomplete:
            self.log.repair("an incomplete tag at the end was dropped")
        return Reading(self.mentions, self.words, incomplete)

    def _text(self, text: str) -> None:
        if self.box is not None:
            self.box = (self.box[0], self.box[1] + text)
        elif self.ref is not None:
            self.ref += text
        else:
            self.words = _spaced(self.words, text)

    def _open_ref(self) -> None:
        self._forget_box()
        if self.ref is not None:
            self.log.repair("a phrase was not closed; the innermost counts")
            self.words = _spaced(self.words, self.ref)
        self.ref = ""

    def _close_ref(self) -> None:
        self._forget_box()
        if self.ref is None:
            self.log.repair("a closing tag without its opening one was left out")
            return
        self.words, self.name = _spaced(self.words, self.ref), clean(self.ref)
        self.ref = None

    def _open_box(self, name: str) -> None:
        self._forget_box()
        if self.ref is not None:
            self.log.repair("a phrase was not closed before its box")
            self._close_ref()
        self.box = (name, "")

    def _close_box(self) -> None:
        if self.box is None:
            self.log.repair("a closing tag without its opening one was left out")
            return
        (name, inside), self.box = self.box, None
        corners = None
        if not _NUMBERS.fullmatch(inside[:200]):
            self.log.repair("a box that holds more than numbers was dropped")
        else:
            numbers = [float(number) for number in _NUMBER.findall(inside)]
            if (len(numbers) == 8) != (name == "quad"):
                self.log.repair(f"a {name} with {len(numbers)} numbers was dropped")
            else:
                corners = corners_of(numbers, self.log)
        self._place([] if corners is None else [corners])

    def _forget_box(self) -> None:
        if self.box is not None:
            self.log.repair("a box was not closed; the innermost tag counts")
            self.box = None

    def _place(self, corners: list[Corners]) -> None:
        if any(c.isalnum() for c in self.words):
            if not self.name and corners:
                self.log.repair("a box without a phrase took the words before it")
            self.mentions.append(Mention(self.words, self.name, corners))
        elif self.mentions:
            self.mentions[-1].corners += corners
        elif corners:
            self.log.repair("a box without any words before it was dropped")
        self.words, self.name = "", ""


def _spaced(first: str, second: str) -> str:
    # Tags may stand where a space should: "and<ref>her dog</ref>".
    glue = " " if first[-1:].isalnum() and second[:1].isalnum() else ""
    return first + glue + second


def read_tags(answer: str, log: Log) -> Reading:
    """A caption with tagged phrases and boxes."""
    return _TagReader(log).read(answer)


# ---- JSON ----------------------------------------------------------------------------------------

_BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
_NAME_KEYS = ("label", "phrase", "name", "text")
_SENTENCE_KEYS = ("caption", "sentence", "description")
_JSON_START = re.compile(r"```|\{|\[\s*[\[{\]]")
_FENCE = re.compile(r"```(?:json)?", re.IGNORECASE)
_FLAT = re.compile(r"\{[^{}]{0,2000}\}")
_LOOSE_BOX = re.compile(
    r"['\"]?\b(?:bbox(?:_2d)?|box(?:_2d)?)\b['\"]?\s*[:=]\s*[\[(]([^\])]{0,200})"
)
_LOOSE_NAME = re.compile(
    r"['\"]?\b(?:label|phrase|name|text)\b['\"]?\s*[:=]\s*(?:\"([^\"]{0,300})\"|'([^']{0,300})')"
)
_MOST_TRIES = 500
_LEAD = re.compile(r"(?:(?:detailed )?(?:description|caption|sentence)|answer)\s*:\s*", re.I)


def read_json(answer: str, log: Log) -> Reading:
    """A sentence and a list of boxes with labels; each box goes after its label in the sentence."""
    match = _JSON_START.search(answer)
    start = match.start() if match else len(answer)
    objects: list[tuple[str, list[Corners]]] = []
    sentences: list[str] = []
    position, incomplete = _read_values(answer, start, objects, sentences, log)
    sentence = next((tidy(s) for s in sentences if tidy(s)), "")
    sentence = sentence or tidy(answer[:start]) or tidy(_FENCE.sub(" ", answer[position:]))
    if any(c in sentence for c in "{}[]"):
        sentence = tidy(re.sub(r"[{}\[\]]", " ", sentence))
    return _placed(sentence, objects, incomplete, log)


def tidy(words: str) -> str:
    """Words without the marks of Markdown, an introduction such as "Caption:", or quotes around."""
    words = re.sub(r"^[ \t]*(?:[-*•]|#{1,6}|[0-9]{1,2}\.)[ \t]+", "", words, flags=re.MULTILINE)
    words = clean(_FENCE.sub(" ", words).replace("**", " "))
    words = _LEAD.sub("", words, count=1) if _LEAD.match(words) else words
    while len(words) > 1 and (words[0], words[-1]) in (('"', '"'), ("'", "'"), ("“", "”")):
        words = words[1:-1].strip()
    return words


def _read_values(
    answer: str, position: int, objects: list, sentences: list, log: Log
) -> tuple[int, bool]:
    """Reads every complete object from `position` on; where it stopped, and if one broke off."""
    decoder = json.JSONDecoder()
    stop, incomplete = position, False
    for _ in range(_MOST_TRIES):
        start = answer.find("{", position)
        if start < 0:
            break
        value: Any = None
        try:
            value, position = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            flat = _FLAT.match(answer, start)
            if flat is None:
                # An outer object that breaks off, or the last one: its complete parts follow.
                position, incomplete = start + 1, True
                continue
            log.repair("broken JSON was recovered")
            position = flat.end()
            value = _loose(flat.group())
        stop, incomplete = position, False
        for item in _items(value):
            _read_item(item, objects, sentences, log)
    if incomplete:
        log.repair("JSON that breaks off was cut to its complete objects")
    return stop, incomplete


def _loose(chunk: str) -> dict[str, Any]:
    """Label and numbers of an object with single quotes, trailing commas or the like."""
    value: dict[str, Any] = {}
    name, box = _LOOSE_NAME.search(chunk), _LOOSE_BOX.search(chunk)
    if name:
        value["label"] = name[1] or name[2] or ""
    if box:
        value["bbox_2d"] = [float(number) for number in _NUMBER.findall(box[1])]
    return value


def _items(value: Any) -> Iterator[dict]:
    """The object itself and the objects in its lists, one level deep."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            if isinstance(inner, list):
                yield from (item for item in inner if isinstance(item, dict))


def _read_item(item: dict, objects: list, sentences: list, log: Log) -> None:
    box = next((item[key] for key in _BOX_KEYS if key in item), None)
    if box is None:
        sentences.extend(item[k] for k in _SENTENCE_KEYS if isinstance(item.get(k), str))
        return
    label = next((item[key] for key in _NAME_KEYS if isinstance(item.get(key), str)), "")
    label = clean(label)
    if not any(c.isalnum() for c in label):
        log.repair("a box without a label was dropped")
        return
    several = isinstance(box, list) and bool(box) and all(isinstance(b, list) for b in box)
    corners = []
    for numbers in box if several else [box]:
        if not isinstance(numbers, list) or not all(
            isinstance(n, int | float) and not isinstance(n, bool) for n in numbers
        ):
            log.repair("a box that holds more than numbers was dropped")
            continue
        found = corners_of(numbers, log)
        if found is not None:
            corners.append(tuple(float(number) for number in found))
    objects.append((label, corners))


def _placed(
    sentence: str, objects: list[tuple[str, list[Corners]]], incomplete: bool, log: Log
) -> Reading:
    """Each label's boxes after its first unused occurrence; labels that do not occur at the end."""
    by_label: dict[str, list[list[Corners]]] = {}
    for label, corners in objects:
        by_label.setdefault(label, []).append(corners)
    used: list[tuple[int, int, str, list[Corners]]] = []
    absent: list[Mention] = []
    # The longest first, or "dog" would take the place of "hot dog".
    for label in sorted(by_label, key=len, reverse=True):
        pattern = re.compile(rf"(?<!\w){re.escape(label)}(?!\w)", re.IGNORECASE)
        places = [
            m.span()
            for m in pattern.finditer(sentence)
            if all(m.end() <= low or m.start() >= high for low, high, *_ in used)
        ]
        if not places:
            absent.append(Mention(label, label, [c for cs in by_label[label] for c in cs]))
            continue
        found = [(*place, label, []) for place in places[: len(by_label[label])]]
        for number, corners in enumerate(by_label[label]):
            found[min(number, len(found) - 1)][3].extend(corners)
        used += found
    mentions, position = [], 0
    for _, stop, label, corners in sorted(used):
        mentions.append(Mention(sentence[position:stop].strip(), label, corners))
        position = stop
    tail = sentence[position:].strip()
    absent.sort(key=lambda mention: [label for label, _ in objects].index(mention.name))
    for mention in absent:
        if sentence:
            log.repair("a label that the sentence lacks was put at its end")
        lead = tail.rstrip(" .")
        glue = ", " if lead or mentions else ""
        mentions.append(Mention(lead + glue + mention.words, mention.name, mention.corners))
        tail = ""
    # JSON that breaks off comes after a whole sentence.
    return Reading(mentions, tail, incomplete and not sentence, tail_ends=False)


# Name -> reader. Pixels or thousandths is a matter of the size that goes with the answer.
DIALECTS: dict[str, Callable[[str, Log], Reading]] = {
    "qwen-vl": read_tags,
    "qwen2-vl": read_tags,
    "qwen2.5-vl": read_json,
    "qwen3-vl": read_json,
}
