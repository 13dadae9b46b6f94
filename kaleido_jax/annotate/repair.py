"""From a model's raw words to a strict latent: what is mended, what goes, what is rejected.

Pure functions that never raise, whatever the words. The policy:

- Echoed prompts, control tokens and whatever follows an end token go (answers.py).
- Boxes: reversed corners are sorted, an overshoot of up to 2% is clipped, more drops the box;
  halves round up; a side under 4 thousandths, a wrong count of numbers or more than 4 digits drop
  it. A phrase keeps at most 5 boxes and none that repeats another (intersection over union over
  0.95). A phrase that loses its boxes keeps its words. A quad becomes the box around it.
- A box without a phrase takes the words before it, or joins the box before it, else goes.
- Unclosed tags: the innermost wins; an incomplete tail goes; truncated output ends with its last
  complete segment (a description with its last complete sentence).
- Loops (the same phrase and box three times, or eight words in a row three times) are cut at the
  first repetition; where more than half of the output went, it is rejected.
- More than 20% of the letters not Latin: rejected, worth one more try with another seed.
- Characters that T5 cannot spell get a stand-in or go (spelling.py); parentheses of the prose are
  doubled by the latent's own writer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from kaleido_jax.annotate.answers import Log, answer, foreign, loop_start
from kaleido_jax.annotate.dialects import DIALECTS, Corners, tidy
from kaleido_jax.annotate.spelling import spell
from kaleido_jax.latents import bbox, grounding, text
from kaleido_jax.latents.bbox import Box
from kaleido_jax.latents.characters import clean
from kaleido_jax.latents.errors import LatentError

OVERSHOOT = 20  # thousandths
LEAST_SIDE = 4  # thousandths
MAX_BOXES = 5  # of one phrase
SAME_BOX = 0.95  # intersection over union
LEAST_WORDS = 5  # of a description
WORDS = (50, 80)  # asked for
_MAX_PHRASE = 2000

_TAGS = re.compile(
    r"<(box|quad)>[^<>]{0,200}</\1>|</?(?:ref|box|quad)>|<\|(?:object_ref|box|quad)_[a-z]+\|>"
)
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s|$)")


@dataclass(frozen=True)
class Repaired:
    """A latent out of raw words.

    Attributes:
      latent: the strict string, "" unless status is ok or repaired.
      status: ok | repaired | empty (a caption that names no place) | rejected.
      issues: what was mended or refused; notes that changed nothing begin with "note:".
      retry: another draw from the model may do better.
    """

    latent: str
    status: str
    issues: tuple[str, ...] = ()
    retry: bool = False


def repair_text(raw: str, prompt: str = "", truncated: bool = False) -> Repaired:
    """A description, latent `text`.

    Args:
      raw: the model's words, special tokens and all.
      prompt: what it was asked, for it may echo it.
      truncated: the model was stopped before it had ended.
    """
    log = Log()
    said, truncated = answer(raw, prompt, truncated, log)
    if _TAGS.search(said):
        log.repair("tags of boxes were removed")
        said = _TAGS.sub(" ", said)
    if foreign([said]):
        return _foreign(log)
    words = _prose(tidy(said), log).split()
    loop = loop_start(words)
    if loop is not None:
        log.repair("a loop was cut")
        if loop < len(words) / 2:
            return _looping(log)
        words = words[:loop]
    latent = clean(" ".join(words), text.MAX_CHARS)
    if truncated:
        ends = [match.end() for match in _SENTENCE_END.finditer(latent)]
        log.repair("truncated: cut to the last complete sentence")
        latent = latent[: ends[-1]] if ends else ""
    count = len(latent.split())
    if count < LEAST_WORDS:
        return _rejected(log, f"only {count} words")
    if not WORDS[0] <= count <= WORDS[1]:
        log.note(f"{count} words; {WORDS[0]} to {WORDS[1]} were asked for")
    return _written(log, lambda: text.write(latent))


def repair_grounded(
    raw: str,
    dialect: str,
    size: tuple[float, float] = (1000, 1000),
    prompt: str = "",
    truncated: bool = False,
) -> Repaired:
    """A caption with boxes, latent `bbox`.

    Args:
      raw: the model's words, special tokens and all.
      dialect: how it writes boxes, a name of `dialects.DIALECTS`.
      size: (width, height) of the picture in the units of its coordinates.
      prompt, truncated: as in `repair_text`.

    Raises:
      KeyError: an unknown dialect (a mistake of the program, not of the model).
    """
    log = Log()
    said, truncated = answer(raw, prompt, truncated, log)
    reading = DIALECTS[dialect](said, log)
    if foreign([mention.words for mention in reading.mentions] + [reading.tail]):
        return _foreign(log)
    named = [_prose(mention.name, log).casefold() for mention in reading.mentions]
    pairs = [
        (_prose(mention.words, log), _boxes(mention.corners, size, log))
        for mention in reading.mentions
    ]
    tail = _prose(reading.tail, log)
    if reading.incomplete or (truncated and reading.tail_ends and tail and pairs):
        log.repair("truncated: cut to the last complete segment")
        tail = ""
    total = _amount(pairs, tail)
    pairs, tail = _cut_loops(pairs, named, tail, log)
    if _amount(pairs, tail) < total / 2:
        return _looping(log)
    segments, tail = merge(pairs, tail)
    if not segments:
        if tail and not (reading.mentions or truncated or reading.incomplete):
            return Repaired("", "empty", (*log.issues, "the caption names no place"))
        return _rejected(log, "no usable box")
    return _written(log, lambda: write_grounded(segments, tail, bbox))


# ---- boxes ---------------------------------------------------------------------------------------


def _boxes(corners: Sequence[Corners], size: tuple[float, float], log: Log) -> tuple[Box, ...]:
    """The usable boxes of a phrase, in order."""
    boxes: list[Box] = []
    for written in corners:
        box = _box(written, size, log)
        if box is None:
            continue
        if any(overlap(box, other) > SAME_BOX for other in boxes):
            log.repair("a box that repeats another of its phrase was dropped")
        elif len(boxes) == MAX_BOXES:
            log.repair(f"a phrase keeps {MAX_BOXES} boxes, the others were dropped")
        else:
            boxes.append(box)
    return tuple(boxes)


def _box(corners: Corners, size: tuple[float, float], log: Log) -> Box | None:
    width, height = size
    xs = sorted((corners[0] * 1000 / width, corners[2] * 1000 / width))
    ys = sorted((corners[1] * 1000 / height, corners[3] * 1000 / height))
    if corners[0] > corners[2] or corners[1] > corners[3]:
        log.repair("reversed corners were sorted")
    low, high = min(xs + ys), max(xs + ys)
    if low < -OVERSHOOT or high > 1000 + OVERSHOOT:
        log.repair("a box beyond the picture was dropped")
        return None
    if low < 0 or high > 1000:
        log.repair("a box was clipped to the picture")
    x1, x2, y1, y2 = (math.floor(min(max(v, 0), 1000) + 0.5) for v in xs + ys)
    if x2 - x1 < LEAST_SIDE or y2 - y1 < LEAST_SIDE:
        log.repair(f"a box with a side under {LEAST_SIDE} thousandths was dropped")
        return None
    return Box(x1, y1, x2, y2)


def overlap(first: Box, second: Box) -> float:
    """Intersection over union."""
    width = min(first.x2, second.x2) - max(first.x1, second.x1)
    height = min(first.y2, second.y2) - max(first.y1, second.y1)
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b.x2 - b.x1) * (b.y2 - b.y1) for b in (first, second)]
    return width * height / (sum(areas) - width * height)


# ---- loops ---------------------------------------------------------------------------------------

Pairs = list[tuple[str, tuple]]


def _amount(pairs: Sequence[tuple[str, tuple]], tail: str) -> int:
    """Words and boxes."""
    return sum(len(words.split()) + len(boxes) for words, boxes in pairs) + len(tail.split())


def _cut_loops(pairs: Pairs, named: Sequence[str], tail: str, log: Log) -> tuple[Pairs, str]:
    """Everything from the first repetition on goes."""
    places: dict[tuple[str, Box], list[int]] = {}
    for index, (words, boxes) in enumerate(pairs):
        for box in boxes:
            places.setdefault((named[index] or words.casefold(), box), []).append(index)
    loops = [found[1] for found in places.values() if len(found) >= 3]
    if loops:
        log.repair("a loop was cut")
        pairs, tail = pairs[: min(loops)], ""
    words = [word for phrase, _ in pairs for word in phrase.split()] + tail.split()
    start = loop_start(words)
    if start is None:
        return pairs, tail
    log.repair("a loop was cut")
    kept: Pairs = []
    for phrase, boxes in pairs:
        count = len(phrase.split())
        if start < count:
            return kept, " ".join(phrase.split()[:start])
        kept.append((phrase, boxes))
        start -= count
    return kept, " ".join(tail.split()[:start])


# ---- what bbox and blob share --------------------------------------------------------------------


def merge(mentions: Sequence[tuple[str, tuple]], tail: str = "") -> tuple[Pairs, str]:
    """Phrases with shapes, and the words after the last; a phrase without any joins the next one.

    Shapes whose phrase has no letter or digit join those of the phrase before, or go.
    """
    pairs: Pairs = []
    carried = ""
    for words, shapes in mentions:
        carried = _joined(carried, words)
        if not pairs:
            carried = carried.lstrip(" " + grounding.ATTACHED + "-–—*#>)]")
        if not shapes:
            continue
        if any(character.isalnum() for character in carried):
            pairs.append((carried, tuple(shapes)))
        elif pairs:
            pairs[-1] = (pairs[-1][0], (*pairs[-1][1], *shapes)[:MAX_BOXES])
        carried = ""
    return pairs, _joined(carried, tail)


def write_grounded(pairs: Pairs, tail: str, module: ModuleType) -> str:
    """The strict string of `bbox` or `blob`, cut at the end to what the latent may hold.

    Raises:
      LatentError: nothing is left that can be written.
    """
    segments = [module.Segment(clean(phrase, _MAX_PHRASE), shapes) for phrase, shapes in pairs]
    tail = clean(tail, _MAX_PHRASE)
    last = [module.Segment(tail)] if tail else []
    while True:
        try:
            return module.write(segments + last)
        except LatentError:
            if len(segments) < 2:
                raise
            segments, last = segments[:-1], []


def _joined(first: str, second: str) -> str:
    if not first or not second:
        return first or second
    return first + ("" if second[0] in grounding.ATTACHED else " ") + second


def _prose(words: str, log: Log) -> str:
    """Single-spaced, in characters that T5 spells."""
    spelled, changed = spell(clean(words))
    if changed:
        log.repair("characters that T5 cannot spell were replaced or left out")
    return clean(spelled)


def _foreign(log: Log) -> Repaired:
    return _rejected(log, "more than 20% of the letters are not Latin", retry=True)


def _looping(log: Log) -> Repaired:
    return _rejected(log, "more than half of it was a loop")


def _rejected(log: Log, issue: str, retry: bool = False) -> Repaired:
    return Repaired("", "rejected", (*log.issues, issue), retry)


def _written(log: Log, write: Callable[[], str]) -> Repaired:
    try:
        return Repaired(write(), "repaired" if log.repaired else "ok", tuple(log.issues))
    except LatentError as error:
        return _rejected(log, str(error))
