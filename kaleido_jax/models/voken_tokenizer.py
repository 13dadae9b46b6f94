"""Visual tokens without a network: patches, principal components, nearest centre.

32 patches, 4 rows by 8 columns, of a picture reduced to 32 x 32 pixels: each patch of 8 x 4 pixels
becomes 32 principal components, and these the number of the nearest k-means centre. Fitted in
seconds (`fit`); decoding gives the picture in blurred patches.
"""

from __future__ import annotations

import importlib.resources
import io
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from kaleido_jax.errors import UserError
from kaleido_jax.latents import voken

ROWS, COLUMNS = voken.GRID
_SIDE = 32
_PATCH = (_SIDE // ROWS, _SIDE // COLUMNS)
_VALUES = _PATCH[0] * _PATCH[1] * 3


class PatchTokenizer:
    """Pictures to 32 ids and back.

    Attributes:
      mean: [V] mean patch (V = 96 values in [-1, 1]).
      basis: [K, V] principal components, orthonormal rows.
      centres: [C, K] one per code.
    """

    def __init__(
        self,
        mean: Float[np.ndarray, " v"],
        basis: Float[np.ndarray, "k v"],
        centres: Float[np.ndarray, "c k"],
    ):
        mean, basis, centres = (np.asarray(a, np.float32) for a in (mean, basis, centres))
        if mean.shape != (_VALUES,) or basis.ndim != 2 or basis.shape[1] != _VALUES:
            raise UserError(f"vokens: mean and basis must have {_VALUES} values a row")
        if centres.ndim != 2 or centres.shape[1] != basis.shape[0] or not len(centres):
            raise UserError(f"vokens: centres must be [codes, {basis.shape[0]}]")
        if not all(np.isfinite(a).all() for a in (mean, basis, centres)):
            raise UserError("vokens: a value is not finite")
        self.mean, self.basis, self.centres = mean, basis, centres
        self._squares = (centres**2).sum(1)

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return len(self.centres)

    @classmethod
    def load(cls, path: str | Path) -> PatchTokenizer:
        """Read an .npz written by `save`; UserError where it is missing or is no such file."""
        return cls(*read_codebook(path, "mean", "basis", "centres"))

    @classmethod
    def default(cls) -> PatchTokenizer:
        """The shipped codebook of 1,000 codes, fitted on shapes."""
        asset = importlib.resources.files("kaleido_jax") / "assets" / "shapes_vokens.npz"
        with importlib.resources.as_file(asset) as path:
            return cls.load(path)

    def save(self, path: str | Path | BinaryIO) -> None:
        """Write as float16 .npz, to a path that ends so or to a file."""
        arrays = {"mean": self.mean, "basis": self.basis, "centres": self.centres}
        np.savez_compressed(path, **{name: a.astype(np.float16) for name, a in arrays.items()})

    def encode(self, images: UInt8[np.ndarray, "n h w 3"]) -> Int[np.ndarray, "n 32"]:
        """Ids of square pictures, patches row by row."""
        patches = all_patches(images)
        features = (patches - self.mean) @ self.basis.T
        distances = self._squares - 2 * features @ self.centres.T  # but for a term of the row
        return distances.argmin(1).reshape(len(images), ROWS * COLUMNS)

    def encode_string(self, image: UInt8[np.ndarray, "h w 3"]) -> str:
        """The latent `voken` of one picture."""
        return voken.write(tuple(int(code) for code in self.encode(image[None])[0]))

    def decode(
        self, ids: Int[np.ndarray, "n 32"], size: int = _SIDE
    ) -> UInt8[np.ndarray, "n size size 3"]:
        """The centres' patches put together: a blurred picture for display.

        Raises:
          UserError: an id outside of the codebook.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.shape[1] != ROWS * COLUMNS:
            raise UserError(f"vokens: {ids.shape} ids; there must be {ROWS * COLUMNS} a picture")
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_codes):
            raise UserError(f"vokens: an id is not in 0..{self.num_codes - 1}")
        patches = self.centres[ids] @ self.basis + self.mean
        grid = patches.reshape(-1, ROWS, COLUMNS, *_PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
        pictures = grid.reshape(-1, _SIDE, _SIDE, 3)
        pixels = np.clip(np.rint(pictures * 127.5 + 127.5), 0, 255).astype(np.uint8)
        return np.stack([_resize(picture, size) for picture in pixels])


def fit(
    images: UInt8[np.ndarray, "n h w 3"], num_codes: int = 1000, components: int = 32, seed: int = 0
) -> PatchTokenizer:
    """Fit components and centres on square pictures; the same input gives the same codebook.

    Raises:
      UserError: fewer distinct patches than codes, or more components than values.
    """
    from sklearn.cluster import MiniBatchKMeans  # heavy, and needed here only

    patches = all_patches(images)
    mean, basis = principal_components(patches, components)
    # Plain patches are the same by the thousand; by their full weight they would take most codes.
    distinct, counts = np.unique(patches, axis=0, return_counts=True)
    if len(distinct) < num_codes:
        raise UserError(f"vokens: {len(distinct)} distinct patches cannot give {num_codes} codes")
    features = ((distinct - mean) @ basis.T).astype(np.float32)
    model = MiniBatchKMeans(num_codes, batch_size=4096, n_init=1, max_iter=30, random_state=seed)
    model.fit(features, sample_weight=np.sqrt(counts))
    return PatchTokenizer(mean, basis, model.cluster_centers_)


def read_codebook(path: str | Path, *names: str) -> list[np.ndarray]:
    """The named arrays of an .npz; nothing in it is ever unpickled.

    Raises:
      UserError: a file that is missing, is no .npz or lacks an array.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the vokens {path}: {error.strerror}") from error
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return [file[name] for name in names]
    except Exception as error:  # numpy, zip and zlib each have their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a codebook of vokens: {reason}") from error


def principal_components(
    rows: Float[np.ndarray, "m v"], count: int
) -> tuple[Float[np.ndarray, " v"], Float[np.ndarray, "count v"]]:
    """Mean and the `count` directions of greatest variance, orthonormal, greatest first.

    Raises:
      UserError: more components than values.
    """
    if not 1 <= count <= rows.shape[1]:
        raise UserError(f"vokens: {count} components; there can be 1 to {rows.shape[1]}")
    mean = rows.mean(0)
    _, vectors = np.linalg.eigh(np.cov(rows - mean, rowvar=False))
    basis = vectors[:, ::-1][:, :count].T
    # The sign of a component is free: its largest entry is made positive.
    largest = np.abs(basis).argmax(1)
    return mean, basis * np.sign(basis[np.arange(len(basis)), largest])[:, None]


def all_patches(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "m v"]:
    """The 32 patches of 96 values in [-1, 1] of each square picture, row by row."""
    small = np.stack([_resize(image, _SIDE) for image in images]).astype(np.float32)
    small = (small - 127.5) / 127.5
    grid = small.reshape(-1, ROWS, _PATCH[0], COLUMNS, _PATCH[1], 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, _VALUES)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    if image.shape[:2] == (size, size):
        return image
    method = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_CUBIC
    return cv2.resize(image, (size, size), interpolation=method)
