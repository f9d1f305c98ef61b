"""D3GZSL's learner on a tiny task: who learns from what, a whole outer iteration written out, what is kept."""

import copy
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from models.zero_shot import MLP, Generator
from stages.distill import d3gzsl
from stages.parameters.zero_shot import D3GZSL
from stages.teach.zero_shot import ZeroShot, for_student
from stages.training import Context, Run, derive_seed, train

sys.path.insert(0, str(Path(__file__).parent))
import generative
from generative import OTHERS, SEEN, WEIGHTS

GENERATORS = ("clswgan", "cegzsl")
each_generator = pytest.mark.parametrize("generator", GENERATORS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generative.prepare(tmp_path_factory.mktemp("zero shot") / "toy")


@pytest.fixture(scope="module")
def run() -> Run:
    return generative.run()


# An outer iteration as the card has it (3.2, 3.3, 3.6 to 3.8), by automatic differentiation alone


class Plain:
    """Networks as the learner's, torch's own Adam, every loss by its definition, the teacher on all rows every time."""

    def __init__(self, learner: d3gzsl.Learner, parameters: D3GZSL, task: ZeroShot) -> None:
        self.parameters, self.task = parameters, task
        self.nets = nn.ModuleDict(copy.deepcopy({k: v for k, v in learner.modules.items() if k not in KEPT}))
        student = self.nets["student"]
        parts = {name: list(net.parameters()) for name, net in self.nets.items() if name not in ("teacher", "student")}
        parts |= {
            "embedding": list(student.embedding.parameters()),
            "classifier": list(student.classifier.parameters()),
        }
        self.adam = {name: torch.optim.Adam(part, 1e-3, (0.5, 0.999)) for name, part in parts.items() if part}

    def outer(self, context: Context, draw: Any) -> None:
        settings, nets = self.parameters.generator, self.nets
        random, critics = context.generator("noise"), [name for name in CRITICS if name in nets]
        d3, shared = self.parameters.distribution, settings.name == "cegzsl"
        made = torch.tensor(OTHERS).repeat_interleave(d3.per_class) if d3 else torch.empty(0, dtype=torch.int64)
        followers = ["embedding", "classifier", "head", "confidence"] if d3 else []
        for _ in range(settings.critic_steps):
            real, y, _ = draw()
            noise = torch.randn(len(y) + len(made), 4, generator=random, dtype=torch.float64)
            t = torch.rand(len(y), 1, generator=random, dtype=torch.float64)
            fake = self.synthesise(noise[: len(y)], y).detach()
            loss = self.judge(fake, y).mean() - self.judge(real, y).mean()
            xi = (t * real + (1 - t) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(self.judge(xi, y).sum(), xi, create_graph=True)
            loss = loss + settings.penalty * ((slope**2).sum(1).sqrt() - 1).square().mean()
            if shared:
                h = nets["student"].embedding(real)
                loss = loss + self.instance(self.project(h), y) + self.compared(h, y)
            if d3:
                loss = loss + self.distribute(self.synthesise(noise[len(y) :], made).detach(), made, real, y)
            self.update(loss, [*critics, *(["embedding"] if shared else []), *followers])
        noise = torch.randn(len(y) + len(made), 4, generator=random, dtype=torch.float64)
        fake = self.synthesise(noise[: len(y)], y)
        loss = -self.judge(fake, y).mean()
        if shared:
            h, theirs = nets["student"].embedding(fake), nets["student"].embedding(real)
            both = torch.cat([self.project(h), self.project(theirs).detach()])
            loss = loss + settings.instance_weight * self.instance(both, torch.cat([y, y]))
            loss = loss + settings.class_weight * self.compared(h, y)
        own = self.distribute(self.synthesise(noise[len(y) :], made), made, real, y) if d3 else None
        # Of the generator's own loss nobody else learns; of L_d3, generator and student.
        generator = list(nets["generator"].parameters())
        found = torch.autograd.grad(loss if own is None else loss + own, generator, retain_graph=True)
        if own is not None:
            self.gradients(own, followers)
        for parameter, gradient in zip(generator, found, strict=True):
            parameter.grad = gradient
        self.step(["generator", *followers])

    def update(self, loss: Tensor, names: list[str]) -> None:
        self.gradients(loss, names)
        self.step(names)

    def gradients(self, loss: Tensor, names: list[str]) -> None:
        for adam in self.adam.values():
            adam.zero_grad()
        groups = [self.adam[name].param_groups[0]["params"] for name in dict.fromkeys(names) if name in self.adam]
        weights = [weight for group in groups for weight in group]
        found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
        for weight, gradient in zip(weights, found, strict=True):
            weight.grad = gradient

    def step(self, names: list[str]) -> None:
        for name in dict.fromkeys(names):
            if name in self.adam:
                self.adam[name].step()

    def synthesise(self, noise: Tensor, labels: Tensor) -> Tensor:
        g = self.nets["generator"]
        return g.fc2(F.leaky_relu(g.fc1(torch.cat([noise, self.task.attributes[labels]], 1)), 0.2)).relu()

    def judge(self, features: Tensor, labels: Tensor) -> Tensor:
        d = self.nets["critic"]
        return d.fc2(F.leaky_relu(d.fc1(torch.cat([features, self.task.attributes[labels]], 1)), 0.2)).squeeze(1)

    def project(self, h: Tensor) -> Tensor:
        z = self.nets["projection"].fc(h)
        return z / (z**2).sum(1, keepdim=True).sqrt()

    def instance(self, z: Tensor, labels: Tensor) -> Tensor:
        losses = []
        for i in range(len(z)):
            others = [q for q in range(len(z)) if q != i]
            below = sum(torch.exp(z[i] @ z[q] / 0.1) for q in others)
            friends = [p for p in others if labels[p] == labels[i]]
            if friends:
                losses.append(-sum(torch.log(torch.exp(z[i] @ z[p] / 0.1) / below) for p in friends) / len(friends))
        return sum(losses) / len(losses) if losses else z.sum() * 0

    def compared(self, h: Tensor, labels: Tensor) -> Tensor:
        f, seen = self.nets["comparator"], self.task.attributes[self.task.seen]
        scores = torch.stack(
            [f.fc2(F.leaky_relu(f.fc1(torch.cat([h, a.expand(len(h), -1)], 1)), 0.2)).squeeze(1) for a in seen], 1
        )
        return F.cross_entropy(scores / 0.1, torch.searchsorted(self.task.seen, labels))

    def distribute(self, fake: Tensor, made: Tensor, real: Tensor, y: Tensor) -> Tensor:
        d3, student, teacher = self.parameters.distribution, self.nets["student"], self.nets["teacher"]
        x, labels, first = torch.cat([fake, real]), torch.cat([made, y]), len(made)
        z, zt = student.embedding(x), teacher.embedding(x)
        v, vt = student.classifier(z), teacher.classifier(zt)
        total = d3.classification * -v.log_softmax(1)[range(len(labels)), labels].mean()
        embedding = self.pairs(zt[first:], z[first:], y)
        vs, t = v[first:][:, self.task.seen].softmax(1), vt[first:].softmax(1)
        if d3.kl == "double":
            vs, t = vs.softmax(1), t.softmax(1)
        total = total + d3.in_distribution * (embedding + (t * (t.log() - vs.log())).sum(1).mean())
        s = vt.log_softmax(1).max(1).values if d3.score == "max_log_softmax" else vt.logsumexp(1)
        c = torch.sigmoid(self.nets["confidence"].slope * (s + self.nets["confidence"].offset))
        ht = torch.stack([c, 1 - c], 1)
        ht = ht.softmax(1) if d3.renormalise else ht
        h = self.nets["head"].fc(v.log_softmax(1)).softmax(1)
        groups = labels if d3.target == "class" else (torch.arange(len(labels)) < first).long()
        return total + d3.out_of_distribution * self.pairs(h, ht, groups)

    def pairs(self, rows: Tensor, columns: Tensor, groups: Tensor) -> Tensor:
        found = []
        for i in range(len(rows)):
            for j in range(len(rows)):
                k = (1 + F.cosine_similarity(rows[i], columns[j], 0, 1e-8)) / 2
                same = float(groups[i] == groups[j])
                if self.parameters.distribution.similarity == "logits":
                    found.append(torch.log(1 + torch.exp(k)) - same * k)
                else:
                    k = k.clamp(1e-6, 1 - 1e-6)
                    found.append(-same * torch.log(k) - (1 - same) * torch.log(1 - k))
        return sum(found) / len(found)


KEPT, CRITICS = ("latest", "kept", "snapshots"), ("critic", "projection", "comparator")
OTHER_FORMS = {
    "kl": "double",
    "similarity": "probabilities",
    "renormalise": False,
    "target": "domain",
    "score": "energy",
}


@each_generator
@pytest.mark.parametrize("distribution", [{}, OTHER_FORMS, None], ids=["code", "other forms", "alone"])
def test_an_outer_iteration_is_that_of_the_card(
    generator: str, distribution: dict[str, Any] | None, prepared: Path, run: Run
) -> None:
    fields = {"generator": generator, "distribution": distribution}
    # Weights that make units switch, and everything learn.
    settings = {"instance_weight": 0.3, "class_weight": 0.6} if generator == "cegzsl" else {}
    parameters = generative.entry(**fields, generator_settings=settings)
    task = generative.task(prepared, parameters, run)
    ours = d3gzsl.Learner(task, parameters, run)
    generative.begin(ours)
    torch.manual_seed(3)
    for name in ("generator", *CRITICS, "student"):
        for weight in ours.modules[name].parameters() if name in ours.modules else ():
            nn.init.normal_(weight, 0, 0.5)
    plain = Plain(ours, parameters, task)
    before = {name: weight.clone() for name, weight in plain.nets.named_parameters()}
    theirs = copy.deepcopy(ours.streams["train"])
    contexts = [Context(ours, run, 0), Context(ours, run, 0)]
    for step in range(2):
        for context in contexts:
            context.begin(step)
        ours.step(contexts[0])
        plain.outer(contexts[1], lambda: theirs.draw(derive_seed(0, "train"), 0, 1))
    for name, weight in plain.nets.named_parameters():
        part, _, rest = name.partition(".")
        own = ours.modules[part].get_parameter(rest)
        torch.testing.assert_close(own, weight, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
        # They are not equal because nothing learns. A constant that is added to all scores makes no difference.
        still = part == "teacher" or (distribution is None and name.startswith("student.classifier"))
        if name not in ("critic.fc2.bias", "comparator.fc2.bias"):
            assert torch.equal(weight, before[name]) == still, name


# Who learns from what (card 3.7, property 13)


LEARNS = {
    "classification": {"generator", "embedding", "classifier"},
    "embedding": {"embedding"},
    "labels": {"embedding", "classifier"},
    "distribution": {"generator", "embedding", "classifier", "head", "confidence"},
}


@pytest.mark.parametrize("term", LEARNS)
def test_property_13_each_term_reaches_what_it_should(term: str, prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run)
    generative.begin(ours)
    context = Context(ours, run, 0)
    context.begin(0)
    draw = d3gzsl.Draw(*context.draw("train"))
    student = ours.modules["student"]
    parts: dict[str, nn.Module] = {
        **{name: ours.modules[name] for name in ("generator", "critic", "head", "confidence")},
        "embedding": student.embedding,
        "classifier": student.classifier,
    }
    for module in parts.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0, 0.5)
    loss = ours._compare(ours._synthesise(draw, context)[1], draw, context)[term]
    reached = set()
    for name, module in parts.items():
        found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        if any(gradient is not None and gradient.abs().max() > 0 for gradient in found):
            reached.add(name)
    assert reached == LEARNS[term]


def test_property_13_what_d3_says_makes_no_difference_to_the_critic(prepared: Path, run: Run) -> None:
    """In the first step; later the generator is another."""
    critics = []
    for factor in (1.0, 30.0):
        weights = {name: factor * weight for name, weight in WEIGHTS.items()}
        ours = generative.learner(prepared, run, distribution=weights)
        generative.steps(ours, run, 1)
        critics.append(ours.modules["critic"].state_dict())
    for name, weight in critics[0].items():
        assert torch.equal(weight, critics[1][name]), name


@each_generator
def test_the_teacher_does_not_move(generator: str, prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run, generator=generator)
    before = copy.deepcopy(ours.modules["teacher"].state_dict())
    generative.steps(ours, run, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.modules["teacher"].state_dict().items())
    assert not any(parameter.requires_grad for parameter in ours.modules["teacher"].parameters())


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weight_of_zero_leaves_its_terms_out(weight: str, prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run, distribution={weight: 0})
    (found, *_) = generative.steps(ours, run, 1)
    terms = {"in_distribution": {"embedding", "labels"}, "out_of_distribution": {"distribution"}}.get(weight, {weight})
    assert {name for name in LEARNS if f"loss/{name}" not in found} == terms
    assert ("confidence" in ours.modules) == ("head" in ours.modules) == (weight != "out_of_distribution")


def test_without_d3_nobody_teaches(prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run, distribution=None)
    assert set(ours.modules) == {"student", "generator", "critic", "latest", "kept"}
    assert set(ours.optimizers) == {"generator", "critic"}


# Samples (properties 17 to 20)


@each_generator
def test_property_17_no_sample_but_the_training_split_is_used(generator: str, tmp_path: Path, run: Run) -> None:
    """NaN in everything else: training is the same to the bit, and has no NaN."""
    prepared, found = generative.prepare(tmp_path / "toy"), []
    for spoil in (False, True):
        if spoil:
            generative.spoil_other_samples(prepared)
        ours = generative.learner(prepared, run, generator=generator, select_every=0)
        generative.steps(ours, run, 4)
        found.append(generative.weights(ours))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_property_17_selection_does_not_look_at_the_test_split(tmp_path: Path, run: Run) -> None:
    prepared, found = generative.prepare(tmp_path / "toy"), []
    for spoil in (False, True):
        if spoil:
            features = np.load(prepared / "features.npy")
            features[(pd.read_csv(prepared / "manifest.csv")["split"] == "test").to_numpy()] = np.nan
            np.save(prepared / "features.npy", features)
        ours = generative.learner(prepared, run)
        generative.steps(ours, run, ours._task.steps)
        found.append((generative.weights(ours), ours.state()))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_property_18_scaling_depends_on_training_samples_alone(split: str, tmp_path: Path, run: Run) -> None:
    prepared, parameters = generative.prepare(tmp_path / "toy"), generative.entry()
    scales = []
    for change in (False, True):
        if change:
            features = np.load(prepared / "features.npy")
            features[(pd.read_csv(prepared / "manifest.csv")["split"] == split).to_numpy()] += 1
            np.save(prepared / "features.npy", features)
        scales.append(generative.task(prepared, parameters, run).student.scale.state_dict())
    same = all(torch.equal(tensor, scales[1][name]) for name, tensor in scales[0].items())
    assert same == (split != "train")


def test_training_features_are_scaled_to_one(prepared: Path, run: Run) -> None:
    """By the definition of the card, 3.11, feature by feature."""
    parameters = generative.entry()
    task, (features, _) = generative.task(prepared, parameters, run), generative.train(prepared)
    features = features.astype(np.float64)
    low, high = features.min(0), features.max(0)
    np.testing.assert_allclose(task.train.inputs.numpy(), (features - low) / (high - low), rtol=1e-12, atol=1e-12)


def test_property_19_every_other_class_is_synthesised_equally_often(prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run, distribution={"per_class": 3})
    labels = []
    generator = ours.modules["generator"]
    generator.register_forward_pre_hook(lambda _, inputs: labels.append(inputs[1].clone()))
    generative.steps(ours, run, 1)
    drawn = generative.TRAINING["batch"]
    assert len(labels) == 3  # two updates of the critic, one of the generator
    for found in labels:
        assert set(found[:drawn].tolist()) <= set(SEEN)
        assert found[drawn:].tolist() == [label for label in OTHERS for _ in range(3)]


def test_no_unseen_class_is_synthesised_where_nobody_asks(prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run, distribution=None, select_every=0)
    counts = []
    ours.modules["generator"].register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[1])))
    generative.steps(ours, run, 1)
    assert counts == 3 * [generative.TRAINING["batch"]]


