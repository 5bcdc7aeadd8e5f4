"""Models that nobody here wrote, with the losses that they are trained with, measured by all probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from watching import Watch, unchanged

from bifusion_diag.record import Run, load_run

FINITE = 3  # of grads' states


def learns(run: Run, model: nn.Module, unused: tuple[str, ...] = ()) -> None:
    """Every module that has weights to learn has a gradient at every step, and every frozen one has none."""
    assert run.status == "completed"
    assert not [event for event in run.events if event.kind == "probe"]
    owners = [(name, module) for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    assert len(owners) > 20
    for name, module in owners:
        states = run.all_series[f"grads/{name or '(root)'}/state"].value.tolist()
        norms = run.all_series[f"grads/{name or '(root)'}/param_norm"]
        if name in unused:
            assert set(states) == {1}
        elif any(p.requires_grad for p in module.parameters(recurse=False)):
            assert set(states) == {FINITE}, name
            assert (norms.value > 0).all(), name
        else:
            assert set(states) == {0}
            assert norms.missing.all()


def detector(kind: str) -> nn.Module:
    detection = pytest.importorskip("torchvision").models.detection
    make = {
        "fasterrcnn": detection.fasterrcnn_mobilenet_v3_large_320_fpn,
        "retinanet": detection.retinanet_resnet50_fpn,
    }[kind]
    # no weights: nothing is downloaded
    return make(weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=96)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fasterrcnn", "retinanet"])
def test_a_torchvision_detector(kind: str, tmp_path: Path) -> None:
    def case(watch: Watch) -> list[Any]:
        model = detector(kind).train()
        next(model.backbone.body.children()).requires_grad_(False)  # type: ignore[union-attr, operator]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
        images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
        boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
        targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]

        def body(step: int) -> None:
            optimizer.zero_grad()
            losses = model(images, targets)
            sum(losses.values()).backward()
            optimizer.step()
            terms.append(losses)

        terms: list[dict[str, Tensor]] = []
        watch(model, optimizer, body, 3, **({"out": tmp_path / "run.json"} if watch.on else {}))
        models.append((model, terms))
        return [model, optimizer]

    models: list[Any] = []
    unchanged(case)
    model, terms = models[-1]
    run = load_run(tmp_path / "run.json")
    learns(run, model)
    for term in terms[0]:
        values = run.all_series[f"loss/{term}/raw"].value.tolist()
        assert values == [losses[term].item() for losses in terms]
    totals = [sum(losses.values()).item() for losses in terms]
    assert run.all_series["loss/total"].value.tolist() == pytest.approx(totals, rel=1e-6)


@pytest.mark.parametrize("target", ["mixup", "smoothed"])
def test_a_timm_vit(target: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from timm.data import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    def case(watch: Watch) -> list[Any]:
        vit = timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, img_size=32, depth=3, num_classes=10, drop_path_rate=0.1
        )
        criterion = SoftTargetCrossEntropy() if target == "mixup" else LabelSmoothingCrossEntropy(0.1)
        model = nn.ModuleDict({"vit": vit, "criterion": criterion}).train()
        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def body(step: int) -> None:
            images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
            if target == "mixup":
                images, labels = mixup(images, labels)
            optimizer.zero_grad()
            loss = criterion(vit(images), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())

        losses: list[float] = []
        watch(model, optimizer, body, 3, **({"out": tmp_path / "run.json"} if watch.on else {}))
        models.append((model, losses))
        return [model, optimizer, torch.tensor(losses)]

    models: list[Any] = []
    unchanged(case)
    model, losses = models[-1]
    run = load_run(tmp_path / "run.json")
    learns(run, model)
    assert "loss/total" not in run.all_series or run.all_series["loss/total"].value.tolist() == losses
    found = {name.split("/")[0] for name in run.all_series}
    assert {"grads", "activations", "attention", "normalize", "updates", "weights"} <= found
