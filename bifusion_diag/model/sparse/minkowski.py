"""Adapter to the real MinkowskiEngine (Choy et al., CVPR 2019), so that results can be compared with its."""

from __future__ import annotations

import collections
import collections.abc
import functools
import importlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bifusion_diag.errors import UserError
from bifusion_diag.model.sparse.tensor import Geometry, SparseMaps


@functools.cache
def load_minkowski() -> Any:
    """Import MinkowskiEngine.

    Raises:
        UserError: it is not installed.
    """
    if not hasattr(collections, "Sequence"):  # MinkowskiEngine 0.5.4 imports it from where Python 3.10 removed it
        collections.Sequence = collections.abc.Sequence  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "compiled with CPU_ONLY flag": said by our own error where it matters
        try:
            return importlib.import_module("MinkowskiEngine")
        except ImportError as error:
            raise UserError(
                "sparse_engine 'minkowski': MinkowskiEngine cannot be imported "
                f"({error}). Build it with `make minkowski`, or choose 'native', which gives the same numbers."
            ) from error


class MinkowskiMaps:
    """MinkowskiEngine's coordinate manager for one batch.

    Rows of the finest scale keep their order; those of coarser scales are in MinkowskiEngine's hash-table order.

    Args:
        cells: (M, 4) int64 finest voxels, unique, in lexicographic order.

    Raises:
        UserError: CUDA tensors with a build for CPUs only.
    """

    def __init__(self, cells: Tensor) -> None:
        self._me = load_minkowski()
        if cells.is_cuda and not self._me.is_cuda_available():
            raise UserError(
                "sparse_engine 'minkowski': this build of MinkowskiEngine is for CPUs only, but the model is on a CUDA "
                "device. Choose sparse_engine 'native', or device 'cpu'."
            )
        kind = self._me.CoordinateMapType.CUDA if cells.is_cuda else self._me.CoordinateMapType.CPU
        # Its own choice would be OMP_NUM_THREADS or every processor, for all of the process from here on.
        threads = torch.get_num_threads()
        self._manager = self._me.CoordinateManager(D=3, num_threads=threads, coordinate_map_type=kind)
        key, _ = self._manager.insert_and_map(cells.int().contiguous(), [1, 1, 1], "")
        self._keys = {1: key}

    def coords(self, stride: int) -> Tensor:
        return self._manager.get_coordinates(self._keys[stride])

    def prepare(self, geometries: Iterable[Geometry]) -> None:
        """Nothing: MinkowskiEngine makes its kernel maps when a layer needs them."""

    def convolve(
        self, feats: Tensor, kernel: Tensor, in_stride: int, *, size: int, stride: int, dilation: int
    ) -> Tensor:
        source = self._keys[in_stride]
        if in_stride * stride not in self._keys:
            self._keys[in_stride * stride] = self._manager.stride(source, [stride] * 3)
        target = self._keys[in_stride * stride]
        function = self._me.MinkowskiConvolutionFunction
        return self._apply(function, feats, kernel, source, target, size, stride, dilation)

    def convolve_transposed(self, feats: Tensor, kernel: Tensor, in_stride: int, *, size: int, stride: int) -> Tensor:
        function = self._me.MinkowskiConvolutionTransposeFunction
        source, target = self._keys[in_stride], self._keys[in_stride // stride]
        return self._apply(function, feats, kernel, source, target, size, stride, 1)

    def _apply(
        self,
        function: Any,
        feats: Tensor,
        kernel: Tensor,
        source: Any,
        target: Any,
        size: int,
        stride: int,
        dilation: int,
    ) -> Tensor:
        generator = self._me.KernelGenerator(size, stride, dilation, dimension=3)
        mode = importlib.import_module("MinkowskiEngineBackend._C").ConvolutionMode.DEFAULT
        return function.apply(feats.contiguous(), kernel, generator, mode, source, target, self._manager)


class MinkowskiEngine:
    """Sparse convolution by MinkowskiEngine."""

    name = "minkowski"

    def __init__(self) -> None:
        load_minkowski()

    @property
    def version(self) -> str:
        return str(load_minkowski().__version__)

    def maps(self, cells: Tensor) -> SparseMaps:
        return MinkowskiMaps(cells)
