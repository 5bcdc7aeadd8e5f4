"""The command line as a user meets it: exit codes, messages, files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bifusion_diag.cli.app import app
from bifusion_diag.record import load_run

Command = Callable[..., tuple[int, str]]
SMALL = [
    "--scale", "small", "--steps", "3", "--batch-size", "1", "--set", "data.scenes=2", "--set", "data.max_points=500",
    "--set", "data.image_height=48", "--set", "data.image_width=64", "--set", "data.superpoint_size=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A baseline and a candidate, trained through the command line."""
    folder = tmp_path_factory.mktemp("runs")
    paths = []
    for preset in ("baseline-5cm", "bifusion"):
        path = folder / f"{preset}.json"
        evaluated = ["--evaluate-every", "2", "--set", "evaluation.scenes=1"]
        options = ["--model", preset, "--probe", "all", *SMALL, *evaluated]
        result = CliRunner().invoke(app, ["train", *options, "--out", str(path)])
        assert result.exit_code == 0, result.output
        paths.append(path)
    return paths[0], paths[1]


def test_train_says_what_it_wrote_and_the_record_says_how(records: tuple[Path, Path]) -> None:
    run = load_run(records[1])
    assert (run.status, len(run.steps), run.header.preset) == ("completed", 3, "bifusion")
    assert list(records[1].with_suffix(".tensorboard").glob("events*"))


def test_compare_writes_report_and_data_and_prints_a_verdict(command: Command, records: tuple[Path, Path]) -> None:
    code, text = command("compare", *records, "--html", "out/report.html", "--json", "out.json")
    assert code == 0, text
    assert text.splitlines()[-2:] == ["data: out.json", "report: out/report.html"]
    assert "not enough data" in text  # three steps are no ground for a verdict
    assert "<html" in Path("out/report.html").read_text()
    assert "mIoU and AP50 on validation scenes" in Path("out/report.html").read_text()
    data = json.loads(Path("out.json").read_text())
    assert '"eval/miou_best"' in json.dumps(data)
    above = next(line for line in text.splitlines() if "Validation mIoU above" in line)
    assert "pass" in above or "fail" in above


def test_report_of_one_run_lands_beside_it_and_leaves_the_record_alone(
    command: Command, records: tuple[Path, Path]
) -> None:
    before = records[0].read_bytes()
    code, text = command("report", records[0])
    assert code == 0, text
    assert records[0].with_name("baseline-5cm.report.html").is_file()
    assert records[0].read_bytes() == before


def test_report_of_a_run_by_its_folder_lies_in_it(command: Command, records: tuple[Path, Path]) -> None:
    Path("mine").mkdir()
    Path("mine/run.json").write_bytes(records[0].read_bytes())
    code, text = command("report", "mine")
    assert (code, text.splitlines()[-1]) == (0, "report: mine/run.report.html"), text
    assert Path("mine/run.report.html").is_file()


def test_report_of_the_record_folder_that_one_stands_in(
    command: Command, records: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = records[1].with_name("bifusion.report.html")
    monkeypatch.chdir(records[1].with_suffix(".record"))
    code, text = command("report", ".")
    assert (code, page.is_file()) == (0, True), text


def test_presets_are_listed_and_one_can_be_printed_as_a_config(command: Command) -> None:
    code, text = command("presets")
    assert (code, "bifusion-fragile" in text) == (0, True)
    code, text = command("presets", "baseline")
    assert (code, "voxel_size: 0.02" in text) == (0, True)


def test_params_are_counted_beside_the_documents_claims(command: Command) -> None:
    code, text = command("params", "--model", "baseline")
    total = next(line for line in text.splitlines() if line.startswith("total"))
    assert (code, total.split()[:3]) == (0, ["total", "41,459,787", "41,459,787"])
    assert "about 41 M (001)" in total
    code, text = command("params", "--model", "mask3d")
    assert (code, "39,638,121" in text, "41 M" in text) == (0, True, False)
    code, text = command("params", "--model", "bifusion", "--set", "scale=small")
    assert (code, "89 M" in text, "(small)" in text) == (0, False, True)
    code, text = command("params", "--model", "bifusion-simple")
    assert (code, "89 M" in text, "encoder.clip" in text) == (0, False, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "bifusoin"], "unknown preset 'bifusoin'. Did you mean 'bifusion'"),
        (["--probe", "grad"], "unknown probe 'grad'. Did you mean 'grads'"),
        (["--set", "optim.lrr=1"], "unknown key 'optim.lrr'. Did you mean 'optim.lr'"),
        (["--data", "no/such/folder"], "no such folder"),
        (["--sparse-engine", "minkovski"], "model.sparse_engine: Input should be 'auto', 'native' or 'minkowski'"),
        (["--steps", "0"], "training.steps: Input should be greater than or equal to 1"),
        (["--clip-weights", "lion2b"], "lion2b"),
        (["--resume"], "give nothing else but --out"),
        (["--val-data", "somewhere"], "only with --evaluate-every"),
        (["--evaluate-every", "2", "--val-data", "no/such/folder"], "no such folder"),
    ],
)
def test_bad_input_to_train_exits_2_with_the_cure_and_writes_nothing(
    command: Command, arguments: list[str], message: str
) -> None:
    given = [*SMALL, *arguments] if "--steps" not in arguments else arguments
    code, text = command("train", *given, "--out", "run.json")
    assert code == 2
    assert message in text
    assert "Traceback" not in text
    assert list(Path.cwd().iterdir()) == []


