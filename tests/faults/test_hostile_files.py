"""Files that claim more than they hold, and names that lead elsewhere: nothing is believed, nothing written outside."""

import gzip
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from harness import undisturbed
from helpers import draw_users
from inputs import one_line
from safetensors.torch import load_file, save_file

from evaluations.batches import NpzBatch
from evaluations.graphdef import read_constants
from evaluations.image_sets import read_samples
from guided_diffusion_vae import checkpoint, run_state
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.latent_shards import LatentShards, open_shard
from guided_diffusion_vae.data.plain_datasets import read_idx
from guided_diffusion_vae.run_record import read_run
from guided_diffusion_vae.sample_util import Batch, PngWriter, remove_old_samples, save_grids
from guided_diffusion_vae.vae_wrapper import VAEInterface, read_metadata

SHIPPED = Path(checkpoint.__file__).parent / "assets" / "microdoppler-f4.safetensors"


# ---- npz ------------------------------------------------------------------------------------------------------------


def member(shape, dtype="|u1", data=b"", *, length=None):
    """An array of an .npz whose header says what it is told to; in format 2 it also lies about its own length."""
    head = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    version, form = (1, "<H") if length is None else (2, "<I")
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(form, len(head) if length is None else length) + head + data


def images(n=4):
    return member((n, 2, 2, 3), data=np.random.RandomState(0).bytes(n * 12))


ARRAYS = {
    "a shape of 3 TB": {"arr_0.npy": member((10**6, 1000, 1000, 3), data=bytes(48))},
    "a shape beyond 64 bits": {"arr_0.npy": member((10**30, 2, 2, 3), data=bytes(48))},
    "a negative shape": {"arr_0.npy": member((-4, 2, 2, 3), data=bytes(48))},
    "a header of 100 MB, deflated": {"arr_0.npy": member("()", data=b" " * 10**8, length=10**8)},
    "an expression in its header": {"arr_0.npy": member("__import__('os').abort()", data=bytes(48))},
    "3000 brackets in its header": {"arr_0.npy": member("(" * 3000 + ")" * 3000, data=bytes(48))},
    "Python objects": {"arr_0.npy": member((4, 2, 2, 3), "|O", b"cos\nabort\n(tR.")},
    "a version that is none": {"arr_0.npy": b"\x93NUMPY\x09\x00" + bytes(100)},
    "text in place of numbers": {"arr_0.npy": member((4, 2, 2, 3), "<U9", bytes(48 * 36))},
    "no images": {"../../arr_0.npy": images()},
    "an array without .npy": {"arr_0": b"x"},
}


@pytest.mark.fault("an .npz with {kind}", promise="one sentence, within 100 MB; nothing is unpacked or unpickled")
@pytest.mark.parametrize("kind", ARRAYS)
def test_an_npz_that_lies(kind, tmp_path, record_property):
    path = tmp_path / "a" / "b" / "x.npz"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in ARRAYS[kind].items():
            archive.writestr(name, data)
    with undisturbed(tmp_path):
        for read in (lambda: NpzBatch(str(path), "--x"), lambda: read_samples(str(path))):
            assert str(path) in one_line(read)
    record_property("tried", 2)


@pytest.mark.fault("an .npz with a member called ../../x", promise="the member is ignored; nothing is unpacked")
def test_a_member_that_leads_out(tmp_path):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", images())
        archive.writestr("../../x.npy", images())
    with undisturbed(tmp_path):
        assert read_samples(tmp_path / "in" / "x.npz").pixels.shape == (4, 2, 2, 3)


# ---- idx, safetensors, graphs ---------------------------------------------------------------------------------------


@pytest.mark.fault("an idx file that claims {kind}", promise="one sentence, within 100 MB")
@pytest.mark.parametrize("kind, shape", [("64 GB", (2**32 - 1, 4, 4)), ("beyond 64 bits", (2**32 - 1,) * 8)])
def test_an_idx_that_lies(kind, shape, tmp_path):
    data = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    for name, content in (("x", data), ("x.gz", gzip.compress(data + bytes(10**7)))):
        (tmp_path / name).write_bytes(content)
        assert "claims" in one_line(lambda name=name: read_idx(tmp_path / name))


