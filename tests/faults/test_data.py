"""Data as they come from disks, cameras and other people: named, counted and refused, or left out; never silent."""

import io
import os
import shutil
import struct
import zlib
from itertools import product

import numpy as np
import pytest
from harness import run, said, undisturbed
from helpers import draw_users
from inputs import forget_memory, memory
from PIL import Image

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.image_folder import list_images, read_rgb
from guided_diffusion_vae.image_datasets import load_data_with_vae
from guided_diffusion_vae.vae_wrapper import VAEInterface

SIZE = 16
GOOD = np.random.RandomState(0).randint(0, 255, (SIZE, SIZE, 3)).astype(np.uint8)
SMALL = "--image_size 32 --batch_size 2 --max_steps 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1 "
SMALL += "--num_heads 1 --diffusion_steps 100 --ema_rate 0.9 --num_workers 0 --cache_latents False"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows, *, colour=2, extra=b""):
    """A PNG that claims a size and holds so many rows of zeros."""
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    data = zlib.compress(bytes(rows * (1 + width * (3 if colour == 2 else 1))), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(image, kind="PNG", **how):
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


BAD = {
    "zero bytes": b"",
    "a text": b"to whom it may concern",
    "a PNG cut in half": saved(Image.fromarray(GOOD))[:400],
    "a JPEG cut in half": saved(Image.fromarray(GOOD), "JPEG")[:400],
    "a TIFF called PNG": saved(Image.fromarray(GOOD), "TIFF"),
    "a PNG without rows": png(SIZE, SIZE, 0),
    "a PNG of no width": png(0, SIZE, 0),
    "a bomb of 10000 x 10000 pixels": png(10_000, 10_000, 10_000, colour=0),
    "a bomb of 20000 x 20000 pixels": png(20_000, 20_000, 20_000, colour=0),
    "a text chunk of 100 MB": png(SIZE, SIZE, SIZE, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8), 9))),
    "a PGM that claims 7000 x 7000": b"P5 7000 7000 255\nx",
    "a PFM of NaN": b"Pf 1 1 -1.0\n" + struct.pack("<f", float("nan")),
}


@pytest.mark.fault("an image file that is {kind}", promise="named in one line, without 100 MB of memory")
@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_is_no_image(kind, tmp_path):
    path = tmp_path / "user_00.png"
    path.write_bytes(BAD[kind])
    before = forget_memory()
    with pytest.raises(UserError, match="user_00.png"):
        read_rgb(path)
    assert memory() - before < 100


ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # a quarter turn, for who heeds it
GREY16 = np.array([[0, 257], [32896, 65535]], np.uint16)
ODD = {
    "16-bit grey": (saved(Image.fromarray(GREY16)), [[0, 1], [128, 255]]),
    "1-bit": (saved(Image.fromarray(np.array([[False, True]]))), [[0, 255]]),
    "CMYK": (saved(Image.new("CMYK", (2, 1), (0, 0, 0, 255)), "JPEG"), [[0, 0]]),
    "alpha": (saved(Image.fromarray(np.array([[[7, 7, 7, 0], [9, 9, 9, 255]]], np.uint8))), [[7, 9]]),
    "a palette": (saved(Image.fromarray(np.array([[10, 200]], np.uint8)).convert("P")), [[10, 200]]),
    "rotated by EXIF": (saved(Image.new("L", (2, 1), 90), "JPEG", exif=ROTATED), [[90, 90]]),
    "animated": (saved(Image.new("L", (2, 1), 3), save_all=True, append_images=[Image.new("L", (2, 1), 8)]), [[3, 3]]),
}


@pytest.mark.fault("an image that is {kind}", promise="first frame, as stored, 16 bits scaled, colours right")
@pytest.mark.parametrize("kind", ODD)
def test_an_image_of_another_kind(kind, tmp_path):
    data, grey = ODD[kind]
    (tmp_path / "x.png").write_bytes(data)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "x.png"))[..., 0], grey)


@pytest.mark.fault("a PNG whose last rows are missing behind a valid end", promise="named")
def test_a_png_that_lacks_rows(tmp_path, record_property):
    for rows in range(SIZE):
        (tmp_path / "x.png").write_bytes(png(SIZE, SIZE, rows))
        with pytest.raises(UserError, match="x.png cannot be read"):
            read_rgb(tmp_path / "x.png")
    record_property("tried", SIZE)


