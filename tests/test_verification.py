"""ROC numbers with known truth, and planted generators that pass for their users, or do not."""

import numpy as np
import pytest
from scipy.stats import norm

from evaluations import roc as roc_module
from evaluations import verification
from evaluations.image_sets import ImageSet
from evaluations.roc import Pairs, d_prime, eer, pairs, roc, roc_auc, tar_at_far
from evaluations.verification import verify
from guided_diffusion_vae.config import UserError

EVEN = norm.ppf((np.arange(20_000) + 0.5) / 20_000)  # a normal distribution without luck


# ---- numbers from scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [0, 0.5, 2])
def test_two_gaussians(d):
    genuine, impostor = EVEN + d, EVEN
    assert roc_auc(genuine, impostor) == pytest.approx(norm.cdf(d / np.sqrt(2)), abs=1e-4)
    rate, threshold = eer(genuine, impostor)
    assert rate == pytest.approx(norm.cdf(-d / 2), abs=1e-4) and threshold == pytest.approx(d / 2, abs=1e-3)
    assert tar_at_far(genuine, impostor, 0.01) == (pytest.approx(norm.cdf(d - norm.ppf(0.99)), abs=1e-3), "")
    assert d_prime(genuine, impostor) == pytest.approx(d, abs=1e-3)


def test_perfect_and_reversed_scores():
    low, high = np.linspace(0, 1, 400), np.linspace(2, 3, 300)
    assert (roc_auc(high, low), eer(high, low).rate, tar_at_far(high, low).value) == (1, 0, 1)
    assert 1 < eer(high, low).threshold <= 2
    assert (roc_auc(low, high), eer(low, high).rate, tar_at_far(low, high).value) == (0, 1, 0)


def test_ties_count_half():
    assert roc_auc([1, 2], [1, 0]) == 3.5 / 4
    equal = np.ones(500)
    assert (roc_auc(equal, equal), eer(equal, equal), tar_at_far(equal, equal).value) == (0.5, (0.5, 1), 0)
    genuine, impostor = np.random.RandomState(0).randint(0, 6, (2, 50))
    wins = (genuine[:, None] > impostor).mean() + (genuine[:, None] == impostor).mean() / 2
    assert roc_auc(genuine, impostor) == pytest.approx(wins, abs=1e-12)


def test_the_equal_error_rate_lies_between_two_points():
    """(FAR, TAR) goes (0, 2/3) -> (1/2, 2/3): FAR = 1 - TAR at 1/3."""
    rate, threshold = eer([4, 3, 1], [2, 0])
    assert rate == pytest.approx(1 / 3) and threshold == 2


def test_a_threshold_takes_its_own_score():
    curve = roc([3, 2, 2, 1], [2, 0])
    for threshold, wanted in ((4, (0, 0)), (3, (0, 0.25)), (2.5, (0, 0.25)), (2, (0.5, 0.75)), (-1, (1, 1))):
        assert curve.at(threshold) == wanted


def test_weights_are_repetitions():
    rng = np.random.RandomState(0)
    genuine, impostor = rng.randint(3, 9, 30), rng.randint(0, 6, 40)
    twice = rng.randint(0, 3, 30), rng.randint(0, 3, 40)
    weighted = roc(genuine, impostor, *twice)
    plain = roc(np.repeat(genuine, twice[0]), np.repeat(impostor, twice[1]))
    assert weighted.auc == pytest.approx(plain.auc) and weighted.eer.rate == pytest.approx(plain.eer.rate)
    assert weighted.tar_at(0.1) == plain.tar_at(0.1)


def test_the_rule_of_30():
    genuine = np.ones(10)
    assert tar_at_far(genuine, np.zeros(3000), 0.01) == (1, "")
    value, note = tar_at_far(genuine, np.zeros(300), 0.01)
    assert value == 1 and "300 impostor pairs; the rule of 30 asks for 3000" in note
    assert tar_at_far(genuine, np.zeros(299), 0.01).value is None


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="0 genuine and 2 impostor"):
        roc([], [1, 2])
    with pytest.raises(ValueError, match="finite"):
        roc([np.nan], [1, 2])


