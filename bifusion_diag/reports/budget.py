"""How much a page holds, so that it is below 3 MB whatever the run is."""

from __future__ import annotations

from dataclasses import dataclass

from bifusion_diag.reports.zoom import DETAIL

MAX_BYTES = 2_900_000  # of a page, with room for what a mail gateway adds


@dataclass(frozen=True)
class Budget:
    """Limits of what is embedded. What is left out is in the JSON beside the page or in the record, and is said.

    Attributes:
        detail: vertices a line that zooming may show.
        modules: rows of a table of modules.
        settings: lines of a table of settings.
        measures: lines of the table of measures.
        length: characters of one text that the user wrote.
        heatmaps: quantities that are drawn by module.
        runs: runs whose inside is drawn, beginning with the first.
        incidents: bytes of the incidents.
    """

    detail: int = DETAIL
    modules: int = 500
    settings: int = 2000
    measures: int = 2000
    length: int = 4000
    heatmaps: int = 3
    runs: int = 8
    incidents: int = 500_000


#: Tried in turn until the page fits.
BUDGETS = (
    Budget(),
    Budget(detail=3000, modules=250, settings=800, measures=800, length=600, heatmaps=2, runs=4, incidents=250_000),
    Budget(detail=2000, modules=60, settings=200, measures=250, length=160, heatmaps=1, runs=2, incidents=80_000),
    Budget(detail=2000, modules=20, settings=60, measures=80, length=80, heatmaps=1, runs=1, incidents=20_000),
)


def cut(text: str, length: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
