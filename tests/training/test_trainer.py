"""Whole runs: what they record, that they repeat bit by bit, resume, and end cleanly."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from bifusion_diag.config import Settings
from bifusion_diag.errors import UserError
from bifusion_diag.model.decoder import MixedQueryDecoder
from bifusion_diag.record import Run, load_run
from bifusion_diag.replay.incident import Trigger
from bifusion_diag.replay.recorder import BadStepError
from bifusion_diag.training import Trainer, resume_training
from bifusion_diag.training.checkpoint import latest_checkpoint, save_checkpoint
from bifusion_diag.training.progress import ProgressDisplay

Train = Callable[..., Run]

# Scenes with one labelled object, and so few queries that at times none of them lies on it: ESAM averages over nothing.
EMPTY_MATCH = ("data.flaws.single_instance=1", "model.decoder.query_share=0", "losses.instance.empty_match=nan")


def weights(folder: Path, name: str = "run") -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors: weights, buffers, moments and random state."""
    newest = sorted((folder / f"{name}.checkpoints").glob("step-*"))[-1]
    return load_file(newest / "state.safetensors")


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def values(run: Run, name: str) -> list[float]:
    series = run.series(name)
    assert series is not None
    return series.value.tolist()


def test_the_recorded_total_is_the_sum_of_the_weighted_terms(train: Train) -> None:
    run = train("bifusion")
    weighted = [name for name in run.names("loss/") if name.endswith("/weighted")]
    assert len(weighted) >= 5
    np.testing.assert_allclose(
        sum(np.array(values(run, name)) for name in weighted), values(run, "loss/total"), rtol=1e-5
    )


def test_same_seed_gives_bit_identical_losses_and_weights_and_another_seed_does_not(
    train: Train, tmp_path: Path
) -> None:
    one, two = train("bifusion", name="one"), train("bifusion", name="two")
    other = train("bifusion", "training.seed=1", name="other")
    assert values(one, "loss/total") == values(two, "loss/total") != values(other, "loss/total")
    assert_same_tensors(weights(tmp_path, "one"), weights(tmp_path, "two"))


@pytest.mark.parametrize("preset", ["bifusion", "baseline-5cm"])
def test_probes_change_no_weight_and_no_random_number(train: Train, tmp_path: Path, preset: str) -> None:
    with_all = train(preset, name="all", probes=("all",))
    with_none = train(preset, name="none")
    assert values(with_all, "train/grad_norm") == values(with_none, "train/grad_norm")
    assert_same_tensors(weights(tmp_path, "all"), weights(tmp_path, "none"))


