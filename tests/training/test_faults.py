"""Every fault does what it says, in its own step and nowhere else, and does it again when the step runs again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from bifusion_diag.cli.app import app
from bifusion_diag.config import Settings, load_settings
from bifusion_diag.data import Batch, BatchLoader
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.training.evaluation import training_source
from bifusion_diag.training.faults import FAULTS, Faults, fault_table
from bifusion_diag.training.optim import build_optimizer

STEP, SAMPLE = 3, 1


class Seen(NamedTuple):
    """A step, as far as a fault may change it."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Run:
    """A tiny model after one healthy update."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(0)
        self.model: Segmenter = build_model(settings).train()
        self.optimizer = build_optimizer(self.model, settings.optim)
        self.loader = BatchLoader(training_source(settings), settings.data, batch_size=2, seed=0)
        self.seen(self.loader.batch(0))
        self.optimizer.step()
        self.clean = self.loader.batch(1)
        with self.kept():
            self.healthy = self.seen(self.clean)

    def seen(self, batch: Batch) -> Seen:
        torch.manual_seed(1)  # queries are drawn
        self.model.zero_grad()  # also of what a fault has taken out of the optimiser
        loss = self.model(batch).loss
        loss.total.backward()
        losses = {name: term.detach() for name, term in loss.terms.items()} | {"total": loss.total.detach()}
        named = self.model.named_parameters()
        return Seen(losses, {name: p.grad.clone() for name, p in named if p.grad is not None})

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Weights, buffers and optimiser are afterwards as before."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        learning = {name: p.requires_grad for name, p in self.model.named_parameters()}
        groups = [dict(group, params=list(group["params"])) for group in self.optimizer.param_groups]
        moments = {p: {k: v.clone() for k, v in values.items()} for p, values in self.optimizer.state.items()}
        yield
        self.model.load_state_dict(state)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(learning[name])
        self.optimizer.param_groups[:] = groups
        self.optimizer.state.clear()
        self.optimizer.state.update(moments)


@pytest.fixture(scope="module")
def run() -> Run:
    data = {"scenes": 3, "max_points": 600, "image_height": 48, "image_width": 64, "superpoint_size": 0.5}
    values = {"training.stages": "none", **{f"data.{name}": value for name, value in data.items()}}
    return Run(load_settings("bifusion", scale="small", values=values))


def is_same(one: Seen, other: Seen) -> bool:
    """To the bit, NaN for NaN."""

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)) for n in a)

    return same(one.losses, other.losses) and same(one.gradients, other.gradients)


def is_finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in tensors.values())


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.where != "rank"])
def test_a_fault_strikes_in_its_step_and_strikes_again_when_it_runs_again(run: Run, name: str) -> None:
    fault = FAULTS[name]
    with run.kept():
        where = f":{SAMPLE}" if fault.where == "sample" else ""
        faults = Faults([f"{name}@{STEP}{where}"], run.model, run.optimizer, batch_size=2)
        clean, healthy = run.clean, run.healthy

        def step(number: int) -> tuple[Batch, Seen]:
            batch = faults.batch(number, clean)
            with faults.context(number):
                return batch, run.seen(batch)

        weights = {n: v.clone() for n, v in run.model.state_dict().items()}
        (message,) = faults.beginning(STEP)
        assert name in message
        faults.before_step(STEP)
        edited = {n: v.clone() for n, v in run.model.state_dict().items()}
        batch, bad = step(STEP)
        run.model.load_state_dict(edited)
        assert is_same(step(STEP)[1], bad)  # as it does in place, and in a capsule's replay
        gradients = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
        faults.after_backward(STEP)
        rates = [group["lr"] for group in run.optimizer.param_groups]
        faults.before_update(STEP)
        after = {n: g.clone() for n, g in gradients.items()}
        run.optimizer.step()
        updated = dict(run.model.named_parameters())

        inputs = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
        floating = {key: value for key, value in inputs.items() if value.is_floating_point()}
        everything: list[dict[str, Any]] = [bad.losses, after, dict(run.model.named_buffers()), updated, floating]
        assert all(map(is_finite, everything)) == (fault.silent or name in ("huge-gradient", "empty-crop"))
        traces = [
            not is_same(bad, healthy),
            batch is not clean,
            any(not torch.equal(after[n], bad.gradients[n]) for n in after),
            rates != [group["lr"] for group in run.optimizer.param_groups],
            name in ("nan-moment", "zero-second-moment", "not-in-optimizer", "nan-buffer"),
        ]
        assert any(traces)
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

        if fault.lasts and fault.point in ("output", "term", "batch"):
            run.model.load_state_dict(weights)
            assert not is_same(step(STEP + 1)[1], healthy)


def test_before_its_step_and_after_it_there_is_no_fault(run: Run) -> None:
    short = [name for name, fault in FAULTS.items() if fault.where != "rank" and not fault.lasts]
    every = [name for name, fault in FAULTS.items() if fault.where != "rank"]
    for names, number in ((every, STEP - 1), (short, STEP + 1)):
        with run.kept():
            faults = Faults([f"{name}@{STEP}" for name in names], run.model, run.optimizer, batch_size=2)
            rates = [group["lr"] for group in run.optimizer.param_groups]
            assert faults.beginning(number) == []
            faults.before_step(number)
            assert faults.batch(number, run.clean) is run.clean
            with faults.context(number):
                assert is_same(run.seen(run.clean), run.healthy)
            faults.after_backward(number)
            faults.before_update(number)
            gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
            assert is_same(Seen(run.healthy.losses, gradients), run.healthy)
            assert rates == [group["lr"] for group in run.optimizer.param_groups]


def test_a_batch_fault_touches_its_own_sample_alone(run: Run) -> None:
    clean = run.loader.batch(2)
    (own,) = (clean.scene_index == SAMPLE).nonzero(as_tuple=True)
    for name, fault in FAULTS.items():
        if fault.where != "sample" or name in ("empty-crop", "swapped-images"):
            continue
        faults = Faults([f"{name}@{STEP}:{SAMPLE}"], run.model, batch_size=2)
        batch = faults.batch(STEP, clean)
        for field in fields(batch):
            old, new = getattr(clean, field.name), getattr(batch, field.name)
            if not isinstance(old, Tensor):
                assert old == new
            elif len(old) == 2:
                assert torch.equal(old[1 - SAMPLE], new[1 - SAMPLE])
            else:
                others = torch.ones(len(old), dtype=torch.bool)
                others[own] = False
                assert torch.equal(old[others], new[others])


def test_an_empty_crop_is_a_batch_of_the_points_that_are_left(run: Run) -> None:
    clean = run.loader.batch(2)
    batch = Faults([f"empty-crop@{STEP}:{SAMPLE}"], run.model, batch_size=2).batch(STEP, clean)
    assert batch.point_counts == (clean.point_counts[0], 3)
    assert len(batch.xyz) == len(batch.superpoint) == len(batch.instance) == sum(batch.point_counts)
    assert batch.superpoint.unique().tolist() == list(range(sum(batch.superpoint_counts)))
    for scene in range(2):
        objects = batch.instance[batch.scene_index == scene]
        found = objects[objects >= 0].unique()
        assert found.tolist() == list(range(len(found)))
    first = clean.point_counts[0]
    assert torch.equal(batch.xyz[:first], clean.xyz[:first])
    assert torch.equal(batch.xyz[first:], clean.xyz[first : first + 3])


def test_of_a_mean_over_nothing_every_gradient_is_finite(run: Run) -> None:
    with run.kept():
        faults = Faults([f"empty-match@{STEP}"], run.model, batch_size=2)
        with faults.context(STEP):
            seen = run.seen(run.loader.batch(1))
    assert {name for name, value in seen.losses.items() if not math.isfinite(value)} == {"instance_mask", "total"}
    assert is_finite(seen.gradients)


def test_a_term_x_1000_counts_so_in_the_total(run: Run) -> None:
    with run.kept():
        batch = run.loader.batch(1)
        healthy = run.seen(batch)
        with Faults([f"scale-term@{STEP}:clip_align"], run.model, batch_size=2).context(STEP):
            seen = run.seen(batch)
    weight = run.model.criterion._weights()["clip_align"]
    grown = seen.losses["total"] - healthy.losses["total"]
    torch.testing.assert_close(grown, 999 * weight * healthy.losses["clip_align"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("nan-ouput@3", "Did you mean 'nan-output'"),
        ("nan-output", "NAME@STEP"),
        ("nan-output@-1", "NAME@STEP"),
        ("nan-output@three", "NAME@STEP"),
        ("high-lr@3:encoder", "takes no place"),
        ("nan-output@3:encoder.flim", "Did you mean 'encoder.film'"),
        ("nan-term@3:clip", "Known: clip_align"),
        ("wrong-labels@3:2", "give 0 to 1"),
        ("rank-nan@3", "torchrun"),
    ],
)
def test_what_cannot_be_injected_is_refused(run: Run, spec: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Faults([spec], run.model, run.optimizer, batch_size=2)


def test_a_moment_that_is_not_there_yet_is_told(run: Run) -> None:
    faults = Faults(["nan-moment@1"], run.model, torch.optim.AdamW(run.model.parameters()), batch_size=2)
    with pytest.raises(UserError, match="no moments yet"):
        faults.before_step(1)


def test_defaults_are_said(run: Run) -> None:
    specs = ["nan-output@3", "nan-term@4", "nan-color@5", "high-lr@6"]
    faults = Faults(specs, run.model, batch_size=2)
    assert faults.provenance() == ["nan-output@3:encoder.head3d", "nan-term@4:semantic", "nan-color@5:0", "high-lr@6"]


def test_the_docs_list_the_faults_that_there_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in fault_table()]
    assert len(FAULTS) >= 24


def test_the_cli_lists_every_fault_without_out() -> None:
    result = CliRunner().invoke(app, ["train", "--inject", "list"])
    assert result.exit_code == 0
    assert [name for name in FAULTS if name not in result.output] == []


def test_kinds_are_those_of_incidents() -> None:
    from bifusion_diag.replay.incident import KINDS

    assert [name for name, fault in FAULTS.items() if set(fault.kinds) - KINDS.keys() or not fault.kinds] == []
