"""A capsule, run again in another process: to the bit, and with instruments."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from bifusion_diag.errors import UserError
from bifusion_diag.probes import Monitor, Probe
from bifusion_diag.probes.base import schedule
from bifusion_diag.probes.catalogue import make_probes
from bifusion_diag.probes.modules import bare_model, plain_name
from bifusion_diag.record import collect_environment
from bifusion_diag.replay.capsules.capsule import Capsule, Outcome, hooks_of, restore_capsule, run_again
from bifusion_diag.replay.capsules.machine import as_on, machine
from bifusion_diag.replay.capsules.tree import class_name
from bifusion_diag.replay.incident import ModuleTrace
from bifusion_diag.replay.notes import StepNotes
from bifusion_diag.replay.step import Fingerprint, Training

_PLURAL = {"loss": "losses", "gradient": "gradients"}
_SWITCHES = ("deterministic", "mkldnn", "matmul_precision", "default_dtype", "flush_denormal", "cudnn", "autocast")


@dataclass(frozen=True)
class Replay:
    """What a capsule's step did here.

    Attributes:
        step: its number.
        identical: every loss and gradient that was compared is the same, bit for bit. None: nothing to compare with.
        compared: what was compared, in words.
        difference: the first that differs, in words.
        reasons: why it may differ: versions, machine, model; whether it is the same twice here.
        losses: by term, and "(total)".
        grad_norm: L2 norm of all gradients; None: forward only, or the step raised.
        error: what the step raised, in words.
        trace: every call of a module in order of execution; empty unless asked for.
        readings: numbers of the probes; None: missing.
        lost: what the capsule does not hold, in words.
        seconds: that the plain step took.
    """

    step: int
    identical: bool | None
    compared: str
    difference: str = ""
    reasons: tuple[str, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    grad_norm: float | None = None
    error: str | None = None
    trace: tuple[ModuleTrace, ...] = ()
    readings: Mapping[str, float | None] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers may be NaN."""
        return dataclasses.asdict(self)


def training_of(entry: str, capsule: Capsule) -> Training:
    """What a user's function builds.

    Args:
        entry: "module:function" or "file.py:function", as seen from the current folder. The function is given the
            run's settings, and if it has a parameter ``state`` what the recorder's ``state`` function returned. It
            returns a Training, (model, step) or (model, step, optimizer).
        capsule: of the step.

    Raises:
        UserError: there is no such function, it raised, or it returned something else.
    """
    path, colon, name = entry.rpartition(":")
    if not colon or not path or not name:
        raise UserError(f"--entry {entry}: give module:function or file.py:function")
    function = getattr(_imported(entry, path), name, None)
    if not callable(function):
        raise UserError(f"--entry {entry}: {path} has no function {name!r}")
    try:
        takes_state = "state" in inspect.signature(function).parameters
        built = function(capsule.settings, **({"state": capsule.state()} if takes_state else {}))
    except UserError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
        raise UserError(f"--entry {entry}: the function raised {what}; it is called with the run's settings") from error
    if isinstance(built, Training):
        return dataclasses.replace(built, model=bare_model(built.model))
    if isinstance(built, tuple) and len(built) in (2, 3) and isinstance(built[0], nn.Module) and callable(built[1]):
        optimizers = () if len(built) == 2 else built[2]
        optimizers = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers or ())
        return Training(bare_model(built[0]), built[1], optimizers)
    raise UserError(
        f"--entry {entry}: the function returned a {type(built).__name__}; it must return (model, step), "
        "(model, step, optimizer) or a bifusion_diag.replay.Training; step is the function from a batch to its loss"
    )


