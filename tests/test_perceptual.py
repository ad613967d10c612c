"""LPIPS against the formula in numpy, and the files its weights come in."""

import numpy as np
import pytest
import torch as th

from guided_diffusion_vae.autoencoders.perceptual import LPIPS, load_lpips
from guided_diffusion_vae.config import UserError

CONVS = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}  # torchvision's numbers, by slice


def conv_by_hand(x, weight, bias=None, stride=1, padding=1):
    """Cross-correlation in numpy: the sum over a kernel's taps of shifted images."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    k = weight.shape[-1]
    rows, cols = ((size - k) // stride + 1 for size in x.shape[2:])
    out = np.zeros((len(x), len(weight), rows, cols))
    for i in range(k):
        for j in range(k):
            tap = x[:, :, i : i + stride * rows : stride, j : j + stride * cols : stride]
            out += np.einsum("nchw,oc->nohw", tap, weight[:, :, i, j])
    return out if bias is None else out + bias[:, None, None]


def lpips_by_hand(weights, x, y):
    def features(h):
        h = (h - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        for k, numbers in CONVS.items():
            if k > 1:
                n, c, rows, cols = h.shape
                h = h.reshape(n, c, rows // 2, 2, cols // 2, 2).max(axis=(3, 5))
            for n in numbers:
                h = conv_by_hand(h, weights[f"net.slice{k}.{n}.weight"], weights[f"net.slice{k}.{n}.bias"])
                h = np.maximum(h, 0)
            yield h / (np.sqrt((h**2).sum(1, keepdims=True)) + 1e-10)

    total = 0
    for k, (f, g) in enumerate(zip(features(x), features(y), strict=True)):
        head = weights[f"lin{k}.model.1.weight"].reshape(-1)
        total += np.einsum("nchw,c->nhw", (f - g) ** 2, head).mean(axis=(1, 2))
    return total


def tiny_lpips(seed=0, width=2):
    """A VGG16 with two channels where the true one has 64, in float64; heads are positive, as the true ones."""
    th.manual_seed(seed)
    model = LPIPS(width).double()
    for name, param in model.named_parameters():
        param.data = th.rand_like(param) if name.startswith("lin") else th.randn_like(param) * 0.4
    for name, buffer in (("shift", [-0.030, -0.088, -0.188]), ("scale", [0.458, 0.448, 0.450])):
        setattr(model.scaling_layer, name, th.tensor(buffer, dtype=th.float64).view(1, 3, 1, 1))
    return model


def in_numpy(model):
    return {key: value.detach().double().numpy() for key, value in model.state_dict().items()}


def images(seed=1, channels=3, size=16):
    rng = np.random.default_rng(seed)
    return [rng.uniform(-1, 1, (2, channels, size, size)) for _ in range(2)]


def test_the_distance_is_the_formula():
    model, (x, y) = tiny_lpips(), images(size=32)
    got = model(th.from_numpy(x), th.from_numpy(y))
    np.testing.assert_allclose(got, lpips_by_hand(in_numpy(model), x, y), rtol=1e-9)
    assert got.shape == (2,) and (got > 0.01).all()
    assert model(th.from_numpy(x), th.from_numpy(x)).abs().max() == 0


def test_grey_counts_as_three_equal_channels():
    model, (x, y) = tiny_lpips(), images(channels=1)
    got = model(th.from_numpy(x), th.from_numpy(y))
    np.testing.assert_allclose(got, lpips_by_hand(in_numpy(model), x.repeat(3, 1), y.repeat(3, 1)), rtol=1e-9)


def test_the_full_size_and_its_keys():
    model = LPIPS()
    sizes = {key: value.numel() for key, value in model.state_dict().items()}
    assert sum(size for key, size in sizes.items() if key.startswith("net.")) == 14_714_688
    assert sum(size for key, size in sizes.items() if key.startswith("lin")) == 1_472
    convs = {f"net.slice{k}.{n}.{end}" for k, numbers in CONVS.items() for n in numbers for end in ("weight", "bias")}
    heads = {f"lin{k}.model.1.weight" for k in range(5)}
    assert set(sizes) == convs | heads | {"scaling_layer.shift", "scaling_layer.scale"}
    assert model.lin4["model"][1].weight.shape == (1, 512, 1, 1)


def test_it_is_frozen_and_stays_in_eval():
    model = LPIPS(2)
    th.nn.Sequential(model).train()
    assert not any(module.training for module in model.modules())
    assert not any(param.requires_grad for param in model.parameters())


def test_the_gradient_is_finite_where_all_features_are_zero():
    """The square root of a sum of squares has no derivative there."""
    model = tiny_lpips()
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            param.data.fill_(-100.0)
    x, y = (th.from_numpy(v).requires_grad_() for v in images())
    model(x, y).sum().backward()
    assert y.grad.abs().max() == 0


def test_files(tmp_path):
    """Ours, torchvision's with the heads (comma or folder), and a training checkpoint hold the same network."""
    model = tiny_lpips().float()
    weights = model.state_dict()
    features = {f"features.{k.split('.', 2)[2]}": v for k, v in weights.items() if k.startswith("net.")}
    heads = {key: value for key, value in weights.items() if key.startswith("lin")}
    (tmp_path / "both").mkdir()
    th.save(weights, tmp_path / "ours.pt")
    th.save(features | {"classifier.0.weight": th.zeros(3)}, tmp_path / "both" / "vgg16-397923af.pth")
    th.save(heads, tmp_path / "both" / "vgg.pth")
    lightning = {f"loss.perceptual_loss.{key}": value for key, value in weights.items()}
    th.save({"epoch": 1, "state_dict": lightning | {"encoder.conv_in.weight": th.zeros(2)}}, tmp_path / "vavae.ckpt")
    comma = f"{tmp_path / 'both' / 'vgg.pth'}, {tmp_path / 'both' / 'vgg16-397923af.pth'}"
    for path in (tmp_path / "ours.pt", tmp_path / "both", comma, tmp_path / "vavae.ckpt"):
        loaded = load_lpips(path).state_dict()
        assert all(th.equal(loaded[key], value) for key, value in weights.items()), path


def test_what_is_missing_is_named(tmp_path):
    weights = LPIPS(2).state_dict()
    th.save({k: v for k, v in weights.items() if k.startswith("lin")}, tmp_path / "vgg.pth")
    th.save({k: v for k, v in weights.items() if k != "lin3.model.1.weight"}, tmp_path / "nearly.pt")
    (tmp_path / "empty").mkdir()
    for path, word in {
        tmp_path / "absent.pt": "absent.pt does not exist",
        tmp_path / "vgg.pth": "lacks net.slice1.0.weight",
        tmp_path / "nearly.pt": "lacks lin3.model.1.weight (1 keys",
        tmp_path / "empty": "lacks",
        "": "--perceptual_weight needs",
    }.items():
        with pytest.raises(UserError) as error:
            load_lpips(path)
        message = str(error.value)
        assert word in message and "--lpips_path" in message and "vgg16-397923af.pth" in message
        assert "\n" not in message
