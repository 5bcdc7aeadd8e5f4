"""The presets: on a stand-in with ESAM's names and outputs, and on the real BiFusion."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from probe_toys import Give
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bifusion_diag.config import load_settings
from bifusion_diag.data import BatchLoader, open_source
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model
from bifusion_diag.probes import PROBES, Monitor, expose, probe_preset

WIDTH = 16


class MinkowskiSparse:
    """Keeps its features where MinkowskiEngine does."""

    def __init__(self, features: Tensor) -> None:
        self.F = features


class Conv(nn.Sequential):
    """1 × 1 sparse convolution, BatchNorm, ReLU."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())

    def forward(self, x: MinkowskiSparse) -> MinkowskiSparse:
        return MinkowskiSparse(super().forward(x.F))


class Pool(nn.Module):
    """Superpoint features and the weight of each point, in [0, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.pts_proj1 = nn.Sequential(nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH))
        self.pts_proj2 = nn.Sequential(nn.Linear(WIDTH, 1, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor, superpoint: Tensor, xyz: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.pts_proj2(self.pts_proj1(xyz)) * 2
        return torch.zeros(6, WIDTH).index_add(0, superpoint, x * weight), weight


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, sources: list[Tensor], queries: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        return [
            self.norm(self.attn(q, s, s, attn_mask=m)[0] + q) for s, q, m in zip(sources, queries, masks, strict=True)
        ]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross_attn_layers = nn.ModuleList([CrossAttention() for _ in range(2)])
        self.self_attn_layers = nn.ModuleList([CrossAttention() for _ in range(2)])
        self.out_cls = nn.Linear(WIDTH, 2)

    def forward(self, feats: list[Tensor]) -> dict[str, Any]:
        queries = feats
        for cross, own in zip(self.cross_attn_layers, self.self_attn_layers, strict=True):
            queries = cross(feats, queries, [torch.zeros(len(x), len(x), dtype=torch.bool) for x in feats])
            queries = own(queries, queries, [None] * len(feats))
        return {"cls_preds": [self.out_cls(q) for q in queries], "queries": queries, "aux_outputs": []}


class MergeHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.LayerNorm(8))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [F.normalize(self.net(x), p=2, dim=-1) for x in xs]


class Matcher:
    """A plain object that is called, as ESAM's."""

    def __call__(self, predicted: Any, instances: Any) -> tuple[Tensor, Tensor]:
        number = len(instances.labels)
        return torch.arange(number), torch.zeros(number, dtype=torch.long)


class InstanceCriterion:
    def __init__(self) -> None:
        self.matcher = Matcher()

    def __call__(self, out: dict[str, Any], labels: list[Tensor]) -> dict[str, Tensor]:
        loss = torch.zeros(())
        for logits, found in zip(out["cls_preds"], labels, strict=True):
            queries, _ = self.matcher(None, SimpleNamespace(labels=found))
            loss = loss + logits[queries].square().sum()
        return {"inst_loss": loss}


