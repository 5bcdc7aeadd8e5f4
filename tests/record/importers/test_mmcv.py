"""Logs in the form of MMCV before 2.0, written here as its TextLoggerHook does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bifusion_diag.record import load_run

PER_EPOCH = 117
INTERVAL = 50
HEAD = """\
2022-03-04 01:22:30,100 - mmdet - INFO - Environment info:
------------------------------------------------------------
sys.platform: linux
Python: 3.8.12 (default, Oct 12 2021, 13:49:34) [GCC 7.5.0]
CUDA available: True
GPU 0,1: NVIDIA A100-SXM4-40GB
PyTorch: 1.10.0
MMCV: 1.4.2
------------------------------------------------------------

2022-03-04 01:22:31,200 - mmdet - INFO - Config:
optimizer = dict(type='AdamW', lr=0.0001)
optimizer_config = dict(grad_clip=dict(max_norm=35, norm_type=2))
runner = dict(type='EpochBasedRunner', max_epochs=3)
log_config = dict(
    interval=50,
    hooks=[dict(type='TextLoggerHook')])

2022-03-04 01:22:33,251 - mmdet - INFO - workflow: [('train', 1)], max: 3 epochs
"""
ROW = (
    "2022-03-04 01:{minute:02d}:33,251 - mmdet - INFO - Epoch [{epoch}][{inner}/{per}]\tlr: {lr:.3e}, eta: 1 day, "
    "9:44:51, time: 0.991, data_time: 0.026, memory: 10150, loss_cls: {cls:.4f}, loss_bbox: {bbox}, acc: 92.5938, "
    "loss: {loss}, grad_norm: 4.9155\n"
)
VALIDATION = (
    "2022-03-04 02:00:00,000 - mmdet - INFO - Epoch(val) [{epoch}][40]\tbbox_mAP: 0.{epoch}000, bbox_mAP_50: 0.2500, "
    "bbox_mAP_copypaste: 0.100 0.250 0.050 -1.000 0.060 0.170\n"
)


def rows() -> list[tuple[int, int, float]]:
    return [(epoch, inner, 10.0 * epoch + inner / 100) for epoch in (1, 2, 3) for inner in (50, 100)]


def text_log() -> str:
    text = HEAD
    for epoch, inner, value in rows():
        bad = (epoch, inner) == (2, 50)
        text += ROW.format(
            epoch=epoch, inner=inner, per=PER_EPOCH, lr=1e-4, minute=inner // 10, cls=value,
            bbox="nan" if bad else "1.0000", loss="nan" if bad else f"{value + 1:.4f}",
        )  # fmt: skip
        if inner == 100:
            text += VALIDATION.format(epoch=epoch)
    return text


def json_log() -> str:
    lines = [json.dumps({"env_info": "sys.platform: linux\nPyTorch: 1.10.0\nMMCV: 1.4.2", "seed": 7, "exp_name": "a.py",
                         "config": "runner = dict(max_epochs=3)\n"})]  # fmt: skip
    for epoch, inner, value in rows():
        row = {
            "mode": "train", "epoch": epoch, "iter": inner, "lr": {"backbone": 1e-5, "head": 1e-4}, "memory": 10150,
            "data_time": 0.026, "loss_cls": value, "loss_bbox": 1.0, "loss": value + 1, "grad_norm": 4.9, "time": 0.9,
        }  # fmt: skip
        lines.append(json.dumps(row))
        if inner == 100:
            row = {"mode": "val", "epoch": epoch, "iter": 40, "lr": 1e-4, "bbox_mAP": epoch / 10, "bbox_mAP_50": 0.25}
            lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("what", ["text", "json", "both"])
def test_epochs_are_joined_by_their_length(tmp_path: Path, what: str) -> None:
    if what != "json":
        (tmp_path / "20220304_012230.log").write_text(text_log())
    if what != "text":
        (tmp_path / "20220304_012230.log.json").write_text(json_log())
    run = load_run(tmp_path)
    per = 100 if what == "json" else PER_EPOCH  # the JSON alone does not say it
    expected = [(epoch - 1) * per + inner for epoch, inner, _ in rows()]
    total, precision, rate = run.series("loss/total"), run.series("eval/ap"), run.series("train/lr")
    assert total is not None
    assert precision is not None
    assert rate is not None
    assert total.steps[total.missing == 0].tolist() == expected
    wanted = [value + 1 for _, _, value in rows()]
    wanted[2] = np.nan if what == "text" else wanted[2]
    np.testing.assert_allclose(total.value[total.missing == 0], wanted, rtol=1e-6)
    assert precision.steps[precision.missing == 0].tolist() == [per, 2 * per, 3 * per]
    np.testing.assert_allclose(precision.value[precision.missing == 0], [0.1, 0.2, 0.3], rtol=1e-6)
    assert run.environment["packages"] == {"torch": "1.10.0", "mmcv": "1.4.2"}
    assert rate.value[rate.missing == 0][0] == pytest.approx(1e-4 if what == "text" else 1e-5)
    imported = run.provenance["imported"]
    assert any("how many iterations an epoch has" in note for note in imported["notes"]) == (what == "json")
    assert imported["smoothing"] == (INTERVAL if what != "json" else round(np.median(np.diff(expected))))
    assert imported["grad_norm"].startswith("before clipping")
    assert "acc" in imported["ignored"] or what != "text"
    if what == "text":
        assert imported["nonfinite"]["logged"] == 1
        assert run.environment["device"] == "NVIDIA A100-SXM4-40GB"
        # the mean at 167 is of 118 to 167: fifty steps, any of which may be the bad one
        assert (imported["nonfinite"]["at_least"], imported["nonfinite"]["at_most"]) == (1, 50)
    else:
        assert run.settings["seed"] == 7


def test_the_iteration_based_runner_counts_over_the_run(tmp_path: Path) -> None:
    lines = [
        f"2022-03-04 01:22:33,251 - mmseg - INFO - Iter [{step}/400]\tlr: 1.0e-02, eta: 0:00:10, time: 0.1, data_time: "
        f"0.0, memory: 5, decode.loss_ce: {step}.0, decode.acc_seg: 50.0, loss: {step}.5"
        for step in range(50, 401, 50)
    ]
    lines.insert(4, "2022-03-04 01:22:33,251 - mmseg - INFO - Iter(val) [250]\taAcc: 0.9, mIoU: 45.12, mAcc: 0.6")
    (tmp_path / "a.log").write_text("\n".join(lines))
    run = load_run(tmp_path / "a.log")
    assert run.steps.tolist() == list(range(50, 401, 50))
    assert run.names("loss/") == ["loss/decode.loss_ce/raw", "loss/total"]
    miou = run.series("eval/miou")
    assert miou is not None
    assert miou.steps[miou.missing == 0].tolist() == [200]
    assert miou.value[miou.missing == 0] == pytest.approx(0.4512)
    assert any("in percent" in note for note in run.provenance["imported"]["notes"])
    assert run.status == "completed"
    (tmp_path / "b.log").write_text("\n".join(lines[:5]))
    assert load_run(tmp_path / "b.log").status == "running", "a killed run, or one that goes on"


def test_real_lines_of_other_projects(tmp_path: Path) -> None:
    """Forms that occur in the issues of users: padded counts, days to go, many groups of rates, merged lines."""
    (tmp_path / "a.log").write_text(
        "05/29 17:40:39 - mmengine - INFO - Epoch(train)  [  1][ 5/1201]  base_lr: 3.7531e-05 lr: 1.0000e-04  eta: "
        "3 days, 9:40:59  time: 14.3968  data_time: 2.8587  memory: 20343  grad_norm: 163.2495  loss: 32.6588  "
        "inst_loss: 13.5276  last_layer_seg_loss: 3.8056  layer_0_seg_loss: 15.3256\n"
        "07/04 08:12:50 - mmengine - INFO - Epoch(train)  [  1][10/1201]  base_lr: 3.7531e-05 lr: 1.0000e-04  eta: "
        "0:00:01  time: 0.5  data_time: 0.1  grad_norm: nan  loss: nan  inst_loss: nan  last_layer_seg_loss: 3.0  "
        "layer_0_seg_loss: 1.22026/07/04 08:12:51 - mmengine - INFO - Epoch(train)  [  1][15/1201]  lr: 2.0e-04  "
        "loss: 1.5  inst_loss: inf\n"
    )
    run = load_run(tmp_path)
    assert run.steps.tolist() == [5, 10, 15]

    def values(name: str) -> list[float | None]:
        series = run.series(name)
        assert series is not None
        rounded = series.value.round(4).tolist()
        return [None if gone else value for gone, value in zip(series.missing, rounded, strict=True)]

    assert values("train/lr") == [1e-4, 1e-4, 2e-4]
    assert str(values("loss/total")) == str([32.6588, float("nan"), 1.5])
    assert str(values("loss/inst_loss/raw")) == str([13.5276, float("nan"), float("inf")])
    assert values("loss/layer_0_seg_loss/raw") == [15.3256, None, None], "1.22026/07/04 is no number, and is not NaN"
    assert values("throughput/device_peak_mib") == [20343.0, None, None]
    assert run.provenance["imported"]["skipped"] == 1
    assert run.provenance["imported"]["smoothing_from"].startswith("MMEngine's default")
