"""Mask3D's decoder: sizes, masked attention over scales, scenes kept apart, degenerate scenes."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bifusion_diag.config.presets import load_settings
from bifusion_diag.config.settings import BackboneSettings, DecoderSettings, Mask3DSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.attention import QueryAttention
from bifusion_diag.model.decoder import DecoderOutput
from bifusion_diag.model.encoder3d import Encoder3D
from bifusion_diag.model.fps import farthest_points
from bifusion_diag.model.mask3d import Mask3DDecoder, ScaleLayer
from bifusion_diag.model.outputs import EncoderOutput, Scales
from bifusion_diag.model.pooling import MeanPooling
from bifusion_diag.model.scale_pooling import scale_voxels
from bifusion_diag.model.sparse import make_engine

TINY = BackboneSettings(
    layers=(1,) * 8, planes=(4, 4, 8, 6, 8, 6, 4, 6), init_dim=4, first_kernel=3, voxel_size=0.05
)  # fmt: skip
SMALL = DecoderSettings(
    kind="mask3d",
    masks="superpoint",
    layers=2,
    width=16,
    heads=4,
    hidden=24,
    semantic_classes=7,
    instance_classes=7,
    mask3d=Mask3DSettings(queries=9, keys=(6, 10, 20)),
)


def _decoder(settings: DecoderSettings = SMALL) -> Mask3DDecoder:
    torch.manual_seed(3)
    return Mask3DDecoder(settings, TINY.planes[-1], TINY.planes[3:])


def _encode(batch: Batch, engine: str = "native") -> EncoderOutput:
    """The voxels of a U-Net, with features that depend on nothing but where a voxel lies in its scene."""
    encoder = Encoder3D(TINY, engine=make_engine(engine), scales=True).eval().to(batch.coords.dtype)
    scales = encoder(batch).scales
    assert scales is not None
    tensors = []
    for tensor in scales.tensors:
        waves = torch.arange(1, 3 * tensor.feats.shape[1] + 1, dtype=batch.coords.dtype).view(3, -1)
        tensors.append(tensor.with_feats(2 * (tensor.coords[:, 1:].to(waves.dtype) @ waves).sin()))
    fused = tensors[-1].feats.index_select(0, scales.point_voxel)
    return EncoderOutput(fused=fused, f3d=fused, scales=Scales(tensors, scales.point_voxel))


def _decode(decoder: Mask3DDecoder, batch: Batch, engine: str = "native") -> DecoderOutput:
    torch.manual_seed(0)
    encoded = _encode(batch, engine)
    pooled = MeanPooling()(encoded.fused, batch.coords, batch.superpoint, sum(batch.superpoint_counts))
    return decoder(*decoder.inputs(encoded, pooled, batch))


def _tensors(output: DecoderOutput, scene: int) -> list[Tensor]:
    return [tensor for layer in output.layers for tensor in (layer.classes[scene], layer.masks[scene])]


def _scene(batch: Batch, scene: int) -> Batch:
    """One scene of two equally large ones."""
    n, s = batch.point_counts[0], batch.superpoint_counts[0]
    rows = slice(scene * n, (scene + 1) * n)
    per_point = ("xyz", "coords", "color", "semantic", "instance")
    return replace(
        batch,
        **{name: getattr(batch, name)[rows] for name in per_point},
        superpoint=batch.superpoint[rows] - scene * s,
        scene_index=torch.zeros(n, dtype=torch.int64),
        point_counts=(n,),
        superpoint_counts=(s,),
    )


def test_size_is_mask3ds() -> None:
    """Counted from its configuration: width 128; 4 scales of 256, 256, 128 and 96 features; rounds share weights."""
    d, ff, classes = 128, 1024, 201
    attention = 4 * (d * d + d) + 2 * d
    feed_forward = (d * ff + ff) + (ff * d + d) + 2 * d
    layers = sum(2 * attention + feed_forward + (channels * d + d) for channels in (256, 256, 128, 96))
    mlp = 2 * (d * d + d)  # of the places, and of the queries for their masks
    heads = 2 * mlp + (d * classes + classes) + (96 * d + d) + 2 * d
    model = load_settings("mask3d").model
    decoder = Mask3DDecoder(model.decoder, 96, model.backbone.planes[3:])
    assert sum(p.numel() for p in decoder.parameters()) == layers + heads == 1_784_009


def test_a_prediction_before_and_after_every_layer(batch_of_two: Callable[..., Batch]) -> None:
    output = _decode(_decoder().eval(), batch_of_two())
    assert len(output.layers) == 2 * 3 + 1
    assert output.semantic is None
    assert output.query_classes is None
    assert [ids.tolist() for ids in output.query_superpoints] == [[-1] * 9] * 2
    for layer in output.layers:
        assert layer.level == "superpoint"
        assert [tuple(mask.shape) for mask in layer.masks] == [(9, 24)] * 2
        assert [tuple(classes.shape) for classes in layer.classes] == [(9, 8)] * 2
    first = output.layers[0].masks[0]
    assert torch.equal(first, first[:1].expand_as(first)), "all queries start as zeros"
    last = output.layers[-1].masks[0]
    assert (last[1:] - last[:1]).abs().amax(1).gt(1e-4).all(), "their places tell them apart"


def test_masks_are_queries_times_mean_features_of_superpoints(batch_of_two: Callable[..., Batch]) -> None:
    decoder, batch = _decoder().eval(), batch_of_two()
    seen: dict[str, list[Tensor]] = {"query": [], "feature": []}
    decoder.query_mask.register_forward_hook(lambda m, args, out: seen["query"].append(out))
    decoder.superpoint_mask.register_forward_pre_hook(lambda m, args: seen["feature"].append(args[0]))
    output = _decode(decoder, batch)
    fused = _encode(batch).fused
    means = torch.stack([fused[batch.superpoint == s].mean(0) for s in range(48)])
    torch.testing.assert_close(seen["feature"][0], means)
    for query, layer in zip(seen["query"], output.layers, strict=True):
        torch.testing.assert_close(layer.masks[1], query[9:] @ decoder.superpoint_mask(means[24:]).T)


def test_attention_against_a_dense_one_with_minus_infinity() -> None:
    """Two heads, written out: places count in the comparison and not in the values."""
    attention = QueryAttention(8, 2, 0.0).double()
    inner = attention.attention
    queries, places = torch.randn(2, 5, 8, dtype=torch.float64)
    keys, key_places = torch.randn(2, 7, 8, dtype=torch.float64)
    hidden = torch.rand(5, 7) < 0.5
    hidden[:, 0] = False

    of_q, of_k, of_v = inner.in_proj_weight.split(8)
    b_q, b_k, b_v = inner.in_proj_bias.split(8)
    q, k, v = (queries + places) @ of_q.T + b_q, (keys + key_places) @ of_k.T + b_k, keys @ of_v.T + b_v
    heads = []
    for columns in (slice(0, 4), slice(4, 8)):
        scores = (q[:, columns] @ k[:, columns].T / math.sqrt(4)).masked_fill(hidden, -math.inf)
        heads.append(scores.softmax(1) @ v[:, columns])
    expected = attention.norm(queries + inner.out_proj(torch.cat(heads, 1)))
    found = attention(queries, (5,), keys, (7,), [hidden], places, key_places)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_queries_look_where_their_mask_is(batch_of_two: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the mask averaged to the voxels by hand, in evaluation over all voxels of the scale."""
    decoder, batch = _decoder().eval(), batch_of_two()
    given: list[tuple[Tensor, ...]] = []
    forward = ScaleLayer.forward
    monkeypatch.setattr(ScaleLayer, "forward", lambda self, *args: (given.append(args), forward(self, *args))[1])
    output = _decode(decoder, batch)
    one_voxel_a_point = torch.floor(batch.coords[: batch.point_counts[0]] / 0.05).long()
    cells = [tuple(cell) for cell in (one_voxel_a_point.div(16, rounding_mode="floor") * 16).tolist()]
    for number in (0, 3):  # the coarsest scale of both rounds
        mask = output.layers[number].masks[0]
        hidden = given[number][6][0]
        assert hidden.shape == (9, len(set(cells)))
        assert not hidden.all(1).any()
        voxels = sorted(set(cells))
        for query in range(9):
            logits = _averaged(mask[query][batch.superpoint[: len(cells)]].tolist(), one_voxel_a_point.tolist())
            outside = torch.tensor([logits[voxel] < 0 for voxel in voxels])
            expected = outside if not outside.all() else torch.zeros_like(outside)
            close = torch.tensor([abs(logits[voxel]) < 1e-6 for voxel in voxels])
            assert torch.equal(hidden[query] | close, expected | close)


