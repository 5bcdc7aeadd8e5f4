"""The folder's own helpers, importable by name: the suite is imported without packages."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
