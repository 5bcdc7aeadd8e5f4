"""From settings to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifusion_diag.config.settings import Settings
from bifusion_diag.model.decoder import MixedQueryDecoder
from bifusion_diag.model.encoder3d import Encoder3D
from bifusion_diag.model.inference import Inference
from bifusion_diag.model.losses import Criterion
from bifusion_diag.model.pooling import GeometryAwarePooling
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.model.sparse import make_engine

if TYPE_CHECKING:
    from bifusion_diag.model.encoder_bifusion import BiFusionEncoder


def build_model(settings: Settings) -> Segmenter:
    """The segmenter of a run, on the CPU, with fresh weights from PyTorch's generator (the caller seeds it).

    Raises:
        UserError: a sparse engine or CLIP weights that are not there or do not fit.
    """
    model = settings.model
    engine = make_engine(model.sparse_engine)
    encoder: Encoder3D | BiFusionEncoder
    if model.fusion == "none":
        encoder = Encoder3D(model.backbone, engine=engine)
    else:
        from bifusion_diag.model.encoder_bifusion import BiFusionEncoder  # the baseline does not wait for open_clip

        early_share = min(1.0, model.gate.early_steps / settings.training.reference_steps)
        encoder = BiFusionEncoder(model, early_share=early_share, engine=engine)
    return Segmenter(
        encoder=encoder,
        pool=GeometryAwarePooling(encoder.out_channels),
        decoder=MixedQueryDecoder(model.decoder, encoder.out_channels),
        criterion=Criterion(settings.losses, model.decoder, fused=model.uses_clip),
        inference=Inference(
            model.inference,
            diffusion_radius=model.diffusion_radius,
            semantic_classes=model.decoder.semantic_classes,
            logit_scores=settings.losses.instance.style == "unified",
        ),
    )
