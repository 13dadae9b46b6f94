"""A look into a task: its first examples as the model will see them, latents drawn on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from kaleido_jax.data import task_table
from kaleido_jax.data.reader import Encoder, Reader
from kaleido_jax.data.streams import make_stream
from kaleido_jax.latents.panel import panel
from kaleido_jax.tokens import UNK, Vocabulary


@dataclasses.dataclass(frozen=True)
class Peek:
    """One example, read back from its ids.

    Attributes:
      key: of the record.
      caption: what the caption's ids say.
      latents: what the latent ids say, "" where a latent is missing.
      caption_tokens, latent_tokens: how many, EOS included.
      unknown: unknown tokens among them.
      picture: the picture with its latents drawn on it and below it.
    """

    key: str
    caption: str
    latents: dict[str, str]
    caption_tokens: int
    latent_tokens: int
    unknown: int
    picture: UInt8[np.ndarray, "height width 3"]


def peek(
    task: str,
    vocabulary: Vocabulary,
    count: int,
    data_dir: str = "",
    split: str = "train",
    seed: int = 0,
    shuffle: bool = True,
    start: int = 0,
) -> Iterator[Peek]:
    """Examples `start` to `start + count` of a task's or mixture's stream.

    Raises:
      UserError: no such task, no such records, too many bad ones.
    """
    spec = task_table.find(task)
    source = task_table.task_source(task, data_dir, split)
    encode = Encoder(
        vocabulary, spec.latents, task_table.CAPTION_LENGTH, spec.latent_length, spec.size
    )
    stream = make_stream(source, seed, shuffle)
    reader = Reader(source, encode, stream, in_order=not shuffle)

    def look(index: np.integer) -> Peek:
        row = reader.read(int(index))
        latents = vocabulary.decode_latents(row.latents, spec.latents)
        return Peek(
            key=row.key,
            caption=vocabulary.decode(row.caption),
            latents=latents,
            caption_tokens=len(row.caption),
            latent_tokens=len(row.latents),
            unknown=[*row.caption, *row.latents].count(UNK),
            picture=panel(row.image, latents),
        )

    return map(look, stream.indices(np.arange(start, start + count)))
