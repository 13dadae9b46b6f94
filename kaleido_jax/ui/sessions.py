"""What each person has made: a tree of pictures per session, all of it bounded.

A session is known by a key that only its owner has; nothing else leads to it. Empty sessions, and
those whose page is closed, make room for others first, then those not used for longest.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.errors import UserError
from kaleido_jax.latents import LatentDocument
from kaleido_jax.session_folder import Change, Picture

MAX_SESSIONS = 128
MAX_PICTURES = 200
MAX_BYTES = 2**26  # of pixels, each session; PNGs of them take about as much again
MAX_TOTAL_BYTES = 2**29  # of pixels, all sessions together
IDLE_SECONDS = 4 * 3600.0
CLOSED_SECONDS = 600.0  # a page counts as closed as well when its line is broken for a moment


class Session:
    """The pictures of one person, in the order in which they came, each knowing its parent.

    Attributes:
      key: whose it is.
      pictures: all of them; picture i has the number i.
      current: number of the picture that is being edited; None at first.
      thumbnails: of pictures, by their numbers, once they were shown.
      changing: whether the latents on the page differ from those of the current picture.
      closed: whether its page was closed after the session was last used.
    """

    def __init__(self, key: str, seen: float = 0.0):
        self.key, self.seen = key, seen
        self.pictures: list[Picture] = []
        self.current: int | None = None
        self.thumbnails: dict[int, str] = {}
        self.changing = self.closed = False
        self._undone: list[int] = []

    @property
    def held(self) -> int:
        """Bytes of its pixels."""
        return sum(picture.image.nbytes for picture in self.pictures)

    def check_room(self, count: int, shape: Sequence[int]) -> None:
        """Raises UserError unless `count` more pictures of this shape have room."""
        if (
            len(self.pictures) + count > MAX_PICTURES
            or self.held + count * int(np.prod(shape)) > MAX_BYTES
        ):
            raise UserError(
                f"your history is full ({len(self.pictures)} pictures); "
                "download it, then empty it under History"
            )

    def add_drawn(
        self,
        images: UInt8[np.ndarray, "n height width 3"],
        documents: Sequence[LatentDocument],
        batch_size: int,
    ) -> list[Picture]:
        """Adds pictures that were drawn in one batch.

        The first becomes the current one, unless somebody is changing another by now.
        """
        self.check_room(len(images), images.shape[1:])
        first = len(self.pictures)
        together = tuple(range(first, first + len(images)))
        made = [
            Picture(number, image, document, together=together, batch_size=batch_size)
            for number, image, document in zip(together, images, documents, strict=True)
        ]
        self.pictures += made
        if not self.changing:
            self.go(first)
        return made

    def add_edited(
        self,
        parent: int,
        change: Change,
        image: UInt8[np.ndarray, "height width 3"],
        document: LatentDocument,
    ) -> Picture:
        """Adds what a change made of a picture, as a branch of it; it becomes the current one."""
        self.check_room(1, image.shape)
        self.picture(parent)
        return self._add(Picture(len(self.pictures), image, document, parent, change))

    def add_opened(
        self, image: UInt8[np.ndarray, "height width 3"], document: LatentDocument
    ) -> Picture:
        """Adds a picture from a file; it becomes the current one."""
        self.check_room(1, image.shape)
        return self._add(Picture(len(self.pictures), image, document))

    def _add(self, picture: Picture) -> Picture:
        self.pictures.append(picture)
        self.go(picture.number)
        return picture

    def picture(self, number: object) -> Picture:
        """The picture of this number. Raises UserError if this session has none such."""
        if type(number) is not int or not 0 <= number < len(self.pictures):
            raise UserError("this picture is not in your history")
        return self.pictures[number]

    def check_holds(self, picture: Picture) -> None:
        """Raises UserError unless this very picture is in the history still."""
        if not any(held is picture for held in self.pictures):
            raise UserError("the picture that was edited is not in your history any more")

    def now(self) -> Picture:
        """The current picture. Raises UserError if there is none."""
        if self.current is None:
            raise UserError("there is no picture yet; draw or open one first")
        return self.pictures[self.current]

    def go(self, number: int) -> Picture:
        """Makes a picture the current one: what is edited next branches off from it."""
        picture = self.picture(number)
        self._undone.clear()
        return self._turn_to(picture)

    def _turn_to(self, picture: Picture) -> Picture:
        self.current, self.changing = picture.number, False
        return picture

    def undo(self) -> Picture:
        """Goes back to the picture that the current one was edited from. Raises UserError."""
        parent = self.now().parent
        if parent is None:
            raise UserError("there is nothing to undo: this picture was not edited")
        self._undone.append(self.current)
        return self._turn_to(self.pictures[parent])

    def redo(self) -> Picture:
        """Takes the last undo back. Raises UserError if there was none."""
        if not self._undone:
            raise UserError("there is nothing to do again")
        return self._turn_to(self.pictures[self._undone.pop()])

    def depth(self, number: int) -> int:
        """Edits between a picture and the one that it began with."""
        depth, parent = 0, self.picture(number).parent
        while parent is not None:
            depth, parent = depth + 1, self.pictures[parent].parent
        return depth

    def clear(self) -> None:
        """Forgets all pictures."""
        self.pictures, self.current, self.thumbnails, self.changing = [], None, {}, False
        self._undone.clear()

    def copy(self) -> Session:
        """The session as it is now, for a thread that shows or writes it."""
        made = copy.copy(self)
        made.pictures, made._undone = list(self.pictures), list(self._undone)
        return made


class Sessions:
    """All sessions by their keys."""

    def __init__(
        self,
        limit: int = MAX_SESSIONS,
        idle: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        room: int = MAX_TOTAL_BYTES,
    ):
        """At most `limit` sessions of `room` bytes, none unused for more than `idle` seconds.

        They are counted whenever one is used.
        """
        self._limit, self._idle, self._clock, self._room = limit, idle, clock, room
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str | None) -> Session:
        """The session of this key, a new one if there is none. Raises UserError without a key."""
        if not key or len(key) > 200:
            raise UserError("this request belongs to no session; reload the page")
        with self._lock:
            now = self._clock()
            session = self._sessions.setdefault(key, Session(key, now))
            session.seen, session.closed = now, False
            self._sessions.move_to_end(key)
            self._make_room(session, now)
            return session

    def close(self, key: str) -> None:
        """The page of a session is closed: it is the first to make room, if it is not used again.

        One without pictures is forgotten at once.
        """
        with self._lock:
            session = self._sessions.get(key)
            if session is not None:
                session.closed = True
                if not session.pictures:
                    del self._sessions[key]

    def _make_room(self, used: Session, now: float) -> None:
        held = sum(session.held for session in self._sessions.values())
        others = [session for session in self._sessions.values() if session is not used]
        # Those used last stay last: the order of the others does not change.
        for session in sorted(others, key=lambda s: bool(s.pictures) and not s.closed):
            idle = CLOSED_SECONDS if session.closed else self._idle
            full = held > self._room and session.pictures
            if full or len(self._sessions) > self._limit or now - session.seen > idle:
                held -= session.held
                del self._sessions[session.key]
