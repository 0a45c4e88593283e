"""``megacontext``, which is ``python -m megacontext`` too."""

from lensnet_guard._extras import require_or_exit


def main() -> None:
    """Run the command line, for which the extra named megacontext must be installed."""
    require_or_exit("megacontext", "megacontext", code=3)
    from megacontext.cli import main as command

    command()


if __name__ == "__main__":
    main()
