"""Capsules: a bad step on disk, from which another process can run the very same step on another day.

A capsule is a folder ``<run>.incidents/000123``::

    capsule.json         the incident, digests of losses and gradients, settings, versions, machine, checksums
    state.safetensors    weights, buffers, optimiser state, random generators, as the step began
    batch.json           the batch, nested as it was; its tensors are in
    batch.safetensors

No pickles: reading one runs no code. Weights that the settings give again may be left out; their digest is stored.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from bifusion_diag.errors import UserError
from bifusion_diag.probes.base import ROOT
from bifusion_diag.probes.modules import plain_name
from bifusion_diag.probes.ranks import local_part, own_rank, world_size
from bifusion_diag.record import collect_environment
from bifusion_diag.replay.capsules.machine import machine
from bifusion_diag.replay.capsules.tree import Decoder, Encoder, class_name, find_class
from bifusion_diag.replay.examine.user_hooks import user_hooks
from bifusion_diag.replay.incident import Incident
from bifusion_diag.replay.notes import OF_ANY_MODULE, State, StepNotes
from bifusion_diag.replay.step import Fingerprint, Training, digest, fingerprint

KIND = "bifusion-diag capsule"
FORMAT_VERSION = 1
JSON_FILE, STATE_FILE, BATCH_FILE, BATCH_JSON = "capsule.json", "state.safetensors", "batch.safetensors", "batch.json"
NO_STEP = "no step function was given"  # to the recorder
ALIKE = 3  # capsules of incidents with one kind and place
SPARE = 64_000_000  # bytes that a capsule leaves free on the disk: the record goes on
#: What capsule.json must hold to be looked at.
_CONTENT: dict[str, type | tuple[type, ...]] = {
    "step": int, "incident": dict, "settings": dict, "environment": dict, "model": dict, "optimizers": list,
    "random": dict, "files": dict, "weights": str, "rank": int, "ranks": int,
}  # fmt: skip
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NONFINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


class CapsuleWriter:
    """Writes the capsules of a run: each whole or not at all, none too large, and not all of one kind.

    Args:
        count: how many in a run; 0 = none.
        limit: largest capsule, as "2 GB", "500 MB" or a number of bytes.
        settings: of the run, JSON.
        state: function that returns what else decides a step, such as a scheduler's state_dict.
        rebuilt: names of parameters that are left out, as the settings give them again.

    Attributes:
        folder: where they are written, one folder each; None: nowhere.
        written: how many were.

    Raises:
        UserError: the limit cannot be read.
    """

    def __init__(
        self,
        count: int,
        limit: str | int,
        *,
        settings: Mapping[str, Any],
        state: Callable[[], Mapping[str, Any]] | None = None,
        rebuilt: frozenset[str] = frozenset(),
    ) -> None:
        self.folder: Path | None = None
        self.written = 0
        self._count = count
        self._limit = parse_size(limit)
        self._settings = settings
        self._state = state
        self._rebuilt = frozenset(map(plain_name, rebuilt))
        self._alike: Counter[tuple[str, str]] = Counter()
        self._bad: set[int] = set()  # steps
        self._versions: dict[str, int] = {}  # of rebuilt weights, as training began
        self._digest: tuple[Any, str] | None = None  # of the rebuilt weights, and what it was taken of

    def open(self, model: nn.Module, folder: Path | None) -> None:
        """Training begins.

        Args:
            model: its weights that are rebuilt are now what the settings give; what changes later is stored.
            folder: where capsules are written; None: nowhere.
        """
        self.folder = folder
        named = {plain_name(path): parameter for path, parameter in model.named_parameters()}
        self._versions = {name: p._version for name, p in named.items() if name in self._rebuilt}

    def size(self, training: Training, batch: Any) -> int:
        """How many bytes a capsule will take, but for its JSON."""
        state, _ = self._encode_state(training, None)
        content = Encoder()
        content.encode(batch, "batch")
        return sum(x.nbytes for x in (*state.tensors.values(), *content.tensors.values()))

    def write(
        self,
        incident: Incident,
        training: Training,
        notes: StepNotes,
        of_step: Fingerprint | None,
        *,
        updated: bool = False,
    ) -> tuple[str | None, str]:
        """Write the capsule of a bad step. Never raises; weights, gradients, buffers and random numbers are afterwards
        what they were.

        Args:
            incident: what was found.
            training: what runs.
            notes: of the step.
            of_step: digests of the step as it ran first.
            updated: the update is done already: the capsule then holds the weights after it.

        Returns:
            Its folder, and its size and what it leaves out; or None, and why there is none.
        """
        self._bad.add(incident.step)
        why_not = self._why_not(incident, training, notes)
        if why_not:
            return None, why_not
        try:
            return self._write(incident, training, notes, of_step, updated=updated)
        except Exception as error:  # a full disk ends no training
            return None, f"no capsule could be written: {_in_words(error)}"

    def _why_not(self, incident: Incident, training: Training, notes: StepNotes) -> str:
        if self.folder is None:
            return "capsules are written beside the record, and none is written"
        if self.written >= self._count:
            return f"{self.written} capsules were written in this run, and no more are wanted"
        if self._alike[incident.kind, incident.place] >= ALIKE:
            return f"{ALIKE} capsules of this kind and place were written before"
        if {incident.step - 1, incident.step - 2} <= self._bad:
            return "the two steps before were bad too"
        if not notes.has_batch:
            return "monitor.step() was not given the batch, without which the step cannot run again"
        if any(hasattr(parameter, "full_tensor") for parameter in training.model.parameters()):
            return "the weights are sharded over processes, of which none can run the step again alone"
        return ""

    def _write(
        self, incident: Incident, training: Training, notes: StepNotes, of_step: Fingerprint | None, *, updated: bool
    ) -> tuple[str | None, str]:
        assert self.folder is not None
        state, content = self._encode_state(training, notes)
        batch = Encoder()
        batch_json = _dumps(batch.encode(notes.batch(), "batch"))
        size = sum(x.nbytes for x in (*state.tensors.values(), *batch.tensors.values())) + len(batch_json)
        if size > self._limit:
            return None, f"it would take {_readable(size)}, more than the limit of {_readable(self._limit)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if size + SPARE > free:
            return None, f"it would take {_readable(size)}, and the disk has {_readable(free)} left"
        lost = [*state.lost, *batch.lost]
        if self._state is None:
            beside = outside_modules(training)
            lost += [f"{name} is no part of the model: FlightRecorder(state=...) can store it" for name in beside]
        target = self.folder / f"{incident.step:06d}"
        incident = dataclasses.replace(incident, capsule=str(target), capsule_note=_note(size, lost, updated))
        document = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "step": incident.step,
            "incident": plain_json(incident.to_dict()),
            **self._bits(incident, training, notes, of_step, updated=updated),
            "weights": "after the update" if updated else "as the step began",
            "settings": plain_json(self._settings),
            "environment": collect_environment() | machine(training.model),
            "rank": own_rank(),
            "ranks": world_size(),
            **content,
            "lost": lost,
        }
        partial = self.folder / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            save_file(state.tensors, partial / STATE_FILE)
            save_file(batch.tensors, partial / BATCH_FILE)
            (partial / BATCH_JSON).write_text(batch_json, encoding="utf-8")
            names = (STATE_FILE, BATCH_FILE, BATCH_JSON)
            document["files"] = {name: _checksum(partial / name) for name in names}
            document["checksum"] = _own_checksum(document)
            (partial / JSON_FILE).write_text(_dumps(document, indent=1), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.written += 1
        self._alike[incident.kind, incident.place] += 1
        return str(target), incident.capsule_note

    def _encode_state(self, training: Training, notes: StepNotes | None) -> tuple[Encoder, dict[str, Any]]:
        """State of model, optimisers, scaler and generators; without notes, what there is now."""
        code, model = Encoder(), training.model
        parameters = training.parameters()
        known = self._versions
        rebuilt = {
            name: p
            for name, p in parameters.items()
            if name in self._rebuilt and p._version == known.get(name, p._version)
        }
        buffers = dict(model.named_buffers()) if notes is None else notes.start.buffers
        content: dict[str, Any] = {
            "model": {
                "classes": {plain_name(path): class_name(type(m)) for path, m in model.named_modules()},
                "hooks": hooks_of(training),
                "parameters": {
                    name: code.encode(p.detach(), f"model/{name}")
                    for name, p in parameters.items()
                    if name not in rebuilt
                },
                "frozen": [name for name, p in parameters.items() if not p.requires_grad],
                "buffers": {
                    plain_name(n): code.encode(b.detach(), f"buffer/{plain_name(n)}") for n, b in buffers.items()
                },
            },
            "optimizers": [
                _encode_optimizer(code, optimizer, number, parameters)
                for number, optimizer in enumerate(training.optimizers)
            ],
            "scaler": _encode_scaler(training.scaler),
        }
        if notes is not None:
            start = notes.start
            content["model"]["training"] = {plain_name(path): mode for path, mode in start.training.items()}
            content["model"]["attributes"] = code.encode(_attributes(model, start), "attributes")
            content["model"]["rebuilt"] = {"names": sorted(rebuilt), "digest": self._digest_of(rebuilt)}
            drawn = {"python": start.python, "numpy": start.numpy, "torch": start.torch, "cuda": start.cuda}
            content["random"] = {name: code.encode(state, f"random/{name}") for name, state in drawn.items()}
            content["state"] = code.encode({} if self._state is None else dict(self._state()), "state")
        return code, content

    def _digest_of(self, rebuilt: Mapping[str, nn.Parameter]) -> str:
        """Of weights that are left out: taken once, as they do not change."""
        key = [(name, p.data_ptr(), p._version) for name, p in rebuilt.items()]
        if self._digest is None or self._digest[0] != key:
            self._digest = (key, weights_digest(rebuilt))
        return self._digest[1]

    def _bits(
        self,
        incident: Incident,
        training: Training,
        notes: StepNotes,
        of_step: Fingerprint | None,
        *,
        updated: bool,
    ) -> dict[str, Any]:
        """What a replay is compared with: the step run again here, from what the capsule holds."""
        same = incident.reproduction.identical and not updated and world_size() == 1
        if same and of_step is not None and of_step.gradients:
            return {"fingerprint": _bits_json(of_step), "fingerprint_of": "the step", "error": None}
        first = {"first_run": _bits_json(of_step)} if of_step is not None else {}
        found = run_again(training, notes) if _runs_alone(incident, training) else None
        if found is None or found.missing:
            own = None if of_step is None or updated else of_step
            if own is not None and world_size() > 1:
                own = Fingerprint(own.losses, {})  # its gradients are the mean over the processes
            bits = None if own is None else _bits_json(own)
            return {"fingerprint": bits, "fingerprint_of": "the step", "error": None, **first}
        return {
            "fingerprint": _bits_json(found.bits),
            "fingerprint_of": "the step, run again in its place",
            "error": found.error,
            **first,
        }


@dataclass(frozen=True)
class Capsule:
    """What :func:`read_capsule` found.

    Attributes:
        folder: where it lies.
        content: of its capsule.json.
        incident: what was found of the step then.
    """

    folder: Path
    content: Mapping[str, Any]
    incident: Incident

    @property
    def step(self) -> int:
        """The step's number."""
        return int(self.content["step"])

    @property
    def settings(self) -> dict[str, Any]:
        """Of the run."""
        found: dict[str, Any] = _lenient(self.content["settings"])
        return found

    @property
    def fingerprint(self) -> Fingerprint | None:
        """What a replay must give; None: the step could not run again when the capsule was written."""
        stored = self.content["fingerprint"]
        return None if stored is None else Fingerprint(stored["losses"], stored["gradients"])

    @property
    def error(self) -> str | None:
        """What the step raises."""
        found: str | None = self.content.get("error")
        return found

    @property
    def after_update(self) -> bool:
        """The weights are those after the update of the step."""
        return bool(self.content["weights"] == "after the update")

    @property
    def lost(self) -> list[str]:
        """What could not be stored, in words."""
        return list(self.content.get("lost", ()))

    def batch(self, device: torch.device | str = "cpu") -> Any:
        """The batch; tensors that were on a device that is not here are on this one.

        Raises:
            UserError: it needs a class whose module is not imported.
        """
        try:
            node = json.loads((self.folder / BATCH_JSON).read_text(encoding="utf-8"))
            return Decoder(_tensors(self.folder / BATCH_FILE), device).decode(node)
        except (UserError, OSError, SafetensorError, ValueError, RecursionError) as error:
            raise UserError(f"{self.folder / BATCH_JSON}: {error}") from error

    def state(self) -> Any:
        """What the run's own ``state`` function returned, such as a scheduler's state_dict."""
        return self.decode(self.content["state"])

    def decode(self, node: Any) -> Any:
        """A value of capsule.json whose tensors lie in the state's file."""
        try:
            return self._decoder.decode(node)
        except (UserError, SafetensorError, RecursionError) as error:
            raise UserError(f"{self.folder / STATE_FILE}: {error}") from error

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(_tensors(self.folder / STATE_FILE))


