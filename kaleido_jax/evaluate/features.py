"""Features by name: what pictures are compared by.

`inception:DIR` is the network of FID. The others need no weights: `shapes` for the embedded data,
`random` and `pixels` for any small pictures.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from kaleido_jax import mesh as mesh_lib
from kaleido_jax.data import shapes, shapes_detector
from kaleido_jax.errors import UserError

BATCH = 64
Computed = tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n classes"] | None]


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature function.

    Attributes:
      name: in FEATURES. resize: what is done to pictures first, in words.
      hash: of all that shapes its numbers.
      classes: logits that it gives beside the features; 0 is none.
      compute: pictures to features and logits, float32.
    """

    name: str
    resize: str
    hash: str
    classes: int
    compute: Callable[[UInt8[np.ndarray, "n h w 3"]], Computed]

    def describe(self) -> dict[str, str]:
        """What a result says of it."""
        return {"name": self.name, "resize": self.resize, "hash": self.hash}


def make_feature(spec: str) -> Feature:
    """The feature that NAME or NAME:ARGUMENT names.

    Raises:
      UserError: an unknown name, naming the nearest; an argument that is missing or too much.
    """
    name, _, argument = spec.partition(":")
    if name not in FEATURES:
        near = difflib.get_close_matches(name, FEATURES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(FEATURES)}"
        raise UserError(f"no feature {name!r}; {hint}")
    return FEATURES[name](argument)


def _without_argument(name: str, argument: str) -> None:
    if argument:
        raise UserError(f"feature {name!r} takes no argument, not {argument!r}")


# ---- Inception ------------------------------------------------------------------------------


def _inception(argument: str) -> Feature:
    from kaleido_jax.interop.inception import load_inception
    from kaleido_jax.models.inception import CLASSES, RESIZE, Inception

    if not argument:
        raise UserError(
            "feature 'inception' needs its weights: --feature inception:DIR, DIR from "
            "`kaleido import inception SOURCE DIR`"
        )
    variables, digest = load_inception(pathlib.Path(argument))
    mesh = mesh_lib.make_mesh(devices=jax.local_devices())
    placed = jax.device_put(variables, mesh_lib.replicated(mesh))
    apply = jax.jit(Inception().apply)

    def run(images: UInt8[np.ndarray, "b h w 3"]) -> dict[str, Array]:
        return apply(placed, jax.device_put(images, mesh_lib.batch_sharding(mesh)))

    def compute(images: UInt8[np.ndarray, "n h w 3"]) -> Computed:
        found = _in_batches(run, images, -(-BATCH // mesh.size) * mesh.size)
        return found["2048"], found["logits_unbiased"]

    return Feature("inception", RESIZE, digest, CLASSES, compute)


def _in_batches(
    run: Callable[[np.ndarray], dict[str, Any]], images: UInt8[np.ndarray, "n h w 3"], size: int
) -> dict[str, Float[np.ndarray, "n d"]]:
    """`run` on batches of one size, the last filled up; its outputs together."""
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images), size):
        block = images[start : start + size]
        filled = np.concatenate([block, np.repeat(block[-1:], size - len(block), axis=0)])
        for name, value in run(filled).items():
            parts.setdefault(name, []).append(np.asarray(value)[: len(block)])
    return {name: np.concatenate(values) for name, values in parts.items()}


# ---- shapes ---------------------------------------------------------------------------------

_OBJECTS = 3  # as many as a caption of shapes names
# Changing a mode moves its one-hot entries by the root of 2; sizes, places and angles count less,
# so that neighbours are first of all pictures of the same modes.
_CONTINUOUS, _HUE = 0.3, 0.3


