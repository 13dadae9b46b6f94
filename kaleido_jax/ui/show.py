"""HTML of pictures, latents, differences and progress. All words of people are escaped here."""

from __future__ import annotations

import base64
import difflib
import html
import io
import json
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from kaleido_jax.latents import LatentError, latent_type, panel
from kaleido_jax.latents.drawing import PALETTE
from kaleido_jax.session_folder import EDITED, OPENED, Picture
from kaleido_jax.ui.sessions import Session
from kaleido_jax.ui.studio import Compared
from kaleido_jax.ui.worker import CANCELLED, RUNNING, WAITING, View

escape = html.escape
GROUNDED = {"bbox": "boxes", "blob": "ellipses"}
_AROUND = 30  # characters shown on either side of a mistake
_THUMBNAIL = 72  # pixels of a side, as page.css has it
# Tokens before times tokens after; finding what is alike in them takes up to the cube of either.
_MAX_COMPARED = 100_000


def picture_url(picture: Picture) -> str:
    """The picture with its document as a PNG inside an address; it is encoded once."""
    return _url(picture.png, "image/png")


def _url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_tag(image: UInt8[np.ndarray, "height width 3"], words: str) -> str:
    """An <img> with its alternative text."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return _tag(_url(file.getvalue(), "image/png"), words)


def _tag(address: str, words: str) -> str:
    return f'<img class="k-picture" alt="{escape(words)}" src="{address}">'


def download(picture: Picture) -> str:
    """A link that saves the PNG with its document inside."""
    name = f"kaleido-{picture.number:03d}.png"
    return f'<a class="k-link" download="{name}" href="{picture_url(picture)}">Save PNG</a>'


def archive_link(data: bytes, count: int) -> str:
    """A link that saves a session's archive."""
    words = f"Save kaleido-session.zip ({count} pictures)"
    address = _url(data, "application/zip")
    return f'<a class="k-link" download="kaleido-session.zip" href="{address}">{words}</a>'


def latents_text(picture: Picture) -> str:
    """The strings of the latents, to read and copy."""
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(string)}</dd>"
        for name, string in picture.document.latents.items()
    )
    return f'<dl class="k-latents">{rows}</dl>' if rows else ""


def cards(pictures: Sequence[Picture]) -> str:
    """Fresh pictures, each beside its latents, with what can be done with it."""
    found = []
    for picture in pictures:
        words = f"Picture {picture.number}: {picture.document.caption}"
        drawn = panel(picture.image, picture.document.latents)
        found.append(
            f'<li class="k-card">{_tag(picture_url(picture), words)}'
            f"{image_tag(drawn, f'Latents of picture {picture.number}, drawn; text below')}"
            f"{latents_text(picture)}{_actions(picture, download(picture))}</li>"
        )
    return f'<ul class="k-cards">{"".join(found)}</ul>'


def _actions(picture: Picture, link: str) -> str:
    number = picture.number
    return (
        f'<p class="k-actions"><button type="button" data-pick="{number}" '
        f'aria-label="Edit picture {number}">Edit</button>{link}</p>'
    )


def previews(images: UInt8[np.ndarray, "n height width 3"]) -> str:
    """Pictures as they look so far."""
    found = "".join(
        f'<li class="k-card">{image_tag(image, f"Preview of picture {i + 1}")}</li>'
        for i, image in enumerate(images)
    )
    return f'<ul class="k-cards k-previews" aria-hidden="true">{found}</ul>'


def strip(session: Session) -> str:
    """All pictures of a session, small, the branches indented.

    The current one is marked and can be saved. What is shown of all is some 10 KB a picture: it is
    sent anew at every step.
    """
    if not session.pictures:
        return '<p class="k-note">Nothing yet. Draw a picture, or open one of ours below.</p>'
    children: dict[int | None, list[Picture]] = {}
    for picture in session.pictures:
        children.setdefault(picture.parent, []).append(picture)
    rows, pending = [], list(reversed(children.get(None, [])))
    while pending:  # depth first, so that a branch stands below what it grew from
        picture = pending.pop()
        pending += reversed(children.get(picture.number, []))
        rows.append(_row(session, picture))
    return f'<ol class="k-strip">{"".join(rows)}</ol>'


