"""D3GZSL and its generators against reference vectors: every $REFERENCE_ROOT/d3gzsl/*.npz, one test per file.

What a file is for follows from the beginning of its name. Every key is either an input, which is used, or a value,
which is compared. The networks are those of models/zero_shot.py, with the file's weights.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.zero_shot import xlsa17
from models.zero_shot import MLP, Comparator, Generator, Projection, Scale
from stages.distill.d3gzsl import (
    Confidence,
    Head,
    distribution_loss,
    embedding_loss,
    label_loss,
    max_log_softmax,
    teacher_codes,
    unit,
)
from stages.evaluate.zero_shot import answers, class_accuracy, handicapped, harmonic_mean
from stages.generators.cegzsl import class_loss, class_scores, instance_loss
from stages.generators.generator import backbone
from stages.parameters.zero_shot import Training
from stages.teach.zero_shot import ZeroShot

FOLDER = Path(os.environ.get("REFERENCE_ROOT") or Path(__file__).parent) / "d3gzsl"
FILES = sorted(FOLDER.glob("*.npz"))
BOUNDS = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-6)}
Values = dict[str, Tensor]


class Vectors:
    """The arrays of one file in a dtype; remembers which of them were used."""

    def __init__(self, arrays: Mapping[str, np.ndarray], dtype: torch.dtype) -> None:
        self.arrays, self.dtype = arrays, dtype
        self.used: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        tensor = torch.from_numpy(np.array(self.arrays[key]))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def number(self, key: str) -> float:
        return float(self[key])

    def load(self, layers: Mapping[str, nn.Module]) -> None:
        """Give layers, by the name that the file has for them, its weights."""
        for name, layer in layers.items():
            for kind, parameter in layer.named_parameters():
                parameter.data = self[f"{name}.{kind}"].reshape(parameter.shape)


def test_there_are_vectors() -> None:
    assert FILES, f"no .npz in {FOLDER} · set REFERENCE_ROOT to the folder that holds d3gzsl/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_vectors(path: Path) -> None:
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    check = CHECKS.get(path.stem.rpartition("_")[0])
    assert check is not None, f"the name of {path.name} does not say what it is for"
    for dtype, bounds in BOUNDS.items():
        vectors = Vectors(arrays, dtype)
        values = check(vectors)
        assert vectors.used | values.keys() == arrays.keys(), f"keys of {path.name} that are not used, or do not exist"
        assert not vectors.used & values.keys(), "what is compared is no input"
        assert values
        for key, value in values.items():
            close(value, arrays[key], f"{path.name}, {key} in {dtype}", *bounds)


def close(actual: Tensor, expected: np.ndarray, where: str, relative: float, absolute: float) -> None:
    """Within a share of the largest expected value: single gradients may be sums that cancel."""
    truth = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    assert actual.numel() == truth.numel(), where
    off = (actual.detach().double().reshape(truth.shape) - truth).abs().max().item()
    bound = absolute + relative * truth.abs().max().item()
    assert off <= bound, f"{where}: off by {off}, allowed {bound}"


def gradients(loss: Tensor, layers: Mapping[str, nn.Module], prefix: str) -> Values:
    """Of every weight, under the file's name for it; 0 where the loss does not depend on it."""
    named = {f"{prefix}.{name}.{kind}": x for name, layer in layers.items() for kind, x in layer.named_parameters()}
    return over(loss, named)


def over(loss: Tensor, named: Mapping[str, Tensor]) -> Values:
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def linear(embedding: nn.Module) -> nn.Module:
    return cast(nn.Sequential, embedding)[0]


def id_embedding(vectors: Vectors) -> Values:
    teacher, labels = vectors["z_teacher"], vectors["labels"]
    student = vectors["z_student"].requires_grad_()
    loss = embedding_loss(teacher, student, labels)
    again = embedding_loss(unit(teacher), student, labels, unit_teacher=True)
    return {
        "loss": loss,
        "loss_matmul_variant": again,
        **over(loss, {"grad_z_student": student}),
        "loss_when_student_equals_teacher": embedding_loss(teacher, teacher, labels),
        "lrd_loss_unused": 1 - (unit(teacher) * unit(student)).sum(1).mean(),
    }


def id_label_kl(vectors: Vectors) -> Values:
    teacher, student = vectors["teacher_logits"], vectors["student_seen_logits"].requires_grad_()
    single, double = (label_loss(teacher, student, form=form) for form in ("single", "double"))
    return {
        "loss_single_softmax": single,
        "loss_official_double_softmax": double,
        **over(single, {"grad_single": student}),
        **over(double, {"grad_official": student}),
    }


