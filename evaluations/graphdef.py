"""Constants of a frozen TensorFlow graph (.pb), read without TensorFlow and without protobuf.

A message is a run of fields, each a key and a value; the key says which field it is and how its value is written:

    key = 8 * number + wire,    wire 0: a varint;  1: 8 bytes;  5: 4 bytes;  2: a varint n, then n bytes

A graph holds nodes, a node a name, an operation and attributes; of a "Const" one of them, `value`, is a tensor. What
is read is bounded in bytes and in fields before anything is allocated, so that no file can exhaust memory or patience.

Source:
    The wire format of Protocol Buffers; TensorFlow's graph.proto, node_def.proto, attr_value.proto, tensor.proto.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from guided_diffusion_vae.config import UserError

MAX_BYTES = 512 << 20  # of a file, and of all its constants together; Inception has 96 MB
MAX_FIELDS = 4 << 20  # of a file: some seconds of reading
MAX_DIMS = 32
MAX_FILL = 4 << 20  # values that one stands for: a file of a few bytes must not become a gigabyte

GRAPH_NODE, GRAPH_FIELDS = 1, (1, 2, 3, 4, 5)  # node, library, version, versions, debug_info
NODE_NAME, NODE_OP, NODE_ATTR = 1, 2, 5
ENTRY_KEY, ENTRY_VALUE = 1, 2  # of a node's map of attributes
ATTR_TENSOR = 8
TENSOR_DTYPE, TENSOR_SHAPE, TENSOR_CONTENT = 1, 2, 4
SHAPE_DIM, SHAPE_UNKNOWN, DIM_SIZE = 2, 3, 1
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?"}  # DataType; others are left out
VALUE_FIELDS = {1: 5, 2: 6, 3: 7, 4: 7, 5: 7, 6: 7, 9: 10, 10: 11}  # DataType -> float_val, double_val, int_val, ...


def read_constants(path) -> dict[str, np.ndarray]:
    """Name -> value of each Const node of a frozen graph whose values are numbers.

    A file cut between two nodes is still a graph: whoever needs a constant must ask whether it is there.

    Raises:
        UserError: the file does not exist, is no GraphDef, is damaged or too large.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path} has {size:,} bytes; a graph of more than {MAX_BYTES:,} is not read")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    try:
        found = _Reader().graph(memoryview(data))
        if not found:
            raise _Damaged("no constant in it")
    except _Damaged as error:
        raise UserError(
            f"{path} is damaged or no frozen TensorFlow graph ({size:,} bytes, {error}); was it copied whole?"
        ) from error
    return found


class _Damaged(Exception):
    """The bytes do not say what a GraphDef says; why, in a few words."""


