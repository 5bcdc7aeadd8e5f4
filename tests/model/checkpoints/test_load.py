"""Foreign weights: listed from other projects' sources, computed by hand from their raw names, found in our modules."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from bifusion_diag.config import load_settings
from bifusion_diag.data.batch import Batch
from bifusion_diag.data.scannet200 import CLASS_NAMES
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model
from bifusion_diag.model.checkpoints import LoadReport, load_weights
from bifusion_diag.model.outputs import Predictions
from bifusion_diag.model.segmenter import Segmenter

Checkpoint = Callable[..., dict[str, Tensor]]
Listing = Callable[..., dict[str, tuple[int, ...]]]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
HEADS = ("model.decoder.score_head=true", "model.decoder.box_head=true")


@functools.cache
def built(preset: str, *overrides: str) -> Segmenter:
    return build_model(load_settings(preset, scale="small", overrides=overrides)).eval()


def small(preset: str, *overrides: str) -> Segmenter:
    """A copy, as building takes longer; ``fresh_values`` gives it other weights."""
    return copy.deepcopy(built(preset, *overrides))


def fresh_values(model: Segmenter) -> Segmenter:
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    return model


def stored(state: dict[str, Tensor], name: str = "foreign.pth") -> Path:
    torch.save({"meta": {"epoch": 128}, "state_dict": state}, name)
    return Path(name)


def assert_every_name_is_accounted_for(report: LoadReport, model: Segmenter) -> None:
    mis_shaped = [each.name for each in report.mis_shaped]
    accounted = [*report.loaded, *mis_shaped, *report.missing, *report.fresh, *report.frozen]
    assert sorted(accounted) == sorted(model.state_dict())


# --- the listing itself


def test_the_listing_counts_what_esam_counts(listing: Listing) -> None:
    shapes = listing("esam")
    assert sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(BUFFERS)) == 41_459_787


# --- ESAM


def test_esam_in_full_size_loads_with_nothing_missing(checkpoint: Checkpoint) -> None:
    model = build_model(load_settings("baseline"))
    report = load_weights(model, stored(checkpoint("esam")))
    assert (report.layout, report.parameters) == ("ESAM", 41_459_787)
    assert (report.missing, report.unexpected, report.mis_shaped, report.fresh, report.frozen) == ((),) * 5
    assert len(report.loaded) == 463
    assert_every_name_is_accounted_for(report, model)


def multihead(
    raw: dict[str, Tensor],
    name: str,
    queries: Tensor,
    values: Tensor,
    hidden: Tensor | None,
    keys: Tensor | None = None,
) -> Tensor:
    """Attention head by head: softmax(q·k / sqrt(width of a head)) v; the keys are the values where none are given."""
    keys = values if keys is None else keys
    heads = 2  # at scale small, of every decoder
    width = queries.shape[1]
    weight, bias = raw[f"{name}.in_proj_weight"], raw[f"{name}.in_proj_bias"]
    q = queries @ weight[:width].T + bias[:width]
    k = keys @ weight[width : 2 * width].T + bias[width : 2 * width]
    v = values @ weight[2 * width :].T + bias[2 * width :]
    out = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        logits = q[:, part] @ k[:, part].T / math.sqrt(width // heads)
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        out.append(logits.softmax(dim=1) @ v[:, part])
    return torch.cat(out, dim=1) @ raw[f"{name}.out_proj.weight"].T + raw[f"{name}.out_proj.bias"]


def norm(raw: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    return scaled * raw[f"{name}.weight"] + raw[f"{name}.bias"]


def dense(raw: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x @ raw[f"{name}.weight"].T
    return out + raw[f"{name}.bias"] if f"{name}.bias" in raw else out


def mlp(raw: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return dense(raw, f"{name}.2", dense(raw, f"{name}.0", x).clamp(min=0))


def esam_pool(raw: dict[str, Tensor], x: Tensor, xyz: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ESAM's GeoAwarePooling, one superpoint at a time: superpoint features and point weights."""
    superpoints, weights = [], torch.zeros(len(x), 1)
    for each in range(int(ids.max()) + 1):
        rows = (ids == each).nonzero()[:, 0]
        points = xyz[rows]
        diameter = (points.amax(dim=0) - points.amin(dim=0)).max()
        local = (points - points.mean(dim=0)) / (diameter + 1e-2)
        code = norm(raw, "pool.pts_proj1.1", dense(raw, "pool.pts_proj1.0", local)).clamp(min=0)
        code = norm(raw, "pool.pts_proj1.4", dense(raw, "pool.pts_proj1.3", code))
        shape = code.amax(dim=0)
        both = torch.cat([code, shape.expand_as(code)], dim=1)
        weight = norm(raw, "pool.pts_proj2.1", dense(raw, "pool.pts_proj2.0", both)).clamp(min=0)
        weight = 2 * torch.sigmoid(dense(raw, "pool.pts_proj2.3", weight))
        weights[rows] = weight
        superpoints.append((x[rows] * weight).mean(dim=0) + shape)
    return torch.stack(superpoints), weights


