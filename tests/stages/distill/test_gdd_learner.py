"""GDD's learner on a tiny task: what moves, what is skipped, what is left behind, by the card's section 7."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from stages.distill import alone, gdd
from stages.distill.gdd import generate, inherit
from stages.parameters import segmentation as schema
from stages.training import Context, Generator, Run

sys.path.insert(0, str(Path(__file__).parent))
import dense


@pytest.fixture(scope="module")
def run() -> Run:
    return dense.run()


def learner(
    run: Run, widths: tuple[int, int] = (4, 10), student: tuple[int, int] = (4, 6), **fields: Any
) -> gdd.Learner:
    return gdd.Learner(dense.Dense(run, student, dense.teacher(widths)), dense.entry(schema.GDD, **fields), run)


def test_noise_has_its_own_numbers(run: Run) -> None:
    """Torch's own generator, which dropout uses, is where it would be without noise."""
    states = []
    for std in (0.0, 1.0):
        ours = learner(run, noise={"std": std})
        dense.steps(ours, run, 1)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize(
    ("form", "student", "expected"),
    [("plain", (4, 6), False), ("fast", (4, 6), True), ("auto", (4, 6), True), ("auto", (4, 40), False)],
)
def test_the_form_follows_the_parameter(
    form: str, student: tuple[int, int], expected: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(student: Tensor, generator: Generator, noise: Tensor | None, fused: bool) -> Tensor:
        seen.append(fused)
        return generate(student, generator, noise, fused)

    monkeypatch.setattr(gdd, "generate", spy)
    dense.steps(learner(run, (4, 32), student, form=form), run, 1)
    assert seen == [expected]


def test_both_forms_train_the_same_student() -> None:
    wide = dense.run("64-true")
    results = []
    for form in ("plain", "fast"):
        ours = learner(wide, form=form)
        dense.steps(ours, wide, 6)
        results.append(dense.weights(ours.student))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-9, atol=1e-11)


def test_property_13_a_place_that_a_network_lacks_is_named(run: Run) -> None:
    for side in ("student", "teacher"):
        with pytest.raises(UserError, match=rf"the {side} has no place 'stage4' · places\[1\].{side}; did you mean"):
            learner(run, places=[{}, {side: "stage4"}])


def test_property_13_places_of_different_stride_are_named(run: Run) -> None:
    ours = learner(run, places=[{"student": "stage1"}])
    with pytest.raises(UserError, match=r"\(student \(4, 4, 8, 6\), teacher \(4, 10, 4, 3\)\) · places\[0\]: 'stage1'"):
        dense.steps(ours, run, 1)


def test_property_10_the_teacher_does_not_move_and_no_gradient_reaches_it(run: Run) -> None:
    cases: list[dict[str, Any]] = [{}, {"logits": 3.0}]
    for fields in cases:
        ours = learner(run, **fields)
        before = {name: dense.weights(module) for name, module in ours.modules.items()}
        dense.steps(ours, run)
        for name, module in ours.modules.items():
            assert dense.equal(before[name], dense.weights(module)) == (name == "teacher"), name
        taught = ours.modules["teacher"]
        assert not any(module.training for module in taught.modules())
        assert all(parameter.grad is None for parameter in taught.parameters())
        # The last bias has no gradient and is left out: weight decay alone would move it.
        bias = [name for name in before["adapters"] if name.endswith("second.bias")]
        assert len(bias) == 1
        moved = {
            name
            for name, tensor in dense.weights(ours.modules["adapters"]).items()
            if not torch.equal(tensor, before["adapters"][name])
        }
        assert moved == before["adapters"].keys() - set(bias)


def test_the_teachers_heads_run_for_logits_alone(run: Run) -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 0),
        ({"logits": 1.0}, 3),
        ({"weight": 0.0}, 0),
        ({"weight": 0.0, "logits": 1.0}, 3),
    ]
    for fields, expected in cases:
        ours = learner(run, **fields)
        dense.steps(ours, run, 3)
        taught = ours.modules["teacher"]
        assert isinstance(taught, dense.Network)
        assert taught.heads_run == expected


def test_property_11_weight_zero_is_the_training_without_a_teacher(run: Run) -> None:
    plain = alone.Learner(dense.Dense(run), dense.entry(schema.Alone), run)
    expected = dense.steps(plain, run, 8)
    ours = learner(run, weight=0.0)
    found = dense.steps(ours, run, 8)
    assert "adapters" not in ours.modules
    assert dense.equal(dense.weights(plain.student), dense.weights(ours.student))
    assert [step["loss/task"] for step in found] == [step["loss/task"] for step in expected]
    assert all(step.keys() == {"loss/task"} for step in found)
    with_teacher = learner(run)
    dense.steps(with_teacher, run, 8)
    assert not dense.equal(dense.weights(plain.student), dense.weights(with_teacher.student))