class Esam(nn.Module):
    """ScanNet200MixFormer3D_FF_Online's attributes, in the order of its forward; two frames of two scenes."""

    def __init__(self) -> None:
        super().__init__()
        self.img_backbone, self.conv = Give(), Conv()
        self.pool, self.decoder, self.merge_head = Pool(), Decoder(), MergeHead()
        self.criterion = SimpleNamespace(inst_criterion=InstanceCriterion())

    def forward(self, xyz: Tensor, labels: list[Tensor]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for frame in xyz:
            tokens = self.img_backbone(frame.new_ones(1, 8, 4, 5))
            points = self.conv(MinkowskiSparse(tokens.mean((2, 3)).expand(len(frame), 8) * frame[:, :1])).F
            feats, _ = self.pool(points, torch.arange(len(frame)) % 6, frame)
            out = self.decoder([feats[:4], feats[4:]])
            merged = self.merge_head(out["queries"])
            for name, loss in self.criterion.inst_criterion(out, labels).items():
                losses[name] = losses.get(name, torch.zeros(())) + loss
        return losses | {"merge_loss_tmp": merged[0].square().sum(), "seg_loss": points.square().mean()}


def test_esam() -> None:
    torch.manual_seed(0)
    model = Esam()
    state = dict(model.state_dict())
    expose(model, "criterion.inst_criterion.matcher")
    assert list(model.state_dict()) == list(state)
    xyz = torch.randn(2, 30, 3)
    heads: list[Tensor] = []
    handle = model.merge_head.net.register_forward_hook(lambda _m, _i, out: heads.append(out.detach()))
    weights: list[Tensor] = []
    model.pool.register_forward_hook(lambda _m, _i, out: weights.append(out[1].detach()))
    with Monitor(model, probes=probe_preset("esam")) as monitor:
        with monitor.step():
            losses = model(xyz, [torch.zeros(3), torch.zeros(0)])
            sum(losses.values()).backward()
        monitor.end_step()
        row = monitor.latest()
    handle.remove()
    assert row["clip/tokens/max"] == 1.0  # of the image backbone's map
    assert row["clip/head/min"] == 0.0  # after conv's ReLU
    assert row["pool/mean"] == pytest.approx(torch.stack([w.mean() / 2 for w in weights]).mean().item(), rel=1e-5)
    for i in range(2):
        for kind in ("cross_attn_layers", "self_attn_layers"):
            assert row[f"attention/decoder.{kind}.{i}.attn/masked_rows"] == 0.0
            assert row[f"normalize/decoder.{kind}.{i}.norm/smallest"] > 0
    assert 0 < row["attention/decoder.cross_attn_layers.0.attn/entropy"] < 1
    smallest = min(x.norm(dim=-1).min().item() for x in heads)
    assert row["normalize/merge_head.net/smallest"] == pytest.approx(smallest, rel=1e-5)
    assert row["normalize/conv.1/smallest"] > 0
    # two frames of two scenes, each a call of the matcher: three objects, all queries matched with the first
    matching = {name.split("/")[1]: value for name, value in row.items() if name.startswith("matching/")}
    assert matching == {"queries_mean": 1.5, "queries_min": 0, "empty": 0, "objects": 6, "unmatched": 4}
    for name, loss in losses.items():
        assert row[f"loss/{name}/raw"] == pytest.approx(loss.item())


def test_a_matcher_that_is_not_exposed_is_not_recorded() -> None:
    model = Esam()
    xyz = torch.randn(2, 30, 3)
    with Monitor(model, probes=probe_preset("esam")) as monitor:
        with monitor.step():
            sum(model(xyz, [torch.zeros(3), torch.zeros(0)]).values()).backward()
        monitor.end_step()
        row = monitor.latest()
    assert not [name for name in row if name.startswith("matching/")]


def test_bifusion() -> None:
    settings = load_settings(
        "bifusion",
        scale="small",
        overrides=["data.max_points=600", "data.image_height=48", "data.image_width=64", "data.superpoint_size=0.5"],
    )
    torch.manual_seed(0)
    model = build_model(settings)
    model.set_progress(0, 100)
    batch = BatchLoader(open_source(settings.data, seed=0), settings.data, batch_size=2, seed=0).batch(0)
    matched: list[Any] = []
    entered: list[Tensor] = []
    model.criterion.register_forward_hook(lambda _m, _i, out: matched.append(out))
    model.encoder.normalize3d.register_forward_hook(lambda _m, given, _o: entered.append(given[0].detach()))
    with Monitor(model, probes=[p for p in probe_preset("bifusion") if p.prefix != "loss_gradients"]) as monitor:
        with monitor.step(batch):
            model(batch).loss.total.backward()
        monitor.end_step()
        row = monitor.latest()
    assert row["loss/total"] == pytest.approx(matched[0].total.item())
    pairs = matched[0].matches
    queries = [len(set(pair.queries.tolist())) for pair in pairs]
    found = sum(len(set(pair.objects.tolist())) for pair in pairs)
    assert row["matching/queries_mean"] == sum(queries) / 2
    assert row["matching/objects"] - row["matching/unmatched"] == found > 0
    assert row["normalize/encoder.normalize3d/smallest"] == pytest.approx(entered[0].norm(dim=1).min().item(), rel=1e-5)
    for name in ("encoder.normalize2d", "criterion.normalize2d", "criterion.normalize3d", "encoder.backbone.bn0.bn"):
        assert row[f"normalize/{name}/smallest"] >= 0
    rows = [name for name in row if name.startswith("attention/") and name.endswith("masked_rows")]
    assert [name.split("/")[1] for name in rows] == [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and "clip" not in name
    ]
    assert {row[name] for name in rows} == {0.0}
    assert row["gate/mean"] is not None
    assert row["projection/points"] == len(batch.xyz)


def test_the_class_ids_of_a_run_are_those_of_its_settings() -> None:
    (probe,) = probe_preset("bifusion", ["data"], labels={"semantic": (0, 299)})
    for ids, strange in ([0, 299, -1], 0), ([300, -2, 5], 2):
        with Monitor(nn.Linear(1, 1), probes=[probe]) as monitor:
            with monitor.step({"semantic": torch.tensor(ids)}):
                pass
            monitor.end_step()
            assert monitor.latest()["data/semantic/out_of_range"] == strange


class Waits(TorchDispatchMode):
    """Names the operations that would make the host wait for an accelerator; on CPU tensors they are the same."""

    WAITING = ("_local_scalar_dense", "nonzero", "unique", "is_nonzero", "equal", "masked_select", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if any(name.startswith(waiting) for waiting in self.WAITING):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    model = Esam()
    expose(model, "criterion.inst_criterion.matcher")
    probes = [p for p in probe_preset("esam") if p.prefix in ("normalize", "attention", "matching")]
    waits, calls = Waits(), 0

    def counted(event: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            with waits:
                found = event(*args)
                return None if found is None else list(found)

        return run

    for probe in probes:
        probe.seen, probe.collect = counted(probe.seen), counted(probe.collect)  # type: ignore[method-assign]
    with Monitor(model, probes=probes) as monitor:
        for _ in range(4):
            with monitor.step():
                sum(model(torch.randn(2, 30, 3), [torch.zeros(3), torch.zeros(0)]).values()).backward()
    assert calls > 50
    assert waits.seen == []
    with waits:
        torch.ones(1).item()
    assert waits.seen == ["aten._local_scalar_dense.default"]


def test_every_probe_of_the_catalogue_is_in_every_preset() -> None:
    for name in ("bifusion", "esam"):
        assert {type(probe) for probe in probe_preset(name)} == set(PROBES.values())
    with pytest.raises(UserError, match=r"unknown preset of probes 'esan'\. Did you mean 'esam'\?"):
        probe_preset("esan")


def test_what_cannot_be_exposed() -> None:
    model = Esam()
    with pytest.raises(UserError, match="that is a NoneType"):
        expose(model, "criterion.matcher")
    with pytest.raises(UserError, match="a module already"):
        expose(model, "decoder.out_cls")
    model.matcher = 3
    with pytest.raises(UserError, match="a 'matcher' of its own"):
        expose(model, "criterion.inst_criterion.matcher")
    model.own = Matcher()
    expose(model, "own")
    assert isinstance(model.own, nn.Module)
