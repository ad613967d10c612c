"""idx files byte by byte, crops pixel by pixel, and splits that neither lose nor share an image."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.plain_datasets import read_idx, seeded_split
from guided_diffusion_vae.data.stream import BatchStream
from guided_diffusion_vae.data.vae_data import DATASETS, VAEDataConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"


def idx(array, kind=0x08):
    """The bytes of an idx file, written from the format's description."""
    big = np.asarray(array).astype({0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}[kind])
    return bytes([0, 0, kind, big.ndim]) + struct.pack(f">{big.ndim}I", *big.shape) + big.tobytes()


def write_mnist(root, train=0, t10k=0, zipped=False):
    root.mkdir(parents=True, exist_ok=True)
    for prefix, n in (("train", train), ("t10k", t10k)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28))
        for stem, values in (("images-idx3", images), ("labels-idx1", np.arange(n) % 10)):
            if n and zipped:
                (root / f"{prefix}-{stem}-ubyte.gz").write_bytes(gzip.compress(idx(values)))
            elif n:
                (root / f"{prefix}-{stem}-ubyte").write_bytes(idx(values))
    return root


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def refused(path, match):
    with pytest.raises(UserError, match=match) as error:
        read_idx(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# ---- idx -------------------------------------------------------------------------------------------------------------


def test_bytes_written_by_hand(tmp_path):
    """Type 8 (bytes), 2 dimensions, 2 x 3, six values."""
    by_hand = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 7, 8, 9, 10, 11, 255])
    (tmp_path / "a").write_bytes(by_hand)
    (tmp_path / "a.gz").write_bytes(gzip.compress(by_hand))
    (tmp_path / "unpacked.gz").write_bytes(by_hand)  # some servers unpack and leave the name
    for name in ("a", "a.gz", "unpacked.gz"):
        found = read_idx(tmp_path / name)
        assert found.dtype == np.uint8 and found.tolist() == [[7, 8, 9], [10, 11, 255]]


@pytest.mark.parametrize(
    "kind, values, dtype",
    [
        (0x09, [-128, 0, 127], np.int8),
        (0x0B, [-30000, 1, 258], np.int16),
        (0x0C, [-(2**31), 5, 2**31 - 1], np.int32),
        (0x0D, [1.5, -0.25, 3e38], np.float32),
        (0x0E, [1e-300, 0.1, -2.0], np.float64),
    ],
)
def test_every_type_is_big_endian(tmp_path, kind, values, dtype):
    (tmp_path / "a").write_bytes(idx(values, kind))
    found = read_idx(tmp_path / "a")
    assert found.dtype == dtype and np.array_equal(found, np.array(values, dtype))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_header_that_claims_too_much_takes_no_memory(tmp_path, zipped, monkeypatch):
    """Claims of 2^64 bytes and of just below the limit, from files of a few bytes."""
    import tracemalloc

    for shape in ((2**32 - 1, 2**32 - 1), (2**30 - 1,)):
        claim = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + b"abc"
        (tmp_path / "huge").write_bytes(gzip.compress(claim) if zipped else claim)
        tracemalloc.start()
        refused(tmp_path / "huge", "claims")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("change, match", [(-1, "holds 5"), (1, "goes on after them")])
def test_a_byte_too_few_or_too_many(tmp_path, zipped, change, match):
    whole = idx([[1, 2, 3], [4, 5, 6]])
    broken = whole[:-1] if change < 0 else whole + b"x"
    (tmp_path / "a").write_bytes(gzip.compress(broken) if zipped else broken)
    refused(tmp_path / "a", match)


def test_a_download_that_stopped(tmp_path):
    whole = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, 5000)))
    (tmp_path / "a.gz").write_bytes(whole[:2000])
    refused(tmp_path / "a.gz", "fetch it again")
    (tmp_path / "b.gz").write_bytes(whole[:1500] + b"\0\1\2\3" + whole[1504:])
    refused(tmp_path / "b.gz", r"b\.gz")


@pytest.mark.parametrize(
    "start", [b"", b"\0\0", b"\x89PNG\r\n", bytes([0, 0, 7, 1]), bytes([0, 0, 8, 0]), bytes([0, 0, 8, 200])]
)
def test_other_files_are_no_idx(tmp_path, start):
    (tmp_path / "a").write_bytes(start)
    refused(tmp_path / "a", "no idx file")


def test_a_header_cut_short_and_a_missing_file(tmp_path):
    (tmp_path / "a").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 1]))
    refused(tmp_path / "a", "header")
    refused(tmp_path / "b", "No such file")


# ---- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 3, 10, 1001])
def test_a_split_loses_and_shares_nothing(n):
    split = seeded_split(n, 5, (0.7, 0.2, 0.1))
    assert sorted(np.concatenate(split)) == list(range(n))
    assert (len(split.val), len(split.test)) == (round(0.2 * n), round(0.1 * n))


def test_a_split_follows_its_seed():
    one, same, other = (seeded_split(100, seed) for seed in (1, 1, 2))
    assert all(map(np.array_equal, one, same)) and not np.array_equal(one.test, other.test)
    assert not np.array_equal(one.test, np.arange(90, 100))


@pytest.mark.parametrize("fractions", [(0, 0.5, 0.5), (1, -0.1, 0.1), (float("nan"), 1, 1), (float("inf"), 1, 1)])
def test_shares_that_are_none(fractions):
    with pytest.raises(UserError, match="split"):
        seeded_split(10, 0, fractions)


# ---- MNIST -----------------------------------------------------------------------------------------------------------


def test_mnists_own_test_set_stays_the_test_set(tmp_path):
    dataset = DATASETS["mnist"](write_mnist(tmp_path / "MNIST" / "raw", 90, 20, zipped=True).parents[1], 28, 0)
    train, val, test = dataset.split(seed=3)
    assert list(test) == list(range(90, 110)) and (len(train), len(val)) == (80, 10)
    assert set(train) | set(val) == set(range(90)) and not set(train) & set(val)
    raw = read_idx(tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz")
    assert dataset[95].dtype == np.float32 and dataset[95].shape == (1, 28, 28)
    assert np.allclose(dataset[95][0], raw[5] / 255.0 * 2 - 1, atol=1e-6)
    assert dataset.names[95] == "t10k/00005" and dataset.labels[95] == 5


def test_the_t10k_files_alone_are_split_and_that_is_said(tmp_path):
    said = []
    dataset = DATASETS["mnist"](write_mnist(tmp_path, t10k=50), 28, 0, say=said.append)
    assert [len(part) for part in dataset.split(seed=0, fractions=(0.8, 0.0, 0.2))] == [40, 0, 10]
    assert len(said) == 1 and "t10k files only" in said[0]


def test_no_mnist_is_one_line_with_the_files_and_where_they_are(tmp_path):
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz.*t10k-labels.*mirror") as error:
        DATASETS["mnist"](tmp_path, 28, 0)
    assert "\n" not in str(error.value)


def test_labels_that_belong_to_other_images(tmp_path):
    write_mnist(tmp_path, t10k=5)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(6)))
    with pytest.raises(UserError, match="not a label for each of 5"):
        DATASETS["mnist"](tmp_path, 28, 0)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="put it beside"):
        DATASETS["mnist"](tmp_path, 28, 0)


def test_a_limit_keeps_every_part(tmp_path):
    dataset = DATASETS["mnist"](write_mnist(tmp_path, 80, 20), 32, 10)
    assert len(dataset) == 10 and [len(part) for part in dataset.split(0, (1, 0, 0))] == [8, 0, 2]
    assert dataset[0].shape == (1, 32, 32) and dataset.names[1] == "train/00010"
    with pytest.raises(UserError, match="limit is -1"):
        DATASETS["mnist"](tmp_path, 28, -1)


def test_a_batch_stream_reads_it(tmp_path):
    dataset = DATASETS["mnist"](write_mnist(tmp_path, 20, 5), 28, 0)
    batch = next(BatchStream(dataset, 4, shuffle=False))
    assert batch.dtype == th.float32 and th.equal(batch[3], th.from_numpy(dataset[3]))


def test_the_real_digits():
    """Counts of the published test set: 980 zeros, 1135 ones, ... and the first is a 7."""
    root = SHARED / "mnist_t10k"
    if not root.is_dir():
        pytest.skip("no shared data")
    dataset = DATASETS["mnist"](root, 28, 0, say=lambda line: None)
    assert np.bincount(dataset.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert dataset.labels[0] == 7 and dataset[0].min() == -1 and dataset[0].max() == 1


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_celeba_is_cropped_to_the_middle_178(tmp_path):
    """At 178 pixels nothing is scaled: rows 20 to 197 of 218, all columns, exactly."""
    image = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    save(tmp_path / "img_align_celeba" / "000001.png", image)
    found = DATASETS["celeba"](tmp_path, 178, 0)[0]
    assert np.allclose(found, image[20:198].transpose(2, 0, 1) / 255.0 * 2 - 1, atol=1e-6)


def keys(distance):
    """Keys' cubic kernel with a = -1/2, the one that is called bicubic."""
    d = np.abs(distance)
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0))


def test_celeba_is_scaled_bicubically_with_antialiasing(tmp_path):
    """178 to 64 against a matrix of the kernel stretched by 178/64, in float64; Pillow rounds twice to 8 bits."""
    smooth = np.add.outer(np.arange(218), np.arange(178))[:, :, None] * [0.5, 0.3, 0.6]
    image = np.clip(smooth + np.random.default_rng(0).normal(0, 20, (218, 178, 3)), 0, 255).astype(np.uint8)
    save(tmp_path / "000001.png", image)
    scale = 178 / 64
    weights = keys((np.arange(178) + 0.5 - (np.arange(64)[:, None] + 0.5) * scale) / scale)
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("ih,hwc,jw->cij", weights, image[20:198].astype(float), weights)
    found = (DATASETS["celeba"](tmp_path, 64, 0)[0] + 1) * 127.5
    assert np.abs(found - expected).max() < 1.5


