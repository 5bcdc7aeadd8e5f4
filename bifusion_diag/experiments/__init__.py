"""Runs the model to answer a question: what happened in that step, and what would have helped."""
