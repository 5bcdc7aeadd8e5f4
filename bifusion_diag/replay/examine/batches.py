"""Batches of any kind, cut by samples: which of their tensors and lists hold one entry a sample, and what a sample is
called.

A batch may be a tensor, a mapping, a sequence, a dataclass, a named tuple or a plain object, nested in any way. It may
hold one entry a sample (images (B, 3, H, W), a list of B targets), rows of all samples one after another with an index
or offsets (point clouds: ``scene_index``, ``batch``, ``offset``), know how to be cut itself (``batch_size`` and
``select``), or be a list of such batches, as gradient accumulation takes them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bifusion_diag.errors import UserError

Split = Callable[[Any], Sequence[Any]]  # batch → one batch a sample, such as the step function takes
Names = Callable[[Any], Sequence[str]]  # batch → what each sample is called

ROW_INDEX = ("scene_index", "batch_index", "batch_idx", "batch_indices", "batch")  # (N,) sample of each row
OFFSETS = ("offset", "offsets")  # (B,) row after each sample's last
NAME_FIELDS = (
    *("names", "name", "paths", "path", "files", "file", "filenames", "filename", "file_names", "file_name"),
    *("image_paths", "img_paths", "image_path", "img_path", "scenes", "scene", "scene_name", "scene_names"),
    *("image_ids", "image_id", "ids", "id", "sample_id", "uid", "key", "keys", "index", "indices", "idx"),
)
LONGEST = 60  # characters of a text that stands for a name
NOTE_FIELDS = ("notes", "note", "flaws")


class Rows(NamedTuple):
    """Rows of all samples one after another."""

    ids: Tensor  # (N,) int64: which sample each is of
    field: str  # that says so
    offsets: bool  # it holds offsets, not the index


@dataclass(frozen=True)
class Cut:
    """How one batch is cut.

    Attributes:
        size: samples.
        pick: samples' numbers → a batch of these in this order, of its own tensors. A number may be there twice.
    """

    size: int
    pick: Callable[[Sequence[int]], Any]


def cut(batch: Any, split: Split | None = None) -> Cut:
    """Learn how a batch is cut.

    Args:
        batch: which is not changed.
        split: the user's own; what it returns is put together again by joining tensors along their first dimension.

    Raises:
        UserError: nothing in it tells its samples apart.
    """
    if split is not None:
        pieces = list(split(batch))
        if not pieces:
            raise UserError("split(batch) returned no sample; it must return one batch a sample")
        return Cut(len(pieces), lambda chosen: _joined([pieces[i] for i in chosen]))
    parts = _accumulated(batch)
    if parts is not None:
        return _cut_accumulated(batch, parts)
    size = batch_size(batch)
    if size is None:
        raise UserError(
            f"samples cannot be told apart in a batch of type {type(batch).__name__}: give FlightRecorder(split=...), "
            "a function that returns one batch a sample"
        )
    return Cut(size, lambda chosen: _picked(batch, list(chosen), size))


def batch_size(batch: Any) -> int | None:
    """Samples in a batch: what most of its tensors and lists have one entry for; None where nothing has entries."""
    if _cuts_itself(batch):
        return int(batch.batch_size)
    rows = _rows(batch)
    if rows is not None:
        return int(rows.ids.max()) + 1
    votes = list(_votes(batch))
    counted = Counter(votes)
    return max(counted, key=lambda size: (counted[size], -votes.index(size))) if votes else None


def sample_names(batch: Any, size: int, names: Names | None = None) -> list[str | None]:
    """What the batch calls its samples; None each where it does not say.

    Raises:
        UserError: the user's function returned another number of names.
    """
    if names is not None:
        given = [str(name) for name in names(batch)]
        if len(given) != size:
            raise UserError(f"names(batch) returned {len(given)} names; the batch has {size} samples")
        return list(given)
    for field in NAME_FIELDS:
        for found in _fields_called(batch, field, size):
            numbers = not isinstance(found[0], str)
            return [f"{field} {name}" if numbers else str(name) for name in found]
    texts = next((found for found in _lists(batch) if len(found) == size and _all(found, str)), [None] * size)
    return [text if text is None or len(text) <= LONGEST else f"{text[:LONGEST]}…" for text in texts]


def sample_notes(batch: Any, size: int) -> list[tuple[str, ...]]:
    """What the data says about each sample, such as flaws of a capture."""
    for field in NOTE_FIELDS:
        for found in _fields_called(batch, field, size, texts_only=False):
            return [tuple(map(str, note)) if isinstance(note, (list, tuple)) else (str(note),) for note in found]
    return [()] * size


def tensors_of(batch: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch by its path, such as "0", "image" or "targets.3.boxes"."""
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "fiub":
        batch = torch.from_numpy(batch)
    if isinstance(batch, Tensor):
        yield path, batch
        return
    for name, value in _children(batch):
        yield from tensors_of(value, f"{path}.{name}" if path else str(name))


