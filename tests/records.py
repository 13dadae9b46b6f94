"""Small folders of records for tests, written without TensorFlow."""

from __future__ import annotations

import io
import itertools
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kaleido_jax.data import ShapesSource, record_files, tf_example

LATENTS = ("text", "bbox", "blob", "voken")


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """A picture, uint8 [H, W, 3], as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def record(
    key: str, image: bytes, side: int, caption: str = "a shape", **latents: str
) -> dict[str, list]:
    """The features of one record; latents that are not given are ""."""
    texts = {"key": key, "caption": caption, **{n: latents.get(n, "") for n in LATENTS}}
    return {
        **{name: [text.encode("utf-8")] for name, text in texts.items()},
        "image": [image],
        "height": [side],
        "width": [side],
    }


def write_folder(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    shards: int = 2,
    file_format: str = "array_record",
    split: str = "train",
    name: str = "tiny",
) -> Path:
    """Files of records and dataset_info.json in `folder`; returns it.

    ArrayRecord needs array_record; TFRecord needs nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    edges = [len(records) * i // shards for i in range(shards + 1)]
    for index in range(shards):
        path = folder / f"{name}-{split}.{file_format}-{index:05d}-of-{shards:05d}"
        data = [tf_example.write(r) for r in records[edges[index] : edges[index + 1]]]
        if file_format == "array_record":
            from array_record.python import array_record_module

            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for item in data:
                writer.write(item)
            writer.close()
        else:
            path.write_bytes(b"".join(map(_tfrecord, data)))
    lengths = [str(b - a) for a, b in itertools.pairwise(edges)]
    info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": file_format,
        "splits": [
            {
                "name": split,
                "shardLengths": lengths,
                "numBytes": "0",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    return folder


def _tfrecord(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    crc = record_files._masked_crc
    return length + struct.pack("<I", crc(length)) + data + struct.pack("<I", crc(data))


def write_shapes(root: Path, count: int = 23, name: str = "shapes", size: int = 64) -> Path:
    """Records of the embedded shapes with all latents, where the task table looks for them."""
    source = ShapesSource(count, seed=3, size=size, latents=LATENTS)
    examples = [source[i] for i in range(count)]
    made = [
        record(e["key"], jpeg(e["image"]), size, e["caption"], **e["latents"]) for e in examples
    ]
    return write_folder(root / name / str(size) / "1.0.0", made, shards=3, name=name)
