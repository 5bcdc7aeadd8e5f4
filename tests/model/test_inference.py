"""Instances and semantics read out of predictions that are written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bifusion_diag.config import load_settings
from bifusion_diag.config.settings import InferenceSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.build import build_model
from bifusion_diag.model.inference import Inference, ScenePrediction, evaluating, matrix_nms
from bifusion_diag.model.outputs import EncoderOutput, LayerPrediction, Predictions

IN, OUT = 2.0, -3.0  # mask logits
P_IN = torch.tensor(IN).sigmoid().item()


def mask(*points: int, of: int = 8) -> list[float]:
    return [IN if point in points else OUT for point in range(of)]


def predictions(
    masks: list[list[float]],
    object_probability: list[float],
    *,
    scores: list[float] | None = None,
    semantic: Tensor | None = None,
    query_superpoints: Tensor | None = None,
    classes: Tensor | None = None,
    level: str = "point",
) -> Predictions:
    share = torch.tensor(object_probability)
    logits = torch.stack([share.log(), (1 - share).log()], 1) if classes is None else classes
    layer = LayerPrediction(
        classes=[logits],
        masks=[torch.tensor(masks)],
        scores=None if scores is None else [torch.tensor(scores)[:, None]],
        boxes=None,
        level=level,
    )
    empty = torch.zeros(0)
    plain = Predictions([layer], [empty], [empty.long()], EncoderOutput(empty, empty), empty)
    return plain._replace(
        semantic=None if semantic is None else [semantic],
        query_superpoints=[torch.arange(len(masks)) if query_superpoints is None else query_superpoints],
    )


@pytest.fixture
def one_scene(batch_of_two: Callable[..., Batch]) -> Batch:
    """Eight points on a line 0.1 m apart, in four superpoints of two."""
    batch = batch_of_two()
    return replace(
        batch,
        coords=torch.arange(8)[:, None] * torch.tensor([[0.1, 0.0, 0.0]]),
        point_counts=(8,),
        superpoint=torch.arange(8) // 2,
        superpoint_counts=(4,),
        names=("a",),
    )


def infer(
    batch: Batch,
    given: Predictions,
    *,
    logit_scores: bool = False,
    radius: float = 0.0,
    first_class: int | None = None,
    agnostic: bool = False,
    **settings: float,
) -> ScenePrediction:
    options = InferenceSettings.model_validate({"min_points": 1, **settings})
    (scene,) = Inference(options, diffusion_radius=radius, first_object_class=first_class, logit_scores=logit_scores)(
        given, batch, class_agnostic=agnostic
    )
    return scene


def test_instances_come_by_score_and_a_copy_is_removed(one_scene: Batch) -> None:
    given = predictions([mask(0, 1, 2), mask(4, 5), mask(4, 5)], [0.5, 0.8, 0.9])
    scene = infer(one_scene, given)
    assert [row.nonzero()[:, 0].tolist() for row in scene.masks] == [[4, 5], [0, 1, 2]]
    assert scene.scores.tolist() == pytest.approx([0.9 * P_IN, 0.5 * P_IN])
    assert scene.classes.tolist() == [0, 0]


def test_overlap_with_a_better_mask_lowers_the_score(one_scene: Batch) -> None:
    given = predictions([mask(0, 1, 2, 3), mask(2, 3, 4, 5)], [0.9, 0.8])  # IoU 2/6
    assert infer(one_scene, given).scores.tolist() == pytest.approx([0.9 * P_IN, 0.8 * P_IN * (1 - 2 / 6)])


def test_the_predicted_score_multiplies_as_it_was_trained(one_scene: Batch) -> None:
    given = predictions([mask(0, 1), mask(4, 5)], [0.5, 0.5], scores=[0.4, 1.7])
    assert infer(one_scene, given).scores.tolist() == pytest.approx([0.5 * P_IN, 0.5 * 0.4 * P_IN])  # an IoU is ≤ 1
    logits = torch.tensor([1.7, 0.4]).sigmoid() * 0.5 * P_IN
    assert infer(one_scene, given, logit_scores=True).scores.tolist() == pytest.approx(logits.tolist())


def test_small_low_and_surplus_instances_are_left_out(one_scene: Batch) -> None:
    given = predictions([mask(0), mask(2, 3), mask(5, 6, 7), mask()], [0.9, 0.8, 0.7, 0.99])
    assert len(infer(one_scene, given).scores) == 3  # an empty mask is none, whatever its score
    assert infer(one_scene, given, min_points=2).masks.sum(1).tolist() == [2, 3]
    assert infer(one_scene, given, min_score=0.65).masks.sum(1).tolist() == [1, 2]
    assert infer(one_scene, given, max_instances=1).masks.sum(1).tolist() == [1]
    assert infer(one_scene, given, candidates=2).masks.sum(1).tolist() == [1]  # the empty one takes a place
    assert infer(one_scene, given, mask_threshold=0.0).masks.sum(1).tolist()[0] == 8


def test_superpoint_masks_reach_their_points(one_scene: Batch) -> None:
    given = predictions([mask(1, 2, of=4)], [0.9], level="superpoint")
    assert infer(one_scene, given).masks.tolist() == [[False, False, True, True, True, True, False, False]]


def test_every_class_of_a_query_is_a_candidate(one_scene: Batch) -> None:
    classes = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()  # the last is "no object"
    given = predictions([mask(0, 1), mask(4, 5)], [], classes=classes)
    scene = infer(one_scene, given)
    assert scene.classes.tolist() == [1, 0, 1, 0]
    assert scene.scores.tolist() == pytest.approx([p * P_IN for p in (0.6, 0.5, 0.3, 0.1)])  # NMS within a class only


def test_without_classes_a_query_is_one_instance(one_scene: Batch) -> None:
    classes = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    scene = infer(one_scene, predictions([mask(0, 1), mask(4, 5)], [], classes=classes), agnostic=True)
    assert scene.classes.tolist() == [0, 0]
    assert scene.scores.tolist() == pytest.approx([0.8 * P_IN, 0.7 * P_IN])


def test_a_text_query_has_objects_of_its_own_class_alone(one_scene: Batch) -> None:
    classes = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    given = predictions([mask(0, 1), mask(4, 5)], [], classes=classes)
    given = given._replace(query_classes=[torch.tensor([3, -1])])  # semantic class 3 is object class 1
    scene = infer(one_scene, given, first_class=2)
    assert list(zip(scene.classes.tolist(), scene.scores.tolist(), strict=True)) == [
        (1, pytest.approx(0.6 * P_IN)),
        (1, pytest.approx(0.3 * P_IN)),
        (0, pytest.approx(0.1 * P_IN)),
    ]


def test_a_text_query_of_stuff_has_no_objects(one_scene: Batch) -> None:
    classes = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    given = predictions([mask(0, 1), mask(4, 5)], [], classes=classes)
    given = given._replace(query_classes=[torch.tensor([0, 1])])  # wall and floor, which are no object classes
    assert len(infer(one_scene, given, first_class=2).scores) == 0


def test_semantics_of_superpoints_and_of_those_without(one_scene: Batch) -> None:
    # three classes and "unlabelled"; superpoint 3 has no query, a learnable query says nothing of any superpoint, and
    # superpoint 1 is class 0 with probability 1.5 / 3.5, whatever "unlabelled" says
    unsure = [math.log(1.5), 0.0, 0.0, 9.0]
    semantic = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 9.0, 0], unsure])
    given = predictions([mask(0)] * 4, [0.9] * 4, semantic=semantic, query_superpoints=torch.tensor([-1, 0, 2, 1]))
    assert infer(one_scene, given).semantic.tolist() == [1, 1, 0, 0, 2, 2, -1, -1]
    assert infer(one_scene, given, semantic_confidence=0.42).semantic.tolist() == [1, 1, 0, 0, 2, 2, -1, -1]
    assert infer(one_scene, given, semantic_confidence=0.43).semantic.tolist() == [1, 1, -1, -1, 2, 2, -1, -1]
    # centres of the labelled ones: 0.05 and 0.45; the points without lie at 0.2, 0.3, 0.6, 0.7
    spread = infer(one_scene, given, semantic_confidence=0.43, radius=0.16)
    assert spread.semantic.tolist() == [1, 1, 1, 2, 2, 2, 2, -1]


def test_without_semantic_logits_the_classes_of_the_masks_decide(one_scene: Batch) -> None:
    classes = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).log()
    given = predictions([mask(0, 1, 2, 3), mask(3, 4)], [], classes=classes)
    # at point 3 both masks: class 0 has .7 + .1, class 1 has .2 + .8; points 5-7 are in no mask
    assert infer(one_scene, given, first_class=0).semantic.tolist() == [0, 0, 0, 1, 1, -1, -1, -1]
    assert infer(one_scene, given, first_class=2).semantic.tolist() == [2, 2, 2, 3, 3, -1, -1, -1]
    assert infer(one_scene, given).semantic.tolist() == [-1] * 8  # agnostic classes say nothing of semantics


def test_matrix_nms_by_its_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(6, 40, generator=generator) < 0.4
    labels = torch.tensor([0, 0, 1, 0, 1, 0])
    scores = torch.tensor([0.3, 0.9, 0.8, 0.5, 0.7, 0.6])

    def iou(i: int, j: int) -> float:
        return ((masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum()).item() if labels[i] == labels[j] else 0.0

    def better(i: int) -> list[int]:
        return [j for j in range(6) if scores[j] > scores[i]]

    def covered(i: int) -> float:
        return max([iou(i, j) for j in better(i)], default=0.0)

    decayed = {
        i: scores[i].item() * min([1.0, *((1 - iou(i, j)) / (1 - covered(j)) for j in better(i))]) for i in range(6)
    }
    order, new = matrix_nms(masks, labels, scores)
    assert order.tolist() == sorted(decayed, key=lambda i: -decayed[i])
    assert new.tolist() == pytest.approx(sorted(decayed.values(), reverse=True))


@pytest.mark.parametrize("preset", ["baseline-5cm", "bifusion"])
def test_prediction_leaves_the_model_and_the_random_numbers_as_they_were(
    batch_of_two: Callable[..., Batch], preset: str
) -> None:
    model = build_model(load_settings(preset, scale="small")).train()
    frozen = next(module for name, module in model.named_modules() if name == "pool")
    frozen.eval()  # a mode that model.train() would not give back
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    batch = batch_of_two()
    scenes = model.predict(batch)
    assert [module.training for module in model.modules()] == modes
    assert torch.get_rng_state().equal(random)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    for scene, count in zip(scenes, batch.point_counts, strict=True):
        assert (scene.semantic.shape, scene.masks.shape[1]) == ((count,), count)
        assert scene.scores.equal(scene.scores.sort(descending=True).values)
        assert not scene.scores.requires_grad
    again = model.predict(batch)
    assert all(one.equal(two) for a, b in zip(scenes, again, strict=True) for one, two in zip(a, b, strict=True))


def test_modes_come_back_after_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).train()
    seen = []

    def fail() -> None:
        with evaluating(model):
            seen.append((model[0].training, torch.is_grad_enabled()))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert seen == [(False, False)]
    assert model[0].training
    assert torch.is_grad_enabled()
