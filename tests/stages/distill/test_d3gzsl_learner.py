"""D3GZSL's learner on a tiny task: who learns from what, a whole outer iteration written out, what is kept."""

import copy
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
from stages.teach.zero_shot import ZeroShot
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
        seed = __import__("stages.training", fromlist=["derive_seed"]).derive_seed(0, "train")
        plain.outer(contexts[1], lambda seed=seed: theirs.draw(seed, 0, 1))
    for name, weight in plain.nets.named_parameters():
        part, _, rest = name.partition(".")
        own = ours.modules[part].get_parameter(rest)
        torch.testing.assert_close(own, weight, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
        # They are not equal because nothing learns. A constant that is added to all scores makes no difference.
        still = part == "teacher" or (distribution is None and name.startswith("student.classifier"))
        if name not in ("critic.fc2.bias", "comparator.fc2.bias"):
            assert torch.equal(weight, before[name]) == still, name
