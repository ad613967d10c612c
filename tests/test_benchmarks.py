"""The benchmarks run at their smallest, their clockwork finds known ratios, and their tables say what was measured."""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch as th
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # they import each other as scripts do

import contenders  # noqa: E402
import rivals  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
from timing import Settings, Way, alternate, compare, in_unit, peak_extra_bytes, spread  # noqa: E402

QUICK = "training", "sampling", "cached_latents", "evaluation", "ceiling"
SLOW = "data_loading", "startup", "scaling"
needs_official = pytest.mark.skipif(rivals.official("unet") is None, reason="guided-diffusion-sdk is not installed")
needs_diffusers = pytest.mark.skipif(rivals.diffusers() is None, reason="diffusers is not installed")


class Clock:
    """Time that passes only in the functions that cost it."""

    def __init__(self):
        self.now, self.calls, self.pace = 0.0, [], 1.0

    def __call__(self):
        return self.now

    def costing(self, name, cost):
        def function():
            self.now += cost * self.pace
            self.calls.append(name)

        return function


# ---- the clockwork


def test_alternate_finds_a_known_ratio_whatever_the_machine_does():
    """The machine gets slower with every round; within one, b takes 2.5 times as long as a."""
    clock = Clock()
    a, b = clock.costing("a", 2.0), clock.costing("b", 5.0)
    found = []
    for _ in range(4):
        found += alternate(a, b, 1, clock=clock)
        clock.pace *= 3
    assert [b / a for a, b in found] == pytest.approx([2.5] * 4)
    assert found[0] == pytest.approx((2.0, 5.0)) and found[3] == pytest.approx((54.0, 135.0))


def test_alternate_swaps_the_order_in_every_second_round():
    clock = Clock()
    alternate(clock.costing("a", 1.0), clock.costing("b", 1.0), 4, clock=clock)
    assert "".join(clock.calls) == "ab" + "ab" + "ba" + "ab" + "ba"  # warm-up, then the rounds


def test_a_drift_within_the_rounds_cancels_over_the_order():
    """A machine that slows down by a tenth at each call favours whoever comes first, and that changes."""
    clock = Clock()

    def slowing(name):
        work = clock.costing(name, 1.0)

        def function():
            work()
            clock.pace *= 1.1

        return function

    ratios = [b / a for a, b in alternate(slowing("a"), slowing("b"), 2, clock=clock)]
    assert ratios == pytest.approx([1.1, 1 / 1.1])


def test_what_is_quick_is_repeated_and_told_by_the_call():
    clock = Clock()
    found = alternate(clock.costing("a", 0.01), clock.costing("b", 0.5), 3, least_s=0.2, clock=clock)
    assert found == [pytest.approx((0.01, 0.5))] * 3
    assert clock.calls.count("a") == 2 + 3 * 20 and clock.calls.count("b") == 1 + 3


def test_a_spent_budget_ends_the_rounds_after_the_third():
    clock = Clock()
    assert len(alternate(clock.costing("a", 10.0), clock.costing("b", 10.0), 9, budget_s=5, clock=clock)) == 3
    assert len(alternate(clock.costing("a", 1.0), clock.costing("b", 1.0), 9, budget_s=1e9, clock=clock)) == 9


def test_a_side_takes_its_turn_before_each_round_and_no_time_of_it():
    clock = Clock()
    turn = clock.costing("t", 100.0)
    found = alternate(clock.costing("a", 1.0), clock.costing("b", 2.0), 9, budget_s=12, before=[turn], clock=clock)
    assert found == [(1.0, 2.0)] * 4 and "".join(clock.calls) == "ab" + "tab" + "tba" + "tab" + "tba"


def test_memory_that_a_call_takes_is_seen_again_when_earlier_calls_have_kept_it():
    def work():
        kept = np.ones(20 << 20, np.uint8)
        time.sleep(0.05)
        return kept.sum()

    for _ in range(3):
        assert 15 << 20 < peak_extra_bytes(work) < 30 << 20


def test_units():
    assert in_unit(0.5, 16, "images/s") == 32 and in_unit(0.5, 1, "s") == 0.5
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}


def test_a_ratio_is_by_the_work_that_was_done(monkeypatch):
    """Ours makes 8 images in 2 s, the rival 2 in 5 s: ten times as many a second."""
    monkeypatch.setattr("timing.alternate", lambda *args, **kwargs: [(2.0, 5.0)] * 3)
    ours, rival = Way("ours", lambda: None, 8), Way("theirs", lambda: None, 2)
    pair = compare("images", ours, rival, "images/s", Settings())
    assert pair["ratio"] == {"median": 10.0, "least": 10.0, "most": 10.0} and pair["rounds"] == 3
    assert pair["ours"]["median"] == 4.0 and pair["rival"]["median"] == 0.4


def test_the_deviation_is_a_share_of_the_largest_number():
    assert contenders.deviation(th.tensor([1.0, -4.5]), th.tensor([1.0, -4.0])) == 0.125


