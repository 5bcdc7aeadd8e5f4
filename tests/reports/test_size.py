"""No run makes the page large: less is embedded, and what is left out is said."""

from __future__ import annotations

import dataclasses

import pytest

from bifusion_diag.diagnosis import assess_run, compare_runs
from bifusion_diag.record.schema import Event, Run
from bifusion_diag.reports import html, render_comparison, render_run
from bifusion_diag.reports.budget import BUDGETS, MAX_BYTES
from bifusion_diag.reports.page_settings import setting_tables


@pytest.fixture(scope="module")
def bulky(candidate: Run) -> Run:
    """A run with megabytes of settings, events and environment, and with its losses alone."""
    text = "<&" * 1500
    header = dataclasses.replace(
        candidate.header,
        settings={**candidate.settings, "big": {f"key{number}": f"{text}{number}" for number in range(1200)}},
        environment={f"entry{number}": text for number in range(300)},
        provenance={"data": text},
        command=text * 100,
    )
    events = [Event(step, "stage", text, {"name": text}) for step in range(0, 600, 2)]
    series = {name: one for name, one in candidate.all_series.items() if name.startswith(("loss/", "train/"))}
    return dataclasses.replace(candidate, header=header, events=events, all_series=series, error=text, status="failed")


def test_settings_without_end_are_cut_and_it_is_said(bulky: Run) -> None:
    html = render_run(assess_run(bulky), bulky)
    assert len(html.encode()) <= MAX_BYTES
    assert "more are in the record." in html


def test_many_runs_fit_too(bulky: Run) -> None:
    others = [
        dataclasses.replace(bulky, header=dataclasses.replace(bulky.header, name=f"run {number}"))
        for number in range(4)
    ]
    html = render_comparison([compare_runs(bulky, other) for other in others], bulky, others)
    assert len(html.encode()) <= MAX_BYTES
    for other in others:
        assert f"{other.header.name} is" in html


def test_texts_that_differ_beyond_the_cut_are_seen_to_differ(bulky: Run) -> None:
    long = "a" * 10_000
    runs = [
        dataclasses.replace(bulky, header=dataclasses.replace(bulky.header, settings={"key": long + end}))
        for end in ("one", "two")
    ]
    (row,) = setting_tables(runs, BUDGETS[-1])[0].differing
    assert row.texts[0] != row.texts[1]
    assert max(map(len, row.texts)) <= BUDGETS[-1].length


def test_a_page_that_no_budget_makes_small_gives_up_parts_and_says_which(
    candidate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "BUDGETS", BUDGETS[-1:])
    for most, given_up in ((1_000_000, False), (250_000, True), (60_000, True)):
        monkeypatch.setattr(html, "MAX_BYTES", most)
        page = render_run(assess_run(candidate), candidate)
        assert len(page.encode()) <= most
        assert "bifusion-fragile is unstable" in page
        assert ("Left out, as this page would be too large: Why: losses" in page) is given_up
    assert "Timeline." in page[page.index("Left out") :]
