"""Files are whole or absent, and never code."""

import os
import pickle

import pytest
import torch as th

from guided_diffusion_vae import checkpoint, run_state
from guided_diffusion_vae.config import UserError


class Bomb:
    """Unpickling this would leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save({"x": th.ones(3)}, path)
    with pytest.raises(ZeroDivisionError), checkpoint.atomic_write(path) as handle:
        handle.write(b"half")
        raise ZeroDivisionError
    assert th.equal(checkpoint.load(path)["x"], th.ones(3))
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("name", ["full.bin", "full.pt"])
def test_a_full_disk_is_one_line(tmp_path, name, monkeypatch):
    """/dev/full takes every byte and then says ENOSPC, as a full disk does."""
    real_open = open

    def open_full(path, mode="r", *rest, **options):
        return real_open("/dev/full" if ".tmp-" in str(path) else path, mode, *rest, **options)

    checkpoint.save([1], tmp_path / name)
    monkeypatch.setattr("builtins.open", open_full)
    with pytest.raises(checkpoint.SaveError, match="the disk is full; earlier checkpoints are intact"):
        checkpoint.save({"x": th.zeros(10**6)}, tmp_path / name)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / name) == [1]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_named(tmp_path, content, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.*(damaged|not loaded)") as error:
        checkpoint.load_state_dict(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, suffix):
    path, mark = tmp_path / f"evil{suffix}", tmp_path / "mark"
    th.save({"state_dict": Bomb(str(mark))}, path)
    with pytest.raises(UserError):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Bomb(str(mark))))
    with pytest.raises(UserError):
        checkpoint.load(path)
    assert not mark.exists()


def write(folder, number, value=0.0):
    files = {f"model{number:06d}.pt": {"w": th.full((4,), value)}, f"opt{number:06d}.pt": {"s": th.zeros(2)}}
    run_state.write_checkpoint(folder, number, files, {"next_step": number + 1})


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    for number in (5, 10, 20):
        write(tmp_path, number)
    assert run_state.newest_checkpoint(tmp_path) == (str(tmp_path / "model000020.pt"), [])
    assert run_state.read_state(tmp_path / "model000010.pt")["next_step"] == 11


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no_state"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    for number in (10, 20):
        write(tmp_path, number)
    path = tmp_path / "model000020.pt"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    if damage == "flip":  # torch.load would not notice
        path.write_bytes(content.replace(b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", b"\0" * 15 + b"\1", 1))
    if damage == "remove":
        path.unlink()
    if damage == "no_state":  # killed before the commit mark
        (tmp_path / "state000020.pt").unlink()
    found, notes = run_state.newest_checkpoint(tmp_path)
    assert found == str(tmp_path / "model000010.pt")
    assert damage == "no_state" or "passed over checkpoint 20" in notes[0]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".model000002.pt.tmp-123").write_bytes(b"half")
    found, notes = run_state.newest_checkpoint(tmp_path)
    assert found.endswith("model000001.pt") and "removed the incomplete file" in notes[0]
    assert not list(tmp_path.glob(".*"))


def test_prune_keeps_the_newest_and_bare_upstream_files(tmp_path):
    for number in (1, 2, 3):
        write(tmp_path, number)
    checkpoint.save({"w": th.ones(1)}, tmp_path / "model000000.pt")
    run_state.prune(tmp_path, keep=2)
    assert {p.name for p in tmp_path.glob("model*")} == {"model000000.pt", "model000002.pt", "model000003.pt"}
    assert not (tmp_path / "opt000001.pt").exists()