ROW = struct.pack("<fq", 1.0, 0)  # a latent of one number, and its label


def shard(path, header, data=ROW):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


ONE = {
    "latents": {"dtype": "F32", "shape": [1, 1, 1, 1], "data_offsets": [0, 4]},
    "labels": {"dtype": "I64", "shape": [1], "data_offsets": [4, 12]},
}
TOLD = {"autoencoder": "x", "image_size": "64", "dataset_size": "1"}
HEADERS = {
    "an infinite shape": b'{"latents": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 1e999]}}',
    "a shape beyond 64 bits": ONE | {"latents": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}},
    "five million brackets": b"[" * 5_000_000,
    "a list": [],
    "metadata that are a list": ONE | {"__metadata__": [1]},
    "classes that are a number": ONE | {"__metadata__": TOLD | {"class_names": "5"}},
    "classes without names": ONE | {"__metadata__": TOLD | {"class_names": "[1, {}]"}},
}


@pytest.mark.fault("latents whose header is {kind}", promise="one sentence, within 100 MB")
@pytest.mark.parametrize("kind", HEADERS)
def test_latents_that_lie(kind, tmp_path):
    path = shard(tmp_path / "latents_rank00_shard000.safetensors", HEADERS[kind])
    assert str(path) in one_line(lambda: LatentShards([path]))


@pytest.mark.fault("latents with the label 2^62", promise="one sentence that names the row")
def test_a_label_beyond_reason(tmp_path):
    path = shard(tmp_path / "x.safetensors", ONE, struct.pack("<fq", 1.0, 2**62))
    assert "row 0 has the label" in one_line(lambda: open_shard(path))


WEIGHTS = {
    "a width of a million": ({"encoder.conv_in.weight": th.zeros(10**6, 1, 3, 3, dtype=th.uint8)}, {}),
    "a width of nothing": ({"encoder.conv_in.weight": th.zeros(10**9, 0, 3, 3)}, {}),
    "a level 10^9": ({"encoder.down.1000000000.block.0.conv1.weight": th.zeros(1, 1, 1, 1)}, {}),
    "a vector for a convolution": ({"decoder.conv_in.weight": th.zeros(3)}, {}),
    "norms in 0 groups": ({}, {"config": '{"norm_groups": 0}'}),
    "a configuration of brackets": ({}, {"config": "[" * 100_000}),
    "a scale that is NaN": ({}, {"scale_factor": "NaN"}),
    "a scale that is a word": ({}, {"scale_factor": '"x"'}),
    "a scale of 0": ({}, {"scale_factor": "0.0"}),
    "scales of three channels for its four": ({}, {"scale_factor": "[1.0, 2.0, 3.0]"}),
    "a shift of no channels": ({}, {"shift": "[]"}),
}


@pytest.mark.fault("an autoencoder with {kind}", promise="one sentence, within 100 MB")
@pytest.mark.parametrize("kind", WEIGHTS)
def test_an_autoencoder_that_lies(kind, tmp_path):
    weights, words = WEIGHTS[kind]
    save_file(load_file(SHIPPED) | weights, tmp_path / "x.safetensors", read_metadata(SHIPPED) | words)
    assert "--vae_path" in one_line(lambda: VAEInterface(str(tmp_path / "x.safetensors")))


@pytest.mark.fault("weights under names that are numbers; a list; a word", promise="one sentence")
def test_weights_without_names(tmp_path, record_property):
    for loaded in ({3: th.zeros(2)}, [1], "x", {"state_dict": {"state_dict": {}}}, {"model": {3: th.zeros(1)}}):
        th.save(loaded, tmp_path / "x.pt")
        assert "x.pt" in one_line(lambda: VAEInterface(str(tmp_path / "x.pt")))
    record_property("tried", 5)


