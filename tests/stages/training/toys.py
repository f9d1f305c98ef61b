"""Five small learners with the structure of the five methods, LGTM itself, recognition's triplets, and a command that
trains one of them.

    python tests/stages/training/toys.py NAME FOLDER [--devices 2] [--batch 8] [--precision 64-true] [--pause 0.01]

trains in FOLDER (checkpoints go there) and prints the sha256 of everything it ends with. NAME may be `all`.
"""

import argparse
import copy
import hashlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from models.recognition import Output
from stages.distill import lgtm
from stages.distill.horkd import pair_loss, triplet_loss
from stages.parameters.recognition import Training
from stages.teach.recognition import Recognition
from stages.training import ClassStream, Context, Method, Run, Stream, derive_seed, train

sys.path.insert(0, str(Path(__file__).parents[1] / "distill"))
import mutual

STEPS = 40


def network(inputs: int, outputs: int, *, norm: bool = False) -> nn.Sequential:
    middle: list[nn.Module] = [nn.BatchNorm1d(12)] if norm else []
    return nn.Sequential(nn.Linear(inputs, 12), *middle, nn.Tanh(), nn.Linear(12, outputs))


def samples(seed: int, count: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, :4] + 0.3 * torch.randn(count, 4, generator=generator)).argmax(1)


class Toy(Method):
    """Shared by all: one run, one batch size, float type of the run."""

    # BatchNorm and relations make a batch more than the sum of its parts: these toys leave such things out where one
    # process is compared with two.
    norm = True
    pause = 0.0

    def __init__(self, run: Run, batch: int) -> None:
        super().__init__()
        torch.manual_seed(derive_seed("toy", "weights"))
        self.run, self.batch = run, batch
        self.build()
        for module in self.modules.values():
            module.to(run.dtype)

    def build(self) -> None:
        raise NotImplementedError

    def add(self, name: str, module: nn.Module) -> nn.Module:
        self.modules[name] = module.to(self.run.dtype)
        return module

    def optimize(self, name: str, optimizer: torch.optim.Optimizer, rate: float = 0.05) -> None:
        self.optimizers[name] = optimizer
        self.schedules[name] = lambda count: rate * (1 - count / (10 * STEPS))

    def data(self, context: Context, stream: str = "train") -> tuple[Tensor, Tensor]:
        time.sleep(self.pause)
        x, y = context.draw(stream)
        return x.to(self.run.dtype), y


class Feature(Toy):
    """GDD, HORKD: a frozen teacher, a training-only projection, relations, noise from a random stream of its own."""

    def build(self) -> None:
        self.add("teacher", network(6, 4, norm=self.norm))
        self.add("student", network(6, 4, norm=self.norm))
        self.add("projection", nn.Linear(4, 4, bias=False))
        self.frozen = frozenset({"teacher"})
        self.streams["train"] = Stream(samples(1), self.batch)
        trained = [*self.modules["student"].parameters(), *self.modules["projection"].parameters()]
        self.optimize("student", torch.optim.SGD(trained, lr=1, momentum=0.9, weight_decay=1e-3))

    def step(self, context: Context) -> Mapping[str, Tensor]:
        x, y = self.data(context)
        with torch.no_grad():
            target = self.modules["teacher"](x)
        logits = self.modules["student"](x)
        projected = self.modules["projection"](logits)
        if self.norm:
            projected = projected + 0.1 * torch.randn(
                projected.shape, generator=context.generator("noise"), dtype=projected.dtype
            )
        terms = {"task": F.cross_entropy(logits, y), "feature": F.mse_loss(projected, target)}
        # Relations between samples are those of the global batch.
        everything = context.run.gather(logits), context.run.gather(target)
        terms["pairs"], terms["triplets"] = 10 * pair_loss(*everything), 10 * triplet_loss(*everything)
        context.update("student", terms)
        return terms


