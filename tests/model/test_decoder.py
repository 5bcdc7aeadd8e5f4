"""The mixed query decoder: sizes, masked attention, scenes kept apart, degenerate scenes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bifusion_diag.config.presets import load_settings
from bifusion_diag.config.settings import DecoderSettings
from bifusion_diag.model.attention import QueryAttention, unmask_hidden_rows
from bifusion_diag.model.decoder import DecoderOutput, MixedQueryDecoder, superpoints_outside

CHANNELS = 12
SMALL = DecoderSettings(width=16, heads=4, hidden=24, semantic_classes=7, score_head=True, box_head=True)


def _inputs(scenes: list[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    """Random features of scenes with (points, superpoints)."""
    generator = torch.Generator().manual_seed(seed)
    points = tuple(n for n, _ in scenes)
    superpoints = tuple(s for _, s in scenes)
    ids, first = [], 0
    for n, s in scenes:
        ids.append(first + torch.cat([torch.arange(s), torch.randint(0, s, (n - s,), generator=generator)]))
        first += s

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "superpoints": normal(sum(superpoints), CHANNELS),
        "superpoint_counts": superpoints,
        "points": normal(sum(points), CHANNELS),
        "coords": normal(sum(points), 3),
        "point_counts": points,
        "superpoint": torch.cat(ids),
        "point_weight": 2 * torch.rand(sum(points), 1, generator=generator),
    }


def _tensors(output: DecoderOutput, scene: int) -> list[torch.Tensor]:
    found = [output.semantic[scene]]
    for layer in output.layers:
        assert layer.scores is not None
        assert layer.boxes is not None
        found += [layer.classes[scene], layer.masks[scene], layer.scores[scene], layer.boxes[scene]]
    return found


def test_size_is_esams() -> None:
    assert sum(p.numel() for p in MixedQueryDecoder(DecoderSettings(), 96).parameters()) == 3_576_779


def test_size_is_oneformer3ds() -> None:
    """Counted from its configuration for ScanNet200: width 256, 6 layers, 198 object and 200 semantic classes."""
    c, d, ff = 96, 256, 1024
    attention = 4 * (d * d + d) + 2 * d
    layer = 2 * attention + (d * ff + ff) + (ff * d + d) + 2 * d
    projections = (c * d + d + 2 * d) + 2 * ((c * d + d) + (d * d + d))  # keys; queries and mask features
    heads = (d * d + d) + (d * 199 + 199) + (d * 201 + 201) + 2 * d
    decoder = MixedQueryDecoder(load_settings("oneformer3d").model.decoder, c)
    assert sum(p.numel() for p in decoder.parameters()) == 6 * layer + projections + heads == 6_696_336


def test_all_masks_may_be_over_superpoints() -> None:
    settings = SMALL.model_copy(update={"layers": 6, "masks": "superpoint", "instance_classes": 5})
    decoder = MixedQueryDecoder(settings, CHANNELS).eval()
    inputs = _inputs([(40, 6), (25, 3)])
    output = decoder(**inputs)
    assert decoder.point_mask is None
    assert len(output.layers) == 7
    for layer in output.layers:
        assert layer.level == "superpoint"
        assert [tuple(mask.shape) for mask in layer.masks] == [(6, 6), (3, 3)]
        assert [tuple(c.shape) for c in layer.classes] == [(6, 6), (3, 6)]
    # Points count through their superpoints alone.
    inputs["points"], inputs["coords"] = inputs["points"] + 1, inputs["coords"] - 1
    other = decoder(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(output, 0), _tensors(other, 0), strict=True))


@pytest.mark.parametrize(("layers", "points_from"), [(1, 1), (2, 1), (3, 2), (6, 3)])
def test_first_half_of_the_masks_is_over_superpoints_and_the_last_over_points(layers: int, points_from: int) -> None:
    decoder = MixedQueryDecoder(SMALL.model_copy(update={"layers": layers}), CHANNELS).eval()
    output = decoder(**_inputs([(40, 6), (25, 3)]))
    assert len(output.layers) == layers + 1
    for index, layer in enumerate(output.layers):
        assert layer.level == ("point" if index >= points_from else "superpoint")
        assert [tuple(mask.shape) for mask in layer.masks] == (
            [(6, 40), (3, 25)] if layer.level == "point" else [(6, 6), (3, 3)]
        )
        assert [tuple(c.shape) for c in layer.classes] == [(6, 2), (3, 2)]
    assert [tuple(s.shape) for s in output.semantic] == [(6, 8), (3, 8)]


def test_masks_compare_queries_with_superpoints_and_then_with_placed_points() -> None:
    decoder = MixedQueryDecoder(SMALL, CHANNELS).eval()
    inputs = _inputs([(40, 6)])
    normed: list[torch.Tensor] = []
    decoder.query_norm.register_forward_hook(lambda module, args, out: normed.append(out))
    output = decoder(**inputs)
    over = {
        "superpoint": decoder.superpoint_mask(inputs["superpoints"]),
        "point": decoder.point_mask(torch.cat([inputs["coords"], inputs["points"]], dim=1)),
    }
    for queries, layer in zip(normed, output.layers, strict=True):
        torch.testing.assert_close(layer.masks[0], queries @ over[layer.level].T)


def test_a_scene_does_not_see_the_others() -> None:
    decoder = MixedQueryDecoder(SMALL, CHANNELS).eval()
    inputs = _inputs([(40, 6), (25, 3)])
    together = decoder(**inputs)
    alone = decoder(
        inputs["superpoints"][6:],
        (3,),
        inputs["points"][40:],
        inputs["coords"][40:],
        (25,),
        inputs["superpoint"][40:] - 6,
        inputs["point_weight"][40:],
    )
    for ours, theirs in zip(_tensors(together, 1), _tensors(alone, 0), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_hidden_superpoints_do_not_influence_the_queries() -> None:
    attention = QueryAttention(16, 4, 0.0).double()
    queries, keys = torch.randn(5, 16, dtype=torch.float64), torch.randn(9, 16, dtype=torch.float64)
    hidden = torch.zeros(5, 9, dtype=torch.bool)
    hidden[:, 4:] = True
    torch.testing.assert_close(
        attention(queries, (5,), keys, (9,), [hidden]), attention(queries, (5,), keys[:4], (4,)), atol=1e-12, rtol=0
    )


def test_no_query_is_blind() -> None:
    hidden = torch.tensor([[True, True, True], [True, False, True]])
    assert unmask_hidden_rows(hidden).tolist() == [[False, False, False], [True, False, True]]

    superpoint, weight = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([[1.0], [1.0], [0.6], [0.6], [2.0]])
    outside = torch.tensor([[True] * 5, [False, False, True, False, True], [False] * 5])
    # Weighted means: [1, .6, 2], [0, .3, 2], [0, 0, 0]; more than 0.5 is hidden, the smallest never.
    assert superpoints_outside(outside, superpoint, weight, 3).tolist() == [
        [True, False, True],
        [False, False, True],
        [False, False, False],
    ]


def test_masks_that_are_empty_everywhere_give_finite_gradients() -> None:
    decoder = MixedQueryDecoder(SMALL, CHANNELS)
    for head in (decoder.superpoint_mask, decoder.point_mask):
        torch.nn.init.zeros_(head[2].weight)
        torch.nn.init.ones_(head[2].bias)
    torch.nn.init.zeros_(decoder.query_norm.weight)
    torch.nn.init.constant_(decoder.query_norm.bias, -1.0)
    output = decoder(**_inputs([(12, 4)]))
    assert all((layer.masks[0] < 0).all() for layer in output.layers)
    torch.stack([tensor.square().sum() for tensor in _tensors(output, 0)]).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("learnable", [0, 2])
def test_every_parameter_and_input_gets_a_gradient(learnable: int) -> None:
    decoder = MixedQueryDecoder(SMALL.model_copy(update={"learnable_queries": learnable}), CHANNELS)
    inputs = _inputs([(40, 6), (1, 1)])
    for name in ("superpoints", "points"):
        inputs[name].requires_grad_()
    output = decoder(**inputs)
    torch.stack([t.square().sum() for scene in (0, 1) for t in _tensors(output, scene)]).sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert inputs["superpoints"].grad.abs().sum(1).gt(0).all()
    assert inputs["points"].grad.abs().sum(1).gt(0).all()
    assert [ids[:learnable].tolist() for ids in output.query_superpoints] == [[-1] * learnable] * 2


def test_queries_are_drawn_in_training_and_all_used_in_evaluation() -> None:
    decoder = MixedQueryDecoder(SMALL, CHANNELS)
    inputs = _inputs([(200, 101)])
    counts = []
    for _ in range(40):
        (ids,) = decoder(**inputs).query_superpoints
        assert len(ids.unique()) == len(ids)
        counts.append(len(ids))
    # A share uniform in [0.5, 1]: ⌈share · 101⌉ lies in 51..101 with mean about 76 (standard error of 40 draws: 2.3).
    assert min(counts) >= 51
    assert max(counts) <= 101
    assert 66 < sum(counts) / 40 < 86

    (ids,) = decoder.eval()(**inputs).query_superpoints
    assert ids.tolist() == list(range(101))


def test_the_draw_depends_on_the_seed_only_and_reruns_are_bit_identical() -> None:
    decoder = MixedQueryDecoder(SMALL, CHANNELS)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        decoder.zero_grad()
        inputs = _inputs([(400, 30), (90, 12)])
        inputs["superpoints"].requires_grad_()
        output = decoder(**inputs)
        torch.stack([t.square().sum() for scene in (0, 1) for t in _tensors(output, scene)]).sum().backward()
        runs.append([inputs["superpoints"].grad, *(p.grad for p in decoder.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_box_sizes_are_positive_and_masks_are_query_times_feature() -> None:
    decoder = MixedQueryDecoder(SMALL, CHANNELS).eval()
    inputs = _inputs([(20, 4)])
    initial = decoder(**inputs).layers[0]
    assert initial.boxes is not None
    assert (initial.boxes[0][:, 3:] > 0).all()
    queries = decoder.query_norm(decoder.query_projection(inputs["superpoints"]))
    expected = torch.einsum("qd,sd->qs", queries, decoder.superpoint_mask(inputs["superpoints"]))
    torch.testing.assert_close(initial.masks[0], expected)


TEXT = torch.nn.functional.normalize(torch.randn(7, 10, generator=torch.Generator().manual_seed(2)), dim=1)


def _with_text(**update: Any) -> MixedQueryDecoder:
    torch.manual_seed(4)
    return MixedQueryDecoder(SMALL.model_copy(update={"text_queries": True, **update}), CHANNELS, TEXT)


@pytest.mark.parametrize("training", [True, False])
def test_text_queries_stand_between_learnable_and_superpoint_queries(training: bool) -> None:
    decoder = _with_text(learnable_queries=2).train(training)
    normed: list[torch.Tensor] = []
    decoder.query_norm.register_forward_hook(lambda module, args, out: normed.append(out))
    inputs = _inputs([(40, 6), (25, 3)])
    output = decoder(**inputs)
    assert output.query_classes is not None
    first = 0
    for scene, superpoints in enumerate((6, 3)):
        ids, classes = output.query_superpoints[scene], output.query_classes[scene]
        drawn = len(ids) - 9
        assert classes.tolist() == [-1, -1, *range(7), *[-1] * drawn]
        assert ids[:9].tolist() == [-1] * 9
        assert (ids[9:] >= 0).all()
        assert len(ids) == len(output.layers[-1].masks[scene]) == len(output.semantic[scene])
        expected = decoder.query_norm(decoder.text_projection(TEXT))
        torch.testing.assert_close(normed[0][first + 2 : first + 9], expected)
        assert drawn == superpoints or training
        first += len(ids)


def test_text_queries_change_no_other_weight_and_learn_through_their_projection() -> None:
    torch.manual_seed(4)
    without = MixedQueryDecoder(SMALL, CHANNELS)
    decoder = _with_text()
    other = dict(decoder.named_parameters())
    assert set(other) - set(dict(without.named_parameters())) == {"text_projection.weight", "text_projection.bias"}
    assert all(torch.equal(value, other[name]) for name, value in without.named_parameters())
    assert "text_features" in decoder.state_dict()
    assert "text_features" not in without.state_dict()
    output = decoder(**_inputs([(40, 6)]))
    torch.stack([t.square().sum() for t in _tensors(output, 0)]).sum().backward()
    assert decoder.text_projection.weight.grad.abs().sum() > 0
    assert without.provenance() == {}
    assert decoder.provenance() == {"text_features": "given"}


def test_text_queries_cross_scenes_as_little_as_others() -> None:
    decoder = _with_text().eval()
    inputs = _inputs([(40, 6), (25, 3)])
    alone = dict(inputs)
    alone.update(
        superpoints=inputs["superpoints"][6:],
        superpoint_counts=(3,),
        points=inputs["points"][40:],
        coords=inputs["coords"][40:],
        point_counts=(25,),
        superpoint=inputs["superpoint"][40:] - 6,
        point_weight=inputs["point_weight"][40:],
    )
    for ours, theirs in zip(_tensors(decoder(**inputs), 1), _tensors(decoder(**alone), 0), strict=True):
        torch.testing.assert_close(ours, theirs)
