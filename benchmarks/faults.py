"""What the flight recorder makes of faults and of healthy but lively trainings.

    python -m benchmarks.faults                                all: some 100 faults, 21 controls; about half an hour
    python -m benchmarks.faults --workload images fusion       users' models only: about two minutes
    python -m benchmarks.faults --only bifusion/nan-output images/wrong-label
    python -m benchmarks.faults --quick                        every fourth case
    python -m benchmarks.faults --findings --remedies          and what the findings say, and whether the remedy cures
    python -m benchmarks.faults --json faults.json

Workloads: `bifusion` (the real trainer, small scale, every fault of `--inject`, started from the same 20 steps), three
models of users (`images`: CNN with BatchNorm, `sequences`: transformer, `fusion`: two modalities and a gate) under
``Monitor(..., recorder=FlightRecorder(step))``, and `ranks` (two processes). Each case is one training. Columns: the
incident's step minus the fault's; its kind; whether module, term and sample are right ("-": not judged; a case without
a guilty sample is right if none is named); whether the step ran again bit by bit in place, and its capsule in a new
process; how long the diagnosis took in step times. A control is right if there is no incident at all.

With --findings the record of each case is assessed as `bifusion-diag report` does it: is the finding about the step
the right one (:data:`benchmarks.fault_findings.RIGHT`), does it name module and term? With --remedies the capsule is
tried under every remedy that may help (`--what-if auto`, four steps), before: is the step stable with the best one?
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.fault_cases import CASES
from benchmarks.fault_findings import Score, score
from benchmarks.fault_run import (
    Outcome,
    make_prefix,
    replays,
    run_bifusion,
    run_case,
    run_control,
    run_ranks,
)
from bifusion_diag.training.faults import FAULTS

WORKLOADS = ("images", "sequences", "fusion", "bifusion", "ranks")
PRESETS = ("bifusion", "baseline-5cm")  # whose healthy runs are controls
QUICK = 4
_ROW = "{:38s} {:14s} {:>5s} {:20s} {:6s} {:6s} {:6s} {:8s} {:8s} {:>6s}  {}"
Run = Callable[[Path], Outcome]


def cases(workloads: Sequence[str]) -> dict[str, Run]:
    """Every case by name, and what runs it."""
    found: dict[str, Run] = {}
    for name, case in CASES.items():
        if name.split("/")[0] in workloads:
            found[name] = partial(run_case, case)
    if "bifusion" in workloads:
        for preset in PRESETS:
            found[f"bifusion/{preset}-from-scratch"] = partial(run_control, preset)
        for name, fault in FAULTS.items():
            if fault.where != "rank":
                found[f"bifusion/{name}"] = partial(_from_prefix, fault)
    if "ranks" in workloads:
        for name, fault in FAULTS.items():
            if fault.where == "rank":
                found[f"ranks/{name}"] = partial(run_ranks, fault)
    return found


def _from_prefix(fault: object, folder: Path) -> Outcome:
    prefix = folder / "prefix" / "run.json"
    if not prefix.parent.is_dir():
        make_prefix(folder)
    return run_bifusion(fault, prefix, folder)  # type: ignore[arg-type]


def measure(chosen: dict[str, Run], folder: Path) -> Iterator[Outcome]:
    """Run cases one after the other; each as soon as it is done."""
    for name, run in chosen.items():
        torch.set_num_threads(1)
        try:
            yield run(folder)
        except Exception as error:
            raise RuntimeError(f"the case {name} could not be run") from error


def row(outcome: Outcome) -> str:
    """One line of the table."""
    truth = outcome.truth
    if truth.place == "healthy":
        alarms = outcome.false_alarms
        verdict = "quiet" if not alarms else f"FALSE ALARM: {'; '.join(alarms[:3])}"
        return _ROW.format(truth.name, "healthy", "", "", "", "", "", "", "", "", verdict)
    delay = "never" if outcome.step is None else f"{outcome.step - truth.at:+d}"
    kind = outcome.kind + ("" if outcome.kind_right else " ?")
    remark = [] if outcome.detected else ["MISSED" if outcome.step is None else "LATE"]
    if outcome.module_right is False:
        remark.append(f"module {outcome.module}, not {' or '.join(truth.modules[:2]) or f'rank {truth.rank}'}")
    if outcome.term_right is False:
        remark.append(f"term {','.join(outcome.terms[:2]) or 'none'}, not {truth.term}")
    if outcome.sample_right is False:
        expected = ",".join(map(str, truth.samples)) or "none"
        remark.append(f"sample {','.join(map(str, outcome.samples[:3])) or 'none'}, not {expected}")
    if outcome.reproduced is not True and outcome.step is not None:
        remark.append(outcome.difference)
    if outcome.capsule is None and outcome.step is not None:
        remark.append(outcome.note)
    remark += [f"false alarm before: {alarm}" for alarm in outcome.false_alarms[:2]]
    remark += [f"warning: {text}" for text in outcome.warned[:2]]
    ratio = "-" if outcome.ratio is None else f"{outcome.ratio:.0f}"
    marks = [_mark(value) for value in (outcome.module_right, outcome.term_right, outcome.sample_right)]
    again = [_mark(outcome.reproduced), _mark(outcome.replayed)]
    return _ROW.format(truth.name, truth.place, delay, kind, *marks, *again, ratio, "; ".join(remark))


def _mark(value: bool | None) -> str:
    return "-" if value is None else "right" if value else "WRONG"


def totals(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The numbers that the issue asks for, as words."""
    faults = [o for o in outcomes if o.truth.place != "healthy"]
    controls = [o for o in outcomes if o.truth.place == "healthy"]
    loud, silent = [o for o in faults if not o.truth.silent], [o for o in faults if o.truth.silent]
    ratios = sorted(o.ratio for o in faults if o.ratio is not None)
    guilty = [o.sample_right for o in faults if o.truth.samples]
    innocent = [o.sample_right for o in faults if not o.truth.samples]
    return {
        "faults detected": _share([o.detected for o in faults]),
        "  non-finite ones, in the very step": _share([o.detected for o in loud]),
        f"  silent ones, within {10} steps": _share([o.detected for o in silent]),
        "kind right": _share([o.kind_right for o in faults]),
        "module (or rank) right": _share([o.module_right for o in faults]),
        "loss term right": _share([o.term_right for o in faults]),
        "guilty sample named": _share(guilty),
        "no innocent sample named": _share(innocent),
        "run again bit by bit in place": _share([o.reproduced for o in faults]),
        "capsules written": _share([o.capsule is not None for o in faults if o.step is not None]),
        "capsules bit-identical in a new process": _share([o.replayed for o in faults]),
        "diagnosis in step times, median and largest": (
            f"{ratios[len(ratios) // 2]:.0f}, {ratios[-1]:.0f}" if ratios else "-"
        ),
        "controls without an alarm": _share([not o.false_alarms for o in controls]),
        "false alarms before a fault": str(sum(len(o.false_alarms) for o in faults)),
    }