def query_decoder(
    raw: dict[str, Tensor], levels: list[str], superpoints: Tensor, points: Tensor, ids: Tensor, weights: Tensor
) -> dict[str, list[Tensor]]:
    """ScanNet(Mix)QueryDecoder on one scene with all superpoints as queries, from its raw weights.

    ``points``: (N, 3 + C) coordinates and features.
    """
    found: dict[str, list[Tensor]] = {"classes": [], "masks": [], "scores": [], "boxes": [], "semantic": []}
    keys = norm(raw, "decoder.input_proj.1", dense(raw, "decoder.input_proj.0", superpoints)).clamp(min=0)
    queries = mlp(raw, "decoder.query_proj", superpoints)
    hidden = None
    for layer, level in enumerate(levels):
        if layer > 0:
            name = f"decoder.cross_attn_layers.{layer - 1}"
            attended = multihead(raw, f"{name}.attn", queries, keys, hidden)
            queries = norm(raw, f"{name}.norm", queries + attended)
            name = f"decoder.self_attn_layers.{layer - 1}"
            queries = norm(raw, f"{name}.norm", queries + multihead(raw, f"{name}.attn", queries, queries, None))
            name = f"decoder.ffn_layers.{layer - 1}"
            thought = dense(raw, f"{name}.net.3", F.gelu(dense(raw, f"{name}.net.0", queries)))
            queries = norm(raw, f"{name}.norm", queries + thought)
        normed = norm(raw, "decoder.out_norm", queries)
        found["classes"].append(mlp(raw, "decoder.out_cls", normed))
        if "decoder.out_score.0.weight" in raw:
            found["scores"].append(mlp(raw, "decoder.out_score", normed))
        if "decoder.out_reg.0.weight" in raw:
            box = mlp(raw, "decoder.out_reg", normed)
            found["boxes"].append(torch.cat([box[:, :3], box[:, 3:].exp()], dim=1))
        features = mlp(raw, "decoder.x_mask", superpoints) if level == "SP" else mlp(raw, "decoder.x_pts_mask", points)
        mask = normed @ features.T
        found["masks"].append(mask)
        hidden = mask.sigmoid() < 0.5
        hidden[hidden.all(dim=1)] = False
        if level == "P":
            columns = [hidden[:, ids == each].float() @ weights[ids == each] for each in range(len(superpoints))]
            share = torch.cat(columns, dim=1) / torch.bincount(ids)
            hidden = (share > 0.5) & (share != share.amin(dim=1, keepdim=True))
    found["semantic"] = [dense(raw, "decoder.out_sem", normed)]
    return found


def assert_equals_raw(
    predictions: Predictions, batch: Batch, raw: dict[str, Tensor], levels: list[str], *, pooled: bool
) -> None:
    """Our predictions from our point features, against those computed from the raw weights on the same features."""
    first = 0
    for scene, (count, ids_in_all) in enumerate(
        zip(batch.point_counts, torch.split(batch.superpoint, list(batch.point_counts)), strict=True)
    ):
        rows = slice(first, first + count)
        first += count
        ids = ids_in_all - ids_in_all.min()
        x, xyz = predictions.encoder.fused[rows], batch.coords[rows]
        if pooled:
            superpoints, weights = esam_pool(raw, x, xyz, ids)
        else:
            superpoints = torch.stack([x[ids == each].mean(dim=0) for each in range(int(ids.max()) + 1)])
            weights = torch.ones(len(x), 1)
        want = query_decoder(raw, levels, superpoints, torch.cat([xyz, x], dim=1), ids, weights)
        close = {"rtol": 2e-3, "atol": 2e-4}  # float32 through the layers, in another order of sums
        assert len(predictions.layers) == len(levels)
        for layer, ours in enumerate(predictions.layers):
            torch.testing.assert_close(ours.classes[scene], want["classes"][layer], **close)
            torch.testing.assert_close(ours.masks[scene], want["masks"][layer], **close)
            if want["scores"]:
                torch.testing.assert_close(ours.scores[scene], want["scores"][layer], **close)
            if want["boxes"]:
                torch.testing.assert_close(ours.boxes[scene], want["boxes"][layer], **close)
        torch.testing.assert_close(predictions.semantic[scene], want["semantic"][0], **close)


