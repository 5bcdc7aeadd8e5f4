"""From a file of weights to the weights of a model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from bifusion_diag.errors import UserError
from bifusion_diag.model.checkpoints.esam import ESAM, ONEFORMER3D
from bifusion_diag.model.checkpoints.layout import Layout, part_of
from bifusion_diag.model.checkpoints.mask3d import MASK3D
from bifusion_diag.model.checkpoints.own import RUN, STATE_DICT
from bifusion_diag.model.checkpoints.report import LoadReport, MisShaped
from bifusion_diag.model.checkpoints.res16unet import res16unet_layout
from bifusion_diag.model.weight_files import file_digest, listed, read_tensors

SETTING = "model.init_from"

#: Buffers whose values follow from the settings, as frozen weights' do.
FROM_SETTINGS = ("decoder.text_features",)

#: The first that fits is taken.
LAYOUTS = (RUN, STATE_DICT, MASK3D, ESAM, ONEFORMER3D)


def load_weights(model: nn.Module, path: Path) -> LoadReport:
    """Load what fits of a checkpoint into a model; no random number is drawn.

    Parameters that require no gradient are left alone: they are frozen for good, their values follow from the settings
    alone, and a resumed run, which may no longer have the file, must find them again. Class heads are taken to be
    ScanNet200's where they have its size.

    Args:
        model: as :func:`~bifusion_diag.model.build.build_model` makes it, before anything is frozen for a while.
        path: ESAM, OneFormer3D, Mask3D, a Res16UNet alone, or ``state.safetensors`` of an earlier run.

    Returns:
        What was loaded, and what was not.

    Raises:
        UserError: the file cannot be read, no layout is known for its names, or no parameter in it fits.
    """
    stored = read_tensors(path, SETTING)
    layout = _recognise(stored)
    if layout is None:
        known = ", ".join([*(each.name for each in LAYOUTS), "Res16UNet"])
        raise UserError(
            f"{SETTING}: {path} holds names of no known layout ({known}). It begins with: {listed(list(stored))}."
        )
    own = model.state_dict()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    frozen |= {name for name in own if name in FROM_SETTINGS}
    found: dict[str, Tensor] = {}
    unexpected = []
    for theirs, value in stored.items():
        if theirs.startswith(layout.aside):
            continue
        ours = layout.translate(theirs, value)
        if ours is None or ours[0] not in own or ours[0] in found:
            unexpected.append(theirs)
        else:
            found[ours[0]] = ours[1]
    fitting = {name: value for name, value in found.items() if name not in frozen and value.shape == own[name].shape}
    mis_shaped = [
        MisShaped(name, tuple(value.shape), tuple(own[name].shape))
        for name, value in found.items()
        if name not in frozen and name not in fitting
    ]
    parameters = {name for name, _ in model.named_parameters()}
    if parameters.isdisjoint(fitting):
        wrong = f"; of another shape: {listed([str(each) for each in mis_shaped], 3)}" if mis_shaped else ""
        raise UserError(
            f"{SETTING}: nothing of {path} ({layout.name}) fits this model{wrong}. Its sizes are set by the preset and "
            "--scale."
        )
    refused = [name for name, value in found.items() if name in frozen and not _equal(value, own[name])]
    absent = [name for name in own if name not in found and name not in frozen]
    covered = _covered(layout, found)
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
    return LoadReport(
        file=path.name,
        digest=file_digest(path),
        layout=layout.name,
        loaded=tuple(fitting),
        parameters=sum(value.numel() for name, value in fitting.items() if name in parameters),
        mis_shaped=tuple(mis_shaped),
        missing=tuple(name for name in absent if name.startswith(covered)),
        unexpected=tuple(unexpected),
        fresh=tuple(name for name in absent if not name.startswith(covered)),
        frozen=tuple(name for name in own if name in frozen),
        refused=tuple(refused),
        nonfinite=tuple(name for name in fitting if not torch.isfinite(own[name]).all()),
    )


def _recognise(names: Collection[str]) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.fits(names)), None) or res16unet_layout(names)


def _equal(stored: Tensor, own: Tensor) -> bool:
    """Whether a value is ours, in our precision."""
    return torch.equal(stored.to(own.dtype), own.cpu())


def _covered(layout: Layout, found: Collection[str]) -> tuple[str, ...]:
    """Beginnings of the names that the file was to hold."""
    if layout.covers is not None:
        return layout.covers
    return tuple(dict.fromkeys(f"{part_of(name)}." for name in found))