def test_a_smaller_face_gives_its_middle_square(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (112, 92), dtype=np.uint8)
    save(tmp_path / "s1" / "1.pgm", image)
    found = DATASETS["celeba"](tmp_path, 92, 0)[0]
    assert np.allclose(found, np.stack([image[10:102]] * 3) / 255.0 * 2 - 1, atol=1e-6)


def test_celebas_own_split(tmp_path):
    for number in range(6):
        save(tmp_path / "img_align_celeba" / f"{number:06d}.png", np.zeros((8, 8, 3)))
    lines = [f"{number:06d}.png {number // 2}" for number in range(6)]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    dataset = DATASETS["celeba"](tmp_path, 8, 0)
    assert [list(part) for part in dataset.split(seed=9)] == [[0, 1], [2, 3], [4, 5]]
    assert dataset.class_names == ["all"] and not dataset.labels.any()
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match=r"no line '000005\.png"):
        DATASETS["celeba"](tmp_path, 8, 0)


def test_train_val_and_test_folders_are_the_parts(tmp_path):
    for number, (part, user) in enumerate([("train", 0), ("train", 7), ("val", 7), ("test", 0)]):
        for place in range(2):
            save(tmp_path / part / f"user_{user:02d}" / f"{place}.png", np.full((8, 8, 3), 10 * number + place))
    save(tmp_path / "test" / "user_31" / "0.png", np.zeros((8, 8, 3)))  # nobody that training knows
    dataset = DATASETS["microdoppler"](tmp_path, 8, 0)
    assert [len(part) for part in dataset.split(seed=0)] == [4, 2, 3]
    assert dataset.class_names == ["user_00", "user_07", "user_31"]
    owners = [str(name).replace("\\", "/").split("/")[1] for name in dataset.names]
    assert [dataset.class_names[label] for label in dataset.labels] == owners
    assert np.allclose(dataset[5], 21 / 127.5 - 1, atol=1e-6)


def test_a_folder_without_parts_is_split_by_the_seed_and_a_class_may_be_called_train(tmp_path):
    for kind in ("bus", "train"):
        for place in range(5):
            save(tmp_path / kind / f"{place}.png", np.zeros((8, 8, 3)))
    dataset = DATASETS["image_dir"](tmp_path, 8, 0)
    assert dataset.class_names == ["bus", "train"]
    assert [len(part) for part in dataset.split(seed=0)] == [8, 1, 1]


def test_what_was_found_is_said(tmp_path):
    """Of a single user, too, for then names count; and which parts were drawn."""
    for number in range(20):
        save(tmp_path / "user_07" / f"walk{number % 2}_{number:02d}.png", np.zeros((8, 8, 3)))
    said = []
    VAEDataConfig(data_root=str(tmp_path)).rehearse(seed=0, say=said.append)
    split = "16 train, 2 val, 2 test (val and test drawn from train by --seed)"
    assert said == [f"20 images of 2 classes: walk0 (10), walk1 (10); {split}"]
    for number in range(20):
        (tmp_path / "user_07" / f"walk{number % 2}_{number:02d}.png").rename(tmp_path / "user_07" / f"a_{number}.png")
    parts = VAEDataConfig(data_root=str(tmp_path)).parts(3, seed=0, say=said.append)
    assert said[1:] == [f"20 images of 1 class: a (20); {split}"] and len(parts.train) == 16
    for part, count in {"train": 2, "test": 1}.items():
        for number in range(count):
            save(tmp_path / "own" / part / "user_00" / f"{number}.png", np.zeros((8, 8, 3)))
    VAEDataConfig(data_root=str(tmp_path / "own")).rehearse(seed=0, say=said.append)
    assert said[2].endswith("; 2 train, 0 val, 1 test (val drawn from train by --seed)")
    VAEDataConfig().rehearse(seed=0, say=said.append)
    assert len(said) == 3


def test_a_missing_folder_names_the_flag(tmp_path):
    for name in ("celeba", "image_dir", "microdoppler"):
        with pytest.raises(UserError, match="--data_root .*nowhere does not exist"):
            DATASETS[name](tmp_path / "nowhere", 64, 0)


def test_the_orl_faces_are_found():
    if not (SHARED / "orl_faces").is_dir():
        pytest.skip("no shared data")
    dataset = DATASETS["celeba"](SHARED / "orl_faces", 64, 0)
    assert len(dataset) == 400 and np.bincount(dataset.labels).tolist() == [10] * 40
    assert dataset[0].shape == (3, 64, 64) and np.array_equal(dataset[0][0], dataset[0][2])


def test_the_gait_images_bring_their_own_split():
    if not (SHARED / "mmgait_png_12users").is_dir():
        pytest.skip("no shared data")
    dataset = DATASETS["microdoppler"](SHARED / "mmgait_png_12users", 64, 0)
    assert [len(part) for part in dataset.split(seed=0)] == [778, 101, 215]
    assert len(dataset.class_names) == 12
    buffer = io.BytesIO((SHARED / "mmgait_png_12users" / dataset.names[0]).read_bytes())
    corner = np.asarray(Image.open(buffer).convert("RGB").resize((64, 64), Image.Resampling.BOX))[0, 0]
    assert np.abs((dataset[0][:, 0, 0] + 1) * 127.5 - corner).max() < 8
