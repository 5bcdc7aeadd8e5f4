"""The loop: stages, optimiser, checkpoints, and what a run records of itself."""

from bifusion_diag.training.trainer import Trainer, resume_training, start_training

__all__ = ["Trainer", "resume_training", "start_training"]
