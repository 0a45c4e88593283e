"""The command line: each command in a module of its own, imported when it is asked for."""

from importlib import import_module

import click

from lensnet_guard import __version__

_COMMANDS = {
    "train": "Train on text, or on a data set that only far memory can solve.",
    "eval": "Compare ways to pick a working context, LensNet among them, at equal length.",
    "generate": "Continue a text of any length with a trained model.",
    "export": "Write the weights of a run beside a frozen language model, to be given away.",
}


class _Lazy(click.Group):
    """Lists its commands without importing them: torch takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one."""
        if name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"megacontext.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what each does."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="megacontext")
def main() -> None:
    """MegaContext: a language model and its LensNet, trained under a call contract.

    Example: megacontext train --run-dir runs/first --steps 100
    """
    from megacontext.cli.streams import open_streams  # rich, which the help does not need

    open_streams()
