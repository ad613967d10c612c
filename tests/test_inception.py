"""Inception 2015 against a second evaluation of its graph, and its weights by either road."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from graphdef_writer import const, graph
from inception_oracle import TORCH_NAMES, Oracle, resized, torch_state

from evaluations import inception
from evaluations.inception import InceptionV3, features_of, find_weights, load_inception
from evaluations.inception_graph import tf1_resize
from guided_diffusion_vae.config import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two images, what the oracle makes of them, and its weights as a .pth and as a model."""
    rng, oracle = np.random.RandomState(0), Oracle()
    pixels = rng.randint(0, 256, (2, 40, 56, 3)).astype(np.uint8)
    pixels[1] = pixels[1] // 4 + np.arange(56, dtype=np.uint8)[None, :, None] * 3
    truth = oracle(pixels)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    th.save(torch_state(oracle.weights), path)
    model = load_inception(path, check=False)
    return SimpleNamespace(pixels=pixels, truth=truth, weights=oracle.weights, path=path, model=model)


def close(found, truth, tolerance):
    return np.abs(found - truth).max() / np.abs(truth).max() < tolerance


# ---- the graph -------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_graph(world):
    pool, spatial = features_of(world.model, world.pixels)
    true_pool, true_spatial, true_logits = world.truth
    assert pool.dtype == spatial.dtype == np.float32
    assert np.abs(true_pool[0] - true_pool[1]).max() > 0.1 * true_pool.max()  # the images differ, so the test can fail
    assert 0.2 < (true_spatial > 0).mean() < 0.8
    assert close(pool, true_pool, 1e-5) and close(spatial, true_spatial, 1e-5)
    assert close(pool @ world.model.class_weight, true_logits, 1e-5)


def test_size_and_names_are_those_of_the_published_file():
    """566 entries, 95,628,359 bytes; 23,850,960 parameters with 1008 classes (23,834,568 with 1000)."""
    model = InceptionV3()
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == 23_850_960
    convs = [name for name in state if name.endswith("conv.weight")]
    assert len(state) == 566 and len(convs) == 94 and state["fc.weight"].shape == (1008, 2048)
    assert {name.removesuffix(".conv.weight") for name in convs} == set(TORCH_NAMES.values())
    size = sum(v.numel() * v.element_size() for v in state.values())
    assert 0 < inception.PTH_BYTES - size < 566 * 300


@pytest.mark.parametrize(
    "size, goal",
    [((5, 8), (37, 41)), ((300, 640), (37, 41)), ((1, 1), (9, 9)), ((64, 64), (299, 299)), ((512, 512), (299, 299))],
)
def test_resize_is_its_definition(size, goal):
    image = np.random.RandomState(1).randint(0, 256, (*size, 3)).astype(np.uint8)
    found = tf1_resize(th.from_numpy(image).permute(2, 0, 1)[None].float(), goal)[0].permute(1, 2, 0).numpy()
    rounding = 255 * sum(size) * 2**-23  # places are float32, as in TensorFlow
    assert np.abs(found - resized(image, *goal)).max() < rounding + 1e-4


def test_resize_of_a_ramp_in_closed_form():
    """4 -> 8: every second is a pixel, the others lie half way, and the last repeats the edge. 4 -> 4: as it was."""
    ramp = th.tensor([0.0, 10, 20, 30]).expand(1, 1, 4, 4)
    assert tf1_resize(ramp, (4, 8))[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert tf1_resize(ramp.mT, (2, 4))[0, 0, :, 0].tolist() == [0, 20]  # nothing is averaged when it shrinks
    assert th.equal(tf1_resize(ramp, (4, 4)), ramp)


def test_it_stays_in_eval_and_takes_no_gradient(world):
    world.model.train()
    assert not any(module.training for module in world.model.modules())
    assert not any(p.requires_grad for p in world.model.parameters())


# ---- features of many images -----------------------------------------------------------------------------------------


def test_neither_batch_size_nor_container_matters(world):
    images = np.random.RandomState(2).randint(0, 256, (3, 24, 32, 3)).astype(np.uint8)
    pool, spatial = features_of(world.model, images, batch_size=3)
    images.flags.writeable = False
    for batches, size in ((images, 2), ((images[i : i + 2].astype(np.float32) for i in (0, 2)), 1)):
        other_pool, other_spatial = features_of(world.model, batches, batch_size=size)
        assert close(other_pool, pool, 1e-6) and close(other_spatial, spatial, 2e-6)
    assert [len(a) for a in features_of(world.model, iter([]))] == [0, 0]
    with pytest.raises(ValueError, match=r"\(N, height, width, 3\)"):
        features_of(world.model, images[..., :1])


def test_no_tf32_while_it_runs(monkeypatch):
    """And what was set before is set afterwards, also after an error."""
    seen = []

    class Model(InceptionV3):
        def forward(self, pixels):
            seen.append(th.backends.cudnn.allow_tf32)
            raise KeyboardInterrupt

    model = Model()
    for setting in (True, False):
        monkeypatch.setattr(th.backends.cudnn, "allow_tf32", setting)
        with pytest.raises(KeyboardInterrupt):
            features_of(model, np.zeros((1, 8, 8, 3), np.uint8))
        assert th.backends.cudnn.allow_tf32 is setting
    assert seen == [False, False]


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["content", "packed"])
def test_the_graph_file_gives_the_same_network(world, tmp_path, form):
    """Its size is about that of the real one, which `check` asks for; cut anywhere it is refused."""
    path = tmp_path / "classify_image_graph_def.pb"
    path.write_bytes(graph(world.weights, form))
    state = load_inception(path).state_dict()
    reference = world.model.state_dict()
    assert list(state) == list(reference) and all(th.equal(state[k], reference[k]) for k in state)
    if form == "packed":
        return
    cuts = np.sort(np.random.RandomState(3).randint(0, path.stat().st_size, 50))[::-1]
    for i, length in enumerate([*cuts, 1000, 1, 0]):
        with open(path, "r+b") as file:
            file.truncate(length)
        with pytest.raises(UserError, match=f"{length:,} bytes|lacks") as caught:
            load_inception(path, check=i % 2 == 0)
        assert "\n" not in str(caught.value) and "--inception_weights" in str(caught.value)


