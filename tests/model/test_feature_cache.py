"""The cache gives back what was computed, to the bit, or computes it again."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bifusion_diag.errors import UserError
from bifusion_diag.model.feature_cache import FeatureCache

CPU = torch.device("cpu")
GIB = 1 << 30
KEY, OTHER = "ab" * 32, "cd" * 32


class Computed:
    """Makes a tensor and counts how often."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.value = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
        self.count = 0

    def __call__(self) -> torch.Tensor:
        self.count += 1
        return self.value.clone()


def fetch(cache: FeatureCache, key: str, compute: Callable[[], torch.Tensor], dtype: torch.dtype = torch.float32):
    return cache.fetch(key, (1, 5, 3), dtype, CPU, compute)


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_memory_drops_what_was_not_used_for_longest() -> None:
    compute = {name: Computed(seed=ord(name)) for name in "abc"}
    cache = FeatureCache(2 * 60 / GIB, None)  # two tensors of 15 float32
    for name in "ababacab":  # c takes the place of b, and b then that of c
        assert torch.equal(fetch(cache, name, compute[name]), compute[name].value)
    assert [compute[name].count for name in "abc"] == [1, 2, 1]
    cache.forget()
    fetch(cache, "a", compute["a"])
    assert compute["a"].count == 2


def test_off_is_off() -> None:
    cache, compute = FeatureCache(0, None), Computed()
    assert not cache.active
    fetch(cache, KEY, compute)
    fetch(cache, KEY, compute)
    assert compute.count == 2


def test_nothing_larger_than_the_memory_is_kept() -> None:
    cache, compute = FeatureCache(59 / GIB, None), Computed()
    fetch(cache, KEY, compute)
    fetch(cache, KEY, compute)
    assert compute.count == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_keeps_every_bit_between_runs(dtype: torch.dtype) -> None:
    compute = Computed(dtype)
    for _ in range(3):  # each a run of its own
        found = fetch(FeatureCache(0, "kept"), KEY, compute, dtype)
        assert torch.equal(found, compute.value)
        assert found.dtype == dtype
    assert compute.count == 1
    assert not fetch(FeatureCache(0, "kept"), KEY, compute, dtype).is_shared()


def truncated(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-7])


def empty(entry: Path) -> None:
    entry.write_bytes(b"")


def one_bit_changed(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    at = bytes(content).index(Computed().value.numpy().tobytes())
    content[at + 17] ^= 1
    entry.write_bytes(content)


def no_safetensors(entry: Path) -> None:
    entry.write_text("hello")


def of_another_key(entry: Path) -> None:
    fetch(FeatureCache(0, "kept"), OTHER, Computed(seed=1))
    (Path("kept") / OTHER[:2] / f"{OTHER}.safetensors").replace(entry)


def without_checksum(entry: Path) -> None:
    save_file({"features": load_file(entry)["features"].clone()}, entry)


def of_another_shape(entry: Path) -> None:
    FeatureCache(0, "kept").fetch(KEY, (2, 2), torch.float32, CPU, lambda: torch.zeros(2, 2))


def of_another_dtype(entry: Path) -> None:
    fetch(FeatureCache(0, "kept"), KEY, Computed(torch.float64), torch.float64)


def a_folder(entry: Path) -> None:
    entry.unlink()
    entry.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        empty,
        one_bit_changed,
        no_safetensors,
        of_another_key,
        without_checksum,
        of_another_shape,
        of_another_dtype,
    ],
)
def test_an_entry_that_is_not_whole_is_computed_again_and_replaced(damage: Callable[[Path], None]) -> None:
    compute = Computed()
    fetch(FeatureCache(0, "kept"), KEY, compute)
    (entry,) = Path("kept").rglob("*.safetensors")
    good = entry.read_bytes()
    damage(entry)
    assert entry.read_bytes() != good
    assert torch.equal(fetch(FeatureCache(0, "kept"), KEY, compute), compute.value)
    assert compute.count == 2
    assert entry.read_bytes() == good
    assert [path.name for path in Path("kept").rglob("*") if path.is_file()] == [entry.name]


def test_a_place_that_takes_no_file_is_warned_of_once_and_costs_no_result() -> None:
    compute = Computed()
    fetch(FeatureCache(0, "kept"), KEY, compute)
    (entry,) = Path("kept").rglob("*.safetensors")
    a_folder(entry)
    cache = FeatureCache(0, "kept")
    with pytest.warns(UserWarning, match="no longer kept on disk, training goes on"):
        assert torch.equal(fetch(cache, KEY, compute), compute.value)
    assert torch.equal(fetch(cache, KEY, compute), compute.value)


def test_a_folder_that_cannot_be_written_to_is_an_error_at_the_start() -> None:
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"model\.clip\.cache_folder: nothing can be kept in file .*null"):
        FeatureCache(1, "file")


def test_a_full_disk_is_an_error_at_the_start_and_a_warning_later() -> None:
    with files_at_most(1000), pytest.raises(UserError, match=r"cache_folder: nothing can be kept in kept"):
        FeatureCache(1, "kept")
    cache, compute = FeatureCache(0, "kept"), Computed()
    with files_at_most(100), pytest.warns(UserWarning, match="training goes on"):
        assert torch.equal(fetch(cache, KEY, compute), compute.value)
    assert torch.equal(fetch(cache, OTHER, compute), compute.value)  # no second warning
    assert [path for path in Path("kept").rglob("*") if path.is_file()] == []


def test_two_processes_share_a_folder() -> None:
    code = (
        "import torch\n"
        "from bifusion_diag.model.feature_cache import FeatureCache\n"
        "cache = FeatureCache(0, 'kept')\n"
        "for turn in range(15):\n"
        "    for number in range(3):\n"
        "        compute = lambda: torch.full((1, 2000), number, dtype=torch.float32)\n"
        "        found = cache.fetch(f'{number:064x}', (1, 2000), torch.float32, torch.device('cpu'), compute)\n"
        "        assert (found == number).all()\n"
        "        if turn % 2: cache.folder._path(f'{number:064x}').write_bytes(b'spoilt')\n"
    )
    runs = [subprocess.Popen([sys.executable, "-W", "error", "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    assert [run.communicate()[1] for run in runs] == [b"", b""]
    assert [run.returncode for run in runs] == [0, 0]
