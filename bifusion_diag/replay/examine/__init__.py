"""A bad step taken apart: where it began, of which term and sample, by which mechanism."""