@torch.no_grad()
def test_esams_weights_do_in_our_modules_what_they_do_in_esams(
    checkpoint: Checkpoint, batch_of_two: Callable[..., Batch]
) -> None:
    raw = checkpoint("esam", 4, score=True, box=True)
    model = small("baseline", *HEADS)
    report = load_weights(model, stored(raw))
    assert (report.missing, report.unexpected, report.mis_shaped, report.fresh) == ((), (), (), ())
    batch = batch_of_two()
    assert_equals_raw(model(batch).predictions, batch, raw, ["SP", "SP", "P", "P"], pooled=True)


# --- the U-Net, against the real MinkowskiEngine


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(Path(__file__).resolve().parents[2] / "golden" / "unet18a_tiny.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.model.backbone."])
@pytest.mark.parametrize("engine", ["native", "minkowski"])
@torch.no_grad()
def test_minkowski_engines_own_unet_gives_its_own_features(golden: dict[str, Tensor], engine: str, prefix: str) -> None:
    if engine == "minkowski" and importlib.util.find_spec("MinkowskiEngine") is None:
        pytest.skip("MinkowskiEngine is not installed (`make minkowski`)")
    state = {key[4:]: value for key, value in golden.items() if key.startswith("sd0.")}
    state |= {key[14:]: value for key, value in golden.items() if key.startswith("running_after.")}
    path = stored({f"{prefix}{name}": value for name, value in state.items()})
    settings = ("model.backbone.init_dim=8", "model.backbone.planes=[8,8,16,16,16,16,8,8]",
                "model.backbone.layers=[2,2,2,2,2,2,2,2]", "model.backbone.voxel_size=1.0")  # fmt: skip
    model = small("baseline", *settings, f"model.sparse_engine={engine}")
    report = load_weights(model, path)
    assert (report.layout, report.missing, report.unexpected, report.mis_shaped) == ("Res16UNet", (), (), ())
    assert {name.partition(".")[0] for name in report.fresh} == {"pool", "decoder"}
    net = model.encoder.backbone
    voxels = net.voxelize(golden["in_coords"][:, 1:].float(), golden["in_feats"], golden["in_coords"][:, 0].long())
    found, want = voxels.slice(net(voxels.tensor)), golden["out_feats_eval"]
    assert (found - want).abs().max() / want.abs().max() < 1e-4


# --- OneFormer3D, Mask3D, other sizes


@torch.no_grad()
def test_oneformer3ds_weights_do_in_our_modules_what_they_do_in_its_own(
    checkpoint: Checkpoint, batch_of_two: Callable[..., Batch]
) -> None:
    raw = checkpoint("oneformer3d", 4)
    model = small("oneformer3d")
    report = load_weights(model, stored(raw))
    assert (report.layout, report.missing, report.mis_shaped, report.fresh) == ("OneFormer3D", (), (), ())
    assert report.unexpected == ("backbone.final.kernel", "backbone.final.bias")  # the U-Net's own classifier
    batch = batch_of_two()
    assert_equals_raw(model(batch).predictions, batch, raw, ["SP"] * 7, pooled=False)