def od_batch(vectors: Vectors) -> Values:
    logits, scores = vectors["h_student_logits"].requires_grad_(), max_log_softmax(vectors["teacher_logits"])
    confidence = Confidence().to(vectors.dtype)
    for name, parameter in (("weight", confidence.slope), ("offset", confidence.offset)):
        parameter.data = vectors[f"sigmoid_{name}"].reshape(())
    found = confidence(scores.requires_grad_())
    ours, theirs = logits.softmax(1), teacher_codes(found)
    loss = distribution_loss(ours, theirs, vectors["labels"])
    leaves = {"sigmoid_weight": confidence.slope, "sigmoid_offset": confidence.offset}
    leaves |= {"h_student_logits": logits, "ood_score": scores}
    return {
        "ood_score": scores,
        "confidence": found,
        "h_teacher": theirs,
        "h_student": ours,
        "loss": loss,
        **over(loss, {f"grad_{name}": leaf for name, leaf in leaves.items()}),
    }


def full_step(vectors: Vectors) -> Values:
    """One mixed batch through all networks; the label loss takes its softmax twice."""
    x, labels, seen, unseen = (vectors[key] for key in ("x", "labels", "seen", "unseen"))
    attributes, noise = vectors["attributes"], vectors["noise"]
    classes, features = len(attributes), x.shape[1]
    hidden, embedded = (len(vectors[f"{name}.fc1.bias"]) for name in ("G", "Es"))
    generator = Generator(features, classes, attributes.shape[1], noise.shape[1], hidden).to(vectors.dtype)
    generator.attributes.copy_(attributes)
    student = MLP(features, classes, embedded).to(vectors.dtype)
    teacher = MLP(features, len(seen), embedded).to(vectors.dtype)
    head, confidence = Head(classes).to(vectors.dtype), Confidence().to(vectors.dtype)
    confidence.slope.data, confidence.offset.data = (vectors[f"sig.{key}"].reshape(()) for key in ("weight", "offset"))
    trained: dict[str, nn.Module] = {"G.fc1": generator.fc1, "G.fc2": generator.fc2}
    trained |= {"Es.fc1": linear(student.embedding), "Cs.fc1": student.classifier, "Cs.fc2": head.fc}
    unused = nn.Linear(embedded, 2, dtype=vectors.dtype)
    trained["Cs.fc3"] = unused
    vectors.load({**trained, "Et.fc1": linear(teacher.embedding), "Ct.fc2": teacher.classifier})

    made = unseen.repeat_interleave(int(vectors["num_per_unseen"]))
    mixed, targets = torch.cat([generator(noise, made), x]), torch.cat([made, labels])
    ours, theirs = student(mixed), teacher(mixed)
    real = slice(len(made), None)
    kl = label_loss(theirs.logits[real], ours.logits[real][:, seen], form="double")
    embedding = embedding_loss(theirs.embedding[real], ours.embedding[real], labels)
    codes = teacher_codes(confidence(max_log_softmax(theirs.logits)))
    losses = {
        "cls": F.cross_entropy(ours.logits, targets),
        "od": distribution_loss(head(ours.logits), codes, targets),
        "id": kl + embedding,
    }
    values = {f"loss_{name}": loss for name, loss in losses.items()}
    values |= {"loss_id_kl": kl, "loss_id_embedding": embedding, "mapped_labels": torch.searchsorted(seen, labels)}
    for name, loss in losses.items():
        values |= gradients(loss, trained, f"grad_{name}")
        sigmoid = {f"grad_{name}.sig.weight": confidence.slope, f"grad_{name}.sig.offset": confidence.offset}
        values |= over(loss, sigmoid)
    return values


def wgan_gp(vectors: Vectors) -> Values:
    """A class per row: the file has attributes by row."""
    real, attributes, noise = vectors["real"], vectors["att"], vectors["noise"]
    rows = torch.arange(len(real))
    hidden = len(vectors["D.fc1.bias"])
    assert hidden == len(vectors["G.fc1.bias"])
    settings = SimpleNamespace(hidden=hidden, noise=noise.shape[1], penalty=vectors.number("lambda1"))
    networks = backbone("clswgan")(settings, real.shape[1], attributes, rows, nn.Identity(), real.shape[1])
    critics = {f"D.fc{i}": getattr(networks.critic, f"fc{i}") for i in (1, 2)}
    generators = {f"G.fc{i}": getattr(networks.generator, f"fc{i}") for i in (1, 2)}
    vectors.load(critics | generators)
    with torch.no_grad():
        fake = networks.generator(noise, rows)
    terms = networks.critic_terms(real, rows, fake, vectors["alpha"])
    loss = terms["critic"] + terms["penalty"]
    (own,) = networks.generator_terms(real, rows, networks.generator(vectors["noise_g_step"], rows)).values()
    return {
        "fake": fake,
        "critic_real": networks.critic(real, rows).mean(),
        "critic_fake": networks.critic(fake, rows).mean(),
        "gradient_penalty": terms["penalty"],
        "d_loss": loss,
        "g_loss": own,
        **gradients(terms["penalty"], critics, "grad_gp"),
        **gradients(loss, critics, "grad_dloss"),
        **gradients(own, generators, "grad_gloss"),
    }


