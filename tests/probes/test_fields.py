"""CLIP ranges, projection and gate against numpy, one element after another where that is possible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from probe_toys import Encoded, Gate, Give, View
from torch import nn

from bifusion_diag.errors import UserError
from bifusion_diag.probes import ClipProbe, GateProbe, Monitor, Probe, ProjectionProbe
from bifusion_diag.probes.clip import SAMPLE_ELEMENTS
from bifusion_diag.probes.gate import bin_counts


def row_of(probe: str | Probe, outputs: list[tuple[str, Any]]) -> dict[str, float | None]:
    """One step in which the named modules return these outputs."""
    model = nn.ModuleDict({name: Give() for name, _ in outputs})
    with Monitor(model, probes=[probe]) as monitor:
        with monitor.step():
            for name, output in outputs:
                model[name](output)
        monitor.end_step()
        return monitor.latest()


def ranges(x: np.ndarray, rows: np.ndarray | None = None) -> dict[str, float]:
    """The twin: x (R, C)."""
    counted = x if rows is None else x[rows]
    good = counted[np.isfinite(counted)].astype(np.float64)
    magnitudes = sorted(abs(good))
    norms = [np.sqrt(sum(float(v) ** 2 for v in row if np.isfinite(v))) for row in counted]
    return {
        "min": min(good),
        "max": max(good),
        "absmax": magnitudes[-1],
        "p99.9": magnitudes[len(good) - 1 - len(good) // 1000],
        "share_gt_10": sum(m > 10 for m in magnitudes) / len(good),
        "norm_mean": float(np.mean(norms)),
        "nonfinite": float((~np.isfinite(x)).sum()),
    }


@pytest.mark.parametrize("bad", [False, True])
def test_clip(bad: bool) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(0, 6, (2, 8, 5, 25)).astype("f4")
    head = rng.normal(0, 1, (2, 50, 7)).astype("f4")
    f2d, f3d = rng.normal(0, 2, (300, 16)).astype("f4"), rng.normal(0, 1, (300, 16)).astype("f4")
    valid = rng.random(300) < 0.4
    f2d[~valid] = 1000.0  # what is out of view does not count
    if bad:
        tokens[0, 0, 0, 0], tokens[1, 3, 2, 2], head[0, 0, 0] = np.nan, -np.inf, np.inf
        f2d[np.flatnonzero(valid)[0], 3] = np.nan
        f2d[np.flatnonzero(~valid)[0], 3] = np.inf  # but is counted as non-finite
    tower = {"tokens": torch.from_numpy(tokens), "pooled": torch.zeros(1)}
    encoded = Encoded(*(torch.from_numpy(x) for x in (f2d, f3d, valid)))
    row = row_of("clip", [("clip", tower), ("spatial_head", torch.from_numpy(head)), ("encoder", encoded)])
    expected = {
        "tokens": ranges(np.moveaxis(tokens, 1, -1).reshape(-1, 8)),
        "head": ranges(head.reshape(-1, 7)),
        "points": ranges(f2d, valid),
    }
    for where, numbers in expected.items():
        for key, number in numbers.items():
            assert row.pop(f"clip/{where}/{key}") == pytest.approx(number, rel=1e-5), (where, key)
    ratio = expected["points"]["norm_mean"] / ranges(f3d, valid)["norm_mean"]
    assert row.pop("clip/ratio_2d_3d") == pytest.approx(ratio, rel=1e-5)
    assert set(row) == {"clip/alike_2d", "clip/alike_3d", "clip/aligned"}  # in test_fusion_probes.py


def test_clip_without_a_valid_point_or_a_finite_value() -> None:
    none = Encoded(torch.ones(5, 3), torch.ones(5, 3), torch.zeros(5, dtype=torch.bool))
    row = row_of("clip", [("encoder", none)])
    assert row.pop("clip/points/nonfinite") == 0
    assert set(row.values()) == {None}
    row = row_of("clip", [("tower", {"tokens": torch.full((2, 3), torch.nan)})])
    assert row.pop("clip/tokens/nonfinite") == 6
    assert set(row.values()) == {None}
    assert row_of("clip", [("encoder", Encoded(None, torch.ones(5, 3), None))]) == {}  # a 3D-only encoder


def test_clip_ranges_of_many_elements_are_exact_and_the_rest_of_a_sample() -> None:
    x = torch.randn(3 * SAMPLE_ELEMENTS // 64, 64)
    row = row_of(ClipProbe(), [("tower", {"tokens": x})])
    sample = np.sort(np.abs(x[::3].numpy()), axis=None)
    assert row["clip/tokens/p99.9"] == sample[sample.size - 1 - sample.size // 1000]
    assert row["clip/tokens/absmax"] == x.abs().max().item()
    assert row["clip/tokens/norm_mean"] == pytest.approx(x[::3].norm(dim=1).mean().item(), rel=1e-6)


def test_projection() -> None:
    nan, inf = float("nan"), float("inf")
    # point–view pairs: (camera x, in front, inside, visible) and the class that each belongs to
    pairs = [
        (1.0, True, True, True, "visible"),
        (nan, False, False, False, "nan"),
        (inf, True, True, False, "inf"),
        (-inf, False, False, False, "inf"),
        (1.0, False, False, False, "behind"),
        (1.0, True, False, False, "outside"),
        (1.0, True, True, False, "occluded"),
        (1.0, True, True, True, "visible"),
    ]
    xyz = torch.ones(4, 2, 3)
    xyz[..., 0] = torch.tensor([pair[0] for pair in pairs]).view(4, 2)
    xyz[0, 1, 1] = inf  # beside a NaN: still NaN
    flags = [torch.tensor([pair[i] for pair in pairs]).view(4, 2) for i in (1, 2, 3)]
    valid = flags[2].any(1)
    row = row_of("projection", [("projection", View(xyz, *flags, valid))])
    kinds = [pair[4] for pair in pairs]
    expected = {kind: kinds.count(kind) for kind in ("nan", "inf", "behind", "outside", "occluded")}
    expected |= {"points": 4, "valid": 2, "valid_share": 0.5}
    assert row == {f"projection/{key}": value for key, value in expected.items()}


def test_projection_of_no_point() -> None:
    empty = torch.zeros(0, 1, dtype=torch.bool)
    row = row_of("projection", [("projection", View(torch.zeros(0, 1, 3), empty, empty, empty, empty[:, 0]))])
    assert row.pop("projection/valid_share") is None
    assert set(row.values()) == {0.0}


def test_gate() -> None:
    alpha = np.concatenate([np.random.default_rng(0).random(500), [0, 1, 0.01, 0.99]]).astype("f4")
    bad = np.concatenate([alpha, np.array([np.nan, np.inf, -np.inf], "f4")])
    row = row_of("gate", [("gate", Gate(torch.zeros(1), torch.from_numpy(bad)[:, None]))])
    wide = alpha.astype("f8")
    expected = {
        "mean": wide.mean(),
        "std": wide.std(),
        "share_lt_0.05": (wide < 0.05).mean(),
        "share_gt_0.95": (wide > 0.95).mean(),
        "nonfinite": 3,
    }
    assert row == pytest.approx({f"gate/{key}": value for key, value in expected.items()}, rel=1e-6)


def test_gate_bins() -> None:
    edges = np.arange(33, dtype="f4") / 32
    inside = np.concatenate([np.random.default_rng(1).random(2000).astype("f4"), edges, np.nextafter(edges, 2)[:-1]])
    outside = np.array([np.nan, np.inf, -np.inf, -0.1, 1.1, np.nextafter(np.float32(1), 2)], "f4")
    counts = bin_counts(torch.from_numpy(np.concatenate([inside, outside])))
    np.testing.assert_array_equal(counts.numpy(), np.histogram(inside, bins=edges)[0])
    assert counts.sum() == len(inside)


def test_the_first_module_with_the_fields_is_watched() -> None:
    first, second = Gate(torch.zeros(1), torch.full((4, 1), 0.2)), Gate(torch.zeros(1), torch.full((4, 1), 0.8))
    encoded = Encoded(None, torch.zeros(1), None, alpha=torch.full((4, 1), 0.5))
    outputs = [("a", first), ("b", second), ("encoder", encoded)]
    assert row_of("gate", outputs)["gate/mean"] == pytest.approx(0.2)
    chosen = GateProbe(modules=["b"], name="second")
    assert row_of(chosen, outputs)["second/mean"] == pytest.approx(0.8)


def test_calls_of_a_step_are_put_together() -> None:
    model = Give()
    with Monitor(model, probes=["gate", "projection", ClipProbe()]) as monitor:
        with monitor.step():
            for value, rows in ((0.5, 4), (1.5, 8), (float("nan"), 2)):
                model(Gate(torch.zeros(1), torch.full((rows, 1), value)))
                model({"tokens": torch.full((rows, 2), value)})
        monitor.end_step()
        row = monitor.latest()
    assert row["gate/mean"] == 1.0
    assert row["gate/nonfinite"] == 2
    assert (row["clip/tokens/min"], row["clip/tokens/max"], row["clip/tokens/nonfinite"]) == (0.5, 1.5, 4)


class Own(nn.Module):
    """A user's model, with the numbers of a step in places of its own."""

    def __init__(self, outputs: dict[str, Any]) -> None:
        super().__init__()
        self.outputs = outputs
        for name in outputs:
            self.add_module(name, Give())

    def forward(self) -> None:
        for name, output in self.outputs.items():
            getattr(self, name)(output)