@torch.no_grad()
def test_mask3ds_weights_do_in_our_modules_what_they_do_in_its_own(checkpoint: Checkpoint) -> None:
    raw = {name.removeprefix("model."): value for name, value in checkpoint("mask3d", 4).items()}
    model = small("mask3d")
    report = load_weights(model, stored(raw | {"criterion.empty_weight": torch.ones(201)}))
    assert (report.layout, report.missing, report.mis_shaped, report.fresh) == ("Mask3D", (), (), ())
    assert report.unexpected == ("backbone.final.kernel", "backbone.final.bias")
    decoder = model.decoder
    points, queries, places, key_places = torch.randn(9, 24), torch.randn(4, 32), torch.randn(4, 32), torch.randn(9, 32)
    kernel, bias = raw["mask_features_head.kernel"], raw["mask_features_head.bias"]
    torch.testing.assert_close(decoder.superpoint_mask(points), points @ kernel + bias)
    project = [raw[f"query_projection.layers.{layer}.{leaf}"] for layer in (0, 2) for leaf in ("weight", "bias")]
    hidden = F.conv1d(places.T[None], project[0], project[1]).clamp(min=0)
    want = F.conv1d(hidden, project[2], project[3]).clamp(min=0)[0].T
    torch.testing.assert_close(decoder.query_projection(places), want)
    xyz = torch.rand(5, 3)
    angles = 2 * math.pi * xyz @ raw["pos_enc.gauss_B"]
    torch.testing.assert_close(decoder.place(xyz), torch.cat([angles.sin(), angles.cos()], dim=1))
    torch.testing.assert_close(decoder.query_mask(queries), mlp(raw, "mask_embed_head", queries))
    torch.testing.assert_close(decoder.query_norm(queries), norm(raw, "decoder_norm", queries))
    for scale, width in enumerate((64, 64, 32, 24)):
        feats, mask = torch.randn(9, width), torch.rand(4, 9) < 0.3
        keys = dense(raw, f"lin_squeeze.0.{scale}", feats)
        name = f"cross_attention.0.{scale}"
        want = multihead(raw, f"{name}.multihead_attn", queries + places, keys, mask, keys + key_places)
        want = norm(raw, f"{name}.norm", queries + want)
        name = f"self_attention.0.{scale}"
        want = norm(
            raw, f"{name}.norm", want + multihead(raw, f"{name}.self_attn", want + places, want, None, want + places)
        )
        name = f"ffn_attention.0.{scale}"
        thought = dense(raw, f"{name}.linear2", dense(raw, f"{name}.linear1", want).clamp(min=0))
        want = norm(raw, f"{name}.norm", want + thought)
        ours = decoder.layers[scale](queries, places, (4,), feats, key_places, (9,), [mask])
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_mask3ds_head_gets_our_order_of_classes(checkpoint: Checkpoint) -> None:
    theirs = [
        "chair",
        "table",
        "door",
        "couch",
    ]  # rows 0 to 3: its targets are max(class − 2, 0), without wall and floor
    raw = checkpoint("mask3d", 4)
    model = small("mask3d")
    load_weights(model, stored(raw))
    for row, name in enumerate(theirs):
        expected = raw["model.class_embed_head.weight"][row]
        assert torch.equal(model.decoder.classes.weight[CLASS_NAMES.index(name)], expected)
    last = ("mattress", 197), ("poster", 194)
    for name, row in last:
        assert torch.equal(model.decoder.classes.bias[CLASS_NAMES.index(name)], raw["model.class_embed_head.bias"][row])
    assert torch.equal(model.decoder.classes.bias[200], raw["model.class_embed_head.bias"][200])  # no object


@pytest.mark.parametrize(
    ("project", "preset"),
    [("esam", "baseline-5cm"), ("esam", "mask3d"), ("oneformer3d", "baseline"), ("mask3d", "oneformer3d")],
)
def test_every_projects_backbone_fits_every_baseline(checkpoint: Checkpoint, project: str, preset: str) -> None:
    raw = checkpoint(project, 4)
    model = small(preset)
    report = load_weights(model, stored(raw))
    backbone = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.backbone.")}
    assert backbone.keys() <= set(report.loaded)
    prefix = "model.backbone." if project == "mask3d" else "backbone."
    assert all(torch.equal(raw[prefix + name[17:]], value) for name, value in backbone.items())
    assert ("backbone.final.kernel" in " ".join(report.unexpected)) == (project != "esam")
    assert_every_name_is_accounted_for(report, model)


def test_a_larger_unet_in_bifusions_smaller_one_is_reported_tensor_by_tensor(checkpoint: Checkpoint) -> None:
    model = small("bifusion")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, stored(checkpoint("esam", 4)))
    shapes = {each.name: (each.in_file, each.in_model) for each in report.mis_shaped}
    assert shapes["encoder.backbone.convtr4p16s2.kernel"] == ((8, 64, 64), (8, 64, 32))
    assert shapes["decoder.key_projection.0.weight"] == ((64, 24), (64, 64))
    assert "backbone.block2.2.conv1.kernel" in report.unexpected  # the third block of 34's second scale
    assert set(report.missing) == {
        f"decoder.heads.score.{layer}.{leaf}" for layer in (0, 2) for leaf in ("weight", "bias")
    }
    assert {name.split(".")[1] for name in report.fresh} == {
        "spatial_head", "global_head", "head3d", "geometry", "film", "gate",
    }  # fmt: skip
    assert all(name.startswith("encoder.clip.") for name in report.frozen)
    assert_every_name_is_accounted_for(report, model)
    after = model.state_dict()
    loaded = set(report.loaded)
    assert all(torch.equal(after[name], value) for name, value in before.items() if name not in loaded)
    assert "encoder.backbone.convtr4p16s2.kernel (8, 64, 64) for (8, 64, 32)" in report.kinds()["mis-shaped"]