def _imported(entry: str, path: str) -> ModuleType:
    """The module of that name, or of that file."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does
    try:
        if not path.endswith(".py"):
            return importlib.import_module(path)
        file, name = Path(path), Path(path).stem
        if not file.is_file():
            raise UserError(f"--entry {entry}: there is no file {path}")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.path.insert(0, str(file.resolve().parent))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # so that the classes of a batch are found
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--entry {entry}: {path} cannot be imported ({type(error).__name__}: {error})") from error


def replay_capsule(
    capsule: Capsule,
    training: Training,
    *,
    probes: Sequence[str | Probe] = (),
    trace: bool = False,
    backward: bool = True,
) -> Replay:
    """Run a capsule's step, and compare every loss and gradient with what they were. Threads and PyTorch's switches are
    meanwhile those of the run.

    Args:
        capsule: of the step.
        training: a model as the settings or the user's code give it; its state becomes the capsule's.
        probes: names of the catalogue, or probes, that measure the step.
        trace: list every call of a module with the ranges of its inputs, outputs and gradients.
        backward: False: forward and losses only.

    Raises:
        UserError: the capsule does not fit the model; an unknown probe.
    """
    instruments = make_probes(list(probes)) if probes else []
    with as_on(capsule.content["environment"]):
        training, notes = restore_capsule(capsule, training)
        began = time.perf_counter()
        found = run_again(training, notes, backward=backward)
        seconds = time.perf_counter() - began
        identical, compared, difference = compare(capsule, found, backward=backward)
        reasons: list[str] = []
        if identical is False:
            reasons = why_it_may_differ(capsule, training)
            second = run_again(training, notes, backward=backward)
            same = second.bits == found.bits and second.error == found.error
            reasons.append(
                "run twice here, it gives the same bits both times"
                if same
                else "run twice here, it differs from itself: some operation of the step is not deterministic"
            )
        return Replay(
            step=capsule.step,
            identical=identical,
            compared=compared,
            difference=difference,
            reasons=tuple(reasons),
            losses=found.losses,
            grad_norm=found.grad_norm,
            error=found.error,
            trace=_trace(training, notes, backward=backward) if trace else (),
            readings=_readings(training, notes, instruments, backward=backward) if instruments else {},
            lost=tuple(capsule.lost),
            seconds=seconds,
        )


def compare(capsule: Capsule, found: Outcome, *, backward: bool) -> tuple[bool | None, str, str]:
    """Whether a run of the step gave what the capsule says, what was compared, and the first difference."""
    wanted = capsule.fingerprint
    if wanted is None:
        return None, "nothing: the step could not be run again when the capsule was written", ""
    if not backward:
        wanted = Fingerprint(wanted.losses, {})
    counts = {"loss": len(wanted.losses), "gradient": len(wanted.gradients)}
    parts = [f"{n} {word if n == 1 else _PLURAL[word]}" for word, n in counts.items() if n]
    parts += [f"the error {capsule.error!r}"] if capsule.error else []
    compared = " and ".join(parts)
    if found.error != capsule.error and (backward or found.error):
        return False, compared, f"the step {_raising(found.error)}; then it {_raising(capsule.error)}"
    if not parts:
        return None, "nothing: no loss and no gradient is in the capsule", ""
    difference = wanted.difference(found.bits)
    missing = "gradients" if wanted.gradients and not found.bits.gradients else ""
    missing = missing or ("losses" if wanted.losses and not found.bits.losses else "")
    return not (difference or missing), compared, difference or (f"there are no {missing} here" if missing else "")


def why_it_may_differ(capsule: Capsule, training: Training) -> list[str]:
    """What is not as it was when the capsule was written, the most telling first."""
    then, now = capsule.content["environment"], collect_environment() | machine(training.model)
    stored = capsule.content["model"]
    reasons = [f"not in the capsule: {entry}" for entry in capsule.lost]
    hooks = hooks_of(training)
    for name, functions in stored["hooks"].items():
        gone = [function for function in functions if function not in hooks.get(name, [])]
        if gone:
            reasons.append(f"module {name} had {', '.join(gone)} on it, which the model built here has not")
    classes = {plain_name(path): class_name(type(module)) for path, module in training.model.named_modules()}
    changed = [name for name, kind in classes.items() if stored["classes"].get(name, kind) != kind]
    reasons += [f"module {name} is a {classes[name]} here and was a {stored['classes'][name]}" for name in changed[:3]]
    for what in ("device", "machine", "cuda", "python", *_SWITCHES):
        if then.get(what) != now.get(what):
            reasons.append(f"{what}: {then.get(what)} then, {now.get(what)} here")
    packages = {**then["packages"], **now["packages"]}
    for name in packages:
        before, here = then["packages"].get(name), now["packages"].get(name)
        if before != here:
            reasons.append(f"{name}: {before or 'not installed'} then, {here or 'not installed'} here")
    if then.get("git") != now.get("git") and then.get("git"):
        reasons.append(f"git: {_commit(then['git'])} then, {_commit(now.get('git'))} here")
    if then["threads"] != now["threads"]:
        reasons.append(f"threads: {then['threads']} then, {now['threads']} here")
    if then["threads"] > 1 and _uses_minkowski(training.model):
        reasons.append("MinkowskiEngine's backward is not deterministic with several threads: train with one")
    if then["device_type"] == "cuda" and not then["deterministic"]:
        reasons.append("the run did not ask for deterministic kernels: torch.use_deterministic_algorithms(True)")
    if capsule.content["ranks"] > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in training.model.modules()):
        reasons.append("SyncBatchNorm took its statistics from all processes, and here there is one")
    reproduction = capsule.incident.reproduction
    if reproduction.identical is False:
        reasons.append(f"it was not identical when it was run again in its place: {reproduction.difference}")
    return reasons


def _readings(
    training: Training, notes: StepNotes, probes: Sequence[Probe], *, backward: bool
) -> dict[str, float | None]:
    """What probes measure in the step. Nothing is updated."""
    for probe in probes:
        probe.every = schedule(1)
    with Monitor(training.model, training.optimizers, probes, scaler=training.scaler) as monitor:
        with notes.again() as batch, monitor.step(batch):
            try:
                loss = training.loss(batch)
                if loss.terms:
                    monitor.losses(loss.terms, loss.weights, loss.total)
                if backward:
                    training.backward(loss)
            except UserError:
                raise
            except Exception:
                pass  # the step's own error, which is told; what was measured up to it stands
        monitor.end_step()
        return monitor.latest()


def _trace(training: Training, notes: StepNotes, *, backward: bool) -> tuple[ModuleTrace, ...]:
    from bifusion_diag.replay.examine.backward_trace import trace_backward
    from bifusion_diag.replay.examine.forward_trace import trace_forward

    if backward:
        return tuple(trace_backward(training, notes).modules)
    return tuple(trace_forward(training, notes).modules)


def _raising(error: str | None) -> str:
    return f"raised {error}" if error else "raised nothing"


def _commit(git: Mapping[str, Any] | None) -> str:
    return "no commit" if git is None else git["commit"][:10] + (" with changes" if git["modified"] else "")


def _uses_minkowski(model: nn.Module) -> bool:
    return any("inkowski" in f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules())