def _row(session: Session, picture: Picture) -> str:
    number = picture.number
    current, link = "", ""
    if number == session.current:
        current, link = ' aria-current="true"', download(picture)
    if number not in session.thumbnails:
        session.thumbnails[number] = _thumbnail(picture.image)
    depth = min(session.depth(number), 8)
    return (
        f'<li class="k-step" style="--depth:{depth}"{current}>'
        f"{_tag(session.thumbnails[number], f'Picture {number}')}"
        f'<div><p class="k-what"><b>{number}</b> {escape(what(picture))}</p>'
        f"{_actions(picture, link)}</div></li>"
    )


def _thumbnail(image: UInt8[np.ndarray, "height width 3"]) -> str:
    file = io.BytesIO()
    small = Image.fromarray(image)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small.save(file, format="PNG")
    return _url(file.getvalue(), "image/png")


def what(picture: Picture) -> str:
    """One line on how a picture came about."""
    if picture.made == OPENED:
        return f"opened: {_short(picture.document.caption)}"
    if picture.made != EDITED:
        return f"drawn: {_short(picture.document.caption)}"
    words = [_edit_words(verb, argument) for verb, argument in picture.change.step]
    if picture.change.noise is not None:
        words.append(f"noise {picture.change.noise}")
    return f"from {picture.parent}: {'; '.join(words)}"


def _edit_words(verb: str, argument: str) -> str:
    if verb == "resample":
        return f"{argument.replace(',', ', ')} drawn anew"
    name, _, string = argument.partition("=")
    return f"{name} is now {_short(string)}"


def _short(text: str) -> str:
    return text if len(text) <= 90 else f"{text[:87]}..."


