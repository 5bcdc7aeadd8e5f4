"""What is averaged over few rows, or over none: BatchNorm at the coarse levels, and attention that sees no key."""

from __future__ import annotations

from bifusion_diag.diagnosis.phrase import say
from bifusion_diag.experiments.audit.bench import Bench
from bifusion_diag.experiments.audit.result import Cell, Draft, Section


def coarse(bench: Bench) -> Section:
    """Rows of each BatchNorm and masked rows of each attention, on the real batch."""
    draft = Draft("coarse", "Few rows")
    sights = bench.step.sights
    levels: dict[int, list[str]] = {}
    for name, rows in sights.rows.items():
        levels.setdefault(rows, []).append(name)
    table: list[list[Cell]] = [[rows, len(names), names[0]] for rows, names in sorted(levels.items())]
    draft.table("Rows that BatchNorm takes its statistics of", ("rows", "norms", "first"), table, shown=False)
    _rows(draft, bench, levels)
    bad = sum(rows for rows, _ in sights.masked_rows.values())
    total = sum(rows for _, rows in sights.masked_rows.values())
    masked = draft.number(
        "masked_rows", "attention rows that may see no key", bad, "rows", say("of {total}", total=total)
    )
    if bad:
        worst = max(sights.masked_rows, key=lambda name: sights.masked_rows[name][0])
        draft.report(
            "attention-masked-rows",
            "warning",  # as in a record: what becomes of it shows as a loss that is not finite
            say("{count} attention rows may see no key", count=bad),
            "The softmax of such a row is 0/0: NaN, or whatever the kernel makes of it.",
            masked,
            module=worst,
        )
    return draft.done()


def _rows(draft: Draft, bench: Bench, levels: dict[int, list[str]]) -> None:
    if not levels:
        return
    fewest = min(levels)
    own = bench.batch
    noted = draft.number(
        "fewest_rows",
        say("rows of {name}, the BatchNorm with the fewest", name=levels[fewest][0]),
        fewest,
        "rows",
        say("of {points} points in {scenes} scenes", points=len(own.xyz), scenes=own.batch_size),
    )
    if fewest < bench.thresholds.few_rows:
        draft.report(
            "few-row-batchnorm",
            "warning",
            say("{name} takes its statistics of {rows} rows", name=levels[fewest][0], rows=fewest),
            "In train mode the mean and the variance of so few rows depend on each of them; where the variance is "
            "tiny, the gain 1/√(variance + ε) is not, and the gradient reaches 1e3 and more while the loss looks "
            "normal.",
            noted,
            module=levels[fewest][0],
            remedy={"training.batch_size": 2 * bench.settings.training.batch_size},
        )
