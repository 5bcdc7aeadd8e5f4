"""Loss terms, wherever a model or a loop keeps them, against the numbers that they were made of."""

from __future__ import annotations

import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from probe_toys import Give, Loss
from torch import Tensor, nn

from bifusion_diag.errors import UserError
from bifusion_diag.probes import LossesProbe, Monitor
from bifusion_diag.record import load_run


def term(value: float) -> Tensor:
    """A loss with a graph."""
    return torch.tensor(value, requires_grad=True) * 1.0


def loss(**terms: float) -> Loss:
    raw = {name: term(value) for name, value in terms.items()}
    weights = {name: 0.1 * (i + 1) for i, name in enumerate(raw)}
    return Loss(sum(weights[name] * raw[name] for name in raw), raw, weights)  # type: ignore[arg-type]


def row_of(*outputs: Any, model: nn.Module | None = None, probe: Any = "losses") -> dict[str, float | None]:
    """One step in which the model returns these outputs."""
    model = model or Give()
    with Monitor(model, probes=[probe]) as monitor:
        with monitor.step():
            for output in outputs:
                model(output)
        monitor.end_step()
        return monitor.latest()


class Parts(nn.ModuleDict):
    """Modules that return what they are given, below a model that returns what it is given."""

    def __init__(self, *names: str) -> None:
        super().__init__({name: Give() for name in names})

    def forward(self, outputs: dict[str, Any]) -> Any:
        for name, module in self.items():
            module(outputs[name])
        return outputs["root"]


def test_losses() -> None:
    model = Parts("criterion")
    row = row_of({"criterion": loss(semantic=2.0, instance=float("nan"), clip=float("inf")), "root": None}, model=model)
    assert list(row) == [
        "loss/total",
        *(f"loss/{term}/raw" for term in ("semantic", "instance", "clip")),
        *(f"loss/{term}/weighted" for term in ("semantic", "instance", "clip")),
    ]
    assert np.isnan(row["loss/total"])  # a value, not a missing one
    assert row["loss/semantic/raw"] == 2.0
    assert row["loss/semantic/weighted"] == pytest.approx(0.2)
    assert np.isnan(row["loss/instance/weighted"])
    assert row["loss/clip/raw"] == float("inf")


@pytest.mark.parametrize("told", [True, False])
def test_a_loss_that_is_not_found_is_a_note(told: bool, tmp_path: Any) -> None:
    model = nn.Linear(2, 2)
    with Monitor(model, probes=["losses"], out=tmp_path) as monitor:
        for _ in range(3):
            with monitor.step():
                loss = model(torch.randn(4, 2)).square().mean()  # as a criterion outside the model does
                if told:
                    monitor.losses({"loss": loss})
                loss.backward()
    notes = [event.message for event in load_run(tmp_path).events if event.kind == "note"]
    assert len(notes) == (0 if told else 1)
    assert all("monitor.losses({'loss': loss})" in note for note in notes)


def test_losses_of_several_calls_are_averaged() -> None:
    row = row_of(loss(a=1.0), loss(a=4.0))
    assert row == pytest.approx({"loss/total": 0.25, "loss/a/raw": 2.5, "loss/a/weighted": 0.25})
    row = row_of(loss(a=1.0), loss(a=4.0, b=3.0))  # a term that only one of the calls has
    expected = {"loss/total": (0.1 + 1.0) / 2, "loss/a/raw": 2.5, "loss/b/raw": 3.0}
    assert row == pytest.approx(expected | {"loss/a/weighted": 0.25, "loss/b/weighted": 0.6})


def test_fields_of_another_name_and_of_one_module_only() -> None:
    odd = SimpleNamespace(parts={"a": term(2.0)}, factors={"a": torch.tensor(3.0)}, sum=term(6.0))
    probe = LossesProbe(modules=["second"], fields={"terms": "parts", "weights": "factors", "total": "sum"})
    row = row_of(
        {"first": loss(b=1.0), "second": odd, "root": loss(c=1.0)}, model=Parts("first", "second"), probe=probe
    )
    assert row == {"loss/total": 6.0, "loss/a/raw": 2.0, "loss/a/weighted": 6.0}
    with pytest.raises(UserError, match=r"from no field 'term'\. Did you mean 'terms'\?"):
        LossesProbe(fields={"term": "x"})


