"""CSV exports and tables; what Lightning and Transformers write themselves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from real_logs import train_lightning, train_transformers

from bifusion_diag.record import RecordError, Run, load_run
from bifusion_diag.record.importers import read_source
from bifusion_diag.record.importers.record import ImportedRecord


def there(run: Run | ImportedRecord, name: str) -> dict[int, float]:
    if isinstance(run, ImportedRecord):
        steps, values, missing = run.column(name)
        return dict(zip(steps[~missing].tolist(), values[~missing].tolist(), strict=True))
    series = run.series(name)
    assert series is not None, f"{name} is not there; there are {run.names()}"
    return dict(
        zip(series.steps[series.missing == 0].tolist(), series.value[series.missing == 0].tolist(), strict=True)
    )


def table(text: str, name: str = "a.csv", encoding: str = "utf-8") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tensorboard", [False, True])
def test_what_lightning_logs(tmp_path: Path, tensorboard: bool) -> None:
    pytest.importorskip("lightning.pytorch")
    truth = train_lightning(tmp_path / "logs", tensorboard=tensorboard)
    run = load_run(tmp_path / "logs")
    assert run.header.name == "logs/version_0"
    assert list(there(run, "loss/total")) == list(range(24))
    np.testing.assert_allclose(list(there(run, "loss/total").values()), truth["loss"], rtol=1e-5)
    np.testing.assert_allclose(list(there(run, "train/grad_norm").values()), truth["grad_norm"], rtol=1e-5)
    assert set(there(run, "train/lr").values()) == {float(np.float32(0.01))}
    assert there(run, "eval/miou") == {11: 0.5, 23: 0.5}
    assert run.series("loss/seg_loss/weighted") is not None, "the terms add up to the total"
    imported = run.provenance["imported"]
    assert imported["grad_norm"].startswith("unknown")
    assert "train_loss_epoch" in imported["ignored"]


@pytest.mark.filterwarnings("default")
def test_what_transformers_logs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    truth = train_transformers(tmp_path / "out")
    run = load_run(tmp_path / "out")
    means = np.reshape(truth["loss"], (4, 5)).mean(1)
    assert list(there(run, "loss/total")) == [5, 10, 15, 20]
    np.testing.assert_allclose(list(there(run, "loss/total").values()), means, rtol=1e-4)
    imported = run.provenance["imported"]
    assert (imported["smoothing"], imported["interval"]) == (5, 5)
    assert imported["files"][0].endswith("checkpoint-20/trainer_state.json"), "the last of the two"
    assert any("logging_nan_inf_filter" in note for note in imported["notes"])
    assert (run.status, run.header.steps_planned) == ("completed", 20)
    assert run.series("train/lr") is not None
    assert not any("gradient norm" in note for note in imported["notes"]), "it is that of one step"


def test_an_empty_cell_is_missing_and_nan_is_a_value() -> None:
    run = load_run(table("step,loss,grad_norm,val/miou\n0,1.0,NaN,\n1,,2.0,\n2,nan,inf,0.5\n3,1.5,-inf,\n"))
    total, norm = run.series("loss/total"), run.series("train/grad_norm")
    assert total is not None
    assert norm is not None
    assert total.missing.tolist() == [0, 1, 0, 0]
    assert total.nonfinite.tolist() == [0, 0, 1, 0]
    assert norm.nonfinite.tolist() == [1, 0, 1, 1]
    assert there(run, "eval/miou") == {2: 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "step;loss;lr\n1;0,5;1e-3\n2;0,25;1e-3\n",
        "step\tloss\tlr\n1\t0.5\t0.001\n2\t0.25\t0.001\n",
        "\ufeffStep,Train Loss,Learning Rate\r\n1,0.5,.001\r\n2,2.5E-1,1E-3\r\n",
        '"step","loss","lr"\n"1","0.5","0.001"\n"2","0.25","0.001"\n\n',
        "iteration|total_loss|lr\n1.0|0.5|0.001\n2.0|0.25|0.001\nEOF|a\n",
        "global_step,losses/total_loss,lr\n2,0.25,0.001\n1,0.5,0.001\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_delimiters_decimals_and_names(text: str, encoding: str) -> None:
    run = load_run(table(text, encoding=encoding))
    assert there(run, "loss/total") == {1: 0.5, 2: 0.25}
    assert there(run, "train/lr") == {1: pytest.approx(1e-3), 2: pytest.approx(1e-3)}


def test_exports_of_tensorboard(tmp_path: Path) -> None:
    head = "Wall time,Step,Value\n"
    table(head + "1700000000.5,0,1.5\n1700000001.5,10,NaN\n", "exp/run-.-tag-train_loss.csv")
    table(head + "1700000000.5,0,3\n1700000001.5,10,4\n", "exp/run-.-tag-train_grad_norm.csv")
    run = load_run("exp")
    assert str(there(run, "loss/total")) == str({0: 1.5, 10: math.nan})
    assert there(run, "train/grad_norm") == {0: 3.0, 10: 4.0}
    table(head + "1,0,1\n", "exp/run-other-tag-train_loss.csv")
    with pytest.raises(RecordError, match="2 runs are in it"):
        load_run("exp")
    unnamed = table(head + "1,0,1\n1,1,2\n", "download.csv")
    with pytest.raises(RecordError, match="--columns loss=NAME"):
        load_run(unnamed)
    assert there(read_source(unnamed, columns={"loss": "Value"}), "loss/total") == {0: 1.0, 1: 2.0}


def test_exports_of_weights_and_biases() -> None:
    one = '"Step","lively-sun-1 - train/loss","lively-sun-1 - train/loss__MIN","lively-sun-1 - train/loss__MAX"\n'
    run = load_run(table(one + '"0","1.5","1.5","1.5"\n"1","NaN","NaN","NaN"\n"2","","",""\n'))
    assert str(there(run, "loss/total")) == str({0: 1.5, 1: math.nan})
    assert run.provenance["imported"]["smoothing"] == 0
    run = load_run(table(one + '"0","1.5","1","2"\n"100","3","2","4"\n"200","3","2","4"\n'))
    assert run.provenance["imported"]["smoothing"] == 100, "a bucket's mean"
    two = '"Step","a-b - loss","a-b - loss__MIN","a-b - loss__MAX","c - loss","c - loss__MIN","c - loss__MAX"\n'
    path = table(two + '"0","1","1","1","2","2","2"\n')
    with pytest.raises(RecordError, match=r"2 runs in one file: 'a-b', 'c'\..*--columns loss=\"a-b - loss\""):
        load_run(path)
    assert there(read_source(path, columns={"loss": "c - loss"}), "loss/total") == {0: 2.0}


def test_steps_from_epochs_and_iterations() -> None:
    text = "epoch,iter,loss\n" + "".join(f"{epoch},{i},{epoch}.{i}\n" for epoch in (1, 2, 3) for i in range(4))
    run = load_run(table(text))
    assert list(there(run, "loss/total")) == list(range(12))
    assert there(run, "loss/total")[6] == pytest.approx(2.2)
    run = load_run(table("Epoch,train_loss,val_loss,val_mIoU\n1,0.5,0.6,41.5\n2,0.4,0.5,43.0\n"))
    assert there(run, "loss/total") == {1: pytest.approx(0.5), 2: pytest.approx(0.4)}
    assert there(run, "eval/miou") == {1: pytest.approx(0.415), 2: pytest.approx(0.43)}
    assert any("only epochs" in note for note in run.provenance["imported"]["notes"])
    run = load_run(table("loss,acc\n3,0.1\n2,0.2\n"))
    assert there(run, "loss/total") == {0: 3.0, 1: 2.0}
    record = read_source(table("e,k,my_loss\n0,5,1\n0,6,2\n"), columns={"loss": "my_loss", "step": "k"})
    assert there(record, "loss/total") == {5: 1.0, 6: 2.0}


def test_names_with_markup_and_control_characters_stay_text() -> None:
    name = "loss_<script>alert(1)</script>\x1b[31m\u202e"
    record = read_source(table(f"step,loss,{name}\n0,1,1\n1,1,2\n"), name="<b>\x1b[2Jx</b>")
    (term,) = (name for name in record.names if name.endswith("/raw"))
    assert term == "loss/loss_<script>alert(1)<.script>\\x1b[31m\\u202e/raw"
    assert record.state.header.name == "<b>\\x1b[2Jx</b>"
    assert all(text.isprintable() for text in record.state.header.provenance["imported"]["renamed"])


def test_a_norm_that_stands_at_its_bound_was_clipped() -> None:
    rows = "".join(f"{step},{min(10.0, 2.0 + step)}\n" for step in range(40))
    imported = load_run(table("step,gradient_norm\n" + rows)).provenance["imported"]
    assert imported["grad_norm"].startswith("after clipping, it seems: 80% of its values equal the largest one, 10")
    rows = "".join(f"{step},{2.0 + step}\n" for step in range(40))
    imported = load_run(table("step,gradient_norm\n" + rows)).provenance["imported"]
    assert imported["grad_norm"] == "unknown whether before or after clipping"
    imported = load_run(table("step,grad_norm_clipped,grad_norm_before_clip\n0,1,5\n1,1,6\n")).provenance["imported"]
    assert imported["renamed"] == {"grad_norm_before_clip": "train/grad_norm"}
    assert imported["grad_norm"] == "before clipping"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a run record, nor a log that is known"),
        ("1,2,3\n4,5,6\n", "not a run record"),
        ("step,loss\n", "no row of numbers"),
        ("step,loss\nx,y\n", "no row of numbers"),
        ("step,colour\n1,2\n", "Its columns: colour"),
    ],
)
def test_what_is_no_log_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read_source(table(text))


def test_a_folder_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    table("hello", "notes/readme.txt")
    with pytest.raises(RecordError, match=r"Looked for: a run.json.*scalars.json.*Found: readme.txt"):
        load_run("notes")
    with pytest.raises(RecordError, match="as tensorboard"):
        read_source(table("step,loss\n0,1\n").parent, format="tensorboard")