def read_capsule(folder: Path | str) -> Capsule:
    """Read a capsule and compare its checksums.

    Raises:
        UserError: it is none, is damaged, or is from a newer version.
    """
    folder = Path(folder)
    if folder.name == JSON_FILE:
        folder = folder.parent
    path = folder / JSON_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is no capsule: it has no {JSON_FILE}. Capsules lie in <run>.incidents/, one folder a step."
        )
    again = "Copy it again from where it was written, or take another."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}). {again}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f"{path} is not a capsule of bifusion-diag")
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this bifusion-diag reads up to {FORMAT_VERSION}")
    if content.get("checksum") != _own_checksum(content):
        raise UserError(f"{path} is not as it was written: its checksum differs. {again}")
    lacks = [name for name, kind in _CONTENT.items() if not isinstance(content.get(name), kind)]
    if lacks or set(content["files"]) != {STATE_FILE, BATCH_FILE, BATCH_JSON}:
        raise UserError(f"{path} lacks {', '.join(lacks) or 'some of its files'}: bifusion-diag has not written it")
    for name, stored in content["files"].items():
        try:
            found = _checksum(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error.strerror}). {again}") from error
        if found != stored:
            what = (
                f"has {found['bytes']} bytes, not {stored['bytes']}" if found["bytes"] != stored["bytes"] else "differs"
            )
            raise UserError(f"{folder / name} is not as it was written: it {what}. {again}")
    with _readable_content(path):
        capsule = Capsule(folder, content, Incident.from_dict(_lenient(content["incident"])))
        _ = capsule.fingerprint  # is read late
        return capsule


