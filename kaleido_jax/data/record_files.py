"""Files of records by number: ArrayRecord and TFRecord, without TensorFlow.

ArrayRecord has an index of its own and checks every chunk. A TFRecord file is walked once for its
offsets; the length of each record is checked, its contents by whoever parses them.
"""

from __future__ import annotations

import os
import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaleido_jax.errors import UserError

FORMATS = ("array_record", "tfrecord")
_SHARD = re.compile(
    rf"(?P<name>.+)-(?P<split>[^-]+)\.(?P<format>{'|'.join(FORMATS)})"
    r"-(?P<index>\d{5,})-of-(?P<count>\d{5,})"
)
_MAX_RECORD = 2**30
# No read-ahead: records are read in random order.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class FileError(Exception):
    """A file of records, or one record of it, cannot be read."""


@dataclass(frozen=True)
class ShardName:
    """The parts of `NAME-SPLIT.FORMAT-00000-of-00004`."""

    name: str
    split: str
    format: str
    index: int
    count: int

    @classmethod
    def parse(cls, filename: str) -> ShardName | None:
        """The parts of a file's name, or None for other files."""
        match = _SHARD.fullmatch(filename)
        if match is None:
            return None
        return cls(
            match["name"], match["split"], match["format"], int(match["index"]), int(match["count"])
        )

    def __str__(self) -> str:
        return f"{self.name}-{self.split}.{self.format}-{self.index:05d}-of-{self.count:05d}"


class RecordFile:
    """One file of records; opened at the first reading, safe to read from several threads.

    Args:
      path: the file.
      file_format: one of FORMATS.
    """

    def __init__(self, path: Path, file_format: str):
        self.path, self.format = path, file_format
        self._lock = threading.Lock()
        self._reader: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "format": self.format}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["format"])

    def __len__(self) -> int:
        """Records in the file. Raises FileError."""
        return self._open().count

    def read(self, index: int) -> bytes:
        """Record `index` of the file. Raises FileError."""
        reader = self._open()
        if not 0 <= index < reader.count:
            raise FileError(f"the file has {reader.count} records, number {index} was asked for")
        return reader.read(index)

    def _open(self) -> Any:
        with self._lock:
            if self._reader is None:
                kind = _ArrayRecord if self.format == "array_record" else _TfRecord
                self._reader = kind(self.path)
            return self._reader


class _ArrayRecord:
    def __init__(self, path: Path):
        try:
            from array_record.python import array_record_module
        except ImportError as error:
            raise UserError(
                f"{path}: reading ArrayRecord needs the extra: pip install 'kaleido_jax[data]'"
            ) from error
        self._reader = array_record_module.ArrayRecordReader(
            str(path), _OPTIONS, file_reader_buffer_size=32768
        )
        self._lock = threading.Lock()
        if not self._reader.ok():
            try:
                self._reader.read([0])
            except RuntimeError as error:
                raise FileError(_short(error)) from error
            raise FileError("not a whole ArrayRecord file")
        self.count = self._reader.num_records()

    def read(self, index: int) -> bytes:
        try:
            with self._lock:
                return self._reader.read([index])[0]
        except RuntimeError as error:
            raise FileError(_short(error)) from error


class _TfRecord:
    def __init__(self, path: Path):
        self._path = path
        self._spans: list[tuple[int, int]] = []
        try:
            with open(path, "rb") as file:
                end = os.fstat(file.fileno()).st_size
                at = 0
                while at < end:
                    header = os.pread(file.fileno(), 12, at)
                    if len(header) < 12:
                        raise FileError(f"truncated at byte {at}")
                    length, check = struct.unpack("<QI", header)
                    if _masked_crc(header[:8]) != check or length > _MAX_RECORD:
                        raise FileError(f"broken length of a record at byte {at}")
                    if at + 16 + length > end:
                        raise FileError(f"truncated within the record at byte {at}")
                    self._spans.append((at + 12, length))
                    at += 16 + length
        except OSError as error:
            raise FileError(error.strerror or str(error)) from error
        self.count = len(self._spans)

    def read(self, index: int) -> bytes:
        offset, length = self._spans[index]
        try:
            with open(self._path, "rb") as file:
                data = os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise FileError(error.strerror or str(error)) from error
        if len(data) != length:
            raise FileError("the file has become shorter")
        return data


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # CRC-32C, reflected
        table.append(value)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecord writes it: rotated and moved, so that CRCs of CRCs stay good."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
