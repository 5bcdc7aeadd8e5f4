"""What is noted of a step puts back what its forward has changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bifusion_diag.replay.notes import StepNotes


class Growing(nn.Module):
    """A memory that grows, an average that is no buffer, and a counter."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(0, 2))
        self.mean = torch.zeros(2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        self.memory = torch.cat([self.memory, x])
        return (x - self.mean).sum() + self.memory.sum() * self.calls


def test_a_forward_runs_again_as_it_ran_and_leaves_no_trace() -> None:
    outer = nn.ModuleDict({"inner": Growing()})
    model = outer["inner"]
    model(torch.randn(3, 2))
    notes = StepNotes(outer, 4, torch.randn(3, 2))
    first = model(notes.batch())
    after = (model.calls, model.mean.clone(), model.memory.clone())
    for _ in range(2):
        with notes.again() as batch:
            assert torch.equal(model(batch), first)
        assert model.calls == after[0]
        assert torch.equal(model.mean, after[1])
        assert torch.equal(model.memory, after[2])


def test_hooks_that_come_between_keep_their_kind() -> None:
    """Whether a module's backward hooks see whole gradients is a flag of the module, and none of its state."""
    model, seen = Growing(), list[tuple[Tensor | None, ...]]()
    notes = StepNotes(model, 0, torch.ones(3, 2))
    model.register_full_backward_hook(lambda module, given, arrived: seen.append(arrived))
    with notes.again() as batch:
        model(batch.requires_grad_()).backward()
    assert len(seen) == 1
    assert seen[0][0] is not None
