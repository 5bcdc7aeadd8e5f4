"""What columns are, by their names: those that frameworks and users write."""

from __future__ import annotations

import pytest

from bifusion_diag.record.importers.names import place_of, recognise

KNOWN = {
    "loss": "loss/total",
    "train/loss": "loss/total",
    "Train Loss": "loss/total",
    "loss/train": "loss/total",
    "Loss/total_loss": "loss/total",
    "train_loss_step": "loss/total",
    "metrics/train/total_loss": "loss/total",
    "inst_loss": "loss/inst_loss/raw",
    "d0.loss_cls": "loss/d0.loss_cls/raw",
    "loss/object/heatmap/task0": "loss/object.heatmap.task0/raw",
    "train/loss_dice": "loss/loss_dice/raw",
    "train_loss_dice": "loss/loss_dice/raw",
    "losses/aux": "loss/aux/raw",
    "loss_weight": None,
    "loss_scale": "train/loss_scale",
    "kl_loss_coef": None,
    "grad_norm": "train/grad_norm",
    "train/grad_norm": "train/grad_norm",
    "Gradient Norm": "train/grad_norm",
    "grad_norm_total": "train/grad_norm",
    "grad_2.0_norm_total": "train/grad_norm",
    "total_grad_norm": "train/grad_norm",
    "gnorm": "train/grad_norm",
    "grad_norm/layer1.weight": None,
    "lr": "train/lr",
    "learning_rate": "train/lr",
    "base_lr": "train/lr",
    "lr-AdamW/pg1": "train/lr/adamw_pg1",
    "lr_backbone": "train/lr/backbone",
    "val/miou": "eval/miou",
    "mIoU": "eval/miou",
    "val_mIoU": "eval/miou",
    "train/mIoU": None,
    "val/all_ap_50%": "eval/ap50",
    "coco/bbox_mAP_50": "eval/ap50",
    "val/bbox_mAP": "eval/ap",
    "val_loss": "eval/loss",
    "eval_loss": "eval/loss",
    "val/recall": "eval/recall",
    "valid/loss_cls": "eval/loss_cls",
    "test/loss": None,
    "acc": None,
    "time": None,
    "iter_time": "train/step_seconds",
    "data_time": "train/data_seconds",
    "memory": None,
    "loss\x1b[2J": "loss/loss\\x1b[2J/raw",
    "": None,
}


@pytest.mark.parametrize("name", KNOWN)
def test_columns(name: str) -> None:
    assert recognise(name).series == KNOWN[name]


def test_what_only_some_formats_mean() -> None:
    assert recognise("time", timed=True).series == "train/step_seconds"
    assert recognise("memory", memory=True).series == "throughput/device_peak_mib"
    assert recognise("grads/body/param_norm", ours=True).series == "grads/body/param_norm"
    assert recognise("grads/body/param_norm").series is None


def test_a_norm_may_say_when_it_was_taken() -> None:
    assert recognise("grad_norm_before_clip").norm == "before clipping"
    assert recognise("grad_norm_after_clip").norm == "after clipping"
    assert recognise("grad_norm_before_clip").rank < recognise("grad_norm").rank < recognise("clipped_grad_norm").rank


def test_columns_that_place_a_row() -> None:
    names = ("step", "Step", "trainer/global_step", "_step", "epoch", "iter", "Wall time", "_timestamp", "loss")
    assert [place_of(name) for name in names] == ["step", "step", "step", "step", "epoch", "iter", "", "", None]