def restore_capsule(capsule: Capsule, training: Training) -> tuple[Training, StepNotes]:
    """Put weights, buffers, optimisers, scaler, modes and random generators to where they were.

    Args:
        capsule: of the step.
        training: a model as the settings or the user's code give it. Optimisers of torch.optim and a scaler that it
            lacks are made.

    Returns:
        What runs, and the step's notes: ``with notes.again() as batch`` everything is as the step began.

    Raises:
        UserError: the capsule does not fit the model, or the rebuilt weights are not those of the run.
    """
    with _readable_content(capsule.folder / JSON_FILE):
        return _restored(capsule, training)


def _restored(capsule: Capsule, training: Training) -> tuple[Training, StepNotes]:
    model, stored = training.model, capsule.content["model"]
    _restore_weights(capsule, training)
    _restore_buffers(capsule, model)
    modules = {plain_name(path): module for path, module in model.named_modules()}
    for name, mode in stored["training"].items():
        if name in modules:
            modules[name].training = mode
    for name, values in capsule.decode(stored["attributes"]).items():
        if name in modules:
            modules[name].__dict__.update(values)
    frozen = set(stored["frozen"])
    for name, parameter in training.parameters().items():
        parameter.requires_grad_(name not in frozen)
        parameter.grad = None
    optimizers = _restore_optimizers(capsule, training)
    scaler = _restore_scaler(capsule, training)
    batch = capsule.batch(next((p.device for p in model.parameters()), "cpu"))
    _restore_random(capsule)
    return dataclasses.replace(training, optimizers=optimizers, scaler=scaler), StepNotes(model, capsule.step, batch)


