"""Capsules run again in a new process to the bit, and what differs is named."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bifusion_diag.errors import UserError
from bifusion_diag.replay.capsules.capsule import read_capsule, restore_capsule
from bifusion_diag.replay.capsules.execute import replay_capsule, training_of

FILE = Path(__file__).parents[1] / "user_code.py"


@pytest.fixture(scope="module")
def code() -> ModuleType:
    """The users' file, imported under its own name as a script's folder lets it be."""
    spec = importlib.util.spec_from_file_location("user_code", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_code"] = module
    spec.loader.exec_module(module)
    return module


def test_users_capsules_are_bit_identical_in_a_new_process(code: ModuleType, tmp_path: Path) -> None:
    """The capsule's number of threads counts, not the process's."""
    before, arguments = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name in code.WORKLOADS:
                folder, note = code.written(*code.trained(name), tmp_path / f"{name}-{threads}")
                assert folder is not None, note
                arguments += [name, folder]
    finally:
        torch.set_num_threads(before)
    command = [sys.executable, str(FILE), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split(" | ") for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines] == [[name, "True"] for name in [*code.WORKLOADS] * 2], result.stdout
    assert "3 losses and 6 gradients" in result.stdout


def test_incidents_of_users_loops_are_bit_identical_in_a_new_process(code: ModuleType, tmp_path: Path) -> None:
    def far(batch: Any, model: Any) -> None:
        batch.images[2] *= 1e6

    def broken(batch: Any, model: Any) -> None:
        with torch.no_grad():
            model[0].weight[batch["tokens"][1, 0]] = float("nan")

    arguments = []
    for name, spoil in {"pictures": far, "words": broken}.items():
        incidents = code.recorded(name, tmp_path / f"{name}.json", spoil)
        assert [incident.step for incident in incidents] == [code.STEP], incidents
        assert incidents[0].reproduction.identical, incidents[0].reproduction
        assert incidents[0].capsule is not None, incidents[0].capsule_note
        arguments += [name, incidents[0].capsule]
    result = subprocess.run([sys.executable, str(FILE), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = [line.split(" | ")[:2] for line in result.stdout.splitlines()]
    assert found == [["pictures", "True"], ["words", "True"]], result.stdout


def test_a_changed_weight_is_seen_and_named(code: ModuleType, tmp_path: Path) -> None:
    folder, _ = code.written(*code.trained("contrast"), tmp_path / "c")
    capsule = read_capsule(folder)
    training = code.contrast({"lr": 0.01})
    loss = training.step
    other = code.Training(training.model, lambda x: loss(x) * (1 + 1e-7), training.optimizers)
    found = replay_capsule(capsule, other)
    assert (found.identical, found.difference) == (False, "loss loss")
    assert "run twice here, it gives the same bits both times" in found.reasons


def test_a_step_that_differs_from_itself_is_told(code: ModuleType, tmp_path: Path) -> None:
    folder, _ = code.written(*code.trained("contrast"), tmp_path / "c")
    training, calls = code.contrast({"lr": 0.01}), [0]

    def step(x: Any) -> Any:
        calls[0] += 1
        return training.step(x) + calls[0]

    found = replay_capsule(read_capsule(folder), code.Training(training.model, step, training.optimizers))
    assert found.identical is False
    assert found.reasons[-1].startswith("run twice here, it differs from itself")


def test_a_hook_that_is_not_there_is_a_reason(code: ModuleType, tmp_path: Path) -> None:
    training, notes = code.trained("contrast")

    def triples(module: Any, args: Any, output: Any) -> Any:
        return output * 3

    training.model.register_forward_hook(triples)
    folder, _ = code.written(training, notes, tmp_path / "c")
    found = replay_capsule(read_capsule(folder), code.contrast({"lr": 0.01}))
    assert found.identical is False
    assert found.reasons[0].startswith("module (root) had test_execute.py")
    assert "def triples" in found.reasons[0]


def test_the_forward_alone_is_compared_by_its_losses(code: ModuleType, tmp_path: Path) -> None:
    folder, _ = code.written(*code.trained("pictures"), tmp_path / "p")
    found = replay_capsule(read_capsule(folder), code.pictures({"lr": 0.01}), backward=False)
    assert (found.identical, found.compared, found.grad_norm) == (True, "3 losses", None)


def test_numbers_of_probes_and_of_the_step_are_those_of_plain_autograd(code: ModuleType, tmp_path: Path) -> None:
    folder, _ = code.written(*code.trained("contrast"), tmp_path / "c")
    capsule, training = read_capsule(folder), code.contrast({"lr": 0.01})
    found = replay_capsule(capsule, training, probes=["grads", "losses"])
    training, notes = restore_capsule(capsule, training)
    training.model.zero_grad()
    loss = training.step(notes.batch())
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in training.model.parameters()]).double().norm().item()
    assert found.grad_norm == pytest.approx(norm, rel=1e-12)
    assert found.losses["loss"] == loss.item()
    assert found.readings["loss/loss/raw"] == loss.item()
    assert found.readings["train/grad_norm"] == pytest.approx(norm, rel=1e-6)  # float32


def test_a_trace_lists_every_module_with_its_ranges(code: ModuleType, tmp_path: Path) -> None:
    folder, _ = code.written(*code.trained("pictures"), tmp_path / "p")
    training = code.pictures({"lr": 0.01})
    found = replay_capsule(read_capsule(folder), training, trace=True)
    assert found.identical
    assert [row.name for row in found.trace] == ["conv", "norm", "drop", "head", "(root)"]
    assert all(row.output_absmax and row.gradient_norm for row in found.trace)


def test_an_error_of_the_step_is_replayed_as_one(code: ModuleType, tmp_path: Path) -> None:
    training, notes = code.trained("contrast")

    def fails(x: Any) -> Any:
        raise RuntimeError("no objects in the scene\nmore")

    folder, _ = code.written(code.Training(training.model, fails, training.optimizers), notes, tmp_path / "c")
    capsule = read_capsule(folder)
    again = code.contrast({"lr": 0.01})
    found = replay_capsule(capsule, code.Training(again.model, fails, again.optimizers))
    assert (found.identical, found.error) == (True, "RuntimeError: no objects in the scene")
    healed = replay_capsule(capsule, code.contrast({"lr": 0.01}))
    assert healed.identical is False
    assert healed.difference == "the step raised nothing; then it raised RuntimeError: no objects in the scene"


def test_threads_and_switches_are_the_capsules_and_then_the_processs(code: ModuleType, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:
        folder, _ = code.written(*code.trained("contrast"), tmp_path / "c")
    finally:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(False)
    seen = []
    training = code.contrast({"lr": 0.01})

    def step(x: Any) -> Any:
        seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
        return training.step(x)

    replay_capsule(read_capsule(folder), code.Training(training.model, step, training.optimizers))
    after = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    torch.set_num_threads(before)
    assert (seen, after) == ([(2, True)], (1, False))


ENTRY = """
from torch import nn
def pair(settings): m = nn.Linear(settings["n"], 1); return m, lambda x: m(x).sum()
def with_state(settings, state): pair.state = state; return pair(settings)
def wrong(settings): return 3
def fails(settings): return settings["missing"]
"""


class _Told:
    settings = {"n": 2}  # noqa: RUF012

    def state(self) -> dict[str, int]:
        return {"a": 1}


def test_an_entry_is_a_modules_or_a_files_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("entry_of_a_user.py").write_text(ENTRY)
    Path("broken_file.py").write_text("import no_such_thing")
    told: Any = _Told()
    for name in ("entry_of_a_user:pair", "entry_of_a_user.py:pair", "entry_of_a_user.py:with_state"):
        assert training_of(name, told).step(torch.ones(1, 2)).shape == ()
    assert sys.modules["entry_of_a_user"].pair.state == {"a": 1}
    for entry, words in {
        "entry_of_a_user": "give module:function or file.py:function",
        "entry_of_a_user:none": "has no function 'none'",
        "entry_of_a_user:wrong": "returned a int; it must return",
        "entry_of_a_user:fails": r"raised KeyError: 'missing' \(entry_of_a_user.py, line 6\)",
        "no_such_file.py:f": "there is no file no_such_file.py",
        "broken_file:f": "cannot be imported .ModuleNotFoundError: No module named 'no_such_thing'",
    }.items():
        with pytest.raises(UserError, match=words):
            training_of(entry, told)
