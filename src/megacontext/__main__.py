"""``python -m megacontext``."""

from megacontext.cli import main

main()