# ---- the benchmarks


@pytest.fixture
def measured(tmp_path):
    """Runs a benchmark at its smallest; returns its results, as tables.py reads them."""

    def measure(name, *flags):
        run.main([name, "--tiny", "--out_dir", str(tmp_path), *flags])
        return tables.read_results(tmp_path).get(name)

    return measure


def check(results):
    """All that tables.py needs is there, and every number is one."""
    assert results["machine"]["cpu"] and results["machine"]["cores"] and results["machine"]["versions"]["torch"]
    assert results["pairs"] or results["rows"] or results["notes"]
    for entry in (side for pair in results["pairs"] for side in (pair["ratio"], pair["ours"], pair["rival"])):
        assert 0 < entry["least"] <= entry["median"] <= entry["most"] < float("inf")
    text = tables.section(results)
    for entry in [*results["pairs"], *results["rows"]]:
        assert entry["name"] in text and entry["unit"] in text


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_benchmark_runs(measured, name):
    """What ours and the official code make of the same weights, images and draws is the same."""
    results = measured(name)
    if results is None:  # all of it needs a rival that is not installed
        assert rivals.official("unet") is None and name in ("training", "sampling", "cached_latents")
        return
    check(results)
    same = [pair["deviation"] for pair in results["pairs"] if "deviation" in pair and name in ("training", "sampling")]
    assert all(value < 1e-4 for deviations in same for value in deviations.values())
    assert same or name not in ("training", "sampling") or rivals.official("unet") is None


@needs_diffusers
def test_diffusers_networks_are_of_equal_size():
    cases = import_module("cases")
    unet, transformer = cases.unets(False)[0], cases.transformer(False)
    ours = [contenders.parameters(contenders.our_network(case)) for case in (unet, transformer)]
    theirs = [
        contenders.parameters(model) for model in (rivals.diffusers_unet(unet), cases.diffusers_twin(transformer))
    ]
    assert theirs[0] == pytest.approx(ours[0], rel=0.02)
    assert theirs[1] == pytest.approx(ours[1], rel=0.12)  # it embeds the time in each of its six blocks anew


def test_the_formula_of_precision_and_recall_on_points_of_a_line():
    """Balls of real points end at 7, where one generated point of six is; that one's own ball reaches down to 3."""
    evaluation = import_module("evaluation")
    real, generated = (np.array(line)[:, None] for line in ([0.0, 1, 2, 3, 4], [7.0, 8, 9, 11, 30, 100]))
    assert list(evaluation.radii(real, 3)) == [9, 4, 4, 4, 9] and list(evaluation.radii(generated, 3))[0] == 16
    assert evaluation.precision_recall(real, generated) == (1 / 6, 0.4)


def test_every_second_round_goes_on_in_new_processes_warmed_up():
    cases, apart = import_module("cases"), import_module("apart")
    with contextlib.closing(apart.ApartSampler(cases.transformer(True), 2)) as sampler:
        before, found, runs, run = sampler.processes, [], [], sampler.run
        sampler.run = lambda: runs.append(run())
        for _ in range(3):
            sampler.turn()
            found.append((sampler.processes is before, len(runs)))
        assert found == [(True, 2), (True, 2), (False, 4)]
        assert [process.poll() for process in before] == [0] and sampler.processes[0].poll() is None


@pytest.mark.slow
def test_a_training_reads_the_pictures_of_its_case(tmp_path):
    case, apart, losses = import_module("cases").unets(True)[0], import_module("apart"), []
    pictures = import_module("pictures").draw_images(tmp_path, 8, size=64, users=2)
    for flags in ({}, {"data_dir": str(pictures)}):
        with contextlib.closing(apart.ApartTraining(replace(case, flags=case.flags | flags), seed=0)) as training:
            training.run()
            losses.append(training.gradient()[0])
    assert losses[0].shape == losses[1].shape and (losses[0] - losses[1]).abs().max() > 0.01


def test_absent_rivals_are_said_and_left_out(measured, monkeypatch, capsys):
    monkeypatch.setattr(rivals, "_imported", lambda name: None)
    assert measured("training") is None
    said = capsys.readouterr().out
    assert "guided-diffusion-sdk (the official code) is not installed: left out" in said
    assert "diffusers is not installed: left out" in said


def test_no_checkpoint_is_no_job(measured, capsys):
    assert measured("job") is None
    assert "no --model_path: no sampling job" in capsys.readouterr().out