def test_property_12_the_student_is_the_plain_network(run: Run) -> None:
    ours = learner(run, logits=1.0, places=[{}, {"student": "stage1", "teacher": "stage1"}])
    dense.steps(ours, run, 2)
    plain = dense.Network((4, 6))
    plain.load_state_dict(ours.student.state_dict(), strict=True)
    assert [name for name, _ in ours.student.named_modules()] == [name for name, _ in plain.named_modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.student.modules())
    images = torch.rand(3, 3, 16, 12).contiguous(memory_format=torch.channels_last)
    plain = plain.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    with torch.no_grad():
        assert torch.equal(plain(images).logits, ours.student.eval()(images).logits)

    class Deployed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = ours.student

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x).logits

    program = torch.export.export(Deployed(), (images,))
    assert set(program.state_dict) == {f"network.{name}" for name in plain.state_dict()}
    convolutions = [node for node in program.graph.nodes if "conv2d" in str(node.target)]
    assert len(convolutions) == 4


def test_the_terms_are_those_of_the_equations() -> None:
    """One step against the loss written down here, with torch's own optimiser."""
    wide = dense.run("64-true")
    places: list[dict[str, str]] = [{}, {"student": "stage1", "teacher": "stage1"}]
    fields: dict[str, Any] = {"weight": 7.0, "logits": 3.0, "temperature": 2.0, "places": places, "noise": {"std": 0.5}}
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
    noise = context.generator("noise")

    def divergence(g: Tensor, f: Tensor) -> Tensor:
        q, p = (x.flatten(2) / 2.0 for x in (g, f))
        return 4.0 * F.kl_div(q.log_softmax(2), p.softmax(2), reduction="sum") / (len(g) * g.shape[1])

    losses = []
    for place, module in zip(("last", "stage1"), twin.modules["adapters"].children(), strict=True):
        s, f = output.features[place], theirs.features[place]
        z = 0.5 * torch.randn(4, 1, *s.shape[2:], generator=noise, dtype=torch.float64)
        a = module.align.convolution(s) if place == "last" else s  # type: ignore[operator, union-attr]
        losses.append(divergence(module(a + z), f))
    task = twin._task.objective(output, views.target)
    logits = divergence(output.logits, theirs.logits)
    expected = {"loss/task": task, "loss/features": losses[0] + losses[1], "loss/logits": logits}
    torch.testing.assert_close(reported, {name: value.detach() for name, value in expected.items()})
    (task + 7.0 * (losses[0] + losses[1]) + 3.0 * logits).backward()
    twin.optimizers["student"].param_groups[0]["lr"] = twin.schedules["student"](0)
    twin.optimizers["student"].step()
    for part in ("student", "adapters"):
        for name, tensor in dense.weights(twin.modules[part]).items():
            torch.testing.assert_close(dense.weights(ours.modules[part])[name], tensor, rtol=1e-9, atol=1e-12)


def test_heads_are_inherited_where_they_fit(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    theirs = dense.teacher((4, 6), head=6)
    dense.steps(alone.Learner(dense.Dense(run, (4, 6), None), dense.entry(schema.Alone), run), run, 1)
    with caplog.at_level(logging.INFO, logger="distillery"):
        ours = gdd.Learner(dense.Dense(run, (4, 6), theirs), dense.entry(schema.GDD, inherit=True), run)
    own, taught = dense.weights(ours.student), dense.weights(theirs)
    head = {name for name in own if name.startswith("head.")}
    assert {name for name in own if torch.equal(own[name], taught[name])} >= head
    assert not torch.equal(own["encoder.1.0.weight"], taught["encoder.1.0.weight"])
    assert "inherited from the teacher: head.0.bias, head.0.weight, head.1.bias" in caplog.text
    assert "not inherited: nothing" in caplog.text
    fresh = learner(run)
    assert not torch.equal(fresh.student.state_dict()["head.0.weight"], taught["head.0.weight"])


def test_what_does_not_fit_is_not_inherited_and_said() -> None:
    student, theirs = dense.Network((4, 6), head=6), dense.Network((4, 10), head=6)
    student.extra = nn.Linear(1, 1)
    theirs.other = nn.Linear(1, 1, bias=False)
    before = dense.weights(student)
    copied, left = inherit(student, theirs)
    assert "head.0.weight: (6, 6, 3, 3) in the student, (6, 10, 3, 3) in the teacher" in left
    assert "extra.bias: the teacher has none" in left
    assert "other.weight: the student has none" in left
    assert "head.3.weight" in copied
    for name, tensor in dense.weights(student).items():
        assert torch.equal(tensor, theirs.state_dict()[name] if name in copied else before[name])
    assert not any(name.startswith("encoder") for name in [*copied, *left])


def test_bfloat16_keeps_the_losses_in_float32() -> None:
    mixed = dense.run("bf16-mixed")
    for noise in ({"mode": "independent"}, {}):
        for form in ("plain", "fast"):
            for step in dense.steps(learner(mixed, logits=1.0, noise=noise, form=form), mixed, 2):
                assert all(value.dtype == torch.float32 and value.isfinite() for value in step.values()), step


def test_the_same_seed_gives_the_same_student(run: Run) -> None:
    results = []
    for seed in (0, 0, 1):
        ours = learner(run)
        dense.steps(ours, run, 2, seed)
        results.append(dense.weights(ours.student))
    assert dense.equal(results[0], results[1])
    assert not dense.equal(results[0], results[2])
