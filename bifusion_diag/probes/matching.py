"""Which queries were matched with objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bifusion_diag.probes.base import Call, Schedule, matches
from bifusion_diag.probes.fields import FieldProbe, Key, get_field


class MatchingProbe(FieldProbe):
    """Reads ``matches`` of an output, one entry a scene, and ``objects``, what there was to match with; or what a
    matcher module returns: modules whose class is named ``*Matcher`` (DETR's, Mask2Former's, Mask3D's, Transformers').

    An entry is the pair (query indices, object indices), the query indices alone, or their number. A tuple of two index
    tensors is one scene's pair. An entry of objects is their number, or a tensor or list of as many.

    What is counted is one call, and calls are put together as the keys say: our criterion tells the last layer only; a
    matcher module of DETR's kind is called once for every decoder layer, so that scenes and objects count in each.

    Args:
        objects: where a matcher's arguments hold the objects: the position or name of an argument, and then of a field
            of it or of each of its entries. "1.labels" fits DETR's kind; where it is not there, objects are not known.
        queries: where the arguments hold all queries, an entry a scene, likewise; the first that is there counts.
        modules: name patterns of the modules that may be watched; with "*", matchers and outputs with the fields.
        fields, name, every: as for every FieldProbe.
    """

    prefix = "matching"
    TABLE: ClassVar[dict[str, Key]] = {
        "queries_mean": Key("mean", "queries matched in a scene, mean over the scenes; a query counts once"),
        "queries_min": Key("min", "queries matched in the scene with the fewest"),
        "empty": Key("sum", "scenes without a match, of those that have objects (of all where objects are not known)"),
        "objects": Key("sum", "objects of all scenes; not recorded where they are not known"),
        "unmatched": Key("sum", "objects that no query is matched with; not recorded where they are not known"),
        "queries": Key("sum", "queries of all scenes, matched or not; not recorded where they are not known"),
    }
    FIELDS = ("matches", "objects")

    def __init__(
        self,
        *,
        objects: str = "1.labels",
        queries: Sequence[str] = ("0.query_superpoints", "0.pred_logits"),
        modules: Sequence[str] = ("*",),
        fields: Mapping[str, str | int] | None = None,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(modules=modules, fields=fields, name=name, every=every)
        self.objects = objects
        self.queries = tuple(queries)

    def watches(self, name: str, module: nn.Module) -> bool:
        if self.places:
            return super().watches(name, module)
        return matches(name, self.modules) and (self.modules != ("*",) or _is_matcher(module))

    def reads(self, output: Any) -> bool:
        return self.has(output, ("matches",))

    def seen(self, call: Call) -> None:
        if self.has(call.output, ("matches",)):
            if (fields := self.fields_of(call, ("matches",))) is not None:
                self._count(fields[0], get_field(call.output, self.places.get("objects", "objects")))
                self._count_queries(call)
        elif not self.places and (_is_matcher(call.module) or self.modules != ("*",)):
            self._count(call.output, self._argument(call, self.objects))
            self._count_queries(call)

    def _count_queries(self, call: Call) -> None:
        """All queries: of entries (Q_i, ...) a scene, or of one tensor (B, Q, ...)."""
        for place in self.queries:
            found = self._argument(call, place)
            if isinstance(found, list) and len(found) == 1 and isinstance(found[0], (list, tuple)):
                found = found[0]  # the entries of all scenes
            if isinstance(found, (list, tuple)) and found and all(isinstance(e, Tensor) and e.dim() for e in found):
                count = sum(len(entry) * entry.shape[1] if entry.dim() > 2 else len(entry) for entry in found)
                self.record(("queries",), [torch.full((), float(count), device=found[0].device)])
                return

    def _argument(self, call: Call, place: str) -> Any:
        """A part of what the module was called with."""
        first, _, rest = place.partition(".")
        given = get_field(call.inputs, int(first)) if first.isdigit() else call.keywords.get(first)
        if given is None and first.isdigit():  # called with keywords
            position = int(first) - len(call.inputs)
            given = list(call.keywords.values())[position] if 0 <= position < len(call.keywords) else None
        if not rest:
            return given
        whole = get_field(given, rest)
        if whole is not None:  # a matcher of one scene
            return [whole]
        found = [get_field(entry, rest) for entry in given] if isinstance(given, (list, tuple)) else []
        return None if any(entry is None for entry in found) else found

    def _count(self, matches: Any, objects: Any) -> None:
        scenes = _scenes(matches)
        if not scenes:
            return
        pairs = [_pair(scene) for scene in scenes]
        device = next((part.device for pair in pairs for part in pair if isinstance(part, Tensor)), torch.device("cpu"))
        queries = torch.stack([_number(pair[0], device) for pair in pairs])
        keys = list(self.TABLE)
        values = [queries.mean(), queries.amin()]
        if not isinstance(objects, (Tensor, list, tuple)) or len(objects) != len(scenes):
            self.record(tuple(keys[:3]), [*values, (queries == 0).sum()])
            return
        there = torch.stack([_number(_size(entry), device) for entry in objects])
        values += [((queries == 0) & (there > 0)).sum(), there.sum()]
        partners = [pair[1] for pair in pairs if pair[1] is not None]
        if len(partners) < len(pairs):
            self.record(tuple(keys[:4]), values)
            return
        found = torch.stack([_number(partner, device) for partner in partners])
        self.record(tuple(keys[:5]), [*values, (there - found).sum()])


def _is_matcher(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Matcher")


def _scenes(value: Any) -> list[Any]:
    """One entry a scene: of a tuple that is one scene's pair, of a list, or of numbers (B,)."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(p, Tensor) and p.dim() == 1 for p in value):
        return [value]
    if isinstance(value, Tensor):
        return list(value.detach().unbind()) if value.dim() == 1 else []
    return list(value) if isinstance(value, (list, tuple)) else []


def _pair(scene: Any) -> tuple[Any, Any]:
    """Indices of the matched queries, or their number, and of the objects, None where only queries are told."""
    if isinstance(scene, (tuple, list)) and len(scene) == 2 and not isinstance(scene[0], int):
        queries, objects = (torch.as_tensor(part).detach() for part in scene)
        return queries, objects
    return scene, None


def _size(entry: Any) -> Any:
    """How many objects: a number, or a tensor or list of as many."""
    if isinstance(entry, (int, float)) or (isinstance(entry, Tensor) and not entry.dim()):
        return entry
    return len(entry)


def _number(part: Any, device: torch.device) -> Tensor:
    """How many different indices, () float64; a number stands for itself."""
    if isinstance(part, Tensor) and part.dim():
        ordered = part.detach().sort().values
        return (ordered[1:] != ordered[:-1]).sum().double() + min(1, len(ordered))
    if isinstance(part, Tensor):
        return part.detach().double()
    return torch.full((), float(part if isinstance(part, (int, float)) else len(set(part))), device=device).double()
