"""Writes constants as a frozen TensorFlow graph, from the description of the wire format: the reader's other side."""

import numpy as np

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int64": 9, "bool": 10}
VALUES = {1: 5, 2: 6, 3: 7, 4: 7, 9: 10, 10: 11}


def varint(n: int) -> bytes:
    n %= 2**64
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def field(number: int, value) -> bytes:
    """An int as a varint; bytes behind their length."""
    if isinstance(value, int):
        return varint(8 * number) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(8 * number + 2) + varint(len(value)) + value


def tensor(array: np.ndarray, form: str) -> bytes:
    """A TensorProto.

    Args:
        form: content (the raw bytes), packed, single (one value after another), or fill (the first value alone).
    """
    dtype = DTYPES[array.dtype.name]
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    start = field(1, dtype) + field(2, shape)
    if form == "content":
        return start + field(4, array.tobytes())
    flat = array.ravel()[: 1 if form == "fill" else None]
    if array.dtype.kind == "f" and form == "single":
        wire = 5 if array.itemsize == 4 else 1
        return start + b"".join(varint(8 * VALUES[dtype] + wire) + value.tobytes() for value in flat)
    if array.dtype.kind == "f":
        return start + field(VALUES[dtype], flat.tobytes())
    if form == "single":
        return start + b"".join(field(VALUES[dtype], int(value)) for value in flat)
    return start + field(VALUES[dtype], b"".join(varint(int(value)) for value in flat))


def node(name: str, op: str, **attributes: bytes) -> bytes:
    """A node of the graph; attributes are AttrValues."""
    entries = (field(5, field(1, key) + field(2, value)) for key, value in attributes.items())
    return field(1, field(1, name) + field(2, op) + field(3, "some/input") + b"".join(entries))


def const(name: str, array: np.ndarray, form: str = "content") -> bytes:
    """A Const node."""
    return node(name, "Const", dtype=field(6, DTYPES[array.dtype.name]), value=field(8, tensor(array, form)))


def graph(constants: dict[str, np.ndarray], form: str = "content") -> bytes:
    """A GraphDef of these constants, with a string, operations and versions around them as in a real one."""
    jpeg = node("DecodeJpeg/contents", "Const", value=field(8, field(1, 7) + field(2, b"") + field(8, b"\xff\xd8")))
    nodes = [const(name, array, form) + node(f"{name}/read", "Identity") for name, array in constants.items()]
    return jpeg + b"".join(nodes) + field(4, field(1, 8))
