"""Files that are no longer what was written: found, said, and done without."""

import random
import shutil

import pytest
import torch as th
from harness import (
    AUTOENCODER,
    VERBS,
    assert_same_end,
    assert_tidy,
    contents,
    here,
    run,
    said,
    train,
    undisturbed,
    write_checkpoint,
)

from guided_diffusion_vae import checkpoint, run_state
from guided_diffusion_vae.config import UserError


def assert_falls_back(folder):
    newest, notes = run_state.newest_checkpoint(folder)
    assert newest == str(folder / "model000010.pt")
    assert len(notes) == 1 and notes[0].startswith("passed over checkpoint 20: ") and "damaged" in notes[0], notes


@pytest.mark.fault(
    "each file of the newest checkpoint cut off at 50 lengths",
    promise="found; the one before is used; a line says which",
)
def test_truncated(tmp_path, record_property):
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20)
    files = sorted(tmp_path.glob("*20.pt"))
    for path in files:
        whole = path.read_bytes()
        for place in range(50):
            path.write_bytes(whole[: len(whole) * place // 50])
            assert_falls_back(tmp_path)
        path.write_bytes(whole)
    assert run_state.newest_checkpoint(tmp_path) == (str(tmp_path / "model000020.pt"), [])
    record_property("tried", 50 * len(files))


def flips(whole, count):
    """The bytes with one of them changed, at this many random places."""
    draw = random.Random(0)
    for place in (draw.randrange(len(whole)) for _ in range(count)):
        yield whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :]


@pytest.mark.fault(
    "one bit of the newest checkpoint's model, average or optimizer flipped",
    promise="found by its checksum; the one before is used; a line says which",
)
def test_flipped(tmp_path, record_property):
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20)
    for name in ("model000020.pt", "ema_0.9_000020.pt", "opt000020.pt"):
        whole = (tmp_path / name).read_bytes()
        for changed in flips(whole, 50):
            (tmp_path / name).write_bytes(changed)
            assert_falls_back(tmp_path)
        (tmp_path / name).write_bytes(whole)
    record_property("tried", 150)


@pytest.mark.fault(
    "one bit of a file of weights flipped that has no other to tell of it (last.pt, ema_*.pt to sample from)",
    promise="an error of one line that names it, or what was written: never other numbers",
)
def test_flipped_alone(tmp_path, record_property):
    path, values = tmp_path / "last.pt", {"w": th.arange(500.0), "step": 3}
    checkpoint.save(values, path)
    for changed in flips(path.read_bytes(), 200):
        path.write_bytes(changed)
        try:
            found = checkpoint.load(path)
            assert th.equal(found["w"], values["w"]) and found["step"] == 3
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    record_property("tried", 200)


# ---- by script -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault(
    "the newest checkpoint {how}, by script",
    promise="one line says that it was passed over, and training ends in the same bits",
)
@pytest.mark.parametrize("how", ["cut off", "flipped", "empty", "without its state"])
def test_damaged_by_script(how, data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    path = tmp_path / "run" / ("opt000012.pt" if how != "without its state" else "state000012.pt")
    whole = path.read_bytes()
    path.write_bytes({"cut off": whole[:-100], "flipped": next(flips(whole, 1)), "empty": b""}.get(how, b""))
    if how == "without its state":
        path.unlink()
    done = run("image_train_vae.py", *VERBS["training"].words(data, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed over checkpoint 12") == (how != "without its state")
    assert f"loading model from checkpoint: {tmp_path}/run/model000009.pt" in done.stdout
    assert_same_end(straight, tmp_path / "run", *VERBS["training"].makes)
    assert_tidy(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.fault(
    "the last.pt of an autoencoder's training {how}, by script", promise="code 2 and one line; no file is changed"
)
@pytest.mark.parametrize("how", ["cut off", "flipped", "empty"])
def test_damaged_autoencoder(how, data, tmp_path):
    words = [*AUTOENCODER.split(), "--data_root", data, "--out_dir", tmp_path]
    here("vae_train", *words)
    path, whole = tmp_path / "last.pt", (tmp_path / "last.pt").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes({"cut off": whole[:-100], "flipped": flipped, "empty": b""}[how])
    before = {name: what for name, what in contents(tmp_path).items() if not name.startswith("log")}
    said(run("vae_train.py", *words, "--max_steps", 15), 2, "last.pt is damaged")
    assert before == {name: what for name, what in contents(tmp_path).items() if not name.startswith("log")}


@pytest.mark.fault(
    "--keep_last {keep} with a damaged checkpoint of a higher step in the folder",
    promise="the newest that were verified stay, whatever lies above them",
)
@pytest.mark.parametrize("keep", [1, 2])
def test_what_is_kept_is_whole(keep, tmp_path):
    write_checkpoint(tmp_path, 3)
    write_checkpoint(tmp_path, 20)
    (tmp_path / "opt000020.pt").write_bytes(b"")
    for number in (6, 9, 12):
        write_checkpoint(tmp_path, number)
        run_state.prune(tmp_path, keep, number)
        assert run_state.newest_checkpoint(tmp_path)[0] == str(tmp_path / f"model{number:06d}.pt")
    assert len(list(tmp_path.glob("state*.pt"))) == keep + 1  # the damaged one until it is written anew


@pytest.mark.fault(
    "--keep_last 2 --keep_every 10 over 40 checkpoints", promise="the last two stay, and every tenth; the newest always"
)
def test_what_is_kept(tmp_path):
    for number in range(40):
        write_checkpoint(tmp_path, number)
        run_state.prune(tmp_path, 2, number, every=10)
        assert run_state.newest_checkpoint(tmp_path)[0] == str(tmp_path / f"model{number:06d}.pt")
    assert sorted(path.name for path in tmp_path.glob("state*.pt")) == [
        f"state{number:06d}.pt" for number in (10, 20, 30, 38, 39)
    ]


@pytest.mark.fault(
    "a checkpoint that a newer program wrote, above one of ours",
    promise="code 2 and one line: it is whole, so no earlier one takes its place, and nothing is changed",
)
def test_of_a_newer_program(data, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 10)
    with monkeypatch.context() as later:
        later.setattr(run_state, "FORMAT", run_state.FORMAT + 1)
        write_checkpoint(tmp_path, 20)
    with undisturbed(tmp_path), pytest.raises(run_state.NewerVersion, match="state000020.pt .*newer version.*update"):
        run_state.newest_checkpoint(tmp_path)
    with pytest.raises(UserError, match="newer version"):
        train(data, tmp_path)
