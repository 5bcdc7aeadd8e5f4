"""Which elements are sampled."""

from __future__ import annotations

import pytest
import torch

from bifusion_diag.probes.sampling import RUN, Samples, sample, spacing


@pytest.mark.parametrize("elements", [2048, 2049, 2055, 4096, 5000, 65536, 1_000_003, 3_276_800])
def test_runs_lie_inside_and_are_evenly_spaced(elements: int) -> None:
    runs = 128
    chosen = sample(torch.arange(elements), runs)
    assert chosen.shape == (runs, RUN)
    starts = chosen[:, 0]
    assert (chosen == starts[:, None] + torch.arange(RUN)).all()
    assert starts.diff().unique().tolist() == [spacing(elements, runs)]
    assert (starts[0], chosen[-1, -1] < elements) == (0, True)
    assert chosen[-1, -1] > 0.95 * elements
    assert sample(torch.arange(elements).repeat(2).view(2, -1).t()[:, 0], runs).tolist() == chosen.tolist()


@pytest.mark.parametrize("shape", [(64, 512), (8, 50, 768), (4, 64, 40, 40), (300, 96)])
def test_most_channels_are_reached(shape: tuple[int, ...]) -> None:
    channels = torch.arange(shape[-1]).expand(shape).contiguous()
    seen = sample(channels, 128).unique()
    assert len(seen) > 0.5 * shape[-1]  # with runs an even divisor apart: 16 of 512


def test_a_view_with_gaps_is_sampled_in_the_order_of_its_elements() -> None:
    x = torch.randn(100, 90)[:, ::3]
    assert torch.equal(sample(x, 16), sample(x.contiguous(), 16))


def test_short_ones_are_whole() -> None:
    x = torch.randn(5, 7)
    assert sample(x, 128).tolist() == x.flatten().tolist()
    assert sample(x[:, ::2], 128).tolist() == x[:, ::2].flatten().tolist()


def test_samples_follow_the_tensors() -> None:
    tensors = [torch.randn(600), torch.randn(64), torch.randn(3)]
    samples = Samples([x.numel() for x in tensors], 4, torch.device("cpu"), torch.float32)
    for _ in range(2):
        samples.take(tensors)
        assert samples.rows[0].tolist() == sample(tensors[0], 4).flatten().tolist()
        assert samples.rows[1].tolist() == tensors[1].tolist()
        assert samples.rows[2].tolist() == [*tensors[2].tolist(), *[0.0] * 61]
        assert samples.inside.sum(1).tolist() == [64, 64, 3]
        tensors = [x * 2 for x in tensors]  # other memory