class Influence(Toy):
    """LGTM: an updated teacher, a virtual student, a held-out gradient, a cotangent given by hand."""

    def build(self) -> None:
        self.add("teacher", network(6, 4, norm=False))
        self.add("student", network(6, 4, norm=False))
        self.streams["train"] = Stream(samples(2), self.batch)
        self.streams["held_out"] = Stream(samples(3, 48), self.batch, shuffle=False)
        for name in ("teacher", "student"):
            self.optimize(name, torch.optim.AdamW(self.modules[name].parameters(), lr=1), rate=0.01)

    def step(self, context: Context) -> Mapping[str, Tensor]:
        teacher, student = self.modules["teacher"], self.modules["student"]
        (x, y), (held_x, held_y) = self.data(context), self.data(context, "held_out")
        names, weights = zip(*student.named_parameters(), strict=True)
        teacher_logits, student_logits = teacher(x), student(x)
        loss = self.soft(student_logits, teacher_logits.detach())
        gradient = context.gradient(loss, weights)
        virtual = {
            n: (w - 0.01 * g).detach().requires_grad_() for n, w, g in zip(names, weights, gradient, strict=True)
        }
        held = F.cross_entropy(functional_call(student, virtual, (held_x,)), held_y)
        direction = context.gradient(held, list(virtual.values()))
        scale = 0.01 / torch.stack([v.norm() for v in direction]).norm()

        def moved(sign: float) -> Tensor:
            shifted = {n: w + sign * scale * v for n, w, v in zip(names, weights, direction, strict=True)}
            with torch.no_grad():
                return functional_call(student, shifted, (x,)).softmax(1)

        auxiliary = F.cross_entropy(teacher_logits, y) + self.soft(teacher_logits, student_logits.detach())
        cotangent = (moved(1) - moved(-1)) / (2 * scale * len(x))
        context.update("teacher", [auxiliary, teacher_logits], [torch.ones_like(auxiliary), 0.01 * cotangent])
        with torch.no_grad():
            target = teacher(x)
        terms = {"soft": self.soft(student(x), target)}
        context.update("student", terms)
        return {**terms, "held_out": held, "auxiliary": auxiliary}

    def soft(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


class Adversarial(Toy):
    """D3GZSL: several optimisers with gradient penalty, sub-steps with batches of their own, shared parts."""

    def build(self) -> None:
        self.add("generator", network(6, 6))
        self.add("critic", network(6, 1))
        self.add("student", network(6, 4))
        self.add("confidence", nn.Linear(1, 1))
        self.streams["train"] = Stream(samples(4), self.batch)
        for name in self.modules:
            self.optimize(name, torch.optim.Adam(self.modules[name].parameters(), lr=1, betas=(0.5, 0.999)), rate=0.01)

    def fake(self, context: Context, x: Tensor, name: str) -> Tensor:
        # One number per global sample, so that two processes see what one sees.
        noise = torch.cos(x.double() * (3 + context.step)).to(x.dtype)
        if self.norm:
            noise = torch.randn(x.shape, generator=context.generator(name), dtype=x.dtype)
        return self.modules["generator"](noise)

    def step(self, context: Context) -> Mapping[str, Tensor]:
        critic, student = self.modules["critic"], self.modules["student"]
        for part in range(3):
            x, y = self.data(context)
            fake = self.fake(context, x, f"noise-{part}").detach()
            mixed = (0.5 * x + 0.5 * fake).requires_grad_()
            slope = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)[0]
            terms = {
                "critic": critic(fake).mean() - critic(x).mean(),
                "penalty": 10 * (slope.norm(dim=1) - 1).square().mean(),
                "classes": F.cross_entropy(student(x), y),
            }
            context.update(("critic", "student"), terms)
        x, _ = self.data(context)
        fake = self.fake(context, x, "noise-generator")
        confidence = torch.sigmoid(self.modules["confidence"](student(fake).amax(1, keepdim=True)))
        last = {"generator": -critic(fake).mean(), "confidence": confidence.mean()}
        context.update(("generator", "student", "confidence"), last)
        return {**terms, **last}


