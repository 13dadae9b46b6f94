"""From encoded bytes to a square training picture, and coordinates that follow.

A picture goes through EXIF rotation, the largest centred square crop and a resize. `Frame` is the
same way for coordinates in thousandths of the picture's width and height.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from kaleido_jax.latents.bbox import Box
from kaleido_jax.latents.blob import Ellipse

MAX_PIXELS = 50_000_000
LEAST_SIDE = 8
_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-fA-F]+>")
_BAD_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    OverflowError,
    Image.DecompressionBombError,
)

# Where EXIF orientations 1..8 put a point of the stored picture: (x, y) -> A (x, y) + b, in units
# of the side; b follows from keeping the square [0, 1]^2.
_TURNS = {
    1: ((1, 0), (0, 1)),
    2: ((-1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)),
    6: ((0, -1), (1, 0)),
    7: ((0, -1), (-1, 0)),
    8: ((0, 1), (-1, 0)),
}


class ImageError(ValueError):
    """Bytes that are no picture we can use, or too large or too small a one."""


@dataclass(frozen=True)
class Frame:
    """An affine map between two pictures' coordinates, both in thousandths of width and height.

    Attributes:
      matrix: [2, 2], offset: [2]; new = matrix @ old + offset.
    """

    matrix: Float[np.ndarray, "2 2"]
    offset: Float[np.ndarray, " 2"]

    @classmethod
    def oriented(cls, orientation: int) -> Frame:
        """From the stored picture to the one that EXIF orientation 1..8 shows."""
        matrix = np.array(_TURNS[orientation], float)
        return cls(matrix, 1000 * np.maximum(0, -matrix.sum(1)))

    @classmethod
    def square_crop(cls, width: int, height: int) -> Frame:
        """From a picture of that size to its largest centred square."""
        x, y, side = _crop_window(width, height)
        scale = np.array([width, height]) / side
        return cls(np.diag(scale), -1000 * np.array([x, y]) / side)

    def then(self, other: Frame) -> Frame:
        """First this map, then the other."""
        return Frame(other.matrix @ self.matrix, other.matrix @ self.offset + other.offset)

    def points(self, points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Points (x, y) in the new picture; they may lie outside of it."""
        return points @ self.matrix.T + self.offset

    def box(self, box: Box, least_side: int = 4, least_share: float = 0.1) -> Box | None:
        """The box clipped to the new picture.

        None where a side is under `least_side` thousandths, or where less than `least_share` of
        the box is left.
        """
        corners = self.points(np.array([(box.x1, box.y1), (box.x2, box.y2)], float))
        low, high = corners.min(0), corners.max(0)
        cut_low, cut_high = np.clip(low, 0, 1000), np.clip(high, 0, 1000)
        sides = cut_high - cut_low
        if (sides < least_side).any() or sides.prod() < least_share * (high - low).prod():
            return None
        return Box.rounded(*cut_low, *cut_high)

    def ellipse(self, ellipse: Ellipse) -> Ellipse | None:
        """The ellipse in the new picture; None where its centre falls outside."""
        centre = self.points(np.array([[ellipse.xc, ellipse.yc]], float))[0]
        if (centre < 0).any() or (centre > 1000).any():
            return None
        angle = math.radians(ellipse.theta)
        # Columns: the semi-axes as vectors, y down, theta counter-clockwise as seen.
        axes = np.array([[math.cos(angle), -math.sin(angle)], [-math.sin(angle), -math.cos(angle)]])
        axes = self.matrix @ (axes * [ellipse.r_major, ellipse.r_minor])
        return Ellipse.rounded(*centre, *ellipse_axes(axes @ axes.T))


