"""Inception 2015 a second time: NumPy, float64, written from TensorFlow's description of the graph.

The oracle knows the graph by its TensorFlow names, and draws each weight when it first meets it, seeded by its name. So
names, shapes and wiring are stated here once more, apart from the table in the package. Names: the stem is conv ...
conv_4; of each block `mixed_N`, a branch of one convolution is conv, the others tower, tower_1, tower_2.
"""

import zlib

import numpy as np
import torch as th
from numpy.lib.stride_tricks import sliding_window_view


class Weights(dict):
    """Constants by their TensorFlow names, drawn when asked for."""

    def get(self, name, shape):
        if name not in self:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            kind = name.split("/")[-1]
            if kind == "conv2d_params":
                value = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[:3])))
            elif kind == "weights":
                value = rng.standard_normal(shape, np.float32) / np.float32(20)
            elif kind in ("gamma", "moving_variance"):
                value = rng.uniform(0.6, 1.4, shape) * (0.05 if kind == "moving_variance" else 0.22)  # eps 0.001 counts
            else:
                value = rng.normal(0, 0.1, shape)
            self[name] = value.astype(np.float32)
        return self[name].astype(np.float64)


def windows(x, size, stride, padding, fill):
    """(N, H', W', C, kh, kw), padded as TensorFlow pads: SAME makes ceil(H / stride) rows, and the odd one is below."""
    if padding == "SAME":
        need = [max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip(x.shape[1:3], size, strict=True)]
        x = np.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in need), (0, 0)], constant_values=fill)
    return sliding_window_view(x, size, axis=(1, 2))[:, ::stride, ::stride]


class Oracle:
    """The frozen graph, operation by operation; x is (N, H, W, C)."""

    def __init__(self):
        self.weights = Weights()

    def conv(self, scope, x, out, size, stride=1, padding="SAME"):
        kernel = self.weights.get(f"{scope}/conv2d_params", (*size, x.shape[3], out))
        y = np.tensordot(windows(x, size, stride, padding, 0), kernel, axes=[(4, 5, 3), (0, 1, 2)])
        parts = ("gamma", "beta", "moving_mean", "moving_variance")
        gamma, beta, mean, variance = (self.weights.get(f"{scope}/batchnorm/{part}", (out,)) for part in parts)
        return np.maximum((y - mean) / np.sqrt(variance + 0.001) * gamma + beta, 0)

    def average(self, x):
        return np.nanmean(windows(x, (3, 3), 1, "SAME", np.nan), axis=(4, 5))  # what is padded has no part

    def maximum(self, x, stride=2, padding="VALID"):
        return windows(x, (3, 3), stride, padding, -np.inf).max(axis=(4, 5))

    def along(self, scope, x, *convs):
        """conv, conv_1, ... one after another: (channels, height, width[, stride and VALID])."""
        for i, (out, height, width, *valid) in enumerate(convs):
            name = f"{scope}/conv_{i}" if i else f"{scope}/conv"
            x = self.conv(name, x, out, (height, width), *([2, "VALID"] if valid else []))
        return x

    def places_35(self, s, x, pool):
        a = self.along(s, x, (64, 1, 1))
        b = self.along(f"{s}/tower", x, (48, 1, 1), (64, 5, 5))
        c = self.along(f"{s}/tower_1", x, (64, 1, 1), (96, 3, 3), (96, 3, 3))
        d = self.along(f"{s}/tower_2", self.average(x), (pool, 1, 1))
        return np.concatenate([a, b, c, d], axis=3)

    def places_17(self, s, x, n):
        a = self.along(s, x, (192, 1, 1))
        b = self.along(f"{s}/tower", x, (n, 1, 1), (n, 1, 7), (192, 7, 1))
        c = self.along(f"{s}/tower_1", x, (n, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7))
        d = self.along(f"{s}/tower_2", self.average(x), (192, 1, 1))
        return np.concatenate([a, b, c, d], axis=3)

    def places_8(self, s, x, pooled):
        a = self.along(s, x, (320, 1, 1))
        b = self.along(f"{s}/tower", x, (384, 1, 1))
        c = self.along(f"{s}/tower_1", x, (448, 1, 1), (384, 3, 3))
        pairs = []
        for tower, y in (("tower", b), ("tower_1", c)):
            pairs.append(self.conv(f"{s}/{tower}/mixed/conv", y, 384, (1, 3)))
            pairs.append(self.conv(f"{s}/{tower}/mixed/conv_1", y, 384, (3, 1)))
        d = self.along(f"{s}/tower_2", pooled, (192, 1, 1))
        return np.concatenate([a, *pairs, d], axis=3)

    def __call__(self, pixels):
        """pool (N, 2048), spatial (N, 2023), logits (N, 1008) of uint8 (N, H, W, 3)."""
        x = (np.stack([resized(image, 299, 299) for image in pixels]) - 128) * 0.0078125
        x = self.conv("conv", x, 32, (3, 3), 2, "VALID")
        x = self.conv("conv_1", x, 32, (3, 3), 1, "VALID")
        x = self.maximum(self.conv("conv_2", x, 64, (3, 3)))
        x = self.conv("conv_3", x, 80, (1, 1), 1, "VALID")
        x = self.maximum(self.conv("conv_4", x, 192, (3, 3), 1, "VALID"))
        for s, pool in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
            x = self.places_35(s, x, pool)
        a = self.along("mixed_3", x, (384, 3, 3, "VALID"))
        b = self.along("mixed_3/tower", x, (64, 1, 1), (96, 3, 3), (96, 3, 3, "VALID"))
        x = np.concatenate([a, b, self.maximum(x)], axis=3)
        for s, n in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
            if s == "mixed_6":
                spatial = self.along(s, x, (192, 1, 1))[..., :7].reshape(len(x), -1)
            x = self.places_17(s, x, n)
        a = self.along("mixed_8/tower", x, (192, 1, 1), (320, 3, 3, "VALID"))
        b = self.along("mixed_8/tower_1", x, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, "VALID"))
        x = np.concatenate([a, b, self.maximum(x)], axis=3)
        x = self.places_8("mixed_9", x, self.average(x))
        x = self.places_8("mixed_10", x, self.maximum(x, 1, "SAME"))
        pool = x.mean(axis=(1, 2))
        self.weights.get("softmax/biases", (1008,))
        return pool, spatial, pool @ self.weights.get("softmax/weights", (2048, 1008))


