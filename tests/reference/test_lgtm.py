"""LGTM against reference vectors: every $REFERENCE_ROOT/lgtm/*.npz, one test per file.

The learner itself goes through all iterations of a file, once with differences and once with exact derivatives; what it
computes on the way is watched, and every value of the file is compared. A key is an input, which is used, or a value.
"""

import json
import os
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.distill import lgtm
from stages.training import AdamW, Context

sys.path.insert(0, str(Path(__file__).parents[1] / "stages" / "distill"))
import mutual

FOLDER = Path(os.environ.get("REFERENCE_ROOT") or Path(__file__).parent) / "lgtm"
FILES = sorted(FOLDER.glob("*.npz"))
ABSOLUTE = 1e-9
INPUTS = {"xr", "yr", "xe", "ye", "teacher_params_init", "student_params_init"}
SETTINGS = {"teacher_dims", "student_dims", "config_json"}
EXACT = {"exact_grad_teacher_total", "exact_teacher_params_after", "exact_student_params_after"}
Arrays = dict[str, np.ndarray]


class Watched(lgtm.Learner):
    """Notes under the names of the files what the learner computes."""

    notes: dict[str, list[Tensor]]

    def note(self, name: str, value: Any) -> None:
        self.notes[f"out_{name}"].append(torch.as_tensor(value, dtype=torch.float64).detach().clone())

    def _direction(self, loss: Tensor, *rest: Any) -> Any:
        self.note("loss_student_virtual", loss)
        direction, value = super()._direction(loss, *rest)
        self.note("heldout_loss", value)
        self.note("v", mutual.flat(direction))
        return direction, value

    def _teach(self, auxiliary: Tensor, logits: Tensor, *rest: Any) -> Any:
        self.note("loss_aux", auxiliary)
        self.note("grad_aux", self._over_teacher(auxiliary))
        return super()._teach(auxiliary, logits, *rest)

    def _over_teacher(self, output: Tensor, cotangent: Tensor | None = None) -> Tensor:
        weights = list(self.modules["teacher"].parameters())
        return mutual.flat(torch.autograd.grad(output, weights, cotangent, retain_graph=True))

    def _motion(self, direction: Any, epsilon: float, logits: Tensor, view: Any) -> lgtm.Motion:
        parameters, found = self._parameters, {}
        for form in ("difference", "exact"):
            self._parameters = parameters.model_copy(update={"influence_form": form})
            found[form] = super()._motion(direction, epsilon, logits, view)
        self._parameters = parameters
        tau = parameters.temperature
        self.note("epsilon", epsilon)
        for form, ending in (("exact", ""), ("difference", "_fd")):
            for loss in ("student_kl", "teacher_kl"):
                self.note(f"w_{loss}{ending}", lgtm.influence(found[form], logits, loss, tau))
        for name, form, weight, loss in (
            ("grad_influence_fd", "difference", parameters.teacher_alpha, "teacher_kl"),
            ("grad_influence_exact", "exact", parameters.teacher_alpha, "teacher_kl"),
            ("grad_bilevel_mixed", "exact", parameters.alpha, "student_kl"),
        ):
            cotangent = lgtm.influence_cotangent(found[form], logits, weight, loss, tau)
            self.note(name, self._over_teacher(logits, cotangent))
        return found[parameters.influence_form]


class Watching(Context):
    """Notes the gradient of every update."""

    def __init__(self, learner: Watched, run: Any) -> None:
        super().__init__(learner, run, 0)
        self.learner = learner

    def _apply(self, name: str, parameters: Any) -> None:
        key = {"teacher": "grad_teacher_total", "student": "student_grad_real"}[name]
        self.learner.note(key, mutual.flat(parameter.grad for parameter in parameters))
        self.learner.note(f"lr_{name[0]}", self.learner.schedules[name](self.counts[name]))
        super()._apply(name, parameters)


def fill(network: torch.nn.Module, values: np.ndarray) -> None:
    # A copy: the parameters become views of it.
    torch.nn.utils.vector_to_parameters(torch.tensor(values), network.parameters())


