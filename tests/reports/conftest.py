"""Realistic runs, written and read back through the run record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bifusion_diag.diagnosis import compare_runs, measure_record, measures_to_dict
from bifusion_diag.record import ModuleInfo, RecordReader, Run, RunHeader, RunWriter, load_run
from bifusion_diag.reports import render_comparison

BLOCKS = ("conv0", "block1.0", "block2.0", "block3.0", "block4.0", "convtr4", "block5.0", "block6.0", "block7.0")
FUSION = ("spatial_head", "global_head", "geometry", "film", "gate")
DECODER = ("layers.0", "layers.1.self_attention.attention.out_proj", "layers.2", "out_cls", "out_mask")
NAN_STEPS = (141, 142, 300, 301, 302, 420)
FROZEN, NO_GRADIENT, ZERO, FINITE, NON_FINITE = range(5)
SETTINGS: dict[str, Any] = {
    "scale": "small",
    "model": {"fusion": "lite", "projection": {"sanitize": "strict"}, "gate": {"early_steps": 3000}},
    "losses": {"clip_align": {"weight": 0.1, "temperature": 0.07}},
    "optim": {"lr": 2e-4, "clip_grad": 10.0},
    "training": {"batch_size": 2, "seed": 0, "reference_steps": 33_000},
    "data": {"source": "synthetic", "scenes": 64},
}


def _modules(fused: bool, extra: int) -> list[ModuleInfo]:
    names = [("encoder.clip", "encoder.clip")] if fused else []
    names += [(f"encoder.{name}", f"encoder.{name}") for name in FUSION[:2]] if fused else []
    names += [(f"encoder.backbone.{name}", "encoder.backbone") for name in BLOCKS]
    names += [(f"encoder.{name}", f"encoder.{name}") for name in FUSION[2:]] if fused else []
    names += [("pool", "pool")] + [(f"decoder.{name}", "decoder") for name in DECODER]
    names += [(f"decoder.extra.{index}", "decoder") for index in range(extra)]
    return [ModuleInfo(name, "Linear", order, part, 1000, 1000) for order, (name, part) in enumerate(names)]


def _losses(steps: NDArray[np.int64], fused: bool, rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    decay = np.exp(-steps / 250)
    terms = {"semantic": 1 + 4.2 * decay, "instance": 0.8 + 2.5 * decay}
    weights = {"semantic": 0.4, "instance": 1.0}
    if fused:
        terms |= {"clip_align": 0.4 + 2 * decay, "spatial_consistency": 0.1 + 0.2 * decay}
        weights |= {"clip_align": 0.1, "spatial_consistency": 0.05}
    columns: dict[str, NDArray[np.float64]] = {}
    for term, curve in terms.items():
        columns[f"loss/{term}/raw"] = curve * rng.lognormal(0, 0.12, steps.size)
        columns[f"loss/{term}/weighted"] = columns[f"loss/{term}/raw"] * weights[term]
    columns["loss/total"] = np.sum([columns[f"loss/{term}/weighted"] for term in terms], axis=0)
    return columns


def _fusion(steps: NDArray[np.int64], rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    columns = {}
    for where, scale in (("tokens", 6.0), ("head", 2.0), ("points", 0.4)):
        high = scale * rng.lognormal(0, 0.1, steps.size)
        numbers = {"min": -high * 0.9, "max": high, "absmax": high, "p99.9": high * 0.6, "norm_mean": high * 3}
        columns |= {f"clip/{where}/{name}": values for name, values in numbers.items()}
        columns |= {f"clip/{where}/{name}": np.zeros(steps.size) for name in ("share_gt_10", "nonfinite")}
    columns["clip/ratio_2d_3d"] = rng.lognormal(0.2, 0.05, steps.size)
    points = np.full(steps.size, 40_000)
    outside, occluded = rng.integers(4000, 8000, steps.size), rng.integers(6000, 12_000, steps.size)
    behind = rng.integers(500, 2000, steps.size)
    infinite = np.where((rng.random(steps.size) < 0.04) | np.isin(steps, NAN_STEPS), 10_000, 0)
    valid = points - outside - occluded - behind - infinite
    counts = {"points": points, "nan": 0 * points, "inf": infinite, "behind": behind, "outside": outside}
    counts |= {"occluded": occluded, "valid": valid}
    columns |= {f"projection/{name}": values for name, values in counts.items()}
    columns["projection/valid_share"] = valid / points
    mean = np.where(steps < 55, 0.36, 0.36 + 0.2 * (1 - np.exp(-(steps - 55) / 150)))
    columns |= {"gate/mean": mean, "gate/std": 0.1 + 0 * mean, "gate/nonfinite": 0 * mean}
    columns |= {"gate/share_lt_0.05": 0.01 + 0 * mean, "gate/share_gt_0.95": 0.02 + 0 * mean}
    return columns


def _gradients(
    steps: NDArray[np.int64], norm: NDArray[np.float64], modules: list[ModuleInfo], rng: np.random.Generator
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.bool_]]]:
    columns, missing = {}, {}
    for module in modules:
        share = 0.02 + 0.4 * ((module.order * 7) % 11) / 11
        values = norm * share * rng.lognormal(0, 0.2, steps.size)
        state = np.where(np.isfinite(norm), FINITE, NON_FINITE)
        if module.name == "encoder.clip":
            state[:] = FROZEN
        elif module.name == "encoder.global_head":
            state[:] = NO_GRADIENT
        elif module.name == "encoder.gate":
            state[steps < 55] = ZERO
            values[steps < 55] = 0
        elif module.part == "decoder":  # the failure starts upstream of the decoder
            state = np.where(state == NON_FINITE, FINITE, state)
            values = np.where(np.isfinite(values), values, 0.5)
        columns[f"grads/{module.name}/param_norm"] = values
        columns[f"grads/{module.name}/output_norm"] = values * 0.3
        columns[f"grads/{module.name}/state"] = state
        for name in ("param_norm", "output_norm"):
            missing[f"grads/{module.name}/{name}"] = state <= NO_GRADIENT
    return columns, missing


def _instruments(
    steps: NDArray[np.int64], modules: list[ModuleInfo], rng: np.random.Generator
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.bool_]]]:
    """What the probes updates, loss_gradients (every 50 steps), throughput and data record."""
    columns = {f"updates/{module.name}/ratio": 1e-3 * rng.lognormal(0, 0.5, steps.size) for module in modules}
    columns["updates/pool/ratio"][77] = 0.5
    columns["updates/encoder.clip/ratio"][:] = 0
    terms = {"semantic": 0.2, "instance": 0.7, "clip_align": 0.1}
    for term, share in terms.items():
        columns[f"loss_gradients/{term}/share"] = share + 0.01 * rng.normal(size=steps.size)
    for pair, cosine in (("semantic/instance", 0.4), ("semantic/clip_align", -0.3), ("instance/clip_align", 0.1)):
        columns[f"loss_gradients/cosine/{pair}"] = cosine + 0.01 * rng.normal(size=steps.size)
    missing = {name: steps % 50 > 0 for name in columns if name.startswith("loss_gradients/")}
    for phase, seconds in {"data": 0.1, "forward": 0.3, "backward": 0.6, "update": 0.05, "step": 1.0}.items():
        columns[f"throughput/{phase}_seconds"] = seconds * rng.lognormal(0, 0.05, steps.size)
    columns["throughput/data_seconds"][400] = 60.0  # the model was evaluated
    columns["throughput/peak_resident_mib"] = np.full(steps.size, 2048.0)
    columns["data/pose/nonfinite"] = np.zeros(steps.size)
    return columns, missing


def write_run(
    path: Path,
    *,
    name: str,
    preset: str,
    steps: int = 600,
    fused: bool = True,
    nan_steps: tuple[int, ...] = (),
    nan_loss_steps: tuple[int, ...] = (),
    spikes: Mapping[int, float] | None = None,
    extra_modules: int = 0,
    settings: Mapping[str, Any] = SETTINGS,
) -> Run:
    """Write a run of realistic size and noise, with the given flaws, and read it back."""
    rng = np.random.default_rng(len(preset))
    at = np.arange(steps)
    modules = _modules(fused, extra_modules)
    losses = _losses(at, fused, rng)
    norm = (2 + 30 * np.exp(-at / 40)) * rng.lognormal(0, 0.35, steps)
    for step, factor in (spikes or {}).items():
        norm[step] *= factor
    norm[list(nan_steps)] = np.nan
    for step in nan_loss_steps:
        losses["loss/instance/raw"][step] = losses["loss/instance/weighted"][step] = losses["loss/total"][step] = np.nan
    gradients, missing = _gradients(at, norm, modules, rng)
    loop = {
        "train/grad_norm": norm,
        "train/clip_coefficient": np.minimum(1, 10 / norm),
        "train/lr": 2e-4 * (1 - at / steps),
    }
    instruments, more_missing = _instruments(at, modules, rng) if fused and steps > 500 else ({}, {})
    columns = {**losses, **loop, **(_fusion(at, rng) if fused else {}), **gradients, **instruments}
    missing |= more_missing
    header = RunHeader(
        run_id=name, name=name, created="2026-01-01T03:00:00+00:00", preset=preset,
        command=f"bifusion-diag train --model {preset} --scale small --steps {steps} --probe all --out {path.name}",
        settings={**settings, "preset": preset, "training": {**settings["training"], "steps": steps}},
        environment={"python": "3.11.9", "torch": "2.4.0", "device": "cpu", "threads": 2, "deterministic": True},
        provenance={"clip_weights": "random", "data": "synthetic rooms", "labels": "ground truth (synthetic)",
                    "scenes_per_epoch": 64},
        parameters={"encoder.backbone": {"total": 1_203_440, "trainable": 1_203_440}} | (
            {"encoder.clip": {"total": 86_192_640, "trainable": 0}} if fused else {}),
        modules=modules, probes=["grads", "losses"] + (["clip", "projection", "gate"] if fused else []),
        steps_planned=steps, units={"loss/*": "", "train/step_seconds": "s"},
    )  # fmt: skip
    with RunWriter(path, header) as writer:
        writer.append(at, columns, missing)
        if fused:
            edges = np.linspace(0, 1, 33)
            centre = (edges[1:] + edges[:-1]) / 2
            counts = 4000 * np.exp(-(((centre[None] - columns["gate/mean"][:, None]) / 0.09) ** 2)).round()
            counts[:, 3] += 3000
            writer.append_histogram("gate/alpha", at, counts, edges)
        for share, stage in ((0, "S0"), (1 / 11, "S1"), (8 / 11, "S2")):
            writer.event(int(share * steps), "stage", f"stage {stage} begins", name=stage)
        for step in (*nan_steps, *nan_loss_steps):
            writer.event(step, "incident", "non-finite step", scenes=[f"synthetic-{step:06d}(seed 0)"])
        writer.finish("completed", measures={})
    measures = measure_record(RecordReader(writer.folder))
    run = load_run(path)
    run.measures.update(measures_to_dict(measures))
    return run


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A stable 3D baseline."""
    return write_run(
        tmp_path_factory.mktemp("runs") / "baseline.json", name="baseline-5cm", preset="baseline-5cm", fused=False
    )


@pytest.fixture(scope="session")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fused run with non-finite steps, a non-finite loss term and spikes."""
    fragile = {**SETTINGS, "model": {**SETTINGS["model"], "projection": {"sanitize": "replace"}}}
    return write_run(
        tmp_path_factory.mktemp("runs") / "fragile.json", name="bifusion-fragile", preset="bifusion-fragile",
        nan_steps=NAN_STEPS, nan_loss_steps=(233,), spikes={90: 30.0, 360: 60.0, 361: 25.0, 500: 45.0},
        settings=fragile,
    )  # fmt: skip


@pytest.fixture(scope="session")
def writer() -> Callable[..., Run]:
    """The writer of further runs."""
    return write_run


@pytest.fixture(scope="session")
def comparison_html(baseline: Run, candidate: Run) -> str:
    """The page of the candidate against the baseline."""
    return render_comparison([compare_runs(baseline, candidate)], baseline, [candidate])
