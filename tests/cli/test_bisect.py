"""``bifusion-diag bisect`` end to end: killed, resumed, asked again, and given bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bifusion_diag.record import load_run

SMALL = """
scale: small
training: {batch_size: 1, threads: 1, stages: none, fingerprint_every: 0}
data: {scenes: 1, max_points: 200, image_height: 32, image_width: 48}
model:
  clip: {width: 24, heads: 2}
  backbone: {layers: [1, 1, 1, 1, 1, 1, 1, 1], planes: [8, 8, 8, 8, 8, 8, 8, 8]}
  decoder: {layers: 1}
"""
#: A pose of −inf is bad only where nothing is done about it; the rest is harmless.
CANDIDATE = """
preset: bifusion
data: {flaws: {lost_tracking: 1.0}, augment: {rotate: false}}
model: {projection: {sanitize: none, depth_tolerance: 0.08}}
losses: {instance: {focal_gamma: 1.5}}
optim: {lr: 3.0e-4}
"""
PAIR = {"model.projection.sanitize", "data.flaws.lost_tracking"}
Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the settings of both ends, and what they have in common."""
    folder = tmp_path_factory.mktemp("bisect")
    (folder / "common.yaml").write_text(SMALL)
    (folder / "candidate.yaml").write_text(CANDIDATE)
    return folder


def arguments(folder: Path, *more: object) -> list[str]:
    fixed = ["bisect", "bifusion", folder / "candidate.yaml", "--config", folder / "common.yaml"]
    return [*map(str, fixed), "--steps", "2", "--seeds", "1", "--out", str(folder / "out"), *map(str, more)]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    journal = folder / "out" / "journal.jsonl"
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.is_file() else []


