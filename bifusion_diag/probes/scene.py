"""α of a scene, read from one forward that leaves no trace in the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from bifusion_diag.errors import UserError
from bifusion_diag.probes.fields import get_field
from bifusion_diag.probes.modules import measured_modules
from bifusion_diag.record.scenes import Snapshot, alpha_numbers, capture, half


class Fusion(NamedTuple):
    """What a forward has told of N points in V views, on the host."""

    alpha: NDArray[np.float64]  # (N,)
    uv: NDArray[np.float64]  # (N, V, 2) [px]
    valid: NDArray[np.bool_]  # (N,)
    view: NDArray[np.int64] | None  # (N,)
    inside: NDArray[np.bool_] | None  # (N, V)


def observe(model: nn.Module, forward: Callable[[], Any]) -> Fusion:
    """Run a forward in evaluation mode and read its fusion. Every module's mode, and torch's random numbers, are
    afterwards as they were; so are the running statistics of normalisations, which evaluation does not touch.

    Args:
        model: whose modules are watched. The first whose output has ``uv`` and ``valid``, and the first whose output
            has ``alpha``, are read; ``view`` and ``inside`` of the former where it has them.
        forward: runs the model, or a part of it, on one scene.

    Raises:
        UserError: no module has returned them, or they do not fit each other.
    """
    found: dict[str, Any] = {}

    def seen(_module: nn.Module, _inputs: Any, output: Any) -> None:
        for key, fields in (("projection", ("uv", "valid")), ("gate", ("alpha",))):
            if key not in found and all(isinstance(get_field(output, field), Tensor) for field in fields):
                found[key] = output

    with ExitStack() as stack:
        for module in measured_modules(model).values():
            stack.callback(module.register_forward_hook(seen).remove)
        stack.enter_context(_undisturbed(model))
        forward()
    for key, fields in (("projection", "uv and valid"), ("gate", "alpha")):
        if key not in found:
            raise UserError(
                f"no snapshot: no module of the model has returned {fields}. Return them as a named tuple (or a dict) "
                "from the forward of a module, and let the forward that is given run it"
            )
    projection, alpha = found["projection"], _array(get_field(found["gate"], "alpha"), np.float64).reshape(-1)
    uv = _array(get_field(projection, "uv"), np.float64)
    uv = uv[:, None] if uv.ndim == 2 else uv
    valid = _array(get_field(projection, "valid"), bool).reshape(-1)
    view, inside = (_tensor(get_field(projection, field)) for field in ("view", "inside"))
    if uv.ndim != 3 or uv.shape[-1] != 2 or valid.shape != uv.shape[:1] or alpha.shape != valid.shape:
        raise UserError(
            f"no snapshot: uv {tuple(uv.shape)}, valid {tuple(valid.shape)} and alpha ({len(alpha)}) are not of the "
            "same points; expected (N, V, 2) or (N, 2), (N,) and (N,) or (N, 1)"
        )
    return Fusion(
        alpha,
        uv,
        valid,
        None if view is None else _array(view, np.int64).reshape(-1),
        None if inside is None else _array(inside, bool).reshape(uv.shape[:2]),
    )


def take_snapshot(
    model: nn.Module,
    forward: Callable[[], Any],
    xyz: Tensor | ArrayLike,
    images: Tensor | ArrayLike,
    *,
    done: int,
    name: str,
    moment: str,
    intrinsics: Tensor | ArrayLike | None = None,
    pose: Tensor | ArrayLike | None = None,
    image_size: tuple[int, int] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Snapshot:
    """α of a scene as the model weighs it now.

    Args:
        model: see :func:`observe`.
        forward: see :func:`observe`.
        xyz: (N, 3) the scene's points in world coordinates [m], as they were projected.
        images: (V, 3, H, W) or (3, H, W) uint8.
        done: steps that were done.
        name: of the scene.
        moment: see :class:`~bifusion_diag.record.Snapshot`.
        intrinsics: (V, 3, 3) or (3, 3) [px].
        pose: (V, 4, 4) or (4, 4) camera-to-world [m].
        image_size: width and height that uv and intrinsics count in. None: those of the images.
        provenance: where the scene is from.

    Raises:
        UserError: the model's modules do not return what is needed, or shapes do not fit.
    """
    fusion = observe(model, forward)
    pictures = _array(images, np.uint8)
    pictures = pictures[None] if pictures.ndim == 3 else pictures
    points, views = fusion.uv.shape[:2]
    places = _array(xyz, np.float64)
    if places.shape != (points, 3):
        raise UserError(f"no snapshot: xyz is {places.shape}; expected ({points}, 3), one row a projected point")
    if pictures.ndim != 4 or pictures.shape[:2] != (views, 3):
        raise UserError(f"no snapshot: images are {pictures.shape}; expected ({views}, 3, H, W), one a view")
    scene, rows = capture(
        name,
        places,
        pictures,
        fusion.uv,
        fusion.valid,
        view=fusion.view,
        inside=fusion.inside,
        intrinsics=_matrices(intrinsics, views, 3, "intrinsics"),
        pose=_matrices(pose, views, 4, "pose"),
        image_size=image_size,
        provenance=provenance,
    )
    return Snapshot(done, moment, scene, half(fusion.alpha[rows]), alpha_numbers(fusion.alpha, fusion.valid))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random numbers are afterwards as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode


def _tensor(field: Any) -> Tensor | None:
    """A field that is a tensor: every object has others too, such as a tensor's method `view`."""
    return field if isinstance(field, Tensor) else None


def _array(values: Tensor | ArrayLike, kind: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu().numpy() if isinstance(values, Tensor) else values).astype(kind)


def _matrices(given: Tensor | ArrayLike | None, views: int, size: int, name: str) -> NDArray[np.float64] | None:
    if given is None:
        return None
    matrices = _array(given, np.float64)
    matrices = matrices[None] if matrices.ndim == 2 else matrices
    if matrices.shape != (views, size, size):
        raise UserError(f"no snapshot: {name} is {matrices.shape}; expected ({views}, {size}, {size})")
    return matrices
