"""Distances whose value is known, and a classifier that learns what there is to learn."""

import numpy as np
import pytest
from helpers import golden, script
from PIL import Image
from scipy.linalg import sqrtm

from evaluations import manifold, statistics
from evaluations.user_classifier import train_user_classifier


def test_gaussians_with_a_known_distance():
    """Commuting covariances: |dmu|^2 + sum (s1 - s2)^2."""
    a, b = np.diag([1.0, 4.0]), np.diag([9.0, 16.0])
    assert statistics.gaussian_frechet_distance(np.zeros(2), a, np.array([3.0, 4.0]), b) == pytest.approx(25 + 4 + 4)


def test_covariances_that_do_not_commute():
    rng = np.random.RandomState(0)
    a, b = (m @ m.T for m in rng.randn(2, 5, 5))
    wanted = np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert statistics.gaussian_frechet_distance(np.zeros(5), a, np.zeros(5), b) == pytest.approx(wanted, rel=1e-9)


def test_a_set_against_itself_is_zero_even_if_its_covariance_is_singular():
    features = np.random.RandomState(0).randn(20, 50)
    with pytest.warns(UserWarning, match="50 features is biased, n=20"):
        assert abs(statistics.frechet_distance(features, features)) < 1e-5


def test_the_official_evaluators_numbers():
    data, wanted = golden("evaluator_features.npz"), golden("evaluator_features.json")
    ref, fake = data["ref_pool"], data["sample_pool"]
    assert statistics.frechet_distance(ref, fake) == pytest.approx(wanted["FID"], rel=1e-6)
    found = manifold.fidelity(ref, fake)
    assert (found.precision, found.recall) == (
        pytest.approx(wanted["Precision"], abs=1e-3),
        pytest.approx(wanted["Recall"], abs=1e-3),
    )


def test_the_kernel_distance_is_unbiased():
    rng = np.random.RandomState(0)
    same = [statistics.kernel_distance(rng.randn(60, 8), rng.randn(60, 8)) for _ in range(40)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(40)
    assert statistics.kernel_distance(rng.randn(60, 8), rng.randn(60, 8) + 1) > 5 * np.std(same)


def test_manifolds_that_coincide_and_that_are_apart():
    points = np.random.RandomState(0).randn(50, 4)
    same = manifold.fidelity(points, points)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert manifold.fidelity(points, points + 100) == (0, 0, 0, 0)


def stripes(rng, n):
    """Three users who differ in the height of a bright line."""
    labels = np.arange(n) % 3
    pixels = rng.randint(0, 60, (n, 32, 32, 3)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[8 + 6 * label] = 255
    return pixels, labels


def test_the_classifier_learns_and_is_the_same_for_the_same_seed():
    rng = np.random.RandomState(0)
    (train_x, train_y), (test_x, test_y) = stripes(rng, 60), stripes(rng, 30)
    a, b = (train_user_classifier(train_x, train_y, 3, seed=1) for _ in range(2))
    assert (a.judge(test_x).users == test_y).mean() > 0.9
    assert np.array_equal(a.judge(test_x).features, b.judge(test_x).features)


def test_the_script_reports_floor_and_ceiling(tmp_path):
    import json

    rng = np.random.RandomState(0)
    for split, n in (("train", 60), ("test", 30)):
        for i, (pixels, label) in enumerate(zip(*stripes(rng, n), strict=True)):
            path = tmp_path / split / f"user_{label:02d}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    np.savez(tmp_path / "samples.npz", *stripes(rng, 24))
    flags = ["--real_dir", tmp_path / "train", "--heldout_dir", tmp_path / "test", "--out_dir", tmp_path / "report"]
    done = script("evaluate_samples.py", *flags, "--samples", tmp_path / "samples.npz")
    numbers = json.loads((tmp_path / "report" / "report.json").read_text())
    rows = numbers["rows"]
    assert rows["generated"]["fd_user"] < rows["real, pixels shuffled"]["fd_user"]
    assert rows["generated"]["user_accuracy"] > 0.8
    assert "feature space: " in done.stdout and "FID" not in done.stdout
    assert Image.open(tmp_path / "report" / "comparison.png").width > 6 * 32
    done = script("evaluate_samples.py", *flags, "--samples", tmp_path / "nothing.npz", check=False)
    assert done.returncode == 2 and "--samples" in done.stderr
