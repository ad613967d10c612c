"""Bytes and words at random: every reader ends with a value or with one sentence, soon, and within its memory.

What was found stays in `FOUND` and is tried each time. With `--all_faults` there are many more examples.
"""

import contextlib
import io
import json
import struct
import time
import zipfile
from itertools import count

import numpy as np
import pytest
import torch as th
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from inputs import forget_memory, main_of, memory
from PIL import Image
from test_hostile_files import ONE, ROW, images

from evaluations.batches import NpzBatch
from evaluations.graphdef import read_constants
from evaluations.image_sets import read_samples
from guided_diffusion_vae.checkpoint import load_state_dict
from guided_diffusion_vae.config import UserError, create_argparser, parse_run
from guided_diffusion_vae.data.image_folder import list_images, read_rgb
from guided_diffusion_vae.data.latent_shards import LatentShards
from guided_diffusion_vae.data.plain_datasets import read_idx
from guided_diffusion_vae.sample_util import safe_name
from guided_diffusion_vae.train_config import TrainConfig

SECONDS, MEGABYTES = 10, 300
FEW, MANY = 40, 1000


def fuzz(strategy, attempt, request, found=()):
    """Try a function on what was found before and on what the strategy draws; records how often."""
    tried = count()

    def once(drawn):
        next(tried)
        begin, before = time.monotonic(), forget_memory()
        with contextlib.suppress(UserError):
            attempt(drawn)
        assert time.monotonic() - begin < SECONDS and memory() - before < MEGABYTES

    test = given(strategy)(once)
    for case in found:
        test = example(case)(test)
    many = request.config.getoption("--all_faults", False)
    about = {"deadline": None, "database": None, "derandomize": not many, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=MANY if many else FEW, **about)(test)()
    request.node.user_properties.append(("tried", next(tried)))


# ---- readers of bytes -----------------------------------------------------------------------------------------------


def npz():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("arr_0.npy", images())
    return data.getvalue()


def png():
    data = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(data, "PNG")
    return data.getvalue()


def safetensors(header=ONE):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + ROW


def saved(weights, zipped=True):
    data = io.BytesIO()
    th.save(weights, data, _use_new_zipfile_serialization=zipped)
    return data.getvalue()


TENSOR = b"\x08\x01\x12\x04\x12\x02\x08\x02\x22\x08" + struct.pack("<2f", 1, 2)
VALUE = b"\x42" + bytes([len(TENSOR)]) + TENSOR
ENTRY = b"\x0a\x05value\x12" + bytes([len(VALUE)]) + VALUE
NODE = b"\x0a\x01a\x12\x05Const\x2a" + bytes([len(ENTRY)]) + ENTRY
IDX = bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + b"abc"
GOOD = {
    "npz reader of the evaluator": (npz(), ".npz", lambda path: NpzBatch(path, "--x")),
    "npz reader of samples": (npz(), ".npz", read_samples),
    "idx reader": (IDX, "", read_idx),
    "reader of latents": (safetensors(), ".safetensors", lambda path: LatentShards([path])),
    "reader of weights": (safetensors(), ".safetensors", load_state_dict),
    "reader of checkpoints": (saved({"a": th.arange(3)}), ".pt", load_state_dict),
    "reader of checkpoints of old": (saved({"a": th.arange(3)}, zipped=False), ".pt", load_state_dict),
    "graph reader": (b"\x0a" + bytes([len(NODE)]) + NODE, ".pb", read_constants),
    "image reader": (png(), ".png", read_rgb),
}
FOUND = {
    "reader of latents": [
        safetensors(b'{"latents": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}'),
        safetensors()[:-8] + struct.pack("<q", 2**62),
    ],
    "reader of checkpoints": [b"a letter"],
    "image reader": [b"Pf 1 1 -1.0\n" + struct.pack("<f", float("nan"))],
}


def altered(good):
    """A good file with some bytes changed, some put in, and perhaps cut short; or bytes alone."""
    places = st.integers(0, len(good) - 1)
    edits = st.lists(st.tuples(places, st.integers(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6)

    def alter(edits, cut):
        data = bytearray(good)
        for place, insert, new in edits:
            data[place : place if insert else place + len(new)] = new
        return bytes(data[:cut])

    ends = st.one_of(st.none(), places)
    return st.one_of(st.builds(alter, edits, ends), st.binary(max_size=200))


@pytest.mark.fault(
    "{reader}: files with bytes changed, put in or cut off", promise="a value or one sentence, in 300 MB"
)
@pytest.mark.parametrize("reader", GOOD)
def test_a_reader(reader, tmp_path, request):
    good, ending, read = GOOD[reader]
    path = tmp_path / f"x{ending}"

    def attempt(data):
        path.write_bytes(data)
        read(path)

    attempt(good)
    fuzz(altered(good), attempt, request, FOUND.get(reader, ()))


NUMBERS = st.one_of(st.integers(-2, 5), st.integers(), st.floats(), st.none(), st.text(max_size=3))
LISTS = st.lists(NUMBERS, max_size=5)
ENTRIES = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from(["F32", "I64", "X", 3]), "shape": LISTS, "data_offsets": LISTS}
)
WORDS = st.dictionaries(st.sampled_from(["autoencoder", "class_names", "image_size", "dataset_size"]), st.text())
HEADS = st.fixed_dictionaries({"latents": ENTRIES, "labels": ENTRIES}, optional={"__metadata__": WORDS | NUMBERS})


