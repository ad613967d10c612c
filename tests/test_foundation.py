"""Foundation features against a vision transformer written out here; the alignment losses against loops."""

import json
import math
import sys

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion_vae.autoencoders.foundation import (
    STRIDE,
    load_foundation,
    marginal_cosine,
    marginal_distance_matrix,
)
from guided_diffusion_vae.config import UserError

WIDTH, HEADS, GRID = 64, 2, 3  # a tiny model, and the square of patches its position table knows
PATCH = {"dinov2": 14, "mae": 16}


# ---- a vision transformer by hand ------------------------------------------------------------------------------------


def timm_weights(kind, depth=2, seed=0):
    """Random weights in timm's layout."""
    rng = th.Generator().manual_seed(seed)

    def draw(*shape, scale=0.1):
        return scale * th.randn(*shape, generator=rng)

    patch = PATCH[kind]
    weights = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, 1 + GRID**2, WIDTH, scale=1.0),
        "patch_embed.proj.weight": draw(WIDTH, 3, patch, patch, scale=0.05),
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": 1 + draw(WIDTH),
        "norm.bias": draw(WIDTH),
    }
    for i in range(depth):
        block = f"blocks.{i}"
        for name, c_in, c_out in (
            ("attn.qkv", WIDTH, 3 * WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", WIDTH, 2 * WIDTH),
            ("mlp.fc2", 2 * WIDTH, WIDTH),
        ):
            weights |= {f"{block}.{name}.weight": draw(c_out, c_in), f"{block}.{name}.bias": draw(c_out)}
        for name in ("norm1", "norm2"):
            weights |= {f"{block}.{name}.weight": 1 + draw(WIDTH), f"{block}.{name}.bias": draw(WIDTH)}
        if kind == "dinov2":
            weights |= {f"{block}.ls{k}.gamma": 0.5 + draw(WIDTH) for k in (1, 2)}
    return weights


def cubic(n_in, n_out):
    """The matrix (n_out, n_in) that resizes a line: Keys' cubic, a = -1/2, widened where it shrinks."""

    def kernel(t):
        t = abs(t)
        if t < 1:
            return 1.5 * t**3 - 2.5 * t**2 + 1
        return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0

    scale = n_in / n_out
    rows = [[kernel((j + 0.5 - (i + 0.5) * scale) / max(scale, 1)) for j in range(n_in)] for i in range(n_out)]
    return th.tensor([[value / sum(row) for value in row] for row in rows], dtype=th.float64)


def bilinear(n_in, n_out):
    """The matrix (n_out, n_in) that resizes a line between the two nearest pixels, without widening."""
    matrix = th.zeros(n_out, n_in, dtype=th.float64)
    for i in range(n_out):
        at = min(max((i + 0.5) * n_in / n_out - 0.5, 0), n_in - 1)
        low = int(at)
        matrix[i, low] += 1 - (at - low)
        matrix[i, min(low + 1, n_in - 1)] += at - low
    return matrix


def resized(x, matrix, size):
    return matrix(x.shape[-2], size[0]) @ x @ matrix(x.shape[-1], size[1]).T


def vit_by_hand(weights, x):
    """Features (N, C, h, w) of prepared images, patch by patch in reading order."""
    weights = {key: value.double() for key, value in weights.items()}

    def linear(name, t):
        return t @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, t):
        t = (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return t * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    kernel = weights["patch_embed.proj.weight"]
    patch = kernel.shape[-1]
    h, w = (size // patch for size in x.shape[2:])
    patches = [
        (x[:, None, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] * kernel).sum((2, 3, 4))
        for r in range(h)
        for c in range(w)
    ]
    table = weights["pos_embed"][0, 1:].T.reshape(WIDTH, GRID, GRID)
    table = resized(table, cubic, (h, w)).flatten(1).T
    tokens = th.stack(patches, dim=1) + weights["patch_embed.proj.bias"] + table
    first = (weights["cls_token"] + weights["pos_embed"][:, :1]).expand(len(x), -1, -1)
    tokens = th.cat([first, tokens], dim=1)
    for i in range(sum(key.endswith("attn.qkv.weight") for key in weights)):
        b, one = f"blocks.{i}", th.ones((), dtype=th.float64)
        q, k, v = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", tokens)).chunk(3, dim=-1)
        heads = [
            th.softmax(q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(WIDTH // HEADS), dim=-1) @ v[..., s]
            for s in (slice(n * WIDTH // HEADS, (n + 1) * WIDTH // HEADS) for n in range(HEADS))
        ]
        tokens = tokens + linear(f"{b}.attn.proj", th.cat(heads, dim=-1)) * weights.get(f"{b}.ls1.gamma", one)
        hidden = linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", tokens))
        hidden = hidden * 0.5 * (1 + th.erf(hidden / math.sqrt(2)))
        tokens = tokens + linear(f"{b}.mlp.fc2", hidden) * weights.get(f"{b}.ls2.gamma", one)
    return norm("norm", tokens)[:, 1:].transpose(1, 2).unflatten(2, (h, w))


def features_by_hand(kind, weights, x, upstream_input):
    x = x.double().expand(-1, 3, -1, -1)
    x = resized(x, bilinear, [size // 16 * PATCH[kind] for size in x.shape[2:]])
    if not upstream_input:
        mean, std = ([[[value]] for value in values] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = ((x + 1) / 2 - th.tensor(mean, dtype=th.float64)) / th.tensor(std, dtype=th.float64)
    return vit_by_hand(weights, x)


# ---- features --------------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(params=["dinov2", "mae"])
def kind(request):
    return request.param


@pytest.mark.parametrize("upstream_input", [False, True])
@pytest.mark.parametrize("size, channels", [((48, 48), 3), ((80, 32), 1)])
def test_features_are_those_of_the_transformer(transformers, tmp_path, kind, size, channels, upstream_input):
    """Order, normalisation, resizing and positions: on the table's own grid, and larger and smaller than it."""
    weights = timm_weights(kind)
    th.save(weights, tmp_path / "timm.pth")
    model = load_foundation(kind, tmp_path / "timm.pth", upstream_input=upstream_input, num_heads=HEADS)
    x = th.rand(2, channels, *size, generator=th.Generator().manual_seed(1)) * 2 - 1
    got, expected = model(x), features_by_hand(kind, weights, x, upstream_input)
    assert got.shape == (2, model.channels, size[0] // STRIDE, size[1] // STRIDE) and model.channels == WIDTH
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert th.equal(got, model(x))  # MAE's shuffling draws nothing
    assert expected.std() > 0.5  # the agreement is of something


def test_transformers_folder_and_timms_file_are_the_same_model(transformers, tmp_path, kind):
    """save_pretrained, then the same numbers rewritten in timm's layout, and inside a training checkpoint."""
    th.manual_seed(0)
    settings = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 1, "layer_norm_eps": 1e-6}
    settings |= {"image_size": PATCH[kind] * GRID, "patch_size": PATCH[kind]}
    if kind == "dinov2":
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**settings, mlp_ratio=2))
    else:
        theirs = transformers.ViTMAEModel(transformers.ViTMAEConfig(**settings, intermediate_size=100))
    for param in theirs.parameters():
        param.data += 0.05 * th.randn_like(param)
    theirs.save_pretrained(tmp_path / "folder")
    state = theirs.state_dict()

    timm = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "mask_token": th.zeros(1, WIDTH),  # has no use here, as a head
        "head.weight": th.zeros(10, WIDTH),
    }
    for end in ("weight", "bias"):
        timm[f"patch_embed.proj.{end}"] = state[f"embeddings.patch_embeddings.projection.{end}"]
        timm[f"norm.{end}"] = state[f"layernorm.{end}"]
    blocks = "encoder.layer" if kind == "dinov2" else "layers"
    norms = ("norm1", "norm2") if kind == "dinov2" else ("layernorm_before", "layernorm_after")
    for i in range(2):
        theirs_i, ours_i = f"{blocks}.{i}", f"blocks.{i}"
        for end in ("weight", "bias"):
            qkv = [state[f"{theirs_i}.attention.{letter}_proj.{end}"] for letter in "qkv"]
            timm[f"{ours_i}.attn.qkv.{end}"] = th.cat(qkv)
            timm[f"{ours_i}.attn.proj.{end}"] = state[f"{theirs_i}.attention.o_proj.{end}"]
            for a, b in (*zip(("norm1", "norm2"), norms, strict=True), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
                timm[f"{ours_i}.{a}.{end}"] = state[f"{theirs_i}.{b}.{end}"]
        if kind == "dinov2":
            timm |= {f"{ours_i}.ls{k}.gamma": state[f"{theirs_i}.layer_scale{k}.lambda1"] for k in (1, 2)}
    th.save(timm, tmp_path / "timm.pth")
    lightning = {f"foundation_model.model.{key}": value for key, value in timm.items()}
    th.save({"state_dict": lightning | {"encoder.conv_in.weight": th.zeros(1)}}, tmp_path / "vavae.ckpt")

    x = th.rand(2, 3, 64, 64) * 2 - 1
    expected = load_foundation(kind, tmp_path / "folder")(x)
    for name in ("timm.pth", "vavae.ckpt"):
        np.testing.assert_allclose(load_foundation(kind, tmp_path / name)(x), expected, atol=1e-5)


def test_it_is_frozen(transformers, tmp_path, kind):
    th.save(timm_weights(kind), tmp_path / "timm.pth")
    model = load_foundation(kind, tmp_path / "timm.pth").train()
    x = th.rand(1, 1, 32, 32, requires_grad=True)
    assert model.kind == kind and not model(x).requires_grad
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())


def test_what_is_missing_is_named(transformers, tmp_path, kind):
    other = "mae" if kind == "dinov2" else "dinov2"
    weights = timm_weights(kind)
    th.save(timm_weights(other), tmp_path / "other.pth")
    th.save({"state_dict": {"encoder.conv_in.weight": th.zeros(1)}}, tmp_path / "plain.ckpt")
    th.save({k: v for k, v in weights.items() if k != "blocks.1.norm1.bias"}, tmp_path / "nearly.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    for name, words in {
        "": "needs its weights",
        "absent": "does not exist",
        "other.pth": f"not the weights of this {kind} model",
        "plain.ckpt": "cls_token is missing",
        "nearly.pth": "(1 keys in all) differ",
        "empty": "no config.json",
        "wrong": "holds a vit model",
    }.items():
        with pytest.raises(UserError) as error:
            load_foundation(kind, tmp_path / name if name else "")
        assert words in str(error.value) and "--vf_path" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_lacks_weights_is_refused(transformers, tmp_path):
    """transformers would fill them with random numbers and warn."""
    config = transformers.Dinov2Config(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=1, image_size=42)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks encoder\.layer\.1\."):
        load_foundation("dinov2", tmp_path)


def test_without_transformers_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    th.save(timm_weights("mae"), tmp_path / "timm.pth")
    with pytest.raises(UserError, match=r"pip install guided_diffusion_vae\[vf\]"):
        load_foundation("mae", tmp_path / "timm.pth")


# ---- alignment -------------------------------------------------------------------------------------------------------


def cosine_by_hand(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def alignment_by_hand(z, f, cos_margin, distmat_margin):
    """Both losses in loops over images and positions: (cosine, distance matrix)."""
    n = len(z)
    z, f = ([list(image.reshape(image.shape[0], -1).T) for image in v] for v in (z, f))
    count = len(z[0])
    cosine = distmat = 0.0
    for zi, fi in zip(z, f, strict=True):
        for i in range(count):
            cosine += max(0, 1 - cos_margin - cosine_by_hand(zi[i], fi[i])) / count / n
            for j in range(count):
                gap = abs(cosine_by_hand(zi[i], zi[j]) - cosine_by_hand(fi[i], fi[j]))
                distmat += max(0, gap - distmat_margin) / count**2 / n
    return cosine, distmat


@pytest.mark.parametrize("cos_margin, distmat_margin", [(0, 0), (0.5, 0.25)])
def test_the_alignment_losses_are_the_formulas(cos_margin, distmat_margin):
    z, f = (np.random.default_rng(seed).normal(0.2, 1, (2, 5, 3, 4)) for seed in (0, 1))
    cosine, distmat = alignment_by_hand(z, f, cos_margin, distmat_margin)
    z, f = th.from_numpy(z), th.from_numpy(f)
    assert marginal_cosine(z, f, cos_margin).item() == pytest.approx(cosine, rel=1e-9)
    assert marginal_distance_matrix(z, f, distmat_margin).item() == pytest.approx(distmat, rel=1e-9)


def test_scaled_features_align_perfectly_and_rotated_ones_by_their_distances():
    z = th.randn(2, 4, 3, 3, dtype=th.float64)
    turn = th.linalg.qr(th.randn(4, 4, dtype=th.float64))[0]
    assert marginal_cosine(z, 7 * z, 0).abs() < 1e-12 and marginal_distance_matrix(z, 7 * z, 0) < 1e-12
    assert marginal_distance_matrix(z, th.einsum("oc,nchw->nohw", turn, z), 0) < 1e-12
    assert marginal_cosine(z, -z, 0.5).item() == pytest.approx(1.5)


def test_features_are_resized_to_the_grid_of_the_latents():
    z, f = th.randn(1, 3, 6, 6, dtype=th.float64), th.randn(1, 3, 3, 3, dtype=th.float64)
    larger = resized(f, bilinear, (6, 6))
    cosine, distmat = alignment_by_hand(z.numpy(), larger.numpy(), 0.1, 0.1)
    assert marginal_cosine(z, f, 0.1).item() == pytest.approx(cosine, rel=1e-9)
    assert marginal_distance_matrix(z, f, 0.1).item() == pytest.approx(distmat, rel=1e-9)


def test_the_losses_are_float32_under_autocast():
    z, f = th.randn(1, 8, 4, 4), th.randn(1, 8, 4, 4)
    exact = marginal_distance_matrix(z, f, 0), marginal_cosine(z, f, 0)
    with th.autocast("cpu", dtype=th.bfloat16):
        assert (marginal_distance_matrix(z, f, 0), marginal_cosine(z, f, 0)) == exact
        assert F.linear(z, z[0, 0]).dtype == th.bfloat16  # autocast was on
