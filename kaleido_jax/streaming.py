"""What of the pipeline draws any number of pictures batch by batch, holding one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kaleido_jax.batches import MAX_SEED, check_range
from kaleido_jax.errors import UserError
from kaleido_jax.prompts import MAX_NUM, Request, clean_prompt, count_pictures

if TYPE_CHECKING:
    from kaleido_jax.outputs import Output
    from kaleido_jax.settings import Settings

MAX_STREAM = 1_000_000


class _Group(NamedTuple):
    """Pictures that may share a batch; `size` is that batch's where it is given."""

    settings: Settings
    size: int | None
    drawn: bool  # whether z is to be drawn; a document has it


class StreamMethods:
    """The part of `generate.Pipeline` that needs no more than its other methods."""

    def stream(
        self,
        requests: Sequence[str | Request],
        num_images: int = 1,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        done: Container[int] = (),
        **settings: Any,
    ) -> Iterator[tuple[list[int], Output]]:
        """The pictures of `__call__` for any number of prompts, one batch after another.

        Pictures that have the same settings share batches, so they may come in another order.

        Args:
          requests: captions, or requests with seeds and settings of their own. A request's
            document is drawn as it is, in the batch shape that it records.
          num_images: pictures of each caption; a document has one.
          seed, batch_size, settings: as `__call__`, for what a request does not say itself.
          done: numbers of pictures to leave out; the others are as they would be with them.

        Yields:
          (numbers of the pictures, counted over all requests; their Output).

        Raises:
          UserError: anything out of bounds, before the first picture.
        """
        check_range("num_images", num_images, 1, MAX_NUM)
        check_range("seed", seed, 0, MAX_SEED)
        asked = [Request(clean_prompt(r)) if isinstance(r, str) else r for r in requests]
        total = count_pictures(asked, num_images)
        if not 1 <= total <= MAX_STREAM:
            raise UserError(f"{total} pictures asked for; between 1 and {MAX_STREAM} in all")
        groups: dict[_Group, list[tuple[int, int, int]]] = {}
        number = 0
        for place, request in enumerate(asked):
            count = count_pictures([request], num_images)
            rows = groups.setdefault(self._group(request, batch_size, settings), [])
            rows += [(number + i, place, i) for i in range(count)]
            number += count
        # The batch is that of all pictures, so that those left out do not change the others.
        parts = [
            (group, self.runner.batch_size(group.size, len(rows)), rows)
            for group, rows in groups.items()
        ]
        return self._stream(parts, asked, seed, done)

    def _group(self, request: Request, batch_size: int | None, settings: dict[str, Any]) -> _Group:
        document = request.document
        try:
            if document is not None:
                self._latent_tokens(document)  # raises at latents that this model does not have
                chosen = self.defaults.of_document(document).replace(settings)
                return _Group(chosen, batch_size or document.batch_size, False)
            chosen = self.defaults.replace({**settings, **request.settings})
        except UserError as error:
            raise UserError(f"{request.where}: {error}") from error
        return _Group(chosen, batch_size, bool(self.names))

    def _stream(
        self,
        parts: list[tuple[_Group, int, list[tuple[int, int, int]]]],
        asked: list[Request],
        seed: int,
        done: Container[int],
    ) -> Iterator[tuple[list[int], Output]]:
        for group, batch, rows in parts:
            left = [row for row in rows if row[0] not in done]
            for first in range(0, len(left), batch):
                chosen = left[first : first + batch]
                numbers = [number for number, _, _ in chosen]
                documents, warnings = [], []
                for _, place, index in chosen:
                    request = asked[place]
                    documents.append(
                        self._blank(
                            request.caption,
                            seed if request.seed is None else request.seed,
                            index,
                            batch,
                            group.settings,
                        )
                        if request.document is None
                        else request.document
                    )
                if group.drawn:
                    documents, warnings = self._write_latents(
                        documents, group.settings, batch, numbers
                    )
                output = self.render(
                    documents, batch_size=batch, **dataclasses.asdict(group.settings)
                )
                yield numbers, dataclasses.replace(output, warnings=warnings)
