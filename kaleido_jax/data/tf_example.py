"""tf.train.Example as bytes, read and written without TensorFlow.

The wire format, as far as records need it (lists of bytes and of whole numbers):

    Example { features = 1 }  Features { feature = 1: map }  entry { key = 1, value = 2 }
    Feature { bytes_list = 1 | int64_list = 3 }              list { value = 1, repeated }

protobuf writes a map in an order that changes from process to process; `write` orders it by name,
so that the same record is the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

Value = list[bytes] | list[int]

_VARINT, _BYTES = 0, 2


class ExampleError(ValueError):
    """Bytes that are no tf.train.Example of the kind that records hold."""


def read(data: bytes) -> dict[str, Value]:
    """The features of an example: name -> list of bytes or of int.

    Raises:
      ExampleError: anything but a well-formed example of bytes and int64 lists.
    """
    features: dict[str, Value] = {}
    for number, value in _fields(data):
        if number != 1:
            raise ExampleError(f"field {number} in an Example")
        for inner, entry in _fields(_message(value)):
            if inner != 1:
                raise ExampleError(f"field {inner} in the Features")
            name, feature = _entry(_message(entry))
            if name in features:
                raise ExampleError(f"feature {name!r} twice")
            features[name] = feature
    return features


def write(features: Mapping[str, Sequence[bytes] | Sequence[int]]) -> bytes:
    """The bytes of an example, its features ordered by name. `read(write(x)) == x`."""
    out = []
    for name in sorted(features):
        values = features[name]
        if values and isinstance(values[0], int):
            kind, body = 3, _field(1, b"".join(_varint(v % 2**64) for v in values))
        else:
            kind, body = 1, b"".join(_field(1, v) for v in values)
        entry = _field(1, name.encode("utf-8")) + _field(2, _field(kind, body))
        out.append(_field(1, entry))
    return _field(1, b"".join(out))


def _entry(data: bytes) -> tuple[str, Value]:
    name, feature = "", b""
    for number, value in _fields(data):
        if number == 1:
            try:
                name = _message(value).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ExampleError("a feature's name is not UTF-8") from error
        elif number == 2:
            feature = _message(value)
        else:
            raise ExampleError(f"field {number} in an entry of the map")
    return name, _feature(feature, name)


def _feature(data: bytes, name: str) -> Value:
    values: Value = []
    for number, value in _fields(data):
        if number == 1:
            values = [_message(item) for _, item in _items(value)]
        elif number == 3:
            values = []
            for _, item in _items(value):
                values += _packed(item) if isinstance(item, bytes) else [_signed(item)]
        else:
            raise ExampleError(f"feature {name!r} holds neither bytes nor whole numbers")
    return values


def _items(value: bytes | int) -> Iterator[tuple[int, bytes | int]]:
    for number, item in _fields(_message(value)):
        if number != 1:
            raise ExampleError(f"field {number} in a list")
        yield number, item


def _packed(data: bytes) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _read_varint(data, at)
        values.append(_signed(value))
    return values


def _message(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ExampleError("a number where a message should be")
    return value


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(field number, its bytes or its whole number), one after the other."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _read_varint(data, at)
        if tag & 7 == _BYTES:
            length = data[at] if at < end else 0x80
            if length < 0x80:  # most are: shorter than 128 bytes
                at += 1
            else:
                length, at = _read_varint(data, at)
            if at + length > end:
                raise ExampleError("the record ends within a field")
            yield tag >> 3, data[at : at + length]
            at += length
        elif tag & 7 == _VARINT:
            value, at = _read_varint(data, at)
            yield tag >> 3, value
        else:
            raise ExampleError(f"wire type {tag & 7}")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, at
        shift += 7
        if shift > 63:
            break
    raise ExampleError("the record ends within a number, or the number is too long")


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
