"""Captions to sample for, pictures to measure against, true pictures to measure by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from kaleido_jax.data import RecordError, make_source, task_table
from kaleido_jax.data.reader import MAX_BAD_FRACTION
from kaleido_jax.data.sources import Source
from kaleido_jax.data.streams import permute
from kaleido_jax.errors import UserError
from kaleido_jax.latents.document import MAX_CAPTION
from kaleido_jax.prompts import clean_prompt

# The generator of shapes gives other data for another seed; training uses the config's own.
HELD_OUT = 10_000
_TRIES = 50
_PROBES = 32


class Data:
    """The data that a config names: references from the front, held-out examples apart from them.

    Shapes are drawn for held-out captions with another seed. Records are taken in a fixed random
    order, references from its beginning and the others from its end, or from a source of their own.

    Attributes:
      name: of the source. held_out_source: the source of held-out examples.
      max_bad_fraction: share of references that may be unreadable.
    """

    def __init__(
        self,
        config: ConfigDict,
        latents: Sequence[str] = (),
        changes: Mapping[str, str] = {},
        held_out: Mapping[str, str] = {},
    ):
        """Opens the source.

        Args:
          config: of a model.
          latents: those that true documents need.
          changes: other values of `data.source`, as strings.
          held_out: the same, for captions and true pictures alone.

        Raises:
          UserError: an unknown setting, missing files, data that are no pictures.
        """
        settings = _one_task(_changed(config.data.source.to_dict(), changes), latents)
        self.name = settings["name"]
        if self.name == "toy":
            raise UserError("the toy has no pictures to evaluate; see `kaleido figures toy`")
        size = config.data.image_size
        self._settings, self._size, self._latents = settings, size, tuple(latents)
        self.max_bad_fraction = settings.get("max_bad_fraction", MAX_BAD_FRACTION)
        self._training = make_source(settings, size)
        own = _one_task(_changed(settings, held_out), latents)
        if own["name"] != self.name:
            raise UserError(
                f"--held-out name={own['name']}: must be the training's, {self.name!r}; --data "
                "changes both"
            )
        self._own = own if own != settings else None
        # Other latents or another spelling of the path are the same records still.
        self._apart = self._own is not None and _other_records(
            self._training, make_source(own, size)
        )
        if self.name == "shapes":
            own = own | {"seed": own.get("seed", 0) + HELD_OUT}
        self._held_out_settings = own
        self.held_out_source = make_source(own, size, self._latents)

    def __len__(self) -> int:
        return len(self._training)

    def check_apart(self, references: int, samples: int) -> None:
        """Raises UserError where true pictures repeat or are among the references (0: all)."""
        references, own = references or len(self), len(self.held_out_source)
        if self.name == "shapes":
            if samples > own:
                raise UserError(f"--samples {samples}: the data have {own} true pictures")
            return
        if self._apart and samples > own:
            raise UserError(f"--samples {samples}: --held-out has {own} true pictures")
        if not self._apart and references + samples > len(self):
            raise UserError(
                f"{references} references and {samples} true pictures are more than the"
                f" {len(self)} of the data; give fewer (--references, --samples), or other data"
                " for the true pictures (--held-out)"
            )

    def describe(self) -> dict[str, Any]:
        """What a result says of it: the source's settings and where captions come from."""
        apart = "another seed" if self.name == "shapes" else "the end of the same records"
        found = {"source": self._settings, "size": self._size, "captions": apart}
        if self._own is not None:
            found |= {"captions": "a source of their own", "held_out": self._own}
        return found

    def held_out(self, number: int, ask: bool = True) -> dict[str, Any]:
        """Held-out example `number` with its latents; records repeat after the last.

        Its caption is one line. A record of a lower number (or of the first few) stands in for one
        that cannot be read, or, if one is to `ask` for its caption, whose caption no prompt may be
        (empty, too long, control characters).

        Raises:
          UserError: many unusable records in a row.
        """
        source = self.held_out_source
        last: RecordError | None = None
        for attempt in range(_TRIES):
            place = number
            if attempt:
                place = np.random.default_rng([number, attempt]).integers(max(number, _TRIES))
            try:
                if self.name == "shapes":
                    return source[int(place) % len(source)]
                last_first = len(source) - 1 - place % len(source)
                return _one_line(source[_order(last_first, len(source))], ask)
            except RecordError as error:
                last = error
        raise UserError(f"{_TRIES} unusable records; the last: {last.where}: {last}")

    def truths(self, seed: int) -> Callable[[int], dict[str, Any]]:
        """Held-out examples by number, for true pictures rather than for their captions.

        Another seed has other shapes. Records are the same for all.
        """
        if self.name != "shapes":
            return lambda number: self.held_out(number, ask=False)
        settings = self._held_out_settings
        settings = settings | {"seed": settings["seed"] + seed}
        return make_source(settings, self._size, self._latents).__getitem__

    def reference(self, number: int) -> UInt8[np.ndarray, "h w 3"]:
        """A training picture by its number in the order; raises RecordError for a bad record."""
        place = number if self.name == "shapes" else _order(number, len(self))
        return self._training[place]["image"]

    def fingerprint(self) -> str:
        """A hash of the settings and of some training pictures: other data have another one."""
        digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode())
        digest.update(f"{self._size} {len(self)}".encode())
        _probe(digest, self._training, ())
        return digest.hexdigest()[:16]

    def held_out_fingerprint(self) -> str:
        """The same of held-out examples, with their captions and latents."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        digest.update(f"{self._size} {len(self.held_out_source)}".encode())
        _probe(digest, self.held_out_source, ("caption", "latents"))
        return digest.hexdigest()[:16]


def _probe(digest: hashlib._Hash, source: Source, fields: Sequence[str]) -> None:
    """Adds keys, pictures and some fields of records that are spread over a source."""
    for place in np.linspace(0, len(source) - 1, min(_PROBES, len(source))).astype(int):
        try:
            example = source[int(place)]
        except RecordError as error:
            digest.update(error.where.encode())
            continue
        digest.update(example["key"].encode() + example["image"].tobytes())
        for name in fields:
            digest.update(json.dumps(example[name], sort_keys=True).encode())


def _other_records(one: Source, other: Source) -> bool:
    digests = [hashlib.sha256(str(len(source)).encode()) for source in (one, other)]
    for digest, source in zip(digests, (one, other), strict=True):
        _probe(digest, source, ())
    return digests[0].digest() != digests[1].digest()


def _one_task(settings: dict[str, Any], latents: Sequence[str]) -> dict[str, Any]:
    """A mixture has its records once for each of its tasks; the settings of one of these."""
    spec = task_table.find(settings["task"]) if settings["name"] == "task" else None
    if not isinstance(spec, task_table.MixtureSpec):
        return settings
    alike = [one.name for one in spec.tasks if not latents or one.latents == tuple(latents)]
    if not alike or len({one.records for one in spec.tasks}) > 1:
        raise UserError(
            f"task {spec.name} is a mixture of several data; name one of its tasks with"
            f" --data task=NAME: {', '.join(one.name for one in spec.tasks)}"
        )
    return settings | {"task": alike[0]}


def _order(place: int, size: int) -> int:
    return int(permute(np.array([place]), size, "evaluate", 0)[0])


def _one_line(example: dict[str, Any], ask: bool) -> dict[str, Any]:
    """An example with its caption as a line; raises RecordError where one may not `ask` for it."""
    caption = " ".join(example["caption"].split())
    try:
        return example | {
            "caption": clean_prompt(caption, "caption") if ask else caption[:MAX_CAPTION]
        }
    except UserError as error:
        raise RecordError(example["key"], str(error)) from error


def _changed(settings: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """Settings with other values, given as strings."""
    return {**settings, **{n: _like(n, v, settings.get(n)) for n, v in changes.items()}}


def _like(name: str, value: str, old: Any) -> Any:
    """A string as the type of the value it replaces; of a new setting, a number if it is one."""
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(old, str):
            return value
        if isinstance(old, (tuple, list)):
            return tuple(type(old[0])(item) if old else item for item in value.split(","))
        if old is not None:
            return type(old)(value)
    except (KeyError, ValueError):
        raise UserError(f"data setting {name}={value}: must be like {old!r}") from None
    try:
        return int(value)
    except ValueError:
        return value
