"""Fit a codebook of vokens: `python -m kaleido_jax.data.train_vokens OUT.npz [SHARDS]`.

Without SHARDS the shipped one: 1,000 codes over 4,000 pictures of shapes, in seconds. With a
folder of webdataset shards, 1,000 codes over at most 4,000 of its pictures; name the file in
`data.source.vokens`.
"""

from __future__ import annotations

import sys

import numpy as np

from kaleido_jax.data import shapes
from kaleido_jax.data.loader import permute
from kaleido_jax.data.sources import RecordError
from kaleido_jax.data.webdataset import WebDatasetSource
from kaleido_jax.errors import UserError
from kaleido_jax.models import voken_tokenizer

NUM_PICTURES = 4000
SIZE = 32
# Another seed than training's 0: the codebook is not fitted on what it will encode.
SEED = 1


def pictures(path: str | None) -> np.ndarray:
    """Pictures to fit on, uint8 [n, 32, 32, 3]: of shapes, or of a folder of shards."""
    if path is None:
        scenes = [shapes.make_scene(SEED, i) for i in range(NUM_PICTURES)]
        return np.stack([shapes.render(scene, SIZE) for scene in scenes])
    source = WebDatasetSource(path, size=SIZE, latents=())
    order = permute(np.arange(min(NUM_PICTURES, len(source))), len(source), SEED, 0)
    found = []
    for index in order:
        try:
            found.append(source[int(index)]["image"])
        except RecordError:
            continue  # an unreadable picture is not missed among thousands
    return np.stack(found)


def main(arguments: list[str]) -> int:
    """Fit and write."""
    if len(arguments) not in (1, 2) or not arguments[0].endswith(".npz"):
        print("usage: python -m kaleido_jax.data.train_vokens OUT.npz [SHARDS]", file=sys.stderr)
        return 2
    try:
        images = pictures(arguments[1] if len(arguments) == 2 else None)
        voken_tokenizer.fit(images).save(arguments[0])
    except UserError as error:
        print(f"train_vokens: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
