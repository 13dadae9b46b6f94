"""The page's functions for programs: two endpoints, as docs/page.md and /?view=api describe."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
import numpy as np
from jaxtyping import UInt8

from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument, png_bytes
from kaleido_jax.ui import bounds
from kaleido_jax.ui.studio import Studio, draw_job, edit_job, watch
from kaleido_jax.ui.worker import ENDED, Stopped, Ticket


def add_endpoints(studio: Studio) -> None:
    """Adds `/create` and `/edit` to the page that is being built.

    Both yield {"state", "position", "words", "step", "steps", "seconds_left"} while they wait and
    run, and at the end {"state": "done", "pictures": [{"png" in base64, "document"}, ..]}. They
    keep nothing on the server.
    """

    async def create(
        request: gr.Request,
        caption: str,
        number: int = 1,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> AsyncIterator[dict]:
        """Draws latents and pictures for a caption; what is None is as the model has it."""
        try:
            wanted = bounds.check_request(
                studio.defaults,
                caption=caption,
                number=number,
                guidance=guidance,
                steps=steps,
                sampler=sampler,
                temperature=temperature,
                seed=seed,
            )
            ticket = studio.pool.submit(draw_job(wanted), _owner(request))
            async for state in _states(ticket, studio):
                yield state
            output = ticket.result()
        except (UserError, Stopped) as error:
            raise _told(error) from None
        pictures = await asyncio.to_thread(
            lambda: list(map(_picture, output.images, output.documents))
        )
        yield {"state": "done", "pictures": pictures}

    async def edit(
        request: gr.Request,
        document: dict,
        step: list,
        seed: int = 0,
        noise: int | None = None,
    ) -> AsyncIterator[dict]:
        """Makes a step of edits, such as [["set", "bbox=.."], ["resample", "voken"]], and draws."""
        try:
            before = LatentDocument.from_dict(document)
            bounds.check_document(before, studio.defaults, studio.names)
            change = bounds.check_step(before, step, names=studio.names, seed=seed, noise=noise)
            ticket = studio.pool.submit(edit_job(before, change), _owner(request))
            async for state in _states(ticket, studio):
                yield state
            made = ticket.result()
        except (UserError, Stopped) as error:
            raise _told(error) from None
        yield {"state": "done", "pictures": [await asyncio.to_thread(_picture, *made)]}

    for name, function in (("create", create), ("edit", edit)):
        gr.api(function, api_name=name, concurrency_limit=None)


def _owner(request: gr.Request) -> str:
    if not request.session_hash:
        raise UserError("this request belongs to no session")
    return request.session_hash


async def _states(ticket: Ticket, studio: Studio) -> AsyncIterator[dict[str, Any]]:
    async for view in watch(ticket, studio.unread):
        if view.state not in ENDED:
            report = view.report
            yield {
                "state": view.state,
                "position": view.position,
                "words": "" if report is None else report.words,
                "step": 0 if report is None else report.done,
                "steps": 0 if report is None else report.total,
                "seconds_left": view.seconds_left,
            }


def _picture(
    image: UInt8[np.ndarray, "height width 3"], document: LatentDocument
) -> dict[str, Any]:
    data = base64.b64encode(png_bytes(image, document)).decode()
    return {"png": data, "document": document.to_dict()}


def _told(error: Exception) -> gr.Error:
    words = "cancelled" if isinstance(error, Stopped) else str(error)
    return gr.Error(words, print_exception=False)
