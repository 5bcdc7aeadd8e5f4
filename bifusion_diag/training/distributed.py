"""Training as one of several processes, started by torchrun: every rank has the whole model and scenes of its own, and
gradients are averaged over the ranks (DistributedDataParallel). A process that was started alone sends nothing."""

# No `from __future__ import annotations`: DistributedDataParallel wants the annotations of a hook as objects.

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from bifusion_diag.data import Batch
from bifusion_diag.errors import UserError
from bifusion_diag.model.outputs import LossOutput
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.probes.norms import l2_norm
from bifusion_diag.probes.ranks import own_rank, world_size

#: How long a rank waits for the others, which may be while rank 0 evaluates.
TIMEOUT = timedelta(minutes=60)
_FAILURE = "bifusion_diag/failure"  # where, in the store that the ranks share, the first that fails says so


class RankError(UserError):
    """Another process has ended, and this one cannot go on without it."""


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun has started, and leave them at the end.

    Verdicts travel over gloo, which waits for no GPU; gradients over NCCL where they are on GPUs.

    Raises:
        UserError: the others cannot be reached.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if dist.is_initialized() or not started:
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the other processes cannot be reached ({error}). WORLD_SIZE is {os.environ['WORLD_SIZE']}: start with "
            "torchrun --nproc-per-node N -m bifusion_diag train ..., or unset WORLD_SIZE for a single process"
        ) from error
    try:
        with explained():
            yield
    except BaseException:
        if not on_gpu:  # NCCL would wait for the others; the end of the process ends its connections
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def explained() -> Iterator[None]:
    """Tell the other ranks of an error in here; one that comes of another rank's end becomes a RankError that says
    what happened there."""
    try:
        yield
    except BaseException as error:
        if world_size() == 1 or isinstance(error, RankError):
            raise
        store = dist.distributed_c10d._get_default_store()
        if _is_of_connection(error):
            told = "another process has ended without a word; it may have been killed"
            with suppress(RuntimeError):
                if store.check([_FAILURE]):
                    told = store.get(_FAILURE).decode()
            raise RankError(f"rank {own_rank()} cannot go on: {told}") from error
        with suppress(RuntimeError):
            store.compare_set(_FAILURE, "", f"rank {own_rank()} has failed: {type(error).__name__}: {error}")
        raise


def _is_of_connection(error: BaseException) -> bool:
    """Whether torch.distributed could not send or receive; gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def seed_rank(seed: int) -> None:
    """Give every rank random numbers of its own. Call it when the model is built, with equal weights on all ranks.

    Rank 0 goes on with the stream that drew the weights, as a single process does; rank r > 0 begins the stream that
    ``numpy.random.SeedSequence([seed, r])`` seeds.
    """
    if own_rank():
        torch.manual_seed(int(np.random.SeedSequence([seed, own_rank()]).generate_state(1, np.uint64)[0]))


class _Total(nn.Module):
    """A model whose output is its total loss.

    DistributedDataParallel takes a parameter for used if the *output* depends on it. Predictions may, where the loss
    does not: the reduction would wait for a gradient that never comes.
    """

    loss: LossOutput

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        self.loss = self.model(batch).loss
        return self.loss.total


class Replica:
    """The model as this process trains it with the others; alone, it is the model itself.

    A gradient that a rank does not have, because nothing was matched in its scenes say, counts as zero in the mean;
    where no rank has one, there is none. BatchNorm normalises over a rank's own batch; its running statistics are those
    of rank 0, as all buffers.
    """

    def __init__(self, model: Segmenter) -> None:
        self._total = _Total(model)
        self._parallel: DistributedDataParallel | None = None
        self._learning: list[int] = []  # ids of the parameters whose gradients are reduced
        self._norms: list[Tensor] = []

    def loss(self, batch: Batch) -> LossOutput:
        """The loss of this rank's batch; its backward reduces the gradients."""
        if world_size() == 1:
            return self._total.model(batch).loss
        self._norms.clear()
        total = self._follow()(batch)
        return self._total.loss._replace(total=total)

    def local_norm(self, reduced: Tensor) -> Tensor:
        """() L2 norm of this rank's gradient before it is reduced. Alone, that is the gradient there is."""
        return torch.stack(self._norms).square().sum().sqrt() if self._norms else reduced

    def _follow(self) -> DistributedDataParallel:
        """What reduces the gradients of the parameters that learn now. It knows those that did when it was made: where
        a stage freezes or releases some, which it does on all ranks at the same step, it is made anew."""
        learning = [id(parameter) for parameter in self._total.parameters() if parameter.requires_grad]
        if self._parallel is not None and learning == self._learning:
            return self._parallel
        if self._parallel is not None:
            self._parallel._remove_autograd_hooks()
        self._learning = learning
        self._parallel = DistributedDataParallel(self._total, find_unused_parameters=True)
        self._parallel.register_comm_hook(None, self._reduce)
        return self._parallel

    def _reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """The mean over the ranks, as without a hook; what is reduced is measured before."""
        self._norms.append(l2_norm(bucket.buffer()))
        group: Any = None  # the default one
        return allreduce_hook(group, bucket)