def test_a_graph_cut_between_two_nodes_is_told_by_what_it_lacks(world, tmp_path):
    kept = {k: v for k, v in world.weights.items() if k.startswith("conv")}
    (tmp_path / "some.pb").write_bytes(b"".join(const(k, v) for k, v in kept.items()))
    with pytest.raises(UserError, match="lacks 447 of the 472 tensors of Inception 2015, such as mixed/conv/conv2d_"):
        load_inception(tmp_path / "some.pb", check=False)
    wrong = {k: np.zeros(1, np.float32) for k in world.weights}
    (tmp_path / "wrong.pb").write_bytes(graph(wrong))
    with pytest.raises(UserError, match=r"another network .* conv/conv2d_params is \(1,\), not \(3, 3, 3, 32\)"):
        load_inception(tmp_path / "wrong.pb", check=False)


def test_the_published_file_is_known_by_size_and_hash(world, tmp_path):
    size = world.path.stat().st_size
    with pytest.raises(UserError, match=f"has {size:,} bytes and should have 95,628,359; was it copied whole"):
        load_inception(world.path)
    path = tmp_path / "zeros.pth"
    with open(path, "wb") as file:
        file.truncate(inception.PTH_BYTES)
    with pytest.raises(UserError, match="has the SHA-256 [0-9a-f]{64} and should have 6726825d0af5f729"):
        load_inception(path)


class Code:
    def __reduce__(self):
        return os.mkdir, ("run_by_pickle",)


def test_other_files_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("code.pth").write_bytes(pickle.dumps(Code(), protocol=2))
    Path("text.pth").write_text("version https://git-lfs.github.com/spec/v1")
    th.save({"fc.weight": th.zeros(1000, 2048)}, "other.pth")
    said = {"code.pth": "more than tensors", "text.pth": "not", "other.pth": "lacks 471 of", "none.pb": "not exist"}
    for name, words in {**said, "none.pth": "does not exist", ".": "is a folder"}.items():
        with pytest.raises(UserError, match=words) as caught:
            load_inception(name, check=False)
        assert "\n" not in str(caught.value) and "--inception_weights" in str(caught.value)
    assert not Path("run_by_pickle").exists()


@pytest.mark.parametrize(
    "name, value", [("Mixed_6d.branch1x1.conv.weight", np.nan), ("Mixed_7c.branch_pool.bn.running_var", -1)]
)
def test_values_that_no_weights_have_are_refused(world, tmp_path, name, value):
    state = dict(world.model.state_dict())
    state[name] = state[name].clone()
    state[name].view(-1)[-1:] = value
    th.save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=f"damaged: {name}"):
        load_inception(tmp_path / "bad.pth", check=False)


def test_loading_draws_no_random_number(world):
    before = th.get_rng_state()
    load_inception(world.path, check=False)
    assert th.equal(before, th.get_rng_state())


def test_weights_are_looked_for_in_order(tmp_path, monkeypatch):
    """Given, environment, working folder, torch's cache under either name; then none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    assert find_weights() is None
    cache = tmp_path / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    usual = [cache / f"{kind}inception-2015-12-05-6726825d.pth" for kind in ("weights-", "pt_")]
    for path in [*usual, Path("classify_image_graph_def.pb")]:
        path.touch()
        assert find_weights() == path
    for name in ("env.pth", "given.pth"):
        Path(name).touch()
    monkeypatch.setenv("INCEPTION_WEIGHTS", "env.pth")
    assert find_weights() == Path("env.pth") and find_weights("given.pth") == Path("given.pth")
    for wrong, words in (("gone.pth", "gone.pth does not exist"), ("torch", "is a folder")):
        with pytest.raises(UserError, match=f"--inception_weights .*{words}.*{inception.PTH_SHA256}"):
            find_weights(wrong)
        monkeypatch.setenv("INCEPTION_WEIGHTS", wrong)
        with pytest.raises(UserError, match=f"^INCEPTION_WEIGHTS {wrong}"):
            find_weights()
