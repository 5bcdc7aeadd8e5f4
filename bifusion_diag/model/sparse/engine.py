"""Choice of the sparse engine."""

from __future__ import annotations

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.model.sparse.minkowski import MinkowskiEngine
from bifusion_diag.model.sparse.native import NativeEngine
from bifusion_diag.model.sparse.tensor import Engine

ENGINES = ("auto", "native", "minkowski")


def make_engine(name: str = "auto") -> Engine:
    """The engine of that name; ``auto`` is the built-in one. Its ``name`` and ``version`` belong into the run record.

    Raises:
        UserError: unknown name, or MinkowskiEngine is asked for and not installed.
    """
    if name in ("auto", "native"):
        return NativeEngine()
    if name == "minkowski":
        return MinkowskiEngine()
    raise UserError(f"sparse_engine: unknown engine {name!r}.{near_matches(name, ENGINES)}")