@dataclass(frozen=True)
class Outcome:
    """A noted step, run again.

    Attributes:
        bits: digests of losses and, unless it was forward only, gradients.
        losses: by term, and the total.
        grad_norm: L2 norm of all gradients, in float64; None: forward only, or it raised.
        error: what it raised, in words.
        missing: there is no step function.
    """

    bits: Fingerprint
    losses: Mapping[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    error: str | None = None
    missing: bool = False


def run_again(training: Training, notes: StepNotes, *, backward: bool = True) -> Outcome:
    """Run a noted step. Everything is afterwards as it was. Never raises what the step raises."""
    with notes.again() as batch:
        loss = norm = error = None
        try:
            loss = training.loss(batch)
            if backward:
                training.backward(loss)
        except Exception as raised:
            error = _in_words(raised)
        gradients = training.gradients() if backward else {}
        if backward and error is None:
            norm = math.sqrt(sum(float(local_part(g).double().square().sum()) for g in gradients.values()))
        values: dict[str, Tensor | None] = {} if loss is None else {**loss.terms, "(total)": loss.total}
        return Outcome(
            bits=fingerprint(loss, gradients),
            losses={name: float(value.detach()) for name, value in values.items() if value is not None},
            grad_norm=norm,
            error=error,
            missing=error is not None and NO_STEP in error,
        )


def parse_size(text: str | int) -> int:
    """Bytes of "2 GB", "500 MB", "1.5GiB" or a number.

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", str(text))
    if isinstance(text, bool) or found is None or found[2].upper() not in _UNITS:
        raise UserError(f"{text!r} is no size; write it as '2 GB', '500 MB', '1.5 GiB' or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bits."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(f"{name} {digest(weights[name])}".encode())
    return sha.hexdigest()


def hooks_of(training: Training) -> dict[str, list[str]]:
    """Hooks and patched forwards that somebody has put on modules and parameters, by owner: what a model that is built
    again may lack."""
    found: dict[str, list[str]] = {}
    for hook in user_hooks(training):
        found.setdefault(hook.owner, []).append(hook.source)
    return found


def outside_modules(training: Training) -> list[str]:
    """What the step function uses beside the model and is not stored, such as a teacher: modules with weights or
    buffers that no optimiser holds."""
    own = {id(module) for module in training.model.modules()}
    held = {id(p) for optimizer in training.optimizers for group in optimizer.param_groups for p in group["params"]}
    try:
        names = inspect.getclosurevars(inspect.unwrap(training.step))
    except TypeError:  # an object that can be called, or a partial
        return []
    found = []
    for name, value in {**names.globals, **names.nonlocals}.items():
        if isinstance(value, nn.Module) and own.isdisjoint(map(id, value.modules())):
            stored = held.issuperset(map(id, (*value.parameters(), *value.buffers())))
            found += [] if stored else [f"{name} ({type(value).__name__})"]
    return found


def _attributes(model: nn.Module, start: State) -> dict[str, dict[str, Any]]:
    """What modules hold beside weights and buffers: numbers, words, lists, dictionaries and tensors. Plain ones are as
    the step began. PyTorch's own layers too: a rate of dropout may follow a schedule."""
    held = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers()) if x.numel()}
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        values = {
            name: copy.deepcopy(value)
            for name, value in vars(module).items()
            if name not in OF_ANY_MODULE and _simple(value, held)
        }
        noted = start.attributes.get(path, {})
        values |= {name: copy.deepcopy(value) for name, value in noted.items() if _simple(value, held)}
        if values:
            found[plain_name(path)] = values
    return found


def _simple(value: Any, held: set[int]) -> bool:
    """Whether a value can be put into a model that was built again: nothing that is an object of its own, and no tensor
    that is part of the model."""
    if value is None or type(value) in (bool, int, float, str):
        return True
    if type(value) is Tensor:
        strided = value.layout == torch.strided and not value.requires_grad and not value.is_meta
        return strided and value.untyped_storage().data_ptr() not in held
    if type(value) is np.ndarray or isinstance(value, np.generic):
        return not value.dtype.hasobject and not value.dtype.fields
    if type(value) in (dict, OrderedDict, Counter):
        return all(type(key) in (str, int) and _simple(entry, held) for key, entry in value.items())
    return type(value) in (list, tuple, set, frozenset, deque) and all(_simple(entry, held) for entry in value)


def _encode_optimizer(
    code: Encoder, optimizer: Optimizer, number: int, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    """Its class, settings of its groups, and state by the parameter's name."""
    path = f"optimizer/{number}"
    known = {id(parameter): name for name, parameter in parameters.items()}
    groups, state, outside = [], {}, {}
    for g, group in enumerate(optimizer.param_groups):
        names = []
        for i, parameter in enumerate(group["params"]):
            name = known.get(id(parameter))
            if name is None:  # of a criterion that is no part of the model, say
                name = f"(not in the model) group {g}, parameter {i}"
                outside[name] = code.encode(parameter.detach(), f"{path}/{name}")
            names.append(name)
            if parameter in optimizer.state:
                state[name] = code.encode(dict(optimizer.state[parameter]), f"{path}/{name}")
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({"settings": code.encode(settings, f"{path}/group {g}"), "parameters": names})
    return {"class": class_name(type(optimizer)), "groups": groups, "state": state, "outside": outside}


def _encode_scaler(scaler: GradScaler | None) -> dict[str, Any] | None:
    if scaler is None or not scaler.is_enabled():
        return None
    return {"device": scaler._device, "state": scaler.state_dict(), "used": scaler._scale is not None}


@contextmanager
def _readable_content(path: Path) -> Iterator[None]:
    """Inside, what is read of a file of ours with a right checksum. What does not fit is somebody else's, or another
    version's."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} holds what this bifusion-diag cannot read ({_in_words(error)})") from error


def _restore_weights(capsule: Capsule, training: Training) -> None:
    stored = capsule.content["model"]
    parameters = training.parameters()
    rebuilt = stored["rebuilt"]
    wanted, found = {*stored["parameters"], *rebuilt["names"]}, set(parameters)
    if wanted != found:
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        words = [f"it lacks {_few(missing)}" if missing else "", f"it also has {_few(extra)}" if extra else ""]
        raise UserError(
            f"{capsule.folder} does not fit the model that was built: {' and '.join(filter(None, words))}. Build it as "
            "the run did, with the settings that the capsule holds."
        )
    with torch.no_grad():
        for name, node in stored["parameters"].items():
            _put(parameters[name], capsule.decode(node), f"{capsule.folder}: parameter {name}")
    if rebuilt["names"]:
        now = weights_digest({name: parameters[name] for name in rebuilt["names"]})
        if now != rebuilt["digest"]:
            raise UserError(
                f"{capsule.folder}: {len(rebuilt['names'])} frozen weights are not in it, and those that were built "
                f"here are others ({rebuilt['names'][0]} ...). Random CLIP weights depend on the versions of torch and "
                f"open_clip: replay with {_versions(capsule)}."
            )


def _put(parameter: Tensor, value: Tensor, where: str) -> None:
    """Give a parameter these very bits, in the same layout of memory."""
    if is_lazy(parameter):
        raise UserError(f"{where} has no shape yet: run a forward in the function that builds the model")
    if parameter.shape != value.shape:
        raise UserError(f"{where} has shape {tuple(value.shape)}, the model's {tuple(parameter.shape)}")
    if parameter.dtype == value.dtype and parameter.stride() == value.stride():
        parameter.copy_(value)
    else:
        parameter.data = value.to(parameter.device)


def _restore_buffers(capsule: Capsule, model: nn.Module) -> None:
    paths = {plain_name(path): path for path, _ in model.named_modules()}
    for name, node in capsule.content["model"]["buffers"].items():
        owner, _, own = name.rpartition(".")
        if (owner or ROOT) not in paths and owner:
            raise UserError(f"{capsule.folder} does not fit the model that was built: it has no module {owner}")
        module = model.get_submodule(paths[owner]) if owner else model
        value, old = capsule.decode(node), module._buffers.get(own)
        if old is not None and (old.shape, old.dtype, old.stride()) == (value.shape, value.dtype, value.stride()):
            old.copy_(value)
        else:  # one that the forward makes or changes in size
            device = old.device if old is not None else next((p.device for p in model.parameters()), value.device)
            module._buffers[own] = value.to(device)


def _restore_optimizers(capsule: Capsule, training: Training) -> tuple[Optimizer, ...]:
    stored = capsule.content["optimizers"]
    optimizers = list(training.optimizers)
    parameters = training.parameters()
    if optimizers and len(optimizers) != len(stored):
        raise UserError(f"{capsule.folder} holds {len(stored)} optimisers, and {len(optimizers)} were built")
    if not optimizers:
        optimizers = [_made(capsule, one, parameters) for one in stored]
    for optimizer, one in zip(optimizers, stored, strict=True):
        if class_name(type(optimizer)).split(":")[1] != one["class"].split(":")[1]:
            raise UserError(
                f"{capsule.folder} holds the state of {one['class']}; {class_name(type(optimizer))} was built"
            )
        outside = [p for group in optimizer.param_groups for p in group["params"]]
        known = {id(parameter) for parameter in parameters.values()}
        outside = [p for p in outside if id(p) not in known]
        if len(outside) != len(one["outside"]):
            raise UserError(
                f"{capsule.folder}: an optimiser held {len(one['outside'])} parameters that are not in the model, and "
                f"{len(outside)} here. Build it as the run did."
            )
        named: dict[str, Tensor] = dict(parameters)
        with torch.no_grad():
            for (name, node), parameter in zip(one["outside"].items(), outside, strict=True):
                _put(parameter, capsule.decode(node), f"{capsule.folder}: {name}")
                named[name] = parameter
        optimizer.param_groups[:] = [
            capsule.decode(group["settings"]) | {"params": [named[name] for name in group["parameters"]]}
            for group in one["groups"]
        ]
        optimizer.state.clear()
        for name, node in one["state"].items():
            device = named[name].device
            state = capsule.decode(node)
            optimizer.state[named[name]] = {key: _placed(key, value, device) for key, value in state.items()}
    return tuple(optimizers)


def _made(capsule: Capsule, stored: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """An optimiser that the user's code has not built, if it is one of PyTorch's."""
    cls = find_class(stored["class"]) if stored["class"].startswith("torch.optim.") else None
    if cls is None or not issubclass(cls, Optimizer) or stored["outside"]:
        raise UserError(
            f"{capsule.folder} holds the state of {stored['class']}: return the optimiser too from the function that "
            "builds the model"
        )
    groups = [{"params": [parameters[name] for name in group["parameters"]]} for group in stored["groups"]]
    made: Optimizer = cls(groups, lr=1.0)  # type: ignore[call-arg] # all of PyTorch's take it
    return made


def _placed(key: str, value: Any, device: torch.device) -> Any:
    moves = isinstance(value, Tensor) and key != "step"  # the step count stays on the CPU
    return value.to(device) if moves else value


def _restore_scaler(capsule: Capsule, training: Training) -> GradScaler | None:
    stored = capsule.content["scaler"]
    if stored is None:
        return None
    scaler = training.scaler if training.scaler is not None else GradScaler(stored["device"])
    device = next((p.device for p in training.model.parameters()), torch.device("cpu"))
    if stored["used"]:
        scaler._device = device.type
        scaler._lazy_init_scale_growth_tracker(device)
    scaler.load_state_dict(stored["state"])
    return scaler


def _restore_random(capsule: Capsule) -> None:
    states = {name: capsule.decode(node) for name, node in capsule.content["random"].items()}
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for number, state in enumerate(states["cuda"]):
        if torch.cuda.is_available() and number < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, number)


def _tensors(path: Path) -> Callable[[str], Tensor]:
    """Tensors of a file by name, read when they are wanted."""
    opened: list[Any] = []

    def read(name: str) -> Tensor:
        if not opened:
            opened.append(safe_open(path, framework="pt"))
        found: Tensor = opened[0].get_tensor(name)
        return found

    return read


def _bits_json(bits: Fingerprint) -> dict[str, Any]:
    return {"losses": dict(bits.losses), "gradients": dict(bits.gradients)}


def _checksum(path: Path) -> dict[str, Any]:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            sha.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": sha.hexdigest()}


def _own_checksum(document: Mapping[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=True, indent=indent)


def plain_json(value: Any) -> Any:
    """Plain data as strict JSON: NaN and ±Inf as strings, as in the record."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_json(entry) for entry in value]
    if isinstance(value, (np.generic, Tensor)):
        value = value.tolist() if value.ndim else value.item()
        return plain_json(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _lenient(value: Any) -> Any:
    """The inverse of :func:`plain_json`, but for what JSON does not tell apart."""
    if isinstance(value, dict):
        return {key: _lenient(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_lenient(entry) for entry in value]
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def _runs_alone(incident: Incident, training: Training) -> bool:
    """Whether a process can run the step without the others: where it would wait for them, nothing is run."""
    if world_size() == 1:
        return True
    synchronous = any(isinstance(module, nn.SyncBatchNorm) for module in training.model.modules())
    return incident.reproduction.identical is not None and not synchronous


def _in_words(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _note(size: int, lost: list[str], updated: bool) -> str:
    parts = [_readable(size)]
    if updated:
        parts.append("with the weights after the update, as the alarm came after it")
    return "; ".join([*parts, *lost])


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _versions(capsule: Capsule) -> str:
    packages = capsule.content["environment"]["packages"]
    return ", ".join(f"{name} {packages[name]}" for name in ("torch", "open_clip_torch") if name in packages)
