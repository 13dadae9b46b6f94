"""What is said about a scene of shapes: caption, description, grounded caption and blobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kaleido_jax.data.shapes import (
    GREY_NAMES,
    HUE_NAMES,
    LAYOUTS,
    SHADE_NAMES,
    SHAPES,
    THEMES,
    Scene,
    Shape,
)
from kaleido_jax.errors import UserError
from kaleido_jax.latents import bbox, blob
from kaleido_jax.latents.bbox import Box
from kaleido_jax.latents.blob import Ellipse

_COUNTS = ("", "one shape", "two shapes", "three shapes")


def caption(scene: Scene) -> str:
    """The condition c: the theme word and the hues, nothing else.

    >>> "dawn: a red shape and a blue shape"
    """
    return write_caption(THEMES[scene.theme], [HUE_NAMES[item.hue] for item in scene.objects])


def write_caption(theme: str, hues: list[str]) -> str:
    """The caption of a theme word and one to three distinct hues (read back by parse_caption)."""
    named = [f"{_article(hue)} {hue} shape" for hue in hues]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"{theme}: {listed}"


def parse_caption(text: str) -> tuple[int, tuple[int, ...]]:
    """(theme, hues) as indices, from a caption as `write_caption` writes it.

    Raises:
      UserError: any other text.
    """
    theme, _, rest = text.partition(": ")
    words = rest.replace(",", "").split()
    hues = [word for word in words if word in HUE_NAMES]
    if theme not in THEMES or not 1 <= len(hues) <= 3 or write_caption(theme, hues) != text:
        raise UserError(
            f"not a caption of shapes: {text[:80]!r} (right: 'dawn: a red shape and a blue shape')"
        )
    return THEMES.index(theme), tuple(HUE_NAMES.index(hue) for hue in hues)


def name_of(item: Shape) -> str:
    """For example "dark red triangle": all of an object's modes."""
    return f"{SHADE_NAMES[item.shade]} {HUE_NAMES[item.hue]} {SHAPES[item.shape]}"


def phrases(scene: Scene) -> list[str]:
    """One phrase an object, then the background's; in order they tell the layout too."""
    first, *others = scene.objects
    result = [f"a {name_of(first)}"]
    if others:
        result.append(f"{LAYOUTS[scene.layout]} a {name_of(others[0])}")
    result += [f"and a {name_of(item)}" for item in others[1:]]
    return [*result, f"on {GREY_NAMES[scene.background]}"]


def grounded_caption(scene: Scene) -> str:
    """The latent `bbox`: each phrase with its box, naming every mode of the scene.

    >>> "a dark red disc (40, 310, 395, 580) left of a pale blue disc (520, 401, 890, 660) on grey"
    """
    boxes = [Box(*item.box) for item in scene.objects]
    return bbox.write(_segments(scene, bbox.Segment, boxes))


def blobs(scene: Scene) -> str:
    """The latent `blob`: the same phrases with (xc, yc, r_major, r_minor, theta)."""
    ellipses = [
        Ellipse(item.x, item.y, item.major, item.minor, item.theta) for item in scene.objects
    ]
    return blob.write(_segments(scene, blob.Segment, ellipses))


def _segments(scene, segment, figures):
    *named, background = phrases(scene)
    pairs = zip(named, figures, strict=True)
    return (*(segment(phrase, (figure,)) for phrase, figure in pairs), segment(background, ()))


@dataclass(frozen=True)
class Claim:
    """What a latent says of one object; None where it does not say."""

    hue: int | None
    shade: int | None
    shape: int | None
    figure: Box | Ellipse


