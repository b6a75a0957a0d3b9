"""`python -m loop`, for those whose shell has another `loop`."""

from loop.cli import main

# A process that vLLM spawns reads this module again.
if __name__ == "__main__":
    main()
