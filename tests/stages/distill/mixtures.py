"""Learners of mixtures on a small prepared data set, and an iteration as VDD's card has it, by autograd alone."""

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from models.policy import Diffusion, Output, cosine_schedule
from stages.distill import em, vdd
from stages.experts import ByTurns
from stages.teach.policy import Policy, for_student, for_teacher
from stages.training import Context, Run, derive_seed, train

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import policy_project as project
from gaussians import square

# Few windows and iterations; weights that make experts differ, and rates at which all of them move.
TRAINING: dict[str, Any] = {"iterations": 3, "batch": 3, "learning_rate": 0.02, "precision": "64-true"}
NETWORK: dict[str, Any] = {"gain": 1.0, "init_std": 0.7}
PERCEPTRON = {"name": "mlp", "width": 8, "layers": 2}
BESO: dict[str, Any] = {"name": "beso", "sigma_min": 0.1, "sigma_max": 1.0}
DROPOUT = {**project.TRANSFORMER, "dropout": 0.2, "attention_dropout": 0.1}
UNIFORM = {"kind": "uniform", "low": 0.2, "high": 0.5}


def learner(
    prepared: Path,
    method: str = "vdd",
    training: dict[str, Any] | None = None,
    network: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    **fields: Any,
) -> tuple[ByTurns, Policy]:
    """A learner as `python -m stages.distill` makes it, and its task. `teacher`: its network's own settings."""
    parameters = project.student(
        method, {**TRAINING, **(training or {})}, network={**project.MIXTURE, **NETWORK, **(network or {})}, **fields
    )
    run, taught = Run(parameters.training), None
    if method == "vdd":
        shared = {"goals": parameters.network.goals, "window": parameters.network.window}
        torch.manual_seed(5)
        taught = project.trained(for_teacher(project.teacher(**{**shared, **(teacher or {})}), prepared, run))
        for weight in taught[0].parameters():
            nn.init.normal_(weight, 0, 0.4)
    task = for_student(parameters, prepared, run, taught)
    kinds: dict[str, Any] = {"em": em.Learner, "vdd": vdd.Learner}
    return kinds[method](task, parameters, run), task


def begin(learner: ByTurns) -> None:
    """As the training loop prepares modules."""
    for name, module in learner.modules.items():
        module.train(name not in learner.frozen)
        module.requires_grad_(name not in learner.frozen)


def iterations(learner: ByTurns, task: Policy, count: int, after: Callable[[], None] = lambda: None) -> Context:
    """So many steps of the learner; `after` is called at the end of each."""
    begin(learner)
    context = Context(learner, Run(task._training), task.seed)
    for step in range(count):
        context.begin(step)
        learner.step(context)
        after()
    return context


def weights(learner: ByTurns) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, module in learner.modules.items()
        for key, tensor in module.state_dict().items()
    }


