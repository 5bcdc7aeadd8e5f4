"""Gains, coordinates that are not finite, few rows, and the mechanisms: against formulas and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bifusion_diag.data import Scene
from bifusion_diag.diagnosis.quantity import number
from bifusion_diag.experiments.audit import Audit
from bifusion_diag.experiments.audit.bench import Bench, Sights, watching
from bifusion_diag.experiments.audit.coarse import coarse
from bifusion_diag.experiments.audit.mechanisms import _clipping
from bifusion_diag.experiments.audit.near_zero import near_zero
from bifusion_diag.experiments.audit.result import Draft
from bifusion_diag.experiments.audit.sanitising import POISONS, fate_of, sanitising
from bifusion_diag.experiments.audit.slopes import gain_of_normalize, slope_of_cosine, temperature

Make = Callable[..., Bench]


@pytest.mark.parametrize("tau", [0.07, 0.1, 0.02])
def test_the_slope_is_that_of_the_formula_and_below_its_bound(tau: float) -> None:
    cosines, slopes = slope_of_cosine(tau)
    sigma = 1 / (1 + np.exp(-cosines.double().numpy() / tau))
    expected = -(1 - sigma) * sigma / (sigma + 1e-8) / tau
    assert np.allclose(slopes.numpy(), expected, rtol=1e-3, atol=1e-3 / tau)
    assert slopes.abs().max() <= 1 / tau
    assert (slopes <= 0).all()


def test_the_documents_number(clean: Audit) -> None:
    assert number(clean.number("temperature/0.07/at_minus_half")) == pytest.approx(14.27, abs=0.01)
    assert number(clean.number("temperature/0.07/bound")) == pytest.approx(1 / 0.07)


def test_a_steep_temperature_is_reported(bench: Make) -> None:
    (found,) = temperature(bench(losses__clip_align__temperature=0.02)).findings
    assert (found.rule, found.remedy) == ("temperature-gain", {"losses.clip_align.temperature": 0.1})
    assert temperature(bench(losses__clip_align__temperature=0.02, losses__clip_align__weight=0.0)).findings == ()


@pytest.mark.parametrize("length", [1.0, 1e-3, 1e-6, 0.0])
def test_the_gain_of_a_normalisation(length: float) -> None:
    assert gain_of_normalize(length) == pytest.approx(1 / max(length, 1e-12), rel=1e-3)


def test_zero_vectors_are_found_where_they_are_normalised_and_not_before(bench: Make, fragile: Audit) -> None:
    (found,) = fragile.section("near_zero").findings
    assert (found.rule, found.module) == ("near-zero-norm", "encoder.normalize2d")
    assert found.remedy == {"model.projection.normalize": "before_sampling"}
    zero, into, out = (number(one.reading) for one in found.evidence[:3])
    assert zero
    assert zero > 0
    assert out == pytest.approx(1e12 * into, rel=0.01)  # across a zero vector, nothing is projected away
    own = bench("bifusion-fragile")
    outside = (~own.step.output.predictions.encoder.valid).sum()
    counted = [one for one in near_zero(own).numbers if one.key == "near_zero/encoder.normalize2d/zero"]
    assert number(counted[0].reading) == outside
    assert near_zero(bench("bifusion-fragile", model__projection__normalize="before_sampling")).findings == ()


def test_only_strict_sends_nothing_from_points_that_are_nowhere(bench: Make) -> None:
    own = bench()
    maps = own.step.sights.maps.detach()
    settings = own.settings.model.projection
    for poison in POISONS.values():
        fate = fate_of(own.batch, maps, settings, poison)
        assert fate.poisoned > 0
        assert fate[1:] == (0, 0, 0, 0.0, 0.0)
    lost = POISONS["pose of −inf"]
    replaced = fate_of(own.batch, maps, settings.model_copy(update={"sanitize": "replace"}), lost)
    assert replaced.went_on > 0  # world coordinates with z > 0
    assert replaced.features == 0
    nowhere = POISONS["pose of NaN"]
    clamped = fate_of(own.batch, maps, settings.model_copy(update={"sanitize": "clamp"}), nowhere)
    assert clamped.features == len(own.batch.xyz)
    assert clamped.gradients > 0


@pytest.mark.parametrize("way", ["strict", "replace", "clamp", "none"])
def test_the_runs_own_way_is_judged(bench: Make, way: str) -> None:
    section = sanitising(bench(model__projection__sanitize=way))
    assert [one.rule for one in section.findings] == ([] if way == "strict" else ["projection-nonfinite"])
    (kept,) = [one for one in section.numbers if one.key == "sanitise/clamp/nan"]
    assert number(kept.reading) == 1


def test_few_rows_of_a_batchnorm(bench: Make) -> None:
    def close(scene: Scene) -> Scene:
        return scene.take(np.argsort(np.linalg.norm(scene.points[:, :3] - scene.points[0, :3], axis=1))[:20])

    (found,) = coarse(bench("baseline-5cm", change=close)).findings
    assert found.rule == "few-row-batchnorm"
    roomy = bench("baseline-5cm", model__backbone__voxel_size=0.02)
    own = coarse(roomy)
    (rows,) = [number(one.reading) for one in own.numbers if one.key == "coarse/fewest_rows"]
    cells = torch.floor(torch.floor(roomy.batch.coords / 0.02) / 16)
    assert rows == len(torch.unique(torch.cat([roomy.batch.scene_index[:, None], cells], dim=1), dim=0))
    assert own.findings == ()


def test_attention_rows_without_a_key_are_counted(bench: Make) -> None:
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    hidden = torch.zeros(3, 4, dtype=torch.bool)
    hidden[1] = True
    sights = Sights()
    with watching(attention, sights):
        attention(
            torch.randn(1, 3, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 8), attn_mask=hidden, need_weights=False
        )
    assert sights.masked_rows == {"": (1, 3)}
    own = bench("baseline-5cm")
    assert not [one for one in coarse(own).findings if one.rule == "attention-masked-rows"]
    own.step.sights.masked_rows["decoder.layers.0"] = (1, 3)
    (found,) = [one for one in coarse(own).findings if one.rule == "attention-masked-rows"]
    assert (found.severity, found.module) == ("warning", "decoder.layers.0")


def test_the_mechanisms_on_the_runs_own_code(clean: Audit, fragile: Audit) -> None:
    def read(key: str, audit: Audit = clean) -> float:
        found = number(audit.number(f"mechanisms/{key}"))
        assert found is not None
        return found

    assert (read("nan/gradients"), read("nan/weights")) == (1.0, 1.0)
    assert (read("overflow/coefficient"), read("overflow/moved")) == (0.0, 0.0)
    assert read("buffers") == 1.0
    assert read("empty/nan/nan_terms") == 1  # instance_mask
    assert read("empty/nan/nan_terms", fragile) == 2  # instance_bce and instance_dice
    assert read("empty/nan/nan_gradients") == 0
    assert read("empty/zero/nan_terms") == 0
    assert math.isfinite(read("rows/loss"))
    assert read("rows/close_up") > 0


def test_without_clipping_the_nan_stays_where_it_is(bench: Make) -> None:
    draft = Draft("mechanisms", "")
    _clipping(draft, bench("baseline-5cm", optim__clip_grad=None))
    shares = {one.key: number(one.reading) for one in draft.numbers}
    assert shares["mechanisms/nan/gradients"] == pytest.approx(1e-4)
    assert shares["mechanisms/nan/weights"] == pytest.approx(1e-4)
