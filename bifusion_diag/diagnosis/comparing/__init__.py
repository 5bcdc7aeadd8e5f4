"""Runs against each other: pairs, sides of several seeds, what was tested, what makes up the difference, gates."""
