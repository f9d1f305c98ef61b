"""The two-stage classifier: what is synthesised, and a last layer that is trained as torch's own would be."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.layers import Normalise
from models.zero_shot import MLP, Encoder, Generator
from stages.generators.two_stage import refit, synthesise
from stages.parameters.zero_shot import Classifier

CLASSES, ATTRIBUTES, FEATURES, NOISE = 6, 3, 5, 4
SEEN, OTHERS = torch.tensor([0, 2, 5]), torch.tensor([4, 1, 3])
BETAS = (0.5, 0.999)


def generator(seed: int = 0, classes: int = CLASSES) -> Generator:
    torch.manual_seed(seed)
    made = Generator(FEATURES, classes, ATTRIBUTES, NOISE, 8).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0, 0.7)
    made.attributes.normal_()
    return made


def student(hidden: int | None = 7, seed: int = 1, encoder: Encoder | None = None) -> MLP:
    torch.manual_seed(seed)
    made = MLP(FEATURES, CLASSES, hidden, encoder).double()
    made.scale.minimum.normal_()
    made.scale.divisor.uniform_(1, 2)
    return made


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def real(count: int = 23, seed: int = 2) -> tuple[Tensor, Tensor]:
    random = stream(seed)
    features = torch.rand(count, FEATURES, generator=random, dtype=torch.float64)
    return features, SEEN[torch.randint(len(SEEN), (count,), generator=random)]


def classifier(**fields: Any) -> Classifier:
    base = {"mode": "two_stage", "samples": 4, "epochs": 3, "batch": 8, "learning_rate": 1e-2}
    return Classifier.model_validate({**base, **fields})


def concatenated(made: Generator, noise: Tensor, labels: Tensor) -> Tensor:
    """The generator by its definition (D3GZSL card 3.1)."""
    hidden = F.leaky_relu(made.fc1(torch.cat([noise, made.attributes[labels]], 1)), 0.2)
    return made.fc2(hidden).relu()


# What is synthesised


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 99))
def test_so_many_samples_of_every_class_in_their_order(classes: list[int], samples: int, seed: int) -> None:
    made = generator()
    features, labels = synthesise(made, torch.tensor(classes), samples, stream(seed))
    assert labels.tolist() == [label for label in classes for _ in range(samples)]
    assert not features.requires_grad
    noise = torch.randn(len(labels), NOISE, generator=stream(seed), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(features, concatenated(made, noise, labels), rtol=1e-10, atol=1e-12)


def test_the_same_seed_gives_the_same_features() -> None:
    made = generator()
    first, second, other = (synthesise(made, OTHERS, 5, stream(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.unique(dim=0).shape[0] == len(first), "every sample has noise of its own"


def test_attributes_are_those_that_the_generator_knows() -> None:
    """Those of a class change its features, and nobody else's."""
    made = generator()
    before, labels = synthesise(made, OTHERS, 5, stream())
    made.attributes[4] += 1
    after, _ = synthesise(made, OTHERS, 5, stream())
    changed = (before != after).any(1)
    assert changed[labels == 4].any()
    assert not changed[labels != 4].any()