@pytest.mark.fault("whole PNGs of 1 to 16 bits, of every colour type, interlaced or not", promise="read as they are")
def test_every_kind_of_png(tmp_path, record_property):
    """Pillow writes no interlaced ones: their rows are laid out here, by the specification's passes, all of zeros."""
    tried = 0
    for colour, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items():
        for depth, interlaced, (width, height) in product(depths, (0, 1), ((1, 1), (3, 5), (8, 8), (17, 9))):
            seven = [
                (width - x + a - 1) // a for x, a in zip((0, 4, 0, 2, 0, 1, 0), (8, 8, 4, 4, 2, 2, 1), strict=True)
            ]
            tall = [
                (height - y + d - 1) // d for y, d in zip((0, 0, 4, 0, 2, 0, 1), (8, 8, 8, 4, 4, 2, 2), strict=True)
            ]
            passes = zip(seven, tall, strict=True) if interlaced else [(width, height)]
            bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
            size = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in passes if columns > 0 and rows > 0)
            head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
            palette = chunk(b"PLTE", bytes(6)) if colour == 3 else b""
            for lacks in (0, 1):
                data = chunk(b"IDAT", zlib.compress(bytes(size - lacks)))
                start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette
                (tmp_path / "x.png").write_bytes(start + data + chunk(b"IEND", b""))
                if lacks:
                    with pytest.raises(UserError, match="x.png cannot be read"):
                        read_rgb(tmp_path / "x.png")
                else:
                    assert read_rgb(tmp_path / "x.png").size == (width, height)
                tried += 1
    record_property("tried", tried)


@pytest.mark.fault("a pipe called .png", promise="named; nobody waits for it")
def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UserError, match="is a pipe"):
        read_rgb(list_images(tmp_path).paths[0])


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae():
    return VAEInterface("microdoppler-f4")


def load(folder, vae, **flags):
    about = {
        "batch_size": 2,
        "image_size": 16,
        "vae": vae,
        "num_workers": 0,
        "class_cond": True,
        "say": lambda line: None,
    }
    return load_data_with_vae(data_dir=folder, **{**about, **flags})


NAMES = {
    "a newline": "a\nb",
    "emoji and Chinese": "人🚶",
    "blanks": " a b ",
    "250 bytes": "x" * 246,
    "a leading dash": "-rf",
    "quotes and a dollar": "'\"$(x)",
}


@pytest.mark.fault("files and folders whose names have {kind}", promise="they are read, cached and read again")
@pytest.mark.parametrize("kind", NAMES)
def test_a_name_of_every_kind(kind, tmp_path, vae):
    name = NAMES[kind]
    draw_users(tmp_path, [name, "other"], 2, size=16)
    (tmp_path / name / "0.png").rename(tmp_path / name / f"{name}.png")
    for cache_latents in (True, True, False):
        data = load(tmp_path, vae, cache_latents=cache_latents)
        assert set(data.class_names) == {name, "other"} and data.num_samples == 4
        next(data)


@pytest.mark.fault("a name of bytes that are no UTF-8: of a file, of a class", promise="read; one line that shows it")
def test_a_name_that_is_no_text(tmp_path):
    draw_users(tmp_path, ["user_00", "user_01"], 1)
    (tmp_path / "user_00" / "0.png").rename(tmp_path / "user_00" / "\udcff.png")
    assert read_rgb(list_images(tmp_path).paths[0]).size == (32, 32)
    (tmp_path / "user_00").rename(tmp_path / "user_\udcff")
    with pytest.raises(UserError, match=r"--data_dir .*'user_\\udcff', whose name is not UTF-8"):
        list_images(tmp_path)


@pytest.mark.slow
@pytest.mark.fault("a user whose name has {kind}, in training and sampling", promise="samples lie in the output folder")
@pytest.mark.parametrize("kind", NAMES)
def test_a_user_of_every_name(kind, tmp_path):
    data = draw_users(tmp_path / "data", [NAMES[kind], "other"], 2)
    done = run(
        "image_train_vae.py", *SMALL.split(), "--class_cond", True, "--data_dir", data, "--log_dir", tmp_path / "t"
    )
    assert done.returncode == 0, done.stderr
    model = next((tmp_path / "t").glob("ema_*.pt"))
    words = "--num_samples_per_user 1 --users all --num_steps 2 --batch_size 2".split()
    with undisturbed(data, tmp_path / "t"):
        done = run("image_sample_vae.py", *words, "--model_path", model, "--log_dir", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "s" / "png").glob("*/*.png"))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"data", "t", "s"}


