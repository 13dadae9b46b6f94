"""`kaleido annotate fit-vokens`: a codebook of visual tokens, fitted on pictures of shards."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from kaleido_jax import beside
from kaleido_jax.annotate import inputs
from kaleido_jax.annotate.inputs import IMAGE_SIZE
from kaleido_jax.data.sources import RecordError
from kaleido_jax.data.streams import permute
from kaleido_jax.data.transforms import ImageError, square_picture
from kaleido_jax.errors import UserError
from kaleido_jax.latents import voken
from kaleido_jax.models import voken_tokenizer

KINDS = ("patch", "kmeans", "fsq")
PATCH_CODES = 1000
_SMALL = 32  # side to which the tokenizers of patches reduce pictures
_BATCH = 64
_LEAST_OF_A_SHARD = 64  # pictures, so that few shards are opened where there are very many


def fit(
    kind: str,
    data: str,
    path: str | Path,
    num_pictures: int,
    num_codes: int | None = None,
    seed: int = 0,
    side: int = 224,
    components: int = 32,
    data_dir: str = "",
    tell: Callable[[int], None] = lambda count: None,
) -> str:
    """Fits a codebook and writes it; the same pictures give the same file.

    Args:
      kind: `patch`, `fsq`, or `kmeans:MODEL[@REVISION]` (SigLIP, SigLIP 2 or DINOv2).
      data, data_dir: shards as `inputs.find_shards` reads them.
      path: the .npz to write.
      num_pictures: how many pictures to fit on, drawn from all over the shards.
      num_codes: size of the codebook; None is the kind's own. FSQ's follows from its levels.
      seed: of the choice of pictures and of k-means.
      components: principal components of a token, but for FSQ.
      side: at which the model of `kmeans` sees pictures; a multiple of its patch.
      tell: called with the number of pictures read.

    Returns:
      The engine string of the codebook, such as `patch:FILE.npz`.

    Raises:
      UserError: an unknown kind, a model that is missing, too few pictures, a path that cannot be
        written.
    """
    name, _, model = kind.partition(":")
    if name not in KINDS or (name == "kmeans") != bool(model):
        raise UserError(
            f"fit-vokens: no kind {kind!r}; write patch, fsq or kmeans:MODEL, for example "
            "kmeans:google/siglip2-base-patch16-224"
        )
    if num_codes is not None and (name == "fsq" or not 2 <= num_codes <= voken.MAX_CODES):
        most = "its levels say how many" if name == "fsq" else f"2 to {voken.MAX_CODES} can be"
        raise UserError(f"fit-vokens: {num_codes} codes for {name}: {most}")
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"fit-vokens: {path} must end in .npz")
    if not path.parent.is_dir():
        raise UserError(f"fit-vokens: there is no folder {path.parent}")
    images = _pictures(data, data_dir, num_pictures, seed, tell)
    if name == "kmeans":
        from kaleido_jax.annotate import features

        backbone = features.Backbone.parse(model, side)
        codes = num_codes or features.NUM_CODES
        codebook = features.fit(backbone, _batches(images), codes, components, seed)
    else:
        small = [square_picture(image, _SMALL) for image in images]
        if not small:
            raise UserError(f"fit-vokens: no readable picture in {data}")
        if name == "fsq":
            from kaleido_jax.annotate import fsq

            codebook = fsq.fit(np.stack(small))
        else:
            codes = num_codes or PATCH_CODES
            codebook = voken_tokenizer.fit(np.stack(small), codes, components, seed)
    try:
        with beside.new_file(path) as temporary, open(temporary, "wb") as file:
            codebook.save(file)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return f"{name}:{path}"


def _pictures(
    data: str, data_dir: str, wanted: int, seed: int, tell: Callable[[int], None]
) -> Iterator[UInt8[np.ndarray, "side side 3"]]:
    """Up to `wanted` pictures, some of every shard in an order drawn with the seed."""
    shards = inputs.find_shards(data, data_dir)
    share = max(math.ceil(wanted / len(shards)), min(wanted, _LEAST_OF_A_SHARD))
    found = 0
    for place in permute(np.arange(len(shards)), len(shards), seed, 0):
        with tempfile.TemporaryDirectory(prefix="kaleido-shard-") as copies:
            opened = inputs.open_shard(shards[int(place)], copies)
            left = min(share, wanted - found)
            for index in permute(np.arange(len(opened)), len(opened), seed, 0):
                if not left:
                    break
                try:
                    yield inputs.read_example(opened.stored(int(index)), IMAGE_SIZE).image
                except (RecordError, ImageError):
                    continue  # an unreadable picture is not missed among thousands
                found, left = found + 1, left - 1
                tell(found)


def _batches(images: Iterator[np.ndarray]) -> Iterator[UInt8[np.ndarray, "n side side 3"]]:
    """Neighbours of one size, at most _BATCH at a time."""
    batch: list[np.ndarray] = []
    for image in images:
        if batch and (len(batch) == _BATCH or image.shape != batch[0].shape):
            yield np.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield np.stack(batch)