@pytest.mark.slow
@needs_official
def test_a_job_from_a_checkpoint(measured, tmp_path):
    contenders.start()
    flags = {"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "class_cond": True}
    contenders.our_sampler(contenders.Case("", 2, flags), 2, tmp_path / "model")
    results = measured("job", "--model_path", str(tmp_path / "model" / "model000000.pt"))
    check(results)
    assert len(results["pairs"]) == 2


@pytest.mark.slow
def test_several_benchmarks_run_each_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, BENCHMARKS / "run.py", "evaluation", "job", "--tiny", "--out_dir", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"] and "2 benchmarks in" in done.stdout


@pytest.mark.slow
def test_the_gpu_script_prints_one_table(tmp_path):
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", str(BENCHMARKS / "gpu.sh"), "--tiny", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | {"PATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    results = tables.read_results(tmp_path)["gpu"]
    check(results)
    for pair in results["pairs"]:
        assert max(pair["deviation"].values()) < 0.05  # bfloat16 has three digits
        assert any(line.startswith(pair["name"]) and "TFLOP" not in line for line in done.stdout.splitlines()[-20:])


def test_without_a_gpu_the_gpu_script_says_so(monkeypatch):
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU here"):
        import_module("gpu").main([])


# ---- the tables


def results_by_hand(name="training", **changes):
    pair = {
        "name": "U-Net",
        "unit": "steps/s",
        "ratio": {"median": 1.256, "least": 1.2, "most": 1.31},
        "ours": {"label": "ours", "median": 2.512, "least": 2.4, "most": 2.6},
        "rival": {"label": "official", "median": 2.0, "least": 1.9, "most": 2.1},
        "deviation": {"loss": 1.2e-7, "gradient": 3.4e-6},
        "note": "of 2 M",
    }
    row = {"name": "rows", "unit": "s", "median": 12345.6, "least": 0.01234, "most": 23456.0, "note": "a third"}
    machine = {"cpu": "AB", "cores": 2, "threads": 2, "memory_gib": 23.5, "gpu": None, "python": "3.11.7"}
    machine |= {"versions": {"torch": "2.13.0", "guided-diffusion-sdk": None}}
    results = {"benchmark": name, "machine": machine, "settings": {"tiny": False}, "notes": ["diffusers: left out"]}
    return results | {"pairs": [pair], "rows": [row]} | changes


def test_a_section_says_what_was_measured():
    assert tables.section(results_by_hand()) == (
        "| what | ours | | rival | | unit | times as fast | deviation | |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
        "| U-Net | ours | 2.51 | official | 2 | steps/s | **1.26** [1.20, 1.31] | 3e-06 | of 2 M |\n"
        "\n"
        "| what | measured | unit | |\n"
        "|---|---|---|---|\n"
        "| rows | 12,346 [0.0123, 23,456] | s | a third |\n"
        "\n"
        "diffusers: left out\n"
        "\n"
        "AB, cores: 2, threads: 2, 23.5 GiB; Python 3.11.7, torch 2.13.0."
    )
    assert "mean nothing" in tables.section(results_by_hand(settings={"tiny": True}))


@pytest.mark.parametrize("deviation, said", [({"loss": 0.0}, "0"), ({}, ""), ({"a": 2e-9, "b": 1e-9}, "2e-09")])
def test_the_furthest_deviation_is_said(deviation, said):
    assert tables.furthest({"deviation": deviation}) == said


def test_tables_replace_what_lies_between_their_marks_alone(tmp_path, capsys):
    document = tmp_path / "performance.md"
    places = "".join(
        f"prose of {name}\n{tables.begin_of(name)}\nold\n{tables.end_of(name)}\n" for name in ("training", "x")
    )
    document.write_text(f"# Title\n{places}the end\n")
    (tmp_path / "training.json").write_text(json.dumps(results_by_hand()))
    (tmp_path / "lost.json").write_text(json.dumps(results_by_hand("lost")))
    (tmp_path / "solvers.json").write_text(json.dumps({"ways": {}}))  # of bench_sampling.py
    flags = ["--results_dir", str(tmp_path), "--document", str(document)]
    tables.main(flags)
    once = document.read_text()
    assert once.startswith("# Title\nprose of training\n") and once.endswith(f"{tables.end_of('x')}\nthe end\n")
    assert once.count("old") == 1 and once.count("**1.26**") == 1
    said = capsys.readouterr().out
    assert "has no place for lost" in said and "no place for training" not in said
    tables.main(flags)
    assert document.read_text() == once


def test_the_document_has_a_place_for_every_benchmark():
    text = (ROOT / "docs" / "performance.md").read_text()
    assert not tables.missing(text, [*run.FAMILIES, "gpu"])


def test_points_of_a_curve_are_put_in_order():
    rows = [{"over": "batch", "curve": "training", "x": x, "median": 1.0, "unit": "s"} for x in (4, 1, 2)]
    curves = tables.curves_of([*rows, {"name": "no point"}])
    assert [row["x"] for row in curves["batch", "training"]] == [1, 2, 4]


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"name": "", "unit": "s", "over": "batch", "curve": "training", "x": x, "median": x, "least": x, "most": x}
        for x in (1, 2)
    ]
    tables.plot({"training": results_by_hand(rows=rows)}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {tables.RATIOS, tables.SCALING}
