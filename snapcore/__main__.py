"""`python -m snapcore` is the command line."""

from snapcore.cli import main

main()
