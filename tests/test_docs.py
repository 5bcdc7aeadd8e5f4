"""The examples in README and docs run, and the links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import bifusion_diag.probes
from bifusion_diag.probes import PROBES, Monitor, make_probes
from bifusion_diag.record import load_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code(page: Path, about: str) -> str:
    """The page's only Python example with this word in it."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if about in block]
    return block


def test_the_monitor_example_of_the_readme_records_a_users_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    names = {
        "torch": torch,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [torch.randn(8, 4) for _ in range(5)],
    }

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.net(batch).square().mean()

    exec(code(ROOT / "README.md", "Monitor("), names | {"model": Model()})
    run = load_run("runs/mine/run.json")
    assert (run.status, len(run.steps)) == ("completed", 5)
    assert run.series("grads/net.0/param_norm").value.min() > 0
    assert run.series("train/grad_norm") is not None


def test_the_probe_example_of_the_docs_measures_what_it_says() -> None:
    names: dict[str, type] = {}
    exec(code(ROOT / "docs" / "probes.md", "LogitProbe"), names)

    class Output(NamedTuple):
        logits: torch.Tensor

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Output:
            return Output(x)

    model = Model()
    with Monitor(model, probes=[names["LogitProbe"]()]) as monitor:
        with monitor.step():
            model(torch.tensor([1.0, 3.0]))
        monitor.end_step()
        assert monitor.latest()["logits/mean"] == 2.0


def test_probes_are_told_where_to_look_as_the_docs_say() -> None:
    names = {name: getattr(bifusion_diag.probes, name) for name in bifusion_diag.probes.__all__}
    exec(code(ROOT / "docs" / "probes.md", "GateProbe("), names)
    assert [probe.name for probe in make_probes(names["probes"])] == [
        "grads",
        "gate",
        "mixer",
        "data",
        "loss_gradients",
    ]


@pytest.mark.parametrize("name", PROBES)
def test_every_number_of_a_probe_is_in_the_docs(name: str) -> None:
    section = (ROOT / "docs" / "probes.md").read_text().split(f"\n### {name}\n")[1].split("\n### ")[0]
    rows = dict(re.findall(r"^\| `(.*?)` \| (.*) \|$", section.replace("\\|", "¦"), re.MULTILINE))
    assert rows.pop(f"{PROBES[name].prefix}/") == "what"
    assert rows == {key: meaning.replace("|", "¦") for key, meaning in PROBES[name].KEYS.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def spec_rows() -> list[list[str]]:
    """The cells of every row of the tables below "Row by row" in docs/model.md: what, implementation, test."""
    section = (ROOT / "docs" / "model.md").read_text().split("## Row by row")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and not re.match(r"\|[-| ]+\|$", line)]
    return [cells for line in lines if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] != "row"]


@pytest.mark.parametrize("row", spec_rows(), ids=lambda row: row[0])
def test_every_row_of_the_specification_names_code_and_tests_that_exist(row: list[str]) -> None:
    _, implementation, tests = row
    files = re.findall(r"`([^`]+)`", implementation)
    assert files
    assert [file for file in files if not (ROOT / "bifusion_diag" / file).exists()] == []
    verified = re.findall(r"`([^`]+\.py)(?:::(\w+))?`", tests)
    assert verified
    for file, name in verified:
        content = (ROOT / "tests" / file).read_text()
        assert f"def {name or 'test_'}" in content, f"{file} has no test {name}"
