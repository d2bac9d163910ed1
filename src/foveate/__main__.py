"""`python -m foveate`: the same as the command `foveate`."""

from foveate.cli.app import main

if __name__ == "__main__":
    main()