def ellipse_axes(square: Float[np.ndarray, "2 2"]) -> tuple[float, float, float]:
    """(r_major, r_minor, theta) of {p: p^T square^-1 p = 1} with y pointing down.

    For second moments S about the centroid, `square` = 4 S: the radii are twice the deviations.
    theta in [0, 180) degrees, counter-clockwise as seen; 0 where the radii differ by under 5%.
    """
    xx, yy, xy = square[0, 0], square[1, 1], square[0, 1]
    middle, swing = (xx + yy) / 2, math.hypot((xx - yy) / 2, xy)
    major, minor = math.sqrt(middle + swing), math.sqrt(max(middle - swing, 0.0))
    if major - minor < 0.05 * major:
        return major, minor, 0.0
    return major, minor, math.degrees(math.atan2(-2 * xy, xx - yy) / 2) % 180


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, least_side: int = LEAST_SIDE
) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
    """Decode a JPEG, PNG or WebP as it is stored, and its EXIF orientation (1..8).

    Grey, palette, CMYK and 16-bit pictures become 8-bit RGB; transparency is laid on white.

    Raises:
      ImageError: broken or truncated data, another format, a side under `least_side`, or more
        than `max_pixels` (refused before the pixels are decoded).
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels are too many (limit {max_pixels})")
            if min(width, height) < least_side:
                raise ImageError(f"{width} x {height} pixels are too few (least {least_side})")
            orientation = image.getexif().get(_ORIENTATION, 1)
            pixels = _to_rgb(image)
    except ImageError:
        raise
    except _BAD_IMAGE as error:
        # Pillow names the buffer by its address, which is another in every run.
        reason = _ADDRESS.sub("", str(error))[:200]
        raise ImageError(f"not a readable picture: {reason}") from error
    return pixels, orientation if orientation in _TURNS else 1


def decode_plain_jpeg(
    data: bytes, width: int, height: int
) -> UInt8[np.ndarray, "height width 3"] | None:
    """A JPEG of three components and that size, as `decode_image` gives it, in less time.

    None for anything else, truncated data among it: `decode_image` knows what to do or to say.
    """
    if not data.startswith(b"\xff\xd8") or not data.endswith(b"\xff\xd9"):
        return None
    if _jpeg_frame(data) != (8, height, width, 3) or width * height > MAX_PIXELS:
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def _jpeg_frame(data: bytes) -> tuple[int, int, int, int] | None:
    """(bits, height, width, components) of a baseline or progressive JPEG's frame header."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if kind in (0xC0, 0xC1, 0xC2):
            return struct.unpack_from(">BHHB", data, at + 4)
        if kind in (0xDA, 0xD9) or length < 2:
            return None
        at += 2 + length
    return None


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips instead of scaling
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return np.asarray(image.convert("RGB"))


def orient(pixels: UInt8[np.ndarray, "h w c"], orientation: int) -> UInt8[np.ndarray, "h2 w2 c"]:
    """The picture as EXIF orientation 1..8 shows it."""
    (xx, xy), (yx, yy) = _TURNS[orientation]
    if xx == 0:  # axes swap: the new x runs along the old y
        pixels = pixels.transpose(1, 0, 2)
        flip_x, flip_y = xy < 0, yx < 0
    else:
        flip_x, flip_y = xx < 0, yy < 0
    return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _crop_window(width: int, height: int) -> tuple[int, int, int]:
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def square_picture(
    pixels: UInt8[np.ndarray, "h w 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """The largest centred square, resized (area average when shrinking, cubic when growing)."""
    x, y, side = _crop_window(pixels.shape[1], pixels.shape[0])
    crop = np.ascontiguousarray(pixels[y : y + side, x : x + side])
    if side == size:
        return crop
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return cv2.resize(crop, (size, size), interpolation=method)


def training_picture(
    data: bytes, size: int
) -> tuple[UInt8[np.ndarray, "size size 3"], Frame, tuple[int, int]]:
    """Decode, turn, crop and resize; the map from stored to training coordinates.

    Returns:
      (picture, frame, (width, height) as stored).

    Raises:
      ImageError: as `decode_image`.
    """
    pixels, orientation = decode_image(data)
    stored = (pixels.shape[1], pixels.shape[0])
    pixels = orient(pixels, orientation)
    crop = Frame.square_crop(pixels.shape[1], pixels.shape[0])
    return square_picture(pixels, size), Frame.oriented(orientation).then(crop), stored
