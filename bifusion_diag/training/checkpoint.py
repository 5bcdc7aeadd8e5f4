"""Checkpoints: tensors in safetensors, everything else in JSON. No pickles, and never half-written.

A checkpoint is a folder ``<run>.checkpoints/step-000020`` with ``state.safetensors`` (weights and buffers that the run
can change, AdamW's moments, random generators) and ``checkpoint.json``. Weights that are frozen for good are rebuilt
from the settings and the seed; their digest is stored and compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bifusion_diag.errors import UserError
from bifusion_diag.probes.ranks import own_rank
from bifusion_diag.training.determinism import random_states, restore_random_states

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`latest_checkpoint` and :func:`nearest_checkpoint` find."""

    folder: Path
    step: int  # steps done: the next step to run
    info: dict[str, Any]  # what the caller gave to save_checkpoint


def checkpoint_folder(run_json: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_json.with_name(f"{run_json.stem}.checkpoints")


def save_checkpoint(
    parent: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    info: dict[str, Any],
    *,
    keep: int = 2,
    frozen: Set[str] | None = None,
) -> Path:
    """Write a checkpoint whole or not at all, and drop all but the newest ones.

    Of several processes, all must call it: rank 0 writes, with the random generators of all.
    Raises OSError or SafetensorError where it cannot be written; the older ones are still there then.

    Args:
        parent: the folder of the run's checkpoints.
        step: steps done.
        model: its state is stored except for parameters that are frozen for good.
        optimizer: its per-parameter state is stored under the parameters' names.
        info: JSON-serialisable facts to get back on resuming.
        keep: checkpoints that are there afterwards, the newest; 0 drops none.
        frozen: names of parameters that are frozen for good. None: those that no optimiser holds.
    """
    target = parent / f"step-{step:06d}"
    random = random_states()
    if own_rank() != 0:
        return target
    names = _names_of(model, optimizer)
    frozen = _outside(model, names) if frozen is None else frozen
    tensors = {f"model/{k}": v for k, v in model.state_dict().items() if k not in frozen}
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    tensors |= {f"random/{k}": v for k, v in random.items()}
    partial = parent / f".step-{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    content = {"format_version": FORMAT_VERSION, "step": step, "frozen_digest": _digest(model, frozen), "info": info}
    try:
        partial.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial / "state.safetensors")
        (partial / "checkpoint.json").write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is not filled further
        raise
    for old in _by_step(parent)[:-keep] if keep else ():
        shutil.rmtree(old)
    return target


def latest_checkpoint(parent: Path) -> Checkpoint:
    """The newest checkpoint of a run.

    Raises:
        UserError: there is none, it is corrupt, or it is from a newer version.
    """
    folders = _by_step(parent)
    if not folders:
        raise UserError(f"nothing to resume: no checkpoint in {parent}")
    return _read(folders[-1])


def nearest_checkpoint(parent: Path, step: int) -> Checkpoint | None:
    """The newest checkpoint of a run after at most so many steps, None where there is none.

    Raises:
        UserError: it is corrupt, or it is from a newer version.
    """
    folders = [folder for folder in _by_step(parent) if _step_of(folder) <= step]
    return _read(folders[-1]) if folders else None


def _read(folder: Path) -> Checkpoint:
    path = folder / "checkpoint.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, step, info = content["format_version"], content["step"], content["info"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({error}); delete its folder to use an older one"
        ) from error
    if version > FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this bifusion-diag reads up to {FORMAT_VERSION}")
    return Checkpoint(folder, step, info)


def restore_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, frozen: Set[str] | None = None
) -> None:
    """Put model, optimiser and random generators back to where they were; ``frozen`` as in :func:`save_checkpoint`.

    Raises:
        UserError: the state file is truncated, or does not fit the model that the settings gave.
    """
    path = checkpoint.folder / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete its folder to use an older checkpoint") from error
    names = _names_of(model, optimizer)
    frozen = _outside(model, names) if frozen is None else frozen
    content = json.loads((checkpoint.folder / "checkpoint.json").read_text(encoding="utf-8"))
    if _digest(model, frozen) != content["frozen_digest"]:
        raise UserError(
            f"{checkpoint.folder}: the frozen weights are not those of the interrupted run. Random CLIP weights depend "
            "on the torch and open_clip versions; resume with the versions that the run began with."
        )
    state = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - frozen:
        raise UserError(f"{path} does not fit the model: {sorted({*unexpected, *missing} - frozen)[:5]} ...")
    for parameter, name in names.items():
        prefix = f"optimizer/{name}/"
        values = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if values:
            optimizer.state[parameter] = {k: _placed(k, v, parameter) for k, v in values.items()}
    restore_random_states({k.removeprefix("random/"): v for k, v in tensors.items() if k.startswith("random/")})


def _by_step(parent: Path) -> list[Path]:
    """Checkpoints, oldest first: by number, as the names' order is another one from a million steps on."""
    named = (path for path in parent.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted(named, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _placed(key: str, value: Tensor, parameter: Tensor) -> Tensor:
    return value if key == "step" else value.to(parameter.device)  # AdamW keeps its step count on the CPU


def _names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, str]:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {parameter: name for name, parameter in model.named_parameters() if id(parameter) in held}


def _outside(model: nn.Module, names: Mapping[nn.Parameter, str]) -> set[str]:
    return {name for name, _ in model.named_parameters()} - set(names.values())


def _digest(model: nn.Module, names: Set[str]) -> str:
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name in names:
            sha.update(name.encode())
            sha.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