def compared(found: Sequence[Compared], caption: str) -> str:
    """A table: a row for each model, a column for each guidance weight."""
    weights = list(dict.fromkeys(item.weight for item in found))
    heads = "".join(f'<th scope="col">guidance {weight:g}</th>' for weight in weights)
    rows = []
    for model in dict.fromkeys(item.model for item in found):
        cells = "".join(
            "<td>"
            + "".join(
                image_tag(image, f"{model}, guidance {item.weight:g}, picture {i + 1}")
                for i, image in enumerate(item.images)
            )
            + "</td>"
            for item in found
            if item.model == model
        )
        rows.append(f'<tr><th scope="row">{escape(model)}</th>{cells}</tr>')
    return (
        f'<div class="k-scroll"><table class="k-compare"><caption>{escape(caption)}</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def slider(before: Picture | None, after: Picture | None) -> str:
    """Two pictures over each other with a handle between; one alone where there is no other."""
    if after is None:
        return ""
    if before is None:
        return f'<div class="k-slider">{_tag(picture_url(after), "The picture as it is")}</div>'
    return (
        '<div class="k-slider" style="--at:50%">'
        f"{_tag(picture_url(before), f'Before: picture {before.number}')}"
        f'<div class="k-over">{_tag(picture_url(after), f"After: picture {after.number}")}</div>'
        '<input type="range" min="0" max="100" value="50" '
        f'aria-label="Before and after: left of the line picture {before.number}, right of it '
        f'picture {after.number}"></div>'
        f'<p class="k-note">Left {before.number}, right {after.number}.</p>'
    )


def editor_value(picture: Picture, load: int) -> str:
    """What the editor of shapes is given: JSON of all that can be dragged, and of which picture.

    Args:
      load: another number whenever another picture is loaded.
    """
    latents = {}
    for name in GROUNDED:
        if name in picture.document.latents:
            latents[name] = shapes(name, picture.document.latents[name])
    return json.dumps({"load": load, "rev": 0, "picture": picture.number, "latents": latents})


def shapes(name: str, string: str) -> dict[str, object]:
    """A latent for the editor: the string that it was made from, and its parts."""
    latent = latent_type(name)
    return {"base": string, "parts": latent.parts(latent.parse(string))}


def palette() -> list[str]:
    """The colours of objects, as in the pictures with latents drawn on them."""
    return [f"rgb({red},{green},{blue})" for red, green, blue in PALETTE]


def vokens(string: str) -> str:
    """Visual tokens as a coloured 4 x 8 grid; '' if they are not valid."""
    try:
        value = latent_type("voken").parse(string)
    except LatentError:
        return ""
    mosaic = latent_type("voken").draw(np.zeros((1, 320, 3), np.uint8), value)[1:]
    return image_tag(mosaic, "The visual tokens as a grid, equal ones in equal colours")


def marked(name: str, old: str, new: str) -> str:
    """What of a string was changed, or at which character it is wrong."""
    try:
        if name != "caption":
            latent_type(name).parse(new.strip())
    except LatentError as error:
        return _mistake(new.strip(), error)
    if new.strip() == old:
        return ""
    before, after = re.findall(r"\s+|\w+|[^\w\s]", old), re.findall(r"\s+|\w+|[^\w\s]", new)
    found = []
    for kind, a, b, c, d in _opcodes(before, after):
        if kind == "equal":
            found.append(escape("".join(after[c:d])))
            continue
        if b > a:
            found.append(f"<del>{escape(''.join(before[a:b]))}</del>")
        if d > c:
            found.append(f"<ins>{escape(''.join(after[c:d]))}</ins>")
    return f'<p class="k-marked"><span class="k-name">changed: </span>{"".join(found)}</p>'


def _opcodes(before: list[str], after: list[str]) -> list[tuple[str, int, int, int, int]]:
    """What to do to `before` to get `after`, as difflib has it; too much is one replacement."""
    most = min(len(before), len(after))
    head = next((i for i in range(most) if before[i] != after[i]), most)
    most -= head
    tail = next((i for i in range(most) if before[-1 - i] != after[-1 - i]), most)
    b, d = len(before) - tail, len(after) - tail
    middle = [("replace", head, b, head, d)]
    if (b - head) * (d - head) <= _MAX_COMPARED:
        matcher = difflib.SequenceMatcher(None, before[head:b], after[head:d], False)
        middle = [
            (kind, *(head + place for place in places)) for kind, *places in matcher.get_opcodes()
        ]
    return [("equal", 0, head, 0, head), *middle, ("equal", b, len(before), d, len(after))]


def _mistake(string: str, error: LatentError) -> str:
    place = error.position
    where = ""
    if place is not None:
        head, tail = string[max(place - _AROUND, 0) : place], string[place + 1 : place + _AROUND]
        at = escape(string[place : place + 1]) or "&nbsp;"
        where = f" <code>{escape(head)}<mark>{at}</mark>{escape(tail)}</code>"
    return f'<p class="k-error" role="alert">{escape(str(error))}{where}</p>'


def status(view: View) -> str:
    """Where a request stands: place in the queue, or what is done, with the time left."""
    left = "" if view.seconds_left is None else f", about {max(1, view.seconds_left)} s"
    if view.state == WAITING:
        before = view.position - 1
        who = "You are next" if before == 0 else f"{before} before you"
        return note(f"In the queue, place {view.position}: {who}{left}.")
    if view.state == RUNNING and view.report is not None and view.report.total:
        report = view.report
        share = round(100 * report.done / report.total)
        words = f"{report.words}: step {report.done} of {report.total}{left}"
        return (
            f'<p class="k-note" role="status">{escape(words)}</p>'
            f'<progress class="k-bar" max="100" value="{share}" aria-label="progress"></progress>'
        )
    if view.state == RUNNING:
        return note(f"{view.report.words if view.report else 'starting'}{left}")
    return note("Cancelled." if view.state == CANCELLED else "")


def note(words: str) -> str:
    """A line that screen readers tell."""
    return f'<p class="k-note" role="status">{escape(words)}</p>'


def problem(words: str) -> str:
    """A line on what went wrong."""
    return f'<p class="k-error" role="alert">{escape(words)}</p>'
