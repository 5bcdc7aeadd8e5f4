"""`compare` as users and CI jobs meet it: sides, gates, exit codes, 30 lines. The records are real small trainings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bifusion_diag.cli.app import app
from bifusion_diag.probes import Monitor

Command = Callable[..., tuple[int, str]]
STEPS = 80


def train(path: Path, seed: int, bad: tuple[int, ...] = (), lr: float = 0.01, steps: int = STEPS) -> Path:
    """Train a small network; at the bad steps its batch holds an infinity, and the update is left out."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    settings = {"optim": {"lr": lr}, "training": {"seed": seed, "batch_size": 16}}
    with Monitor(model, optimizer, probes=["grads", "losses"], out=path, settings=settings) as monitor:
        for step in range(steps):
            inputs = torch.randn(16, 4)
            if step in bad:
                inputs[0, 0] = float("inf")
            optimizer.zero_grad()
            with monitor.step(inputs):
                loss = (model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
                monitor.losses({"fit": loss})
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                if torch.isfinite(norm):
                    optimizer.step()
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three seeds of a calm run, three of one with bad steps."""
    folder = tmp_path_factory.mktemp("compared")
    found = {f"calm{seed}": train(folder / f"calm{seed}.json", seed) for seed in range(3)}
    bad = ((20, 30, 40), (25, 50), (33, 44, 55, 66))
    return found | {f"bad{seed}": train(folder / f"bad{seed}.json", seed, bad[seed], lr=0.02) for seed in range(3)}


def test_exit_codes_of_gates(command: Command, runs: dict[str, Path]) -> None:
    calm, bad = runs["calm0"], runs["bad0"]
    for gate, expected in {
        "nonfinite_steps>0": 1,
        "nonfinite_steps>3": 0,
        "nonfinite_steps>=3": 1,
        "grad_norm/p99<1e9": 1,
        "spike_rate>0.5": 0,
        "ratio:nonfinite_steps>2": 1,  # 3 against none
        "finding:error": 1,
        "finding:nonfinite-gradient": 0,  # the loss is non-finite already
        "finding:nonfinite-loss": 1,
        "criterion:grad_norm": 1,
        "criterion:miou": 1,  # not measured is never fine
        "gate/mean>0.9": 1,
        "worse": 1,
        "unstable": 1,
    }.items():
        code, text = command("compare", calm, bad, "--fail-on", gate)
        assert (code, f"--fail-on {gate}: " in text) == (expected, True), (gate, text)
    for gate in ("worse", "unstable", "finding:error", "nonfinite_steps>0", "ratio:nonfinite_steps>1"):
        code, text = command("compare", calm, runs["calm1"], "--separate", "--fail-on", gate)
        assert code == 0, (gate, text)
    for gate in ("criterion:miou", "gate/mean>0.9"):
        code, text = command("compare", calm, bad, "--fail-on", gate, "--allow-unmeasured")
        assert (code, "not measured: " in text) == (0, True), text


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("spike_rat>0.01", "there is no measure 'spike_rat'. Did you mean 'spike_rate'"),
        ("grad_norm/p98>1", "Did you mean"),
        ("spike_rate>a", "'a' is no number"),
        ("spike_rate", "no such gate"),
        ("wors", "Did you mean 'worse'"),
        ("finding:gradient-spik", "Did you mean 'gradient-spike'"),
        ("criterion:mio", "Did you mean 'miou'"),
    ],
)
def test_a_gate_that_is_not_there_exits_2(command: Command, runs: dict[str, Path], gate: str, message: str) -> None:
    code, text = command("compare", runs["calm0"], runs["bad0"], "--fail-on", gate)
    assert (code, message in text, "Traceback" in text) == (2, True, False), text


def test_seeds_are_put_together_and_tested_over_runs(command: Command, runs: dict[str, Path]) -> None:
    code, text = command("compare", *runs.values(), "--fail-on", "worse", "--json", "out.json")
    assert code == 1, text
    assert "less stable" in text
    assert "permutation test over runs, one-sided: p = 0.05" in text  # 1 of 20 ways
    (side,) = json.loads(Path("out.json").read_text())["sides"]
    assert side["baseline"]["why"] == "3 runs whose settings are equal but for the seed (0, 1, 2)"
    assert [len(side[name]["runs"]) for name in ("baseline", "candidate")] == [3, 3]
    assert (side["tested"][0]["measure"], side["tested"][0]["p"]) == ("bad_steps", pytest.approx(0.05))
    assert side["gates"][0]["failed"] is True
    assert side["suspects"][0]["key"] == "optim.lr"
    assert side["attribution"]


def test_sides_can_be_made_by_hand(command: Command, runs: dict[str, Path]) -> None:
    group = f"loud={runs['bad0']},{runs['bad1']},{runs['bad2']}"
    code, text = command(
        "compare", runs["calm0"], "--baseline", runs["calm1"], "--baseline", runs["calm2"], "--group", group,
        "--json", "out.json", "--fail-on", "nonfinite_steps>2.9",
    )  # fmt: skip
    assert (code, "loud is less stable than" in text, "mean of 3 runs" in text) == (1, True, True), text
    (side,) = json.loads(Path("out.json").read_text())["sides"]
    assert "put together by hand" in side["candidate"]["why"]
    code, text = command("compare", runs["calm0"], *(runs[f"bad{i}"] for i in range(3)), "--separate")
    assert (code, text.count("Compared: one run a side")) == (0, 3), text
    for arguments, message in (
        (["--group", "loud"], "NAME=PATH"),
        ([], "nothing to compare"),
        ([runs["bad0"], "--align", "sampels"], "Did you mean 'samples'"),
        ([runs["bad0"], "--align", "epoch"], "does not tell how many scenes an epoch has"),
        ([runs["bad0"], "--lang", "xx"], "--lang xx"),
        ([runs["bad0"], "--threshold", "spike_rat=1"], "Did you mean 'spike_rate'"),
    ):
        code, text = command("compare", runs["calm0"], *arguments)
        assert (code, message in text, "Traceback" in text) == (2, True, False), text


def test_thresholds_are_passed_on(command: Command, runs: dict[str, Path]) -> None:
    arguments = ["compare", runs["calm0"], runs["calm1"], "--separate"]
    assert "stable over 80 steps" in command(*arguments)[1]
    assert "takes 100 steps" in command(*arguments, "--threshold", "min_steps=100")[1]


def test_the_verdict_fits_30_lines_of_100_columns_and_verbose_has_all(runs: dict[str, Path]) -> None:
    gates = [word for gate in ("worse", "spike_rate>0.01", "finding:error") for word in ("--fail-on", gate)]

    def printed(*arguments: object) -> list[str]:
        done = CliRunner().invoke(app, ["compare", *map(str, arguments), *gates], env={"COLUMNS": "100"})
        assert done.exit_code == 1, done.output
        return done.output.splitlines()

    for paths in (list(runs.values()), [runs["calm0"], runs["bad0"]]):
        lines = printed(*paths, "--json", "out.json")
        assert len(lines) <= 30, "\n".join(lines)
        assert max(map(len, lines)) <= 100
        assert lines[-1] == "data: out.json"
        assert any("nonfinite-loss" in line for line in lines)
        assert sum("--fail-on" in line for line in lines) == 3
        whole = printed(*paths, "--verbose")
        assert not any("…" in line for line in whole)
        assert "what another seed would do" in " ".join(whole) or "Runs were resampled and dealt" in " ".join(whole)


@pytest.mark.parametrize("columns", [80, 100])
def test_nothing_in_the_table_is_cut_to_the_same(runs: dict[str, Path], columns: int) -> None:
    def printed(*arguments: object) -> list[str]:
        done = CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": str(columns)})
        assert done.exit_code == 0, done.output
        lines = done.output.splitlines()
        assert lines[0] == "Verdict: less stable"
        assert max(map(len, lines)) <= columns
        return lines

    for paths in (list(runs.values()), [runs["calm0"], runs["bad0"]]):
        lines = printed(*paths)
        head = next(place for place, line in enumerate(lines) if line.startswith("   "))
        tail = next(place for place, line in enumerate(lines) if line.startswith("error "))
        titles = [re.split(r" {2,}", line)[0] for line in lines[head + 1 : tail]]
        assert len(set(titles)) == len(titles) > 6, titles
        assert all("…" not in line[-30:] for line in lines[head + 1 : tail]), "a value is cut"
        assert "…" not in lines[head] or len(paths) == 2
    assert not any("-" in line and "Share of the difference" in line for line in lines)


def test_what_the_candidate_has_less_of_is_not_blamed(runs: dict[str, Path]) -> None:
    """Against a run with bad steps the calm one has less of everything."""
    done = CliRunner().invoke(app, ["compare", str(runs["bad0"]), str(runs["calm0"])], env={"COLUMNS": "100"})
    assert "-" not in "".join(line for line in done.output.splitlines() if "Share of the difference" in line)
    assert done.output.startswith("Verdict: stable\n")


def test_a_run_twice_on_a_side_is_refused(command: Command, runs: dict[str, Path]) -> None:
    code, text = command("compare", runs["calm0"], "--group", f"g={runs['bad0']},{runs['bad0'].with_suffix('.record')}")
    assert (code, "is there more than once" in text) == (2, True), text


def logged(folder: Path, bad: tuple[int, ...], interval: int) -> Path:
    """A work dir of MMEngine: 600 steps, means over 10 of them, a row every so many."""
    rng = np.random.default_rng(0)
    terms = {"seg_loss": rng.lognormal(0, 0.1, 600), "inst_loss": rng.lognormal(-1, 0.1, 600)}
    terms["inst_loss"][[step - 1 for step in bad]] = np.nan
    values = {**terms, "loss": sum(terms.values()), "grad_norm": rng.lognormal(0, 0.3, 600)}
    rows: list[dict[str, float]] = []
    for step in range(interval, 601, interval):
        means = {name: float(np.mean(one[max(0, step - 10) : step])) for name, one in values.items()}
        rows.append({**means, "lr": 1e-4, "epoch": 1 + (step - 1) // 300, "iter": step, "step": step})
        if step % 300 == 0:
            rows.append({"miou": 0.5, "step": step // 300})
    place = folder / "20260101_000000" / "vis_data"
    place.mkdir(parents=True)
    (place / "scalars.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "config.py").write_text("log_processor = dict(type='LogProcessor', window_size=10)\n")
    return folder


def test_two_imported_runs_say_what_such_logs_cannot_tell(
    command: Command, runs: dict[str, Path], tmp_path: Path
) -> None:
    calm, bad = logged(tmp_path / "calm", (), 1), logged(tmp_path / "bad", (200, 300), 1)
    code, text = command("compare", calm, bad, "--fail-on", "unstable", "--verbose")
    assert (code, "at least 2 bad steps in 600 (smoothed over 10" in text) == (1, True), text
    assert "Of 20 logged rows that are bad, 20 start in loss term inst_loss." in text  # each step is in ten means
    assert "bad steps that start there" not in text  # rows are no counts
    assert "Which scenes the runs were evaluated on is not recorded" in text
    assert "--fail-on unstable: By themselves, 1 of 1 runs are unstable (baseline 0 of 1)" in text
    assert "chance" not in text
    far = logged(tmp_path / "far", (199, 345, 346), 50)
    text = command("compare", calm, far, "--verbose")[1]
    assert "at least 2 bad steps in 12 (smoothed over 10" in text  # 191-200 and 341-350 have no step in common
    assert "The candidate's log has a row every 50 steps: nothing is known of the other 40." in text
    text = command("compare", runs["calm0"], bad)[1]
    assert "Suspect" not in text  # neither record knows the other's names of settings


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_record_is_not_written_over(command: Command, runs: dict[str, Path], option: str) -> None:
    before = runs["bad0"].read_bytes()
    for paths in ((runs["calm0"], runs["bad0"]), runs.values()):
        code, text = command("compare", *paths, option, runs["bad0"])
        assert (code, "that is one of the records" in text) == (2, True), text
    code, text = command("report", runs["bad0"], "--html", runs["bad0"])
    assert (code, "that is one of the records" in text) == (2, True), text
    assert runs["bad0"].read_bytes() == before