@pytest.fixture(scope="module")
def killed(folder: Path) -> int:
    """A bisection in a process of its own, killed after its third run; the lines that its journal has."""
    command = [sys.executable, "-m", "bifusion_diag", *arguments(folder)]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("run 3"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with (folder / "out" / "journal.jsonl").open("a") as journal:
        journal.write('{"run": "cut sho')  # as a kill in the middle of a line leaves it
    return len([line for line in (folder / "out" / "journal.jsonl").read_text().splitlines() if line.endswith("}")])


def test_a_killed_bisection_goes_on_and_finds_the_pair(killed: int, folder: Path, command: Command) -> None:
    assert killed >= 5  # head, probe, three runs
    code, said = command(*arguments(folder, "--html", folder / "report.html"))
    assert code == 0, said
    assert "going on with" in said
    runs = [line for line in lines_of(folder) if "run" in line]
    assert len({(run["run"], run["seed"], run["examined"]) for run in runs}) == len(runs), "no run was made twice"

    document = json.loads((folder / "out" / "bisect.json").read_text())
    result = document["result"]
    assert result["status"] == "found"
    (cause,) = result["causes"]
    assert {element["name"] for element in cause["elements"]} == PAIR
    assert all(
        element["alone"]["outcome"] == element["without"]["outcome"] == "stable" for element in cause["elements"]
    )
    assert (cause["bad_runs"], cause["together"]["runs"], cause["start"]["step"]) == (1, 1, 0)
    assert "fail only together" in said
    (cured,) = result["cure"]["assignments"]
    assert cured in ("model.projection.sanitize=strict", "data.flaws.lost_tracking=0.0")
    assert (result["cure"]["tried"]["outcome"], result["cure"]["smallest"]) == ("stable", True)
    assert f"--set {cured}" in said
    twin = load_run(folder / "out" / result["cure"]["tried"]["records"][0])
    assert len(twin.steps) == 2
    assert not measured_bad(twin)
    assert "<html" in (folder / "report.html").read_text()
    left = {path.suffix for path in (folder / "out" / "runs").iterdir()}
    assert left == {".json"}, "nothing but the records"


def measured_bad(run: Any) -> bool:
    return bool(run.measures["nonfinite"])


def test_asked_again_it_answers_without_a_run(killed: int, folder: Path, command: Command) -> None:
    before = len(lines_of(folder))
    began = time.perf_counter()
    code, said = command(*arguments(folder, "--resume"))
    assert (code, len(lines_of(folder))) == (0, before), said
    assert time.perf_counter() - began < 10
    assert "fail only together" in said


def test_other_settings_in_the_same_folder_are_refused(killed: int, folder: Path, command: Command) -> None:
    code, said = command(*arguments(folder, "--set", "optim.weight_decay=0.5"))
    assert code == 2
    assert "started with other settings (baseline, candidate differ)" in said


def test_ends_that_leave_nothing_to_search_for(folder: Path, command: Command, tmp_path: Path) -> None:
    base = arguments(folder, "--out", tmp_path / "a")
    bad = ["--set", "model.projection.sanitize=none", "--set", "data.flaws.lost_tracking=1.0"]
    code, said = command(*base, *bad)
    assert code == 1
    assert "The baseline is itself bad (loss/" in said
    fine = ["--out", tmp_path / "b", "--set", "model.projection.sanitize=strict"]
    code, said = command(*base, *fine)
    assert code == 1
    assert "The candidate is not bad on 1 seed" in said
    code, said = command(*base, "--out", tmp_path / "c", "--budget", "3runs")
    assert code == 1
    assert "The budget is spent" in said
    assert "6 of 6 differences are under suspicion" in said


def test_a_candidate_that_breaks_off_is_searched_for_that_error(folder: Path, command: Command, tmp_path: Path) -> None:
    candidate = tmp_path / "far.yaml"
    candidate.write_text("preset: bifusion\ndata: {augment: {translate_std: 1.0e+20}}\noptim: {lr: 3.0e-4}")
    given = ["bisect", "bifusion", candidate, "--config", folder / "common.yaml", "--steps", 2, "--seeds", 2]
    code, said = command(*given, "--out", tmp_path / "out", "--oracle", "nonfinite_steps>0")
    assert code == 0, said
    assert "broke off after 0 steps: UserError" in said
    assert "data.augment.translate_std alone makes it unstable" in said
    assert "bad on 2 of 2 seeds" in said
    assert "--set data.augment.translate_std=0.1 (nothing smaller cures)" in said


def test_the_plan_alone_runs_nothing(folder: Path, command: Command, tmp_path: Path) -> None:
    code, said = command(*arguments(folder, "--out", tmp_path / "plan", "--plan"))
    assert code == 0, said
    assert "6 settings differ, in 6 pieces" in said
    assert "typical  2 together" in said
    assert not any("run" in json.loads(line) for line in (tmp_path / "plan" / "journal.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--oracle", "spikes"], "--oracle spikes: no such gate"),
        (["--budget", "3"], "--budget '3' cannot be read"),
        (["--set", "optim.lrr=1"], "unknown key 'optim.lrr'"),
        (["--set", "preset=bifusion"], "the common settings name a preset"),
        (["--config", "none.yaml"], "cannot read the config file none.yaml"),
        (["--probe", "grad"], "'grad'"),
        (["--resume", "--out", "nowhere"], "no bisection to go on with"),
        (["--threshold", "spike_rte=1"], "no threshold 'spike_rte'"),
        (["--set", "data.source=nowhere"], "no such folder"),
    ],
)
def test_bad_input(folder: Path, command: Command, tmp_path: Path, more: list[str], words: str) -> None:
    code, said = command(*arguments(folder, "--out", tmp_path / "out", *more))
    assert (code, words in said) == (2, True), said


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (("bifusio", "baseline"), "'bifusio' is neither a preset nor a YAML file. Did you mean 'bifusion'"),
        (("bifusion", "gone.yaml"), "gone.yaml: there is no such file"),
        (("bifusion", "bifusion"), "there is nothing to bisect"),
    ],
)
def test_bad_ends(command: Command, ends: tuple[str, str], words: str) -> None:
    code, said = command("bisect", *ends)
    assert (code, words in said) == (2, True), said


def test_a_signal_ends_it_with_130_and_a_valid_journal(folder: Path, command: Command, tmp_path: Path) -> None:
    """In this process: starting another one takes longer than the runs."""
    out = tmp_path / "out"

    def interrupt_after_first_run() -> None:
        journal = out / "journal.jsonl"
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if journal.is_file() and '{"run"' in journal.read_text():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.005)

    watcher = threading.Thread(target=interrupt_after_first_run)
    watcher.start()
    code, said = command(*arguments(folder, "--out", out))
    watcher.join()
    assert code == 130, said
    assert "interrupted; the same command goes on" in said
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    assert sum("run" in line for line in lines) < 5, "it ended at once"
    assert not (out / "bisect.json").exists()
