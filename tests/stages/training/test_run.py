"""What a run does to its process."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from stages.parameters.recognition import Training
from stages.training.run import Run, keep_memory

FAULTS = """
import resource, sys, torch
from stages.training.run import keep_memory
torch.set_num_threads(1)
sys.argv[1] == "kept" and keep_memory()
for count in (2, 100):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        tensors = [torch.zeros(2**21) for _ in range(8)]
        del tensors
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_freed_memory_is_taken_again_instead_of_asked_for_page_by_page() -> None:
    """Beside an allocator that gives back whatever is freed, as glibc does by itself only where the heap lies so."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    faults = {}
    for how in ("kept", "returned"):
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["returned"] > 100_000
    assert faults["kept"] < 0.1 * faults["returned"]


def test_no_other_allocator_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_memory() is False


def test_what_bits_depend_on_is_said_without_numba_too(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Training())
    assert run.environment["numba"] == importlib.metadata.version("numba")

    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("stages.training.run.version", missing)
    assert run.environment["numba"] is None
