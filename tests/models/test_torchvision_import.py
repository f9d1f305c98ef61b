"""Importing torchvision, each time in a fresh process: operators cannot be taken back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import torch
from models.recognition import build
from models.torchvision_import import import_torchvision
description = {
    "network": {"name": "torchvision", "model": "resnet18"},
    "interface": {"classes": ["a", "b"], "channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3},
}
network = build(description)
build(description)
import_torchvision()
print(tuple(network.eval()(torch.rand(1, 3, 32, 32)).logits.shape), torch.ops.torchvision.nms.default._schema)
"""
MODELS = """
from torch import nn
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 7)
    def forward(self, x):
        return self.fc(x.mean((2, 3)))
def list_models():
    return ["resnet18"]
def get_model(name, weights):
    return Network()
"""
# torchvision's compiled extension declares its operators itself; a second declaration is an error.
MATCHING = """
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
print("declared by torchvision", end=" ")
"""
# Where the extension did not load, torchvision goes on to describe operators that nobody declared. The second import
# has to start afresh: submodules left by the first one are no attributes of a new package.
NOT_MATCHING = """
import torch
import torchvision.extension
for name in ("nms", "qnms"):
    @torch.library.register_fake(f"torchvision::{name}")
    def fake(dets, scores, iou_threshold):
        return dets
assert torchvision.extension
print("declared by us", end=" ")
"""


def in_a_fresh_process(*first: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, first))}
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_installed_torchvision_is_imported() -> None:
    done = in_a_fresh_process()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 2) torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.mark.parametrize(("package", "said"), [(MATCHING, "declared by torchvision"), (NOT_MATCHING, "declared by us")])
def test_missing_operators_are_declared_only_where_they_are_missing(tmp_path: Path, package: str, said: str) -> None:
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text(package)
    (folder / "extension.py").write_text("")
    (folder / "models.py").write_text(MODELS)
    done = in_a_fresh_process(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{said} (1, 2) torchvision::nms(Tensor dets, Tensor scores")


def test_another_mistake_of_torchvision_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('something else')")
    done = in_a_fresh_process(tmp_path)
    assert done.returncode == 1
    assert "something else" in done.stderr
