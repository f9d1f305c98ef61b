"""Which code made a result."""

import sys
from pathlib import Path

from data.files import digest, sha256

# Modules whose text cannot change a result: dvc.yaml does not name them, and a checkpoint survives their change.
# Packages hold a docstring; the others carry bytes, words and values, and make none. The schema of a task, with its
# defaults, is a dependency; reading it (`stages.parameters`) is not.
NO_DEPENDENCY = frozenset(
    {
        *("data", "models", "stages", "stages.distill", "stages.evaluate", "stages.export", "stages.teach"),
        "stages.generators",
        *("data.errors", "data.files", "stages.code", "stages.command", "stages.paths", "stages.records"),
        *("stages.parameters", "stages.parameters.shared"),
    }
)


def code_digest() -> str:
    """Digest of every project module that was imported and that can change a result.

    The schema of a task is left out: its values, defaults included, are digested as parameters.
    """
    files = {}
    for name, module in list(sys.modules.items()):
        spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
        own = spec.name if name == "__main__" and spec else name
        if file and own.split(".")[0] in ("data", "models", "stages") and not _exempt(own):
            files[own] = sha256(Path(file))
    return digest(files)


def _exempt(name: str) -> bool:
    return name in NO_DEPENDENCY or name.startswith("stages.parameters.")
