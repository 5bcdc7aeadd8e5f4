"""Mask3D's decoder: point queries, Fourier encoding, masked attention over the scales of the U-Net.

Source: Schult et al., "Mask3D", ICRA 2023, and its public configuration for ScanNet200. As there, the queries start as
zeros at places found by farthest point sampling; all layers of one scale share their weights over the rounds; a mask is
the product of a query and the mean features of the superpoints ("segments"). Other than there, a scene with fewer
voxels than queries has fewer queries, and scenes are not padded to one size.

Legend: B scenes · N points · S superpoints · M voxels of a scale · Q queries of a scene · C width of the features ·
d width of the queries · L scales that are attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bifusion_diag.config.settings import DecoderSettings
from bifusion_diag.data.batch import Batch
from bifusion_diag.model.attention import FeedForward, QueryAttention, unmask_hidden_rows
from bifusion_diag.model.decoder import DecoderOutput
from bifusion_diag.model.fourier import FourierEncoding, within_box
from bifusion_diag.model.fps import farthest_points
from bifusion_diag.model.outputs import EncoderOutput, LayerPrediction, Scales
from bifusion_diag.model.pooling import Pooled
from bifusion_diag.model.scale_pooling import ScaleVoxels, scale_voxels
from bifusion_diag.model.segments import split_rows


class ScaleLayer(nn.Module):
    """The layer of one scale: queries look at its voxels, then at each other, then think. Places are added to what is
    compared.

    Args:
        settings: sizes.
        in_channels: width of the scale's features.
    """

    def __init__(self, settings: DecoderSettings, in_channels: int) -> None:
        super().__init__()
        width = settings.width
        self.key_projection = nn.Linear(in_channels, width)
        self.cross_attention = QueryAttention(width, settings.heads, settings.dropout)
        self.self_attention = QueryAttention(width, settings.heads, settings.dropout)
        self.feed_forward = FeedForward(width, settings.hidden, settings.dropout, nn.ReLU)
        for part in (self.cross_attention, self.self_attention, self.feed_forward):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        queries: Tensor,
        query_places: Tensor,
        query_counts: tuple[int, ...],
        feats: Tensor,
        key_places: Tensor,
        key_counts: tuple[int, ...],
        hidden: Sequence[Tensor],
    ) -> Tensor:
        """One layer.

        Args:
            queries: (ΣQ_i, d).
            query_places: (ΣQ_i, d).
            query_counts: Q_i.
            feats: (ΣK_i, C) of the voxels that are looked at.
            key_places: (ΣK_i, d).
            key_counts: K_i.
            hidden: per scene (Q_i, K_i) bool, True = not seen; no row all True.

        Returns:
            (ΣQ_i, d).
        """
        keys = self.key_projection(feats)
        queries = self.cross_attention(queries, query_counts, keys, key_counts, hidden, query_places, key_places)
        queries = self.self_attention(queries, query_counts, queries, query_counts, None, query_places, query_places)
        return self.feed_forward(queries)


class Mask3DDecoder(nn.Module):
    """Turns the scales of the U-Net and superpoint features into instances with classes.

    In training, a layer looks at so many voxels of its scale as the settings say, drawn anew by PyTorch's CPU generator
    (none are drawn where there are no more); in evaluation at all.

    Args:
        settings: sizes; ``layers`` is the number of rounds over the scales.
        in_channels: C of the superpoints.
        scale_channels: width of the features of each scale, coarsest first.
    """

    def __init__(self, settings: DecoderSettings, in_channels: int, scale_channels: Sequence[int]) -> None:
        super().__init__()
        self.settings = settings
        width = settings.width
        attended = scale_channels[: len(settings.mask3d.keys)]
        self.place = FourierEncoding(width, settings.mask3d.gauss_scale)
        self.query_projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.layers = nn.ModuleList(ScaleLayer(settings, channels) for channels in attended)
        self.query_norm = nn.LayerNorm(width)
        self.superpoint_mask = nn.Linear(in_channels, width)
        self.query_mask = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.classes = nn.Linear(width, settings.instance_classes + 1)

    def provenance(self) -> dict[str, str]:
        """Nothing in it comes from elsewhere."""
        return {}

    def inputs(self, encoder: EncoderOutput, pooled: Pooled, batch: Batch) -> tuple[Any, ...]:
        """What :meth:`forward` takes, from what the parts before give."""
        return (
            pooled.features,
            batch.superpoint_counts,
            encoder.scales,
            batch.coords,
            batch.point_counts,
            batch.superpoint,
        )

    def forward(
        self,
        superpoints: Tensor,
        superpoint_counts: tuple[int, ...],
        scales: Scales,
        coords: Tensor,
        point_counts: tuple[int, ...],
        superpoint: Tensor,
    ) -> DecoderOutput:
        """Decode.

        Args:
            superpoints: (S, C) pooled features.
            superpoint_counts: superpoints of each scene, all ≥ 1.
            scales: of the U-Net.
            coords: (N, 3) point coordinates [m].
            point_counts: points of each scene, all ≥ 1.
            superpoint: (N,) int64, unique in the batch.

        Returns:
            Predictions of the initial queries and of every layer: rounds · L + 1. Without semantics, and with no query
            at a superpoint.
        """
        voxels = scale_voxels(scales, coords, point_counts, superpoint, superpoint_counts)
        places, counts = self._query_places(voxels[-1])
        features = split_rows(self.superpoint_mask(superpoints), superpoint_counts)

        queries = torch.zeros_like(places)
        predictions = [self._predict(queries, counts, features)]
        for _ in range(self.settings.layers):
            for scale, (layer, most) in enumerate(zip(self.layers, self.settings.mask3d.keys, strict=True)):
                drawn = self._draw_keys(voxels[scale], most)
                queries = layer(
                    queries,
                    places,
                    counts,
                    torch.cat(
                        [feats.index_select(0, ids) for feats, ids in zip(voxels[scale].feats, drawn, strict=True)]
                    ),
                    self._key_places(voxels[scale], drawn),
                    tuple(len(ids) for ids in drawn),
                    _hidden_keys(predictions[-1].masks, voxels[scale], drawn),
                )
                predictions.append(self._predict(queries, counts, features))
        return DecoderOutput(
            layers=predictions,
            semantic=None,
            query_superpoints=[superpoint.new_full((count,), -1) for count in counts],
        )

    def _predict(self, queries: Tensor, counts: tuple[int, ...], features: list[Tensor]) -> LayerPrediction:
        """Class and mask of every query."""
        normed = self.query_norm(queries)
        masks = split_rows(self.query_mask(normed), counts)
        return LayerPrediction(
            classes=split_rows(self.classes(normed), counts),
            masks=[query @ feature.T for query, feature in zip(masks, features, strict=True)],
            scores=None,
            boxes=None,
            level="superpoint",
        )

    def _query_places(self, finest: ScaleVoxels) -> tuple[Tensor, tuple[int, ...]]:
        """(ΣQ_i, d) code of where the queries of each scene are, and Q_i."""
        found = []
        for cells, positions in zip(finest.cells, finest.positions, strict=True):
            picked = farthest_points(cells, self.settings.mask3d.queries)
            found.append(self.place(within_box(positions.index_select(0, picked), positions)))
        return self.query_projection(torch.cat(found)), tuple(len(scene) for scene in found)

    def _key_places(self, voxels: ScaleVoxels, drawn: list[Tensor]) -> Tensor:
        """(ΣK_i, d) code of where the drawn voxels are, in the box around all voxels of their scale and scene."""
        return torch.cat(
            [
                self.place(within_box(positions.index_select(0, ids), positions))
                for positions, ids in zip(voxels.positions, drawn, strict=True)
            ]
        )

    def _draw_keys(self, voxels: ScaleVoxels, most: int) -> list[Tensor]:
        """The voxels of each scene that the queries look at: int64 within the scene."""
        drawn = []
        for feats in voxels.feats:
            if self.training and len(feats) > most:
                drawn.append(torch.randperm(len(feats))[:most].to(feats.device))
            else:
                drawn.append(torch.arange(len(feats), device=feats.device))
        return drawn


@torch.no_grad()
def _hidden_keys(masks: Sequence[Tensor], voxels: ScaleVoxels, drawn: Sequence[Tensor]) -> list[Tensor]:
    """Which of the drawn voxels lie outside each query's current mask: per scene (Q_i, K_i) bool, no row all True.

    The mask's logits are averaged from the superpoints to the voxels.
    """
    hidden = []
    for mask, shares, feats, ids in zip(masks, voxels.shares, voxels.feats, drawn, strict=True):
        logits = shares.pool(mask.T, len(feats)).index_select(0, ids)
        hidden.append(unmask_hidden_rows(logits.T.sigmoid() < 0.5))
    return hidden
