"""The decoder with superpoint queries and masked attention: ESAM's and OneFormer3D's.

ESAM's masks are at superpoint and then at point level, OneFormer3D's at superpoint level alone. Sources: Xu et al.,
"EmbodiedSAM", ICLR 2025, section 3.2; Kolodiazhnyi et al., "OneFormer3D", CVPR 2024, section 3.2; masked attention:
Cheng et al., "Mask2Former", CVPR 2022. Document 003 adds text queries: a class's name, encoded by CLIP's text tower, as
a query that looks for objects of that class.

Legend: B scenes · N points · S superpoints · Q queries of a scene · C width of the features · d width of the queries ·
K semantic classes · E width of the text features.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import DecoderSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.attention import DecoderLayer, unmask_hidden_rows
from bifusion_diag.model.outputs import EncoderOutput, LayerPrediction
from bifusion_diag.model.pooling import Pooled
from bifusion_diag.model.segments import segment_mean, split_rows, starts


class DecoderOutput(NamedTuple):
    """Output of a decoder; the fields of the same name in :class:`~bifusion_diag.model.outputs.Predictions`."""

    layers: list[LayerPrediction]
    semantic: list[Tensor] | None  # (Q_i, semantic classes + 1) a scene
    query_superpoints: list[Tensor]  # (Q_i,) int64 a scene, -1 = none
    query_classes: list[Tensor] | None = None  # (Q_i,) int64 a scene, -1 = not a text query


class _MaskFeatures(NamedTuple):
    """What the queries are compared with."""

    superpoint: list[Tensor]  # (S_i, d) a scene
    point: list[Tensor] | None  # (N_i, d) a scene

    def at(self, level: str) -> list[Tensor]:
        """The features that masks of this level range over."""
        if level == "superpoint":
            return self.superpoint
        assert self.point is not None, "masks over points are asked for"
        return self.point


class PredictionHeads(nn.Module):
    """What every query says of itself after every layer: class and mask, optionally score and box."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        width = settings.width
        self.classes = _mlp(width, width, settings.instance_classes + 1)
        self.score = _mlp(width, width, 1) if settings.score_head else None
        self.box = _mlp(width, width, 6) if settings.box_head else None

    def forward(self, queries: Tensor, counts: tuple[int, ...], features: list[Tensor], level: str) -> LayerPrediction:
        """Predict.

        Args:
            queries: (ΣQ_i, d), normalised.
            counts: Q_i.
            features: per scene (S_i, d) or (N_i, d), what the masks range over.
            level: "superpoint" or "point".

        Returns:
            The prediction of this layer.
        """
        boxes = None
        if self.box is not None:
            offset, log_size = self.box(queries).split(3, dim=1)
            boxes = split_rows(torch.cat([offset, log_size.exp()], dim=1), counts)
        return LayerPrediction(
            classes=split_rows(self.classes(queries), counts),
            masks=[query @ feature.T for query, feature in zip(split_rows(queries, counts), features, strict=True)],
            scores=None if self.score is None else split_rows(self.score(queries), counts),
            boxes=boxes,
            level=level,
        )