def build(arrays: Arrays, kind: type[Watched] = Watched, **fields: Any) -> tuple[Watched, Watching]:
    config = json.loads(str(arrays["config_json"]))
    run = mutual.run()
    networks = {name: mutual.Tanh(arrays[f"{name}_dims"].tolist()) for name in ("student", "teacher")}
    train, held_out = (
        (torch.from_numpy(arrays[f"x{which}"]).flatten(0, 1), torch.from_numpy(arrays[f"y{which}"]).flatten())
        for which in ("r", "e")
    )
    assert config["optimizer"] in ("hf_adamw", "sgd")
    decay = config["weight_decay"]
    optimizer = (
        partial(AdamW, eps=config["adam_eps"], weight_decay=decay)
        if config["optimizer"] == "hf_adamw"
        else partial(torch.optim.SGD, lr=1.0, weight_decay=decay)
    )
    assert config["schedule"] in ("constant", "linear")
    task = mutual.Toy(
        run,
        networks["student"],
        networks["teacher"],
        train,
        held_out,
        batch=arrays["xr"].shape[1],
        shuffle=False,
        steps=config["total_steps"],
        optimizer=optimizer,
        rate=config["lr_s"],
        falls=config["schedule"] == "linear",
    )
    task._streams["held_out"].batch = arrays["xe"].shape[1]
    for name, network in networks.items():
        fill(network, arrays[f"{name}_params_init"])
    scale = config["influence_scale"]
    parameters = mutual.entry(
        temperature=config["tau"],
        alpha=config["alpha"],
        teacher_alpha=config["alpha_t"],
        teacher_learning_rate=config["lr_t"],
        influence_scale=scale if scale.endswith("_lr") else float(scale),
        influence_radius=config["r"],
        **fields,
    )
    learner = kind(task, parameters, run)
    learner.notes = defaultdict(list)
    return learner, Watching(learner, run)


def iterate(arrays: Arrays, learner: Watched, context: Watching, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Everything that the iterations of a file give, each with the iteration as its first dimension."""
    peek, derivative = lgtm.peek, lgtm.derivative

    def virtual(*arguments: Any) -> list[Tensor]:
        found = peek(*arguments)
        learner.note("virtual_student", mutual.flat(found))
        return found

    def tangents(student: Tensor, tangent: Tensor, *rest: Any) -> lgtm.Motion:
        learner.note("student_jvp_logits", tangent)
        return derivative(student, tangent, *rest)

    patch.setattr(lgtm, "peek", virtual)
    patch.setattr(lgtm, "derivative", tangents)
    for step in range(len(arrays["xr"])):
        context.begin(step)
        scalars = learner.step(context)
        learner.note("loss_student_real", scalars["loss/student"])
        learner.note("influence_scale", scalars["influence/scale"])
        for name in ("student", "teacher"):
            learner.note(f"{name}_params_after", mutual.flat(learner.modules[name].parameters()))
    patch.undo()
    return {name: torch.stack(values) for name, values in learner.notes.items()}


def read(path: Path) -> Arrays:
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def off(found: Tensor, expected: np.ndarray) -> float:
    truth = torch.from_numpy(expected)
    assert found.shape == truth.shape
    return (found - truth).abs().max().item()


def test_there_are_vectors() -> None:
    assert FILES, f"no .npz in {FOLDER} · set REFERENCE_ROOT to the folder that holds lgtm/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_vectors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = read(path)
    assert not (INPUTS | SETTINGS) - arrays.keys(), f"inputs are missing in {path.name}"
    found = iterate(arrays, *build(arrays), monkeypatch)
    exact = iterate(arrays, *build(arrays, influence_form="exact"), monkeypatch)
    found |= {key: exact[key.replace("exact_", "out_", 1)] for key in EXACT}
    unknown = arrays.keys() - found.keys() - INPUTS - SETTINGS
    assert not unknown, f"keys of unknown meaning in {path.name}: {sorted(unknown)}"
    compared = arrays.keys() & found.keys()
    assert {"out_teacher_params_after", "out_student_params_after"} <= compared, f"nothing to compare in {path.name}"
    for key in sorted(compared):
        assert off(found[key], arrays[key]) <= ABSOLUTE, f"{path.name}, {key}: off by {off(found[key], arrays[key])}"


class OldTeacher(Watched):
    """The student learns from the teacher as it was before its update."""

    def _forward(self, name: str, *rest: Any) -> Any:
        if name == "teacher" and torch.is_grad_enabled():
            self.before = super()._forward(name, *rest)
        return self.before if name == "teacher" else super()._forward(name, *rest)


class LaterRate(Watched):
    """The influence is multiplied by the rate that the schedule has after the update."""

    def _apply(self, auxiliary: Tensor, logits: Tensor, cotangent: Tensor, context: Context) -> float:
        context.counts["teacher"] += 1
        later = self.schedules["teacher"](context.counts["teacher"])
        context.counts["teacher"] -= 1
        self._parameters = self._parameters.model_copy(update={"influence_scale": later})
        return super()._apply(auxiliary, logits, cotangent, context)


@pytest.mark.parametrize("kind", [OldTeacher, LaterRate])
def test_property_11_another_order_fails_the_vectors(kind: type[Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = read(Path(__file__).parent / "lgtm" / "s2_temp2_mixed_wd_linear.npz")
    found = iterate(arrays, *build(arrays, kind), monkeypatch)
    assert off(found["out_student_params_after"], arrays["out_student_params_after"]) > 100 * ABSOLUTE