class Plain:
    """Copies of the learner's networks; batches, noise and levels as it draws them; everything else by definition.

    Densities by MultivariateNormal, gradients by autograd through the whole student, torch's own Adam, a rate by hand,
    and the teacher asked for one window at a time.
    """

    def __init__(self, learner: ByTurns, task: Policy) -> None:
        self.parameters: Any = learner._turns
        self.task, self.streams = task, copy.deepcopy(learner.streams)
        self.nets = copy.deepcopy(learner.modules)
        self.student: Any = self.nets["student"]
        of_gate = {id(weight) for weight in self.student.gate.parameters()} if self.student.gate else set()
        every = list(self.student.parameters())
        parts = {
            "experts": [weight for weight in every if id(weight) not in of_gate],
            "gate": [weight for weight in every if id(weight) in of_gate],
        }
        training = self.parameters.training
        self.adam: dict[str, Any] = {}
        for name, part in parts.items():
            if not part:
                continue
            if training.weight_decay:
                self.adam[name] = torch.optim.AdamW(part, weight_decay=training.weight_decay, foreach=False)
            else:
                self.adam[name] = torch.optim.Adam(part, foreach=False)
        self.updates = dict.fromkeys(self.adam, 0)

    def iteration(self, context: Context) -> dict[str, Tensor]:
        """What is recorded: of the last update of each kind."""
        parameters, found = self.parameters, {}
        vdd, experts, gate = parameters.method == "vdd", ["experts"] * parameters.expert_steps, ["gate"]
        if vdd and parameters.lag and context.step % parameters.lag == 0:
            self.nets["lagged"] = copy.deepcopy(self.student).eval()
        gate *= parameters.gate_steps if "gate" in self.adam else 0
        for name in experts + gate if vdd else gate + experts:
            if name == "gate":
                loss = found["loss/gate"] = self.gate()
            elif vdd:
                loss, found["entropy/experts"] = self.follow_teacher(context)
                found["surrogate"] = loss
            else:
                loss = found["loss/experts"] = self.follow_demonstrations()
            self.update(name, loss)
        return found

    def update(self, name: str, loss: Tensor) -> None:
        adam, training = self.adam[name], self.parameters.training
        (group,) = adam.param_groups
        total = training.iterations
        if self.parameters.lr_total == "updates":
            total *= self.parameters.expert_steps if name == "experts" else self.parameters.gate_steps
        left = 1.0 if training.decay == "none" else max(0.0, 1 - self.updates[name] / total)
        group["lr"] = training.learning_rate * left
        adam.zero_grad()
        for weight, gradient in zip(group["params"], torch.autograd.grad(loss, group["params"]), strict=True):
            weight.grad = gradient
        if training.clip is not None:
            torch.nn.utils.clip_grad_norm_(group["params"], training.clip)
        adam.step()
        self.updates[name] += 1

    def draw(self, stream: str) -> tuple[Tensor, Tensor]:
        """Raw observations (B, G + T, O) and scaled actions (B * T, A)."""
        (rows,) = self.streams[stream].draw(derive_seed(self.task.seed, stream), 0, 1)
        train, goals = self.task._train, self.parameters.network.goals
        return train.observations[rows], train.actions[rows[:, goals:]].flatten(0, 1)

    def look(self, network: Any, observations: Tensor) -> Output:
        """States as one dimension, factors as matrices."""
        mean, factor, log_gate = (part.flatten(0, 1) for part in network(observations))
        return Output(mean, square(factor), log_gate)

    def mean_of(self, values: Tensor) -> Tensor:
        """(N, K) to a scalar."""
        return (values.sum(1) if self.parameters.reduction == "sum" else values.mean(1)).mean()

    def shares(self, output: Output, actions: Tensor) -> Tensor:
        """r of demonstrated actions, (N, K)."""
        logs = MultivariateNormal(output.mean, scale_tril=output.factor).log_prob(actions[:, None])
        joint = output.log_gate.exp() * logs.exp()
        return (joint / joint.sum(1, keepdim=True)).detach()

    def gate(self) -> Tensor:
        observations, actions = self.draw("gate")
        output = self.look(self.student, observations)
        return -self.mean_of(self.shares(output, actions) * output.log_gate)

    def follow_demonstrations(self) -> Tensor:
        observations, actions = self.draw("train")
        output = self.look(self.student, observations)
        logs = MultivariateNormal(output.mean, scale_tril=output.factor).log_prob(actions[:, None])
        return -self.mean_of(self.shares(output, actions) * logs)

    def follow_teacher(self, context: Context) -> tuple[Tensor, Tensor]:
        """The loss, and the mean entropy of experts."""
        parameters = self.parameters
        observations, _ = self.draw("train")
        mean, factor, log_gate = self.look(self.student, observations)
        states, count, size = mean.shape
        random = context.generator("noise")
        noise = torch.randn(parameters.samples, states, count, size, generator=random, dtype=torch.float64)
        samples = torch.stack([mean + (factor @ each[..., None])[..., 0] for each in noise], 2)
        scores = self.scores(samples.detach(), observations, context)
        source = self.look(self.nets["lagged"], observations) if parameters.lag else Output(mean, factor, log_gate)
        fixed = Output(*(part.detach() for part in source))
        law = MultivariateNormal(fixed.mean, scale_tril=fixed.factor)
        total = torch.zeros(states, count, dtype=torch.float64)
        for k in range(count):
            for v in range(parameters.samples):
                a = samples[:, k, v]
                joint = fixed.log_gate + law.log_prob(a[:, None])
                value = (scores[:, k, v] * a).sum(1) + joint[:, k] - joint.logsumexp(1)
                total = total + value[:, None] * nn.functional.one_hot(torch.tensor(k), count) / parameters.samples
        entropy = MultivariateNormal(mean, scale_tril=factor).entropy()
        pi = log_gate.detach().exp() if parameters.weight == "gate" else torch.ones_like(total)
        return -self.mean_of(pi * (total + entropy)), entropy.mean()

    def scores(self, samples: Tensor, observations: Tensor, context: Context) -> Tensor:
        """Of samples (B * T, K, V, A), without gradient; each window of samples by itself (card 3.3)."""
        teacher: Any = self.nets["teacher"]
        steps = len(samples) // len(observations)
        windows = samples.unflatten(0, (len(observations), steps))
        found = torch.empty_like(windows)
        places = list(itertools.product(*map(range, (len(windows), *samples.shape[1:3]))))
        for (b, k, v), level in zip(places, self.levels(len(places), context), strict=True):
            shown = teacher.scaling.observations(observations[b : b + 1])
            with torch.no_grad():
                found[b, :, k, v] = self.score(teacher, windows[b : b + 1, :, k, v], shown, level)[0]
        return found.flatten(0, 1)

    def score(self, teacher: Any, a: Tensor, shown: Tensor, level: Tensor) -> Tensor:
        if isinstance(self.parameters.levels, project.schema.Steps):
            kept = cosine_schedule(teacher.steps)[1][level]
            asked = kept.sqrt() * a if self.parameters.vp_input == "scaled" else a
            found = -teacher.network(shown, asked, level[None]) / (1 - kept).sqrt()
            return kept.sqrt() * found if self.parameters.vp_input == "scaled" else found
        total = level**2 + 0.25
        denoised = 0.25 / total * a + 0.5 * level / total.sqrt() * teacher.network(shown, a / total.sqrt(), level[None])
        return (denoised - a) / level**2

    def levels(self, count: int, context: Context) -> Iterator[Tensor]:
        levels, random = self.parameters.levels, context.generator("levels")
        if levels.kind == "steps":
            yield from torch.randint(levels.low, levels.high + 1, (count,), generator=random)
            return
        if levels.kind == "uniform":
            drawn = torch.rand(count, generator=random, dtype=torch.float64)
            yield from levels.low * (1 - drawn) + levels.high * drawn
            return
        level = 0.1
        if levels.kind == "anneal":
            level = max(levels.low, levels.high - context.step / levels.iterations * (levels.high - levels.low))
        yield from torch.full((count,), level, dtype=torch.float64)