# --- how many samples --------------------------------------------------------------------------------------------


def _votes(value: Any) -> Iterator[int]:
    """Numbers of samples that parts of a batch speak for."""
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim:
            yield value.shape[0]
    elif _cuts_itself(value):
        yield int(value.batch_size)
    elif _is_plain_sequence(value):
        if _one_a_sample(value):
            yield len(value)
        else:
            for entry in value:
                yield from _votes(entry)
    else:
        for _, entry in _children(value):
            yield from _votes(entry)


def _one_a_sample(values: Sequence[Any]) -> bool:
    """Whether a list holds one entry a sample, and not parts that each hold all samples, such as images and labels."""
    if not values:
        return False
    if all(isinstance(entry, (Tensor, np.ndarray)) for entry in values):
        shapes = [tuple(entry.shape) for entry in values]
        if any(not shape for shape in shapes):
            return all(not shape for shape in shapes)  # a list of numbers
        if len(values) > 1 and len({shape[0] for shape in shapes}) > 1:
            return len({(len(shape), entry.dtype) for shape, entry in zip(shapes, values, strict=True)}) == 1
        return all(_image_like(shape) for shape in shapes)
    if _all(values, (str, type(None))) or (isinstance(values, list) and _all(values, (int, float))):
        return True
    return all(isinstance(entry, Mapping) or dataclasses.is_dataclass(entry) for entry in values) or all(
        _is_plain_sequence(entry) and _alike(entry, values[0]) for entry in values
    )


def _image_like(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3, 4) and min(shape[1:]) >= 8


def _alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and [type(entry) for entry in one] == [type(entry) for entry in other]


# --- cutting -----------------------------------------------------------------------------------------------------


def _picked(value: Any, chosen: list[int], size: int, rows: Rows | None = None) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        return _picked_array(value, chosen, size, rows)
    if _cuts_itself(value):
        return value.select(chosen) if value.batch_size == size else value
    if _is_plain_sequence(value):
        if len(value) == size and _one_a_sample(value):
            return _like(value, [copy.copy(value[i]) for i in chosen])
        return _like(value, [_picked(entry, chosen, size, rows) for entry in value])
    found = _rows(value)
    rows = found if found is not None and int(found.ids.max()) + 1 == size else rows
    picked = {name: _picked(entry, chosen, size, rows) for name, entry in _children(value)}
    if found is not None and found is rows:
        counts = torch.bincount(found.ids, minlength=size)[chosen]
        where = found.ids.device
        new = counts.cumsum(0) if found.offsets else torch.arange(len(chosen), device=where).repeat_interleave(counts)
        picked[found.field] = new.to(_child(value, found.field))
    return _with_children(value, picked)


def _picked_array(value: Any, chosen: list[int], size: int, rows: Rows | None) -> Any:
    length = value.shape[0] if value.ndim else None
    if rows is not None and length == len(rows.ids):
        where = torch.cat([(rows.ids == i).nonzero()[:, 0] for i in chosen])
        return value[where.cpu().numpy()] if isinstance(value, np.ndarray) else value[where.to(value.device)]
    return value[chosen] if length == size else value


def _accumulated(batch: Any) -> list[int] | None:
    """Sizes of the parts of a batch that is a list of whole batches; None for any other."""
    if not _is_plain_sequence(batch) or len(batch) < 2:
        return None
    sizes = []
    for part in batch:
        if _cuts_itself(part):
            sizes.append(int(part.batch_size))
            continue
        if not isinstance(part, (Mapping, list, tuple)) or type(part) is not type(batch[0]):
            return None
        if isinstance(part, Mapping) and set(part) != set(batch[0]):
            return None
        tensors = [entry for _, entry in _children(part) if isinstance(entry, Tensor)]
        lengths = {entry.shape[0] if entry.dim() else 0 for entry in tensors}
        if len(tensors) < 2 or len(lengths) != 1 or 0 in lengths or max(entry.dim() for entry in tensors) < 2:
            return None
        sizes.append(lengths.pop())
    return sizes


def _cut_accumulated(batch: Any, sizes: list[int]) -> Cut:
    starts = np.cumsum([0, *sizes])

    def pick(chosen: Sequence[int]) -> Any:
        parts = []
        for part, start, size in zip(batch, starts, sizes, strict=False):
            inside = [i - int(start) for i in chosen if start <= i < start + size]
            if inside:
                parts.append(_picked(part, inside, size))
        return _like(batch, parts)

    return Cut(sum(sizes), pick)