@pytest.mark.parametrize("same_set", [False, True])
def test_all_pairs_in_blocks(same_set, monkeypatch):
    monkeypatch.setattr(roc_module, "BLOCK", 3)
    rng = np.random.RandomState(0)
    a, u = rng.randn(10, 4), rng.randint(0, 3, 10)
    b, v = (a, u) if same_set else (rng.randn(7, 4), rng.randint(0, 3, 7))
    found = pairs(a, u, b, v, same_set)
    every = [(i, j) for i in range(10) for j in range(len(b)) if i < j or not same_set]
    wanted = [sorted(a[i] @ b[j] for i, j in every if (u[i] == v[j]) == same) for same in (True, False)]
    assert np.allclose(np.sort(found.genuine), wanted[0], atol=1e-5)
    assert np.allclose(np.sort(found.impostor), wanted[1], atol=1e-5)
    assert sorted(map(tuple, found.impostor_users)) == sorted((u[i], v[j]) for i, j in every if u[i] != v[j])


def test_the_interval_covers_when_users_differ():
    """Users' scores have a mean of their own, N(0, 1): half of all pairs are above 0. Pairs drawn without regard
    to users would give intervals nearly four times too narrow."""
    rng = np.random.RandomState(0)
    covered = []
    for trial in range(60):
        users = np.repeat(np.arange(25), 20)
        scores = rng.randn(25)[users] + 0.3 * rng.randn(500)
        others = np.stack([users, (users + 1) % 25], axis=1)
        low, high = verification._intervals(Pairs(scores, scores, users, others), 0.0, trial, 60)["accepted"]
        covered.append(low <= 0.5 <= high)
    assert 0.85 <= np.mean(covered) <= 1


# ---- the section -----------------------------------------------------------------------------------------------------

USERS = 16
NAMES = [f"user_{i:02}" for i in range(USERS)]


class Pattern:
    """An embedding that knows the world below: pixels about their mean, as a direction."""

    def embed(self, pixels):
        x = pixels.reshape(len(pixels), -1) - np.float32(127)
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    def fingerprint(self):
        return "pattern"


@pytest.fixture
def learned(monkeypatch):
    """What the embedding was given to learn from; it learns nothing."""
    given = []

    def train(pixels, users, num_users, **options):
        given.append((pixels, users, num_users))
        return Pattern()

    monkeypatch.setattr(verification, "train_embedding", train)
    return given


def images(seed, each=12, shown=None):
    """Each user has a pattern, and each image much noise over it; the user shown may be another than the one said."""
    said = np.repeat(np.arange(USERS), each)
    patterns = np.random.RandomState(99).normal(0, 12, (USERS, 12, 12, 3))
    noise = np.random.RandomState(seed).normal(127, 30, (len(said), 12, 12, 3))
    pixels = patterns[said if shown is None else shown(said)] + noise
    return ImageSet(np.clip(pixels, 0, 255).astype(np.uint8), said, NAMES)


def numbers(section, group):
    return {f.name.removesuffix(f", {group}"): f for f in section.findings if f.name.endswith(group)}


def test_a_generator_that_returns_real_images_scores_as_real(learned):
    section = verify(images(0), images(1), images(2), rounds=40)
    assert len(section.findings) == 10
    for group in ("closed set", "open set"):
        found = numbers(section, group)
        assert 0.8 < found["AUC"].real < 1 and abs(found["AUC"].value - found["AUC"].real) < 0.03
        assert found["AUC"].interval[0] < found["AUC"].real < found["AUC"].interval[1]
        assert {f.verdict for name, f in found.items() if name != "falsely accepted"} == {"as real images"}
        assert abs(found["accepted"].value - found["accepted"].real) < 0.1


def test_a_generator_that_swaps_users_scores_as_chance(learned):
    section = verify(images(0), images(1), images(2, shown=lambda users: (users + 1) % USERS), rounds=40)
    found = numbers(section, "closed set")
    assert 0.4 < found["AUC"].value < 0.53 and 0.47 < found["EER"].value < 0.6
    assert found["TAR at FAR 1%"].value < 0.02
    assert abs(found["accepted"].value - found["accepted"].worst) < 0.05
    assert {f.verdict for name, f in found.items() if name != "falsely accepted"} == {"no better than the worst"}


