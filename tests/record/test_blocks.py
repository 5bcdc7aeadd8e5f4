"""Blocks of numbers against what was written, and what they take on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bifusion_diag.record import RecordReader, RunHeader, RunWriter
from bifusion_diag.record.blocks import Block, BlockFile, BlockStream, BlockTail

SPECIAL = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1.2e-38, 3.4028235e38, 1.0], np.float32)


def block(rng: np.random.Generator, first: int, rows: int, width: int, share: float) -> Block:
    bits = rng.integers(0, 2**32, (rows, width), dtype=np.uint32)  # every number there is
    values = np.where(rng.random((rows, width)) < 0.5, bits.view("f4"), rng.choice(SPECIAL, (rows, width)))
    missing = rng.random((rows, width)) < share
    return Block(np.arange(first, first + rows) * 3 - 7, values.astype("f4"), missing)


def same(one: Block, other: Block) -> bool:
    values = [np.where(b.missing, 0, b.values.view(np.uint32)) for b in (one, other)]  # NaN's own bits too
    return all(np.array_equal(a, b) for a, b in [(one.steps, other.steps), (one.missing, other.missing), values])


@pytest.mark.parametrize("width", [1, 3, 250])
def test_blocks_come_back_bit_by_bit(tmp_path: Path, width: int) -> None:
    rng = np.random.default_rng(width)
    written = [block(rng, 10 * i, 1 + i % 5, width, [0, 0.1, 1][i % 3]) for i in range(9)]
    stream = BlockStream(tmp_path / "a.arrow", width, {"names": "[]"})
    tail = BlockTail(tmp_path / "a.arrow")
    for one in written:
        stream.write(one)
        (place,) = tail.update()
        followed = tail.block(place)
        assert followed is not None
        assert same(followed, one)
        assert np.isnan(followed.values[one.missing]).all()
    stream.close()
    stream.close()
    assert tail.update() == []
    with BlockFile(tmp_path / "a.arrow") as file:
        read = list(file)
        assert file.metadata == {"names": "[]", "width": str(width)} == tail.metadata
        assert not file.truncated
    assert len(read) == len(written)
    assert all(same(a, b) for a, b in zip(read, written, strict=True))


def test_a_file_cut_anywhere_gives_its_whole_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.arrow"
    stream = BlockStream(path, 5, {})
    ends = [path.stat().st_size]
    written = [block(rng, 4 * i, 4, 5, 0.3) for i in range(4)]
    for one in written:
        stream.write(one)
        ends.append(path.stat().st_size)  # nothing waits in a buffer
    stream.close()
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with BlockFile(path) as file:
            read = list(file)
            assert file.truncated == (size not in ends)
        assert len(read) == max(0, sum(end <= size for end in ends) - 1)
        assert all(same(a, b) for a, b in zip(read, written, strict=False))


def test_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    """Written here as that version did: a row a step, null = missing."""
    values = np.random.default_rng(0).normal(size=(6, 3)).astype("f4")
    values[1, 1] = np.nan
    missing = np.zeros((6, 3), bool)
    missing[2:4, 0] = True
    schema = pa.schema([("step", pa.int64()), ("values", pa.list_(pa.float32(), 3))], metadata={"names": "[]"})
    with pa.ipc.new_stream(tmp_path / "a.arrow", schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        flat = pa.array(values.reshape(-1), mask=missing.reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("values").type)
        writer.write_batch(pa.record_batch([pa.array(np.arange(6)), vectors], schema=schema))
    with BlockFile(tmp_path / "a.arrow") as file:
        (read,) = file
    assert same(read, Block(np.arange(6), values, missing))


def norms(rng: np.random.Generator, steps: int, width: int) -> np.ndarray:
    """Like gradient norms: every series has a magnitude of its own, and varies by a third from step to step."""
    return (10.0 ** rng.uniform(-6, 2, width) * rng.lognormal(0, 0.3, (steps, width))).astype("f4")


@pytest.mark.parametrize(
    ("kind", "width", "bound"), [("norms", 4000, 3.6), ("norms", 100, 3.7), ("normal", 4000, 3.8), ("normal", 100, 4.0)]
)
@pytest.mark.parametrize("absent", [0.0, 0.1])
def test_a_number_takes_at_most_four_bytes_with_all_that_is_in_the_folder(
    tmp_path: Path, kind: str, width: int, bound: float, absent: float
) -> None:
    rng = np.random.default_rng(0)
    steps = 640_000 // width // 32 * 32
    values = norms(rng, steps, width) if kind == "norms" else rng.normal(size=(steps, width)).astype("f4")
    missing = np.broadcast_to(rng.random(width) < absent, values.shape)
    names = [f"grads/encoder.block{i}.conv/param_norm" for i in range(width)]
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        for begin in range(0, steps, 32):
            rows = slice(begin, begin + 32)
            writer.append_block(np.arange(steps)[rows], names, values[rows], missing[rows])
    size = sum(file.stat().st_size for file in writer.folder.iterdir())
    assert size / values.size < bound
    assert np.array_equal(RecordReader(writer.folder).columns(names)[1], missing)


def test_what_stays_the_same_costs_next_to_nothing(tmp_path: Path) -> None:
    stream = BlockStream(tmp_path / "a.arrow", 1000, {})
    head = (tmp_path / "a.arrow").stat().st_size
    stream.write(Block(np.arange(32), np.tile(np.arange(1000, dtype="f4") % 5, (32, 1)), np.zeros((32, 1000), bool)))
    stream.close()
    assert (tmp_path / "a.arrow").stat().st_size - head < 0.2 * 32_000
