"""The page in a real browser: headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bifusion_diag.diagnosis import assess_run, compare_runs
from bifusion_diag.record.schema import Run
from bifusion_diag.reports import render_comparison, render_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page in a browser: playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("the page in a browser: no chromium on this machine's PATH")
    with playwright.sync_playwright() as session:
        launched = session.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, baseline: Run, candidate: Run) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {
        "comparison": render_comparison([compare_runs(baseline, candidate)], baseline, [candidate]),
        "run": render_run(assess_run(candidate), candidate),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("name", ["comparison", "run"])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1440])
def test_it_opens_quietly_and_fits(browser: Any, pages: dict[str, Path], name: str, theme: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    try:
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        address = pages[name].as_uri()
        page.goto(address)
        assert said == []
        assert [url for url in asked if url != address and not url.startswith("data:")] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 254)", "dark": "rgb(21, 22, 26)"}[theme]
    finally:
        context.close()


def test_the_dark_theme_reaches_into_the_plots(browser: Any, pages: dict[str, Path]) -> None:
    colours = {}
    for theme in ("light", "dark"):
        context = browser.new_context(color_scheme=theme)
        page = context.new_page()
        page.goto(pages["comparison"].as_uri())
        colours[theme] = page.evaluate("getComputedStyle(document.querySelector('#timeline svg text')).fill")
        context.close()
    assert colours["light"] != colours["dark"]


def test_the_cursor_runs_over_all_plots_and_reads_values(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.goto(pages["comparison"].as_uri())
    page.hover("#timeline svg", position={"x": 500, "y": 300})
    readout = page.inner_text("#readout")
    assert readout.startswith("step ")
    assert "bifusion-fragile grad norm" in readout
    shown = page.evaluate("[...document.querySelectorAll('.cursor')].filter(line => line.style.display === '').length")
    context.close()
    assert shown == page_plots(pages["comparison"])


def page_plots(path: Path) -> int:
    """How many plots over time the page has."""
    return path.read_text(encoding="utf-8").count("data-time=")


def test_modules_can_be_searched(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(pages["run"].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.fill("input[type=search]", "GATE")
    rows = page.evaluate(
        "[...document.querySelectorAll('#modules0 tbody tr')].filter(r => !r.hidden).map(r => r.innerText)"
    )
    context.close()
    assert len(rows) == 1
    assert rows[0].startswith("encoder.gate")


def test_everything_is_there_without_javascript(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["comparison"].as_uri())
    text = page.inner_text("main")
    context.close()
    for words in (
        "is less stable than",
        "Non-finite gradient with a finite loss",
        "encoder.backbone.conv0",
        "To reproduce",
    ):
        assert words in text


def test_it_prints_on_a4(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(pages["comparison"].as_uri())
    document = page.pdf(format="A4", path=tmp_path / "report.pdf")
    context.close()
    assert document.startswith(b"%PDF")
