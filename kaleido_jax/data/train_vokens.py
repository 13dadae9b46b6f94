"""Fit the shipped codebook of vokens: `python -m kaleido_jax.data.train_vokens OUT.npz`.

1,000 codes over 4,000 pictures of shapes, in seconds.
"""

from __future__ import annotations

import sys

import numpy as np

from kaleido_jax.data import shapes
from kaleido_jax.models import voken_tokenizer

NUM_PICTURES = 4000
# Another seed than training's 0: the codebook is not fitted on what it will encode.
SEED = 1


def main(arguments: list[str]) -> int:
    """Fit and write."""
    if len(arguments) != 1 or not arguments[0].endswith(".npz"):
        print("usage: python -m kaleido_jax.data.train_vokens OUT.npz", file=sys.stderr)
        return 2
    images = np.stack([shapes.render(shapes.make_scene(SEED, i), 32) for i in range(NUM_PICTURES)])
    voken_tokenizer.fit(images).save(arguments[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
