"""The two-stage classifier: a softmax on real samples of seen classes beside synthesised ones of all others."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from models.zero_shot import MLP, Generator
from stages.parameters.zero_shot import Classifier


@torch.no_grad()
def synthesise(generator: Generator, classes: Tensor, samples: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """`samples` of each of (C,) classes: (C * samples, D) scaled features, class by class, and their labels."""
    labels = classes.repeat_interleave(samples)
    weight = generator.fc1.weight
    noise = torch.randn(len(labels), generator.noise, generator=random, device=weight.device, dtype=weight.dtype)
    return torch.cat([generator(*part) for part in zip(noise.split(4096), labels.split(4096), strict=True)]), labels


def refit(
    student: MLP,
    real: tuple[Tensor, Tensor],
    generator: Generator,
    others: Tensor,
    settings: Classifier,
    betas: tuple[float, float],
    random: torch.Generator,
) -> None:
    """Train the last layer of a student anew; all else of it stays as it is (D3GZSL card 3.9).

    It begins at zero: softmax regression is convex, and so no class has an advantage that chance gave it. The official
    code draws its beginning at random and keeps the epoch that is best on the test split; here the last is kept.

    Args:
        real: (N, D) scaled features of seen classes and their (N,) labels. others: the classes to synthesise.
    """
    features, labels = synthesise(generator, others, settings.samples, random)
    with torch.no_grad():
        embedding = student.embedding(torch.cat([real[0], features]))
    labels = torch.cat([real[1], labels])
    layer = student.classifier
    weight, bias = (nn.Parameter(torch.zeros_like(tensor)) for tensor in (layer.weight, layer.bias))
    optimizer = Adam([weight, bias], lr=settings.learning_rate, betas=betas, fused=True)
    for _ in range(settings.epochs):
        order = torch.randperm(len(labels), generator=random, device=labels.device)
        for rows in order.split(settings.batch):
            loss = F.cross_entropy(F.linear(embedding[rows], weight, bias), labels[rows])
            weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
            optimizer.step()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
