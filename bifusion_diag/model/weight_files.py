"""Weights in files: read without running any code that a file may hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bifusion_diag.errors import UserError


def read_tensors(path: Path, setting: str) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, by name, without running any code that it may hold.

    Args:
        path: the file.
        setting: the setting that named it, for the error message.

    Raises:
        UserError: it cannot be read, or holds no state dict.
    """
    try:
        stored: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        # torch's own text advises to run the code in the file: not repeated
        raise UserError(
            f"{setting}: {path} is not a readable safetensors or torch file of tensors "
            f"({type(error).__name__}). Of TorchScript archives, only OpenAI's is known: use the tag 'openai'."
        ) from error
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):  # a checkpoint of open_clip's training
        stored = stored["state_dict"]
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise UserError(f"{setting}: {path} holds no state dict (names and tensors).")
    return {name.removeprefix("module."): value for name, value in stored.items()}


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
