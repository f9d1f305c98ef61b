"""CWD's learner: what it compares. The loss itself: tests/stages/training/test_features.py."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import UserError
from stages.distill import alone, cwd
from stages.parameters import segmentation as schema
from stages.training import Align, Context, Run

sys.path.insert(0, str(Path(__file__).parent))
import dense


@pytest.fixture(scope="module")
def run() -> Run:
    return dense.run()


def learner(run: Run, **fields: Any) -> cwd.Learner:
    return cwd.Learner(dense.Dense(run, (4, 6), dense.teacher((4, 10))), dense.entry(schema.CWD, **fields), run)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p = (x.flatten(2) / temperature for x in (student, teacher))
    total = F.kl_div(q.log_softmax(2), p.softmax(2), reduction="sum")
    return temperature**2 * total / (student.shape[0] * student.shape[1])


@pytest.mark.parametrize("compare", ["logits", "features"])
def test_the_terms_are_those_of_the_equations(compare: str) -> None:
    """One step against the loss written down here, with torch's own optimiser."""
    wide = dense.run("64-true")
    fields: dict[str, Any] = {"compare": compare, "weight": 7.0, "temperature": 2.0}
    if compare == "features":
        fields["places"] = [{}, {"student": "stage1", "teacher": "stage1"}]
    ours, twin = learner(wide, **fields), learner(wide, **fields)
    reported = dense.steps(ours, wide, 1)[0]
    context = Context(twin, wide, 0)
    for name, module in twin.modules.items():
        module.train(name != "teacher")
    context.begin(0)
    views = twin._task.views(context)
    with torch.no_grad():
        theirs = twin.modules["teacher"](views.teacher)
    output = twin.modules["student"](views.student)
    if compare == "logits":
        loss = divergence(output.logits, theirs.logits, 2.0)
        assert "adapters" not in twin.modules
    else:
        last, first = twin.modules["adapters"].children()
        assert isinstance(last, Align)
        assert last.convolution is not None
        assert not list(first.parameters())
        loss = divergence(last.convolution(output.features["last"]), theirs.features["last"], 2.0)
        loss = loss + divergence(output.features["stage1"], theirs.features["stage1"], 2.0)
    task = twin._task.objective(output, views.target)
    torch.testing.assert_close(reported, {"loss/task": task.detach(), f"loss/{compare}": loss.detach()})
    (task + 7.0 * loss).backward()
    twin.optimizers["student"].param_groups[0]["lr"] = twin.schedules["student"](0)
    twin.optimizers["student"].step()
    for part in twin.modules.keys() - {"teacher"}:
        for name, tensor in dense.weights(twin.modules[part]).items():
            torch.testing.assert_close(dense.weights(ours.modules[part])[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compare", ["logits", "features"])
def test_the_teacher_does_not_move_and_the_rest_does(compare: str, run: Run) -> None:
    ours = learner(run, compare=compare)
    before = {name: dense.weights(module) for name, module in ours.modules.items()}
    dense.steps(ours, run)
    for name, module in ours.modules.items():
        assert dense.equal(before[name], dense.weights(module)) == (name == "teacher"), name
    taught = ours.modules["teacher"]
    assert isinstance(taught, dense.Network)
    assert taught.heads_run == (4 if compare == "logits" else 0)
    assert all(parameter.grad is None for parameter in taught.parameters())


@pytest.mark.parametrize("compare", ["logits", "features"])
def test_weight_zero_is_the_training_without_a_teacher(compare: str, run: Run) -> None:
    plain = alone.Learner(dense.Dense(run), dense.entry(schema.Alone), run)
    dense.steps(plain, run, 6)
    ours = learner(run, compare=compare, weight=0.0)
    dense.steps(ours, run, 6)
    assert dense.equal(dense.weights(plain.student), dense.weights(ours.student))


def test_places_that_do_not_fit_are_named(run: Run) -> None:
    with pytest.raises(UserError, match=r"the teacher has no place 'stage3' · places\[0\].teacher"):
        learner(run, compare="features", places=[{"teacher": "stage3"}])
    ours = learner(run, compare="features", places=[{"teacher": "stage1"}])
    with pytest.raises(UserError, match=r"student \(4, 6, 4, 3\), teacher \(4, 4, 8, 6\)\) · places\[0\]"):
        dense.steps(ours, run, 1)


@pytest.mark.parametrize("compare", ["logits", "features"])
def test_bfloat16_keeps_the_losses_in_float32(compare: str) -> None:
    mixed = dense.run("bf16-mixed")
    for step in dense.steps(learner(mixed, compare=compare), mixed, 2):
        assert all(value.dtype == torch.float32 and value.isfinite() for value in step.values()), step
