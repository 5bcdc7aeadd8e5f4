"""Runs of several processes: one batch, one verdict, one end, and a record each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # also for the processes that are started

import rank_runs
from rank_runs import STEPS, TINY, run_ranks

from bifusion_diag.data import BatchLoader
from bifusion_diag.errors import UserError
from bifusion_diag.record import RecordError, RecordReader, load_run
from bifusion_diag.record.reader import read_state
from bifusion_diag.replay.sights import Sight, where_it_began
from bifusion_diag.training import resume_training
from bifusion_diag.training.evaluation import training_source

pytestmark = pytest.mark.slow
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(folder: Path) -> Results:
    return run_ranks(rank_runs.runs, 2, folder)


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_all_ranks_end_with_the_same_weights_through_all_stages(two: Results, tmp_path: Path) -> None:
    four = run_ranks(rank_runs.few_runs, 4, tmp_path)
    for results in (two, four):
        first = results[0]["all"]["weights"]
        assert [different(first, result["all"]["weights"]) for result in results] == [[]] * len(results)
        assert [e[3]["name"] for e in results[0]["all"]["events"] if e[1] == "stage"] == ["S0", "S1", "S2"]
    assert different(two[0]["all"]["weights"], four[0]["all"]["weights"])  # of other batches
    assert [load_run(tmp_path / f"all{rank}.record").steps.tolist() for rank in ("", ".rank1", ".rank2", ".rank3")] == [
        list(range(STEPS))
    ] * 4


def test_probes_change_no_weight_and_no_random_number_of_any_rank(two: Results) -> None:
    for result in two:
        assert different(result["all"]["weights"], result["none"]["weights"]) == []
        assert torch.equal(result["all"]["random"], result["none"]["random"])
    assert not torch.equal(two[0]["all"]["random"], two[1]["all"]["random"])


def test_the_reduced_gradient_is_the_mean_of_those_that_the_ranks_compute_alone(two: Results) -> None:
    assert two[0]["gradients"]["names"] != two[1]["gradients"]["names"]
    for result in two:
        (expected, own_norm), (reduced, local_norm) = result["gradients"]["expected"], result["gradients"]["reduced"]
        assert reduced.keys() == expected.keys()
        for name, gradient in reduced.items():
            scale = max(float(expected[name].abs().max()), 1e-6)
            np.testing.assert_allclose(gradient.double(), expected[name], atol=1e-5 * scale, err_msg=name)
        assert float(local_norm) == pytest.approx(float(own_norm), rel=1e-5)


def test_a_signal_to_one_rank_ends_all_at_one_step_and_the_run_resumes_bit_by_bit(two: Results, folder: Path) -> None:
    for result in two:
        assert (result["parts"]["status"], result["parts"]["steps"]) == ("interrupted", [0, 1, 2])
        last = result["parts"]["events"][-1]
        assert last[:3] == (2, "signal", f"SIGTERM on rank 1 after 3 of {STEPS} steps")
        assert (result["resumed"]["status"], result["resumed"]["steps"]) == ("completed", list(range(STEPS)))
    for rank in ("", ".rank1"):
        whole, parts = RecordReader(folder / f"all{rank}.record"), RecordReader(folder / f"parts{rank}.record")
        names = [
            name for name in whole.names if name.startswith(("loss/", "train/", "grads/")) and "seconds" not in name
        ]
        assert sum(name.endswith("/local_norm") for name in names) > 10
        (mine, gone), (others, other_gone) = parts.columns(names), whole.columns(names)
        for i, name in enumerate(names):
            np.testing.assert_array_equal(mine[:, i], others[:, i], err_msg=f"{name}{rank}")
            np.testing.assert_array_equal(gone[:, i], other_gone[:, i], err_msg=f"{name}{rank}")


def test_a_nan_of_rank_1_is_told_by_all_with_the_scenes_of_rank_1(two: Results, folder: Path) -> None:
    scenes = [event[3]["scenes"] for event in two[0]["bad"]["events"] if event[1] == "non-finite"]
    for result in two:
        bad = [event for event in result["bad"]["events"] if event[1] == "non-finite"]
        step, _, message, data = bad[0]
        assert step == 2
        assert (data["rank"], data["ranks"]) == (1, [1])
        assert message.endswith("on rank 1")
        assert data["incident"]["reproduction"]["identical"] is True
        assert data["terms"]
        assert np.isnan(data["loss"])
        assert np.isfinite(data["local_norms"]).tolist() == [True, False]
        assert [event[3]["scenes"] for event in bad] == scenes
    settings = rank_runs.settings("training.steps=4")
    loader = BatchLoader(training_source(settings), settings.data, batch_size=1, seed=0, rank=1, ranks=2)
    assert scenes[0] == list(loader.batch(2).names)
    assert [e.data["rank"] for e in load_run(folder / "bad.json").events if e.step == 2] == [1]


def test_rank_0_alone_evaluates_and_writes_what_there_is_one_of(two: Results, folder: Path) -> None:
    assert two[0]["evaluated"]["status"] == "completed"
    reader, other = RecordReader(folder / "evaluated.record"), RecordReader(folder / "evaluated.rank1.record")
    assert "eval/seconds" in reader.names
    assert "eval/seconds" not in other.names
    assert "train/local_grad_norm" in other.names
    assert different(two[0]["evaluated"]["weights"], two[0]["none"]["weights"]) == []
    stems = ("all", "bad", "cut", "evaluated", "gradients", "none", "parts")
    written = {path.name for path in folder.iterdir() if path.suffix != ".pt"}
    kinds = (".json", ".record", ".rank1.record", ".tensorboard", ".checkpoints")
    expected = {f"{stem}{kind}" for stem in stems for kind in kinds} - {"gradients.checkpoints"}
    assert {name for name in written if not name.endswith(".incidents")} == expected
    assert "bad.incidents" in written
    assert load_run(folder / "all.json").header.environment["ranks"] == 2


def test_an_evaluation_that_a_signal_cuts_short_is_made_by_the_run_that_resumes(two: Results, folder: Path) -> None:
    for result in two:
        assert (result["cut"]["status"], result["cut"]["steps"]) == ("interrupted", [0, 1, 2])
        assert result["cut"]["events"][-1][:3] == (2, "signal", f"SIGTERM on rank 0 after 3 of {STEPS} steps")
        assert (result["whole"]["status"], result["whole"]["steps"]) == ("completed", list(range(STEPS)))
    names = ["eval/alignment", "eval/uniformity", "loss/total"]
    (whole, gone), (values, other_gone) = (
        RecordReader(folder / f"{name}.record").columns(names) for name in ("evaluated", "cut")
    )
    np.testing.assert_array_equal(values, whole)
    np.testing.assert_array_equal(gone, other_gone)
    assert np.flatnonzero(~gone[:, 1]).tolist() == [0, 3, 5]


def test_a_run_is_resumed_by_as_many_processes_as_began_it(two: Results, folder: Path) -> None:
    for checkpoint in (folder / "parts.checkpoints").glob(f"step-{STEPS:06d}"):
        os.rename(checkpoint, folder / "last")  # go back to where it was interrupted
    with pytest.raises(UserError, match=r"was trained by 2 processes.*torchrun --nproc-per-node 2 -m bifusion_diag"):
        resume_training(folder / "parts.json", console=rank_runs.QUIET)


def test_an_error_of_one_rank_ends_the_others_and_they_say_whose_it_was(tmp_path: Path) -> None:
    zero, one = run_ranks(rank_runs.failing, 2, tmp_path)
    assert one["error"] == "ValueError: a disk was pulled out, say"
    said = "rank 0 cannot go on: rank 1 has failed: ValueError: a disk was pulled out, say"
    assert zero["error"] == f"RankError: {said}"
    assert zero["seconds"] < one["seconds"] + 15
    runs = [load_run(tmp_path / "failing.json"), load_run(tmp_path / "failing.rank1.record")]
    assert [run.status for run in runs] == ["failed", "failed"]
    assert said in str(runs[0].error)


def test_a_process_that_is_gone_ends_the_others(tmp_path: Path) -> None:
    _, one = run_ranks(rank_runs.vanishing, 2, tmp_path)
    assert one["error"].startswith("RankError: rank 1 cannot go on: another process has ended without a word")
    assert one["seconds"] < 120  # TIMEOUT is an hour
    assert load_run(tmp_path / "vanishing.rank1.record").status == "failed"


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "bifusion_diag", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def has_stepped(record: Path) -> bool:
    """The first step is done: the modules' order is known."""
    try:
        return bool(read_state(record).header.modules)
    except RecordError:
        return False