def test_a_resumed_run_is_bit_identical_to_one_that_was_never_interrupted(
    train: Train, tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    whole = train("bifusion", name="whole", steps=6, probes=("all",))
    settings = tiny("bifusion", steps=6)
    trainer = Trainer(settings, tmp_path / "parts.json", ["all"], [], quiet)
    step = trainer._step

    def interrupted_at_2(number: int, display: object) -> None:
        step(number, display)
        if number == 2:  # in the middle of stage S1
            os.kill(os.getpid(), signal.SIGINT)

    trainer._step = interrupted_at_2
    first = trainer.run()
    assert (first.status, list(first.steps)) == ("interrupted", [0, 1, 2])
    assert [event.kind for event in first.events][-1] == "signal"
    second = resume_training(tmp_path / "parts.json", console=quiet)
    assert (second.status, list(second.steps)) == ("completed", list(range(6)))
    for name in whole.names():
        # CLIP runs only for images whose tokens are not kept yet: in a resumed run, for all of them once more.
        if "seconds" not in name and not name.startswith("throughput/") and "/encoder.clip." not in name:
            np.testing.assert_array_equal(values(second, name), values(whole, name), err_msg=name)
    assert [event for event in second.events if event.kind not in ("signal", "resume")] == whole.events
    assert_same_tensors(weights(tmp_path, "parts"), weights(tmp_path, "whole"))


def test_sigterm_ends_with_a_valid_record_and_puts_the_handlers_back(
    tiny: Callable[..., Settings], quiet: Console, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(tiny("baseline-5cm", steps=1000), tmp_path / "run.json", [], [], quiet)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    run = trainer.run()
    timer.join()
    assert run.status == "interrupted"
    assert 0 < len(run.steps) < 1000
    assert signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM: ending after this step; once more ends at once" in capfd.readouterr().err


def test_a_crash_leaves_a_record_that_says_failed(
    tiny: Callable[..., Settings], quiet: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny("baseline-5cm", steps=5), tmp_path / "run.json", ["grads"], [], quiet)
    forward = MixedQueryDecoder.forward
    calls = []

    def failing(self: MixedQueryDecoder, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory, say")
        return forward(self, *arguments)

    monkeypatch.setattr(MixedQueryDecoder, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.run()
    run = load_run(tmp_path / "run.json")
    assert (run.status, list(run.steps)) == ("failed", [0, 1])
    assert "out of memory, say" in str(run.error)


def test_bad_steps_become_events_that_name_their_scenes(train: Train) -> None:
    run = train("baseline-5cm", *EMPTY_MATCH, steps=12)
    assert run.series("loss/total").stats.nonfinite > 0
    bad = [event for event in run.events if event.kind == "non-finite"]
    first = run.series("loss/total").stats.first_nonfinite_step
    assert bad[0].step == first
    assert set(bad[0].data["terms"]) <= {"instance_bce", "instance_dice"} != set()
    assert bad[0].data["scenes"][0].startswith("synthetic-")


def test_a_match_of_nothing_gives_a_nan_loss_and_harmless_gradients(train: Train, tmp_path: Path) -> None:
    run = train("baseline-5cm", *EMPTY_MATCH, steps=12)
    assert run.series("loss/total").stats.nonfinite > 0
    assert run.series("train/grad_norm").stats.nonfinite == 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values() if tensor.is_floating_point())


def test_checkpoints_are_written_on_the_way_and_the_old_ones_dropped(train: Train, tmp_path: Path) -> None:
    train("baseline-5cm", "training.checkpoint_every=1", steps=5)
    names = sorted(path.name for path in (tmp_path / "run.checkpoints").iterdir())
    assert names == ["step-000004", "step-000005"]


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    train: Train, tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    whole = train("baseline-5cm", name="whole")
    trainer = Trainer(tiny("baseline-5cm", "training.checkpoint_every=1"), tmp_path / "run.json", [], [], quiet)
    step, limits = trainer._step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(number: int, display: ProgressDisplay) -> None:
        step(number, display)
        if number == 2:  # the record still finds room
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))

    trainer._step = on_a_full_disk  # type: ignore[method-assign]
    try:
        with pytest.warns(RuntimeWarning, match=r"no checkpoint after [34] steps.*goes on without it"):
            run = trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run.status, list(run.steps)) == ("completed", [0, 1, 2, 3])
    assert [event.step for event in run.events if event.kind == "checkpoint"] == [2, 3]
    left = sorted(path.name for path in (tmp_path / "run.checkpoints").iterdir())
    assert left == ["step-000001", "step-000002"]  # nothing half-written, which would fill the disk further
    resumed = resume_training(tmp_path / "run.json", console=quiet)  # what has no checkpoint is trained again
    assert values(resumed, "loss/total") == values(whole, "loss/total")
    assert_same_tensors(weights(tmp_path), weights(tmp_path, "whole"))