def test_what_the_loop_tells_wins_from_then_on() -> None:
    model = Give()
    with Monitor(model, probes=["losses"]) as monitor:
        with monitor.step():
            model(loss(a=1.0))
            monitor.losses({"told": term(3.0), "other": term(2.0)}, {"told": 2.0})
            model(loss(a=1.0))
        monitor.end_step()
        both = {"loss/told/raw": 3.0, "loss/other/raw": 2.0, "loss/told/weighted": 6.0, "loss/other/weighted": 2.0}
        assert monitor.latest() == {"loss/total": 8.0} | both
        with monitor.step():
            model(loss(a=1.0))
        monitor.end_step()
        assert monitor.latest() == {}
        with monitor.step():  # terms told one by one
            monitor.losses({"a": torch.ones(1, 1)})
            monitor.losses({"b": term(2.0)}, {"b": torch.tensor([0.5])})
        monitor.end_step()
        expected = {"loss/total": 2.0, "loss/a/raw": 1.0, "loss/b/raw": 2.0}
        assert monitor.latest() == expected | {"loss/a/weighted": 1.0, "loss/b/weighted": 1.0}


def test_what_cannot_be_told() -> None:
    with Monitor(Give(), probes=["losses"]) as monitor:
        with pytest.raises(UserError, match="no step block is open"):
            monitor.losses({"a": term(1.0)})
        with monitor.step():
            with pytest.raises(UserError, match="no term was given"):
                monitor.losses({})
            with pytest.raises(UserError, match=r"'a' has 3 elements; give its mean or sum"):
                monitor.losses({"a": torch.ones(3)})
            with pytest.raises(UserError, match="'a' is a float; give a tensor"):
                monitor.losses({"a": 1.0})  # type: ignore[dict-item]
            with pytest.raises(UserError, match="the weight of 'a' has 2 elements"):
                monitor.losses({"a": term(1.0)}, {"a": torch.ones(2)})
            with pytest.raises(UserError, match="total has 2 elements"):
                monitor.losses({"a": term(1.0)}, total=torch.ones(2))
            with pytest.raises(UserError, match=r"a weight for 'aa', which is no term\. Did you mean 'a'\?"):
                monitor.losses({"a": term(1.0)}, {"aa": 1.0})


def test_losses_by_keys_as_openmmlab_returns_them() -> None:
    losses = {
        "decoder.loss_cls": term(1.0),
        "decoder.loss_mask": [term(2.0), term(3.0)],
        "d0.loss_dice": term(0.5).reshape(1),
        "decoder.acc": torch.tensor(77.0),  # no loss
        "num_loss_boxes": 4,
        "loss_map": torch.ones(2, 2),  # no scalar
    }
    row = row_of(losses)
    names = ("decoder.loss_cls", "decoder.loss_mask", "d0.loss_dice")
    expected = dict(zip(names, (1.0, 5.0, 0.5), strict=True))
    assert row == {"loss/total": 6.5} | {f"loss/{n}/raw": v for n, v in expected.items()} | {
        f"loss/{n}/weighted": v for n, v in expected.items()
    }


def test_only_the_models_own_output_is_read_by_keys() -> None:
    row = row_of({"head": {"loss_b": term(1.0)}, "root": {"loss_a": term(2.0)}}, model=Parts("head"))
    assert row == {"loss/total": 2.0, "loss/loss_a/raw": 2.0, "loss/loss_a/weighted": 2.0}
    row = row_of(
        {"head": {"loss_b": term(1.0)}, "root": {"loss_a": term(2.0)}},
        model=Parts("head"),
        probe=LossesProbe(modules=["head"]),
    )
    assert row == {"loss/total": 1.0, "loss/loss_b/raw": 1.0, "loss/loss_b/weighted": 1.0}
    assert row_of({"logits": term(1.0), "boxes": torch.ones(3, 4)}) == {}


