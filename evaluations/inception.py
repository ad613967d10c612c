"""Inception 2015, the network of FID, sFID and the Inception Score, with its own weights and without TensorFlow.

The weights are read from the official graph (.pb), which whoever has run OpenAI's evaluator has already, or from the
usual PyTorch copy of it (.pth). Nothing is downloaded.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch as th
from tqdm import tqdm

from guided_diffusion_vae.checkpoint import digest, load_state_dict
from guided_diffusion_vae.config import UserError

from .graphdef import read_constants
from .inception_graph import POOL, SPATIAL, InceptionV3, scopes

PB_NAME, PB_BYTES = "classify_image_graph_def.pb", (95_000_000, 97_000_000)
PTH_NAMES = "pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"
PTH_BYTES = 95_628_359
PTH_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WHERE_TO_GET = (
    f"{PB_NAME} (about 95.7 MB; OpenAI's evaluator leaves it in its folder, Google's inception-2015-12-05.tgz holds it)"
    f" or {PTH_NAMES[0]} ({PTH_BYTES:,} bytes, SHA-256 {PTH_SHA256}; pytorch-fid's release fid_weights, and"
    f" torch-fidelity's release v0.2.0 under the name {PTH_NAMES[1]})"
)
NORM_NAMES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
COUNTER = "num_batches_tracked"  # in the .pth, and of no use


@th.inference_mode()
def features_of(model: InceptionV3, pixels, *, batch_size: int = 64, progress=False) -> tuple[np.ndarray, np.ndarray]:
    """Pool (N, 2048) and spatial features (N, 2023), float32; computed on the model's device.

    Args:
        pixels: (N, H, W, 3), uint8 or float in 0..255, or an iterable of such batches; a large one is cut.
    """
    batches = [pixels] if isinstance(pixels, np.ndarray) else pixels
    total = len(pixels) if isinstance(pixels, np.ndarray) else None
    pool, spatial = [np.empty((0, POOL), np.float32)], [np.empty((0, SPATIAL), np.float32)]
    with (
        # no TF32, and no algorithm chosen by trial: either changes the digits
        th.backends.cudnn.flags(enabled=th.backends.cudnn.enabled, deterministic=True, allow_tf32=False),
        tqdm(total=total, desc="Inception", unit="image", disable=None if progress else True) as bar,
    ):
        for part in _parts(batches, batch_size):
            images = th.from_numpy(np.require(part, requirements=["C", "W"])).to(model.fc.weight.device)
            found = model(images.permute(0, 3, 1, 2))
            pool.append(found.pool.cpu().numpy())
            spatial.append(found.spatial.cpu().numpy())
            bar.update(len(part))
    pool = np.concatenate(pool)  # its parts are free before the next is joined
    return pool, np.concatenate(spatial)


def _parts(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    for batch in batches:
        if batch.ndim != 4 or batch.shape[3] != 3:
            raise ValueError(f"images are {batch.shape}; Inception takes (N, height, width, 3)")
        for i in range(0, len(batch), size):
            yield batch[i : i + size]


def find_weights(given: str = "") -> Path | None:
    """The file of weights: the one given, $INCEPTION_WEIGHTS, ./classify_image_graph_def.pb, or torch's download cache.

    Returns:
        None if none was named and none is there; `WHERE_TO_GET` tells what to look for.
    Raises:
        UserError: the one named is not there.
    """
    named = {"--inception_weights": str(given), "INCEPTION_WEIGHTS": os.environ.get("INCEPTION_WEIGHTS", "")}
    for who, name in named.items():
        path = Path(name).expanduser()
        if name and not path.is_file():
            wrong = "is a folder; give the file in it:" if path.is_dir() else "does not exist; give"
            raise UserError(f"{who} {name} {wrong} {WHERE_TO_GET}")
        if name:
            return path
    cache = Path(os.environ.get("TORCH_HOME") or "~/.cache/torch").expanduser() / "hub" / "checkpoints"
    usual = Path(PB_NAME), *(cache / name for name in PTH_NAMES)
    return next((path for path in usual if path.is_file()), None)


def load_inception(path, *, check: bool = True) -> InceptionV3:
    """The network with the weights of a .pb, or of a .pth (which any other suffix is read as).

    Args:
        check: the file must be the published one: by size and SHA-256 for the .pth, by size for the .pb, of which no
            hash is on record. False takes any weights of the same names and shapes; what comes out is then no FID.
    Raises:
        UserError: the file is missing, damaged, another one or holds code; or a tensor is missing or misshapen.
    """
    path = Path(path)
    try:
        if check and path.is_file():
            _refuse_another(path)
        found = read_constants(path) if path.suffix == ".pb" else load_state_dict(path)
        with th.random.fork_rng(devices=[]):  # the numbers it is born with are not the caller's
            model = InceptionV3()
        state = model.state_dict()
        model.load_state_dict({**state, **_fitted(path, found, state)})
    except UserError as error:
        raise UserError(f"--inception_weights: {error}") from error
    # 1.6 times as fast on a CPU
    return model.to(memory_format=th.channels_last)  # pyright: ignore[reportCallIssue]  # torch declares no memory_format


def graph_names() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the .pth -> name in the .pb, and the axes of the latter in the order of the former."""
    found = {"fc.weight": ("softmax/weights", (1, 0)), "fc.bias": ("softmax/biases", (0,))}
    for name, scope in scopes():
        found[f"{name}.conv.weight"] = f"{scope}/conv2d_params", (3, 2, 0, 1)  # height, width, in, out
        for ours, theirs in NORM_NAMES.items():
            found[f"{name}.bn.{ours}"] = f"{scope}/batchnorm/{theirs}", (0,)
    return found


