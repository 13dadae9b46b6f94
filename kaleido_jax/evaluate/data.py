"""Captions to sample for, pictures to measure against, true pictures to measure by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from kaleido_jax.data import RecordError, make_source
from kaleido_jax.data.streams import permute
from kaleido_jax.errors import UserError

# The generator of shapes gives other data for another seed; training uses the config's own.
HELD_OUT = 10_000
MAX_BAD_FRACTION = 0.02
_TRIES = 50
_PROBES = 32


class Data:
    """The data that a config names: references from the front, held-out examples apart from them.

    Shapes are drawn for held-out captions with another seed. Records are taken in a fixed random
    order, references from its beginning and the others from its end.

    Attributes:
      name: of the source. held_out_source: the source of held-out examples.
    """

    def __init__(
        self, config: ConfigDict, latents: Sequence[str] = (), changes: Mapping[str, str] = {}
    ):
        """Opens the source.

        Args:
          config: of a model.
          latents: those that true documents need.
          changes: other values of `data.source`, as strings.

        Raises:
          UserError: an unknown setting, missing files, data that are no pictures.
        """
        settings = config.data.source.to_dict()
        for name, value in changes.items():
            settings[name] = _like(name, value, settings.get(name))
        self.name = settings["name"]
        if self.name == "toy":
            raise UserError("the toy has no pictures to evaluate; see `kaleido figures toy`")
        size = config.data.image_size
        self._settings, self._size = settings, size
        self._training = make_source(settings, size)
        held_out = settings
        if self.name == "shapes":
            held_out = settings | {"seed": settings.get("seed", 0) + HELD_OUT}
        self.held_out_source = make_source(held_out, size, tuple(latents))

    def __len__(self) -> int:
        return len(self._training)

    def check_apart(self, references: int, samples: int) -> None:
        """Raises UserError where true pictures would be among the references."""
        if self.name != "shapes" and references + samples > len(self):
            raise UserError(
                f"{references} references and {samples} true pictures are more than the"
                f" {len(self)} of the data; give fewer (--references, --samples)"
            )

    def describe(self) -> dict[str, Any]:
        """What a result says of it: the source's settings and where captions come from."""
        apart = "another seed" if self.name == "shapes" else "the end of the same records"
        return {"source": self._settings, "size": self._size, "captions": apart}

    def held_out(self, number: int) -> dict[str, Any]:
        """Held-out example `number` with its latents; records repeat after the last.

        Raises:
          UserError: many unreadable records in a row.
        """
        last: RecordError | None = None
        for attempt in range(_TRIES):
            place = number + attempt * 7919  # a prime: stand-ins do not follow one another
            try:
                if self.name == "shapes":
                    return self.held_out_source[place % len(self)]
                return self.held_out_source[self._order(len(self) - 1 - place % len(self))]
            except RecordError as error:
                last = error
        raise UserError(f"{_TRIES} unreadable records; the last: {last.where}: {last}")

    def references(self, count: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The first `count` training pictures, fewer where some cannot be read.

        Raises:
          UserError: more than MAX_BAD_FRACTION of them cannot.
        """
        bad = 0
        for number in range(count):
            place = number if self.name == "shapes" else self._order(number)
            try:
                yield self._training[place]["image"]
            except RecordError as error:
                bad += 1
                if bad > max(1, MAX_BAD_FRACTION * count):
                    raise UserError(
                        f"{bad} of {count} records cannot be read; the last: {error.where}: {error}"
                    ) from error

    def _order(self, place: int) -> int:
        return int(permute(np.array([place]), len(self), "evaluate", 0)[0])

    def fingerprint(self) -> str:
        """A hash of the settings and of some records: other data have another one."""
        digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode())
        digest.update(f"{self._size} {len(self)}".encode())
        for place in np.linspace(0, len(self) - 1, min(_PROBES, len(self))).astype(int):
            try:
                example = self._training[int(place)]
                digest.update(example["key"].encode() + example["image"].tobytes())
            except RecordError as error:
                digest.update(error.where.encode())
        return digest.hexdigest()[:16]


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
        raise UserError(f"--data {name}={value}: must be like {old!r}") from None
    try:
        return int(value)
    except ValueError:
        return value