class ModelOutput(OrderedDict[str, Any]):
    """As in Transformers: a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def test_a_total_with_its_terms_gives_their_weights() -> None:
    ce, box, unused = term(2.0), term(3.0), term(7.0)
    terms = {"loss_ce": ce, "loss_bbox": box, "cardinality_error": torch.tensor(9.0)}
    detr = ModelOutput(loss=ce + 5 * box, loss_dict=terms, logits=torch.ones(2, 3), aux_loss=unused)
    row = row_of(detr)
    raw = {"loss/loss_ce/raw": 2.0, "loss/loss_bbox/raw": 3.0, "loss/aux_loss/raw": 7.0}
    assert row == {"loss/total": 17.0} | raw | {"loss/loss_ce/weighted": 2.0, "loss/loss_bbox/weighted": 15.0}
    plain = SimpleNamespace(loss=term(4.0), logits=torch.ones(2))
    for output in (plain, ModelOutput(loss=term(4.0)), {"loss": term(4.0)}):
        assert row_of(output) == {"loss/total": 4.0, "loss/loss/raw": 4.0, "loss/loss/weighted": 4.0}


def test_terms_of_one_row_and_lists_of_terms_are_parts_of_the_total() -> None:
    single, layers = torch.full((1,), 2.0, requires_grad=True) * 1.0, [term(3.0), term(4.0)]
    row = row_of({"loss": (single + 0.5 * sum(layers)).sum(), "loss_a": single, "loss_b": layers})
    raw = {"loss/loss_a/raw": 2.0, "loss/loss_b/raw": 7.0}
    assert row == {"loss/total": 5.5} | raw | {"loss/loss_a/weighted": 2.0, "loss/loss_b/weighted": 3.5}


def test_a_loss_beside_others_that_is_not_their_sum_is_a_term() -> None:
    row = row_of({"loss": term(4.0), "loss_aux": term(0.5)})  # OpenMMLab adds them up
    assert row["loss/total"] == 4.5
    assert row["loss/loss/raw"] == 4.0
    with torch.no_grad():  # no graph to ask
        assert row_of({"loss": term(4.0), "loss_aux": term(0.5)}) == {"loss/total": 4.0, "loss/loss_aux/raw": 0.5}


class Composite(nn.modules.loss._Loss):
    """A loss module of loss modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.L1Loss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * self.inner(x, y)


class WithLosses(nn.Module):
    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.returns = returns
        self.layer = nn.Linear(3, 3)
        self.mse, self.both, self.rows = nn.MSELoss(), Composite(), nn.MSELoss(reduction="none")

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.rows(y, x)
        with torch.no_grad():
            self.mse(y, x)  # a metric
        if not self.returns:
            return y
        return self.mse(y, x) + 0.5 * self.both(y, x)


def test_loss_modules() -> None:
    model, x = WithLosses(True), torch.randn(4, 3)
    y = model.layer(x)
    mse, l1 = nn.functional.mse_loss(y, x).item(), nn.functional.l1_loss(y, x).item()
    row = row_of(x, model=model)
    assert row == pytest.approx({"loss/total": mse + l1, "loss/mse/raw": mse, "loss/both/raw": 2 * l1})
    model = WithLosses(False)
    with Monitor(model, probes=["losses"]) as monitor:  # the loop calls them
        with monitor.step():
            y = model(x)
            expected = [model.mse(y, x).item(), model.both(y, x).item()]
        monitor.end_step()
        row = monitor.latest()
    assert row == pytest.approx(
        {"loss/total": sum(expected), "loss/mse/raw": expected[0], "loss/both/raw": expected[1]}
    )


def test_a_model_that_returns_one_scalar() -> None:
    scalar = term(3.0)
    assert row_of(scalar) == {"loss/total": 3.0, "loss/(root)/raw": 3.0, "loss/(root)/weighted": 3.0}
    assert row_of(torch.tensor(3.0)) == {}  # nothing that learns
    assert row_of(torch.ones(3, requires_grad=True)) == {}
    # more explicit than both a scalar and loss modules
    model = WithLosses(True)
    with Monitor(model, probes=["losses"]) as monitor:
        with monitor.step():
            monitor.losses({"a": model(torch.randn(4, 3))})
        monitor.end_step()
        assert list(monitor.latest()) == ["loss/total", "loss/a/raw", "loss/a/weighted"]


def test_a_detector_of_torchvision() -> None:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    with Monitor(model, probes=["losses"]) as monitor:
        with monitor.step():
            losses = model([torch.rand(3, 64, 64)], [target])
            sum(losses.values()).backward()
        monitor.end_step()
        row = monitor.latest()
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    expected = {name: value.item() for name, value in losses.items()}
    assert {name: row[f"loss/{name}/raw"] for name in expected} == expected
    assert row["loss/total"] == pytest.approx(math.fsum(expected.values()))
    assert len(row) == 9
