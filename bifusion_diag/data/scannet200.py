"""The 200 classes of the ScanNet200 benchmark, in the order of ESAM's single-view configuration (wall 0, floor 1)."""

from __future__ import annotations

from importlib import resources

from bifusion_diag.errors import UserError, near_matches

#: Class names by id.
CLASS_NAMES: tuple[str, ...] = tuple(
    resources.files("bifusion_diag.data").joinpath("scannet200.txt").read_text(encoding="utf-8").splitlines()
)

#: Classes that are "stuff" in ESAM: labelled, but with no instances (wall, floor).
STUFF_CLASSES: tuple[int, ...] = (0, 1)

_IDS = {name: number for number, name in enumerate(CLASS_NAMES)}


def class_id(name: str) -> int:
    """The id of a class, 0..199.

    Raises:
        UserError: there is no such class; near matches are named.
    """
    if name not in _IDS:
        raise UserError(f"'{name}' is not a ScanNet200 class.{near_matches(name, CLASS_NAMES)}")
    return _IDS[name]
