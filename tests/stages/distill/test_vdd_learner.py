"""VDD's learner: whole iterations written out, who learns from what and how often, what is kept across a crash."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.errors import UserError
from stages.distill import vdd
from stages.teach.policy import for_student
from stages.training import Run

sys.path.insert(0, str(Path(__file__).parent))
import mixtures
from mixtures import BESO, DROPOUT, PERCEPTRON, UNIFORM, project

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


# Whole iterations (card 3.2 to 3.6)

CASES: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "beso": {"teacher": BESO, "levels": UNIFORM},
    "the last level": {"teacher": BESO, "levels": {"kind": "last"}},
    "levels that fall": {"teacher": BESO, "levels": {"kind": "anneal", "low": 0.2, "high": 0.9, "iterations": 2}},
    "the lowest step and the highest": {"levels": {"kind": "steps", "low": 0, "high": 7}},
    "score of clean actions": {"vp_input": "scaled"},
    "perceptrons": {"network": {"backbone": PERCEPTRON}, "teacher": {"backbone": PERCEPTRON}},
    "a perceptron from a beso": {
        "network": {"backbone": PERCEPTRON}, "teacher": {**BESO, "backbone": PERCEPTRON}, "levels": UNIFORM,
    },
    "no trunk": {"network": {"backbone": {**PERCEPTRON, "layers": 0}}},
    "a teacher with a longer window": {"teacher": {"window": 5}},
    "windows of one step": {"network": {"window": 1, "backbone": PERCEPTRON}},
    "goals": {"network": {"goals": 2}},
    "diagonal": {"network": {"covariance": "diagonal"}},
    "uniform gate": {"network": {"gate": "uniform"}},
    "prelu": {"network": {"backbone": {**PERCEPTRON, "activation": "prelu"}}},
    "one sample": {"samples": 1},
    "five samples": {"samples": 5},
    "more updates": {"expert_steps": 3, "gate_steps": 2},
    "one update": {"expert_steps": 1},
    "no weight": {"weight": "none"},
    "mean over experts": {"reduction": "mean"},
    "lag": {"lag": 2},
    "lag, everything else": {"lag": 1, "weight": "none", "reduction": "mean", "network": {"covariance": "diagonal"}},
    "the official decay": {"lr_total": "iterations"},
    "no decay, weight decay, clipped": {"training": {"decay": "none", "weight_decay": 0.1, "clip": 0.05}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_iterations_are_those_of_the_card(case: str, prepared: Path) -> None:
    mixtures.compare(*mixtures.learner(prepared, **CASES[case]))


@pytest.mark.parametrize("actions", [1, 3])
def test_actions_of_other_widths(actions: int, tmp_path: Path) -> None:
    mixtures.compare(*mixtures.learner(project.write(tmp_path, actions=actions)))


# Who learns from what, and how often (property 4, card 3.6)


@pytest.mark.parametrize("case", ["ddpm", "beso", "lag", "perceptrons", "more updates", "score of clean actions"])
def test_property_4_no_gradient_goes_where_it_should_not(
    case: str, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, task = mixtures.learner(prepared, **CASES[case])
    found = mixtures.watched(learner, task, monkeypatch)
    assert {update.name for update in found} == {"experts", "gate"}
    for update in found:
        wanted = {"trunk", "mean", "covariance"} if update.name == "experts" else {"gate"}
        assert update.reached == update.moved == wanted


def calls(module: torch.nn.Module) -> list[tuple[int, ...]]:
    """Of every call from now on: shapes of actions and observations, and whether it has dropout."""
    found: list[Any] = []
    module.register_forward_hook(
        lambda own, inputs, _: found.append((*(tuple(x.shape) for x in inputs[:2]), own.training))
    )
    return found


@pytest.mark.parametrize(
    ("fields", "experts", "gate"),
    [({}, 2, 1), ({"expert_steps": 1, "gate_steps": 3}, 1, 3), ({"network": {"gate": "uniform"}}, 2, 0)],
)
def test_updates_batches_and_calls_of_the_teacher_are_counted(
    fields: dict[str, Any], experts: int, gate: int, prepared: Path
) -> None:
    """One call for all samples of an update, in which observations come once."""
    learner, task = mixtures.learner(prepared, **fields)
    seen, own = calls(learner.modules["teacher"]), calls(learner.modules["student"])
    context = mixtures.iterations(learner, task, 3)
    assert context.counts == {"experts": 3 * experts} | ({"gate": 3 * gate} if gate else {})
    assert {name: stream.position for name, stream in learner.streams.items()} == {
        "train": 3 * experts, "gate": 3 * gate
    }  # fmt: skip
    batch, window, size = mixtures.TRAINING["batch"], 3, 2
    assert seen == 3 * experts * [((batch * 3 * 2, window, size), (batch, window, 2), False)]
    assert own == 3 * experts * [((batch, window, 2), True)]


# Lagged experts (card 4, row 11)


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_lagged_experts_are_the_student_as_it_was(lag: int, prepared: Path) -> None:
    learner, task = mixtures.learner(prepared, lag=lag)
    states = [{key: value.clone() for key, value in learner.modules["student"].state_dict().items()}]

    def after() -> None:
        states.append({key: value.clone() for key, value in learner.modules["student"].state_dict().items()})
        wanted = states[(len(states) - 2) // lag * lag]
        for key, value in learner.modules["lagged"].state_dict().items():
            assert torch.equal(value, wanted[key]), key

    mixtures.iterations(learner, task, 7, after)
    assert not learner.modules["lagged"].training
    assert "lagged" not in mixtures.learner(prepared)[0].modules


def test_lagged_by_no_update_is_not_lagged(prepared: Path) -> None:
    """Renewed in every iteration of one update of the experts, they are the current ones."""
    ends = []
    for lag in (0, 1):
        learner, task = mixtures.learner(prepared, lag=lag, expert_steps=1)
        mixtures.iterations(learner, task, 4)
        ends.append(learner.modules["student"].state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], rtol=1e-9, atol=1e-10)
    other, task = mixtures.learner(prepared, lag=4, expert_steps=1)
    mixtures.iterations(other, task, 4)
    assert any(
        (value - ends[0][key]).abs().max() > 1e-4 for key, value in other.modules["student"].state_dict().items()
    )


# A crash, a seed, another precision


@pytest.mark.parametrize("fields", [
    {},
    {"lag": 3, "network": {"backbone": DROPOUT}},
    {"teacher": BESO, "levels": {"kind": "anneal", "low": 0.2, "high": 0.9, "iterations": 8}},
], ids=["ddpm", "lag and dropout", "levels that fall"])  # fmt: skip
def test_resumed_equals_uninterrupted(
    fields: dict[str, Any], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended between two renewals of the lagged experts."""
    mixtures.crash(prepared, tmp_path, monkeypatch, **fields)


def test_the_same_seed_gives_the_same_student(prepared: Path) -> None:
    def end(seed: int) -> dict[str, Tensor]:
        learner, task = mixtures.learner(prepared, training={"seed": seed})
        mixtures.iterations(learner, task, 2)
        return mixtures.weights(learner)

    first, again, other = end(0), end(0), end(1)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_bfloat16_keeps_the_losses_in_float32(prepared: Path) -> None:
    mixtures.alike(*(mixtures.first_step(prepared, training={"precision": p}) for p in ("32-true", "bf16-mixed")))


# Mistakes


def test_a_student_without_a_teacher_is_refused(prepared: Path) -> None:
    parameters = project.student("vdd", mixtures.TRAINING)
    run = Run(parameters.training)
    with pytest.raises(UserError, match="needs a teacher"):
        vdd.Learner(for_student(parameters, prepared, run, None), parameters, run)
