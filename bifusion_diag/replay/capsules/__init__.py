"""A bad step on disk, and run again from there."""
