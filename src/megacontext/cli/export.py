"""``megacontext export``."""

from pathlib import Path

import click

from megacontext.cli.endings import EXIT_CODES, plain_endings, usage_errors
from megacontext.cli.streams import PipeConsole
from megacontext.training.exported import export

_HELP = """Write the weights that a run trained beside a frozen language model, without its state.

The folder can be given as --run-dir to eval and generate, and as --gists-of to train.

\b
Example:
  megacontext export --run-dir runs/mine --out mine
"""


@click.command("export", help=_HELP, epilog=EXIT_CODES)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder of the run.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write, new or empty."
)
def command(run_dir: Path, out: Path) -> None:
    """Export; `_HELP` is what a user reads."""
    with plain_endings():
        with usage_errors():
            folder = export(run_dir, out)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        PipeConsole(stderr=False, highlight=False).print(
            f"{folder}: {size:.1f} MB", markup=False, soft_wrap=True
        )