def resized(image, height, width):
    """TensorFlow 1's ResizeBilinear by its definition, pixel by pixel."""
    image = image.astype(np.float64)
    rows, columns = image.shape[:2]
    out = np.empty((height, width, image.shape[2]))
    for i in range(height):
        for j in range(width):
            y, x = i * rows / height, j * columns / width
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            out[i, j] = upper + (lower - upper) * (y - top)
    return out


# ---- the same weights by their PyTorch names -------------------------------------------------------------------------

STEM = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
PLACES_35 = {
    **{"conv": "branch1x1", "tower/conv": "branch5x5_1", "tower/conv_1": "branch5x5_2"},
    **{"tower_1/conv": "branch3x3dbl_1", "tower_1/conv_1": "branch3x3dbl_2", "tower_1/conv_2": "branch3x3dbl_3"},
    "tower_2/conv": "branch_pool",
}
TO_17 = {
    **{"conv": "branch3x3", "tower/conv": "branch3x3dbl_1"},
    **{"tower/conv_1": "branch3x3dbl_2", "tower/conv_2": "branch3x3dbl_3"},
}
PLACES_17 = {
    **{"conv": "branch1x1", "tower_2/conv": "branch_pool"},
    **{"tower/conv": "branch7x7_1", "tower/conv_1": "branch7x7_2", "tower/conv_2": "branch7x7_3"},
    **{"tower_1/conv": "branch7x7dbl_1", "tower_1/conv_1": "branch7x7dbl_2", "tower_1/conv_2": "branch7x7dbl_3"},
    **{"tower_1/conv_3": "branch7x7dbl_4", "tower_1/conv_4": "branch7x7dbl_5"},
}
TO_8 = {
    **{"tower/conv": "branch3x3_1", "tower/conv_1": "branch3x3_2"},
    **{"tower_1/conv": "branch7x7x3_1", "tower_1/conv_1": "branch7x7x3_2"},
    **{"tower_1/conv_2": "branch7x7x3_3", "tower_1/conv_3": "branch7x7x3_4"},
}
PLACES_8 = {
    **{"conv": "branch1x1", "tower_2/conv": "branch_pool", "tower/conv": "branch3x3_1"},
    **{"tower/mixed/conv": "branch3x3_2a", "tower/mixed/conv_1": "branch3x3_2b"},
    **{"tower_1/conv": "branch3x3dbl_1", "tower_1/conv_1": "branch3x3dbl_2"},
    **{"tower_1/mixed/conv": "branch3x3dbl_3a", "tower_1/mixed/conv_1": "branch3x3dbl_3b"},
}
BLOCKS = [PLACES_35] * 3 + [TO_17] + [PLACES_17] * 4 + [TO_8] + [PLACES_8] * 2
TORCH_BLOCKS = [f"Mixed_{name}" for name in "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split()]
TORCH_NAMES = {f"conv_{i}" if i else "conv": name for i, name in enumerate(STEM)}
for i, (block, parts) in enumerate(zip(TORCH_BLOCKS, BLOCKS, strict=True)):
    TORCH_NAMES |= {f"{f'mixed_{i}' if i else 'mixed'}/{k}": f"{block}.{v}" for k, v in parts.items()}


def torch_state(weights) -> dict[str, th.Tensor]:
    state = {}
    for scope, name in TORCH_NAMES.items():
        part = {k: th.from_numpy(weights[f"{scope}/batchnorm/{k}"]) for k in ("gamma", "beta")}
        stats = {k: th.from_numpy(weights[f"{scope}/batchnorm/moving_{k}"]) for k in ("mean", "variance")}
        kernel = np.ascontiguousarray(weights[f"{scope}/conv2d_params"].transpose(3, 2, 0, 1))
        state[f"{name}.conv.weight"] = th.from_numpy(kernel)
        state |= {f"{name}.bn.weight": part["gamma"], f"{name}.bn.bias": part["beta"]}
        state |= {f"{name}.bn.running_mean": stats["mean"], f"{name}.bn.running_var": stats["variance"]}
        state[f"{name}.bn.num_batches_tracked"] = th.tensor(0)
    state["fc.weight"] = th.from_numpy(np.ascontiguousarray(weights["softmax/weights"].T))
    state["fc.bias"] = th.from_numpy(weights["softmax/biases"])
    return state
