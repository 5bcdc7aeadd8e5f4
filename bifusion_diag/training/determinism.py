"""Same seed, same machine: bit-identical runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from bifusion_diag.errors import UserError
from bifusion_diag.probes.ranks import gather, own_rank, world_size


def choose_device(name: str) -> torch.device:
    """The device of that name; 'auto' is the first GPU, or else the CPU. Of several processes on a machine, each has
    a GPU of its own under the names 'auto' and 'cuda'.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', own_rank())}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # a value can be had back, which the device 'meta' refuses
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not available here ({reason}). Use 'auto', 'cpu' or 'cuda'.") from error
    return device


def make_deterministic(seed: int, threads: int) -> None:
    """Seed torch and make it choose deterministic kernels, or fail where it has none.

    Args:
        seed: of every torch generator.
        threads: of the CPU, 0 keeps torch's choice. Sums depend on it: runs are bit-identical at one number of threads.
    """
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with its own workspace
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory costs time and gains nothing: nothing reads it before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def torch_environment(device: torch.device) -> dict[str, Any]:
    """What decides, beside the seed, whether two runs can be bit-identical."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def not_deterministic(engine: str, environment: Mapping[str, Any]) -> str | None:
    """What keeps a run from being repeated bit by bit, in a sentence; None where nothing known does.

    Args:
        engine: of sparse convolutions, as the model states it: "minkowski 0.5.4".
        environment: of :func:`torch_environment`.
    """
    threads = environment.get("threads") or 1
    if not engine.startswith("minkowski") or (environment.get("device") == "cpu" and threads == 1):
        return None
    where = f"with {threads} threads" if environment.get("device") == "cpu" else "on a GPU"
    return f"MinkowskiEngine's backward is not deterministic {where}; with training.threads=1 on a CPU it is"


def random_states() -> dict[str, torch.Tensor]:
    """:func:`random_state` of every process: those of rank 1 are named ``rank1/cpu`` and so on. All must call it."""
    return {
        f"rank{rank}/{name}" if rank else name: state
        for rank, states in enumerate(gather(random_state()))
        for name, state in states.items()
    }


def random_state() -> dict[str, torch.Tensor]:
    """The state of every random generator that a step draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda:{i}": generator for i, generator in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`random_states` returned of this process."""
    mine = f"rank{own_rank()}/" if own_rank() else ""
    restore_random_state({k.removeprefix(mine): state for k, state in states.items() if k.startswith(mine)})


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`random_state` returned; GPUs that are not here are skipped."""
    torch.set_rng_state(state["cpu"])
    for name, generator in state.items():
        if name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(generator, name)