def _fitted(path: Path, found: dict, state: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """What was found, by the names of the network and checked."""
    wanted = {k: tuple(v.shape) for k, v in state.items() if not k.endswith(COUNTER)}
    if path.suffix == ".pb":
        names = graph_names()
        _refuse_misfit(path, found, {names[k][0]: _permuted(shape, names[k][1]) for k, shape in wanted.items()})
        tensors = {k: th.from_numpy(found[name].transpose(axes)) for k, (name, axes) in names.items()}
    else:
        _refuse_misfit(path, found, wanted)
        tensors = {k: found[k] for k in wanted}
    for name, value in tensors.items():
        if not th.isfinite(value).all() or (name.endswith("running_var") and (value < 0).any()):
            raise UserError(f"{path} is damaged: {name} has values that no weights have; fetch it again")
    return tensors


def _permuted(shape: tuple, axes: tuple) -> tuple:
    """The shape of which `axes` make `shape`."""
    return tuple(shape[axes.index(i)] for i in range(len(axes)))


def _refuse_another(path: Path) -> None:
    """Size first: it costs nothing and tells a truncated file.

    Raises:
        UserError: expected and found size or hash.
    """
    size, graph = path.stat().st_size, path.suffix == ".pb"
    low, high = PB_BYTES if graph else (PTH_BYTES, PTH_BYTES)
    if not low <= size <= high:
        wanted = "about 95,700,000" if graph else f"{PTH_BYTES:,}"
        raise UserError(f"{path} has {size:,} bytes and should have {wanted}; was it copied whole?")
    if not graph and (found := digest(path)) != PTH_SHA256:
        raise UserError(f"{path} has the SHA-256 {found} and should have {PTH_SHA256}; fetch it again")


def _refuse_misfit(path: Path, found: dict, wanted: dict[str, tuple]) -> None:
    """Raise unless all that is wanted is there, in its shape."""
    missing = [name for name in wanted if name not in found]
    if missing:
        some = ", ".join(missing[:3])
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(wanted)} tensors of Inception 2015, such as {some}:"
            f" give {PB_NAME} or {PTH_NAMES[0]}"
        )
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise UserError(
                f"{path} is another network than Inception 2015: {name} is {tuple(found[name].shape)}, not {shape};"
                f" give {PB_NAME} or {PTH_NAMES[0]}"
            )