def shape_attributes(image: UInt8[np.ndarray, "size size 3"]) -> Float[np.ndarray, "53"]:
    """What the detector reads, as a vector: background, then each object, the largest first.

    One-hot background (5); of each object 1, its hue on the circle (2), one-hot shade (3) and shape
    (4), centre, radii and twice the angle (6). An object that is not there is zeros.
    """
    reading = shapes_detector.read(image)
    hues = np.deg2rad(list(shapes.HUES.values()))
    found = np.zeros((_OBJECTS, 16))
    for place, item in enumerate(reading.objects[:_OBJECTS]):
        x, y, major, minor, theta = item.ellipse
        angle, lean = np.deg2rad(2 * theta), (major - minor) / max(major, 1)
        continuous = (
            (x - 500) / 250,
            (y - 500) / 250,
            (major - 160) / 50,
            (minor - 80) / 40,
            lean * np.cos(angle),
            lean * np.sin(angle),
        )
        found[place] = (
            1,
            _HUE * np.cos(hues[item.hue]),
            _HUE * np.sin(hues[item.hue]),
            *np.eye(len(shapes.SHADES))[item.shade],
            *np.eye(len(shapes.SHAPES))[item.shape],
            *(_CONTINUOUS * np.array(continuous)),
        )
    background = np.eye(len(shapes.GREYS))[reading.background]
    return np.concatenate([background, found.reshape(-1)])


def _shapes(argument: str) -> Feature:
    _without_argument("shapes", argument)

    def compute(images: UInt8[np.ndarray, "n h w 3"]) -> Computed:
        return np.stack([shape_attributes(image) for image in images]).astype(np.float32), None

    return Feature("shapes", "none", "shapes-1", 0, compute)


# ---- without knowledge ----------------------------------------------------------------------

_SIDE, _WIDTHS, _GRID = 32, (32, 64, 128), 2


def _shrink(images: UInt8[np.ndarray, "n h w 3"], side: int) -> UInt8[np.ndarray, "n side side 3"]:
    if images.shape[1:3] == (side, side):
        return images
    return np.stack([cv2.resize(x, (side, side), interpolation=cv2.INTER_AREA) for x in images])


def _random(argument: str) -> Feature:
    """Three layers of random 3 x 3 convolutions, ReLU and halving; means of the 2 x 2 quarters."""
    _without_argument("random", argument)
    draw = np.random.default_rng(0)
    kernels, channels = [], 3
    for width in _WIDTHS:
        kernel = draw.standard_normal((3, 3, channels, width)) * np.sqrt(2 / (9 * channels))
        kernels.append(kernel.astype(np.float32))
        channels = width

    @jax.jit
    def run(images: UInt8[Array, "b h w 3"]) -> dict[str, Float[Array, "b d"]]:
        x = (images.astype(jnp.float32) - 127.5) / 127.5
        for kernel in kernels:
            x = jax.lax.conv_general_dilated(
                x,
                kernel,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )
            x = _means(jax.nn.relu(x), 2)
        return {"features": _means(x, x.shape[1] // _GRID).reshape(len(x), -1)}

    def compute(images: UInt8[np.ndarray, "n h w 3"]) -> Computed:
        return _in_batches(run, _shrink(images, _SIDE), BATCH)["features"], None

    digest = hashlib.sha256(b"".join(kernel.tobytes() for kernel in kernels)).hexdigest()[:16]
    return Feature("random", f"area to {_SIDE}", digest, 0, compute)


def _means(x: Float[Array, "b h w c"], by: int) -> Float[Array, "b h2 w2 c"]:
    rows, columns = x.shape[1] // by, x.shape[2] // by
    return x.reshape(len(x), rows, by, columns, by, x.shape[3]).mean((2, 4))


def _pixels(argument: str) -> Feature:
    """Colours of 8 x 8 squares in [-1, 1]."""
    _without_argument("pixels", argument)

    def compute(images: UInt8[np.ndarray, "n h w 3"]) -> Computed:
        small = _shrink(images, 8).astype(np.float32)
        return ((small - 127.5) / 127.5).reshape(len(images), -1), None

    return Feature("pixels", "area to 8", "pixels-1", 0, compute)


# Name -> maker(argument).
FEATURES: dict[str, Callable[[str], Feature]] = {
    "inception": _inception,
    "shapes": _shapes,
    "random": _random,
    "pixels": _pixels,
}
