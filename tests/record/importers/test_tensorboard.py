"""Event folders as PyTorch's writer, Lightning and our own runs leave them, beside what TensorBoard itself reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto

from bifusion_diag.errors import UserError
from bifusion_diag.record import RecordError, Run, RunHeader, RunWriter, TensorBoardSink, load_run
from bifusion_diag.record.importers import read_source
from bifusion_diag.record.importers.tensorboard import scalar


def write(folder: Path, series: dict[str, list[float]], first: int = 0, suffix: str = "") -> Path:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for name, values in series.items():
            for step, value in enumerate(values, first):
                writer.add_scalar(name, value, step)
        writer.add_text("config", "<script>alert(1)</script>")
        writer.add_histogram("h", np.arange(5))
    return folder


def there(run: Run, name: str) -> dict[int, float]:
    series = run.series(name)
    assert series is not None, f"{name} is not there; there are {run.names()}"
    return dict(zip(series.steps[series.missing == 0].tolist(), series.value[series.missing == 0], strict=True))


def test_the_same_numbers_as_tensorboards_own_reader(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=50).tolist()
    values[7], values[9] = float("nan"), float("inf")
    folder = write(
        tmp_path / "run1", {"train/loss": values, "train/loss_cls": values, "lr-AdamW": [0.1], "val/miou": [0.3]}
    )
    run = load_run(folder)
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for theirs, ours in {"train/loss": "loss/total", "train/loss_cls": "loss/loss_cls/raw", "lr-AdamW": "train/lr",
                         "val/miou": "eval/miou"}.items():  # fmt: skip
        told = {event.step: event.value for event in reader.Scalars(theirs)}
        found = there(run, ours)
        assert found.keys() == told.keys()
        np.testing.assert_array_equal(list(found.values()), list(told.values()))
    assert run.provenance["imported"]["smoothing"] == 0
    assert run.provenance["imported"]["smoothing_from"].startswith("unknown")
    assert run.provenance["imported"]["nonfinite"] == {"logged": 2}, "unknown means cannot be told apart"
    assert run.header.created[:2] == "20"
    single = read_source(folder, smoothing=1).state.header.provenance["imported"]
    assert single["nonfinite"] == {"logged": 2, "at_least": 2, "at_most": 2, "steps": [7, 9]}


def test_a_resumed_writer_voids_what_it_writes_again(tmp_path: Path) -> None:
    write(tmp_path, {"loss": [1.0] * 20}, suffix=".a")
    write(tmp_path, {"loss": [2.0] * 5}, first=10, suffix=".b")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name[-1] for name in names] == ["a", "b"]
    run = load_run(tmp_path)
    assert there(run, "loss/total") == {step: 1.0 if step < 10 else 2.0 for step in range(15)}
    assert [event.step for event in run.events if event.kind == "resume"] == [10]


def test_several_runs_in_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("version_0", "version_1"):
        write(tmp_path / "exp" / name, {"loss": [1.0]})
    with pytest.raises(RecordError, match=r"2 runs are in it. Give one of them:\n.*version_0\n.*version_1"):
        load_run(tmp_path)
    run = load_run(tmp_path / "exp" / "version_1")
    assert run.header.name == "exp/version_1"


@pytest.mark.parametrize("damage", ["cut", "flipped", "zeros"])
def test_a_damaged_file_is_read_up_to_there(tmp_path: Path, damage: str) -> None:
    write(tmp_path, {"loss": [1.0] * 1000})
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2 + 3])
    elif damage == "flipped":
        middle = len(content) // 2
        content[middle : middle + 60] = bytes(255 - byte for byte in content[middle : middle + 60])
        file.write_bytes(content)
    else:
        file.write_bytes(bytes(content[: len(content) // 2]) + b"\0" * 200)
    run = load_run(tmp_path)
    found = there(run, "loss/total")
    assert 100 < len(found) < 1000
    assert set(found.values()) == {1.0}


def test_an_empty_file_and_one_without_scalars_are_refused(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    with pytest.raises(RecordError, match="no row of numbers is in it"):
        load_run(tmp_path)
    write(tmp_path / "text", {})
    with pytest.raises(RecordError, match="no row of numbers"):
        load_run(tmp_path / "text")
    write(tmp_path / "other", {"fps": [1.0], "images/seen": [1.0]})
    with pytest.raises(RecordError, match=r"no column is known as a loss.*Its columns: fps, images/seen.*--columns"):
        load_run(tmp_path / "other")
    run = read_source(tmp_path / "other", columns={"loss": "fps"})
    assert run.names == ["loss/total"]
    with pytest.raises(UserError, match=r"there is no column 'fp'. Did you mean 'fps'"):
        read_source(tmp_path / "other", columns={"loss": "fp"})
    with pytest.raises(UserError, match=r"'grad_nrm' is no series of ours. Did you mean 'grad_norm'"):
        read_source(tmp_path / "other", columns={"grad_nrm": "fps"})


def test_tensorflows_scalars_are_tensors() -> None:
    content = np.array(2.5, "<f4").tobytes()
    assert scalar(Summary.Value(tag="a", tensor=TensorProto(dtype=1, float_val=[1.5]))) == 1.5
    assert scalar(Summary.Value(tag="a", tensor=TensorProto(dtype=1, tensor_content=content))) == 2.5
    assert scalar(Summary.Value(tag="a", tensor=TensorProto(dtype=7, string_val=[b"x"]))) is None


def test_the_events_of_our_own_runs_keep_their_names(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tb")
    writer = RunWriter(tmp_path / "run.json", RunHeader("mine"), tensorboard=sink)
    names = ["loss/total", "loss/dice/raw", "train/grad_norm", "grads/body/param_norm"]
    steps = np.arange(20)
    writer.append(steps, dict.fromkeys(names, steps.astype(float)))
    writer.finish("completed")
    run = load_run(tmp_path / "tb")
    assert set(run.names()) == set(names)
    assert run.provenance["imported"]["smoothing"] == 1
    assert there(run, "train/grad_norm") == there(run, "loss/dice/raw")
    assert there(run, "loss/dice/raw") == {step: float(step) for step in steps.tolist()}
