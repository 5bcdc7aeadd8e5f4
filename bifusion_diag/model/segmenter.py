"""The whole model: encoder → pooling → decoder → losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from bifusion_diag.data.batch import Batch
from bifusion_diag.model.decoder import MixedQueryDecoder
from bifusion_diag.model.encoder3d import Encoder3D
from bifusion_diag.model.inference import Inference, ScenePrediction, evaluating
from bifusion_diag.model.losses import Criterion
from bifusion_diag.model.mask3d import Mask3DDecoder
from bifusion_diag.model.outputs import EncoderOutput, Predictions, SegmenterOutput
from bifusion_diag.model.pooling import GeometryAwarePooling, MeanPooling

if TYPE_CHECKING:
    from bifusion_diag.model.encoder_bifusion import BiFusionEncoder


class PartSize(NamedTuple):
    """Parameters of one part of the model."""

    total: int
    trainable: int


class Segmenter(nn.Module):
    """A 3D instance segmenter with its losses; both the baseline and BiFusion.

    The parts have the same names in both, so that runs can be compared module by module.
    """

    def __init__(
        self,
        encoder: Encoder3D | BiFusionEncoder,
        pool: GeometryAwarePooling | MeanPooling,
        decoder: MixedQueryDecoder | Mask3DDecoder,
        criterion: Criterion,
        inference: Inference,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.decoder = decoder
        self.criterion = criterion
        self.inference = inference

    def set_progress(self, step: int, total_steps: int) -> None:
        """Tell every part whose behaviour depends on it how far the run is (``step`` counts from 0)."""
        for module in self.modules():
            set_progress = getattr(module, "set_progress", None)
            if module is not self and callable(set_progress):
                set_progress(step, total_steps)

    def forward(self, batch: Batch) -> SegmenterOutput:
        """Predictions and loss of a batch."""
        predictions = self.predictions(batch)
        return SegmenterOutput(predictions=predictions, loss=self.criterion(predictions, batch))

    def predict(self, batch: Batch) -> list[ScenePrediction]:
        """Instances and semantics of every scene, in evaluation mode and without a gradient."""
        with evaluating(self):
            return self.inference(self.predictions(batch), batch)

    def predictions(self, batch: Batch) -> Predictions:
        """What the decoder says, in the mode that the model is in."""
        encoder: EncoderOutput = self.encoder(batch)
        pooled = self.pool(encoder.fused, batch.coords, batch.superpoint, sum(batch.superpoint_counts))
        decoded = self.decoder(*self.decoder.inputs(encoder, pooled, batch))
        return Predictions(
            layers=decoded.layers,
            semantic=decoded.semantic,
            query_superpoints=decoded.query_superpoints,
            encoder=encoder,
            superpoints=pooled.features,
            query_classes=decoded.query_classes,
        )

    def provenance(self) -> dict[str, str]:
        """Where the model's weights and its convolutions come from, for the run record."""
        return self.encoder.provenance() | self.decoder.provenance()

    def part_sizes(self) -> dict[str, PartSize]:
        """Parameters of each part, in the order of execution; the encoder's parts one by one, then ``total``.

        Parts without parameters are left out. ``trainable`` is what requires a gradient at the moment.
        """
        parts = {f"encoder.{name}": part for name, part in self.encoder.named_children()}
        parts.update((name, part) for name, part in self.named_children() if name != "encoder")
        sizes = {name: _size(part) for name, part in parts.items()}
        return {name: size for name, size in sizes.items() if size.total} | {"total": _size(self)}


def _size(module: nn.Module) -> PartSize:
    parameters = list(module.parameters())
    return PartSize(
        total=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )
