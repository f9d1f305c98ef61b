"""An empty MLflow per test: a copy of a database that is prepared once."""

import shutil
from pathlib import Path

import pytest

from pipelines import tracking


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a prepared database without runs. Preparing one takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.connect()
    return folder / tracking.DATABASE


@pytest.fixture
def root(empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project root with a prepared mlflow.db; the working directory."""
    shutil.copyfile(empty_mlflow, tmp_path / tracking.DATABASE)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "DISTILLERY_PIPELINE_RUN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
