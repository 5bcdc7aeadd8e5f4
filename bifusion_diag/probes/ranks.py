"""The processes that train one model together, as torch.distributed numbers them: what they agree on, and what each
holds of a sharded parameter. In a single process nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement(NamedTuple):
    """What all ranks know of the flags that each of them raised."""

    flags: tuple[int, ...]  # (K,) of each flag the largest value that a rank gave
    ranks: tuple[tuple[int, ...], ...]  # K times: the ranks that raised it, ascending


def world_size() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """The number of this process among them, from 0 on."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def agree(flags: Sequence[int | bool]) -> Agreement:
    """Tell all ranks which of them raised which flag, by one all-reduce of one byte a rank and flag.

    Every rank must call it, at the same place of its program and with as many flags. It waits for all of them.

    Args:
        flags: (K,) of this rank, whole numbers from 0 to 255; 0 is not raised.

    Returns:
        The same on every rank.
    """
    table = torch.zeros(world_size(), len(flags), dtype=torch.uint8)
    table[own_rank()] = torch.tensor([int(flag) for flag in flags], dtype=torch.uint8)
    if len(table) > 1:
        sent = table.to(_device())
        dist.all_reduce(sent)  # every row has one rank that wrote into it: a sum is a gathering
        table = sent.cpu()
    columns = table.T.tolist()
    return Agreement(
        tuple(max(column) for column in columns),
        tuple(tuple(rank for rank, value in enumerate(column) if value) for column in columns),
    )


def gather(mine: Any) -> list[Any]:
    """What every rank gives, by rank. All must call it at the same place of their program."""
    if world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _device() -> torch.device:
    """Where tensors must be to be sent: on the CPU if the group has a backend for it, which waits for no GPU."""
    return torch.device("cpu" if "cpu:" in dist.get_backend_config() else "cuda")


class Shards:
    """Puts sums over one process's part of parameters together to sums over the whole of them (FSDP2).

    The sums of all parameters travel as one small all-reduce for each group of processes that share parameters: one,
    unless a model is sharded in several ways. Every rank must call :meth:`whole` equally often, whatever it measured.

    Args:
        parameters: P parameters, in the same order on every rank.

    Attributes:
        any: whether some parameter is sharded.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._size = len(parameters)
        self._device = torch.device("cpu")
        self._constants: dict[tuple[int, ...], Tensor] = {}
        shared: list[tuple[list[dist.ProcessGroup], list[int]]] = []  # groups, and the parameters that they share
        for place, parameter in enumerate(parameters):
            groups = _sharing(parameter)
            if not groups:
                continue
            self._device = parameter.device
            known = next((places for others, places in shared if others == groups), None)
            if known is None:
                shared.append((groups, [place]))
            else:
                known.append(place)
        self._groups = [(groups, self._constant(tuple(places))) for groups, places in shared]
        self.any = bool(shared)

    def whole_norms(self, norms: Tensor, places: Sequence[int]) -> Tensor:
        """L2 norms of this process's part of tensors → of the whole tensors, (..., k) float64; the same on every rank.

        Args:
            norms: (..., k) float64; several rows are several quantities.
            places: k numbers of the parameters that the tensors belong to, each at most once. A parameter that is not
                among them counts as zero here, whatever the other ranks have of it.
        """
        if not self.any:
            return norms
        return self._reduced(norms.square(), places, 0.0, dist.ReduceOp.SUM).sqrt()

    def whole_max(self, values: Tensor, places: Sequence[int]) -> Tensor:
        """Largest element of this process's part of tensors → of the whole tensors, as above; −inf where this process
        has none. NaN on one rank is NaN on all."""
        if not self.any:
            return values
        gone = values.isnan()
        both = torch.stack([values.double().masked_fill(gone, -torch.inf), gone.double()])
        most, gone = self._reduced(both, places, -torch.inf, dist.ReduceOp.MAX)
        return most.masked_fill(gone > 0, torch.nan)

    def _reduced(self, values: Tensor, places: Sequence[int], neutral: float, how: dist.ReduceOp.RedOpType) -> Tensor:
        every = torch.full((*values.shape[:-1], self._size), neutral, dtype=torch.float64, device=self._device)
        here = self._constant(tuple(places))
        every[..., here] = values.to(self._device, torch.float64)
        for groups, shared in self._groups:
            part = every[..., shared].contiguous()
            for group in groups:
                dist.all_reduce(part, how, group=group)
            every[..., shared] = part
        return every[..., here]

    def _constant(self, places: tuple[int, ...]) -> Tensor:
        """Numbers on the device. They are the same at most steps, so that they are seldom copied there."""
        if places not in self._constants:
            if len(self._constants) > 16:
                self._constants.clear()
            self._constants[places] = torch.tensor(places, dtype=torch.int64, device=self._device)
        return self._constants[places]


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, but for a sharded one."""
    sharded: Any = tensor
    return sharded.to_local() if hasattr(tensor, "to_local") else tensor


def _sharing(tensor: Tensor) -> list[dist.ProcessGroup]:
    """The groups over which a tensor is sharded, one for each dimension of the mesh that it is sharded over."""
    sharded: Any = tensor
    mesh = getattr(tensor, "device_mesh", None)  # only a DTensor has one
    return [] if mesh is None else [mesh.get_group(i) for i, p in enumerate(sharded.placements) if p.is_shard()]
