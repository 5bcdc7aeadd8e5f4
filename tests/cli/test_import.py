"""``bifusion-diag import``, and compare and report on what others have logged, alone and beside our own records."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from bifusion_diag.diagnosis import NotMeasured, assess_run, compare_runs, load_measured
from bifusion_diag.record import RunHeader, RunWriter, load_run

Command = Callable[..., tuple[int, str]]
SCHEMA = Path(__file__).parents[2] / "bifusion_diag" / "record" / "run.schema.json"
STEPS = 120


def norms(spike: int | None = None) -> list[float]:
    values = np.exp(np.random.default_rng(3).normal(0, 0.1, STEPS))
    if spike is not None:
        values[spike] *= 100
    return values.tolist()


def work_dir(name: str, *, nan_at: int | None = None, window: int = 1) -> Path:
    """An MMEngine work dir with every iteration in it, in the form that its LocalVisBackend writes."""
    folder = Path(name) / "20260101_000000" / "vis_data"
    folder.mkdir(parents=True)
    (folder / "config.py").write_text(
        f"log_processor = dict(window_size={window})\ntitle = '<img src=x onerror=alert(1)>'\n"
    )
    rows = []
    for step, norm in enumerate(norms(), 1):
        bad = nan_at is not None and nan_at <= step < nan_at + window
        term = float("nan") if bad else 1.0
        rows.append({"lr": 1e-4, "loss": term + 0.5, "inst_loss": term, "seg_loss": 0.5, "grad_norm": norm, "time": 0.1,
                     "<script>alert(1)</script>_loss": 0.0, "epoch": 1, "iter": step, "step": step})  # fmt: skip
    (folder / "scalars.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(name)


def own(path: str) -> Path:
    """A record of ours of the same number of steps."""
    writer = RunWriter(Path(path), RunHeader("ours"))
    ones = np.ones(STEPS)
    columns = {"loss/total": ones, "loss/inst_loss/raw": ones, "train/grad_norm": np.array(norms(60))}
    writer.append(np.arange(STEPS), columns)
    writer.finish("completed")
    return Path(path)


def test_import_writes_a_run_and_says_what_is_what(command: Command) -> None:
    source = work_dir("esam", nan_at=40, window=10)
    code, said = command("import", source, "--out", "run.json", "--name", "my run")
    assert code == 0, said
    for line in (
        "my run: MMEngine, 120 logged steps from 1 to 120, usually every 1",
        "loss/inst_loss/raw",
        "← inst_loss",
        "smoothing: 10 steps (log_processor of the configuration)",
        "10 logged values are not finite. As means, they say that 1 step was not finite (40).",
        "train/clip_coefficient: whether and how far gradients were clipped",
        "validation: no column is a metric",
        "run: run.json",
    ):
        assert line in said
    document = json.loads(Path("run.json").read_text())
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    run, direct = load_run("run.json"), load_run(source)
    assert run.header.name == "my run"
    assert run.names() == direct.names()
    total, again = run.series("loss/total"), direct.series("loss/total")
    assert total is not None
    assert again is not None
    np.testing.assert_array_equal(total.value, again.value)
    assert "readings" in run.measures
    assert run.provenance["imported"]["from"] == "esam"


@pytest.mark.parametrize("imported", [False, True])
def test_compare_and_report_of_logs_end_to_end(command: Command, imported: bool) -> None:
    good, bad = work_dir("good"), work_dir("bad", nan_at=40)
    if imported:
        for folder in (good, bad):
            assert command("import", folder, "--out", f"{folder}.json")[0] == 0
        good, bad = Path("good.json"), Path("bad.json")
    code, said = command("report", bad, "--html", "r.html", "--json", "r.json")
    assert code == 0, said
    measures = assess_run(load_measured(bad)).measures
    assert measures.number("nonfinite_steps") == 1
    assert measures.number("first_nonfinite_step") == 40
    assert isinstance(measures.readings["clipped_share"], NotMeasured)
    code, said = command("compare", good, bad, "--html", "c.html", "--json", "c.json")
    assert code == 0, said
    assert "bad is less stable than good: 1 bad step" in said
    for page in ("r.html", "c.html"):
        text = Path(page).read_text(encoding="utf-8")
        assert "<script>alert" not in text
        assert "<img src=x" not in text


def test_compare_of_a_log_and_a_record_of_ours(command: Command) -> None:
    code, said = command("compare", own("ours.json"), work_dir("theirs"), "--html", "c.html", "--json", "c.json")
    assert code == 0, said
    comparison = compare_runs(load_measured("ours.json"), load_measured("theirs"))
    assert (comparison.baseline.name, comparison.candidate.name) == ("ours", "theirs")
    assert comparison.baseline.measures.spikes == (60,)
    assert comparison.candidate.measures.spikes == ()
    for text in ("ours", "theirs"):
        assert text in Path("c.json").read_text(encoding="utf-8")
        assert text in Path("c.html").read_text(encoding="utf-8")


def test_ours_goes_before_others_in_a_folder(command: Command) -> None:
    source = work_dir("both")
    own("both/bifusion-diag/run.json")
    assert load_run(source).header.name == "ours"
    own("both/run.json")
    assert load_run(source).header.name == "ours"
    code, said = command("import", source, "--out", "log.json")
    assert code == 0, said
    assert load_run("log.json").header.name == "both", "import reads what is not ours"


def test_columns_smoothing_and_format(command: Command) -> None:
    Path("a.csv").write_text("k,my_loss,other,gn\n" + "".join(f"{k},{k},1,2\n" for k in range(20)))
    arguments = ("import", "a.csv", "--out", "a.json", "--columns", "loss=my_loss,step=k", "--columns", "grad_norm=gn")
    code, said = command(*arguments, "--smoothing", 5, "--format", "csv")
    assert code == 0, said
    assert "smoothing: 5 steps (as was said (--smoothing))" in said
    assert "ignored: other" in said
    assert load_run("a.json").names() == ["loss/total", "train/grad_norm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent", "--out", "a.json"), "there is no such file or folder"),
        (("a.csv", "--out", "a.txt"), "ends in .json, such as a.json"),
        (("esam/20260101_000000/vis_data/scalars.json", "--out", "esam/20260101_000000/vis_data/scalars.json"),
         "that is the log itself"),
        (("a.csv", "--out", "a.json", "--columns", "loss"), "expected ours=theirs"),
        (("a.csv", "--out", "a.json", "--columns", "los=loss"), "'los' is no series of ours. Did you mean 'loss'"),
        (("a.csv", "--out", "a.json", "--columns", "loss=l0ss"), "there is no column 'l0ss'. Did you mean 'loss'"),
        (("a.csv", "--out", "a.json", "--format", "tensorbord"), "Did you mean 'tensorboard'"),
        (("empty", "--out", "a.json"), "Found: an empty folder"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_words(command: Command, arguments: tuple[str, ...], message: str) -> None:
    work_dir("esam")
    Path("empty").mkdir()
    Path("a.csv").write_text("step,loss\n0,1\n")
    code, said = command("import", *arguments)
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not Path("a.json").exists()


def test_the_commands_of_the_docs(command: Command) -> None:
    work_dir("work_dirs/esam_sv_scannet200")
    work_dir("work_dirs/baseline")
    work_dir("work_dirs/bifusion")
    own("run.json")
    Path("metrics.csv").write_text("iteration,my_loss\n" + "".join(f"{k},{k}\n" for k in range(20)))
    page = (Path(__file__).parents[2] / "docs" / "import.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    assert len(lines) == 5
    for program, *arguments in lines:
        assert program == "bifusion-diag"
        code, said = command(*arguments)
        assert code == 0, said
    assert load_run("esam.json").header.name == "ESAM, last month"
