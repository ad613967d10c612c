"""A run that ends itself: on scripted losses at the stated validation, after any loss of the process, and once only."""

import math

import pytest
import torch as th
from test_train_features import HeldOut, Net, Stream, folder, log_of, loop  # noqa: F401

# ruff: noqa: F811  (`folder` is a fixture)
from guided_diffusion_vae import checkpoint, logger, validation
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.flow_matching import FlowMatching
from guided_diffusion_vae.train_util import TrainConfig

HELDOUT = HeldOut()
SETTINGS = {"heldout": HELDOUT, "save_interval": 4, "val_interval": 2, "max_steps": 30}


class Seen(Stream):
    """Batches of training rows, and a choice of these."""

    asked = None

    def rows(self, count, *, seed):
        Seen.asked, rows = (count, seed), HeldOut(count)
        rows.z = rows.z + 1
        return rows


@pytest.fixture
def scripted(monkeypatch):
    """Losses of the held-out rows and of the training rows, from lists."""

    def say(*losses, seen=()):
        left, left_seen = list(losses), list(seen)

        def terms(model, diffusion, rows, **asked):
            assert asked == {"batch_size": 4, "seed": 3}
            return {"loss": (left if rows is HELDOUT else left_seen).pop(0)}

        monkeypatch.setattr(validation, "validation_terms", terms)
        return left, left_seen

    return say


def same(a, b):
    a, b = checkpoint.load(a), checkpoint.load(b)
    return a.keys() == b.keys() and all(th.equal(a[key], b[key]) for key in a)


# ---- patience --------------------------------------------------------------------------------------------------------


def test_the_run_ends_after_so_many_validations_without_a_lower_loss(folder, scripted):
    """5, 4, (4, nan), 3, (3.5, 3, 7): validations after steps 0, 2, 4, ...; the eighth is after step 14."""
    left, _ = scripted(5.0, 4.0, 4.0, math.nan, 3.0, 3.5, 3.0, 7.0, 1.0)
    trained = loop(**SETTINGS, patience=3)
    trained.run_loop()  # and raises nothing: exit code 0
    assert left == [1.0] and trained.step == 15
    assert (folder / "model000015.pt").exists() and same(folder / "ema_0.9_best.pt", folder / "ema_0.9_000008.pt")
    log = log_of(folder)
    assert log.count("the run ends: 3 validations in a row without a lower loss (--patience 3)") == 1
    assert "lowest validation loss 3 at step 8" in log
    state = checkpoint.load(folder / "state000015.pt")
    assert (state["best"], state["no_lower"]) == ((3.0, 8), 3)


def test_no_patience_is_never(folder, scripted):
    left, _ = scripted(*range(1, 17))
    loop(**SETTINGS).run_loop()
    assert not left and "the run ends" not in log_of(folder)


def test_the_same_command_again_has_nothing_to_do_and_more_patience_goes_on(folder, scripted):
    left, _ = scripted(1.0, 2.0, 2.0, 2.0, 2.0)
    loop(**SETTINGS, patience=2).run_loop()
    again = loop(**SETTINGS, patience=2, resume_checkpoint="auto")
    again.run_loop()
    assert len(left) == 2 and again.step == 0 and again.resume_step == 5
    assert log_of(folder).count("nothing to do: 2 validations in a row without a lower loss (--patience 2)") == 1
    on = loop(**SETTINGS, patience=4, resume_checkpoint="auto")
    on.run_loop()
    assert not left and on.resume_step + on.step == 9


@pytest.mark.parametrize("fails_at", [6, 7, 10, 14])
def test_killed_and_resumed_ends_where_it_would_have(folder, fails_at):
    """Real losses at a rate of learning that makes them rise again."""
    settings = {**SETTINGS, "lr": 0.3, "patience": 3, "max_memorisation": 0.999}
    (folder / "straight").mkdir()
    with logger.scoped_configure(str(folder / "straight"), format_strs=["log"]):
        straight = loop(data=Seen(), **settings)
        straight.run_loop()
    end = straight.step
    assert fails_at < end < 30 and straight.validation.ends
    with pytest.raises(KeyboardInterrupt):
        loop(data=Seen(fails_at=fails_at), **settings).run_loop()
    resumed = loop(data=Seen(), **settings, resume_checkpoint="auto")
    assert 0 < resumed.resume_step < end
    resumed.run_loop()
    assert resumed.resume_step + resumed.step == end
    assert resumed.validation.state_dict() == straight.validation.state_dict()
    number = max(int(path.stem[5:]) for path in folder.glob("model*.pt"))
    for name in (f"model{number:06d}.pt", f"ema_0.9_{number:06d}.pt", "ema_0.9_best.pt"):
        assert same(folder / name, folder / "straight" / name)


