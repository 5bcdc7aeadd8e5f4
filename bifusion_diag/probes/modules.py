"""Which modules of a model are measured, and under which names."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bifusion_diag.errors import UserError
from bifusion_diag.probes.base import ROOT

#: Wrappers that stand for the module inside them: of torch.compile, checkpoint_wrapper, FSDP.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def bare_model(model: nn.Module) -> nn.Module:
    """The model without DistributedDataParallel around it.

    Raises:
        UserError: it is replicated by DataParallel, whose replicas live for one forward and cannot be watched; or it is
            TorchScript; or it is no module.
    """
    if isinstance(model, nn.DataParallel):
        raise UserError(
            "the model is wrapped in DataParallel, which makes new replicas in every forward that no hook can follow; "
            "use DistributedDataParallel, or give the Monitor one process's own model"
        )
    while isinstance(model, DistributedDataParallel):
        model = model.module
    if not isinstance(model, nn.Module):
        raise UserError(f"a {type(model).__name__} was given as the model; give a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("the model is TorchScript, which takes no hooks; give the Monitor the module it was made of")
    return model


def measured_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that get hooks, by name; a module reached by several names has the first of them.

    What torch.compile has compiled, also in place (``module.compile()``), is measured at its boundary: a hook on a
    module inside would be compiled with it. TorchScript takes no hooks. Names are those of the uncompiled, unwrapped
    model, so that runs with and without are comparable.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, path: tuple[str, ...]) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, torch.jit.ScriptModule):
            return
        found.setdefault(".".join(path) or ROOT, module)
        if is_compiled(module):
            return
        for name, child in module.named_children():
            walk(child, path if name in WRAPPERS else (*path, name))

    walk(model, ())
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile returned this module, or it was compiled in place."""
    if module._compiled_call_impl is not None:
        return True
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # not imported: nothing can have been compiled
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def plain_name(path: str) -> str:
    """A module's or parameter's name without the wrappers in it."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS) or ROOT
