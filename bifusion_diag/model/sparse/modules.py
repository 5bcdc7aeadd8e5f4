"""Layers on sparse tensors, with the parameter names, shapes and initial values of MinkowskiEngine.

Legend: K kernel offsets · I, O input and output channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bifusion_diag.model.sparse.tensor import SparseTensor


class _Convolution(nn.Module):
    """Kernel and bias. Initial values: uniform in ±1/sqrt(fan · K), as MinkowskiConvolutionBase.reset_parameters
    (MinkowskiEngine 0.5.4), where the fan is I, or O for the transposed convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, fan: int, bias: bool) -> None:
        super().__init__()
        volume = kernel_size**3
        shape = (volume, in_channels, out_channels) if volume > 1 else (in_channels, out_channels)
        bound = 1 / math.sqrt(fan * volume)
        self.kernel = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(1, out_channels).uniform_(-bound, bound)) if bias else None
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size

    def _add_bias(self, feats: Tensor) -> Tensor:
        return feats if self.bias is None else feats + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"


class Conv3d(_Convolution):
    """Sparse convolution: ``out[c] = sum_k in[c + offset_k · dilation · in_stride] @ kernel[k] (+ bias)``.

    The output voxels are the input's (stride 1) or those of the coarser scale that hold an input voxel (floor).

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: side of the kernel; ``kernel`` is (kernel_size³, I, O), or (I, O) for size 1.
        stride: factor between the scales; 1 for a kernel of size 1.
        dilation: spacing of the offsets.
        bias: add ``bias`` (1, O).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        assert kernel_size > 1 or stride == 1, "a kernel of size 1 does not change the scale"
        super().__init__(in_channels, out_channels, kernel_size, in_channels, bias)
        self.stride = stride
        self.dilation = dilation

    def forward(self, x: SparseTensor) -> SparseTensor:
        if self.kernel_size == 1:
            return x.with_feats(self._add_bias(x.feats @ self.kernel))
        feats = x.maps.convolve(
            x.feats, self.kernel, x.stride, size=self.kernel_size, stride=self.stride, dilation=self.dilation
        )
        return SparseTensor(self._add_bias(feats), x.stride * self.stride, x.maps)


class ConvTranspose3d(_Convolution):
    """Transposed sparse convolution onto the voxels of the finer scale that a strided convolution came from.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: side of the kernel.
        stride: factor between the scales, > 1.
        bias: add ``bias`` (1, O).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int, bias: bool = False
    ) -> None:
        assert stride > 1, "a transposed convolution goes to a finer scale"
        super().__init__(in_channels, out_channels, kernel_size, out_channels, bias)
        self.stride = stride

    def forward(self, x: SparseTensor) -> SparseTensor:
        assert x.stride % self.stride == 0, "there is no finer scale"
        feats = x.maps.convolve_transposed(x.feats, self.kernel, x.stride, size=self.kernel_size, stride=self.stride)
        return SparseTensor(self._add_bias(feats), x.stride // self.stride, x.maps)


class RowNorm(nn.BatchNorm1d):
    """Batch normalisation of rows (M, C) that accepts a single row.

    With one row, ``(x - mean) / sqrt(var + eps)`` is 0 whatever x is: the output is the bias and the gradient of the
    input is zero. torch.nn.BatchNorm1d (and so MinkowskiBatchNorm) refuses one row in training, because the unbiased
    variance for the running statistics does not exist; here a crop of one voxel must not end a run, so the running
    statistics are left as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] == 1:
            return (input - input) * self.weight + self.bias
        return super().forward(input)


class BatchNorm(nn.Module):
    """Batch normalisation over all voxels of the batch (MinkowskiBatchNorm); parameters under ``bn``."""

    def __init__(self, channels: int, *, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn = RowNorm(channels, momentum=momentum)

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.with_feats(self.bn(x.feats))


class ReLU(nn.Module):
    """max(x, 0). Never in place: what a hook saw must not change afterwards."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.with_feats(torch.relu(x.feats))
