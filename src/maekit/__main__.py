"""The command, as ``python -m maekit``."""

from maekit.cli import command

if __name__ == "__main__":
    command()
