"""What the modules return: the whole contract between the model and its instruments.

Legend: B scenes · V views a scene · N points in the batch · S superpoints in the batch · Q queries of a scene ·
C common width · D width of CLIP's tokens. Scenes are concatenated along N and S; lists have one entry a scene.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bifusion_diag.model.sparse import SparseTensor


class ClipTokens(NamedTuple):
    """Output of the CLIP visual tower (frozen)."""

    tokens: Tensor  # (B·V, D, h, w) spatial tokens after the final LayerNorm
    pooled: Tensor  # (B·V, D) global token after the final LayerNorm


class Projection(NamedTuple):
    """Where every point lands in every view of its scene."""

    camera_xyz: Tensor  # (N, V, 3) [m], as the transform gave it: non-finite where the pose is
    uv: Tensor  # (N, V, 2) [px], 0 where not in front of the camera (sanitize clamp, none: anything, even NaN)
    in_front: Tensor  # (N, V) bool
    inside: Tensor  # (N, V) bool: in front and inside the image
    visible: Tensor  # (N, V) bool: inside, and the depth image agrees within ε
    view: Tensor  # (N,) int64: the visible view with the smallest |depth − z| (0 where none is)
    valid: Tensor  # (N,) bool: visible in some view


class GateOutput(NamedTuple):
    """Output of the fusion gate."""

    fused: Tensor  # (N, C)
    alpha: Tensor  # (N, 1) weight of the 2D feature, in [0, 1]; also the confidence
    channel_weight: Tensor  # (B, C) squeeze-and-excitation weights


class Scales(NamedTuple):
    """Features of every scale of the U-Net's way up."""

    tensors: list[SparseTensor]  # coarsest first, the finest has one row a voxel that points lie in
    point_voxel: Tensor  # (N,) int64 row of each point in the finest


class EncoderOutput(NamedTuple):
    """Point features. The 2D fields are None for a 3D-only encoder."""

    fused: Tensor  # (N, C) what pooling and the decoder see
    f3d: Tensor  # (N, C) 3D features before FiLM, L2-normalised in the fused encoder
    f2d: Tensor | None = None  # (N, C) 2D features sampled at the points, before FiLM
    alpha: Tensor | None = None  # (N, 1)
    valid: Tensor | None = None  # (N,) bool: the point has a 2D feature
    global2d: Tensor | None = None  # (B, C) mean of the scene's global CLIP features, L2-normalised
    scales: Scales | None = None  # where the decoder reads them


class LayerPrediction(NamedTuple):
    """Prediction of one decoder layer; one list entry a scene."""

    classes: list[Tensor]  # (Q_i, instance classes + 1) logits, last = no object
    masks: list[Tensor]  # (Q_i, S_i) or (Q_i, N_i) logits
    scores: list[Tensor] | None  # (Q_i, 1)
    boxes: list[Tensor] | None  # (Q_i, 6) centre offset [m], log-free size [m]
    level: str  # "superpoint" or "point": what the masks range over


class Predictions(NamedTuple):
    """Everything the criterion needs of a forward pass, and all that a scene's prediction is read from.

    Instances are read from the last layer: every query gives its mask, and the probability of each object class (the
    last column, "no object", left out). Object class c is semantic class ``c + decoder.first_object_class``, unless the
    classes are agnostic. A text query's objects are of its own class.

    Semantics are read from ``semantic`` of the superpoint queries: a superpoint's class is the most probable one of its
    query; the last column ("unlabelled") learns nothing. Without ``semantic`` (Mask3D) they are read as MaskFormer does
    (Cheng et al., NeurIPS 2021, section 3.4): a superpoint's class is the object class with the largest sum over the
    queries of (class probability · mask probability); stuff is then never taught, because no object is of it.
    """

    layers: list[LayerPrediction]  # from the initial queries to the last decoder layer
    semantic: list[Tensor] | None  # (Q_i, semantic classes + 1) logits of the last layer; None: no such head
    query_superpoints: list[Tensor]  # (Q_i,) int64: the scene's superpoint each query was drawn from, -1 = none
    encoder: EncoderOutput
    superpoints: Tensor  # (S, C) pooled features
    query_classes: list[Tensor] | None = None  # (Q_i,) int64: class of a text query, -1 = other; None: no text queries


class Matches(NamedTuple):
    """Matched pairs of a scene."""

    queries: Tensor  # (P,) int64
    objects: Tensor  # (P,) int64


class LossOutput(NamedTuple):
    """The loss, by named term."""

    total: Tensor  # () sum of weights[t] · terms[t]
    terms: dict[str, Tensor]  # () each, raw (unweighted), in a fixed order
    weights: dict[str, float]  # the weight of each term at this step
    matches: list[Matches] | None = None  # one entry a scene, of the last layer; None: no instance term
    objects: list[int] | None = None  # G_i of each scene that queries were matched with


class SegmenterOutput(NamedTuple):
    """Output of the whole model."""

    predictions: Predictions
    loss: LossOutput
