"""A tiny task with a class per pixel, for methods on feature maps: two networks of any width, data in memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.parameters import segmentation as schema
from stages.training import Context, Method, Run, Stream, Task, Views, derive_seed

TRAINING: dict[str, Any] = {"epochs": 1, "batch": 4, "accelerator": "cpu"}
NETWORK = {"name": "pspnet", "encoder": {"name": "resnet", "widths": [4, 4, 4, 4]}}
IGNORE = 255


class Output(NamedTuple):
    logits: Tensor
    auxiliary: Tensor | None
    features: Mapping[str, Tensor]


class Network(nn.Module):
    """Two stages, halving from the first to the second; a head with dropout."""

    def __init__(self, widths: Sequence[int], classes: int = 3, head: int = 6) -> None:
        super().__init__()
        self.features = {"stage1": widths[0], "stage2": widths[1], "last": widths[1]}
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip((3, widths[0]), widths, strict=True)
        )
        self.head = nn.Sequential(
            nn.Conv2d(widths[1], head, 3, padding=1),
            nn.BatchNorm2d(head),
            nn.Dropout2d(0.1),
            nn.Conv2d(head, classes, 1),
        )
        self.heads_run = 0

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        first = self.encoder[0](images)
        second = self.encoder[1](first)
        return {"stage1": first, "stage2": second, "last": second}

    def forward(self, images: Tensor) -> Output:
        self.heads_run += 1
        features = self.encode(images)
        return Output(self.head(features["last"]), None, features)


class Dense(Task):
    """24 images of 16 x 12 pixels; the class follows from the colour, a tenth of the pixels has no label."""

    def __init__(
        self,
        run: Run,
        widths: Sequence[int] = (4, 6),
        teacher: nn.Module | None = None,
        training: schema.Training | None = None,
        seed: int = 0,
    ) -> None:
        self._run, self._training = run, training or schema.Training.model_validate(TRAINING)
        self.network, self.interface, self.source = {}, {}, {}
        self.seed, self.clip, self.steps, self.steps_per_epoch = seed, self._training.clip, 12, 6
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(24, 3, 16, 12, generator=generator)
        self.labels = self.images.argmax(1)
        self.labels[torch.rand(self.labels.shape, generator=generator) < 0.1] = IGNORE
        torch.manual_seed(derive_seed(seed, "weights"))
        self.student = self._place(Network(widths))
        self.teacher = None if teacher is None else self._place(teacher)

    def _place(self, network: nn.Module) -> nn.Module:
        return network.to(self._run.device, self._run.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def streams(self) -> dict[str, Stream]:
        return {"train": Stream([self.images, self.labels], self._training.batch)}

    def views(self, context: Context) -> Views:
        images, labels = context.draw("train")
        images = images.to(self._run.dtype).contiguous(memory_format=torch.channels_last)
        return Views(images, images, labels)

    def objective(self, output: Output, target: Tensor) -> Tensor:
        logits = F.interpolate(output.logits, target.shape[1:], mode="bilinear")
        return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, target, ignore_index=IGNORE)

    def logits(self, output: Output) -> Tensor:
        return output.logits

    def features(self, network: nn.Module) -> Mapping[str, int]:
        return cast(Network, network).features

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)

    def schedule(self, steps: int, learning_rate: float | None = None) -> Callable[[int], float]:
        return lambda count: 0.05 * (1 - count / steps)

    def monitor(self, network: nn.Module) -> Mapping[str, float]:
        return {}


def teacher(widths: Sequence[int] = (4, 10), **options: int) -> Network:
    torch.manual_seed(1)
    return Network(widths, **options)


def run(precision: str = "32-true") -> Run:
    return Run(schema.Training.model_validate({**TRAINING, "precision": precision}))


def entry(kind: type[schema.AnyStudent], **fields: Any) -> Any:
    """Validated parameters of one student, as params.yaml would give them."""
    method = kind.__name__.lower()
    base = {"task": "segmentation", "dataset": "x", "teacher": "big", "method": method, "network": NETWORK}
    if method == "alone":
        base["teacher"] = "none"
    return kind.model_validate({**base, "training": TRAINING, **fields})


def steps(learner: Method, run: Run, count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    """Some steps as the training loop makes them; what each returned."""
    context = Context(learner, run, seed)
    for name, module in learner.modules.items():
        module.train(name not in learner.frozen)
        if name in learner.frozen:
            module.requires_grad_(False)
    found = []
    for step in range(count):
        context.begin(step)
        found.append({name: value.detach() for name, value in learner.step(context).items()})
    return found


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
