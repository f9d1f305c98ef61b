"""HORKD against reference vectors: every $REFERENCE_ROOT/horkd/*.npz (default root: this folder), one test per file.

What a file holds follows from its keys. Every key is either an input, which is used, or a value, which is compared.
"""

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.distill.horkd import (
    normalised_distances,
    pair_loss,
    pairwise_distances,
    point_loss,
    relation_losses,
    triplet_cosines,
    triplet_loss,
)

FOLDER = Path(os.environ.get("REFERENCE_ROOT") or Path(__file__).parent) / "horkd"
FILES = sorted(FOLDER.glob("*.npz"))
PENALTIES = ("mse", "huber", "mse_unit")
INPUTS = {"t", "s", "P", "labels", "head_W", "head_b", "lambda_ce_1_2_3", "sim_scale", "sim_rot", "sim_shift", "seed"}
VALUES = {f"{kind}1_{penalty}" for kind in ("L", "g") for penalty in PENALTIES} | {
    *("gP_mse", "gP_huber", "L2", "g2", "L3", "g3", "Lce", "gce", "Ltotal", "gtotal"),
    *("mu_t", "mu_s", "psiD_t", "psiD_s", "cosA_t", "cosA_s"),
}
FORMS = ("dense", "blocks", "compiled")
TOLERANCES = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-7)}


def test_there_are_vectors() -> None:
    assert FILES, f"no .npz in {FOLDER} · set REFERENCE_ROOT to the folder that holds horkd/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_vectors(path: Path) -> None:
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    assert not arrays.keys() - INPUTS - VALUES, f"keys of unknown meaning in {path.name}"
    expected = {key: torch.from_numpy(arrays[key]) for key in arrays.keys() & VALUES}
    assert expected, f"nothing to compare in {path.name}"
    for form, (dtype, (relative, absolute)) in product(FORMS, TOLERANCES.items()):
        inputs = {key: to_tensor(arrays[key], dtype) for key in arrays.keys() & INPUTS}
        actual = compute(inputs, form)
        assert not expected.keys() - actual.keys(), f"inputs that these values need are missing in {path.name}"
        for key in sorted(expected):
            where = f"{path.name}, {key} in {dtype}, {form}"
            assert actual[key].shape == expected[key].shape, where
            difference = (actual[key].double() - expected[key]).abs()
            assert (difference <= absolute + relative * expected[key].abs()).all(), (
                f"{where}: off by {difference.max()}"
            )


def to_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def compute(inputs: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """Everything that the inputs allow, under the keys of the files."""
    student, teacher = inputs["s"].requires_grad_(), inputs["t"]
    projection = inputs["P"].requires_grad_() if "P" in inputs else None
    projected = student if projection is None else student @ projection.T
    if form == "dense":
        pairs, triplets = pair_loss(student, teacher), triplet_loss(student, teacher)
    else:
        pairs, triplets = relation_losses(student, teacher, form=form)
    losses: dict[str, Tensor] = {"2": pairs, "3": triplets}
    if projected.shape == teacher.shape:
        losses |= {f"1_{penalty}": point_loss(projected, teacher, penalty) for penalty in PENALTIES}
    if "labels" in inputs:
        losses["ce"] = F.cross_entropy(F.linear(student, inputs["head_W"], inputs["head_b"]), inputs["labels"])
    if "lambda_ce_1_2_3" in inputs:
        terms = [losses[name] for name in ("ce", "1_mse", "2", "3")]
        losses["total"] = torch.stack(terms) @ inputs["lambda_ce_1_2_3"]
    if "sim_rot" in inputs:
        similar = inputs["sim_scale"] * teacher @ inputs["sim_rot"].T + inputs["sim_shift"]
        torch.testing.assert_close(student.detach(), similar, rtol=1e-5, atol=1e-5)

    outputs = {f"L{name}": value.detach() for name, value in losses.items()}
    for name, value in losses.items():
        (outputs[f"g{name}"],) = torch.autograd.grad(value, student, retain_graph=True)
        if projection is not None and name.startswith("1"):
            (outputs[f"gP{name[1:]}"],) = torch.autograd.grad(value, projection, retain_graph=True)
    for side, points in {"t": teacher, "s": student.detach()}.items():
        distances = pairwise_distances(points)
        off_diagonal = ~torch.eye(len(points), dtype=torch.bool)
        outputs[f"mu_{side}"] = distances[off_diagonal].mean()
        outputs[f"psiD_{side}"] = normalised_distances(points)
        outputs[f"cosA_{side}"] = triplet_cosines(points)
    return outputs
