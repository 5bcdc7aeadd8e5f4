"""``bifusion-diag bisect``: from what the user gave to the answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bifusion_diag.config import ConfigError, Settings, load_settings, parse_value, preset_names
from bifusion_diag.diagnosis.thresholds import DEFAULT_THRESHOLDS, Thresholds
from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.experiments.bisect.differences import flat, space_of
from bifusion_diag.experiments.bisect.hunt import hunt
from bifusion_diag.experiments.bisect.journal import Journal
from bifusion_diag.experiments.bisect.laboratory import Laboratory
from bifusion_diag.experiments.bisect.oracle import UNSTABLE, read_oracle
from bifusion_diag.experiments.bisect.plan import read_budget
from bifusion_diag.experiments.bisect.result import Result, document
from bifusion_diag.experiments.bisect.show import print_plan, print_result, print_where
from bifusion_diag.files import write_text
from bifusion_diag.probes.catalogue import make_probes
from bifusion_diag.record import codec

RESULT = "bisect.json"


@dataclass(frozen=True)
class Request:
    """What the user gave.

    Attributes:
        baseline: a preset's name or a YAML file.
        candidate: likewise.
        steps: of a run.
        seeds: how many a stable set is run on; the first is that of the baseline's settings.
        config: a YAML file with settings that both have.
        overrides: ``key=value``, likewise.
        oracle: when a run is bad.
        thresholds: of the oracle.
        probes: that measure in every run.
        budget: "30min" or "40runs".
        out: folder of journal, records and result.
        resume: there must be a bisection to go on with.
    """

    baseline: str
    candidate: str
    steps: int
    seeds: int
    config: Path | None = None
    overrides: Sequence[str] = ()
    oracle: str = UNSTABLE
    thresholds: Thresholds = DEFAULT_THRESHOLDS
    probes: Sequence[str] = ()
    budget: str | None = None
    out: Path = Path("runs/bisect")
    resume: bool = False


def bisect(request: Request, console: Console, go_on: Callable[[], bool]) -> Result | None:
    """Plan, ask, search, write bisect.json.

    Args:
        request: what to do.
        console: where plan, progress and result are shown.
        go_on: asked once the plan was shown.

    Returns:
        What was found; None where the plan was not to be carried out.

    Raises:
        UserError: bad input.
        KeyboardInterrupt: a signal came; the same command goes on.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a bisection is one process: start it without torchrun")
    common = common_settings(request.config, request.overrides)
    ends = [settings_of(name, common) for name in (request.baseline, request.candidate)]
    space = space_of(ends[0], ends[1])
    oracle = read_oracle(request.oracle, request.thresholds)
    budget = read_budget(request.budget)
    make_probes(list(request.probes))
    seeds = [ends[0].training.seed + i for i in range(request.seeds)]
    head: dict[str, Any] = {
        "baseline": space.baseline.model_dump(mode="json"),
        "candidate": space.candidate.model_dump(mode="json"),
        "oracle": oracle.text,
        "thresholds": request.thresholds.model_dump(mode="json"),
        "steps": request.steps,
        "seeds": seeds,
        "probes": list(request.probes),
    }

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with Journal(request.out, head, must_exist=request.resume) as journal:
        laboratory = Laboratory(
            space,
            oracle,
            steps=request.steps,
            seeds=seeds,
            probes=request.probes,
            folder=request.out,
            journal=journal,
            budget=budget,
            tell=tell,
        )
        if done := len(laboratory.entries):
            tell(f"going on with {request.out}: {done} run{'s' if done > 1 else ''} done")
        plan = laboratory.estimate()
        print_plan(console, space, plan, oracle.words, request.steps, request.seeds)
        if not go_on():
            return None
        result = hunt(laboratory)
        text = codec.dumps(codec.encode(document(space, head, plan, result)))
        write_text(request.out / RESULT, text + "\n")
    print_result(console, result)
    print_where(console, request.out)
    return result


def settings_of(name: str, common: Mapping[str, Any]) -> Settings:
    """The settings of one end.

    Args:
        name: a preset or a YAML file.
        common: by dotted key, what wins over them.

    Raises:
        UserError: there is no such preset or file, or its settings are not valid.
    """
    if name in preset_names():
        return load_settings(name, values=common)
    path = Path(name)
    if path.is_file():
        return load_settings(config=path, values=common)
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{name}: there is no such file. Give a preset's name or a YAML file with settings.")
    raise UserError(f"{name!r} is neither a preset nor a YAML file.{near_matches(name, preset_names())}")


def common_settings(config: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What both ends have, by dotted key: of a file, and of ``key=value`` pairs, which win.

    Raises:
        UserError: unreadable, or it names a preset, which each end has of its own.
    """
    values: dict[str, Any] = {}
    if config is not None:
        try:
            content = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the config file {config}: {error}") from error
        if not isinstance(content, Mapping | None):
            raise ConfigError(f"the config file {config} must hold a mapping of settings")
        values |= flat({str(key): value for key, value in (content or {}).items()})
    for pair in overrides:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set takes key=value, for example training.batch_size=2; got {pair!r}")
        values[key.strip()] = parse_value(text)
    if "preset" in values:
        raise UserError("the common settings name a preset; the two ends of a bisection have their own. Leave it out.")
    return values