def test_an_output_that_cannot_be_written_exits_2_before_training(command: Command) -> None:
    Path("file").write_text("in the way")
    code, text = command("train", *SMALL, "--out", "file/run.json")
    assert (code, "cannot be recorded there" in text) == (2, True)
    code, text = command("train", *SMALL, "--out", ".")
    assert (code, "Traceback" in text) == (2, False)


def test_records_that_cannot_be_read_exit_2(command: Command, records: tuple[Path, Path]) -> None:
    whole = records[0].read_text()
    newer = json.loads(whole) | {"schema_version": "9.0"}
    for name, content, message in (
        ("cut.json", whole[: len(whole) // 2], "cut.json"),
        ("newer.json", json.dumps(newer), "9.0"),
        ("other.json", '{"a": 1}', "other.json"),
    ):
        Path(name).write_text(content)
        code, text = command("compare", records[0], name)
        assert (code, message in text, "Traceback" in text) == (2, True, False), text
    code, text = command("report", "missing.json")
    assert (code, "missing.json" in text) == (2, True)
    code, text = command("compare", *records, "--html", ".")
    assert (code, "cannot be written" in text) == (2, True)


def test_the_probes_that_help_names_are_the_catalogues(command: Command) -> None:
    from bifusion_diag.cli.train import PROBES as NAMED
    from bifusion_diag.probes import PROBES

    assert tuple(PROBES) == NAMED
    code, text = command("train", "--help")
    assert (code, [name for name in PROBES if name not in text]) == (0, [])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["compare", "--help"], ["presets"]])
def test_what_needs_no_torch_does_not_import_it(arguments: list[str]) -> None:
    code = (
        "import sys; from bifusion_diag.cli.app import app; app(sys.argv[1:], standalone_mode=False);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'open_clip')))"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_compare_imports_no_torch(records: tuple[Path, Path]) -> None:
    code = (
        "import sys; from bifusion_diag.cli.app import app; app(sys.argv[1:], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    arguments = ["compare", *map(str, records), "--html", "report.html"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_the_main_job_on_real_frames(command: Command, real_frames: Path) -> None:
    """Small models here; ``benchmarks/real_frames.py`` runs the full ones."""
    for preset in ("baseline-5cm", "bifusion"):
        arguments = ["--model", preset, "--scale", "small", "--data", real_frames, "--steps", 4, "--batch-size", 1]
        code, text = command("train", *arguments, "--probe", "all", "--out", f"{preset}.json")
        assert code == 0, text
    run = load_run(Path("bifusion.json"))
    assert run.provenance["labels"] == "geometric pseudo-labels (no ground truth)"
    valid = run.series("projection/valid_share")
    assert valid is not None
    assert valid.value.min() > 0.95  # single views: nearly every point is seen by its own frame
    code, text = command("compare", "baseline-5cm.json", "bifusion.json", "--html", "report.html")
    assert (code, "pseudo-labels" in Path("report.html").read_text()) == (0, True), text


def test_clip_cache_is_filled_and_a_place_that_takes_none_is_named(command: Command) -> None:
    Path("file").write_text("")
    code, text = command("train", *SMALL, "--clip-cache", "file", "--out", "run.json")
    assert (code, Path("run.json").exists(), Path("run.record").exists()) == (2, False, False)
    assert "model.clip.cache_folder: nothing can be kept in file" in text
    assert "Traceback" not in text
    code, text = command("train", *SMALL, "--clip-cache", "kept", "--out", "run.json")
    assert code == 0, text
    assert len(list(Path("kept").rglob("*.safetensors"))) == 2  # one an image: two scenes of one view