def judge_findings(outcomes: Sequence[Outcome], *, remedies: bool) -> dict[str, Score]:
    """The findings of every fault by its name; prints what is wrong."""
    scores: dict[str, Score] = {}
    print(f"{'fault':38s} {'rule of the finding':36s} {'remedy'}")
    for outcome in outcomes:
        if outcome.truth.place == "healthy":
            continue
        one = scores[outcome.truth.name] = score(outcome, remedies=remedies)
        marks = [] if one.rule_right else ["rule WRONG"]
        marks += ["module WRONG"] if one.module_right is False else []
        marks += ["term WRONG"] if one.term_right is False else []
        marks += ["not restored"] if one.restored is False else []
        marks += ["not named"] if one.named is False else []
        print(f"{outcome.truth.name:38s} {one.rule or 'none':36s} {one.remedy}  {'; '.join(marks)}", flush=True)
    return scores


def finding_totals(scores: Sequence[Score]) -> dict[str, str]:
    """Numbers of :func:`judge_findings`, as words."""
    return {
        "finding: right rule": _share([one.rule_right for one in scores]),
        "finding: right module": _share([one.module_right for one in scores]),
        "finding: right term": _share([one.term_right for one in scores]),
        "remedy: what-if restores stability": _share([one.restored for one in scores]),
        "remedy: settings that help are in the finding": _share([one.named for one in scores]),
    }


def _share(values: Sequence[bool | None]) -> str:
    judged = [value for value in values if value is not None]
    return f"{sum(judged)} of {len(judged)}" + (f" ({sum(judged) / len(judged):.0%})" if judged else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases, print the table; 1 if anything is missed or a control alarms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD/NAME", help="these cases alone")
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK}th case")
    parser.add_argument("--no-replay", action="store_true", help="do not replay the capsules")
    parser.add_argument("--findings", action="store_true", help="judge the findings, too")
    parser.add_argument("--remedies", action="store_true", help="with --findings: try the remedies before")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--keep", type=Path, help="keep records and capsules in this folder")
    options = parser.parse_args(arguments)
    chosen = cases(options.workload)
    if options.only:
        if unknown := set(options.only) - chosen.keys():
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(chosen)}")
        chosen = {name: run for name, run in chosen.items() if name in options.only}
    elif options.quick:
        chosen = dict(list(chosen.items())[::QUICK])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = []
        for outcome in measure(chosen, folder):
            outcomes.append(outcome)
            print(row(outcome), file=sys.stderr, flush=True)
        if not options.no_replay:
            replayed = replays([o.capsule for o in outcomes if o.capsule is not None])
            for outcome in outcomes:
                if outcome.capsule is not None:
                    outcome.replayed = replayed[outcome.capsule]["identical"]
                    if not outcome.replayed:
                        outcome.warned.append(f"replay: {replayed[outcome.capsule]['difference']}")
        scores = judge_findings(outcomes, remedies=options.remedies) if options.findings else {}
    titles = ("fault", "in", "step", "kind", "module", "term", "sample", "in place", "capsule", "× step")
    print(_ROW.format(*titles, ""))
    for outcome in outcomes:
        print(row(outcome))
    print()
    found = totals(outcomes)
    if scores:
        found |= finding_totals(list(scores.values()))
    for name, value in found.items():
        print(f"{name:46s}{value}")
    print(f"{len(outcomes)} cases in {time.perf_counter() - began:.0f} s")
    if options.json:
        report: dict[str, Any] = {"totals": found, "cases": [asdict(outcome) for outcome in outcomes]}
        report["findings"] = {name: asdict(one) for name, one in scores.items()}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    missed = [o for o in outcomes if o.false_alarms or o.detected is False]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
