"""`python -m loop`, for those whose shell has another `loop`."""

from loop.cli import main

main()
