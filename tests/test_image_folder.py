"""Images of every kind become the right RGB values, and bad ones are named."""

import numpy as np
import pytest
from PIL import Image

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.image_folder import list_images, read_rgb
from guided_diffusion_vae.image_datasets import center_crop_arr


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **options)
    return path


def test_a_folder_for_each_user(tmp_path):
    for user in (0, 7, 30):
        save(tmp_path / f"user_{user:02d}" / "b_1.png", np.zeros((4, 4, 3), np.uint8))
    folder = list_images(tmp_path)
    assert folder.class_names == ["user_00", "user_07", "user_30"]
    assert folder.labels == [0, 1, 2]


def test_upstreams_name_prefix(tmp_path):
    for name in ("dog_1.png", "cat_2.jpg", "cat_1.JPEG", "sub/dog_3.png", "notes.txt"):
        save(tmp_path / name, np.zeros((4, 4, 3), np.uint8), format="PNG")
    folder = list_images(tmp_path)
    assert folder.class_names == ["cat", "dog"]
    assert [p.rsplit("/", 1)[1] for p in folder.paths] == ["cat_1.JPEG", "cat_2.jpg", "dog_1.png", "dog_3.png"]
    assert folder.labels == [0, 0, 1, 1]


def test_hidden_folders_and_link_loops_are_left_out(tmp_path):
    save(tmp_path / "a" / "x.png", np.zeros((4, 4), np.uint8))
    save(tmp_path / ".latents" / "y.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert len(list_images(tmp_path).paths) == 1


@pytest.mark.parametrize("what", ["", "missing", "file.png", "empty"])
def test_no_images_is_one_line_that_names_the_flag(tmp_path, what):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(UserError, match="--data_dir") as error:
        list_images(tmp_path / what if what else "")
    assert "\n" not in str(error.value)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    """Pillow's own convert turns 0, 200, 256, 65535 into 0, 200, 255, 255."""
    path = save(tmp_path / "deep.png", np.array([[0, 257, 256 * 128, 65535]], np.uint16))
    assert np.asarray(read_rgb(path))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_indexed_grey_and_alpha(tmp_path):
    colours = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    Image.fromarray(colours).quantize(16).save(tmp_path / "p.png")
    assert read_rgb(tmp_path / "p.png").mode == "RGB"
    assert np.abs(np.asarray(read_rgb(tmp_path / "p.png")).astype(int) - colours).max() <= 8
    save(tmp_path / "g.png", np.full((2, 2), 77, np.uint8))
    assert np.asarray(read_rgb(tmp_path / "g.png")).tolist() == [[[77] * 3] * 2] * 2
    rgba = np.dstack([colours, np.zeros((4, 4), np.uint8)])
    save(tmp_path / "a.png", rgba)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png")), colours)


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_an_unreadable_image_is_named(tmp_path, kind):
    path = save(tmp_path / "bad.png", np.random.RandomState(0).randint(0, 255, (64, 64, 3)).astype(np.uint8))
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[kind])
    with pytest.raises(UserError, match=r"bad\.png cannot be read"):
        read_rgb(path)


def test_an_image_bomb_is_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (9000, 9000)).save(path)
    with pytest.raises(UserError, match="81000000|9000 x 9000"):
        read_rgb(path)


def test_centre_crop_of_a_constant_gradient():
    """Halving by box filter is exact on even sizes: a 4 x 4 block average twice."""
    image = np.kron(np.arange(16, dtype=np.uint8).reshape(4, 4) * 10, np.ones((4, 4), np.uint8))
    cropped = center_crop_arr(Image.fromarray(np.dstack([image] * 3)), 4)
    assert np.array_equal(cropped[:, :, 0], np.arange(16).reshape(4, 4) * 10)
