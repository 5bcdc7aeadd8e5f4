"""What frozen modules computed, kept in memory and in a folder."""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from bifusion_diag.errors import UserError
from bifusion_diag.files import write_bytes

_GIB = 1 << 30
_FEATURES, _CHECK = "features", "sha256"  # the tensors of an entry
_TRIAL_BYTES = 1 << 20  # more than an entry of CLIP ViT-B/16, which takes 0.6 MB


class FeatureCache:
    """Tensors by key: the most recent ones in memory, all of them in a folder. Either may be off.

    A key must name everything that decides the tensor's bits. Tensors are handed out as they are kept: who gets one
    must not change it.

    Args:
        memory: how much may be kept in memory [GiB], on the device that computed it; 0 = nothing.
        folder: where tensors are kept between runs, or None. Several processes may use it at once.

    Raises:
        UserError: nothing can be written to the folder.
    """

    def __init__(self, memory: float, folder: str | None) -> None:
        self._limit = int(memory * _GIB)
        self._held = 0  # bytes
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self.folder = FeatureFolder(Path(folder)) if folder is not None else None

    @property
    def active(self) -> bool:
        """Whether anything is kept at all."""
        return self._limit > 0 or self.folder is not None

    def fetch(
        self, key: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, compute: Callable[[], Tensor]
    ) -> Tensor:
        """The tensor of a key: kept, or computed now and then kept.

        Args:
            key: hexadecimal digits.
            shape, dtype: of the tensor; what the folder holds otherwise is computed again.
            device: where it is wanted.
            compute: makes the tensor, on that device.
        """
        if (kept := self._memory.get(key)) is not None:
            self._memory.move_to_end(key)
            return kept
        stored = self.folder.read(key, shape, dtype) if self.folder is not None else None
        if stored is not None:
            features = stored.to(device)
        else:
            features = compute()
            if self.folder is not None:
                self.folder.write(key, features)
        self._keep(key, features)
        return features

    def forget(self) -> None:
        """Drop what is in memory."""
        self._memory.clear()
        self._held = 0

    def _keep(self, key: str, features: Tensor) -> None:
        if features.nbytes > self._limit:
            return
        self._memory[key] = features
        self._held += features.nbytes
        while self._held > self._limit:
            _, oldest = self._memory.popitem(last=False)
            self._held -= oldest.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        """A copy of a model starts with an empty memory of its own, and shares the folder."""
        copy = FeatureCache(self._limit / _GIB, None)
        copy.folder = self.folder
        return copy


class FeatureFolder:
    """One safetensors file a key, written whole or not at all, with a checksum that is verified when it is read.

    What cannot be read, or is not what it should be, counts as absent and is replaced by the next write. The first
    write that fails is warned of, and the last: training needs none of them.

    Raises:
        UserError: the folder cannot be made, or nothing can be written to it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writes = True
        trial = folder / "trial"
        try:
            write_bytes(trial, bytes(_TRIAL_BYTES))
            trial.unlink(missing_ok=True)  # another process may have taken it away
        except (UserError, OSError) as error:
            raise UserError(
                f"model.clip.cache_folder: nothing can be kept in {folder} ({error}) "
                "Give a folder that can be written to and has room, or none (null)."
            ) from error

    def read(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """The tensor of a key, on the CPU, or None where there is no such entry that is whole."""
        try:
            # read, not mapped into memory: a file that shrinks under a map ends the process
            entry = load(self._path(key).read_bytes())
            features, check = entry[_FEATURES], entry[_CHECK]
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        whole = tuple(features.shape) == tuple(shape) and features.dtype == dtype
        return features if whole and torch.equal(check, _checksum(key, features)) else None

    def write(self, key: str, features: Tensor) -> None:
        """Keep a tensor."""
        if not self._writes:
            return
        features = features.detach().cpu().contiguous()
        try:
            write_bytes(self._path(key), save({_FEATURES: features, _CHECK: _checksum(key, features)}))
        except UserError as error:
            self._writes = False
            warnings.warn(f"CLIP's features are no longer kept on disk, training goes on: {error}", stacklevel=2)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.safetensors"


def raw_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor of at least one dimension, for a digest."""
    array: NDArray[np.uint8] = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return array


def _checksum(key: str, features: Tensor) -> Tensor:
    """(32,) uint8 SHA-256 of the key and the bytes."""
    sha = hashlib.sha256(key.encode())
    sha.update(raw_bytes(features).data)
    return torch.tensor(list(sha.digest()), dtype=torch.uint8)
