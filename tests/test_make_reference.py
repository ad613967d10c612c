"""A reference holds what the official evaluator reads: names, types, and the numbers of all images."""

import numpy as np
import pytest
from helpers import ROOT, draw_users

from evaluations import evaluator, make_reference
from evaluations.batches import open_batch
from evaluations.features import FeatureSpace
from guided_diffusion_vae.config import UserError, create_argparser, parse_run


def brightness(batch):
    """Features with moments that are known from the pixels: colours' means, and two corners."""
    images = np.concatenate(list(batch.iterate(5))).astype(np.float32)
    return {"pool": images.mean(axis=(1, 2)), "spatial": images[:, 0, :2, 0]}


SPACE = FeatureSpace("inception", "", brightness, class_weight=np.zeros((3, 4), np.float32))


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The command with a space put in (or none), on a folder of two users with seven images each."""
    folder = draw_users(tmp_path / "real", ["user_00", "user_01"], 7, size=8)

    def main(*flags, space=SPACE, data=folder):
        monkeypatch.setattr(make_reference, "_inception", lambda run: space)
        make_reference.main(["--data_dir", str(data), "--out", str(tmp_path / "new" / "ref.npz"), *flags])
        return dict(np.load(tmp_path / "new" / "ref.npz", allow_pickle=False))

    return main


def test_statistics_are_of_all_images_and_images_are_some(main, tmp_path):
    found, batch = main("--num_images", "5"), open_batch(tmp_path / "real", "REF")
    assert list(found) == ["mu", "sigma", "mu_s", "sigma_s", "arr_0", "arr_1"]
    types = {name: str(value.dtype) for name, value in found.items()}
    assert types == {
        **{"mu": "float32", "sigma": "float64", "mu_s": "float32", "sigma_s": "float64"},
        **{"arr_0": "uint8", "arr_1": "int64"},
    }
    features = brightness(batch)
    for end, name in (("", "pool"), ("_s", "spatial")):
        x = features[name].astype(np.float64)
        assert np.allclose(found[f"mu{end}"], x.mean(axis=0), rtol=1e-5)
        assert np.allclose(found[f"sigma{end}"], np.cov(x, rowvar=False), rtol=1e-5)
    everything = [image.tobytes() for image in batch.take(np.arange(14))]
    places = [everything.index(image.tobytes()) for image in found["arr_0"]]
    assert len(set(places)) == 5
    assert found["arr_1"].tolist() == [int(place >= 7) for place in places]


def test_the_draw_follows_the_seed(main):
    first, again, other = (main("--num_images", "5", "--seed", seed)["arr_0"] for seed in "001")
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("number", ["0", "14", "10000"])
def test_all_images_are_kept_in_their_order(main, tmp_path, number):
    found = main("--num_images", number)
    assert np.array_equal(found["arr_0"], open_batch(tmp_path / "real", "REF").take(np.arange(14)))


def test_without_weights_there_are_images_alone(main):
    assert list(main(space=None)) == ["arr_0", "arr_1"]


def test_unchecked_weights_are_warned_of_once(main, tmp_path, monkeypatch, capsys):
    made, real = [], make_reference._inception
    monkeypatch.setattr(make_reference, "find_weights", lambda given: "some.pth")
    monkeypatch.setattr(make_reference, "inception_space", lambda path, **options: made.append(options["check"]))
    for flag in ("False", "True"):
        real(parse_run(create_argparser(make_reference.ReferenceConfig), ["--check_weights", flag]))
    assert made == [False, True]
    assert capsys.readouterr().err.splitlines() == [f"warning: {make_reference.UNCHECKED}"]


def test_it_says_what_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = draw_users(tmp_path / "real", ["user_00", "user_01"], 2, size=8)
    monkeypatch.chdir(tmp_path)
    make_reference.main(["--data_dir", str(folder), "--out", "ref.npz"])
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert "--inception_weights or INCEPTION_WEIGHTS" in line and "images but no statistics" in line and len(line) < 200
    assert said.out == "written: ref.npz with arr_0, arr_1; 4 of 4 images of 8 x 8\n"


def test_the_evaluator_uses_the_reference_in_place_of_its_images(main, tmp_path, monkeypatch, capsys):
    """Judged against a reference with eight of the images, the whole set is at distance 0."""
    main("--num_images", "8")
    capsys.readouterr()
    monkeypatch.setattr(evaluator, "choose_space", lambda *_: SPACE)
    evaluator.main([str(tmp_path / "new" / "ref.npz"), str(tmp_path / "real"), "--extras", "False"])
    numbers = dict(line.split(": ") for line in capsys.readouterr().out.splitlines()[6:])
    assert abs(float(numbers["FID"])) < 1e-4 and abs(float(numbers["sFID"])) < 1e-3
    assert float(numbers["Precision"]) == 1


def test_images_are_brought_to_the_size_that_is_asked_for(main):
    assert main("--image_size", "4")["arr_0"].shape == (14, 4, 4, 3)


def test_train_and_test_together_are_refused(main, tmp_path):
    for part in ("train", "test"):
        draw_users(tmp_path / "data" / part, ["user_00", "user_01"], 2, size=8)
    with pytest.raises(UserError, match="^--data_dir .*data holds train, test, .*: give one, such as .*data/train$"):
        main(data=tmp_path / "data")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out", "ref.txt"], "--out is 'ref.txt'; give the name of an .npz"),
        (["--data_dir", ""], "--data_dir is empty"),
        (["--num_images", "-1"], "--num_images is -1"),
        (["--out", "same.npz", "--data_dir", "./same.npz"], "--out same.npz is --data_dir, which would be overwritten"),
        (["--out", f"{ROOT}/pyproject.toml/a.npz"], "--out .*pyproject.toml is a file"),
        (["--data_dir", "a.npz", "--image_size", "8"], "--image_size 8 is for folders"),
        (["--data_dir", "nowhere"], "^--data_dir nowhere does not exist"),
    ],
)
def test_wrong_flags_are_named(main, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        main(*flags)
    assert not (tmp_path / "new").exists()
