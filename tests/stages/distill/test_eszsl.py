"""ESZSL: the closed form is where the paper's objective is smallest, and the layer that is written says x' V a_c."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.distill import eszsl
from stages.distill.eszsl import solve
from stages.parameters.zero_shot import ESZSL
from stages.teach.zero_shot import ZeroShot, for_student
from stages.training import Context, Run, train

sys.path.insert(0, str(Path(__file__).parent))
import generative
from generative import FEATURES, OTHERS, SEEN


def objective(v: Tensor, x: Tensor, y: Tensor, s: Tensor, gamma: float, lam: float) -> Tensor:
    """Section 3.1 with samples as rows of X (N, D), S (K, n_s), Y (N, n_s); the third penalty is the product."""

    def square(matrix: Tensor) -> Tensor:
        return matrix.square().sum()

    return square(x @ v @ s - y) + gamma * square(v @ s) + lam * square(x @ v) + gamma * lam * square(v)


def signs(labels: Tensor, seen: Tensor) -> Tensor:
    rows = [[1.0 if label == column else -1.0 for column in seen.tolist()] for label in labels.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def problem(
    seed: int, count: int = 30, features: int = 5, classes: int = 7, known: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, labels, attributes and seen classes, in no order that helps."""
    random = torch.Generator().manual_seed(seed)
    seen = torch.randperm(classes, generator=random)[: max(2, classes // 2)].sort().values
    x = torch.rand(count, features, generator=random, dtype=torch.float64)
    labels = seen[torch.randint(len(seen), (count,), generator=random)]
    return x, labels, torch.randn(classes, known, generator=random, dtype=torch.float64), seen


Penalty = st.floats(1e-3, 1e3)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 1000), st.integers(1, 12), st.integers(1, 6), st.integers(3, 9), st.integers(1, 6), Penalty, Penalty
)
def test_it_is_where_the_objective_is_smallest(
    seed: int, count: int, features: int, classes: int, known: int, gamma: float, lam: float
) -> None:
    """The gradient is 0 there, and every step away costs; also with fewer samples than features, and fewer classes
    than attributes."""
    x, labels, attributes, seen = problem(seed, count, features, classes, known)
    y, s = signs(labels, seen), attributes[seen].T
    v = solve(x, labels, attributes, seen, gamma, lam).requires_grad_()
    assert v.shape == (features, known)
    least = objective(v, x, y, s, gamma, lam)
    (slope,) = torch.autograd.grad(least, v)
    begin = torch.zeros_like(v).requires_grad_()
    (elsewhere,) = torch.autograd.grad(objective(begin, x, y, s, gamma, lam), begin)
    assert slope.abs().max() <= 1e-8 * (1 + elsewhere.abs().max())
    random = torch.Generator().manual_seed(seed)
    for size in (1e-2, 1.0):
        step = size * torch.randn(v.shape, generator=random, dtype=torch.float64)
        assert objective(v + step, x, y, s, gamma, lam) > least


@pytest.mark.parametrize("penalties", [(1.0, 2.0), (1e-2, 10.0)])
def test_it_is_the_solution_of_the_normal_equations(penalties: tuple[float, float]) -> None:
    """As one linear system in the D * K numbers of V, by Kronecker products; penalties are not interchangeable."""
    gamma, lam = penalties
    x, labels, attributes, seen = (part.numpy() for part in problem(1))
    s, y = attributes[seen].T, np.where(labels[:, None] == seen, 1.0, -1.0)
    left, right = x.T @ x + gamma * np.eye(5), s @ s.T + lam * np.eye(4)
    wanted = np.linalg.solve(np.kron(left, right), (x.T @ y @ s.T).reshape(-1)).reshape(5, 4)
    tensors = [torch.from_numpy(part) for part in (x, labels, attributes, seen)]
    np.testing.assert_allclose(solve(*tensors, gamma, lam), wanted, rtol=1e-9)
    assert not np.allclose(solve(*tensors, lam, gamma), wanted, rtol=1e-2)


