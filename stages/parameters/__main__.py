"""`python -m stages.parameters` checks params.yaml before anything runs."""

from stages import command
from stages.parameters import load

if __name__ == "__main__":
    command.run("parameters", "Check params.yaml: every mistake with its path.", lambda _: load(), key=None)