def own_row(probe: Probe, **outputs: Any) -> dict[str, float | None]:
    model = Own(outputs)
    with Monitor(model, probes=[probe]) as monitor:
        with monitor.step():
            model()
        monitor.end_step()
        return monitor.latest()


ALPHA = torch.tensor([[0.25], [0.75], [0.5]])


@pytest.mark.parametrize(
    ("output", "place"),
    [
        (ALPHA, ""),
        ((None, ALPHA), 1),
        ((None, ALPHA), "1"),
        ({"weight": ALPHA}, "weight"),
        ({"aux": {"w": ALPHA}}, "aux.w"),
        ({"aux.w": ALPHA}, "aux.w"),
        ([{"w": (ALPHA,)}], "0.w.0"),
        (Encoded(None, torch.zeros(1), None, alpha=ALPHA), "alpha"),
        ({"stage": Encoded(None, torch.zeros(1), None, alpha=ALPHA)}, "stage.alpha"),
    ],
)
def test_a_gate_of_ones_own(output: Any, place: str | int) -> None:
    row = own_row(GateProbe(modules=["mine"], fields={"alpha": place}), other=output, mine=output)
    assert row["gate/mean"] == pytest.approx(0.5)
    assert row["gate/share_lt_0.05"] == 0.0
    assert own_row(GateProbe(modules=["absent"], fields={"alpha": place}), mine=output) == {}
    assert own_row(GateProbe(modules=["mine"], fields={"alpha": "nothing"}), mine=output) == {}