def ce_backbone(vectors: Vectors) -> Values:
    x, attributes = vectors["x"], vectors["att_seen"]
    embedding = MLP(x.shape[1], 1, len(vectors["E.fc1.bias"])).embedding
    width = len(vectors["E.fc1.bias"])
    projection = Projection(width, len(vectors["E.fc2.bias"])).to(vectors.dtype)
    comparator = Comparator(width, attributes.shape[1], len(vectors["F.fc1.bias"])).to(vectors.dtype)
    embedders = {"E.fc1": linear(embedding), "E.fc2": cast(nn.Module, projection.fc)}
    comparators = {f"F.fc{i}": getattr(comparator, f"fc{i}") for i in (1, 2)}
    vectors.load(embedders | comparators)
    h = embedding(x)
    z = projection(h)
    instance = instance_loss(z, vectors["ins_labels"], vectors.number("ins_temp"))
    by_class = class_loss(class_scores(comparator, h, attributes), vectors["cls_labels"], vectors.number("cls_temp"))
    return {
        "h": h,
        "z": z,
        "ins_loss": instance,
        "cls_loss": by_class,
        **gradients(instance, embedders, "grad_ins"),
        **gradients(by_class, comparators, "grad_cls"),
    }


def teacher(vectors: Vectors) -> Values:
    """The task's own objective and optimiser, for a teacher of four seen classes among five."""
    x, targets = vectors["x"], vectors["mapped_labels"]
    embedded, seen = (len(vectors[f"{name}.bias"]) for name in ("Et.fc1", "Ct.fc2"))
    network = MLP(x.shape[1], seen, embedded).to(vectors.dtype)
    layers = {"Et.fc1": linear(network.embedding), "Ct.fc2": cast(nn.Module, network.classifier)}
    vectors.load(layers)
    task: Any = SimpleNamespace(
        seen=torch.arange(1, seen + 1), attributes=torch.zeros(seen + 1, 1), training=Training(), _factor=1e-3
    )
    output = network(x)
    loss = ZeroShot.objective(task, output, targets + 1)
    found = gradients(loss, layers, "grad")
    optimizer = ZeroShot.optimizer(task, network.parameters())
    loss.backward()
    optimizer.step()
    after = {f"after_adam.{name}.{kind}": x for name, layer in layers.items() for kind, x in layer.named_parameters()}
    log_probabilities = output.logits.log_softmax(1)
    return {
        "z": output.embedding,
        "log_probs": log_probabilities,
        "probs": log_probabilities.exp(),
        "loss_scaled_0p001": loss,
        **found,
        **after,
    }


def metrics(vectors: Vectors) -> Values:
    classes = {kind: vectors[kind].tolist() for kind in ("seen", "unseen")}
    labels = {kind: vectors[f"labels_{kind}"].numpy() for kind in classes}
    tables = {kind: answers(vectors[f"logits_{kind}"].numpy(), *classes.values()) for kind in classes}

    def accuracies(predict: Callable[[Any], np.ndarray]) -> dict[str, float]:
        return {
            kind: class_accuracy(predict(tables[kind]) == labels[kind], labels[kind], classes[kind]) for kind in classes
        }

    plain = accuracies(lambda table: table["prediction"].to_numpy())
    handicaps = vectors["gamma"].tolist()
    calibrated = [accuracies(lambda table, gamma=gamma: handicapped(table, gamma)) for gamma in handicaps]  # type: ignore[misc]
    values = {
        "S": plain["seen"],
        "U": plain["unseen"],
        "H": harmonic_mean(plain["seen"], plain["unseen"]),
        "T1": accuracies(lambda table: table["unseen_prediction"].to_numpy())["unseen"],
        "S_calibrated": [found["seen"] for found in calibrated],
        "U_calibrated": [found["unseen"] for found in calibrated],
        **{f"sample_avg_{kind}": (table["prediction"] == labels[kind]).mean() for kind, table in tables.items()},
    }
    assert values["sample_avg_seen"] != values["S"], "the two averages are not the same thing"
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}


def preprocess(vectors: Vectors) -> Values:
    locations = ("trainval_loc", "test_seen_loc", "test_unseen_loc")
    arrays = {key: vectors[key].numpy() for key in ("features", "labels", "att", *locations)}
    names = [f"class {number}" for number in range(arrays["att"].shape[1])]
    source = xlsa17({**arrays, "allclasses_names": np.array(names)}, "the reference")
    features, labels = torch.from_numpy(source.features).to(vectors.dtype), torch.from_numpy(source.labels)
    rows = {"train": source.trainval, "test_seen": source.test_seen, "test_unseen": source.test_unseen}
    scale = Scale(features.shape[1]).to(vectors.dtype)
    scale.fit(features[source.trainval])
    seen = labels[source.trainval].unique()
    return {
        **{f"{part}_feature": scale(features[place]) for part, place in rows.items()},
        **{f"{part}_label": labels[place] for part, place in rows.items()},
        "attribute": torch.from_numpy(source.attributes),
        "seenclasses": seen,
        "unseenclasses": labels[source.test_unseen].unique(),
        "mapped_train_label": torch.searchsorted(seen, labels[source.trainval]),
    }


CHECKS = {
    check.__name__: check
    for check in (
        *(id_embedding, id_label_kl, od_batch, full_step, wgan_gp, ce_backbone),
        *(teacher, metrics, preprocess),
    )
}
