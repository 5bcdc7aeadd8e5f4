"""A bad step and those after it under changes that may help."""