class _Reader:
    """Reads one graph, and counts what it has read."""

    def __init__(self):
        self.fields_left, self.bytes_left = MAX_FIELDS, MAX_BYTES

    def graph(self, data: memoryview) -> dict[str, np.ndarray]:
        found = {}
        for number, value in self.fields(data):
            if number not in GRAPH_FIELDS:
                raise _Damaged(f"field {number} in the graph")
            if number == GRAPH_NODE:
                name, tensor = self.node(value)
                if tensor is not None:
                    found[name] = tensor
        return found

    def node(self, data) -> tuple[str, np.ndarray | None]:
        """A node's name, and its value if it is a constant of numbers."""
        name, op, value = "", "", None
        for number, field in self.fields(data):
            if number == NODE_NAME:
                name = _text(field)
            elif number == NODE_OP:
                op = _text(field)
            elif number == NODE_ATTR:
                entry = dict(self.fields(field))
                if _text(entry.get(ENTRY_KEY, b"")) == "value":
                    value = dict(self.fields(entry.get(ENTRY_VALUE, b""))).get(ATTR_TENSOR)
        return name, self.tensor(value, name) if op == "Const" and value is not None else None

    def tensor(self, data, name: str) -> np.ndarray | None:
        """The array; None if it holds strings or another type that is no plain number."""
        fields = defaultdict(list)
        for number, field in self.fields(data):
            fields[number].append(field)
        dtype = fields[TENSOR_DTYPE][-1] if fields[TENSOR_DTYPE] else 0
        if dtype not in DTYPES:
            return None
        shape = self.shape(fields[TENSOR_SHAPE][-1], name) if fields[TENSOR_SHAPE] else ()
        content = fields[TENSOR_CONTENT][-1] if fields[TENSOR_CONTENT] else b""
        kind, count = np.dtype(DTYPES[dtype]), math.prod(shape)
        self.bytes_left -= count * kind.itemsize
        if self.bytes_left < 0:
            raise _Damaged(f"{name} is {_by(shape)}, and all constants may have {MAX_BYTES:,} bytes")
        flat = _from_bytes(content, kind, name) if content else self.listed(fields[VALUE_FIELDS[dtype]], kind, name)
        if len(flat) > count or (content and len(flat) < count):
            raise _Damaged(f"{name} is {_by(shape)} but has {len(flat):,} values")
        if count - len(flat) > MAX_FILL:
            raise _Damaged(f"{name} is {_by(shape)} but has {len(flat):,} values")
        if len(flat) < count:  # the last one stands for all that follow; none at all for zeros
            flat = np.concatenate([flat, np.full(count - len(flat), flat[-1] if len(flat) else 0, kind)])
        return flat.reshape(shape).astype(kind.newbyteorder("="))  # a copy: the file's bytes may go

    def shape(self, data, name: str) -> tuple[int, ...]:
        sizes = []
        for number, field in self.fields(data):
            if number == SHAPE_DIM:
                size = dict(self.fields(field)).get(DIM_SIZE, 0)
                if not isinstance(size, int) or size > MAX_BYTES or len(sizes) == MAX_DIMS:
                    raise _Damaged(f"the shape of {name}")
                sizes.append(size)
            elif number == SHAPE_UNKNOWN and field:
                raise _Damaged(f"the shape of {name}")
        if 0 in sizes and math.prod(size or 1 for size in sizes) > MAX_BYTES:
            raise _Damaged(f"the shape of {name}")
        return tuple(sizes)

    def listed(self, fields: list, kind: np.dtype, name: str) -> np.ndarray:
        """Values written one by one or packed: floats in their own bytes, whole numbers as varints."""
        if kind.kind == "f":
            return np.concatenate([np.empty(0, kind), *(_from_bytes(field, kind, name) for field in fields)])
        numbers = [n for field in fields for n in ([field] if isinstance(field, int) else self.varints(field))]
        return np.array(numbers, np.uint64).astype(np.int64).astype(kind)  # negative ones are written modulo 2^64

    def varints(self, data) -> Iterator[int]:
        position = 0
        while position < len(data):
            self.count()
            value, position = _varint(data, position)
            yield value

    def fields(self, data) -> Iterator[tuple[int, int | memoryview]]:
        """Yield (number, value) of a message: an int for a varint, else the bytes."""
        if isinstance(data, int):
            raise _Damaged("a number in place of a message")
        position = 0
        while position < len(data):
            self.count()
            key, position = _varint(data, position)
            number, wire = divmod(key, 8)
            if not number or wire not in (0, 1, 2, 5):
                raise _Damaged(f"no field has the key {key}")
            if wire == 0:
                value, position = _varint(data, position)
            else:
                size, position = _varint(data, position) if wire == 2 else (8 if wire == 1 else 4, position)
                value = data[position : position + size]
                if len(value) < size:
                    raise _Damaged(f"{size - len(value):,} bytes are missing")
                position += size
            yield number, value

    def count(self) -> None:
        self.fields_left -= 1
        if self.fields_left < 0:
            raise _Damaged(f"more than {MAX_FIELDS:,} fields")


def _varint(data, position: int) -> tuple[int, int]:
    """A whole number, seven bits a byte, lowest first; and where the next thing begins."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise _Damaged("it ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), position
    raise _Damaged("a number of more than 64 bits")


def _text(data) -> str:
    if isinstance(data, int):
        raise _Damaged("a number in place of a name")
    return bytes(data).decode(errors="replace")


def _from_bytes(data, kind: np.dtype, name: str) -> np.ndarray:
    if isinstance(data, int) or len(data) % kind.itemsize:
        raise _Damaged(f"the values of {name}")
    return np.frombuffer(data, kind)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