class MixedQueryDecoder(nn.Module):
    """Turns superpoints into instances.

    The queries are superpoints: a random share of them in training (drawn from PyTorch's CPU generator), all of them in
    evaluation. In front of them may stand learnable queries, then text queries, one a semantic class; neither is drawn.
    The first half of the predictions has masks over superpoints, the second half over points; or all have them over
    superpoints.

    Args:
        settings: sizes and heads.
        in_channels: C.
        text_features: (K, E) of the semantic classes' names; given if and only if the settings have text queries. They
            are a buffer: stored with the weights, never trained.
        text_origin: where they come from, for the run record.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        in_channels: int,
        text_features: Tensor | None = None,
        *,
        text_origin: str = "given",
    ) -> None:
        super().__init__()
        assert (text_features is not None) == settings.text_queries, "text queries need text features"
        self.settings = settings
        width = settings.width
        self.learnable = nn.Embedding(settings.learnable_queries, width) if settings.learnable_queries else None
        self.query_projection = _mlp(in_channels, width, width)
        self.key_projection = nn.Sequential(nn.Linear(in_channels, width), nn.LayerNorm(width), nn.ReLU())
        self.superpoint_mask = _mlp(in_channels, width, width)
        self.point_mask = _mlp(3 + in_channels, width, width) if settings.masks == "mixed" else None
        self.layers = nn.ModuleList(
            DecoderLayer(width, settings.heads, settings.hidden, settings.dropout) for _ in range(settings.layers)
        )
        self.query_norm = nn.LayerNorm(width)
        self.heads = PredictionHeads(settings)
        self.semantic_head = nn.Linear(width, settings.semantic_classes + 1)
        self.register_buffer("text_features", text_features)
        self.text_features: Tensor | None
        self.text_projection = None if text_features is None else nn.Linear(text_features.shape[1], width)
        self._text_origin = text_origin

    def provenance(self) -> dict[str, str]:
        """Where the text features come from, for the run record."""
        return {} if self.text_features is None else {"text_features": self._text_origin}

    def inputs(self, encoder: EncoderOutput, pooled: Pooled, batch: Batch) -> tuple[Any, ...]:
        """What :meth:`forward` takes, from what the parts before give."""
        return (
            pooled.features,
            batch.superpoint_counts,
            encoder.fused,
            batch.coords,
            batch.point_counts,
            batch.superpoint,
            pooled.point_weight,
        )

    def mask_levels(self) -> list[str]:
        """Level of the masks of each prediction, the initial queries' first. The last one's is ESAM's "point"."""
        predictions = self.settings.layers + 1
        if self.settings.masks == "superpoint":
            return ["superpoint"] * predictions
        return ["superpoint"] * (predictions // 2) + ["point"] * (predictions - predictions // 2)

    def forward(
        self,
        superpoints: Tensor,
        superpoint_counts: tuple[int, ...],
        points: Tensor,
        coords: Tensor,
        point_counts: tuple[int, ...],
        superpoint: Tensor,
        point_weight: Tensor,
    ) -> DecoderOutput:
        """Decode.

        Args:
            superpoints: (S, C) pooled features.
            superpoint_counts: superpoints of each scene, all ≥ 1.
            points: (N, C) point features.
            coords: (N, 3) point coordinates [m].
            point_counts: points of each scene.
            superpoint: (N,) int64, unique in the batch.
            point_weight: (N, 1) weight of each point in its superpoint.

        Returns:
            Predictions of the initial queries and of every layer.
        """
        drawn = self._draw_queries(superpoint_counts, superpoints.device)
        queries, counts = self._initial_queries(superpoints, superpoint_counts, drawn)
        keys = self.key_projection(superpoints)
        features = _MaskFeatures(
            superpoint=split_rows(self.superpoint_mask(superpoints), superpoint_counts),
            point=None
            if self.point_mask is None
            else split_rows(self.point_mask(torch.cat([coords, points], dim=1)), point_counts),
        )
        local = [
            ids - first
            for ids, first in zip(split_rows(superpoint, point_counts), starts(superpoint_counts), strict=True)
        ]
        weights = split_rows(point_weight, point_counts)

        levels = self.mask_levels()
        normed = self.query_norm(queries)
        predictions: list[LayerPrediction] = [self.heads(normed, counts, features.at(levels[0]), levels[0])]
        for layer, level in zip(self.layers, levels[1:], strict=True):
            hidden = _hidden_keys(predictions[-1], local, weights, superpoint_counts)
            queries = layer(queries, counts, keys, superpoint_counts, hidden)
            normed = self.query_norm(queries)
            predictions.append(self.heads(normed, counts, features.at(level), level))
        not_superpoints = superpoint.new_full((counts[0] - len(drawn[0]),), -1)
        return DecoderOutput(
            layers=predictions,
            semantic=split_rows(self.semantic_head(normed), counts),
            query_superpoints=[torch.cat([not_superpoints, ids]) for ids in drawn],
            query_classes=self._query_classes(drawn),
        )

    def _query_classes(self, drawn: list[Tensor]) -> list[Tensor] | None:
        """Class of each text query among the queries of each scene: (Q_i,) int64, -1 = not a text query."""
        if self.text_features is None:
            return None
        learnable = drawn[0].new_full((self.settings.learnable_queries,), -1)
        classes = torch.arange(len(self.text_features), device=learnable.device)
        return [torch.cat([learnable, classes, torch.full_like(ids, -1)]) for ids in drawn]

    def _draw_queries(self, superpoint_counts: tuple[int, ...], device: torch.device) -> list[Tensor]:
        """The superpoints of each scene that become queries: int64 within the scene."""
        least = self.settings.query_share
        if not self.training or least == 1.0:
            return [torch.arange(count, device=device) for count in superpoint_counts]
        drawn = []
        for count in superpoint_counts:
            share = least + (1.0 - least) * torch.rand(()).item()
            drawn.append(torch.randperm(count)[: max(1, math.ceil(share * count))].to(device))
        return drawn

    def _initial_queries(
        self, superpoints: Tensor, superpoint_counts: tuple[int, ...], drawn: list[Tensor]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """(ΣQ_i, d) and Q_i: of each scene the learnable queries, the text queries, then its projected superpoints."""
        rows = torch.cat([ids + first for ids, first in zip(drawn, starts(superpoint_counts), strict=True)])
        counts = tuple(len(ids) for ids in drawn)
        queries = self.query_projection(superpoints.index_select(0, rows))
        shared = [] if self.learnable is None else [self.learnable.weight]
        if self.text_projection is not None:
            shared.append(self.text_projection(self.text_features))
        if not shared:
            return queries, counts
        together = [torch.cat([*shared, scene]) for scene in split_rows(queries, counts)]
        return torch.cat(together), tuple(len(scene) for scene in together)


@torch.no_grad()
def _hidden_keys(
    prediction: LayerPrediction, local: list[Tensor], weights: list[Tensor], superpoint_counts: tuple[int, ...]
) -> list[Tensor]:
    """Which superpoints lie outside each query's current mask: per scene (Q_i, S_i) bool, no row all True."""
    outside = [mask.sigmoid() < 0.5 for mask in prediction.masks]
    if prediction.level == "superpoint":
        return [unmask_hidden_rows(scene) for scene in outside]
    return [
        superpoints_outside(unmask_hidden_rows(scene), ids, weight, count)
        for scene, ids, weight, count in zip(outside, local, weights, superpoint_counts, strict=True)
    ]


def superpoints_outside(outside: Tensor, superpoint: Tensor, point_weight: Tensor, n_superpoints: int) -> Tensor:
    """Carry a point-level attention mask to superpoints, by the weighted mean of their points.

    The superpoints with a query's smallest mean are never hidden, so that no row is all True.

    Args:
        outside: (Q, N) bool.
        superpoint: (N,) int64 within the scene.
        point_weight: (N, 1).
        n_superpoints: S of the scene.

    Returns:
        (Q, S) bool.
    """
    share = segment_mean(outside.T * point_weight, superpoint, n_superpoints)
    return ((share > 0.5) & (share != share.amin(dim=0))).T


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear → ReLU → Linear."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
