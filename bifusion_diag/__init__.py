"""Find out why a training run is unstable.

The rooms, from the ground up: ``config``, ``record``, ``data`` · ``diagnosis``, ``model``, ``probes`` · ``reports`` ·
``training`` · ``cli``. Imports only point downwards; nothing heavy is imported here.
"""

__version__ = "0.1.0"
