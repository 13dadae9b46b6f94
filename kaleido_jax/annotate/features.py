"""Visual tokens by the features of SigLIP 2 or DINOv2: pooled to 4 x 8, PCA, nearest centre.

A codebook is an .npz without pickled objects that also names its backbone, so `kmeans:FILE` is
all an engine needs. `fit` makes one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from kaleido_jax.annotate.models import ModelSource, device, file_sha256, loading, require
from kaleido_jax.annotate.visual_tokens import VokenEngine
from kaleido_jax.errors import UserError
from kaleido_jax.latents import voken
from kaleido_jax.models.voken_tokenizer import principal_components, read_codebook

ROWS, COLUMNS = voken.GRID
TOKENS = ROWS * COLUMNS
NUM_CODES = 8192
COMPONENTS = 32
_CHUNK = 4096  # rows whose distances to all centres are held at once


@dataclass(frozen=True)
class Backbone:
    """Which features a codebook was fitted on.

    Attributes:
      name: hub name or folder.
      revision: branch, tag or commit; "" for a folder.
      size: side in pixels at which it sees pictures.
    """

    name: str
    revision: str = ""
    size: int = 224

    @classmethod
    def parse(cls, argument: str, size: int = 224) -> Backbone:
        """From `MODEL`, `MODEL@REVISION` or a folder. Raises UserError, as ModelSource.parse."""
        source = ModelSource.parse("kmeans", argument)
        return cls(source.name, source.revision or "", size)


class Features:
    """A vision model's patch features on the grid of vokens.

    Args:
      backbone: a SigLIP, SigLIP 2 (of fixed resolution) or DINOv2 model.

    Raises:
      UserError: the model cannot be loaded, or gives no square grid of patches.
    """

    def __init__(self, backbone: Backbone):
        require("torch", "transformers")
        from transformers import AutoImageProcessor, AutoModel

        source = ModelSource(backbone.name, backbone.revision or None)
        how = source.arguments
        self.backbone = backbone
        self._processor = loading(source, AutoImageProcessor.from_pretrained, source.name, **how)
        model = loading(source, AutoModel.from_pretrained, source.name, **how)
        # SigLIP's text half is of no use here.
        model = getattr(model, "vision_model", model)
        self._model = model.to(device()).eval()
        patch = getattr(model.config, "patch_size", None)
        if not isinstance(patch, int) or backbone.size % patch:
            raise UserError(
                f"model {backbone.name}: size {backbone.size} is no multiple of its patch {patch}"
            )
        self._grid = backbone.size // patch

    def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 32 d"]:
        """Features averaged over each cell of the 4 x 8 grid, row by row.

        Raises:
          ValueError: the model gives fewer tokens than patches.
        """
        import torch

        side = {"height": self.backbone.size, "width": self.backbone.size}
        # The whole square: a centre crop would lose what boxes and blobs speak of.
        inputs = self._processor(
            images=list(images), size=side, do_center_crop=False, return_tensors="pt"
        )
        with torch.inference_mode():
            out = self._model(pixel_values=inputs["pixel_values"].to(device()))
            tokens = out.last_hidden_state.float()
            count = self._grid**2
            if tokens.shape[1] < count:
                raise ValueError(f"{tokens.shape[1]} tokens for {count} patches")
            # Class and register tokens stand before the patches.
            grid = tokens[:, -count:].transpose(1, 2).unflatten(2, (self._grid, self._grid))
            cells = torch.nn.functional.adaptive_avg_pool2d(grid, (ROWS, COLUMNS))
            return cells.flatten(2).transpose(1, 2).cpu().numpy()


class KMeansTokenizer:
    """Features to ids.

    Attributes:
      backbone: whose features.
      mean: [D], basis: [K, D] principal components, centres: [C, K] one per code.

    Raises:
      UserError: arrays that do not fit together.
    """

    def __init__(
        self,
        backbone: Backbone,
        mean: Float[np.ndarray, " d"],
        basis: Float[np.ndarray, "k d"],
        centres: Float[np.ndarray, "c k"],
    ):
        arrays = [np.asarray(a, np.float32) for a in (mean, basis, centres)]
        mean, basis, centres = arrays
        fits = (
            mean.ndim == 1
            and basis.ndim == centres.ndim == 2
            and basis.shape[1] == len(mean)
            and centres.shape[1] == len(basis)
            and 1 <= len(centres) <= voken.MAX_CODES
            and all(np.isfinite(array).all() for array in arrays)
        )
        if not fits:
            raise UserError("the codebook's arrays do not fit together or are not finite")
        self.backbone, self.mean, self.basis, self.centres = backbone, mean, basis, centres
        self._squares = (centres**2).sum(1)
        self._features: Features | None = None

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return len(self.centres)

    def load_backbone(self) -> None:
        """Load the model whose features are encoded. Raises UserError, as `Features`."""
        if self._features is None:
            self._features = Features(self.backbone)

    def encode(self, images: UInt8[np.ndarray, "n h w 3"]) -> Int[np.ndarray, "n 32"]:
        """Ids of square pictures. Loads the backbone if need be (UserError)."""
        self.load_backbone()
        return self.nearest(self._features(images))

    def nearest(self, features: Float[np.ndarray, "n 32 d"]) -> Int[np.ndarray, "n 32"]:
        """Ids of features."""
        if features.shape[-1] != len(self.mean):
            raise UserError(
                f"the codebook is for {len(self.mean)} features, the model has {features.shape[-1]}"
            )
        rows = (features.reshape(-1, len(self.mean)) - self.mean) @ self.basis.T
        chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
        ids = [(self._squares - 2 * chunk @ self.centres.T).argmin(1) for chunk in chunks]
        return np.concatenate(ids).reshape(features.shape[:-1])

    def save(self, path: str | Path) -> None:
        """Write as .npz: mean, basis, centres, and the backbone as JSON in `about`."""
        about = np.frombuffer(json.dumps(asdict(self.backbone)).encode(), np.uint8)
        np.savez_compressed(
            path, mean=self.mean, basis=self.basis, centres=self.centres, about=about
        )

    @classmethod
    def load(cls, path: str | Path) -> KMeansTokenizer:
        """Read what `save` wrote. Raises UserError where it is missing or is no such file."""
        about, *arrays = read_codebook(path, "about", "mean", "basis", "centres")
        try:
            told = json.loads(about.tobytes())
            backbone = Backbone(*(told[field.name] for field in fields(Backbone)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is not a codebook of features: {error!r}") from error
        kinds = [type(value) for value in astuple(backbone)]
        if kinds != [str, str, int] or backbone.size < 1:
            raise UserError(f"{path} is not a codebook of features: no such backbone {told}")
        return cls(backbone, *arrays)


def fit(
    backbone: Backbone,
    batches: Iterable[UInt8[np.ndarray, "n h w 3"]],
    num_codes: int = NUM_CODES,
    components: int = COMPONENTS,
    seed: int = 0,
) -> KMeansTokenizer:
    """Principal components and k-means centres of a backbone's features.

    The same pictures in the same order give the same codebook on the same machine.

    Args:
      backbone: whose features.
      batches: square pictures.
      num_codes, components: size of the codebook and of its entries.
      seed: of k-means.

    Raises:
      UserError: too few pictures, or more components than features.
    """
    from sklearn.cluster import MiniBatchKMeans  # heavy, and needed here only

    rows = np.concatenate(list(_rows(Features(backbone), batches)) or [np.zeros((0, 1))])
    if len(rows) < num_codes:
        raise UserError(
            f"{len(rows) // TOKENS} pictures give {len(rows)} features; {num_codes} codes need more"
        )
    mean, basis = principal_components(rows, components)
    model = MiniBatchKMeans(
        num_codes, batch_size=max(4096, num_codes), n_init=1, max_iter=50, random_state=seed
    )
    model.fit(((rows - mean) @ basis.T).astype(np.float32))
    return KMeansTokenizer(backbone, mean, basis, model.cluster_centers_)


def _rows(features: Features, batches: Iterable[np.ndarray]) -> Iterator[Float[np.ndarray, "m d"]]:
    for images in batches:
        found = features(images)
        yield found.reshape(-1, found.shape[-1])


def kmeans_engine(stage: str, argument: str, batch_size: int = 64, model: str = "") -> VokenEngine:
    """Engine `kmeans:FILE.npz` for voken.

    Args:
      stage, argument: as `make_engine`; the codebook that `fit` made.
      batch_size: pictures at once.
      model: the backbone, where it is not to be found under the name in the codebook.

    Raises:
      UserError: no such file, or no codebook.
    """
    if not argument:
        raise UserError("engine 'kmeans' needs a codebook: kmeans:FILE.npz")
    codebook = KMeansTokenizer.load(argument)
    backbone = Backbone.parse(model, codebook.backbone.size) if model else codebook.backbone
    source = ModelSource.parse("kmeans", f"{backbone.name}@{backbone.revision}".rstrip("@"))
    provenance = {
        "engine": "kmeans",
        **source.provenance,
        "codebook_sha256": file_sha256(argument),
        "parameters": {"num_codes": codebook.num_codes, "size": backbone.size},
    }
    return VokenEngine(functools.partial(_load, argument, backbone), provenance, batch_size)


def _load(path: str, backbone: Backbone) -> KMeansTokenizer:
    book = KMeansTokenizer.load(path)
    tokenizer = KMeansTokenizer(backbone, book.mean, book.basis, book.centres)
    tokenizer.load_backbone()
    return tokenizer