def read_grounded(
    segments: Sequence[bbox.Segment] | Sequence[blob.Segment],
) -> tuple[tuple[Claim, ...], int | None, int | None]:
    """(claims, layout, background) of a parsed `bbox` or `blob` latent, also of a generated one.

    Wording that shapes do not use is passed over.
    """
    claims, layout, background = [], None, None
    for segment in segments:
        figures = segment.boxes if isinstance(segment, bbox.Segment) else segment.ellipses
        words = segment.phrase.split()
        claims += [
            Claim(_named(words, HUE_NAMES), _named(words, SHADE_NAMES), _named(words, SHAPES), f)
            for f in figures
        ]
        for number, name in enumerate(LAYOUTS):
            if layout is None and segment.phrase.startswith(name):
                layout = number
        for number, name in enumerate(GREY_NAMES):
            if segment.phrase.endswith(f"on {name}"):
                background = number
    return tuple(claims), layout, background


def _named(words: list[str], names: Sequence[str]) -> int | None:
    return next((names.index(word) for word in words if word in names), None)


# Each part has several wordings; the scene's `style` picks one of each.
_OPENINGS = (
    "The picture shows {count} on a plain {background} background.",
    "Here is a simple picture: the background is {background} and holds {count}.",
    "Against a flat {background} background we see {count}.",
)
_ITEMS = (
    "There is a {name}, {size} and {tilt}, {place}.",
    "A {name} lies {place}; it is {size} and {tilt}.",
    "{Place} sits a {name} which is {size} and {tilt}.",
)
_RELATIONS = (
    "The {a} is {relation} the {b}.",
    "Of these, the {a} stands {relation} the {b}.",
    "Note that the {a} is found {relation} the {b}.",
)
# Said in turn until the description has fifty words.
_CLOSINGS = (
    (
        "Every edge is crisp and every colour is even.",
        "Nothing else is there, only clean edges and even colour.",
        "All outlines are sharp and filled with one even colour.",
    ),
    (
        "There is no shadow, no texture and no line around the figure.",
        "Neither shadow nor texture can be seen anywhere in the scene.",
        "The scene has no depth, no shadow and no pattern at all.",
    ),
    (
        "The rest of the frame stays empty, with one tone from corner to corner.",
        "Around it the frame is empty and of one tone from edge to edge.",
        "Much of the frame is left empty, a single tone reaching every corner.",
    ),
)


def description(scene: Scene) -> str:
    """The latent `text`: 50 to 80 words on all modes, sizes, tilts and places."""
    styles = _digits(scene.style)
    background = GREY_NAMES[scene.background]
    parts = [
        _OPENINGS[next(styles)].format(background=background, count=_COUNTS[len(scene.objects)])
    ]
    wording = next(styles)
    for item in scene.objects:
        place = _place_words(item)
        parts.append(
            _ITEMS[wording].format(
                name=name_of(item),
                size=_size_word(item),
                tilt=_tilt_words(item),
                place=place,
                Place=place[0].upper() + place[1:],
            )
        )
    if scene.layout is not None:
        first, second = scene.objects[:2]
        parts.append(
            _RELATIONS[next(styles)].format(
                a=f"{HUE_NAMES[first.hue]} {SHAPES[first.shape]}",
                b=f"{HUE_NAMES[second.hue]} {SHAPES[second.shape]}",
                relation=LAYOUTS[scene.layout],
            )
        )
    for closing in _CLOSINGS:
        if sum(len(part.split()) for part in parts) < 50:
            parts.append(closing[next(styles)])
    return " ".join(parts)


def _digits(style: int) -> Iterator[int]:
    while True:
        yield style % 3
        style //= 3


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _size_word(item: Shape) -> str:
    return "small" if item.major < 150 else "large" if item.major > 190 else "medium"


def _tilt_words(item: Shape) -> str:
    tilt = item.theta
    if tilt < 15 or tilt >= 165:
        return "level"
    if 75 <= tilt < 105:
        return "upright"
    return "leaning right" if tilt < 90 else "leaning left"


def _place_words(item: Shape) -> str:
    row = ("top", "middle", "bottom")[min(2, item.y * 3 // 1000)]
    column = ("left", "centre", "right")[min(2, item.x * 3 // 1000)]
    if row == "middle":
        return "in the very centre" if column == "centre" else f"half way down on the {column}"
    return f"at the {row} in the {column}" if column == "centre" else f"at the {row} {column}"