@pytest.mark.fault("reader of latents: headers of every kind of JSON", promise="a value or one sentence, in 300 MB")
def test_a_header_of_latents(tmp_path, request):
    def attempt(header):
        (tmp_path / "x.safetensors").write_bytes(safetensors(header))
        LatentShards([tmp_path / "x.safetensors"])

    fuzz(HEADS | st.recursive(NUMBERS, st.lists), attempt, request)


# ---- words ----------------------------------------------------------------------------------------------------------

YAML_WORDS = [
    "!!bool x",
    "!!timestamp x",
    "!!int x",
    "!!float .",
    "2020-99-99",
    "[",
    "{",
    "&a ",
    "*a",
    "? ",
    "- ",
    "1:",
]
YAML_WORDS += ["lr: ", "\n", "<<: ", "!!python/name:os.system ", "|", ">", "%", "@", "\0", "\t", "'", '"', "---", "..."]


@pytest.mark.fault("recipes of any words of YAML", promise="a run or one sentence, in 10 s and 300 MB")
def test_a_recipe(tmp_path, request):
    parser, path = create_argparser(TrainConfig), tmp_path / "recipe.yaml"

    def attempt(text):
        path.write_bytes(text.encode(errors="surrogatepass"))
        parse_run(parser, ["--config", str(path)])

    values = st.recursive(NUMBERS | st.booleans() | st.dates(), lambda x: st.lists(x) | st.dictionaries(NUMBERS, x))
    keys = st.sampled_from(["lr", "batch_size", "ema_rate", "val_dir", "ema_warmup", "LR"])
    dumped = st.dictionaries(keys, values, max_size=4).map(lambda loaded: yaml.dump(loaded))
    texts = st.lists(st.sampled_from(YAML_WORDS) | st.text(max_size=4), max_size=20).map("".join)
    found = ["lr: !!bool x", "lr: !!timestamp x", "lr: 2020-99-99", "[" * 100_000, "lr: " + "1:" * 100_000 + "1"]
    fuzz(dumped | texts, attempt, request, found)


@pytest.mark.fault("{script}: any words after its name, with --dry_run True", promise="a run or one sentence")
@pytest.mark.parametrize("script", ["simulate_microdoppler.py", "evaluate_samples.py", "vae_train.py"])
def test_flags(script, request, capsys):
    flags = st.sampled_from(["--seed", "--batch_size", "--lr", "--out_dir", "--config", "--image_size", "--num_users"])
    flags |= st.sampled_from(["--", "-", "--se", "--out_dir=x", "--seed=1", "--seed=", "--debug", "--users", "-1"])
    values = st.sampled_from(["nan", "inf", "1e400", "-1", "0", "1_0", "٣", "", "x" * 5000, "9" * 5000, "True", "a,b"])

    def attempt(words):
        with contextlib.suppress(SystemExit):  # --help
            main_of(script)([*words, "--dry_run", "True"])
        capsys.readouterr()

    words = st.lists(flags | values | st.text(max_size=5).filter(lambda word: "\0" not in word), max_size=6)
    fuzz(words, attempt, request)


NAME = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=60)


@pytest.mark.fault(
    "names of files and folders, and of classes", promise="a class for each image; a plain name for each"
)
def test_names(tmp_path, request):
    places = count()

    def attempt(names):
        root = tmp_path / str(next(places))
        for name in names:
            with contextlib.suppress(OSError, UnicodeError):  # . and .., too long, half a surrogate
                (root / name).mkdir(parents=True, exist_ok=True)
                (root / name / f"{name[:40]}_1.png").write_bytes(b"")
        found = list_images(root)
        assert len(found.labels) == len(found.paths) and set(found.labels) == set(range(len(found.class_names)))
        plain = [safe_name(found.class_names, label) for label in range(len(found.class_names))]
        assert all(name.isascii() and name.replace("_", "").replace("-", "").isalnum() for name in plain)
        assert all(len(name) < 100 and not name.startswith("-") for name in plain)

    fuzz(st.lists(NAME, max_size=4), attempt, request)
