"""All losses of a model, by name, and their weighted sum."""

from __future__ import annotations

from torch import Tensor, nn

from bifusion_diag.config.settings import DecoderSettings, LossSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.errors import UserError
from bifusion_diag.model.heads import L2Normalize
from bifusion_diag.model.losses.clip_align import clip_align_loss
from bifusion_diag.model.losses.instance import INSTANCE_TERMS, instance_terms
from bifusion_diag.model.losses.no_view import no_view_loss
from bifusion_diag.model.losses.schedule import group_weights
from bifusion_diag.model.losses.semantic import semantic_loss
from bifusion_diag.model.losses.spatial_consistency import spatial_consistency_loss
from bifusion_diag.model.losses.targets import scene_targets
from bifusion_diag.model.outputs import LossOutput, Matches, Predictions


class Criterion(nn.Module):
    """The terms in fixed order: semantic, instance parts, clip_align, spatial_consistency, no_view.

    A term is there only if the model predicts what it needs and its own weight is not 0; a term whose weight is 0 only
    now, by the schedule, is measured but takes no part in the total (0 · NaN would be NaN).

    Args:
        settings: the losses.
        decoder: which heads exist.
        fused: the encoder has 2D features; without them there are no ``clip_align`` and no ``no_view``.

    Raises:
        UserError: no term is left.
    """

    def __init__(self, settings: LossSettings, decoder: DecoderSettings, *, fused: bool) -> None:
        super().__init__()
        self.settings = settings
        self.decoder = decoder
        self.fused = fused
        self.normalize2d, self.normalize3d = L2Normalize(dim=1), L2Normalize(dim=1)
        self._step, self._total_steps = 0, 1
        self.term_names = _active_terms(settings, decoder, fused)
        if not self.term_names:
            raise UserError("losses: every term that this model can have has weight 0; give one of them a weight")

    def set_progress(self, step: int, total_steps: int) -> None:
        """Move the schedule to ``step`` of ``total_steps``."""
        self._step, self._total_steps = step, total_steps

    def forward(self, predictions: Predictions, batch: Batch) -> LossOutput:
        """Compute every term.

        Args:
            predictions: of the decoder, with the encoder's output.
            batch: the ground truth.

        Returns:
            The total, the raw terms and their weights at this step.
        """
        available, matches, objects = self._terms(predictions, batch)
        terms = {name: available[name] for name in self.term_names}
        weights = self._weights()
        shares = [weights[name] * term for name, term in terms.items() if weights[name]]
        nothing = terms[self.term_names[0]].reshape(1)[:0]  # keeps the graph when every weight is 0 now
        total = sum(shares[1:], start=shares[0]) if shares else nothing.sum()
        return LossOutput(total=total, terms=terms, weights=weights, matches=matches, objects=objects)

    def _terms(
        self, predictions: Predictions, batch: Batch
    ) -> tuple[dict[str, Tensor], list[Matches] | None, list[int] | None]:
        """The raw terms that are active and the parts of the instance loss that are not; the last layer's matches and
        the objects of each scene, None where nothing is matched."""
        settings, encoder = self.settings, predictions.encoder
        targets = scene_targets(batch, self.decoder)
        queries, texts = predictions.query_superpoints, predictions.query_classes
        terms: dict[str, Tensor] = {}
        matches, objects = None, None
        if "semantic" in self.term_names:
            assert predictions.semantic is not None
            labels = [scene.semantic for scene in targets]
            terms["semantic"] = semantic_loss(predictions.semantic, queries, labels, texts)
        if any(name.startswith("instance_") for name in self.term_names):
            instance = instance_terms(predictions.layers, queries, targets, settings.instance, texts)
            terms |= instance.terms
            matches, objects = instance.matches, [len(scene.labels) for scene in targets]
        if "clip_align" in self.term_names:
            terms["clip_align"] = clip_align_loss(
                encoder, batch.scene_index, settings.clip_align, self.normalize2d, self.normalize3d
            )
        if "spatial_consistency" in self.term_names:
            terms["spatial_consistency"] = spatial_consistency_loss(
                encoder.f3d, batch, settings.spatial_consistency, self.normalize3d
            )
        if "no_view" in self.term_names:
            terms["no_view"] = no_view_loss(encoder, batch, settings.no_view, self.normalize3d)
        return terms, matches, objects

    def _weights(self) -> dict[str, float]:
        """Weight of each active term at this step."""
        groups = group_weights(self.settings, self._step, self._total_steps)
        parts = _instance_parts(self.settings)
        return {name: groups["instance"] * parts[name] if name in parts else groups[name] for name in self.term_names}


def _instance_parts(settings: LossSettings) -> dict[str, float]:
    """Weight of each instance term within the instance group."""
    return dict(zip(INSTANCE_TERMS[settings.instance.style], settings.instance.parts, strict=True))


def _active_terms(settings: LossSettings, decoder: DecoderSettings, fused: bool) -> tuple[str, ...]:
    """Names of the terms that apply, in their fixed order."""
    missing = set()
    if decoder.kind == "mask3d":
        missing.add("semantic")
    if not decoder.score_head:
        missing.add("instance_score")
    if not decoder.box_head:
        missing.add("instance_box")
    if not fused:
        missing |= {"clip_align", "no_view"}
    own = {"semantic": settings.semantic.weight}
    own |= {name: settings.instance.weight * part for name, part in _instance_parts(settings).items()}
    own["clip_align"] = settings.clip_align.weight
    own["spatial_consistency"] = settings.spatial_consistency.weight
    own["no_view"] = settings.no_view.weight
    return tuple(name for name, weight in own.items() if weight and name not in missing)
