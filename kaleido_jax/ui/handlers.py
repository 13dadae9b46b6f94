"""What happens at each button: values from a browser in, updates of components out.

Handlers are coroutines, so all of them run in one thread and a session needs no lock. Values are
checked by `bounds` before anything else; what is refused is said where the button is.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import gradio as gr

from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument
from kaleido_jax.session_folder import Picture, write_session
from kaleido_jax.ui import bounds, show
from kaleido_jax.ui.sessions import Session
from kaleido_jax.ui.studio import Studio, watch
from kaleido_jax.ui.worker import CANCELLED, DONE, Stopped, Ticket

_MAX_REDRAW = 16
# Of the editor's state: which loading of it, which change since, which picture.
_KEPT = ("load", "rev", "picture")


class Handlers:
    """The page's handlers over one studio.

    `view` gives the updates of the components that show the current picture, in the order of
    `page.Page.shown`: editor, caption, a box for each latent, marks, what is drawn anew, vokens,
    slider, history.
    """

    def __init__(self, studio: Studio, uploads: str | os.PathLike):
        """Args: `uploads` is the folder in which uploaded files lie."""
        self._studio, self._uploads = studio, uploads
        self._loads = itertools.count(1)

    def _session(self, request: gr.Request) -> Session:
        return self._studio.sessions.get(request.session_hash)

    # ---- what is shown ----------------------------------------------------------------------

    async def view(self, session: Session) -> list[Any]:
        """Updates of all components that show the current picture."""
        return await asyncio.to_thread(self._view, session.copy())

    def _view(self, session: Session) -> list[Any]:
        names = self._studio.names
        if session.current is None:
            blank = gr.update(value="", interactive=False)
            return [
                gr.update(value=json.dumps({"load": next(self._loads), "rev": 0, "latents": {}})),
                *[blank for _ in ("caption", *names)],
                "",
                gr.update(value=[]),
                "",
                "",
                show.strip(session),
            ]
        picture = session.now()
        latents = picture.document.latents
        parent = None if picture.parent is None else session.picture(picture.parent)
        return [
            gr.update(
                value=show.editor_value(picture, next(self._loads)),
                image=show.picture_url(picture),
                palette=show.palette(),  # an update replaces all of the properties
            ),
            gr.update(value=picture.document.caption, interactive=True),
            *[
                gr.update(value=latents.get(name, ""), interactive=name in latents)
                for name in names
            ],
            "",
            gr.update(value=[]),
            show.vokens(latents.get("voken", "")),
            show.slider(parent, picture),
            show.strip(session),
        ]

    def _unchanged(self) -> list[Any]:
        # editor, caption, marks, redraw, vokens, slider, history; and the latents
        return [gr.skip()] * (7 + len(self._studio.names))

    async def load(self, request: gr.Request) -> list[Any]:
        """What a fresh page shows."""
        return await self.view(self._session(request))

    # ---- drawing ----------------------------------------------------------------------------

    async def create(
        self,
        request: gr.Request,
        caption: Any,
        number: Any,
        guidance: Any,
        steps: Any,
        sampler: Any,
        temperature: Any,
        seed: Any,
    ) -> AsyncIterator[list[Any]]:
        """Draws pictures of a caption; yields [status, cards, *view]."""
        unchanged = self._unchanged()
        try:
            session = self._session(request)
            wanted = bounds.check_request(
                self._studio.defaults,
                caption=caption,
                number=number,
                guidance=guidance,
                steps=steps,
                sampler=sampler,
                temperature=temperature,
                seed=seed,
            )
            ticket = self._studio.draw(session, wanted)
            async for state, preview in self._follow(ticket):
                yield [state, preview, *unchanged]
            output, session = ticket.result(), self._session(request)
            made = session.add_drawn(output.images, output.documents, wanted.batch_size)
            cards = await asyncio.to_thread(show.cards, made)
            view = await self.view(session)
            if session.changing:
                words = f"Done. What you have begun with picture {session.current} is kept."
                yield [show.note(words), cards, *unchanged[:-1], view[-1]]
            else:
                yield [show.note("Done."), cards, *view]
        except Stopped:
            yield [show.note("Cancelled."), "", *unchanged]
        except UserError as error:
            yield [show.problem(str(error)), gr.skip(), *unchanged]

    async def _follow(self, ticket: Ticket) -> AsyncIterator[tuple[str, Any]]:
        """(status, previews) until the ticket has ended; previews are sent once each."""
        sent: Any = ""
        async for view in watch(ticket, self._studio.unread):
            if view.state in (DONE, CANCELLED):
                continue
            preview = None if view.report is None else view.report.preview
            shown: Any = gr.skip()
            if preview is not sent:
                shown = "" if preview is None else await asyncio.to_thread(show.previews, preview)
                sent = preview
            yield show.status(view), shown

    async def cancel(self, request: gr.Request) -> str:
        """Ends what this session has asked for; returns a status."""
        self._studio.pool.forget(self._session(request).key)
        return show.note("Cancelled.")

    async def left(self, request: gr.Request) -> None:
        """The browser is gone: nobody waits for what it asked for, its session makes room."""
        if request.session_hash:
            self._studio.pool.forget(request.session_hash)
            self._studio.sessions.close(request.session_hash)

    # ---- editing ----------------------------------------------------------------------------

    async def edit(
        self,
        request: gr.Request,
        editor: Any,
        redraw: Any,
        other_noise: Any,
        noise: Any,
        caption: Any,
        *strings: Any,
    ) -> AsyncIterator[list[Any]]:
        """Draws the current picture again as edited; yields [status, preview, *view]."""
        unchanged = self._unchanged()
        try:
            session = self._session(request)
            parent = session.now()
            if _editor_state(editor).get("picture") != parent.number:
                raise UserError(
                    f"the page has turned to picture {parent.number} meanwhile; look at it, "
                    "then draw again"
                )
            change = bounds.check_change(
                parent.document,
                {"caption": caption, **self._written(editor, strings, parent.document)},
                bounds.check_list("what is drawn anew", redraw, _MAX_REDRAW),
                names=self._studio.names,
                seed=len(session.pictures),
                noise=noise if other_noise else None,
            )
            ticket = self._studio.edit(session, parent, change)
            async for state, preview in self._follow(ticket):
                yield [state, preview, *unchanged]
            (image, document), session = ticket.result(), self._session(request)
            session.check_holds(parent)
            session.add_edited(parent.number, change, image, document)
            yield [show.note("Done. Undo goes back."), "", *await self.view(session)]
        except Stopped:
            yield [show.note("Cancelled."), "", *unchanged]
        except UserError as error:
            yield [show.problem(str(error)), "", *unchanged]

    def _written(
        self, editor: Any, strings: Sequence[Any], document: LatentDocument
    ) -> dict[str, Any]:
        """The strings of the latents, from the editor where that is newer than the text box."""
        found = {
            name: string
            for name, string in zip(self._studio.names, strings, strict=True)
            if name in document.latents
        }
        for name, latent in _editor_state(editor)["latents"].items():
            # The editor says which string it began with; another one was typed since.
            if name in found and found[name] == latent.get("base"):
                found[name] = bounds.read_shapes(name, latent.get("parts"))
        return found

    async def moved(self, editor: Any) -> list[Any]:
        """Something was dragged: returns [status, editor, a string for each grounded latent]."""
        try:
            state = _editor_state(editor)
            strings = {
                name: bounds.read_shapes(name, latent.get("parts"))
                for name, latent in state["latents"].items()
            }
            shown = {name: show.shapes(name, string) for name, string in strings.items()}
            boxes = [strings.get(name, gr.skip()) for name in self.grounded()]
            return [show.note(""), _echo(state, shown), *boxes]
        except UserError as error:
            return [show.problem(str(error)), gr.skip(), *[gr.skip() for _ in self.grounded()]]

    async def typed(self, editor: Any, *strings: Any) -> str:
        """A string was typed: returns the editor with the shapes of those that are valid."""
        try:
            state = _editor_state(editor)
            latents = dict(state["latents"])
            for name, string in zip(self.grounded(), strings, strict=True):
                if name in latents:
                    latents[name] = show.shapes(name, bounds.check_latent(name, string))
        except UserError:
            return gr.skip()  # the marks say what is wrong
        return _echo(state, latents)

    async def marks(self, request: gr.Request, caption: Any, *strings: Any) -> str:
        """What was changed of the current picture's document, and what is not valid."""
        try:
            session = self._session(request)
            picture = session.now()
        except UserError:
            return ""
        document, found = picture.document, []
        for name, string in zip(("caption", *self._studio.names), (caption, *strings), strict=True):
            old = document.caption if name == "caption" else document.latents.get(name)
            if old is None:
                continue
            try:
                bounds.check_length(name, string)
                marked = await asyncio.to_thread(show.marked, name, old, string)
            except UserError as error:
                marked = show.problem(str(error))
            if marked:
                found.append(f'<div><span class="k-name">{name}</span>{marked}</div>')
        if session.current == picture.number:
            session.changing = bool(found)
        return "".join(found)

    def grounded(self) -> list[str]:
        """The latents that the editor shows."""
        return [name for name in self._studio.names if name in show.GROUNDED]

    async def take_vokens(self, request: gr.Request, number: Any) -> list[Any]:
        """The vokens of another picture of this session: [status, string]."""
        try:
            session = self._session(request)
            last = max(len(session.pictures) - 1, 0)
            picture = session.picture(bounds.whole("the picture", number, 0, last))
            if "voken" not in picture.document.latents:
                raise UserError(f"picture {picture.number} has no vokens")
            return [show.note("Taken; draw again to see it."), picture.document.latents["voken"]]
        except UserError as error:
            return [show.problem(str(error)), gr.skip()]

    # ---- history ----------------------------------------------------------------------------

    async def undo(self, request: gr.Request) -> list[Any]:
        """Back to the parent: [status, *view]."""
        return await self._step(request, Session.undo)

    async def redo(self, request: gr.Request) -> list[Any]:
        """Forth again: [status, *view]."""
        return await self._step(request, Session.redo)

    async def _step(self, request: gr.Request, way: Any) -> list[Any]:
        try:
            session = self._session(request)
            picture = way(session)
            return [show.note(f"Picture {picture.number}."), *await self.view(session)]
        except UserError as error:
            return [show.problem(str(error)), *self._unchanged()]

    async def pick(self, request: gr.Request, event: gr.EventData) -> list[Any]:
        """Goes to a picture, to edit it: [tabs, status, *view]."""
        try:
            session = self._session(request)
            picture = session.go(event._data.get("number"))
            return [
                gr.Tabs(selected="edit"),
                show.note(f"Picture {picture.number}."),
                *await self.view(session),
            ]
        except UserError as error:
            return [gr.skip(), show.problem(str(error)), *self._unchanged()]

    async def open(self, request: gr.Request, path: Any) -> list[Any]:
        """Goes on from one of our PNG files: [status, *view]."""
        try:
            session = self._session(request)
            studio = self._studio
            image, document = await asyncio.to_thread(
                bounds.open_png, path, self._uploads, studio.defaults, studio.names, studio.size
            )
            picture = session.add_opened(image, document)
            words = f"Opened as picture {picture.number}; Edit goes on from it."
            return [show.note(words), *await self.view(session)]
        except UserError as error:
            return [show.problem(str(error)), *self._unchanged()]

    async def clear(self, request: gr.Request) -> list[Any]:
        """Forgets all pictures of the session: [status, cards, *view]."""
        session = self._session(request)
        self._studio.pool.forget(session.key)
        session.clear()
        return [show.note("Your history is empty."), "", *await self.view(session)]

    async def pack(self, request: gr.Request) -> list[Any]:
        """A link to the whole session as an archive: [status, link]."""
        try:
            pictures = self._session(request).copy().pictures
            data = await asyncio.to_thread(archive, pictures)
            return [show.note("Packed."), show.archive_link(data, len(pictures))]
        except UserError as error:
            return [show.problem(str(error)), ""]

    # ---- comparing --------------------------------------------------------------------------

    async def compare(
        self, request: gr.Request, caption: Any, number: Any, weights: Any, seed: Any
    ) -> AsyncIterator[list[Any]]:
        """Both models at several guidance weights; yields [status, table]."""
        try:
            session = self._session(request)
            wanted = bounds.check_request(
                self._studio.defaults,
                caption=caption,
                number=bounds.whole("the number of pictures", number, 1, bounds.BATCH),
                seed=seed,
            )
            ticket = self._studio.compare(session, wanted, bounds.check_weights(weights))
            async for state, preview in self._follow(ticket):
                yield [state, preview]
            table = await asyncio.to_thread(show.compared, ticket.result(), wanted.caption)
            yield [show.note("Done."), table]
        except Stopped:
            yield [show.note("Cancelled."), ""]
        except UserError as error:
            yield [show.problem(str(error)), gr.skip()]


def archive(pictures: Sequence[Picture]) -> bytes:
    """The folder of a session (`session_folder`) as a zip archive."""
    file = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_session(pictures, pathlib.Path(scratch) / "kaleido-session")
        with zipfile.ZipFile(file, "w") as packed:
            for path in sorted(folder.iterdir()):
                packed.write(path, f"kaleido-session/{path.name}")
    return file.getvalue()


def _editor_state(editor: Any) -> dict[str, Any]:
    """The editor's JSON; `latents` is what it holds of each. Raises UserError if it is not that."""
    state = bounds.read_json(editor)
    latents = state.get("latents") if isinstance(state, dict) else None
    if not isinstance(latents, dict):
        raise UserError("the editor's state is not as it must be; reload the page")
    for name, latent in latents.items():
        if name not in show.GROUNDED or not isinstance(latent, dict):
            raise UserError("the editor's state is not as it must be; reload the page")
    return state


def _echo(state: Mapping[str, Any], latents: Mapping[str, Any]) -> str:
    """The editor's JSON with other latents; of the rest only what belongs to it."""
    return json.dumps({**{key: state.get(key) for key in _KEPT}, "latents": latents})
