"""What became of every tensor of a file and of every tensor of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from bifusion_diag.model.weight_files import listed

#: How many names of each kind go into the record.
RECORDED_NAMES = 5


class MisShaped(NamedTuple):
    """A tensor that is in both, in different shapes."""

    name: str
    in_file: tuple[int, ...]
    in_model: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.in_file} for {self.in_model}"


@dataclass(frozen=True)
class LoadReport:
    """Outcome of :func:`~bifusion_diag.model.checkpoints.load_weights`. Names are the model's, but for ``unexpected``.

    ``loaded``, ``missing``, ``mis_shaped``, ``fresh`` and ``frozen`` together are the model's state dict, each name
    once.
    """

    file: str
    digest: str  # SHA-256 of the file
    layout: str
    loaded: tuple[str, ...]
    parameters: int  # numbers that were loaded, without the buffers'
    mis_shaped: tuple[MisShaped, ...]  # not loaded
    missing: tuple[str, ...]  # such files have them, this one has not
    unexpected: tuple[str, ...]  # in the file, not in the model
    fresh: tuple[str, ...]  # no file of this layout has them: they keep their initial values
    frozen: tuple[str, ...]  # frozen for good: they come from the settings, never from here
    refused: tuple[str, ...]  # of the frozen ones, those that the file has with other values
    nonfinite: tuple[str, ...]  # of the loaded ones, those with NaN or infinity in them

    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Names by outcome, in the order of a report; mis-shaped ones with both shapes."""
        return {
            "loaded": self.loaded,
            "not finite": self.nonfinite,
            "mis-shaped": tuple(map(str, self.mis_shaped)),
            "missing": self.missing,
            "unexpected": self.unexpected,
            "stays fresh": self.fresh,
            "frozen": self.frozen,
            "frozen, other in the file": self.refused,
        }

    def summary(self) -> str:
        """Counts, and a line with names for each kind that the user may not expect."""
        kinds = self.kinds()
        counts = [f"{len(names)} {kind}" for kind, names in kinds.items() if names]
        first = f"{self.file} ({self.layout}): {self.parameters:,} parameters; tensors: " + ", ".join(counts)
        alarming = ("not finite", "mis-shaped", "missing")
        return "\n".join([first, *(f"  {kind}: {listed(kinds[kind], 3)}" for kind in alarming if kinds[kind])])

    def provenance(self) -> dict[str, Any]:
        """For the run record: what file this was, counts, and the first names of what was not loaded."""
        kinds = {kind: names for kind, names in self.kinds().items() if kind != "loaded"}
        return {
            "file": self.file,
            "sha256": self.digest,
            "kind": self.layout,
            "parameters": self.parameters,
            "tensors": len(self.loaded),
            **{kind: len(names) for kind, names in kinds.items()},
            "first_names": {kind: list(names[:RECORDED_NAMES]) for kind, names in kinds.items() if names},
        }