@pytest.mark.fault("a graph of 40 bytes that claims 512 MB", promise="one sentence, within 100 MB")
def test_a_graph_that_lies(tmp_path):
    tensor = b"\x08\x01\x12\x07\x12\x05\x08\x80\x80\x80\x40"  # float32, 2^27 values, none of them written
    value = b"\x42" + bytes([len(tensor)]) + tensor
    entry = b"\x0a\x05value\x12" + bytes([len(value)]) + value
    node = b"\x0a\x01a\x12\x05Const\x2a" + bytes([len(entry)]) + entry
    (tmp_path / "x.pb").write_bytes(b"\x0a" + bytes([len(node)]) + node)
    assert "134217728 but has 0 values" in one_line(lambda: read_constants(tmp_path / "x.pb"))


# ---- names that lead elsewhere --------------------------------------------------------------------------------------

ELSEWHERE = ["../../x", "/tmp/x", "..", ".", "-rf", "a/b", "x" * 300, "a\nb", "\0", "CON", "", "a\udcff", "~", "$HOME"]


@pytest.mark.fault("users called ../../x, -rf, 300 letters and the like, in samples", promise="files lie in the folder")
def test_names_of_users_stay_inside(tmp_path, record_property):
    out = tmp_path / "a" / "b" / "out"
    batch = Batch(np.zeros((len(ELSEWHERE), 4, 4, 3), np.uint8), np.arange(len(ELSEWHERE)))
    PngWriter(out / "png", ELSEWHERE).write(batch)
    save_grids(out, batch, ELSEWHERE)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 * len(ELSEWHERE) + 1 and all(path.is_relative_to(out) for path in files)
    record_property("tried", len(ELSEWHERE))


@pytest.mark.fault("a manifest that lists ../../x.png and links", promise="only its own samples are removed")
def test_a_manifest_that_leads_out(tmp_path):
    out = draw_users(tmp_path / "out", ["png/user_00"], 1)
    (tmp_path / "x.png").write_bytes(b"precious")
    (out / "png" / "link").symlink_to(tmp_path)
    names = ["../x.png", str(tmp_path / "x.png"), "png/../../x.png", "png/link/x.png", "png/user_00/0.png"]
    lines = ["file,row,user,label", *(f"{name},{i},u,0" for i, name in enumerate(names))]
    (out / "manifest.csv").write_text("\n".join(lines))
    remove_old_samples(out)
    assert (tmp_path / "x.png").exists() and not (out / "png" / "user_00" / "0.png").exists()


@pytest.mark.fault("a run state that lists ../x and /tmp/x among its files", promise="pruning removes nothing outside")
def test_a_state_that_leads_out(tmp_path):
    folder, precious = tmp_path / "run", tmp_path / "precious"
    folder.mkdir()
    precious.write_text("x")
    (folder / "link").symlink_to(tmp_path)
    for number, names in ((1, ["../precious", str(precious), "link/precious", "model000001.pt"]), (2, [])):
        (folder / f"model{number:06d}.pt").write_text("x")
        run_state.commit(folder, number, {name: [1, ""] for name in names}, {})
    run_state.prune(folder, 1)
    assert precious.exists() and not (folder / "model000001.pt").exists()


RECORDS = {"a number": "record: 3", "classes that are a number": "record: {class_names: 5}"}
RECORDS |= {"classes without names": "record: {class_names: [1, [2]]}", "a list": "- 1"}


@pytest.mark.fault("a run.yaml beside a model whose record is {kind}", promise="one sentence")
@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_that_is_none(kind, tmp_path):
    (tmp_path / "model000001.pt").write_bytes(b"")
    (tmp_path / "run.yaml").write_text(RECORDS[kind])
    with pytest.raises(UserError, match="run.yaml"):
        read_run(tmp_path / "model000001.pt")