def test_a_planted_map_is_found() -> None:
    """Scores that are +1 and -1 exactly follow from a bilinear map: tiny penalties give it back."""
    random = torch.Generator().manual_seed(0)
    attributes = torch.randn(6, 4, generator=random, dtype=torch.float64)
    seen = torch.tensor([0, 2, 3, 5])
    labels = seen[torch.randint(4, (60,), generator=random)]
    planted = torch.randn(4, 4, generator=random, dtype=torch.float64)
    # x' V S = y' for all samples, with square V and S: x is determined by its class.
    x = signs(labels, seen) @ torch.linalg.inv(planted @ attributes[seen].T)
    found = solve(x, labels, attributes, seen, 1e-11, 1e-11)
    torch.testing.assert_close(found, planted, rtol=1e-6, atol=1e-6)


def test_the_order_of_samples_makes_no_difference() -> None:
    x, labels, attributes, seen = problem(2)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    first = solve(x, labels, attributes, seen, 0.5, 2.0)
    torch.testing.assert_close(solve(x[order], labels[order], attributes, seen, 0.5, 2.0), first, rtol=1e-10, atol=0)


def test_attributes_of_other_classes_make_no_difference() -> None:
    x, labels, attributes, seen = problem(3)
    other = attributes.clone()
    other[[label for label in range(7) if label not in seen.tolist()]] = torch.nan
    assert torch.equal(solve(x, labels, attributes, seen, 1.0, 1.0), solve(x, labels, other, seen, 1.0, 1.0))


def test_it_is_solved_in_float64() -> None:
    x, labels, attributes, seen = problem(4)
    single = (x.float(), labels, attributes.float(), seen)
    found = solve(*single, 1e-4, 1e-4)
    assert found.dtype == torch.float64
    assert torch.equal(found, solve(x.float().double(), labels, attributes.float().double(), seen, 1e-4, 1e-4))


# The learner


def entry(**fields: float) -> ESZSL:
    base = {"task": "zero_shot", "dataset": "toy", "method": "eszsl", "teacher": "none"}
    training = generative.alone().training
    return ESZSL.model_validate({**base, "network": {"name": "mlp", "hidden": None}, **fields}).model_copy(
        update={"training": training}
    )


def learner(prepared: Path, run: Run, **fields: float) -> tuple[eszsl.Learner, ZeroShot]:
    parameters = entry(**fields)
    task = for_student(parameters, prepared, run, None)
    return eszsl.Learner(task, parameters, run), task


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generative.prepare(tmp_path_factory.mktemp("zero shot") / "toy")


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_the_student_scores_every_class_by_its_attributes(precision: str, prepared: Path) -> None:
    """x' V a_c of the scaled features, seen or not; V by lstsq on what the objective is a sum of squares of."""
    run = generative.run(precision)
    gamma, lam = 0.3, 0.7
    ours, task = learner(prepared, run, feature_penalty=gamma, attribute_penalty=lam)
    (found,) = generative.steps(ours, run, 1)
    x, labels = (torch.from_numpy(array) for array in generative.train(prepared))
    low, high = x.double().min(0).values, x.double().max(0).values
    scaled, attributes = (x.double() - low) / (high - low), torch.from_numpy(np.load(prepared / "attributes.npy"))
    y, s = signs(labels, torch.tensor(SEEN)), attributes.double()[SEEN].T
    # vec by rows: x V s is kron(x, s') times vec(V); every term of the objective is a block of rows.
    ones_d, ones_k = torch.eye(FEATURES, dtype=torch.float64), torch.eye(len(s), dtype=torch.float64)
    blocks = [
        torch.kron(scaled, s.T.contiguous()), gamma**0.5 * torch.kron(ones_d, s.T.contiguous()),
        lam**0.5 * torch.kron(scaled, ones_k), (gamma * lam) ** 0.5 * torch.kron(ones_d, ones_k),
    ]  # fmt: skip
    system = torch.cat(blocks)
    wanted = torch.zeros(len(system), dtype=torch.float64)
    wanted[: y.numel()] = y.reshape(-1)
    v = torch.linalg.lstsq(system, wanted).solution.reshape(FEATURES, len(s))
    scores = torch.stack([scaled @ v @ a for a in attributes.double()], 1)
    bounds = {"rtol": 1e-8, "atol": 1e-10} if precision == "64-true" else {"rtol": 1e-3, "atol": 1e-4}
    logits = task.student(x.to(run.dtype)).logits
    assert logits.shape == (len(x), len(attributes))
    torch.testing.assert_close(logits.double(), scores, **bounds)
    error = (scores[:, SEEN] - y).square().mean().item()
    assert found == {"loss/task": pytest.approx(error, rel=1e-4)}
    assert scores[:, OTHERS].std() > 0.01