def test_losses_of_other_data_are_not_counted(folder, scripted):
    scripted(1.0, 2.0, 2.0, 5.0, 5.0, 5.0)
    loop(**{**SETTINGS, "max_steps": 5}, val_dir="a").run_loop()
    other = loop(**SETTINGS, val_dir="b", patience=2, resume_checkpoint="auto")
    assert other.validation.no_lower == 0
    other.run_loop()
    assert other.resume_step + other.step == 11 and other.validation.best == (5.0, 6)


# ---- memorisation ----------------------------------------------------------------------------------------------------


def test_two_in_a_row_end_the_run_and_one_does_not(folder, scripted):
    """1 - 0.4 / 1 = 0.6 is above 0.5; 1 - 0.5 / 1 is not."""
    seen = [1.0, 0.4, 0.5, 0.4, 0.4, 0.1]
    left, left_seen = scripted(*[1.0] * 6, seen=seen)
    trained = loop(data=Seen(), **SETTINGS, max_memorisation=0.5)
    trained.run_loop()
    assert Seen.asked == (len(HELDOUT), 3) and (left, left_seen) == ([1.0], [0.1]) and trained.step == 9
    log = log_of(folder)
    assert log.count("the run ends: 2 validations in a row with more memorisation than --max_memorisation 0.5") == 1
    assert "validation loss 1 (memorisation 0.6) at step 2" in log and "lowest validation loss 1 at step 0" in log
    rows = [line.split(",") for line in (folder / "progress.csv").read_text().splitlines()]
    column = {name: [row[rows[0].index(name)] for row in rows[1:]] for name in ("memorisation", "seen_loss")}
    assert [float(value) for value in column["seen_loss"] if value] == seen[:5]
    assert [float(value) for value in column["memorisation"] if value] == pytest.approx([0, 0.6, 0.5, 0.6, 0.6])


def test_a_loss_that_is_not_finite_is_no_memorisation(folder, scripted):
    left, _ = scripted(*[1.0] * 3, math.nan, *[1.0] * 12, seen=[1.0, math.nan, 0.1, 0.1, *[0.9] * 12])
    trained = loop(data=Seen(), **SETTINGS, max_memorisation=0.5)
    trained.run_loop()
    assert not left and trained.step == 30


def test_the_count_survives(folder, scripted):
    """Above at steps 4 and 6, killed in between: checkpoint 4 knows of one."""
    scripted(*[1.0] * 4, seen=[1.0, 1.0, 0.1, 0.1])
    resumed = killed_and_resumed_seen(6)
    assert resumed.resume_step == 5 and resumed.validation.memorising == 1
    resumed.run_loop()
    assert resumed.resume_step + resumed.step == 7


def killed_and_resumed_seen(step):
    settings = {**SETTINGS, "max_memorisation": 0.5}
    with pytest.raises(KeyboardInterrupt):
        loop(data=Seen(fails_at=step), **settings).run_loop()
    return loop(data=Seen(), **settings, resume_checkpoint="auto")


def test_memorisation_is_the_gap_between_the_losses(folder):
    """Rows of the training data with the times and the noise of the held-out rows: the same rows have no gap."""
    for rows, gap in ((HeldOut(), False), (Seen().rows(9, seed=0), True)):
        judge = validation.Validation(HELDOUT, interval=1, batch_size=4, seed=3, max_memorisation=0.5, seen=rows)
        model = Net()
        held = validation.validation_loss(model, FlowMatching(), HELDOUT, batch_size=4, seed=3)
        seen = validation.validation_loss(model, FlowMatching(), rows, batch_size=4, seed=3)
        judge.judge(model, FlowMatching(), model.state_dict(), 0, folder / "best.pt")
        row = logger.dumpkvs()
        assert row["memorisation"] == 1 - seen / held and (row["memorisation"] == 0) is not gap
        assert abs(row["memorisation"]) > 0.01 or not gap


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"patience": 3}, "--patience 3 needs --val_dir, the held-out data to judge by"),
        ({"max_memorisation": 0.5}, "--max_memorisation 0.5 needs --val_dir"),
        ({"patience": -1}, "--patience is -1; it must be 0 or more"),
        ({"max_memorisation": -0.1}, "--max_memorisation is -0.1; it must be 0 or more"),
        ({"max_memorisation": 1.0, "val_dir": "x"}, "--max_memorisation is 1.0; it is a share, below 1"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(settings, words):
    with pytest.raises(UserError) as error:
        TrainConfig(**settings)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_an_average_of_the_last_step_has_its_snapshot(folder, scripted):
    scripted(1.0, 2.0, 2.0)
    loop(**SETTINGS, patience=2, posthoc_ema="0.1", posthoc_interval=100).run_loop()
    assert [path.name for path in (folder / "posthoc").iterdir()] == ["power0.1_000005.pt"]
