"""The project as a user has it: for tests that type its commands."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def copy_sources(folder: Path) -> None:
    """What a clone would hold, uncommitted changes included, with the small parameters and no results."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "tests" / "params.yaml", folder / "params.yaml")
    (folder / "dvc.lock").unlink(missing_ok=True)