def test_many_samples_are_made_in_parts() -> None:
    made = generator()
    shown = []
    made.register_forward_pre_hook(lambda _, inputs: shown.append(len(inputs[1])))
    features, labels = synthesise(made, OTHERS, 3000, stream())
    assert sum(shown) == len(features) == len(labels) == 9000
    assert max(shown) == 4096
    noise = torch.randn(9000, NOISE, generator=stream(), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(features, concatenated(made, noise, labels), rtol=1e-10, atol=1e-12)


# The last layer


@pytest.mark.parametrize("hidden", [7, None])
@pytest.mark.parametrize("batch", [8, 5, 1000])
def test_it_is_trained_as_a_plain_loop_trains_it(hidden: int | None, batch: int) -> None:
    """nn.Linear from zero, torch's Adam, mean cross-entropy over batches of a permutation, the last one shorter."""
    ours, made, samples, chosen = student(hidden), generator(), real(), classifier(batch=batch)
    random = stream(3)
    labels = OTHERS.repeat_interleave(4)
    noise = torch.randn(len(labels), NOISE, generator=random, dtype=torch.float64)
    plain = nn.Linear(hidden or FEATURES, CLASSES).double()
    nn.init.zeros_(plain.weight)
    nn.init.zeros_(plain.bias)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, betas=BETAS)
    with torch.no_grad():
        features = torch.cat([samples[0], concatenated(made, noise, labels)])
        if hidden is not None:
            features = (features @ ours.embedding[0].weight.T + ours.embedding[0].bias).relu()
    labels = torch.cat([samples[1], labels])
    for _ in range(3):
        order = torch.randperm(len(labels), generator=random)
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            scores = plain(features[rows]).log_softmax(1)
            loss = -sum(scores[i, label] for i, label in enumerate(labels[rows].tolist())) / len(rows)
            adam.zero_grad()
            loss.backward()
            adam.step()
    refit(ours, samples, made, OTHERS, chosen, BETAS, stream(3))
    torch.testing.assert_close(ours.classifier.weight, plain.weight, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(ours.classifier.bias, plain.bias, rtol=1e-7, atol=1e-10)
    assert plain.weight.abs().max() > 0.01


def test_nothing_but_the_last_layer_changes() -> None:
    inside = Encoder(Normalise([0.5], [0.25]), 1, None, [4, FEATURES], 1)
    ours, made = student(encoder=inside).train(), generator()
    modes = [module.training for module in ours.modules()]
    before, theirs = copy.deepcopy(ours.state_dict()), copy.deepcopy(made.state_dict())
    numbers = torch.get_rng_state()
    refit(ours, real(), made, OTHERS, classifier(), BETAS, stream())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("classifier.")), name
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in made.state_dict().items())
    assert modes == [module.training for module in ours.modules()]
    assert torch.equal(numbers, torch.get_rng_state()), "random numbers are those of the stream it is given"
    assert all(parameter.grad is None for parameter in [*ours.parameters(), *made.parameters()])
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_it_is_trained_anew_and_the_same_every_time() -> None:
    """What the layer was before makes no difference; the stream does."""
    found = []
    for start, seed in ((0, 0), (5, 0), (0, 1)):
        ours = student()
        nn.init.normal_(ours.classifier.weight, start)
        nn.init.normal_(ours.classifier.bias, start)
        refit(ours, real(), generator(), OTHERS, classifier(), BETAS, stream(seed))
        found.append(ours.classifier.weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_classes_that_can_be_told_apart_are() -> None:
    """A generator that writes attributes as features, with little noise: right for all, seen or not."""
    made = Generator(CLASSES, CLASSES, CLASSES, 1, CLASSES).double()
    made.attributes.copy_(torch.eye(CLASSES))
    with torch.no_grad():
        for layer in (made.fc1, made.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        made.fc1.weight[:, 0] = 0.01
        made.fc1.weight[:, 1:] = torch.eye(CLASSES)
        made.fc2.weight.copy_(torch.eye(CLASSES))
    ours = MLP(CLASSES, CLASSES, None).double()
    random = stream(4)
    labels = SEEN.repeat(10)
    features = F.one_hot(labels, CLASSES) + 0.01 * torch.rand(30, CLASSES, generator=random, dtype=torch.float64)
    refit(
        ours, (features, labels), made, OTHERS, classifier(samples=10, epochs=30, learning_rate=0.05), BETAS, random
    )  # fmt: skip
    unseen, theirs = synthesise(made, OTHERS, 50, stream(9))
    with torch.no_grad():
        answers = ours(torch.cat([features, unseen])).logits.argmax(1)
    assert torch.equal(answers, torch.cat([labels, theirs]))


def test_it_stays_in_the_dtype_of_the_student() -> None:
    ours, made = student().float(), generator().float()
    features, labels = real()
    refit(ours, (features.float(), labels), made, OTHERS, classifier(), BETAS, stream())
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in ours.parameters())
