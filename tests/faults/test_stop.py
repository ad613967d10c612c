"""Asked to stop, a run saves and says so; a rank that is lost takes the others with it, soon and in one line."""

import os
import signal
import sys
import time

import pytest
from harness import VERBS, Job, assert_same_end, assert_tidy, contents, run, said, undisturbed
from helpers import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCHERS = {"python": (1, ()), "mpiexec": (2, ()), "torchrun": (2, TORCHRUN)}
BOUND_S = 60  # of a job's end after a rank was lost, on a machine that many share


def start(verb, data, out, launcher, *flags, **options):
    ranks, words = LAUNCHERS[launcher]
    return Job(VERBS[verb].script, *VERBS[verb].words(data, out), *flags, ranks=ranks, launcher=words, **options)


def has_saved(out):
    return lambda: [*out.glob("state*.pt"), *out.glob("last.pt")]


TRAININGS = "training", "autoencoder training", "classifier training"
ASKED = [(name, verb, "python") for name in ("SIGTERM", "SIGINT", "SIGUSR1") for verb in TRAININGS]
ASKED += [("SIGTERM", "training", launcher) for launcher in ("mpiexec", "torchrun")]


@pytest.mark.slow
@pytest.mark.fault(
    "{name} to {verb} by {launcher}",
    promise="the step is finished and saved, one line, code 75 (torchrun: its own); it goes on to the same bits"
    " (two ranks: within 1e-6)",
)
@pytest.mark.parametrize("name, verb, launcher", ASKED)
def test_asked_to_stop(name, verb, launcher, data, tmp_path):
    out, straight = tmp_path / "out", tmp_path / "straight"
    with undisturbed(data):
        with start(verb, data, out, launcher) as job:
            job.until(has_saved(out))
            os.kill(job.process.pid, getattr(signal, name))
            done = job.end()
        if launcher == "torchrun":
            assert done.returncode != 0 and done.stderr.count("stopped: ") == 1, done.stderr
        else:
            said(done, 75, "saved step")
        for folder in (out, straight):
            with start(verb, data, folder, launcher) as job:
                assert job.end().returncode == 0
    assert_same_end(out, straight, *VERBS[verb].makes, atol=0.0 if launcher == "python" else 1e-6)
    assert_tidy(out)


@pytest.mark.slow
@pytest.mark.fault(
    "a second SIGTERM, three seconds after the first, while a step takes minutes",
    promise="it leaves at once and changes nothing",
)
def test_asked_twice(data, tmp_path):
    with start("training", data, tmp_path, "python", "--batch_size", 5000, "--microbatch", 4) as job:
        job.until(lambda: (tmp_path / "run.yaml").exists())
        time.sleep(5)
        job.process.send_signal(signal.SIGTERM)
        time.sleep(3)
        job.process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert job.end().returncode == -signal.SIGTERM
    assert time.monotonic() - begin < 10 and not list(tmp_path.glob("*.pt"))


@pytest.mark.slow
@pytest.mark.fault("--max_hours reached", promise="saved in time, code 75, one line; it goes on to the same bits")
def test_out_of_time(data, tmp_path):
    verb = VERBS["training"]
    words = verb.words(data, tmp_path / "out")
    said(run(verb.script, *words, "--max_hours", 1e-4), 75, "--max_hours is reached; saved step")
    for out in ("out", "straight"):
        assert run(verb.script, *verb.words(data, tmp_path / out)).returncode == 0
    assert_same_end(tmp_path / "out", tmp_path / "straight", *verb.makes)


