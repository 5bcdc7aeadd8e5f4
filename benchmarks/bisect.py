"""Does `bisect` find planted culprits? Each is hidden among harmless differences of two real configurations.

    python -m benchmarks.bisect [--case NAME] [--json FILE]

Every case is a bisection as a user starts it, with real training runs of a small model on synthetic rooms (random CLIP
weights): settings that are bad alone, that are bad only together with another, two independent causes, settings that
are only valid together, and a control without a culprit. A case counts as found if the causes are exactly the planted
ones and the cure was checked by a run. "all mixtures" is what trying every mixture of the differences would take.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bifusion_diag.experiments.bisect import Request, bisect

Values = dict[str, Any]

#: Small, so that a run takes a second or two.
COMMON: Values = {
    "scale": "small",
    "training.batch_size": 1,
    "training.threads": 1,
    "training.stages": "none",
    "training.fingerprint_every": 0,
    "data.scenes": 3,
    "data.max_points": 400,
    "data.image_height": 48,
    "data.image_width": 64,
    "model.clip.width": 24,
    "model.clip.heads": 2,
    "model.backbone.layers": [1] * 8,
    "model.backbone.planes": [8] * 8,
    "model.decoder.layers": 1,
}
#: Of every candidate: what makes no run unstable.
HARMLESS: Values = {
    "losses.instance.focal_gamma": 1.5,
    "losses.instance.no_object_weight": 0.05,
    "losses.instance.match_class": 1.0,
    "losses.spatial_consistency.neighbours": 6,
    "model.backbone.bn_momentum": 0.1,
    "model.film_hidden": 24,
    "model.decoder.query_share": 0.7,
    "model.projection.depth_tolerance": 0.08,
    "data.augment.rotate": False,
    "data.augment.flip": 0.0,
    "data.superpoint_size": 0.3,
}
LARGE = 1e30


@dataclass(frozen=True)
class Case:
    """A bisection with known culprits.

    Attributes:
        name: of the case.
        causes: the planted ones, each the settings that are bad together.
        both: settings of both ends.
        oracle: when a run is bad.
        steps: of a run.
    """

    name: str
    causes: tuple[Values, ...]
    both: Values
    oracle: str = "unstable"
    steps: int = 12

    @property
    def expected(self) -> set[frozenset[str]]:
        """The keys of every cause."""
        return {frozenset(cause) for cause in self.causes}

    @property
    def ends(self) -> dict[str, Values]:
        """The settings of both ends by dotted key."""
        planted: Values = {key: value for cause in self.causes for key, value in cause.items()}
        return {"baseline": COMMON | self.both, "candidate": COMMON | self.both | HARMLESS | planted}


CONSTANT: Values = {"losses.schedule": "constant"}
NO_POSE: Values = {"data.flaws.lost_tracking": 1.0, "model.projection.sanitize": "none"}
NO_MATCH: Values = {"data.flaws.single_instance": 1.0, "losses.instance.empty_match": "nan"}

CASES = (
    # alone
    Case("learning rate", ({"optim.lr": 1e6},), {}),
    Case("weights of the instance loss", ({"losses.instance.parts": [LARGE] * 3},), {}),
    Case("temperature", ({"losses.clip_align.temperature": 1e-60},), CONSTANT),
    Case(
        "CLIP's weight, by its share of the loss",
        ({"losses.clip_align.weight": 1e3},),
        CONSTANT,
        "loss_share/clip_align>0.9",
        4,
    ),
    Case("learning rate, by a measure", ({"optim.lr": 1.0},), {}, "grad_norm/max>1000", 6),
    Case(
        "style and parts, only valid together",
        ({"losses.instance.style": "esam", "losses.instance.parts": [LARGE] * 5},),
        {},
    ),
    Case("a run that breaks off", ({"data.augment.translate_std": 1e20},), {}),
    # only together
    Case("learning rate and weight decay", ({"optim.lr": 0.1, "optim.weight_decay": 1e3},), {}),
    Case("empty match and rooms with one object", (NO_MATCH,), {}),
    Case("unchecked coordinates and lost poses", (NO_POSE,), {}),
    Case("schedule and CLIP's weight", (CONSTANT | {"losses.clip_align.weight": LARGE},), {}),
    Case("LoRA and its scale", ({"model.clip.tune": "lora", "model.clip.lora_alpha": LARGE},), {}),
    Case(
        "matcher, empty match and rooms with one object",
        (NO_MATCH | {"losses.instance.matcher": "sparse"},),
        {"losses.instance.matcher": "hungarian"},
    ),
    # two at once
    Case("learning rate; unchecked coordinates and lost poses", ({"optim.lr": 1e6}, NO_POSE), {}),
    # none
    Case("nothing planted", (), {}),
)


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Bisect, and compare with what was planted."""
    for name, values in case.ends.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(nested(values)))
    request = Request(
        str(folder / "baseline.yaml"),
        str(folder / "candidate.yaml"),
        steps=case.steps,
        seeds=1,
        oracle=case.oracle,
        out=folder / "out",
    )
    began = time.perf_counter()
    said = io.StringIO()
    result = bisect(request, Console(file=said, width=200), lambda: True)
    seconds = time.perf_counter() - began
    assert result is not None
    document = json.loads((folder / "out" / "bisect.json").read_text())
    pieces = len(document["differences"])
    causes = {
        frozenset(change.key for element in cause.elements for change in element.changes) for cause in result.causes
    }
    cured = result.cure is not None and result.cure.tried.outcome == "stable"
    right = causes == case.expected and (cured if case.causes else result.status == "candidate is not bad")
    return {
        "case": case.name,
        "found": right,
        "expected": sorted(map(sorted, case.expected)),
        "causes": sorted(map(sorted, causes)),
        "status": result.status,
        "cure": [] if result.cure is None else list(result.cure.assignments),
        "smallest": result.cure is not None and result.cure.smallest,
        "starts": [None if cause.start is None else cause.start.text for cause in result.causes],
        "differences": pieces,
        "runs": len(result.runs),
        "all_mixtures": 2**pieces,
        "seconds": round(seconds, 1),
        "said": said.getvalue(),
    }


def nested(values: Values) -> dict[str, Any]:
    """As a YAML file holds them."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *above, leaf = key.split(".")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def main() -> None:
    """Run the cases, print the table; exit code 1 if fewer than nine of ten are found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="only those whose name contains this; may be repeated")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.case or any(part in case.name for part in options.case)]
    results = []
    print(f"{'case':<54}{'found':>6}{'differ':>8}{'runs':>6}{'all mixtures':>14}{'seconds':>9}", flush=True)
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found = run_case(case, Path(folder))
        results.append(found)
        word = "yes" if found["found"] else "NO"
        print(
            f"{case.name:<54}{word:>6}{found['differences']:>8}{found['runs']:>6}{found['all_mixtures']:>14}"
            f"{found['seconds']:>9.1f}",
            flush=True,
        )
        if not found["found"]:
            print(f"    {found['status']}: found {found['causes']}, planted {found['expected']}", flush=True)
    right = sum(found["found"] for found in results)
    print(f"{right} of {len(results)} found; {sum(found['runs'] for found in results)} runs in all")
    if options.json is not None:
        options.json.write_text(json.dumps({"found": right, "of": len(results), "cases": results}, indent=1) + "\n")
    raise SystemExit(0 if right >= 0.9 * len(results) else 1)


if __name__ == "__main__":
    main()
