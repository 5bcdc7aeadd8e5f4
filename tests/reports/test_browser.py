"""The page in a real browser: headless Chromium."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bifusion_diag.diagnosis import assess_run, compare_runs
from bifusion_diag.record.schema import Event, Run
from bifusion_diag.reports import render_comparison, render_run
from bifusion_diag.reports.language import speaking

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


HOSTILE = "<script>window.bad=1</script>\"'><img src=x onerror=window.bad=2><b>bold</b>{{ 7*7 }}"
WIDTHS = (400, 1024, 1920)


def hostile(run: Run) -> Run:
    """The run with markup for its name, a module, a setting, a sample, events and an incident."""
    incident = {
        "kind": "nonfinite-loss", "mechanism": "empty-selection", "title": HOSTILE, "explanation": HOSTILE,
        "terms": [HOSTILE], "samples": [{"name": HOSTILE, "why": HOSTILE}], "capsule": f"/runs/{HOSTILE}",
        "evidence": {HOSTILE: HOSTILE}, "cause": {"module": HOSTILE, "direction": "loss"},
    }  # fmt: skip
    module = HOSTILE.replace("/", "")
    series = dict(run.all_series)
    for kind in ("state", "param_norm"):
        name = f"grads/{module}/{kind}"
        series[name] = dataclasses.replace(series[f"grads/pool/{kind}"], name=name)
    header = dataclasses.replace(
        run.header, name=HOSTILE, command=HOSTILE, settings={**run.settings, HOSTILE: HOSTILE},
        provenance={**run.provenance, "data": HOSTILE}, environment={HOSTILE: HOSTILE},
    )  # fmt: skip
    events = [
        *run.events,
        Event(50, "stage", HOSTILE, {"name": HOSTILE}),
        Event(141, "non-finite", HOSTILE, {"scenes": [HOSTILE], "incident": incident}),
    ]
    return dataclasses.replace(run, header=header, all_series=series, events=events, status="failed", error=HOSTILE)


@pytest.fixture(scope="module")
def pages(
    tmp_path_factory: pytest.TempPathFactory,
    comparison_html: str,
    baseline: Run,
    candidate: Run,
    writer: Callable[..., Run],
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    bad = hostile(candidate)
    long = writer(folder / "long.json", name="long", preset="bifusion", steps=6000, fused=False, spikes={4321: 50.0})
    texts = {
        "comparison": comparison_html,
        "hostile": render_comparison([compare_runs(baseline, bad)], baseline, [bad]),
        "long": render_run(assess_run(long), long),
    }
    with speaking("zh"):
        texts["comparison.zh"] = render_comparison([compare_runs(baseline, candidate)], baseline, [candidate])
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize("name", ["comparison", "comparison.zh", "hostile"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_opens_quietly_and_fits(browser: Any, pages: dict[str, Path], name: str, theme: str) -> None:
    context = browser.new_context(viewport={"width": WIDTHS[0], "height": 900}, color_scheme=theme)
    try:
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        address = pages[name].as_uri()
        page.goto(address)
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert said == []
        assert [url for url in asked if url != address and not url.startswith("data:")] == []
        assert page.evaluate("document.documentElement.lang") == ("zh-Hans" if name.endswith("zh") else "en")
        assert page.evaluate("getComputedStyle(document.body).fontSize") == "16px"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 254)", "dark": "rgb(21, 22, 26)"}[theme]
        empty = "[...document.querySelectorAll('h1, h2, h3, h4, summary, th[scope], figcaption b, button, a')]"
        empty += ".filter(one => !one.textContent.trim() && !one.hidden).map(one => one.outerHTML)"
        missing = [one for one in page.evaluate(empty) if "<svg" not in one and "<use" not in one and "<g" not in one]
        assert [one for one in missing if not one.startswith("<a ")] == []
    finally:
        context.close()


def test_text_that_holds_html_stays_text(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["hostile"].as_uri())
    page.wait_for_timeout(100)
    assert page.evaluate("window.bad") is None
    assert page.evaluate("document.querySelectorAll('main img, main b > b, main script').length") == 0
    assert page.evaluate("[...document.querySelectorAll('b')].filter(one => one.textContent === 'bold').length") == 0
    shown = page.inner_text("main")
    assert shown.count("<script>window.bad=1</script>") > 5
    assert "{{ 7*7 }}" in shown
    page.fill(".tools input", "<script>")
    page.hover("#timeline svg", position={"x": 500, "y": 300})
    assert "<script>" in page.inner_text("#readout")
    assert page.evaluate("window.bad") is None
    page.close()


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


def test_modules_can_be_searched_and_sorted(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["comparison"].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    column = """[...document.querySelectorAll('#modules0 tbody tr')].filter(row => !row.hidden)
        .map(row => [row.cells[0].innerText, row.cells[2].dataset.v])"""
    page.fill("input[data-table]", "GATE")
    assert [name for name, _ in page.evaluate(column)] == []  # the baseline has no gate
    page.fill("input[data-table]", "BACKBONE.BLOCK")
    assert len(page.evaluate(column)) == 7
    page.fill("input[data-table]", "")
    before = page.evaluate(column)
    head = page.locator("#modules0 thead th").nth(2)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    values = [float(value) for _, value in page.evaluate(column) if value]
    assert values == sorted(values, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")
    values = [float(value) for _, value in page.evaluate(column) if value]
    assert values == sorted(values)
    page.keyboard.press("Enter")
    assert page.evaluate(column) == before
    assert head.get_attribute("aria-sort") is None
    page.close()


def test_the_rows_of_a_heat_map_can_be_sorted_and_searched(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["comparison"].as_uri())
    order = """report.rows.heatmap.filter(row => row.panel === 1)
        .map(row => [document.getElementById('heatmap-' + row.ids.at(-1)), row])
        .filter(([label]) => label.style.display !== 'none')
        .sort(([one], [other]) => one.getBoundingClientRect().top - other.getBoundingClientRect().top)
        .map(([, row]) => [row.name, row.norm])"""
    executed = page.evaluate(order)
    page.select_option("#heatmap .tools select", "norm")
    norms = [norm for _, norm in page.evaluate(order) if norm is not None]
    assert norms == sorted(norms, reverse=True)
    page.select_option("#heatmap .tools select", "execution")
    assert page.evaluate(order) == executed
    page.fill("#heatmap .tools input", "gate")
    assert [name for name, _ in page.evaluate(order)] == ["encoder.gate"]
    page.close()


def test_zoom_shows_what_was_hidden_and_goes_back(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(pages["long"].as_uri())
    curve = "document.querySelector('#timeline [id^=timeline-curve] path').getAttribute('d')"
    points = f"{curve}.match(/-?[\\d.]+ -?[\\d.]+/g).map(one => Number(one.split(' ')[0]))"
    before = page.evaluate(curve)
    box = page.evaluate("JSON.parse(document.getElementById('timeline').dataset.time)")
    left, right, first, last = box
    inside = [left + (step - first) / (last - first) * (right - left) for step in (3000, 3300)]
    drawn = sum(inside[0] <= x <= inside[1] for x in page.evaluate(points))
    assert drawn <= 110  # of 300 steps, of which min–max reduction drew a third
    frame = page.locator("#timeline svg")
    frame.scroll_into_view_if_needed()
    bounds = frame.bounding_box()
    scale = bounds["width"] / page.evaluate("document.querySelector('#timeline svg').viewBox.baseVal.width")
    page.mouse.move(bounds["x"] + inside[0] * scale, bounds["y"] + 200)
    page.mouse.down()
    page.mouse.move(bounds["x"] + inside[1] * scale, bounds["y"] + 200, steps=3)
    page.mouse.up()
    shown = [x for x in page.evaluate(points) if left <= x <= right]
    assert 290 <= len(shown) <= 310  # each step
    assert np.ptp(shown) > 0.95 * (right - left)
    ticks = page.evaluate(
        "[...document.querySelectorAll('#timeline .timeaxis text')].map(one => Number(one.textContent))"
    )
    names = """[...document.querySelectorAll('#timeline [id^=timeline-text]')]
        .filter(one => /text\\d+$/.test(one.id) && one.style.display === '').map(one => one.textContent.trim())"""
    assert page.evaluate(names) == ["S1"]  # it began before, and lasts
    assert 3 <= len(ticks) <= 12
    assert all(2990 <= tick <= 3310 for tick in ticks)
    cursors = page.evaluate("document.querySelectorAll('.cursor').length")
    assert cursors > 2
    page.click("#readout button")
    assert page.evaluate(curve) == before
    assert page.locator("#readout").is_hidden() or "step" in page.inner_text("#readout")
    page.close()


def test_the_keyboard_reaches_everything(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(pages["long"].as_uri())
    page.focus("#timeline .scroll")
    page.keyboard.press("End")
    assert page.inner_text("#readout").startswith("step 5999")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#readout").startswith("step 5939")
    page.keyboard.press("Home")
    assert page.inner_text("#readout").startswith("step 0")
    whole = "[...document.querySelectorAll('#timeline .timeaxis text')].length"
    assert page.evaluate(whole) == 0
    page.keyboard.press("+")
    assert page.evaluate(whole) > 2
    page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate("Number(document.querySelector('#timeline .timeaxis text').textContent)") >= 700
    page.keyboard.press("Escape")
    assert page.evaluate(whole) == 0
    assert page.locator("#readout").is_hidden()
    page.close()


def test_a_command_can_be_copied(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(pages["comparison"].as_uri())
    page.click(".try button")
    page.wait_for_function("document.querySelector('.try button').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "--set model.projection.sanitize=strict"
    context.close()


def test_everything_is_there_without_javascript(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["comparison"].as_uri())
    text = page.inner_text("main")
    assert page.locator(".copied, .tools, .timeaxis").count() == 0  # nothing that would do nothing
    assert page.locator("#readout").is_hidden()
    assert page.locator("#keys").is_hidden()
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
    assert document.startswith(b"%PDF")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 688, "height": 1016})  # what A4 leaves within its margins, at 96 px an inch
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    for box in page.evaluate(
        "[...document.querySelectorAll('.plot svg')].map(one => [one.getBoundingClientRect().width, "
        "one.getBoundingClientRect().height])"
    ):
        assert box[0] <= 688
        assert box[1] <= 1016
    context.close()
