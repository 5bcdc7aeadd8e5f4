"""The lines of a run that goes on, against the numbers that were recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.record import ModuleInfo, RecordFollower, RunHeader, RunWriter
from bifusion_diag.reports.live import (
    BAD,
    BARS,
    duration,
    live_lines,
    module_series,
    silence,
    sparkline,
    status_line,
)
from bifusion_diag.reports.numbers import text as number

MODULES = (
    "encoder.backbone.block1.0.conv1",
    "encoder.gate",
    "decoder.layers.0.cross_attention.attention",
    "decoder.out",
)
STEPS = 200
BAD_FROM = 190  # non-finite from here on
RNG = np.random.default_rng(3)


def columns() -> dict[str, np.ndarray]:
    step = np.arange(STEPS)
    norms = {name: np.exp(RNG.normal(size=STEPS, scale=0.1)) * 10.0**-i for i, name in enumerate(MODULES)}
    norms["encoder.gate"][-1] *= 20
    norms["decoder.out"][BAD_FROM:] = np.nan
    norms["decoder.layers.0.cross_attention.attention"][BAD_FROM + 3] = np.inf
    gradients: dict[str, np.ndarray] = {}
    for name, norm in norms.items():
        gradients[f"grads/{name}/param_norm"] = norm
        gradients[f"grads/{name}/state"] = np.where(np.isfinite(norm), 3, 4)
        gradients[f"activations/{name}/absmax"] = np.full(STEPS, 5.0)
    total = 3 - step / 100 + RNG.random(STEPS)
    total[BAD_FROM] = np.nan
    return {
        "loss/total": total,
        "loss/mask/raw": 1 + RNG.random(STEPS),
        "loss/mask/weighted": 2 + RNG.random(STEPS),
        "train/grad_norm": np.where(step == 150, 900.0, 1.5 + RNG.random(STEPS)),
        "train/lr": 1e-4 * (1 - step / STEPS),
        "train/step_seconds": np.full(STEPS, 0.25),
        **gradients,
    }


@pytest.fixture
def recorded() -> dict[str, np.ndarray]:
    return {name: values.astype(np.float32) for name, values in columns().items()}


@pytest.fixture
def writer(tmp_path: Path, recorded: dict[str, np.ndarray]) -> RunWriter:
    """A run under way: 200 of 1000 steps in blocks of 20."""
    modules = [ModuleInfo(name, "Linear", i, name.split(".")[0], 10, 10) for i, name in enumerate(MODULES)]
    writer = RunWriter(tmp_path / "run.json", RunHeader(name="[b]run[/x]", steps_planned=1000, modules=modules))
    for begin in range(0, STEPS, 20):
        rows = np.arange(begin, begin + 20)
        writer.append(rows, {name: values[rows] for name, values in recorded.items()})
    writer.event(0, "stage", "stage heads: only the heads learn")
    writer.event(150, "spike", "spike of the pre-clip grad norm: 900", scenes=["room_1", "room_2"])
    writer.event(190, "non-finite", "non-finite loss term mask; pre-clip grad norm 2", scenes=["room_3"])
    writer.flush()
    return writer


def lines_of(run: RecordFollower, width: int, height: int | None = None, top: int = 5) -> list[str]:
    assert run.written is not None
    lines = live_lines(run, module_series(run), now=run.written + 4, width=width, height=height, top=top)
    assert all(line.cell_len <= width for line in lines)
    assert height is None or len(lines) <= height
    return [line.plain for line in lines]


def follow(writer: RunWriter, window: int = 100) -> RecordFollower:
    run = RecordFollower(writer.folder, window)
    writer.finish("failed")
    return run


def row(lines: list[str], label: str) -> list[str]:
    (line,) = [line for line in lines if line.strip().startswith(label + " ")]
    return line.strip()[len(label) :].split()


def test_what_is_seen(writer: RunWriter, recorded: dict[str, np.ndarray]) -> None:
    run = follow(writer)
    lines = lines_of(run, 100)
    text = "\n".join(lines)
    assert lines[0] == "[b]run[/x]  running"
    assert lines[1].startswith("step 200 of 1\u202f000  ━")
    assert lines[1].endswith(" 20 %")
    assert lines[2] == "0.250 s/step · 4.00 steps/s · 3 min left · last block 4 s ago"  # 800 steps of 0.25 s
    for label, name in (
        ("loss/total", "loss/total"),
        ("mask", "loss/mask/raw"),
        ("train/grad_norm", "train/grad_norm"),
        ("train/lr", "train/lr"),
        ("train/step_seconds", "train/step_seconds"),
    ):
        values = recorded[name][-100:].astype(np.float64)
        shown = [number(float(x)) for x in (values[-1], np.nanmin(values), np.nanmax(values))]
        assert row(lines, label)[:3] == shown
    assert (
        text.index("incidents  1 spike, 1 non-finite") < text.index("190  non-finite loss") < text.index("150  spike")
    )
    assert "room_1, room_2" in text
    assert "only the heads learn" not in text


def test_the_modules_that_matter_come_first(writer: RunWriter, recorded: dict[str, np.ndarray]) -> None:
    run = follow(writer)
    lines = lines_of(run, 100)
    bad = lines.index("not finite  modules in these steps: 2; since when, how often")
    assert lines[bad + 1] == "190  10 ×  decoder.out  param_norm"
    assert lines[bad + 2] == "193   1 ×  decoder.layers.0.cross_attention.attention  param_norm"
    gate = recorded["grads/encoder.gate/param_norm"].astype(np.float64)
    growth = gate[-1] / np.median(gate[-51:-1])
    growing = next(i for i, line in enumerate(lines) if line.startswith("growing fastest"))
    assert row([lines[growing + 1]], "encoder.gate param_norm")[:3] == [number(gate[-1]), number(growth), "×"]
    largest = next(i for i, line in enumerate(lines) if line.startswith("largest gradients"))
    ranked = sorted(MODULES[:3], key=lambda name: -recorded[f"grads/{name}/param_norm"][-1])
    assert [line.split()[0] for line in lines[largest + 1 :]] == ranked  # decoder.out is not finite


@pytest.mark.parametrize("width", [30, 60, 80, 119, 120, 240])
def test_any_width(writer: RunWriter, width: int) -> None:
    run = follow(writer)
    whole = lines_of(run, width)
    assert any("loss/total" in line for line in whole)
    if width >= 60:
        assert any(line.rstrip().endswith(tuple(BARS)) for line in whole if line.startswith("train/lr"))


def test_a_narrow_terminal_has_whole_numbers_and_the_course(writer: RunWriter) -> None:
    wide = row(lines_of(follow(writer), 120), "train/lr")
    narrow = row(lines_of(follow(writer), 40), "train/lr")
    assert narrow[0] == wide[0]
    assert len(narrow) == 2
    assert len(narrow[1]) >= 8
    assert set(narrow[1]) <= set(BARS)


@pytest.mark.parametrize("width", [30, 60, 80, 119, 120, 240])
def test_any_height(writer: RunWriter, width: int) -> None:
    run = follow(writer)
    whole = lines_of(run, width)
    for height in (3, 12, 24):
        assert lines_of(run, width, height)[:3] == whole[:3]
    assert len(lines_of(run, width, top=1)) < len(whole)


def test_wide_terminals_have_the_lists_side_by_side(writer: RunWriter) -> None:
    run = follow(writer)
    assert any("growing fastest" in line and "largest gradients" in line for line in lines_of(run, 120))
    assert not any("growing fastest" in line and "largest gradients" in line for line in lines_of(run, 119))


def test_before_the_first_block(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.json", RunHeader(name="run")) as writer:
        run = RecordFollower(writer.folder)
        lines = [line.plain for line in live_lines(run, [], now=run.begun + 9, width=80)]
        assert lines[:3] == ["run  running", "step 0", "no block yet, begun 9 s ago"]
        assert lines[-1] == "incidents  none so far"
        assert status_line(run, now=run.begun + 9) == "run: running, step 0, no incidents, no block yet, begun 9 s ago"


def test_silence_is_told_by_the_runs_own_pace(writer: RunWriter) -> None:
    run = follow(writer)
    assert run.written is not None
    assert silence(run, run.written + 59) == ""
    assert silence(run, run.written + 180) == "no new block for 3 min: stalled or killed?"
    status = status_line(run, now=run.written + 180)
    assert status.endswith("no new block for 3 min: stalled or killed?")
    assert "left" not in status
    slow = run.names.index("train/step_seconds")
    run.values[:, slow] = 20.0  # a block of 20 steps then takes 400 s
    assert silence(run, run.written + 1900) == ""
    assert silence(run, run.written + 2100) == "no new block for 35 min: stalled or killed?"
    run.poll()
    assert run.status == "failed"
    assert silence(run, run.written + 10**6) == ""


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), RunWriter(tmp_path / "run.json", RunHeader(name="run")):
        raise ValueError("boom\nsecond line")
    run = RecordFollower(tmp_path / "run.record")
    lines = [line.plain for line in live_lines(run, [], now=0, width=80)]
    assert lines[:2] == ["run  failed", "ValueError: boom"]


def test_sparklines_keep_spikes_and_mark_what_is_not_finite() -> None:
    flat = np.ones(1000, np.float32)
    assert sparkline(flat, 10).plain == BARS[0] * 10
    flat[555] = 1e6
    assert sparkline(flat, 10, norm=True).plain == BARS[0] * 5 + BARS[-1] + BARS[0] * 4
    flat[999] = np.nan
    assert sparkline(flat, 10, norm=True).plain == BARS[0] * 5 + BARS[-1] + BARS[0] * 3 + BAD
    assert sparkline(np.float32([1, 2, 3]), 10).plain == BARS[0] + BARS[3] + BARS[-1]
    assert sparkline(np.float32([np.nan, np.inf]), 10).plain == BAD * 2
    assert sparkline(np.float32([0, 1]), 10, norm=True).plain == BARS[0] + BARS[-1]  # zero has no logarithm
    assert sparkline(np.zeros(0, np.float32), 10).plain == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (59.4, "59 s"), (119, "119 s"), (120, "2 min"), (3599, "59 min"), (5400, "1 h 30 min"),
     (86_400 * 2 + 7300, "2 d 2 h")],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
