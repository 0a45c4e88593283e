"""``lensnet-guard``, which is ``python -m lensnet_guard`` too."""

from lensnet_guard._extras import require_or_exit


def main() -> None:
    """Run the command line, for which the extra named cli must be installed."""
    require_or_exit("cli", "lensnet-guard", code=2)
    from lensnet_guard.cli import main as command

    command(prog_name="lensnet-guard")


if __name__ == "__main__":
    main()