def test_one_step_is_all(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = generative.run()
    ours, task = learner(prepared, run)
    assert not ours.optimizers
    assert (task.steps, ours.student) == (1, task.student)
    train(ours, run, stage="distill", key="x", steps=task.steps, seed=0, identity={})
    once = generative.weights(ours)
    context = Context(ours, run, 5)
    context.begin(1)
    ours.step(context)
    assert all(torch.equal(tensor, once[name]) for name, tensor in generative.weights(ours).items())
    # Nothing of the fresh weights is left.
    again, _ = learner(prepared, run)
    torch.nn.init.normal_(again.student.classifier.weight)
    generative.steps(again, run, 1, seed=3)
    assert all(torch.equal(tensor, once[name]) for name, tensor in generative.weights(again).items())


@pytest.mark.parametrize("split", ["train", "others"])
def test_no_sample_but_the_training_split_is_used(split: str, tmp_path: Path) -> None:
    prepared, run, found = generative.prepare(tmp_path / "toy"), generative.run(), []
    for spoil in (False, True):
        if spoil and split == "others":
            generative.spoil_other_samples(prepared)
        elif spoil:
            features = np.load(prepared / "features.npy")
            features[np.flatnonzero(pd.read_csv(prepared / "manifest.csv")["split"] == "train")[3]] += 0.1
            np.save(prepared / "features.npy", features)
        ours, _ = learner(prepared, run)
        generative.steps(ours, run, 1)
        found.append(generative.weights(ours))
    same = all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert same == (split == "others")


def test_seen_classes_that_can_be_told_apart_are(tmp_path: Path) -> None:
    """Features that are attributes, up to a rotation: also classes without samples are recognised."""
    prepared = generative.prepare(tmp_path / "toy")
    random = np.random.default_rng(5)
    labels = np.load(prepared / "labels.npy")
    # Four directions; every class is a signed one or a pair of them.
    attributes = np.array(
        [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 1, 0],
         [0, 0, 0, 1], [0, 1, 0, 1]], dtype=np.float32,
    )  # fmt: skip
    attributes /= np.linalg.norm(attributes, axis=1, keepdims=True)
    turned = np.linalg.qr(random.normal(size=(6, 4)))[0].T
    np.save(prepared / "attributes.npy", attributes)
    np.save(prepared / "features.npy", (attributes[labels] @ turned).astype(np.float32))
    run = generative.run()
    ours, task = learner(prepared, run, feature_penalty=1e-2, attribute_penalty=1e-2)
    generative.steps(ours, run, 1)
    found = task.monitor(task.student)
    assert found["seen"] == 1
    restricted = torch.tensor([label for label in OTHERS if label in task._validation.labels.tolist()])
    own = torch.isin(task._validation.labels, restricted)
    with torch.no_grad():
        logits = task.student(task._validation.inputs[own]).logits[:, restricted]
    assert torch.equal(restricted[logits.argmax(1)], task._validation.labels[own])