@each_generator
def test_property_20_the_same_seed_gives_the_same_trace(generator: str, prepared: Path, run: Run) -> None:
    def trace(seed: int) -> list[dict[str, float]]:
        ours = generative.learner(prepared, run, generator=generator, training={"seed": seed})
        return generative.steps(ours, run, 3, seed=seed)

    assert trace(0) == trace(0) != trace(1)


@each_generator
@pytest.mark.parametrize("distribution", [{}, None], ids=["d3", "alone"])
def test_resumed_equals_uninterrupted(
    generator: str,
    distribution: dict[str, Any] | None,
    prepared: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ended in the middle between two looks; everything is the same, the best student so far included."""

    class CrashError(Exception):
        pass

    def go(folder: str, crash: int | None) -> d3gzsl.Learner:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        ours = generative.learner(
            prepared, run, generator=generator, distribution=distribution, select_every=2, training={"epochs": 6}
        )
        plain = ours.step

        def step(context: Context) -> Any:
            if context.step == crash:
                raise CrashError
            return plain(context)

        monkeypatch.setattr(ours, "step", step)
        steps = ours._task.steps
        train(ours, run, stage="distill", key="x", steps=steps, seed=0, identity={}, checkpoint_seconds=0)
        return ours

    whole = go("whole", None)
    crash = 3 * whole._task.steps // 4
    assert crash % whole.look_every != 0
    with pytest.raises(CrashError):
        go("resumed", crash)
    resumed = go("resumed", None)
    assert resumed.state() == whole.state()
    expected = generative.weights(whole)
    for name, tensor in generative.weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name


# What is kept


def looked_at(ours: d3gzsl.Learner, run: Run, figures: list[float]) -> list[dict[str, Tensor]]:
    """Train to the end while the validation split says these figures, one per look; the student at every look."""
    said, states = iter(figures), []

    def monitor(network: nn.Module) -> dict[str, float]:
        states.append(copy.deepcopy(network.state_dict()))
        return {"harmonic_mean": next(said)}

    ours._task.monitor = monitor  # type: ignore[method-assign]
    generative.steps(ours, run, ours._task.steps)
    return states


def equal(network: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("figures", "best"), [([0.0, 0.5, 0.2], 1), ([0.3, 0.3, 0.3], 0), ([0.1, 0.2, 0.3], 2)])
def test_the_best_on_the_validation_split_is_kept(
    figures: list[float], best: int, prepared: Path, run: Run, tmp_path: Path
) -> None:
    ours = generative.learner(prepared, run, test_best=True)
    states = looked_at(ours, run, figures)
    assert len(states) == 3
    assert not equal(ours.watched, states[0])
    assert equal(ours.student, states[best])
    assert equal(ours.watched, states[-1])
    companions = ours.companions
    assert set(companions) == {"generator", "snapshots"} | ({"last"} if best != 2 else set())
    if "last" in companions:
        assert companions["last"].evaluated
        assert equal(companions["last"].network, states[-1])
    assert not companions["generator"].evaluated
    assert not companions["snapshots"].evaluated
    for snapshot, state in zip(companions["snapshots"].network.children(), states, strict=True):
        assert equal(snapshot, state)


def test_an_incomplete_last_period_ends_with_a_look(prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run, select_every=2, test_best=True)
    states = looked_at(ours, run, [0.1, 0.2])
    assert ours.look_every == 2 * ours._task.steps_per_epoch
    assert [equal(snapshot, state) for snapshot, state in zip(ours.modules["snapshots"], states, strict=True)] == 2 * [
        True
    ]


def test_without_selection_the_student_is_that_of_the_end(prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run, select_every=0)
    generative.steps(ours, run, ours._task.steps)
    assert set(ours.companions) == {"generator"}
    assert equal(ours.student, ours.modules["student"].state_dict())


@each_generator
def test_the_two_stage_student_has_a_last_layer_of_its_own(generator: str, prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run, generator=generator, distribution=None, select_every=0)
    generative.steps(ours, run, ours._task.steps)
    deployed, trained = (dict(net.state_dict()) for net in (ours.student, ours.modules["student"]))
    for name, tensor in deployed.items():
        assert torch.equal(tensor, trained[name]) == (not name.startswith("classifier")), name


def test_the_generator_beside_the_student_knows_all_classes(prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run)
    generator, built_from, _ = ours.companions["generator"]
    assert built_from == {"name": "generator", "attributes": 4, "noise": 4, "hidden": 9}
    assert isinstance(generator, Generator)
    assert torch.equal(generator.attributes, ours._task.attributes)


# Rates, and what is refused


def test_rates_change_with_epochs_whatever_the_number_of_updates(prepared: Path, run: Run) -> None:
    grown = {"growth": 2.0, "growth_every": 2, "epochs": 5}
    ours = generative.learner(
        prepared, run, training=grown, distribution={"student_growth": 0.5, "scores_growth": 0.25}
    )
    context = Context(ours, run, 0)
    generative.begin(ours)
    growth = {
        "generator": 2, "critic": 2, "embedding": 0.5, "classifier": 0.5, "confidence": 0.25,
    }  # fmt: skip
    epoch = ours._task.steps_per_epoch
    assert ours._task.steps == 5 * epoch == 5 * math.ceil(len(ours._task.train.labels) / 8)
    for step in range(ours._task.steps):
        context.begin(step)
        for name, factor in growth.items():
            wanted = 1e-3 * factor ** (step // (2 * epoch))
            assert ours.schedules[name](context.counts[name]) == pytest.approx(wanted), (name, step)
        ours.step(context)


def test_embeddings_that_cannot_be_compared_are_refused(prepared: Path, run: Run) -> None:
    with pytest.raises(UserError, match=r"widths 5 and 7 · give both the same network\.hidden"):
        generative.learner(prepared, run, width=5)


def test_a_teacher_of_other_classes_is_refused(prepared: Path, run: Run) -> None:
    parameters = generative.entry()
    network, description = generative.teacher(prepared)
    description.interface["seen"] = description.interface["seen"][1:]
    with pytest.raises(UserError, match="differ in seen classes"):
        for_student(parameters, prepared, run, (network, description))


def test_selection_needs_validation_classes(tmp_path: Path, run: Run) -> None:
    prepared = generative.prepare(tmp_path / "toy")
    told = json.loads((prepared / "dataset.json").read_text())
    told["roles"] = ["unseen" if role == "validation" else role for role in told["roles"]]
    (prepared / "dataset.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"select_every = 1 needs classes to select with, and 'toy' has none"):
        generative.learner(prepared, run)


def test_small_batches_are_said_where_samples_are_compared(
    prepared: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "distillery"):
        generative.learner(prepared, run, training={"batch": 3})
        assert not caplog.messages
        generative.learner(prepared, run, generator="cegzsl", training={"batch": 3})
    assert "batches of 3 hold few samples of the same class (there are 4)" in caplog.text


def test_bfloat16_keeps_the_losses_in_float32(prepared: Path) -> None:
    run = generative.run("bf16-mixed")
    for generator in GENERATORS:
        ours = generative.learner(prepared, run, generator=generator)
        context = Context(ours, run, 0)
        generative.begin(ours)
        context.begin(0)
        found = ours.step(context)
        assert {term.dtype for term in found.values()} == {torch.float32}
        assert all(torch.isfinite(term) for term in found.values())


def test_the_student_is_the_plain_network(prepared: Path, run: Run) -> None:
    ours = generative.learner(prepared, run)
    assert set(ours.student.state_dict()) == set(MLP(6, 9, 7).state_dict())
