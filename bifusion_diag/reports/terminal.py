"""The verdict in the terminal: at most 30 lines of a comparison, the same numbers as the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bifusion_diag.diagnosis.assess import RunAssessment
from bifusion_diag.diagnosis.comparing.attribution import Attribution
from bifusion_diag.diagnosis.comparing.gates import GateResult
from bifusion_diag.diagnosis.comparing.groups import GroupComparison, Tested
from bifusion_diag.diagnosis.comparing.pair import MeasurePair, RunComparison
from bifusion_diag.diagnosis.comparing.suspicion import Suspect
from bifusion_diag.diagnosis.criteria import Criterion
from bifusion_diag.diagnosis.definitions import definition_of
from bifusion_diag.diagnosis.findings import Finding
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.diagnosis.verdict import Verdict
from bifusion_diag.reports.language import tr
from bifusion_diag.reports.numbers import ratio_text, reading_text, text

LINES = 30  # of one comparison, with the two that say where the report lies
_FILES = 2
_SHOWN = (  # the measures of the terminal, the most telling first; the page and the JSON have all
    "bad_steps",
    "nonfinite_steps",
    "first_nonfinite_step",
    "spikes",
    "grad_norm/p50",
    "grad_norm/p99",
    "grad_norm/max",
    "grad_cv",
    "clipped_share",
    "update_ratio/p50",
    "clip/points/absmax",
    "projection/inf",
    "projection/valid_share",
    "gate/mean",
    "eval/miou",
    "eval/ap50",
    "throughput/step_seconds",
)
_FIRST = ("bad_steps", "grad_norm/p99", "eval/miou", "nonfinite_steps", "spikes")  # where there is no room for all
_STATE_STYLE = {"stable": "bold green", "less stable": "bold yellow", "unstable": "bold red"}
_RESULT_STYLE = {"pass": "green", "fail": "red", "not measured": "dim"}
_SEVERITY_STYLE = {"error": "bold red", "warning": "bold yellow", "note": "bold"}
_NAME_WIDTH = 24  # characters of a run's name, where there is room
_LEAST_NAME = 8
_LEAST_TITLE = 28  # characters of a measure's title: with fewer, a table of sides leaves its intervals out
_GAP = 2  # between columns
_LEAST_SHARE = 0.005  # of a difference: half a per cent
_SUSPECT = 0.2  # score above which something speaks against a setting
_ALL = 1_000_000


@dataclass
class _Page:
    """Lines to print; each text knows how many it may take."""

    console: Console
    verbose: bool
    lines: list[Text] = field(default_factory=list)

    def add(self, content: Text | str, most: int, style: str = "") -> None:
        """Add a text of at most so many lines; the rest is cut."""
        given = content if isinstance(content, Text) else Text(content, style=style)
        if not given.plain:
            return
        wrapped = list(given.wrap(self.console, self.console.width))
        if len(wrapped) > most and not self.verbose:
            last = wrapped[most - 1]
            last.truncate(self.console.width - 1, overflow="crop")
            last.rstrip()
            last.append("…")
            wrapped = wrapped[:most]
        self.lines += wrapped

    def print(self) -> None:
        """Print what was added, and begin anew."""
        for line in self.lines:
            self.console.print(line, soft_wrap=True)
        self.lines = []


def print_comparison(
    console: Console,
    comparison: RunComparison,
    *,
    group: GroupComparison | None = None,
    gates: Sequence[GateResult] = (),
    verbose: bool = False,
) -> None:
    """Print verdict, measures, criteria and findings of two runs, or of two sides of several runs.

    Args:
        console: to print to.
        comparison: of two runs; of several a side, the pair whose findings are shown.
        group: of the sides.
        gates: that were looked at.
        verbose: everything, however long.
    """
    head, tail = _Page(console, verbose), _Page(console, verbose)
    several = group is not None and len(group.baseline.runs) + len(group.candidate.runs) > 2
    _add_verdict(head, group.verdict if group is not None and several else comparison.verdict)
    if comparison.partings:
        first = comparison.partings[0]
        head.add(tr("The runs part at step {step}: {text}.", step=first.step, text=first.text), 2)
    _add_findings(tail, comparison.candidate.findings, 3)
    _add_difference(
        tail,
        group.attribution if group is not None else comparison.attribution,
        group.suspects if group is not None else comparison.suspects,
        verbose,
    )
    if group is not None:
        tail.add(tr(group.statement), 2, "dim")
    limits = [*(group.limits if group is not None and several else ()), *comparison.limits]
    _add_limits(tail, limits)
    _add_gates(tail, gates)
    room = LINES - _FILES - len(head.lines) - len(tail.lines) - len(comparison.candidate.criteria) - 1
    head.print()
    if group is not None and several:
        console.print(_table_of_sides(console, group, _ALL if verbose else room, verbose))
    else:
        console.print(_table_of_runs(console, comparison, _ALL if verbose else room, verbose))
    tail.print()


def print_run(
    console: Console, assessment: RunAssessment, *, gates: Sequence[GateResult] = (), verbose: bool = False
) -> None:
    """Print verdict, measures, criteria and findings of one run; arguments as of :func:`print_comparison`."""
    head, tail = _Page(console, verbose), _Page(console, verbose)
    _add_verdict(head, assessment.verdict)
    _add_findings(tail, assessment.findings, 5)
    _add_limits(tail, assessment.limits)
    _add_gates(tail, gates)
    room = LINES - _FILES - len(head.lines) - len(tail.lines) - len(assessment.criteria) - 1
    keys = [key for key in _SHOWN if isinstance(assessment.measures.readings.get(key), Quantity)]
    rows: list[_Row] = [
        (_title(key), [_value(assessment.measures.readings[key])]) for key in _fitting(keys, _ALL if verbose else room)
    ]
    rows += [(_criterion(console, criterion), [_result(criterion)]) for criterion in assessment.criteria]
    head.print()
    console.print(_table(console, [assessment.name], rows, verbose))
    tail.print()


_Row = tuple[str, list[Text]]  # a title and what stands beside it


def _table(
    console: Console, names: Sequence[str], rows: Sequence[_Row], verbose: bool, least: int = _LEAST_NAME
) -> Table:
    """A table without lines; each row is one line, unless everything is to be seen.

    Values are never cut. A title that is too long keeps its end after the colon and a name both its ends, which tell
    them apart; a name has at least so many characters.
    """
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    table.add_column("", no_wrap=not verbose)
    if verbose:
        for name in names:
            table.add_column(Text(name), justify="right")
        for title, cells in rows:
            table.add_row(Text(title), *cells)
        return table
    widths = [
        max([min(least, cell_len(name)), *(cell_len(cells[place].plain) for _, cells in rows)])
        for place, name in enumerate(names)
    ]
    room = console.width - sum(widths) - _GAP * len(names)
    spare = room - max([cell_len(title) for title, _ in rows], default=0)
    for place, name in enumerate(names):
        more = max(0, min(spare, min(_NAME_WIDTH, cell_len(name)) - widths[place]))
        widths[place] += more
        room, spare = room - more, spare - more
    for name, width in zip(names, widths, strict=True):
        table.add_column(Text(_both_ends(name, width)), justify="right", no_wrap=True, min_width=width)
    for title, cells in rows:
        table.add_row(Text(_with_its_end(title, max(room, 1))), *cells)
    return table


def _cut(given: str, width: int) -> str:
    return given if cell_len(given) <= width else set_cell_size(given, max(width - 1, 0)).rstrip() + "…"


def _both_ends(name: str, width: int) -> str:
    """A name in so many characters: what tells runs apart is often at the end, such as a seed."""
    tail = (width - 1) // 2
    if cell_len(name) <= width or tail < 1:
        return _cut(name, width)
    end = name[-tail:]
    return _cut(name, width - cell_len(end)) + end


def _with_its_end(title: str, width: int) -> str:
    """A title in so many characters: of "group: measure" the group is cut."""
    group, colon, measure = title.rpartition(": ")
    room = width - cell_len(colon) - cell_len(measure)
    return f"{_cut(group, room)}{colon}{measure}" if colon and room > 3 else _cut(title, width)


def _fitting(keys: Sequence[str], room: int) -> list[str]:
    """So many of the measures that the rest has room; at least three."""
    most = max(3, room)
    if len(keys) <= most:
        return list(keys)
    ranked = [*(key for key in _FIRST if key in keys), *(key for key in keys if key not in _FIRST)]
    kept = set(ranked[:most])
    return [key for key in keys if key in kept]


def _table_of_runs(console: Console, comparison: RunComparison, room: int, verbose: bool) -> Table:
    left, right = comparison.baseline, comparison.candidate
    pairs = {pair.key: pair for pair in comparison.measures}
    keys = [key for key in _SHOWN if key in pairs and _any_measured(pairs[key])]
    rows: list[_Row] = []
    for key in _fitting(keys, room):
        pair = pairs[key]
        rows.append((_title(key), [_value(pair.baseline), _value(pair.candidate), Text(ratio_text(pair.ratio))]))
    rows += [
        (_criterion(console, mine), [_result(mine), _result(theirs), Text("")])
        for mine, theirs in zip(left.criteria, right.criteria, strict=True)
    ]
    return _table(console, [left.name, right.name, tr("ratio")], rows, verbose)


def _table_of_sides(console: Console, group: GroupComparison, room: int, verbose: bool) -> Table:
    tested = {one.measure: one for one in group.tested}
    left, right = group.baseline, group.candidate
    keys = [key for key in _SHOWN if key in tested]
    shown = [tested[key] for key in (list(tested) if verbose else _fitting(keys, room))]
    judged: list[_Row] = [
        (
            tr(criterion.title),
            [*(_results([run.criteria[place] for run in side.runs]) for side in (left, right)), Text(""), Text("")],
        )
        for place, criterion in enumerate(right.runs[0].criteria)
    ]

    def rows(*, intervals: bool) -> list[_Row]:
        return [
            (
                tr(one.title),
                [_value(one.baseline), _value(one.candidate), Text(_difference(one, intervals)), Text(_p(one))],
            )
            for one in shown
        ] + judged

    whole = rows(intervals=True)
    values = sum(max(cell_len(cells[place].plain) for _, cells in whole) + _GAP for place in range(4))
    intervals = verbose or console.width - values >= _LEAST_TITLE
    names = [tr("baseline"), tr("candidate"), tr("difference [95 %]") if intervals else tr("difference"), "p"]
    return _table(console, names, whole if intervals else rows(intervals=False), verbose, _NAME_WIDTH)


def _results(criteria: Sequence[Criterion]) -> Text:
    """How many runs pass and fail."""
    counts = Counter(criterion.result for criterion in criteria)
    if not counts["pass"] and not counts["fail"]:
        return Text(tr("not measured"), style="dim")
    told = [tr("{count} {result}", count=counts[word], result=tr(word)) for word in ("pass", "fail") if counts[word]]
    return Text(", ".join(told), style="red" if counts["fail"] else "green")


def _difference(one: Tested, intervals: bool) -> str:
    if isinstance(one.difference, NotMeasured):
        return ""
    if one.interval is None or not intervals:
        return text(one.difference.value)
    return f"{text(one.difference.value)} [{text(one.interval.low)}, {text(one.interval.high)}]"


def _p(one: Tested) -> str:
    p = one.p if one.p_adjusted is None else one.p_adjusted
    return "" if p is None else f"{p:.2g}"


def _add_limits(page: _Page, limits: Sequence[str]) -> None:
    most = len(limits) if page.verbose else 3
    for limit in limits[:most]:
        page.add(tr(limit), 2, "dim")
    if len(limits) > most:
        page.add(tr("and {count} more limits (--verbose)", count=len(limits) - most), 1, "dim")


def _add_verdict(page: _Page, verdict: Verdict) -> None:
    state = (tr(verdict.state), _STATE_STYLE.get(verdict.state, "bold"))
    page.add(Text.assemble((tr("Verdict:"), "bold"), " ", state), 1)
    page.add(tr(verdict.sentence), 4)
    page.add(tr(verdict.detail), 3)
    if verdict.remedy:
        template = "Tried on a bad step, and it helped: {change}" if verdict.tried else "To try: {change}"
        page.add(tr(template, change=_changes(verdict.remedy)), 2)


def _changes(remedy: object) -> str:
    assert hasattr(remedy, "items")
    return " ".join(f"--set {key}={value}" for key, value in remedy.items())


def _add_findings(page: _Page, findings: Sequence[Finding], most: int) -> None:
    shown = findings if page.verbose else findings[:most]
    for finding in shown:
        line = Text.assemble(
            (tr(finding.severity), _SEVERITY_STYLE[finding.severity]), " ", tr(finding.title), " ",
            (f"({finding.rule})", "dim"),
        )  # fmt: skip
        page.add(line, 1)
        if finding.remedy:
            page.add(f"  → {_changes(finding.remedy)}", 1)
        if page.verbose:
            page.add(f"  {tr(finding.mechanism)}", 1, "dim")
    if len(findings) > len(shown):
        page.add(tr("and {count} more findings", count=len(findings) - len(shown)), 1, "dim")


def _add_difference(
    page: _Page, attribution: Sequence[Attribution], suspects: Sequence[Suspect], verbose: bool
) -> None:
    """What the candidate has more of, and which setting is to blame. What it has less of explains no bad step: the page
    shows that too."""
    parts = []
    for kind in ("module", "term"):
        most = next((one for one in _largest(attribution, kind) if (one.share or 0) > 0), None)
        if most is None:
            continue
        same = [one for one in attribution if one.measure == most.measure and (one.share or 0) >= _LEAST_SHARE]
        named = ", ".join(f"{one.name}: {100 * (one.share or 0):.0f} %" for one in same[: 10 if verbose else 2])
        parts.append(tr("{names} ({what})", names=named, what=most.title))
    if parts:
        page.add(tr("Share of the difference: {parts}", parts="; ".join(parts)), 2)
    for place, suspect in enumerate(suspects if verbose else [one for one in suspects if one.score > _SUSPECT][:2]):
        page.add(
            tr(
                "Suspect: {key} {baseline} → {candidate}. {reason}",
                key=suspect.key,
                baseline=suspect.baseline,
                candidate=suspect.candidate,
                reason=suspect.reason,
            ),
            1 if place else 2,
        )


def _largest(attribution: Sequence[Attribution], kind: str) -> list[Attribution]:
    """Of every measure of a kind, the module or term with the largest share of either sign."""
    found: dict[str, Attribution] = {}
    for one in attribution:
        if one.kind == kind:
            found.setdefault(one.measure, one)
    return list(found.values())


def _add_gates(page: _Page, gates: Sequence[GateResult]) -> None:
    for gate in gates:
        word = tr("FAIL") if gate.failed else tr("ok")
        line = Text.assemble(
            (f"{word} ", "bold red" if gate.failed else "green"), f"--fail-on {gate.gate}: ", tr(gate.reason)
        )
        page.add(line, 1)


def _criterion(console: Console, criterion: Criterion) -> str:
    """The title, with the threshold where the terminal has room for it."""
    return f"{tr(criterion.title)}: {tr(criterion.threshold)}" if console.width >= 100 else tr(criterion.title)


def _any_measured(pair: MeasurePair) -> bool:
    return isinstance(pair.baseline, Quantity) or isinstance(pair.candidate, Quantity)


def _title(key: str) -> str:
    definition = definition_of(key)
    grouped = key.startswith(("grad_norm/", "clip/", "projection/", "eval/", "update_ratio/"))
    return f"{tr(definition.group)}: {tr(definition.title)}" if grouped else tr(definition.title)


def _value(reading: Reading) -> Text:
    return Text(tr(reading_text(reading)), style="dim" if isinstance(reading, NotMeasured) else "")


def _unit(reading: Quantity) -> str:
    return f" {tr(reading.unit)}" if reading.unit and reading.value is not None else ""


def _result(criterion: Criterion) -> Text:
    number = (
        ""
        if isinstance(criterion.reading, NotMeasured)
        else f" ({reading_text(criterion.reading)}{_unit(criterion.reading)})"
    )
    return Text(tr(criterion.result) + number, style=_RESULT_STYLE[criterion.result])
