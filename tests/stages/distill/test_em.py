"""EM's learner: whole iterations written out, who learns from what and how often, what is kept across a crash."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import mixtures
from mixtures import DROPOUT, PERCEPTRON, project

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project.write(tmp_path_factory.mktemp("toy"))


CASES: dict[str, dict[str, Any]] = {
    "card": {},
    "a perceptron": {"network": {"backbone": PERCEPTRON}},
    "goals": {"network": {"goals": 2}},
    "diagonal": {"network": {"covariance": "diagonal"}},
    "uniform gate": {"network": {"gate": "uniform"}},
    "one expert": {"network": {"experts": 1, "gate": "uniform"}},
    "more updates": {"expert_steps": 3, "gate_steps": 2},
    "mean over experts": {"reduction": "mean"},
    "the official decay": {"lr_total": "iterations", "expert_steps": 2},
    "no decay, weight decay, clipped": {"training": {"decay": "none", "weight_decay": 0.1, "clip": 0.05}},
}


@pytest.mark.parametrize("case", CASES)
def test_iterations_are_those_of_the_card(case: str, prepared: Path) -> None:
    mixtures.compare(*mixtures.learner(prepared, "em", **CASES[case]))


@pytest.mark.parametrize("case", ["card", "a perceptron"])
def test_gate_and_experts_do_not_reach_each_other(case: str, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, task = mixtures.learner(prepared, "em", **CASES[case])
    found = mixtures.watched(learner, task, monkeypatch)
    assert [update.name for update in found] == ["gate", "experts"] * 2
    for update in found:
        wanted = {"trunk", "mean", "covariance"} if update.name == "experts" else {"gate"}
        assert update.reached == update.moved == wanted


@pytest.mark.parametrize(
    ("fields", "experts", "gate"), [({}, 1, 1), (CASES["more updates"], 3, 2), (CASES["uniform gate"], 1, 0)]
)
def test_updates_and_batches_are_counted(fields: dict[str, Any], experts: int, gate: int, prepared: Path) -> None:
    learner, task = mixtures.learner(prepared, "em", **fields)
    assert set(learner.modules) == {"student"}
    context = mixtures.iterations(learner, task, 3)
    assert context.counts == {"experts": 3 * experts} | ({"gate": 3 * gate} if gate else {})
    assert {name: stream.position for name, stream in learner.streams.items()} == {
        "train": 3 * experts, "gate": 3 * gate
    }  # fmt: skip


def test_resumed_equals_uninterrupted(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixtures.crash(prepared, tmp_path, monkeypatch, "em", network={"backbone": DROPOUT})


def test_bfloat16_keeps_the_losses_in_float32(prepared: Path) -> None:
    ends = [mixtures.first_step(prepared, "em", training={"precision": p}) for p in ("32-true", "bf16-mixed")]
    mixtures.alike(*ends)


def test_likelihood_rises(prepared: Path) -> None:
    """In nats per action of the validation split; noise of two sides and a standard deviation of 0.1 around them."""
    training = {"iterations": 150, "batch": 64, "precision": "32-true"}
    learner, task = mixtures.learner(prepared, "em", training=training, network={"backbone": PERCEPTRON})
    student = learner.modules["student"]
    ends = []
    for count in (0, 150):
        mixtures.iterations(learner, task, count)
        student.eval()
        ends += task.monitor(student).values()
    assert ends[1] < ends[0] - 1
