"""The web server of the page: who may come in, how much they may send, what the page may load."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from kaleido_jax.errors import UserError
from kaleido_jax.ui import bounds
from kaleido_jax.ui.handlers import Handlers
from kaleido_jax.ui.page import Page, static, theme
from kaleido_jax.ui.sessions import MAX_SESSIONS
from kaleido_jax.ui.studio import Engine, Studio

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MIN_TOKEN = 12
# Of a whole request: an upload and what stands around it.
MAX_BODY_BYTES = bounds.MAX_UPLOAD_BYTES + 2**20
# All uploads that the folder holds at once; each counts as a block of a disk at least.
MAX_UPLOADS_BYTES = 2**27
_BLOCK = 2**12
_UPLOAD = "/gradio_api/upload"
# What gradio may do at once beside the requests for pictures: events of the page.
EVENTS = 16
# Nothing from elsewhere: no fonts, no scripts, no analytics. The page works offline.
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "style-src 'self' 'unsafe-inline'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # gradio compiles its templates
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def choose_token(host: str, token: str | None) -> str | None:
    """The token that visitors need: none on loopback unless given, elsewhere always one.

    Raises:
      UserError: a token of under 12 characters.
    """
    if token:
        if len(token) < MIN_TOKEN:
            raise UserError(f"the token must have {MIN_TOKEN} characters at least")
        return token
    return None if host in LOOPBACK else secrets.token_urlsafe(24)


class Guard:
    """Refuses bodies that are too large, whatever their headers say, and adds headers.

    Uploads are refused, too, while their folder is full.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        uploads: str,
        limit: int = MAX_BODY_BYTES,
        room: int = MAX_UPLOADS_BYTES,
    ):
        """Args: bytes of a body, at most `limit`; of the folder `uploads`, at most `room`."""
        self._app, self._uploads, self._limit, self._room = app, uploads, limit, room
        self._arriving = 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"content-length", b"0")
        if not given.isdigit() or int(given) > self._limit:
            await _refuse(send, 413, b"too large")
        elif scope["method"] == "POST" and scope["path"].rstrip("/").endswith(_UPLOAD):
            # Those that arrive may grow to the limit each.
            self._arriving += self._limit
            try:
                held = await asyncio.to_thread(_bytes_in, self._uploads)
                if held + self._arriving > self._room:
                    await _refuse(send, 507, b"too many files are here already; try again later")
                else:
                    await self._pass(scope, receive, send)
            finally:
                self._arriving -= self._limit
        else:
            await self._pass(scope, receive, send)

    async def _pass(self, scope: dict, receive: Callable, send: Callable) -> None:
        received, started = 0, False

        async def counted() -> dict:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise _TooLarge
            return message

        async def with_headers(message: dict) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        try:
            await self._app(scope, counted, with_headers)
        except _TooLarge:
            if not started:
                await _refuse(send, 413, b"too large")


class _TooLarge(Exception):
    """More was sent than any request may have."""


async def _refuse(send: Callable, status: int, words: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words})


def _bytes_in(folder: str) -> int:
    """Bytes of all files in a folder, of which some may go meanwhile."""
    held = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                held += max(os.stat(os.path.join(parent, name)).st_size, _BLOCK)
    return held


def build(studio: Studio, uploads: str, token: str | None) -> Guard:
    """The web application.

    Args:
      studio: what it shows.
      uploads: folder for uploaded files.
      token: what visitors must know; None lets everybody in.
    """
    os.environ["GRADIO_TEMP_DIR"] = uploads
    page = Page(studio, Handlers(studio, uploads))
    page.blocks.state_session_capacity = MAX_SESSIONS
    # A request holds one of gradio's places while it waits, and events need some beside.
    page.blocks.max_threads = studio.pool.capacity + EVENTS
    page.blocks.queue(default_concurrency_limit=4, max_size=256)
    answers = page.blocks._queue.pending_messages_per_session  # gradio has no public way to it

    def unread(key: str) -> object | None:
        kept = answers.get(key)
        return None if kept is None or kept.empty() else kept._queue[0]

    studio.unread = unread

    def known(name: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (token or "").encode())

    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page.blocks,
        path="/",
        footer_links=["api"],
        run_history=False,
        auth=known if token else None,
        auth_message="Any name, and the token that `kaleido serve` has printed, as the password.",
        max_file_size=bounds.MAX_UPLOAD_BYTES,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme(),
        css=static("page.css"),
    )
    return Guard(app, uploads)


class _Server(uvicorn.Server):
    """Says where it is once it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Every open page holds a stream, which uvicorn cancels with a traceback for each.
        logging.getLogger("uvicorn.error").addFilter(_is_no_cancelled_stream)
        await super().shutdown(sockets)


def _is_no_cancelled_stream(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    cancelled = isinstance(error, asyncio.CancelledError)
    return not (cancelled or "timeout graceful shutdown exceeded" in record.getMessage())


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}") from error


def serve(
    engines: Sequence[Engine],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str | None = None,
    waiting: int,
    say: Callable[[str], None] = print,
) -> None:
    """Serves the page until it is interrupted.

    Args:
      engines: one for each device.
      host, port: where to listen; port 0 takes any that is free.
      token: what visitors must know; off loopback one is made up if there is none.
      waiting: people who may wait at once.
      say: is told the address, and a token that was made up.

    Raises:
      UserError: the address cannot be had, or the token is too short.
    """
    chosen = choose_token(host, token)
    with listen(host, port) as door, tempfile.TemporaryDirectory(prefix="kaleido-") as uploads:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{door.getsockname()[1]}/"
        studio = Studio(engines, waiting=waiting)

        def ready() -> None:
            say(f"Kaleido is at {address} (Ctrl-C stops it)")
            if chosen and not token:
                say(f"token: {chosen}")

        try:
            config = uvicorn.Config(
                build(studio, uploads, chosen),
                log_level="warning",
                timeout_graceful_shutdown=3,
                limit_concurrency=512 + 2 * studio.pool.capacity,
            )
            _Server(config, ready).run(sockets=[door])
        finally:
            studio.pool.close()
