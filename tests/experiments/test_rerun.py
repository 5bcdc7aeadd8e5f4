"""Runs trained once more: bit-identical from any start, with other probes; and what is said where they are not."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from bifusion_diag.config import Settings, load_settings
from bifusion_diag.errors import UserError
from bifusion_diag.experiments.rerun import Rerun, rerun
from bifusion_diag.model.sparse.minkowski import load_minkowski
from bifusion_diag.record import RecordReader, Run, load_run
from bifusion_diag.replay.recorder import BadStepError
from bifusion_diag.training import Trainer, resume_training, start_training

TINY = (
    "training.batch_size=1",
    "training.threads=1",
    "training.fingerprint_every=2",
    "data.scenes=3",
    "data.max_points=600",
    "data.image_height=48",
    "data.image_width=64",
    "data.superpoint_size=0.5",
)
OTHERS = ("stage", "fingerprint", "note")  # kinds of events that are no incidents
RUN = Path("run.json")  # every test has a folder of its own

Train = Callable[..., Run]


def console() -> Console:
    return Console(file=io.StringIO(), width=300)


def tiny(preset: str, *overrides: str, steps: int = 4) -> Settings:
    return load_settings(preset, scale="small", overrides=[*TINY, f"training.steps={steps}", *overrides])


def train(preset: str, *overrides: str, steps: int = 4) -> Run:
    return start_training(tiny(preset, *overrides, steps=steps), RUN, console=console())


def again(path: Path = RUN, steps: tuple[int, int] | None = None, *probes: str) -> Rerun:
    return rerun(path, steps=steps, probes=probes, console=console())


def bits(path: Path, name: str, steps: slice = slice(None)) -> list[int]:
    """One series of a full record, as the 32 bits of each value."""
    return RecordReader(path).column(name)[1][steps].view(np.uint32).tolist()


def interrupted(settings: Settings, after: int) -> None:
    """Train until a signal in the step of that number."""
    trainer = Trainer(settings, RUN, [], [], console())
    step = trainer._step

    def stopped(number: int, display: object) -> None:
        step(number, display)  # type: ignore[arg-type]
        if number == after:
            os.kill(os.getpid(), signal.SIGINT)

    trainer._step = stopped  # type: ignore[method-assign]
    assert trainer.run().status == "interrupted"


def test_a_run_of_losses_alone_is_had_with_all_probes_from_its_start_and_from_a_checkpoint() -> None:
    train("bifusion", "training.checkpoint_every=3", steps=6)
    whole = again(RUN, None, "all")
    assert (whole.first, whole.last, whole.checkpoint, whole.out) == (0, 5, None, Path("run.replay.json"))
    assert whole.identical
    assert whole.compared["train/grad_norm"] == whole.compared["loss/total"] == 6
    assert whole.compared["weights"] == 4  # at the start, and after 2, 4 and 6 steps
    assert "bit-identical" in whole.lines[1]
    new = load_run(whole.out)
    assert new.status == "completed"
    assert {name.split("/")[0] for name in new.names()} >= {"grads", "gate", "loss_gradients", "updates", "clip"}
    for name in ("loss/total", "loss/semantic/raw", "train/grad_norm"):
        assert bits(Path("run.replay.record"), name) == bits(Path("run.record"), name)

    part = rerun(RUN, steps=(4, 5), probes=["grads"], out=Path("part.json"), console=console())
    assert (part.first, part.last) == (3, 4)
    assert part.checkpoint == Path("run.checkpoints/step-000003")
    assert part.identical
    assert part.compared == dict.fromkeys(part.compared, 2)  # two steps; the weights of the checkpoint and after 4
    assert "probes measure from step 4 on" in part.lines[0]
    gradient = next(name for name in new.names("grads/decoder.") if name.endswith("/param_norm"))
    steps, _, missing = RecordReader("part.record").column(gradient)
    assert (steps.tolist(), missing.tolist()) == ([3, 4], [True, False])
    assert bits(Path("part.record"), gradient)[1] == bits(Path("run.replay.record"), gradient)[4]
    assert load_run(part.out).provenance["replay"]["checkpoint"] == "step-000003"
    assert sorted(path.name for path in Path("run.checkpoints").iterdir()) == ["step-000003", "step-000006"]


def test_a_resumed_run_with_evaluations_is_replayed_as_one() -> None:
    settings = tiny("baseline-5cm", "evaluation.every=2", "evaluation.scenes=1")
    interrupted(settings, after=1)
    part = again()
    assert (part.first, part.last, part.identical) == (0, 1, True)
    resume_training(RUN, console=console())
    done = again()
    assert (done.first, done.last, done.identical) == (0, 3, True)
    assert not [name for name in load_run(done.out).names() if name.startswith("eval/")]


def test_a_killed_run_is_read_from_its_folder_and_initial_weights_are_loaded_again() -> None:
    train("baseline-5cm", steps=2)
    first = Path("run.checkpoints/step-000002/state.safetensors").rename("first.safetensors")
    train("baseline-5cm", f"model.init_from={first}", "training.seed=7")
    RUN.unlink()  # as a killed run has none
    for path in (RUN, Path("run.record")):
        done = again(path)
        assert (done.identical, done.last, done.compared["weights"]) == (True, 3, 3)
    other = load_file(first)
    weight = next(name for name in other if name.startswith("model/decoder") and name.endswith("weight"))
    other[weight] += 1e-3
    save_file(other, first)
    changed = again()
    assert changed.difference is not None
    assert (changed.difference.step, changed.difference.quantity) == (0, "weights")
    assert any("initial_weights.sha256" in reason for reason in changed.reasons)
    first.unlink()
    with pytest.raises(UserError, match=r"first\.safetensors"):
        again()


def test_it_takes_the_threads_that_the_run_had() -> None:
    settings = tiny("baseline-5cm", "training.threads=0", steps=2)
    torch.set_num_threads(2)
    start_training(settings, RUN, console=console())
    torch.set_num_threads(1)
    done = again()
    assert done.identical
    assert load_run(done.out).environment["threads"] == 2
    assert torch.get_num_threads() == 1


def edit_header(change: Callable[[dict], None]) -> None:
    """Edit the header of the record, as full and as reduced."""
    for path in (RUN, Path("run.record/header.json")):
        document = json.loads(path.read_text())
        change(document["header"])
        path.write_text(json.dumps(document))


def test_the_first_difference_comes_with_what_differs_here() -> None:
    settings = tiny("baseline-5cm", "training.threads=0", "data.max_points=4000", steps=2)
    torch.set_num_threads(2)
    start_training(settings, RUN, console=console())
    torch.set_num_threads(1)

    def other_machine(header: dict) -> None:
        header["environment"] |= {"threads": 1, "machine": "riscv64"}
        header["environment"]["packages"]["torch"] = "2.6.0"

    edit_header(other_machine)
    done = again()  # with one thread, while the run had two
    assert not done.identical
    assert done.difference is not None
    assert (done.difference.step, done.difference.quantity) != (0, "weights")  # these are drawn alike
    assert done.difference.recorded != done.difference.here
    assert f"packages.torch: 2.6.0 in the run, {metadata.version('torch')} here" in done.reasons
    assert any(reason.startswith("machine: riscv64") for reason in done.reasons)
    assert not any(reason.startswith("python") for reason in done.reasons)
    assert "not identical" in done.lines[1]
    assert sum("it may be because" in line for line in done.lines) == len(done.reasons)


def test_tampered_weights_of_a_checkpoint_are_the_first_difference() -> None:
    train("baseline-5cm", "training.checkpoint_every=2", "training.fingerprint_every=0")
    path = Path("run.checkpoints/step-000002/state.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("model/decoder") and name.endswith("weight"))
    tensors[name].view(-1).view(torch.int32)[0] ^= 1  # the last bit of one number
    save_file(tensors, path)
    done = again(RUN, (2, 4))
    assert done.difference is not None
    assert (done.difference.step, done.difference.quantity) == (2, "weights")
    assert "the checkpoint's weights after 2 steps" in done.difference.text
    assert any("step-000002" in reason for reason in done.reasons)
    assert again(RUN, (0, 4)).identical  # from the start, it needs none


def test_a_changed_record_is_named_by_step_and_series() -> None:
    train("baseline-5cm")
    shutil.rmtree("run.record")
    document = json.loads(RUN.read_text())
    values = document["series"]["train/grad_norm"]["value"]
    values[3] = float(np.nextafter(np.float32(values[3]), np.float32(np.inf)))
    RUN.write_text(json.dumps(document))
    done = again()
    assert done.difference is not None
    assert (done.difference.step, done.difference.quantity) == (3, "train/grad_norm")
    assert done.compared["loss/total"] == 4  # run.json alone is enough for a short run
    assert "nothing that is recorded" in done.reasons[0]
    assert "run.record is not there" in done.lines[1]


@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
def test_what_was_done_about_bad_steps_is_done_again(policy: str) -> None:
    plain = train("baseline-5cm", steps=5)
    courses = {name: plain.series(name).value for name in plain.names() if name.endswith(("/raw", "/grad_norm"))}
    name, values = next((name, values) for name, values in courses.items() if values.argmax() >= 2)
    worst = int(values.argmax())
    rule = f"{name} > {np.sort(values)[-2:].mean():.9g}"
    options = [f"incidents.policy={policy}", f"incidents.rules=['{rule}']", "incidents.keep_every=1"]
    settings = tiny("baseline-5cm", *options, "training.checkpoint_every=1", "training.keep_checkpoints=0", steps=5)
    with contextlib.suppress(BadStepError):
        start_training(settings, RUN, console=console())
    run = load_run(RUN)
    first = next(event for event in run.events if event.step is not None and event.kind not in OTHERS)
    assert (first.step, f"the rule {name} >" in first.message) == (worst, True)
    assert run.status == ("interrupted" if policy == "stop" else "completed")
    done = again()
    assert done.identical
    assert done.last == run.steps[-1]
    assert again(RUN, (worst, worst + 1)).identical


def test_non_finite_losses_are_the_same_again() -> None:
    # Scenes with one labelled object, and so few queries that at times none lies on it: an average over nothing.
    empty = ("data.flaws.single_instance=1", "model.decoder.query_share=0", "losses.instance.empty_match=nan")
    run = train("baseline-5cm", *empty, steps=12)
    assert run.series("loss/total").stats.nonfinite > 0  # type: ignore[union-attr]
    assert again().identical


def test_minkowski_engine_is_replayed_with_one_thread_and_its_record_warns_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        load_minkowski()
    except UserError:
        pytest.skip("MinkowskiEngine is not built here")
    manager = importlib.import_module("MinkowskiEngine.MinkowskiCoordinateManager")
    monkeypatch.setattr(manager, "CPU_COUNT", 2)  # what it would take by itself
    run = train("baseline-5cm", "model.sparse_engine=minkowski")
    assert again().identical
    assert not [event for event in run.events if "MinkowskiEngine" in event.message]
    assert torch.get_num_threads() == 1
    two = train("baseline-5cm", "model.sparse_engine=minkowski", "training.threads=2", steps=1)
    torch.set_num_threads(1)
    assert [event.kind for event in two.events if "not deterministic with 2 threads" in event.message] == ["note"]


def test_bad_input_is_named_before_anything_is_written(tmp_path: Path) -> None:
    train("baseline-5cm", "training.checkpoint_every=1", "training.keep_checkpoints=0", steps=3)
    assert len(list(Path("run.checkpoints").iterdir())) == 3
    record = RUN.read_bytes()
    for steps in ((2, 2), (-1, 2), (0, 4)):
        with pytest.raises(UserError, match=r"the run has steps 0 to 2.*--steps 120:140"):
            again(RUN, steps)
    with pytest.raises(UserError, match="unknown probe 'grad'"):
        again(RUN, None, "grad")
    for out in (RUN, Path("run.txt")):
        with pytest.raises(UserError, match="that is where the run itself is recorded"):
            rerun(RUN, out=out, console=console())
    with pytest.raises(UserError, match="cannot be read"):
        again(Path("none.json"))
    edit_header(lambda header: header["environment"].update(ranks=2))
    with pytest.raises(
        UserError, match=r"by 2 processes.*torchrun --nproc-per-node 2 -m bifusion_diag replay run.json"
    ):
        again()
    edit_header(lambda header: header["environment"].pop("ranks"))
    edit_header(lambda header: header["settings"]["data"].update(source="frames"))
    with pytest.raises(UserError, match="'frames': no such folder"):
        again()
    with pytest.raises(UserError, match="checkpoint of a run with other settings"):
        again(RUN, (2, 3))
    edit_header(lambda header: header.update(preset="", settings={}))
    with pytest.raises(UserError, match="only runs of `bifusion-diag train`"):
        again()
    assert not Path("run.replay.json").exists()
    assert not Path("run.replay.record").exists()
    assert record != RUN.read_bytes()  # by the edits alone