def test_clip_features_of_ones_own() -> None:
    tokens, head = torch.randn(2, 7, 8), torch.randn(3, 4)
    f2d, f3d, valid = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([True, True, False, True, False])
    probe = ClipProbe(
        head=["image.adapter"],
        modules=["vit", "points"],
        fields={"tokens": 0, "f2d": "image", "f3d": "cloud", "valid": "seen"},
    )
    model = nn.ModuleDict({"vit": Give(), "points": Give(), "image": nn.ModuleDict({"adapter": Give()})})
    with Monitor(model, probes=[probe]) as monitor:
        with monitor.step():
            model["vit"]((tokens, None))
            model["image"]["adapter"](head)
            model["points"]({"image": f2d, "cloud": f3d, "seen": valid})
        monitor.end_step()
        row = monitor.latest()
    expected = {"tokens": ranges(tokens.reshape(-1, 8).numpy()), "head": ranges(head.numpy())}
    expected["points"] = ranges(f2d.numpy(), valid.numpy())
    for where, numbers in expected.items():
        for key, number in numbers.items():
            assert row[f"clip/{where}/{key}"] == pytest.approx(number, rel=1e-5), (where, key)
    ratio = expected["points"]["norm_mean"] / ranges(f3d.numpy(), valid.numpy())["norm_mean"]
    assert row["clip/ratio_2d_3d"] == pytest.approx(ratio, rel=1e-5)
    row = own_row(ClipProbe(modules=["vit"], fields={"tokens": ""}), vit=tokens)
    assert row["clip/tokens/max"] == tokens.max().item()


def test_a_projection_of_ones_own() -> None:
    xyz, flags = torch.ones(4, 2, 3), [torch.rand(4, 2) < share for share in (0.8, 0.5, 0.3)]
    plain = row_of("projection", [("x", View(xyz, *flags, flags[2].any(1)))])
    places = {"camera_xyz": 0, "in_front": "1.front", "inside": "1.in", "visible": "1.seen", "valid": 2}
    output = (xyz, {"front": flags[0], "in": flags[1], "seen": flags[2]}, flags[2].any(1))
    assert own_row(ProjectionProbe(modules=["lift"], fields=places), lift=output) == plain
    assert plain["projection/points"] == 4


def test_fields_that_do_not_exist_are_explained() -> None:
    with pytest.raises(UserError, match=r"gate reads no field 'alfa'\. Did you mean 'alpha'\?"):
        GateProbe(fields={"alfa": 0})