def exact(learner: ByTurns) -> None:
    """A DDPM's schedule in float64, which is rounded to float32 before it is made wider."""
    teacher = learner.modules.get("teacher")
    if isinstance(teacher, Diffusion) and hasattr(teacher, "kept"):
        teacher.kept = cosine_schedule(teacher.steps)[1]


def compare(learner: ByTurns, task: Policy) -> None:
    """All iterations of the training on both sides; every weight is the same afterwards, and has moved."""
    exact(learner)
    begin(learner)
    plain, run = Plain(learner, task), Run(task._training)
    before = weights(learner)
    contexts = [Context(learner, run, task.seed) for _ in range(2)]
    for step in range(task.steps):
        for context in contexts:
            context.begin(step)
        found, wanted = learner.step(contexts[0]), plain.iteration(contexts[1])
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name].detach(), value.detach(), rtol=1e-8, atol=1e-10)
    assert contexts[0].counts == plain.updates
    state = plain.student.state_dict()
    for name, tensor in weights(learner).items():
        part, _, key = name.partition(".")
        if part == "teacher":
            assert torch.equal(tensor, before[name]), name
        elif part == "student":
            assert (tensor - state[key]).abs().max() < 1e-9, name
            assert not torch.equal(tensor, before[name]), f"{name} does not learn"


