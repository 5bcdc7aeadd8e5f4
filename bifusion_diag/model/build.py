"""From settings to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifusion_diag.config.settings import ModelSettings, Settings
from bifusion_diag.data.scannet200 import CLASS_NAMES
from bifusion_diag.errors import UserError
from bifusion_diag.model.decoder import MixedQueryDecoder
from bifusion_diag.model.encoder3d import Encoder3D
from bifusion_diag.model.inference import Inference
from bifusion_diag.model.losses import Criterion
from bifusion_diag.model.mask3d import Mask3DDecoder
from bifusion_diag.model.pooling import make_pooling
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.model.sparse import make_engine

if TYPE_CHECKING:
    from bifusion_diag.model.encoder_bifusion import BiFusionEncoder


def build_model(settings: Settings) -> Segmenter:
    """The segmenter of a run, on the CPU, with fresh weights from PyTorch's generator (the caller seeds it).

    Raises:
        UserError: a sparse engine or CLIP weights that are not there or do not fit; text queries of classes that have
            no name.
    """
    model = settings.model
    engine = make_engine(model.sparse_engine)
    encoder: Encoder3D | BiFusionEncoder
    if model.fusion == "none":
        encoder = Encoder3D(model.backbone, engine=engine, scales=model.decoder.kind == "mask3d")
    else:
        from bifusion_diag.model.encoder_bifusion import BiFusionEncoder  # the baseline does not wait for open_clip

        early_share = min(1.0, model.gate.early_steps / settings.training.reference_steps)
        encoder = BiFusionEncoder(model, early_share=early_share, engine=engine)
    return Segmenter(
        encoder=encoder,
        pool=make_pooling(model.pooling, encoder.out_channels),
        decoder=_decoder(model, encoder.out_channels),
        criterion=Criterion(settings.losses, model.decoder, fused=model.uses_clip),
        inference=Inference(
            model.inference,
            diffusion_radius=model.diffusion_radius,
            first_object_class=None if model.decoder.instance_classes == 1 else model.decoder.first_object_class,
            logit_scores=settings.losses.instance.style == "unified",
        ),
    )


def _decoder(model: ModelSettings, in_channels: int) -> MixedQueryDecoder | Mask3DDecoder:
    """The decoder, with the text features of its classes where it asks with them."""
    settings = model.decoder
    if settings.kind == "mask3d":
        return Mask3DDecoder(settings, in_channels, model.backbone.planes[3:])
    if not settings.text_queries:
        return MixedQueryDecoder(settings, in_channels)
    if settings.semantic_classes > len(CLASS_NAMES):
        raise UserError(
            f"model.decoder.text_queries asks by the names of the classes: {len(CLASS_NAMES)} have one (ScanNet200), "
            f"but model.decoder.semantic_classes is {settings.semantic_classes}"
        )
    from bifusion_diag.model.text import class_text_features  # who asks with no text does not wait for open_clip

    features, origin = class_text_features(model.clip, CLASS_NAMES[: settings.semantic_classes])
    return MixedQueryDecoder(settings, in_channels, features, text_origin=origin)