def test_torchrun_trains_ends_on_ctrl_c_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    sets = [argument for setting in TINY for argument in ("--set", setting)]
    first = torchrun("--model", "baseline-5cm", "--scale", "small", *sets, "--steps", "30", "--out", str(out))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and first.poll() is None and not has_stepped(tmp_path / "run.record"):
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=120)
    run = load_run(out)
    assert run.status == "interrupted", errors
    assert 0 < len(run.steps) < 30
    assert load_run(tmp_path / "run.rank1.record").steps.tolist() == run.steps.tolist()
    assert output.count("interrupted:") == 1
    second = torchrun("--resume", "--out", str(out))
    output, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    assert output.count("completed: 30 steps") == 1
    assert load_run(out).steps.tolist() == list(range(30))


@pytest.mark.parametrize(
    ("losses", "norms", "ranks"),
    [
        ([1.0, np.nan, np.inf], [1.0, np.nan, np.nan], [1, 2]),
        ([1.0, 2.0, 3.0], [1.0, np.nan, 9.0], [1]),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 9.0], [2]),
    ],
)
def test_a_bad_step_began_where_the_loss_then_the_gradient_is_bad_or_largest(
    losses: list[float], norms: list[float], ranks: list[int]
) -> None:
    assert where_it_began([Sight(a, b) for a, b in zip(losses, norms, strict=True)]) == ranks
