"""Ranges of outputs against copies of them, one element after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from probe_toys import Give, Sparse, Zoo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bifusion_diag.probes import ActivationsProbe, Monitor
from bifusion_diag.probes import activations as module_under_test
from bifusion_diag.probes.activations import CHUNK, MARGIN, RUNS
from bifusion_diag.probes.outputs import tensors_of

KEYS = ("min", "max", "nonfinite", "rms", "zeros")


def measured(model: nn.Module, forward: Callable[[], Any]) -> dict[str, float | None]:
    with Monitor(model, probes=["activations"]) as monitor:
        with monitor.step():
            forward()
        monitor.end_step()
        return monitor.latest()


def row_of(output: Any) -> dict[str, float | None]:
    """What is measured of one output."""
    model = nn.ModuleDict({"a": Give()})
    row = measured(model, lambda: model["a"](output))
    return {key: row[f"activations/a/{key}"] for key in KEYS}


def truth(tensors: list[Tensor]) -> dict[str, float]:
    """Element by element, of tensors that are shorter than the sample."""
    elements = [float(v) for x in tensors for v in x.detach().double().flatten().tolist()]
    nan = any(math.isnan(v) for v in elements)
    return {
        "min": math.nan if nan else min(elements),
        "max": math.nan if nan else max(elements),
        "nonfinite": sum(not math.isfinite(v) for v in elements),
        "rms": math.sqrt(sum(v * v for v in elements) / len(elements)),
        "zeros": sum(v == 0 for v in elements) / len(elements),
    }


def near(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, rel=1e-6, abs=1e-45, nan_ok=True)  # float32 values; sums in float64


def test_every_module_equals_its_twin() -> None:
    model, x = Zoo(), torch.randn(6, 4)
    copies: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _m, _i, output, name=name: copies.setdefault(name, []).extend(t.clone() for t in tensors_of(output))
        )
        for name, module in model.named_modules()
    ]
    row = measured(model, lambda: model(x))
    for handle in handles:
        handle.remove()
    names = {name.split("/")[1] for name in row}
    assert names == {name for name, _ in model.named_modules() if name} | {"(root)"}
    for name in names:
        found = {key: row[f"activations/{name}/{key}"] for key in KEYS}
        tensors = copies.get(name.replace("(root)", ""), [])
        assert found == (near(truth(tensors)) if tensors else dict.fromkeys(KEYS)), name
    assert sum(len(tensors) for tensors in copies.values()) > 14
    assert len(copies["twice"]) == 2
    assert 0 < row["activations/inplace/zeros"] < 1  # type: ignore[operator]


NAN, INF = math.nan, math.inf
OUTPUTS: dict[str, Any] = {
    "bf16": torch.randn(7, 9).bfloat16(),
    "fp16": torch.full((3, 3), 65504.0).half(),
    "float64": torch.tensor([3.0, -4.0]).double(),
    "scalar": torch.tensor(2.5),
    "nan": torch.tensor([1.0, NAN, 0.0]),
    "inf": torch.tensor([1.0, INF, 0.0, -INF]),
    "bf16 nan": torch.tensor([1.0, NAN, INF]).bfloat16(),
    "huge": torch.tensor([1e30, -3e38]),
    "tiny": torch.tensor([1e-30, 1e-40, -0.0]),
    "transposed": torch.randn(5, 8).t(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "gaps": torch.randn(6, 8)[:, ::3],
    "gaps nan": torch.tensor([[1.0, 5.0, NAN, 5.0], [2.0, 5.0, INF, 5.0]])[:, ::2],
    "expanded": torch.randn(3, 1).expand(3, 5),
    "sparse": torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.5, -2.0]), (5,), check_invariants=True),
    "features": Sparse(torch.randn(4, 2)),
    "mixed": {"a": torch.randn(3), "ids": torch.arange(900), "none": None, "empty": torch.zeros(0, 3)},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_odd_outputs(kind: str) -> None:
    output = OUTPUTS[kind]
    tensors = [t for t in tensors_of(output) if t.is_floating_point() and t.numel()]
    assert row_of(output) == near(truth(tensors))


def test_float64_beyond_float32_stays_finite() -> None:
    row = row_of(torch.tensor([1e200, -1e200], dtype=torch.float64))
    assert row["max"] == row["rms"] == pytest.approx(torch.finfo(torch.float32).max)


def test_float8() -> None:
    x = torch.tensor([1.0, -2.0, 0.0]).to(torch.float8_e4m3fn)
    assert row_of(x) == near(truth([x.float()]))


def test_nothing_to_measure_is_missing() -> None:
    for output in (None, torch.arange(3), torch.zeros(0, 4), []):
        assert set(row_of(output).values()) == {None}


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat(1, 2)[:, ::2],
    ],
)
def test_a_long_output_is_sampled_but_its_range_is_exact(layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(torch.randn(400, 512).relu())  # longer than a chunk of the search
    x[307, 311], x[399, 511], x[3, 3] = -77.0, 99.0, 88.0
    row, wide = row_of(x), x.double()
    assert (row["min"], row["max"], row["nonfinite"]) == (-77.0, 99.0, 0)
    # independent standard normal numbers, of which half are cut to zero; n = 2048: four standard errors
    n = RUNS * 16
    assert n == 2048
    assert row["zeros"] == pytest.approx((wide == 0).double().mean().item(), abs=4 * 0.5 / n**0.5)
    assert row["rms"] == pytest.approx(0.5**0.5, rel=4 * 0.5 * (5 / n) ** 0.5)
    x[300, 5], x[301, 5] = NAN, INF
    row = row_of(x)
    assert math.isnan(row["min"])  # type: ignore[arg-type]
    assert row["nonfinite"] == 2


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [
        (nn.Sigmoid(), 0, 1),
        (nn.Tanh(), -1, 1),
        (nn.Softmax(dim=-1), 0, 1),
        (nn.Hardsigmoid(), 0, 1),
        (nn.Hardtanh(-2.0, 3.0), -2, 3),
        (nn.ReLU6(), 0, 6),
        (nn.Softsign(), -1, 1),
    ],
)
@pytest.mark.parametrize("rows", [5, 400])
def test_saturated(activation: nn.Module, low: float, high: float, rows: int) -> None:
    model = nn.Sequential(nn.Linear(20, 20), activation)
    inputs = [torch.randn(rows, 20) * 60, torch.randn(2, 20) * 200]

    def forward() -> None:
        for x in inputs:
            model(x)

    row = measured(model, forward)
    outputs = [model(x).double() for x in inputs]
    margin = MARGIN * (high - low)
    count = sum(int(((y <= low + margin) | (y >= high - margin)).sum()) for y in outputs)
    share = count / sum(y.numel() for y in outputs)
    assert row["activations/1/saturated"] == pytest.approx(share, abs=1e-6 if rows == 5 else 0.04)
    assert share > 0
    assert "activations/0/saturated" not in row


def test_what_is_handed_through_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[int] = []
    real = module_under_test.range_of
    monkeypatch.setattr(module_under_test, "range_of", lambda x, *turn: (ranges.append(x.numel()), real(x, *turn))[1])
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Sequential(nn.ELU(inplace=True), nn.Dropout(0.5).eval()))
    row = measured(model, lambda: model(torch.randn(50, 3)))
    assert len(ranges) == 2  # of the linear layer, and after it was changed in place
    assert row["activations/0/min"] == row["activations/1/min"] < row["activations/2.0/min"] < 0  # type: ignore[operator]
    assert row["activations/2.1/rms"] == row["activations/2/rms"] == row["activations/2.0/rms"]


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("bad", [0.0, NAN, INF, -INF])
@pytest.mark.parametrize("meddler", [None, doubled])
def test_the_range_of_a_relu_is_known_from_its_input(
    inplace: bool, bad: float, meddler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[int] = []
    real = module_under_test.range_of
    monkeypatch.setattr(module_under_test, "range_of", lambda x, *turn: (ranges.append(x.numel()), real(x, *turn))[1])
    model, x = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.ReLU(inplace=inplace)), torch.randn(9, 3)
    x[4, 1] = bad
    if meddler:
        model[1].register_forward_hook(meddler)
    row, expected = measured(model, lambda: model(x)), truth([model(x)])
    assert {key: row[f"activations/1/{key}"] for key in KEYS} == near(expected)
    assert len(ranges) == (1 if bad == 0 and not meddler else 2)


def test_a_freed_tensor_whose_memory_is_used_again_is_not_mistaken() -> None:
    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.give = Give()

        def forward(self) -> None:
            for value in range(20):
                self.give(torch.full((4,), float(value)))

    model = Reuse()
    row = measured(model, model)
    assert (row["activations/give/min"], row["activations/give/max"]) == (0.0, 19.0)
    assert row["activations/give/rms"] == pytest.approx(math.sqrt(sum(v * v for v in range(20)) / 20))


def test_inference_mode_and_autocast() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    x = torch.randn(9, 4)

    def forward() -> None:
        with torch.inference_mode():
            model(x)

    with torch.no_grad():
        expected = truth([model(x)])
        assert measured(model, forward)["activations/1/rms"] == pytest.approx(expected["rms"], rel=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = truth([model(x)])
            assert measured(model, lambda: model(x))["activations/1/max"] == expected["max"]


def test_checkpointed_blocks_are_counted_once() -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    block[0].bias.data[:] = NAN
    x = torch.randn(4, 3)
    row = measured(block, lambda: checkpoint(block, x, use_reentrant=False).sum().backward())
    assert row["activations/0/nonfinite"] == 12


def test_only_the_modules_asked_for() -> None:
    model = Zoo()
    with Monitor(model, probes=[ActivationsProbe(modules=["twice"], name="some")]) as monitor:
        for _ in range(2):  # the second step uses the first one's buffers
            with monitor.step():
                model(torch.randn(6, 4))
        monitor.end_step()
        assert {name.rsplit("/", 1)[0] for name in monitor.latest()} == {"some/twice"}


def test_steps_of_other_shapes_leave_nothing_behind() -> None:
    model = nn.ModuleDict({"a": Give(), "b": Give()})
    with Monitor(model, probes=["activations"]) as monitor:
        for sizes in ((3000, 5), (5, 3000), (2, 2048), (2047, 1)):
            tensors = [torch.full((size,), 2.0) for size in sizes]
            with monitor.step():
                for name, tensor in zip("ab", tensors, strict=True):
                    model[name](tensor)
            monitor.end_step()
            row = monitor.latest()
            assert {row[f"activations/{name}/rms"] for name in "ab"} == {2.0}
            assert {row[f"activations/{name}/zeros"] for name in "ab"} == {0.0}


def test_runs_of_large_outputs_take_turns() -> None:
    model = nn.Sequential(nn.Identity())
    x = torch.zeros(5 * CHUNK + 100)  # of six runs, the fifth and the sixth are read with the first and the second
    x[:2], x[CHUNK + 1], x[3 * CHUNK], x[-1] = 9.0, -2.0, math.inf, math.nan
    for whole in (False, True):
        rows = []
        with Monitor(model, probes=[ActivationsProbe(whole=whole)]) as monitor:
            for value in (x, x, x, x, x[: 3 * CHUNK]):
                with monitor.step():
                    model(value)
                monitor.end_step()
                rows.append([monitor.latest()[f"activations/0/{key}"] for key in ("min", "max", "nonfinite")])
        if whole:
            assert all(np.isnan(row[:2]).all() and row[2] == 2 for row in rows[:4])
        else:
            assert rows[0] == [0.0, 9.0, 0.0]
            assert np.isnan(rows[1][:2]).all()
            assert rows[1][2] == 2  # once one is met, those of the whole tensor are counted
            assert rows[2] == [0.0, 0.0, 0.0]
            assert rows[3] == [0.0, math.inf, 2.0]
        assert rows[4] == [-2.0, 9.0, 0.0]  # not large: read whole
