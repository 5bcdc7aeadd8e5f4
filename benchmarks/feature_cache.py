"""What keeping CLIP's tokens takes off a training step: `bifusion` with and without the cache, step by step in turn.

    python -m benchmarks.feature_cache                       full scale, 4 scenes a step
    python -m benchmarks.feature_cache --scale small --json cache.json

Three models of the same weights take the same steps: one keeps nothing, one keeps tokens in memory, one in a folder.
The caches have seen the images before. The three losses of a step must be equal to the bit. On the CPU, seconds are the
process's CPU time, which other processes disturb less than the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bifusion_diag.config import Settings, load_settings
from bifusion_diag.data import Batch, BatchLoader, open_source
from bifusion_diag.errors import UserError
from bifusion_diag.model.build import build_model
from bifusion_diag.model.clip import ClipVisual
from bifusion_diag.model.segmenter import Segmenter
from bifusion_diag.training.determinism import choose_device, make_deterministic


@dataclass(frozen=True)
class Measurement:
    """Seconds are medians over the steps, ratios are medians of each step's own ratio to the model without a cache."""

    scale: str
    device: str
    threads: int
    images: int  # a step
    steps: int
    step_seconds: dict[str, float]  # forward and backward
    clip_seconds: dict[str, float]  # CLIP's tower alone, on the same images
    step_ratio: dict[str, float]


def measure(settings: Settings, steps: int) -> Measurement:
    """Time the steps of the three models in turn."""
    training = settings.training
    device = choose_device(training.device)
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"none": (0.0, None), "memory": (1.0, None), "folder": (0.0, folder)}
        models = {}
        for kind, (memory, kept_in) in kinds.items():
            make_deterministic(training.seed, training.threads)
            clip = settings.model.clip.model_copy(update={"cache_memory": memory, "cache_folder": kept_in})
            model = settings.model.model_copy(update={"clip": clip})
            models[kind] = build_model(settings.model_copy(update={"model": model})).to(device).train()
        source = open_source(settings.data, seed=training.seed)
        loader = BatchLoader(source, settings.data, batch_size=training.batch_size, seed=training.seed)
        whole: dict[str, list[float]] = {kind: [] for kind in kinds}
        tower: dict[str, list[float]] = {kind: [] for kind in kinds}
        for step in range(steps + 1):
            batch = loader.batch(step).to(device)
            losses = set()
            for kind, segmenter in models.items():
                clip_seconds = [timed_tower(segmenter, batch, device) for _ in range(2)][1]  # the first fills the cache
                seconds, loss = timed_step(segmenter, batch, device, seed=step)
                losses.add(loss)
                if step:  # the first step warms up
                    tower[kind].append(clip_seconds)
                    whole[kind].append(seconds)
            if len(losses) > 1:
                raise SystemExit(f"step {step}: the cache changed the loss: {losses}")
    return Measurement(
        scale=settings.scale,
        device=str(device),
        threads=torch.get_num_threads(),
        images=batch.images.shape[0] * batch.images.shape[1],
        steps=steps,
        step_seconds={kind: statistics.median(values) for kind, values in whole.items()},
        clip_seconds={kind: statistics.median(values) for kind, values in tower.items()},
        step_ratio={
            kind: statistics.median(ours / none for ours, none in zip(values, whole["none"], strict=True))
            for kind, values in whole.items()
        },
    )


def timed_step(model: Segmenter, batch: Batch, device: torch.device, *, seed: int) -> tuple[float, float]:
    """Seconds of a forward and backward pass, and the loss."""
    torch.manual_seed(seed)  # the queries are drawn
    began = now(device)
    loss = model(batch).loss.total
    loss.backward()
    seconds = now(device) - began
    model.zero_grad(set_to_none=True)
    return seconds, loss.item()


def timed_tower(model: Segmenter, batch: Batch, device: torch.device) -> float:
    """Seconds of CLIP's tower."""
    (tower,) = (module for module in model.modules() if isinstance(module, ClipVisual))
    began = now(device)
    tower(batch.images)
    return now(device) - began


def now(device: torch.device) -> float:
    """CPU time, or the clock once the device has done what it was given."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def show(result: Measurement) -> None:
    """Print one line a kind of cache."""
    print(f"bifusion, scale {result.scale}, {result.device}, {result.threads} thread(s), {result.images} images a step")
    print(f"{'tokens kept in':16}{'step [s]':>10}{'CLIP [s]':>10}{'step, ratio':>13}")
    for kind, seconds in result.step_seconds.items():
        print(f"{kind:16}{seconds:>10.3f}{result.clip_seconds[kind]:>10.4f}{result.step_ratio[kind]:>13.2f}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="full", choices=("full", "small"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    arguments = parser.parse_args()
    try:
        values = {
            "training.batch_size": arguments.batch_size,
            "training.threads": arguments.threads,
            "training.device": arguments.device,
        }
        result = measure(load_settings("bifusion", scale=arguments.scale, values=values), arguments.steps)
    except UserError as error:
        sys.exit(str(error))
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
