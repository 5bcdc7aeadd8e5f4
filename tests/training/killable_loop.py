"""A training loop of a few milliseconds a step, to be killed: a model, checkpoints, a record, TensorBoard.

First it trains the run of its argument. Then it reads lines "path of run.json, beats, seconds", trains each in a child
process and answers with its status as of waitpid. The child's heart beats when its record has begun and after every
step; so many seconds after so many beats it is killed (-1: never). What is interrupted goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from bifusion_diag.probes.base import Reading
from bifusion_diag.probes.rows import RowBlock, pack
from bifusion_diag.record import RunHeader, RunWriter, TensorBoardSink
from bifusion_diag.training.checkpoint import checkpoint_folder, latest_checkpoint, restore_checkpoint, save_checkpoint

STEPS = 240
BLOCK = 7  # rows
CHECKPOINT_EVERY = 20
EDGES = (0.0, 1.0, 2.0, 1e9)


def train(out: Path, heart: int) -> None:
    """Train, from the latest checkpoint where there is one; `heart` is written to."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(6)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    first = None
    if any(checkpoint_folder(out).glob("step-*")):
        checkpoint = latest_checkpoint(checkpoint_folder(out))
        restore_checkpoint(checkpoint, model, optimizer)
        first = checkpoint.step
    names = tuple(f"grads/{name}" for name, _ in model.named_parameters())
    sink = TensorBoardSink(out.with_name("tensorboard"))
    with RunWriter(out, RunHeader("killed"), resume_at=first, tensorboard=sink) as writer:
        os.write(heart, b"!")
        block = RowBlock(writer, BLOCK)
        for step in range(first or 0, STEPS):
            x = torch.randn(32, 16)  # the generator's state is in the checkpoint
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
            readings = [Reading(("loss/total",), loss.detach().reshape(1)), Reading(names, norms)]
            if step % 3 == 0:
                counts = torch.histogram(x.abs().double(), torch.tensor(EDGES).double()).hist.float()
                readings.append(Reading(("gate/alpha",), counts, edges=EDGES))
            if step % 10 == 0:
                writer.event(step, "note", f"step {step}")
            optimizer.step()
            block.add(pack(step, readings, {"train/step": float(step)}))
            os.write(heart, b"!")
            done = step + 1
            if done % CHECKPOINT_EVERY == 0:
                block.flush()
                save_checkpoint(checkpoint_folder(out), done, model, optimizer, {})
        block.flush()


def serve(whole: Path) -> None:
    """Train without a kill, then as told in children: what PyTorch loads is loaded once."""
    listen, heart = os.pipe()
    train(whole, heart)  # its beats find room in the pipe
    os.close(listen)
    os.close(heart)
    print("ready", flush=True)
    for line in sys.stdin:
        path, beats, seconds = line.rsplit(maxsplit=2)
        listen, heart = os.pipe()
        child = os.fork()
        if not child:
            train(Path(path), heart)
            os._exit(0)
        os.close(heart)
        if int(beats) >= 0:
            for _ in range(int(beats)):
                os.read(listen, 1)
            time.sleep(float(seconds))
            os.kill(child, signal.SIGKILL)
        print(os.waitpid(child, 0)[1], flush=True)
        os.close(listen)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Path(sys.argv[1]))