class Update:
    """What one update was given, and which weights it moved."""

    def __init__(self, name: str, reached: set[str], moved: set[str]) -> None:
        self.name, self.reached, self.moved = name, reached, moved


def watched(learner: Any, task: Any, monkeypatch: pytest.MonkeyPatch, count: int = 2) -> list[Update]:
    """Every update of `count` iterations: the parts that a gradient could reach, and those that moved."""
    student, found = learner.modules["student"], []
    parts = {
        "trunk": student.trunk, "mean": student.mean_head, "covariance": student.covariance_head, "gate": student.gate,
        **{name: module for name, module in learner.modules.items() if name != "student"},
    }  # fmt: skip
    inner = Context.update

    def update(self: Context, name: str, outputs: Any, cotangents: Any = None) -> None:
        tensors = list(outputs.values()) if isinstance(outputs, dict) else outputs
        reached = set()
        for part, module in parts.items():
            # Asked even of those that the loop takes out of the graph.
            of = [weight for weight in module.parameters() if weight.requires_grad]
            if of:
                slopes = torch.autograd.grad(tensors, of, cotangents, retain_graph=True, allow_unused=True)
                reached |= {part} if any(slope is not None for slope in slopes) else set()
        before = {part: [weight.clone() for weight in module.parameters()] for part, module in parts.items()}
        inner(self, name, outputs, cotangents)
        moved = {
            part
            for part, module in parts.items()
            if not all(map(torch.equal, module.parameters(), before[part]))
        }  # fmt: skip
        found.append(Update(name, reached, moved))

    monkeypatch.setattr(Context, "update", update)
    context = Context(learner, Run(task._training), 0)
    begin(learner)
    for module in learner.modules.values():
        module.requires_grad_(True)
    for step in range(count):
        context.begin(step)
        learner.step(context)
    return found


def crash(prepared: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, method: str = "vdd", **fields: Any) -> None:
    """Training that ends before its sixth step, and goes on in another process, gives the same bytes."""

    class CrashError(Exception):
        pass

    steps: list[int] = []

    def go(name: str, end: int | None) -> ByTurns:
        (folder / name).mkdir(exist_ok=True)
        monkeypatch.chdir(folder / name)
        own, task = learner(prepared, method, training={"iterations": 9, "precision": "32-true"}, **fields)
        plain = own.step

        def step(context: Context) -> Any:
            if context.step == end:
                raise CrashError
            steps.append(context.step)
            return plain(context)

        monkeypatch.setattr(own, "step", step)
        options: dict[str, Any] = {"stage": "distill", "key": "x", "steps": task.steps, "seed": 0, "identity": {}}
        train(own, Run(task._training), **options, checkpoint_seconds=0)
        return own

    whole = go("whole", None)
    steps.clear()
    with pytest.raises(CrashError):
        go("resumed", 5)
    resumed = go("resumed", None)
    assert steps == list(range(9)), "the second process goes on where the first ended"
    expected = weights(whole)
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    for name, optimizer in resumed.optimizers.items():
        of_whole = whole.optimizers[name].state_dict()["state"]
        for place, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, of_whole[place][key]) for key, value in state.items()), name


def first_step(prepared: Path, method: str = "vdd", **fields: Any) -> dict[str, Tensor]:
    own, task = learner(prepared, method, **fields)
    begin(own)
    context = Context(own, Run(task._training), task.seed)
    context.begin(0)
    return dict(own.step(context))


def alike(wide: dict[str, Tensor], narrow: dict[str, Tensor]) -> None:
    """What was recorded in float32, and with products in bfloat16."""
    assert any(narrow[name] != value for name, value in wide.items())
    for name, value in wide.items():
        assert narrow[name].dtype == torch.float32
        assert narrow[name].item() == pytest.approx(value.item(), rel=0.1, abs=0.05), name