def test_a_run_killed_after_its_last_checkpoint_is_closed_by_resuming_it(
    train: Train, tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    whole = train("baseline-5cm", "training.threads=1", name="whole", probes=("grads",))
    out = tmp_path / "run.json"
    child = torch.multiprocessing.get_context("spawn").Process(
        target=train_and_be_killed, args=(tiny("baseline-5cm", "training.threads=1"), out), daemon=True
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert load_run(tmp_path / "run.record").status == "running"
    newest = tmp_path / "run.checkpoints" / "step-000004" / "state.safetensors"
    written = newest.stat().st_mtime_ns
    run = resume_training(out, console=quiet)
    assert (run.status, list(run.steps)) == ("completed", [0, 1, 2, 3])
    assert newest.stat().st_mtime_ns == written  # it is there: a kill now must not find it half-replaced
    assert load_run(out).status == "completed"
    for name in whole.names():
        if "seconds" not in name:
            np.testing.assert_array_equal(values(run, name), values(whole, name), err_msg=name)
    assert_same_tensors(weights(tmp_path), weights(tmp_path, "whole"))
    with pytest.raises(UserError, match="nothing to resume: all 4 steps"):
        resume_training(out, console=quiet)


def train_and_be_killed(settings: Settings, out: Path) -> None:
    """In a process of its own: all steps, the last checkpoint, and then nothing more."""
    trainer = Trainer(settings, out, ["grads"], [], Console(quiet=True))
    save = trainer._save

    def save_and_be_killed(done: int, *, begun: bool = False) -> None:
        save(done)
        os.kill(os.getpid(), signal.SIGKILL)

    trainer._save = save_and_be_killed  # type: ignore[method-assign]
    trainer.run()


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (999_998, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    assert latest_checkpoint(tmp_path).step == 1_000_000


def test_a_finished_run_cannot_be_resumed(train: Train, quiet: Console, tmp_path: Path) -> None:
    train("baseline-5cm", steps=2)
    with pytest.raises(UserError, match="nothing to resume: all 2 steps"):
        resume_training(tmp_path / "run.json", console=quiet)


def test_resuming_needs_a_checkpoint_that_can_be_read(train: Train, quiet: Console, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        resume_training(tmp_path / "none.json", console=quiet)
    train("baseline-5cm", steps=2)
    info = tmp_path / "run.checkpoints" / "step-000002" / "checkpoint.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        resume_training(tmp_path / "run.json", console=quiet)
    info.write_text(json.dumps(content | {"step": 1}))
    state = info.with_name("state.safetensors")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state.safetensors cannot be read"):
        resume_training(tmp_path / "run.json", console=quiet)
    info.write_text("{")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        resume_training(tmp_path / "run.json", console=quiet)


def test_bad_input_is_found_before_anything_is_written(
    tiny: Callable[..., Settings], quiet: Console, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"unknown probe 'grad'.*'grads'"):
        Trainer(tiny("baseline-5cm"), tmp_path / "run.json", ["grad"], [], quiet)
    for device in ("tpu9", "meta"):
        with pytest.raises(UserError, match="not available here"):
            Trainer(tiny("baseline-5cm", f"training.device={device}"), tmp_path / "run.json", [], [], quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_display_shows_every_number_in_narrow_terminals(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, legacy_windows=False, _environ={})
    with ProgressDisplay(console, "bifusion-fragile (small)", 400) as display:
        display.incident("step 6: bad")
        display.step(7, 1234.5, math.inf)
    last = file.getvalue().rpartition("bifusion-fragile (small)")[2]
    for shown in ("7/400", "--:--", "loss 1234", "pre-clip grad norm inf", "incidents 1"):
        assert shown in last


def test_the_module_table_counts_what_learns_in_the_run_not_in_its_first_stage(train: Train) -> None:
    run = train("bifusion", probes=("grads",))
    trainable = {module.name: module.trainable for module in run.modules}
    assert trainable["encoder.backbone.conv0p1s1"] > 0  # frozen in stage S0
    assert trainable["encoder.gate.point_mlp.0"] > 0  # frozen in the gate's early phase
    assert sum(trainable.values()) == run.parameters["total"]["trainable"]


@pytest.mark.parametrize(
    "fault",
    ["scale-weights@2", "zero-second-moment@2", "zero-lr@1:decoder", "not-in-optimizer@1:decoder", "frozen@2:decoder"],
)
def test_a_fault_of_the_first_resumed_step_or_of_one_before_is_the_same_as_without_an_interruption(
    train: Train, tiny: Callable[..., Settings], quiet: Console, tmp_path: Path, fault: str
) -> None:
    options = (f"training.inject=['{fault}']", "incidents.capsules=0")
    whole = train("baseline-5cm", *options, name="whole")
    trainer = Trainer(tiny("baseline-5cm", *options), tmp_path / "parts.json", [], [], quiet)
    trainer.end = 2  # ends after two of its four steps
    trainer.run()
    second = resume_training(tmp_path / "parts.json", console=quiet)
    for name in ("loss/total", "train/grad_norm"):
        np.testing.assert_array_equal(values(second, name), values(whole, name))
    assert_same_tensors(weights(tmp_path, "parts"), weights(tmp_path, "whole"))


@pytest.mark.parametrize(("fault", "done"), [("high-lr@3", 4), ("scale-weights@3", 3)])
def test_a_stopped_run_goes_on_where_it_is_before_the_bad_step_or_behind_it(
    train: Train, tiny: Callable[..., Settings], quiet: Console, tmp_path: Path, fault: str, done: int
) -> None:
    """The rate that is too high is seen of what its update has done: the step is done, and is not done again."""
    options = (f"training.inject=['{fault}']", "incidents.policy=stop", "incidents.capsules=0")
    whole = train("baseline-5cm", options[0], options[2], name="whole", steps=6)
    trainer = Trainer(tiny("baseline-5cm", *options, steps=6), tmp_path / "run.json", [], [], quiet)
    judges = "judge_update" if done == 4 else "judge"
    judge = getattr(trainer.recorder.detector, judges)  # which needs more steps than a test should take
    alarm = [Trigger("rule", "the fault's step")]
    setattr(trainer.recorder.detector, judges, lambda vitals: alarm if vitals.step == 3 else judge(vitals))
    with pytest.raises(BadStepError, match="before the update" if done == 3 else "after the update") as caught:
        trainer.run()
    assert caught.value.updated == (done == 4)
    assert latest_checkpoint(tmp_path / "run.checkpoints").step == done
    stopped = load_run(tmp_path / "run.json")
    assert [(event.step, event.kind) for event in stopped.events][-1] == (3, "stop")
    assert list(stopped.steps) == [0, 1, 2, 3]
    second = resume_training(tmp_path / "run.json", console=quiet)
    assert (second.status, list(second.steps)) == ("completed", list(range(6)))
    np.testing.assert_array_equal(values(second, "loss/total"), values(whole, "loss/total"))
    assert_same_tensors(weights(tmp_path, "run"), weights(tmp_path, "whole"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [("nan-term@4", "the run has steps 0 to 3"), ("nan-moment@0", "no moments"), ("nan-buffer@1:criterion", "no buf")],
)
def test_a_fault_that_cannot_strike_is_named_before_anything_is_written(
    train: Train, tmp_path: Path, fault: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        train("baseline-5cm", f"training.inject=['{fault}']")
    assert not list(tmp_path.iterdir())