def _averaged(values: list[float], cells: list[list[int]]) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], list[float]] = {}
    for value, cell in zip(values, cells, strict=True):
        found.setdefault(tuple(cell), []).append(value)
    mean = {cell: sum(v) / len(v) for cell, v in found.items()}
    for stride in (2, 4, 8, 16):
        found = {}
        for cell, value in mean.items():
            found.setdefault(tuple(axis // stride * stride for axis in cell), []).append(value)
        mean = {cell: sum(v) / len(v) for cell, v in found.items()}
    return mean


def test_places_are_spread_over_the_scene(batch_of_two: Callable[..., Batch]) -> None:
    decoder, batch = _decoder().eval(), batch_of_two()
    codes: list[Tensor] = []
    decoder.query_projection.register_forward_pre_hook(lambda m, args: codes.append(args[0]))
    _decode(decoder, batch)
    coords = batch.coords[: batch.point_counts[0]]
    cells, inverse = torch.floor(coords / 0.05).long().unique(dim=0, return_inverse=True)
    means = torch.stack([coords[inverse == cell].mean(0) for cell in range(len(cells))])
    low, high = means.amin(0), means.amax(0)
    places = (means[farthest_points(cells, 9)] - low) / (high - low)
    torch.testing.assert_close(codes[0][:9], decoder.place(places), atol=1e-4, rtol=0)


def test_masks_that_are_empty_everywhere_give_finite_gradients(batch_of_two: Callable[..., Batch]) -> None:
    decoder = _decoder()
    torch.nn.init.zeros_(decoder.superpoint_mask.weight)
    torch.nn.init.ones_(decoder.superpoint_mask.bias)
    torch.nn.init.zeros_(decoder.query_mask[2].weight)
    torch.nn.init.constant_(decoder.query_mask[2].bias, -1.0)
    output = _decode(decoder, batch_of_two())
    assert all((layer.masks[0] < 0).all() for layer in output.layers)
    torch.stack([t.square().sum() for scene in (0, 1) for t in _tensors(output, scene)]).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)


def test_every_parameter_learns(batch_of_two: Callable[..., Batch]) -> None:
    decoder = _decoder()
    output = _decode(decoder, batch_of_two())
    torch.stack([t.square().sum() for scene in (0, 1) for t in _tensors(output, scene)]).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_scene_does_not_see_the_others(batch_of_two: Callable[..., Batch]) -> None:
    batch = batch_of_two()
    batch = replace(batch, coords=batch.coords.double(), color=batch.color.double())
    decoder = _decoder().double().eval()
    together = _decode(decoder, batch)
    for scene in (0, 1):
        alone = _decode(decoder, _scene(batch, scene))
        for ours, theirs in zip(_tensors(together, scene), _tensors(alone, 0), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_a_scene_of_one_point_has_one_query_and_finite_gradients(batch_of_two: Callable[..., Batch]) -> None:
    batch = batch_of_two()
    n = batch.point_counts[0] + 1
    batch = replace(
        batch,
        **{
            name: getattr(batch, name)[:n] for name in ("xyz", "coords", "color", "semantic", "instance", "scene_index")
        },
        superpoint=batch.superpoint[:n],
        point_counts=(n - 1, 1),
        superpoint_counts=(24, 1),
    )
    decoder = _decoder()
    output = _decode(decoder, batch)
    assert [len(ids) for ids in output.query_superpoints] == [9, 1]
    assert output.layers[-1].masks[1].shape == (1, 1)
    torch.stack([t.square().sum() for t in _tensors(output, 1)]).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)


def test_training_draws_voxels_by_the_seed_and_evaluation_draws_nothing(batch_of_two: Callable[..., Batch]) -> None:
    decoder, batch = _decoder(), batch_of_two()
    counts: list[tuple[int, ...]] = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda m, args: counts.append(args[5]))
    runs = []
    for _ in range(2):
        decoder.zero_grad()
        output = _decode(decoder, batch)  # seeds
        torch.stack([t.square().sum() for scene in (0, 1) for t in _tensors(output, scene)]).sum().backward()
        runs.append([*_tensors(output, 0), *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert max(counts[2]) == 20
    assert all(max(of) <= most for of, most in zip(counts, (6, 10, 20) * 4, strict=True))

    decoder.eval()
    _decode(decoder, batch)
    before = torch.get_rng_state()
    torch.manual_seed(0)
    _encode(batch)
    assert torch.equal(before, torch.get_rng_state())
    assert max(max(of) for of in counts[-6:]) > 20


def _attend(layer: QueryAttention, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
    """Multi-head attention as a dense softmax with −∞ where hidden."""
    inner = layer.attention
    projected = [
        x @ weight.T + bias
        for x, weight, bias in zip(
            (query, key, value), inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3), strict=True
        )
    ]
    q, k, v = (x.unflatten(1, (inner.num_heads, -1)).transpose(0, 1) for x in projected)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return inner.out_proj((scores.softmax(2) @ v).transpose(0, 1).flatten(1))


def test_the_whole_decoder_against_a_dense_one(batch_of_two: Callable[..., Batch]) -> None:
    """One scene in evaluation: coarse to fine, round after round. Some queries' masks are empty at some scales."""
    batch = _scene(batch_of_two(), 0)
    batch = replace(batch, coords=batch.coords.double(), color=batch.color.double())
    decoder = _decoder().double().eval()
    torch.nn.init.constant_(decoder.query_mask[2].bias, -0.12)
    torch.nn.init.constant_(decoder.superpoint_mask.bias, 0.12)
    output = _decode(decoder, batch)

    encoded = _encode(batch)
    assert encoded.scales is not None
    levels = scale_voxels(encoded.scales, batch.coords, batch.point_counts, batch.superpoint, batch.superpoint_counts)
    means = torch.stack([encoded.fused[batch.superpoint == s].mean(0) for s in range(24)])
    features = decoder.superpoint_mask(means)
    finest = levels[-1].positions[0]
    picked = farthest_points(levels[-1].cells[0], 9)
    low, high = finest.amin(0), finest.amax(0)
    place = decoder.query_projection(decoder.place((finest[picked] - low) / (high - low)))
    queries, blind, seeing = torch.zeros_like(place), 0, 0
    for number, prediction in enumerate(output.layers):
        normed = decoder.query_norm(queries)
        mask = decoder.query_mask(normed) @ features.T
        torch.testing.assert_close(prediction.masks[0], mask, atol=1e-9, rtol=0)
        torch.testing.assert_close(prediction.classes[0], decoder.classes(normed), atol=1e-9, rtol=0)
        if number == len(output.layers) - 1:
            break
        layer, level = decoder.layers[number % 3], levels[number % 3]
        positions = level.positions[0]
        low, high = positions.amin(0), positions.amax(0)
        key_place = decoder.place((positions - low) / (high - low))
        hidden = (level.shares[0].pool(mask.T, len(positions)) < 0).T
        blind, seeing = blind + int(hidden.all(1).sum()), seeing + int((hidden.any(1) & ~hidden.all(1)).sum())
        hidden[hidden.all(1)] = False
        keys = layer.key_projection(level.feats[0])
        cross, own = layer.cross_attention, layer.self_attention
        queries = cross.norm(queries + _attend(cross, queries + place, keys + key_place, keys, hidden))
        queries = own.norm(queries + _attend(own, queries + place, queries + place, queries, None))
        queries = layer.feed_forward(queries)
    assert blind > 0
    assert seeing > 0


def test_drawn_voxels_keep_their_places(batch_of_two: Callable[..., Batch]) -> None:
    batch, decoder = batch_of_two(), _decoder()
    scales = _encode(batch).scales
    assert scales is not None
    level = scale_voxels(scales, batch.coords, batch.point_counts, batch.superpoint, batch.superpoint_counts)[1]
    every = [torch.arange(len(positions)) for positions in level.positions]
    codes = decoder._key_places(level, every)
    found = decoder._key_places(level, [torch.tensor([3, 1]), torch.tensor([2])])
    torch.testing.assert_close(found, codes[torch.tensor([3, 1, len(every[0]) + 2])])


def test_both_engines_draw_the_same_voxels(batch_of_two: Callable[..., Batch]) -> None:
    """MinkowskiEngine numbers coarse voxels in an order of its own."""
    if importlib.util.find_spec("MinkowskiEngine") is None:
        pytest.skip("MinkowskiEngine is not installed (`make minkowski`)")
    batch, decoder = batch_of_two(), _decoder()
    native, minkowski = _decode(decoder, batch), _decode(decoder, batch, "minkowski")
    for scene in (0, 1):
        for ours, theirs in zip(_tensors(native, scene), _tensors(minkowski, scene), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