# --- an earlier run, frozen weights, random numbers


def test_an_earlier_runs_state(checkpoint: Checkpoint) -> None:
    source = fresh_values(small("baseline"))
    state = {f"model/{name}": value for name, value in source.state_dict().items()}
    extras = {"optimizer/pool.weight.0.bias/exp_avg": torch.zeros(24), "random/cpu": torch.get_rng_state()}
    save_file(state | extras, "state.safetensors")
    model = small("baseline")
    random = torch.get_rng_state()
    report = load_weights(model, Path("state.safetensors"))
    assert torch.equal(torch.get_rng_state(), random)
    assert (report.layout, report.unexpected, report.missing, report.fresh) == ("bifusion-diag checkpoint", (), (), ())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())
    report = load_weights(small("bifusion"), Path("state.safetensors"))  # a baseline to begin the fusion with
    assert "encoder.gate.channel.weight" in report.fresh
    assert "decoder.heads.score.0.weight" in report.missing


def test_weights_that_are_frozen_for_good_are_never_taken_from_a_file() -> None:
    source, model = fresh_values(small("bifusion")), small("bifusion")
    same = "encoder.clip.visual.ln_pre.bias"
    source.get_parameter(same).data = model.get_parameter(same).data.clone()
    before = {name: value.clone() for name, value in model.encoder.clip.state_dict().items()}
    torch.save({name: value.double() for name, value in source.state_dict().items()}, "whole.pt")
    report = load_weights(model, Path("whole.pt"))
    assert all(torch.equal(model.encoder.clip.state_dict()[name], value) for name, value in before.items())
    assert report.layout == "bifusion-diag state dict"
    names = {f"encoder.clip.{name}" for name, _ in model.encoder.clip.named_parameters()}
    assert set(report.frozen) == names
    assert "encoder.clip.visual.conv1.weight" in report.refused
    assert same not in report.refused
    assert report.kinds()["frozen, other in the file"] == report.refused
    assert_every_name_is_accounted_for(report, model)


def test_half_precision_is_widened_and_values_that_are_not_finite_are_named(checkpoint: Checkpoint) -> None:
    raw = {name: value.half() if value.is_floating_point() else value for name, value in checkpoint("esam", 4).items()}
    raw["backbone.bn0.bn.running_mean"][0] = torch.nan
    model = small("baseline")
    report = load_weights(model, stored(raw))
    assert report.nonfinite == ("encoder.backbone.bn0.bn.running_mean",)
    assert model.pool.position[0].weight.dtype == torch.float32
    assert torch.equal(model.pool.position[0].weight, raw["pool.pts_proj1.0.weight"].float())
    assert "1 not finite" in report.summary()
    assert report.summary().endswith("\n  not finite: encoder.backbone.bn0.bn.running_mean")


def test_report_for_the_record(checkpoint: Checkpoint) -> None:
    report = load_weights(small("bifusion"), stored(checkpoint("esam", 4)))
    facts = report.provenance()
    assert (facts["file"], facts["kind"]) == ("foreign.pth", "ESAM")
    assert len(facts["sha256"]) == 64
    assert (facts["tensors"], facts["mis-shaped"]) == (len(report.loaded), len(report.mis_shaped))
    assert facts["first_names"]["missing"] == list(report.missing)
    assert all(len(names) <= 5 for names in facts["first_names"].values())
    assert report.summary().startswith(f"foreign.pth (ESAM): {report.parameters:,} parameters; tensors: ")


def test_files_that_fit_nothing(checkpoint: Checkpoint) -> None:
    raw = checkpoint("esam", 4)
    torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, "resnet.pt")
    with pytest.raises(UserError, match=r"resnet\.pt holds names of no known layout .* begins with: layer1\.0\.conv1"):
        load_weights(small("baseline"), Path("resnet.pt"))
    model = small("baseline")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {name: torch.zeros(*value.shape, 2) for name, value in raw.items() if value.dim()}
    wrong["backbone.bn0.bn.num_batches_tracked"] = torch.tensor(5)  # fits, and says nothing
    with pytest.raises(UserError, match=r"nothing of wrong\.pt \(ESAM\) fits this model; of another shape: .*--scale"):
        load_weights(model, stored(wrong, "wrong.pt"))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