@pytest.mark.fault("links: a loop of folders, a link to itself, one to nowhere", promise="loops left out, files named")
def test_links(tmp_path, vae):
    draw_users(tmp_path, ["user_00", "user_01"], 2, size=16)
    (tmp_path / "user_00" / "again").symlink_to(tmp_path)
    assert len(list_images(tmp_path).paths) == 4
    for target in ("itself.png", "nowhere"):
        (tmp_path / "user_00" / "itself.png").symlink_to(target)
        with pytest.raises(UserError, match="itself.png"):
            load(tmp_path, vae)
        assert load(tmp_path, vae, skip_bad_images=True).num_samples == 4
        (tmp_path / "user_00" / "itself.png").unlink()


PLACES = {
    "that is missing": lambda path: None,
    "that is empty": lambda path: path.mkdir(),
    "that is a file": lambda path: path.write_text("x"),
    "of empty folders": lambda path: (path / "user_00").mkdir(parents=True),
    "of texts": lambda path: (path.mkdir(), (path / "notes.txt").write_text("x")),
    "of train and test": lambda path: draw_users(path, ["train", "test"], 1),
    "of one class": lambda path: (draw_users(path, ["."], 1), os.rename(path / "0.png", path / "a_0.png")),
}


@pytest.mark.fault("a data folder {kind}", promise="code 2, one line that names the flag")
@pytest.mark.parametrize("kind", PLACES)
def test_a_folder_without_data(kind, tmp_path, vae):
    PLACES[kind](tmp_path / "data")
    with pytest.raises(UserError, match="--data_dir"):
        load(tmp_path / "data", vae)


@pytest.mark.slow
@pytest.mark.fault("images fewer than a batch, than two processes", promise="the stream goes round and round, and ends")
def test_three_images(tmp_path, record_property):
    data = draw_users(tmp_path / "data", ["user_00"], 3)
    for ranks in (1, 2):
        words = [*SMALL.replace("size 2", "size 8").split(), "--data_dir", data, "--log_dir", tmp_path / f"t{ranks}"]
        done = run("image_train_vae.py", *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
    record_property("tried", 2)


@pytest.mark.fault("an image that is deleted after the list was made", promise="code 2, one line that names it")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes(workers, tmp_path):
    draw_users(tmp_path, ["user_00", "user_01"], 2, size=16)
    data = load(tmp_path, VAEInterface("pixel"), num_workers=workers)
    (tmp_path / "user_01" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png does not exist"):
        for _ in range(3):
            next(data)


@pytest.mark.slow
@pytest.mark.fault(
    "classes that change between a run and its continuation", promise="code 2, both names; nothing changed"
)
def test_labels_that_change(tmp_path):
    data = draw_users(tmp_path / "data", ["user_00", "user_01"], 2)
    words = [*SMALL.split(), "--class_cond", True, "--data_dir", data, "--log_dir", tmp_path / "t"]
    assert run("image_train_vae.py", *words).returncode == 0
    draw_users(data, ["user_005"], 2)
    (tmp_path / "t" / "log.txt").rename(tmp_path / "before.txt")
    with undisturbed(tmp_path / "t", tmp_path / "data"):
        done = run("image_train_vae.py", *words, "--resume_checkpoint", "auto", "--max_steps", 9)
        (tmp_path / "t" / "log.txt").unlink()
    said(done, 2, "user_005", "user_01", "--data_dir")


@pytest.mark.slow
@pytest.mark.fault("a bad image among good ones, one and two processes", promise="refused by name; left out if told so")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bad_image_among_good_ones(ranks, tmp_path):
    data = draw_users(tmp_path / "data", ["user_00", "user_01"], 3)
    (data / "user_01" / "2.png").write_bytes(BAD["a bomb of 10000 x 10000 pixels"])
    words = [*SMALL.replace("--cache_latents False", "").split(), "--data_dir", data, "--log_dir", tmp_path / "t"]
    done = run("image_train_vae.py", *words, ranks=ranks)
    said(done, 2, "2.png", "--skip_bad_images True")
    assert "Warning" not in done.stderr
    done = run("image_train_vae.py", *words, "--skip_bad_images", True, ranks=ranks)
    assert done.returncode == 0 and "left out 1 of 6 images" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.fault("100,000 files", promise="listed in 30 s, within 300 MB")
def test_a_hundred_thousand_files(tmp_path):
    data, count = saved(Image.fromarray(GOOD[:4, :4])), 100_000
    for user in range(10):
        (tmp_path / f"user_{user:02d}").mkdir()
        for i in range(count // 10):
            (tmp_path / f"user_{user:02d}" / f"{i}.png").write_bytes(data)
    before, begin = forget_memory(), os.times().elapsed
    found = list_images(tmp_path)
    assert len(found.paths) == count and os.times().elapsed - begin < 30 and memory() - before < 300
    shutil.rmtree(tmp_path)
