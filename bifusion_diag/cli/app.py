"""The ``bifusion-diag`` command.

Exit codes: 0 fine · 1 the run failed · 2 bad input · 130 interrupted (the record of what ran is valid).
"""

from __future__ import annotations

import errno
import io
import os
import sys

import typer
from rich.console import Console
from rich.markup import escape

from bifusion_diag.cli.audit import audit
from bifusion_diag.cli.bisect import bisect
from bifusion_diag.cli.compare import compare
from bifusion_diag.cli.import_ import import_
from bifusion_diag.cli.params import params
from bifusion_diag.cli.presets import presets
from bifusion_diag.cli.replay import replay
from bifusion_diag.cli.report import report
from bifusion_diag.cli.rules import rules
from bifusion_diag.cli.train import train
from bifusion_diag.cli.watch import watch
from bifusion_diag.errors import UserError

BAD_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS)  # what a user's path can cause

app = typer.Typer(
    name="bifusion-diag",
    help="Find out why a training run is unstable: train with probes on, compare runs, read an HTML stability report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("audit")(audit)
app.command("train")(train)
app.command("watch")(watch)
app.command("compare")(compare)
app.command("report")(report)
app.command("import")(import_)
app.command("replay")(replay)
app.command("bisect")(bisect)
app.command("rules")(rules)
app.command("presets")(presets)
app.command("params")(params)


def main() -> None:
    """Run the command line; bad input ends with a message and exit code 2, never with a traceback."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve a shared machine
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a pipe that knows no α
    try:
        app()
    except UserError as error:
        _refuse(str(error))
    except OSError as error:
        if error.errno not in BAD_PATH:
            raise
        _refuse(f"{error.filename or 'a file'}: {error.strerror}. Give another path.")


def _refuse(message: str) -> None:
    Console(stderr=True).print(f"[bold red]Error:[/] {escape(message)}", highlight=False, soft_wrap=True, emoji=False)
    sys.exit(2)