@pytest.mark.slow
@pytest.mark.fault(
    "{verb} started a second time in the same folder while the first is at work",
    promise="code 2 and one line that names the first by process and machine; the first ends as if nothing had been",
)
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "the pipeline"])
def test_two_jobs_in_one_folder(verb, data, straight, tmp_path):
    verb = VERBS[verb]
    words = [verb.words(verb.source(data, straight), tmp_path / out) for out in ("out", "unhurt")]
    with Job(verb.script, *words[0]) as first:
        first.until((tmp_path / "out" / ".lock").exists)
        first.signal(signal.SIGSTOP)
        before = contents(tmp_path / "out")
        said(run(verb.script, *words[0]), 2, f"is in use by process {first.process.pid} on", "choose another folder")
        assert contents(tmp_path / "out") == before
        first.signal(signal.SIGCONT)
        assert first.end().returncode == 0
    assert run(verb.script, *words[1]).returncode == 0
    assert_same_end(tmp_path / "unhurt", tmp_path / "out", *verb.makes)
    assert_tidy(tmp_path / "out")


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 of rank {rank} of two in training, by {launcher}",
    promise="the other ends within a minute, the code is not 0; it goes on to within 1e-6 of the same end",
)
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(rank, launcher, data, tmp_path):
    out = tmp_path / "out"
    with start("training", data, out, launcher, "--max_steps", 10**6) as job:
        job.until(has_saved(out))
        name = "RANK" if launcher == "torchrun" else "PMI_RANK"
        (victim,) = (pid for pid in job.scripts() if f"\0{name}={rank}\0".encode() in environment(pid))
        os.kill(victim, signal.SIGKILL)
        begin = time.monotonic()
        assert job.end().returncode != 0
        assert time.monotonic() - begin < BOUND_S
    for folder in (out, tmp_path / "straight"):
        assert run("image_train_vae.py", *VERBS["training"].words(data, folder), ranks=2).returncode == 0
    assert_same_end(out, tmp_path / "straight", *VERBS["training"].makes, atol=1e-6)
    assert_tidy(out)


def environment(pid):
    with open(f"/proc/{pid}/environ", "rb") as handle:
        return b"\0" + handle.read()


PROGRAM = """
import sys, time
from datetime import timedelta
sys.path.insert(0, {root!r})
from guided_diffusion_vae import dist_util

def main():
    dist_util.TIMEOUT = timedelta(seconds=8)
    dist_util.setup_dist()
    {body}

dist_util.run_main(main)
"""


def program(tmp_path, body, launcher):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(root=str(ROOT), body=body))
    ranks, words = LAUNCHERS[launcher]
    return Job(path, ranks=ranks, launcher=words)


@pytest.mark.slow
@pytest.mark.fault(
    "rank 1 of two hangs while rank 0 waits for it, by {launcher} (time limit 8 s instead of 30 min)",
    promise="code 5 (torchrun: its own) and one line, soon after the limit; no process stays",
)
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_a_rank_hangs(launcher, tmp_path):
    with program(tmp_path, "time.sleep(3600 * dist_util.rank()); dist_util.any_rank(False)", launcher) as job:
        done = job.end(timeout=120)
    assert done.returncode == 5 if launcher == "mpiexec" else done.returncode, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1, done.stderr
    assert "Traceback" not in done.stderr or launcher == "torchrun", done.stderr


@pytest.mark.fault(
    "rank {slow} of two under mpiexec still at work when the other is done",
    promise="it finishes its work; code 0",
)
@pytest.mark.parametrize("slow", [0])
def test_a_rank_is_done_before_the_other(slow, tmp_path):
    with program(tmp_path, f"time.sleep(3 * (dist_util.rank() == {slow})); print('all done')", "mpiexec") as job:
        done = job.end()
    assert done.returncode == 0 and done.stdout.count("all done") == 2, (done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.fault(
    "a run begun on {first} rank(s) goes on on {second}",
    promise="the same end within 1e-5; another global batch is refused in one line",
)
@pytest.mark.parametrize("first, second", [(1, 2), (2, 1)])
def test_another_number_of_ranks(first, second, data, tmp_path):
    verb, wide = VERBS["training"], ["--num_channels", 64, "--dropout", 0, "--lr", 1e-4]  # see test_train_util

    def train(out, ranks, steps, batch):
        words = [*verb.words(data, tmp_path / out), *wide, "--max_steps", steps, "--batch_size", batch // ranks]
        return run(verb.script, *words, ranks=ranks)

    assert train("straight", first, 12, 4).returncode == 0
    assert train("moved", first, 6, 4).returncode == 0
    said(train("moved", second, 12, 8), 2, "--batch_size", "the run had 4")
    assert train("moved", second, 12, 4).returncode == 0
    assert_same_end(tmp_path / "straight", tmp_path / "moved", *verb.makes[:2], atol=1e-5)
