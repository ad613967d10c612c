"""Constants come back bit-equal whatever way they are written; whatever else the file is, one line says so."""

import time

import numpy as np
import pytest
from graphdef_writer import const, field, graph, node, tensor, varint

from evaluations import graphdef
from evaluations.graphdef import read_constants
from guided_diffusion_vae.config import UserError

RNG = np.random.RandomState(0)
CONSTANTS = {
    "a/conv2d_params": RNG.randn(3, 2, 5, 4).astype(np.float32),
    "double": RNG.randn(7),
    "axis": np.array(-3, np.int32),
    "shape": np.array([-1, 2**40, 300], np.int64),
    "bytes": np.arange(250, 256, dtype=np.uint8),
    "flags": np.array([[True, False], [True, True]]),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def written(tmp_path):
    def write(data: bytes):
        path = tmp_path / "graph.pb"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("form", ["content", "packed", "single"])
def test_every_way_to_write_a_tensor_comes_back_bit_equal(written, form):
    found = read_constants(written(graph(CONSTANTS, form)))
    assert list(found) == list(CONSTANTS)  # the string is left out
    for name, array in CONSTANTS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


def test_the_last_value_stands_for_those_that_follow(written):
    """A single value fills a tensor; no value is zeros."""
    short = field(1, 1) + field(2, field(2, field(1, 5))) + field(5, np.array([1, 2], np.float32).tobytes())
    nothing = field(1, 1) + field(2, field(2, field(1, 5)))
    data = const("fill", np.full((3, 4), 0.25, np.float32), "fill")
    data += node("short", "Const", value=field(8, short)) + node("nothing", "Const", value=field(8, nothing))
    found = read_constants(written(data))
    assert np.array_equal(found["fill"], np.full((3, 4), 0.25))
    assert np.array_equal(found["short"], [1, 2, 2, 2, 2]) and np.array_equal(found["nothing"], np.zeros(5))


def test_fields_may_come_in_any_order(written):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    shape = field(2, b"".join(field(2, field(1, size)) for size in array.shape))
    value = field(8, field(5, array.tobytes()) + shape + field(1, 1))
    entry = field(5, field(2, value) + field(1, "value"))
    assert np.array_equal(read_constants(written(field(1, entry + field(2, "Const") + field(1, "x"))))["x"], array)


def test_protobuf_itself_writes_what_is_read(written):
    """Google's own library as the writer, where it is installed; its messages are declared here."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = {"i32": 5, "i64": 3, "f32": 2, "text": 9, "bytes": 12, "bool": 8}
    messages = {
        "Dim": [("size", 1, "i64", 0)],
        "Shape": [("dim", 2, "Dim", 1)],
        "Tensor": [("dtype", 1, "i32", 0), ("shape", 2, "Shape", 0), ("content", 4, "bytes", 0), ("f", 5, "f32", 1)]
        + [("i", 7, "i32", 1), ("l", 10, "i64", 1)],
        "Attr": [("type", 6, "i32", 0), ("tensor", 8, "Tensor", 0)],
        "Entry": [("key", 1, "text", 0), ("value", 2, "Attr", 0)],
        "Node": [("name", 1, "text", 0), ("op", 2, "text", 0), ("input", 3, "text", 1), ("attr", 5, "Entry", 1)],
        "Graph": [("node", 1, "Node", 1)],
    }
    file = descriptor_pb2.FileDescriptorProto(name="graph_for_test.proto", package="t", syntax="proto3")
    for name, members in messages.items():
        message = file.message_type.add(name=name)
        for member, number, kind, repeated in members:
            made = message.field.add(name=member, number=number, label=3 if repeated else 1)
            made.type = kinds.get(kind, 11)
            if kind in messages:
                made.type_name = f".t.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Graph"))()
    floats = np.random.RandomState(1).randn(2, 3).astype(np.float32)
    for name, values in {"listed": {"f": floats.ravel()}, "raw": {"content": floats.tobytes()}}.items():
        one = made.node.add(name=name, op="Const", input=["x"])
        attr = one.attr.add(key="value").value
        attr.tensor.dtype = 1
        for size in floats.shape:
            attr.tensor.shape.dim.add(size=size)
        for key, value in values.items():
            attr.tensor.content = value if key == "content" else b""
            attr.tensor.f.extend(value if key == "f" else [])
    attr = made.node.add(name="whole", op="Const").attr.add(key="value").value
    attr.tensor.dtype = 3
    attr.tensor.shape.dim.add(size=3)
    attr.tensor.i.extend([-1, 0, 70000])
    found = read_constants(written(made.SerializeToString()))
    assert all(np.array_equal(found[name], floats) for name in ("listed", "raw"))
    assert found["whole"].tolist() == [-1, 0, 70000]


def test_a_file_cut_anywhere_is_refused_or_has_fewer_constants(written):
    data = graph(CONSTANTS)
    whole = read_constants(written(data))
    for length in range(0, len(data), 3):
        try:
            found = read_constants(written(data[:length]))
        except UserError as error:
            assert "\n" not in str(error) and "damaged" in str(error) and f"{length:,} bytes" in str(error)
        else:
            assert all(found[name].tobytes() == whole[name].tobytes() for name in found)


def test_changed_bytes_never_end_in_another_error(written):
    data, refused = graph(CONSTANTS, "packed"), 0
    for _ in range(400):
        changed = bytearray(data)
        for place in RNG.randint(0, len(data), RNG.randint(1, 6)):
            changed[place] = RNG.randint(256)
        try:
            read_constants(written(bytes(changed)))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 0 < refused < 400  # some changes are only another value


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 5000, b"PK\3\4" * 100, b"<!DOCTYPE html>\n<html>", b"version https://git-lfs.github.com/spec/v1\n"]
    + [b"\x0a" * 3000, b"\x80\x02}q\0.", RNG.bytes(3000), b"\xff" * 3000],
)
def test_foreign_files_are_refused(written, data):
    with pytest.raises(UserError, match="damaged or no frozen TensorFlow graph .* was it copied whole") as caught:
        read_constants(written(data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [[2**62], [2**30, 2**30], [-1], [0, 2**28, 2**28], [1] * 40, [2**27] * 2])
def test_no_shape_makes_it_allocate(written, sizes):
    """A few bytes that claim exabytes."""
    shape = field(2, b"".join(field(2, field(1, size)) for size in sizes))
    data = node("bomb", "Const", value=field(8, field(1, 1) + shape + field(5, b"\0\0\0\0")))
    with pytest.raises(UserError, match="bomb"):
        read_constants(written(data))


def test_many_claims_together_are_too_much(written, monkeypatch):
    monkeypatch.setattr(graphdef, "MAX_BYTES", 1000)
    data = const("a", np.zeros(100, np.float32), "fill")
    read_constants(written(data * 2))
    with pytest.raises(UserError, match="all constants may have 1,000 bytes"):
        read_constants(written(data * 3))
    with pytest.raises(UserError, match="of more than 1,000 is not read"):
        read_constants(written(b"\0" * 1001))


def test_no_number_of_fields_makes_it_wait(written, monkeypatch):
    monkeypatch.setattr(graphdef, "MAX_FIELDS", 10_000)
    many = field(15, 1) * 3_000_000
    for data in (field(1, many), const("n", np.zeros(20_000, np.int32), "packed")):
        start = time.perf_counter()
        with pytest.raises(UserError, match="more than 10,000 fields"):
            read_constants(written(data))
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "value",
    [
        field(4, b"\0" * 8),  # two values where the shape says three
        field(5, b"\0" * 16),  # four
        field(5, b"\0" * 5),  # no whole number of values
        varint(8 * 5) + varint(7),  # a varint where floats belong
    ],
)
def test_values_that_do_not_fit_are_refused(written, value):
    shaped = field(1, 1) + field(2, field(2, field(1, 3)))
    with pytest.raises(UserError, match="of w|w is 3"):
        read_constants(written(node("w", "Const", value=field(8, shaped + value))))


def test_no_file_is_no_graph(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_constants(tmp_path / "none.pb")
    with pytest.raises(UserError, match="is no file"):
        read_constants(tmp_path)


def test_the_writer_says_what_a_known_message_says():
    """Bytes worked out by hand from the description of the wire format: 150 is 96 01, "testing" has length 7."""
    assert field(1, 150) == bytes.fromhex("089601")
    assert field(2, "testing") == bytes.fromhex("120774657374696e67")
    expected = "0801" + "1204" + "12020802" + "2208" + "0000803f00000040"  # float, 2 long, 1.0 and 2.0
    assert tensor(np.array([1, 2], np.float32), "content").hex() == expected
