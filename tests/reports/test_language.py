"""The language of the page: every text can be said in another one, and the list of them is whole."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from string import Formatter
from xml.etree import ElementTree

import pytest
from jinja2 import Environment
from typer.testing import CliRunner

from bifusion_diag.cli.app import app
from bifusion_diag.diagnosis import assess_run, compare_runs
from bifusion_diag.diagnosis.comparing.groups import compare_groups
from bifusion_diag.diagnosis.comparing.sides import group_runs
from bifusion_diag.errors import UserError
from bifusion_diag.record.schema import Run
from bifusion_diag.reports import language, render_comparison, render_groups, render_run, write_run
from bifusion_diag.reports.language import speaking
from tests.reports.test_incidents import MODULES, capsule, incident, written
from tests.reports.texts import RECORD_WORDS, ROOT, constants, source_texts

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


def test_every_text_has_a_translation() -> None:
    known = language.catalogue("zh")
    assert [f"{where}: {text!r}" for text, where in source_texts().items() if text not in known] == []


def test_no_translation_is_left_that_nothing_says() -> None:
    said = source_texts().keys() | constants()
    assert [text for text in language.catalogue("zh") if text not in said] == []


def test_a_translation_has_the_fields_of_its_text() -> None:
    for text, translation in language.catalogue("zh").items():
        assert fields(text) == fields(translation), text


def fields(text: str) -> set[tuple[str | None, str | None, str | None]]:
    """Name, format and conversion of every field that `str.format` fills in."""
    return {(name, spec, how) for _, name, spec, how in Formatter().parse(text) if name is not None}


def test_words_of_records_are_those_that_are_written() -> None:
    for path, words in RECORD_WORDS.items():
        source = (ROOT / path).read_text(encoding="utf-8")
        for word in words:
            assert all(part in source for part in re.split(r" (?=\()", word)), f"{path}: {word}"


class Seen(HTMLParser):
    """The texts of a page that a reader sees, but for code: each with the tag that it stands in."""

    HIDDEN = ("script", "style", "code", "pre", "dd")  # dd: settings of the environment, stored incident evidence

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "wbr", "input"):
            self.open.append(tag)
        self.texts += [value for name, value in attrs if name in ("title", "aria-label", "alt") and value]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not set(self.open) & set(self.HIDDEN):
            self.texts.append(data)


def english(page: str, *names: str) -> list[str]:
    """Four English words or more one after the other, names of runs and modules left out."""
    seen = Seen()
    seen.feed(page)
    found = []
    for text in seen.texts:
        for name in names:
            text = text.replace(name, "")
        found += re.findall(r"[A-Za-z]{2,}(?:[ ,'’]+[A-Za-z]{2,}){3,}", text)
    return found


def test_a_comparison_is_in_chinese(baseline: Run, candidate: Run) -> None:
    with speaking("zh"):
        page = render_comparison([compare_runs(baseline, candidate)], baseline, [candidate])
    assert page.count('class="finding"') > 3
    assert english(page) == []


def test_a_run_with_incidents_is_in_chinese(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    folder = capsule(path, 41, {"modules": [{"name": name, "output_bad": 3} for name in MODULES]})
    trials = [
        {"name": "lower-lr", "patch": {"optim.lr": 2e-5}, "helps": True, "result": "finite, no spike",
         "gives_up": ["speed: every step moves a tenth as far"]},
        {"name": "skip-step", "result": "2 of 11 steps not finite, 3 spikes"},
        {"name": "as it was", "result": "as it was, bit for bit"},
    ]  # fmt: skip
    (folder / "what_if.json").write_text(json.dumps({"trials": trials}))
    run = written(path, incident(41), incident(50))
    with speaking("zh"):
        page = render_run(assess_run(run), run)
    assert "有限，无尖峰；代价：速度：每步只移动十分之一" in page
    assert "11 步中有 2 步非有限，3 个尖峰" in page
    stored = incident(41).explanation  # a text of the record, with the numbers of its step
    assert english(page, stored, stored.rstrip(".")) == []


def test_a_page_of_groups_is_in_chinese(baseline: Run, candidate: Run) -> None:
    sides = [
        [
            dataclasses.replace(
                run, header=dataclasses.replace(run.header, run_id=f"{run.header.run_id}-{seed}",
                                                settings={**run.settings, "training": {"seed": seed}})
            )
            for seed in (0, 1)
        ]
        for run in (baseline, candidate)
    ]  # fmt: skip
    reference, others = group_runs(sides[0], sides[1])
    with speaking("zh"):
        page = render_groups(compare_groups(reference, others[0]), reference.runs, others[0].runs)
    assert "检验了什么" in page
    assert english(page) == []


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
