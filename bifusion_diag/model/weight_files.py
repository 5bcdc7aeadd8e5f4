"""Weights in files: read without running any code that a file may hold.

A torch file is a pickle, and a pickle can name any function and call it. torch's ``weights_only`` unpickler looks no
name up: it knows a short list of its own and refuses all others, and with them the checkpoints of MMEngine and
Lightning, whose logs and settings stand beside the weights. Here every other name stands for one class of ours that
takes anything and does nothing, so that the tensors come out and nothing else does.

A list of harmless modules would add no safety, as nothing is run either way, and would refuse a user's own classes. The
few names by which a pickle attacks are refused none the less: nobody should go on to use such a file elsewhere.

Before torch 2.6 ``weights_only`` itself could be made to run code (CVE-2025-32434).
"""

from __future__ import annotations

import hashlib
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from bifusion_diag.errors import UserError

#: Where training programs keep the weights within their checkpoints, best first. MMEngine's ``state_dict`` holds the
#: averaged weights where there are any.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "ema_state_dict")

#: What DataParallel and torch.compile put before every name.
WRAPPERS = ("module.", "_orig_mod.")

_ATTACK_MODULES = {"os", "posix", "nt", "sys", "subprocess", "pty", "socket", "shutil", "runpy", "importlib", "ctypes"}
_ATTACK_NAMES = {f"builtins.{name}" for name in ("eval", "exec", "compile", "open", "__import__", "globals")}

_LEGACY_PICKLES = 4  # magic number, protocol, byte order, and the object itself


class _Inert:
    """Stands for an object of any class: takes any arguments and any state, does nothing and keeps nothing."""

    def __new__(cls, *_arguments: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def _plain_dict(*_arguments: object) -> dict[Any, Any]:
    return {}


# The unpickler adds items to plain containers only.
_CONTAINERS: dict[str, Callable[..., Any]] = {
    "builtins.dict": dict,
    "builtins.list": list,
    "collections.defaultdict": _plain_dict,
}


def read_tensors(path: Path, setting: str) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file, by name, without running any code that it may hold.

    Of a checkpoint only the weights are taken (:data:`STATE_DICT_KEYS`); entries that are no tensor are left out, and
    so are prefixes of wrappers (:data:`WRAPPERS`).

    Args:
        path: the file.
        setting: the setting that named it, for the error message.

    Raises:
        UserError: there is no such file, it cannot be read, names functions that attack, or holds no tensors.
    """
    where = f"{setting}: {path}"
    if path.is_dir():
        raise UserError(f"{where} is a folder; give the file in it that holds the weights.")
    if not path.is_file():
        raise UserError(f"{where}: there is no such file.")
    try:
        stored = _read(path, where)
    except UserError:
        raise
    except Exception as error:  # whatever a file from elsewhere makes the readers stumble over
        # torch's own text advises to run the code in the file: not repeated
        raise UserError(
            f"{where} is not a readable safetensors or torch file of tensors "
            f"({type(error).__name__}{_reason(path, error)}). Fetch it again, or store its state dict alone."
        ) from error
    tensors = _state_dict(stored)
    if not tensors:
        whole = " It is a whole Python object: store its state_dict() instead." if isinstance(stored, _Inert) else ""
        raise UserError(f"{where} holds no state dict (names and tensors).{whole}")
    return tensors


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            sha.update(part)
    return sha.hexdigest()


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _read(path: Path, where: str) -> Any:
    if _is_safetensors(path):
        return load_file(path)
    names = _names(path)
    attacks = sorted(name for name in names if name.partition(".")[0] in _ATTACK_MODULES or name in _ATTACK_NAMES)
    if attacks:
        raise UserError(
            f"{where} names {listed(attacks)}: weights have no use for that, a file that attacks has. Nothing of it "
            "was run. Do not load it with other programs."
        )
    # torch's own list goes before ours where both have a name
    with safe_globals([(_CONTAINERS.get(name, _Inert), name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_safetensors(path: Path) -> bool:
    """Whether a file is, or says that it is, in the format that begins with the length of its JSON header."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _names(path: Path) -> set[str]:
    """Every class and function that a torch file names, found without unpickling it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entry = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(entry) as file:
                return _pickled_names(file)
    with path.open("rb") as file:
        return set().union(*(_pickled_names(file) for _ in range(_LEGACY_PICKLES)))


def _pickled_names(file: IO[bytes]) -> set[str]:
    """The names in one pickle, as they stand there and as Python 3 calls them."""
    names = set()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            names.add(f"{module}.{name}")
            names.add(".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))))
    return names


def _state_dict(stored: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint, or of a state dict that stands alone."""
    if not isinstance(stored, Mapping):
        return {}
    for key in STATE_DICT_KEYS:
        if isinstance(stored.get(key), Mapping):
            stored = stored[key]
            break
    return {_unwrapped(name): value for name, value in stored.items() if isinstance(name, str) and _is_plain(value)}


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _reason(path: Path, error: Exception) -> str:
    """What is wrong with a file that cannot be read, where that can be told."""
    if "torchscript" in str(error).lower():
        return ": it is a TorchScript archive, of which only OpenAI's is known (by the tag 'openai')"
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        return ": it is empty"
    return ": it is cut off" if start == b"PK" and not zipfile.is_zipfile(path) else ""
