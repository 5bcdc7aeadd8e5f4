"""Sparse convolution: voxels, layers, and two engines behind one interface."""

from bifusion_diag.model.sparse.engine import ENGINES, make_engine
from bifusion_diag.model.sparse.modules import BatchNorm, Conv3d, ConvTranspose3d, ReLU
from bifusion_diag.model.sparse.tensor import Engine, Geometry, SparseMaps, SparseTensor, concatenate, sparse_tensor
from bifusion_diag.model.sparse.voxels import Voxels, voxelize

__all__ = [
    "ENGINES",
    "BatchNorm",
    "Conv3d",
    "ConvTranspose3d",
    "Engine",
    "Geometry",
    "ReLU",
    "SparseMaps",
    "SparseTensor",
    "Voxels",
    "concatenate",
    "make_engine",
    "sparse_tensor",
    "voxelize",
]