def test_swapped_users_are_the_ones_in_the_table(learned):
    """Only users 3 and 4 are swapped."""
    swap = np.arange(USERS)
    swap[[3, 4]] = 4, 3
    section = verify(images(0), images(1), images(2, shown=lambda users: swap[users]), open_set_users=0, rounds=0)
    rows = {row[0]: row for row in section.tables[0].rows}
    assert len(rows) == USERS and all(float(row[2]) > 0.8 for row in rows.values())
    assert {name for name, row in rows.items() if float(row[3]) < 0.7} == {"user_03", "user_04"}


def test_what_the_embedding_may_see(learned):
    """Real training images, none that are compared, none of the open set's users; the same for the same seed."""
    train = images(0)
    section = verify(train, images(1), images(2), seed=4, rounds=0)
    again = verify(train, images(1), images(2), seed=4, rounds=0)
    assert section.data == again.data and [f.value for f in section.findings] == [f.value for f in again.findings]
    pixels, users, num_users = learned[0]
    assert num_users == 11 and sorted(set(users)) == list(range(11)) and len(pixels) == 11 * 9
    strangers = [NAMES.index(name) for name in section.data["open_set_users"]]
    known = [u for u in range(USERS) if u not in strangers]
    seen = {image.tobytes() for image in pixels}
    of = {image.tobytes(): user for image, user in zip(train.pixels, train.labels, strict=True)}
    assert len(strangers) == 5 and seen <= set(of)
    assert [of[image.tobytes()] for image in pixels] == [known[u] for u in users]
    counts = section.data["groups"]
    assert counts["closed set"]["real"]["genuine"] == 11 * 3 * 12  # what was set aside, against held-out images
    assert counts["open set"]["generated"] | {"far": 0, "tar": 0, "d_prime": 0} == {
        **{"genuine": 5 * 12 * 12, "impostor": 5 * 4 * 12 * 12, "far": 0, "tar": 0, "d_prime": 0}
    }


def test_what_is_said(learned):
    train, held, samples = images(0), images(1, each=3), images(2, each=2)
    lacking = samples.take(samples.labels > 0)
    notes = " | ".join(verify(train, held, lacking, rounds=0).notes)
    for wanted in ("1 of 16 users lack", "open set: TAR at FAR 1.0% rests on", "users only, so", "was fixed where"):
        assert wanted in notes
    assert "unlabelled" in verify(train, held, samples._replace(labels=None)).notes[0]
    assert not verify(train, held, samples._replace(labels=None)).findings and len(learned) == 1
    few = [s.take(s.labels < 6)._replace(class_names=NAMES[:6]) for s in (train, held, samples)]
    section = verify(*few, rounds=0)
    assert len(section.findings) == 5 and any("no open set" in note for note in section.notes)


@pytest.mark.parametrize("count", [1, 15])
def test_an_open_set_of_one_or_of_nearly_all_is_refused(count, learned):
    with pytest.raises(UserError, match=f"--open_set_users is {count} of 16 users"):
        verify(images(0), images(1), images(2), open_set_users=count)


def test_many_images_are_thinned_evenly(learned, monkeypatch):
    monkeypatch.setattr(verification, "MOST", USERS * 3)
    section = verify(images(0), images(1), images(2), open_set_users=0, rounds=0)
    assert section.data["groups"]["closed set"]["generated"]["genuine"] == USERS * 3 * 3


def test_thinning_leaves_every_user_a_pair(learned, monkeypatch):
    monkeypatch.setattr(verification, "MOST", 1)
    section = verify(images(0), images(1), images(2), open_set_users=0, rounds=0)
    assert "16 genuine and 480 impostor pairs" in section.notes[0]  # 32 images


def test_users_nobody_held_out(learned):
    """Without held-out images of the open set's users there is nothing to measure, and it is said."""
    train, held = images(0), images(1)
    strangers = [NAMES.index(name) for name in verify(train, held, images(2), rounds=0).data["open_set_users"]]
    lacking = held.take(~np.isin(held.labels, strangers))
    section = verify(train, lacking, images(2), rounds=5)
    assert {f.value for f in numbers(section, "open set").values()} == {None}
    assert "open set: no pairs of real images to compare" in section.notes
    assert numbers(section, "closed set")["AUC"].verdict == "as real images"


def test_an_embedding_that_knows_nobody_is_no_judge(learned):
    blind = images(1, shown=lambda users: np.random.RandomState(5).permutation(users))
    section = verify(images(0), blind, images(2), rounds=0)
    assert any("closed set: real users are hardly told apart" in note for note in section.notes)
