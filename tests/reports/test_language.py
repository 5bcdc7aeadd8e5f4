"""The language of the page: every text can be said in another one, and the list of them is whole."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from jinja2 import Environment
from typer.testing import CliRunner

from bifusion_diag.cli.app import app
from bifusion_diag.diagnosis import assess_run, compare_runs
from bifusion_diag.errors import UserError
from bifusion_diag.record.schema import Run
from bifusion_diag.reports import language, render_comparison, write_run
from bifusion_diag.reports.language import speaking
from tests.reports.texts import ROOT, source_texts

TEMPLATES = ROOT / "reports" / "templates"
MARK = re.compile("[‹›]")


@pytest.fixture
def pseudo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second language in which every known text is in brackets."""
    known = {text: f"‹{text}›" for text in source_texts()}
    monkeypatch.setattr(language, "catalogue", lambda code: known)


@pytest.fixture
def spoken(pseudo: None, baseline: Run, candidate: Run) -> str:
    with speaking("zh"):
        return render_comparison([compare_runs(baseline, candidate)], baseline, [candidate])


def test_templates_hold_no_text_of_their_own() -> None:
    for path in TEMPLATES.glob("*.html.j2"):
        source = path.read_text(encoding="utf-8")
        Environment().parse(source)
        bare = re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", "", source, flags=re.DOTALL)
        bare = re.sub(r"<[^>]*>", " ", bare)
        words = set(re.findall(r"[A-Za-z][A-Za-z-]+", re.sub(r"&\w+;", "", bare)))
        assert words <= {"bifusion-diag", "rules", "--set", "set"}, path.name


def test_all_texts_of_the_templates_are_listed() -> None:
    listed = source_texts()
    for words in ("Timeline", "What to change", "All {n} findings", "Tried on a bad step: it helps.", "Not tried yet.",
                  "{n} bad steps", "Copy", "memory".join(["Peak CUDA ", ": {mib} MiB."]), "error", "less stable",
                  "{name}: largest {largest}, non-finite in {bad} of {rows} rows"):  # fmt: skip
        assert words in listed, words
    assert "#timeline" not in listed


def test_texts_in_plots_are_said_in_the_language(spoken: str, candidate: Run, baseline: Run) -> None:
    """What is not in brackets is a name of the user's, a unit or a number."""
    names = {"baseline-5cm", "bifusion-fragile", "S0", "S1", "S2", "α", "s", "semantic", "instance", "clip_align",
             "spatial_consistency", "/ clip_align", "/ instance", "‖Δw‖ ÷ ‖w‖"}  # fmt: skip
    modules = {module.name for run in (baseline, candidate) for module in run.modules}
    said = []
    for svg in re.findall(r"<svg role.*?</svg>", spoken, flags=re.DOTALL):
        for text in ElementTree.fromstring(svg).iter():
            if text.tag.endswith("text"):
                said.append("".join(text.itertext()).strip())
    assert len([text for text in said if MARK.search(text)]) > 20
    for text in said:
        assert MARK.search(text) or not re.search("[A-Za-z]{2}", text) or text in names | modules or "…" in text, text


def test_texts_in_tables_are_said_in_the_language(spoken: str) -> None:
    heads = re.findall(r"<(?:h2|summary)>(.*?)</(?:h2|summary)>", spoken)
    assert len(heads) > 8
    for head in heads:
        assert "‹" in head, head
    assert '"copy":"‹Copy›"' in spoken


def test_a_name_is_not_translated(pseudo: None, baseline: Run) -> None:
    with speaking("zh"):
        page = render_comparison([compare_runs(baseline, baseline)], baseline, [baseline])
    assert "‹baseline-5cm›" not in page


def test_the_page_names_its_language(tmp_path: Path, baseline: Run) -> None:
    written = write_run(assess_run(baseline), baseline, html=tmp_path / "a.html", language="zh")
    assert '<html lang="zh-Hans">' in written[0].read_text(encoding="utf-8")
    written = write_run(assess_run(baseline), baseline, html=tmp_path / "b.html")
    assert '<html lang="en">' in written[0].read_text(encoding="utf-8")


def test_an_unknown_language_is_the_user_s_error(tmp_path: Path, baseline: Run) -> None:
    with pytest.raises(UserError, match="--lang tlh: reports are written in en, zh"):
        write_run(assess_run(baseline), baseline, html=tmp_path / "a.html", language="tlh")
    assert list(tmp_path.iterdir()) == []
    result = CliRunner().invoke(app, ["report", str(tmp_path / "no.json"), "--lang", "tlh"])
    assert result.exit_code != 0