class Experts(Toy):
    """VDD: gradients given by hand, a gate with twice the updates, a moving average, state of its own."""

    def build(self) -> None:
        self.add("student", network(6, 4))
        self.add("gate", network(6, 2))
        self.add("average", copy.deepcopy(self.modules["student"]))
        self.frozen = frozenset({"average"})
        self.streams["states"] = Stream(samples(5), self.batch)
        self.streams["demos"] = Stream(samples(6, 56), self.batch)
        self.optimize("experts", torch.optim.AdamW(self.modules["student"].parameters(), lr=1), rate=0.02)
        self.optimize("gate", torch.optim.AdamW(self.modules["gate"].parameters(), lr=1), rate=0.02)
        self.clip = {"experts": 0.05}
        self.seen = 0

    def step(self, context: Context) -> Mapping[str, Tensor]:
        student, average = self.modules["student"], self.modules["average"]
        x, _ = self.data(context, "states")
        mean, factor = student(x).split(2, dim=1)
        context.update("experts", [mean, factor], [(mean - x[:, :2]).detach() / len(x), (factor - 1).detach() / len(x)])
        with torch.no_grad():
            for kept, new in zip(average.parameters(), student.parameters(), strict=True):
                kept.lerp_(new, 0.1)
        self.seen += 1
        for _ in range(2):
            x, y = self.data(context, "demos")
            loss = F.cross_entropy(self.modules["gate"](x), y % 2)
            context.update("gate", {"gate": loss * (1 + 1 / self.seen)})
        return {"gate": loss, "mean": mean.square().mean()}

    def state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class Average(Toy):
    """A student that learns from its own moving average, with dropout, BatchNorm and one hooked feature."""

    def build(self) -> None:
        self.add(
            "student", nn.Sequential(network(6, 12, norm=self.norm), nn.Dropout(0.2 * self.norm), nn.Linear(12, 4))
        )
        self.add("average", copy.deepcopy(self.modules["student"]))
        self.frozen = frozenset({"average"})
        self.streams["train"] = Stream(samples(7), self.batch)
        self.optimize("student", torch.optim.SGD(self.modules["student"].parameters(), lr=1, momentum=0.9))

    def step(self, context: Context) -> Mapping[str, Tensor]:
        student, average = self.modules["student"], self.modules["average"]
        x, y = self.data(context)
        hooked: list[Tensor] = []
        hook = student[0].register_forward_hook(lambda module, inputs, output: hooked.append(output))
        logits = student(x)
        hook.remove()
        with torch.no_grad():
            target = average(x)
        terms = {
            "task": F.cross_entropy(logits, y),
            "consistency": F.mse_loss(logits, target),
            "feature": hooked.pop().square().mean(),
        }
        context.update("student", terms)
        with torch.no_grad():
            for kept, new in zip(average.parameters(), student.parameters(), strict=True):
                kept.lerp_(new, 0.05)
        return terms


class Triplets(Toy):
    """Batches of whole classes, and triplets that are mined in the global batch."""

    def build(self) -> None:
        self.add("student", network(6, 4, norm=self.norm))
        x, y = samples(10)
        self.streams["train"] = ClassStream([x, y], self.batch, y, 4)
        self.optimize("student", torch.optim.Adam(self.modules["student"].parameters(), lr=1), rate=0.01)
        self.task = SimpleNamespace(_run=self.run, _learning=SimpleNamespace(learns="triplets", margin=0.2))

    def step(self, context: Context) -> Mapping[str, Tensor]:
        x, y = self.data(context)
        embedding = self.modules["student"](x)
        loss = Recognition.objective(self.task, Output(embedding, embedding, embedding[:, :0]), y)
        context.update("student", {"task": loss})
        return {"task": loss}


class Mutual(lgtm.Learner):
    """LGTM as it is, with everything that it has to remember."""

    def __init__(self, run: Run, batch: int) -> None:
        networks = mutual.networks(0.2 * Toy.norm)
        rows = mutual.samples(8, 48, 6, 4), mutual.samples(9, 20, 6, 4)
        task = mutual.Toy(run, *networks, *rows, batch=batch, steps=STEPS)
        super().__init__(task, mutual.entry(influence_scale={"ratio": 0.5, "every": 3}), run)
        self.pause = Toy.pause

    def step(self, context: Context) -> Mapping[str, Tensor]:
        time.sleep(self.pause)
        return super().step(context)


TOYS = {
    "feature": Feature,
    "influence": Influence,
    "adversarial": Adversarial,
    "experts": Experts,
    "average": Average,
    "triplets": Triplets,
    "lgtm": Mutual,
}


def settings(devices: int = 1, batch: int = 16, precision: str = "32-true") -> Training:
    return Training(threads=1, accelerator="cpu", devices=devices, batch=batch, precision=precision)


def fingerprint(method: Method) -> str:
    """sha256 over all weights and buffers, by name."""
    total = hashlib.sha256()
    for part, module in sorted(method.modules.items()):
        for name, tensor in module.state_dict().items():
            total.update(f"{part}.{name}".encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=[*TOYS, "all"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--plain", action="store_true", help="without BatchNorm, dropout and noise")
    parser.add_argument("--weights", type=Path, help="where all weights, and what else a method keeps, are saved")
    arguments = parser.parse_args()
    os.chdir(arguments.folder)
    run = Run(settings(arguments.devices, arguments.batch, arguments.precision))
    Toy.norm = not arguments.plain
    weights = {}
    for name in TOYS if arguments.name == "all" else [arguments.name]:
        toy = TOYS[name](run, arguments.batch)
        toy.pause = arguments.pause
        train(toy, run, stage="toy", key=name, steps=STEPS, seed=7, identity={"toy": name})
        weights[name] = {part: module.state_dict() for part, module in toy.modules.items()} | {"state": toy.state()}
        if run.rank == 0:
            print(fingerprint(toy), flush=True)
    if run.rank == 0 and arguments.weights:
        torch.save(weights, arguments.weights)


if __name__ == "__main__":
    main()
