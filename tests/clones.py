"""The project as a user has it: for tests that type its commands."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def copy_sources(folder: Path, parameters: str = "params.yaml") -> None:
    """What a clone would hold, uncommitted changes included, with small parameters (of tests/) and no results."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "tests" / parameters, folder / "params.yaml")
    (folder / "dvc.lock").unlink(missing_ok=True)


class Project:
    """A folder with the project in it, and the commands that its user types."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        binaries = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "true",
            **{
                f"GIT_{role}_{what}": "test@example.org"
                for role in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")
            },
        }

    def run(self, *command: str, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        if code is not None:
            assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def stage(self, *arguments: str, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", *arguments, code=code, **environment)

    def stale(self) -> set[str]:
        return set(json.loads(self.run("dvc", "status", "--json").stdout))

    def edit(self, change: Callable[[dict], object]) -> None:
        parameters = yaml.safe_load(self.path("params.yaml").read_text())
        change(parameters)
        self.path("params.yaml").write_text(yaml.safe_dump(parameters, sort_keys=False))

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def restore(self) -> None:
        """Undo whatever a test did to parameters and results since the last commit."""
        self.run("git", "checkout", "-q", "--", ".")
        self.run("git", "clean", "-fdq", "-e", "reports")
        self.run("dvc", "checkout", "-q", "--force")

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)


def copy_tree(target: Path, parameters: str = "params.yaml") -> Project:
    """A repository of its own with the sources."""
    copy_sources(target, parameters)
    project = Project(target)
    project.run("git", "init", "-q")
    project.commit("start")
    return project


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one paragraph of a refusal: exit code 1, no traceback."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    text = done.stderr.strip()
    assert "\n\n" not in text
    assert text.startswith("error in "), text
    return text
