"""When rows are written."""

from __future__ import annotations

from pathlib import Path

import torch

from bifusion_diag.probes.rows import RowBlock, pack
from bifusion_diag.record import RecordReader, RunHeader, RunWriter


def test_a_block_is_written_when_it_is_full_or_old(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.json", RunHeader("run")) as writer:
        patient = RowBlock(writer, size=3, seconds=1e9)
        for step in range(4):
            patient.add(pack(step, [], {"x": torch.tensor(1.0)}))
        assert RecordReader(writer.folder).steps.tolist() == [0, 1, 2]
        patient.flush()
        hasty = RowBlock(writer, size=1000, seconds=0.0)
        hasty.add(pack(4, [], {"x": 2.0}))
        assert RecordReader(writer.folder).steps.tolist() == [0, 1, 2, 3, 4]