def _joined(pieces: list[Any]) -> Any:
    """Batches of one sample each, as one batch.

    Raises:
        TypeError: they are of a kind of which nobody knows how.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(pieces) if first.dim() else first
    if isinstance(first, np.ndarray):
        return np.concatenate(pieces) if first.ndim else first
    if _is_plain_sequence(first):
        if _one_a_sample(first):
            return _like(first, [entry for piece in pieces for entry in piece])
        return _like(first, [_joined(list(entries)) for entries in zip(*pieces, strict=True)])
    if first is None or isinstance(first, (str, int, float)):
        return first
    names = [name for name, _ in _children(first)]
    if not names:
        raise TypeError(f"objects of type {type(first).__name__} cannot be joined")
    return _with_children(first, {name: _joined([_child(piece, name) for piece in pieces]) for name in names})


def _rows(value: Any) -> Rows | None:
    """The index of the rows in a mapping or an object that holds samples one after another."""
    if isinstance(value, (Tensor, np.ndarray)) or _is_plain_sequence(value):
        return None
    for field in ROW_INDEX:
        index = _child(value, field)
        if _whole_numbers(index) and len(index) > 1 and int(index.min()) == 0 and bool((index.diff() >= 0).all()):
            others = sum(isinstance(v, Tensor) and v.dim() > 0 and len(v) == len(index) for _, v in _children(value))
            if others > 1:
                return Rows(index, field, False)
    for field in OFFSETS:
        ends = _child(value, field)
        if _whole_numbers(ends) and len(ends) and bool((ends.diff() > 0).all()) and int(ends[0]) > 0:
            rows = int(ends[-1])
            if any(isinstance(v, Tensor) and v.dim() > 0 and len(v) == rows for _, v in _children(value)):
                counts = ends.diff(prepend=ends.new_zeros(1))
                return Rows(torch.arange(len(ends), device=ends.device).repeat_interleave(counts), field, True)
    return None


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype in (torch.int64, torch.int32)


# --- containers --------------------------------------------------------------------------------------------------


def _cuts_itself(value: Any) -> bool:
    return (
        not isinstance(value, Tensor)
        and hasattr(value, "select")
        and isinstance(getattr(value, "batch_size", None), int)
    )


def _is_plain_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields")


def _like(value: Any, entries: list[Any]) -> Any:
    return tuple(entries) if isinstance(value, tuple) else entries


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a container or an object of data holds, by name."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module, Tensor)) and not callable(value):
        yield from vars(value).items()


def _child(value: Any, name: Any) -> Any:
    return next((entry for field, entry in _children(value) if field == name), None)


def _with_children(value: Any, children: Mapping[Any, Any]) -> Any:
    """The same kind of container with other contents."""
    if not children:
        return value
    if isinstance(value, Mapping):
        try:
            return type(value)(children)  # type: ignore[call-arg]
        except TypeError:
            return dict(children)
    if hasattr(value, "_fields"):
        return type(value)(**children)
    new = copy.copy(value)
    for name, entry in children.items():
        object.__setattr__(new, name, entry)  # frozen dataclasses too
    return new


def _lists(value: Any) -> Iterator[Any]:
    """Every list of a batch, the outer first."""
    if _is_plain_sequence(value):
        yield value
    if not isinstance(value, (Tensor, np.ndarray, str)):
        for _, entry in _children(value):
            yield from _lists(entry)


def _fields_called(batch: Any, name: str, size: int, *, texts_only: bool = True) -> Iterator[list[Any]]:
    """Fields of this name with one entry a sample: whole ones, and those of a list of samples put together."""
    if isinstance(batch, (Tensor, np.ndarray, str)):
        return
    if _is_plain_sequence(batch) and len(batch) == size and not _all(batch, (Tensor, str)):
        found = [_child(entry, name) for entry in batch]
        if all(isinstance(entry, (str, int)) or (isinstance(entry, Tensor) and entry.numel() == 1) for entry in found):
            yield [entry.item() if isinstance(entry, Tensor) else entry for entry in found]
    for field, value in _children(batch):
        if field == name and isinstance(value, Tensor) and value.shape == (size,) and not value.is_floating_point():
            yield value.tolist()
        elif field == name and _is_plain_sequence(value) and len(value) == size:
            yield from [list(value)] if not texts_only or _all(value, (str, int)) else []
        yield from _fields_called(value, name, size, texts_only=texts_only)


def _all(values: Sequence[Any], kind: type | tuple[type, ...]) -> bool:
    return bool(values) and all(isinstance(value, kind) for value in values)
