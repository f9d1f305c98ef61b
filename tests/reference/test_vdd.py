"""VDD against reference vectors: every $REFERENCE_ROOT/vdd/*.npz, one test per file.

What a file holds follows from its keys. Every key is either an input, which is used, or a value, which is compared.
The files' teachers are mixtures of Gaussians: their answers are computed here, and go through the project's own
teachers, whose network is replaced by them.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.avoiding import MODES, context_entropy, mode_entropy
from models.policy import BESO, DDPM, Output, cosine_schedule, deviations, factors, karras, log_likelihood
from stages.distill.vdd import ascend, clean_score, draw, entropies, log_densities, responsibilities
from stages.experts import data_responsibilities, gate_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "stages/distill"))
from gaussians import Gaussians

FOLDER = Path(os.environ.get("REFERENCE_ROOT") or Path(__file__).parent) / "vdd"
FILES = sorted(FOLDER.glob("*.npz"))
BOUNDS = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-6)}
QUADRATURE = 1e-3  # the files' own values are off by up to 5e-4
NODES = 64
Values = dict[str, Tensor]


class Vectors:
    """The arrays of one file in a dtype; remembers which of them were used."""

    def __init__(self, arrays: Mapping[str, np.ndarray], dtype: torch.dtype) -> None:
        self.arrays, self.dtype = arrays, dtype
        self.used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        tensor = torch.from_numpy(np.array(self.arrays[key]))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def test_there_are_vectors() -> None:
    assert FILES, f"no .npz in {FOLDER} · set REFERENCE_ROOT to the folder that holds vdd/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_vectors(path: Path) -> None:
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    check = next((check for key, check in CHECKS.items() if key in arrays), None)
    assert check is not None, f"the keys of {path.name} do not say what it holds: {sorted(arrays)}"
    for dtype, bounds in BOUNDS.items():
        vectors = Vectors(arrays, dtype)
        values = check(vectors)
        assert vectors.used | values.keys() == arrays.keys(), f"keys of {path.name} that are not used, or do not exist"
        assert not vectors.used & values.keys(), "what is compared is no input"
        for key, value in values.items():
            limits = (0.0, QUADRATURE) if key in ("J_exact", "U_tight", "U_loose", "EKL") else bounds
            close(value, arrays[key], f"{path.name}, {key} in {dtype}", *limits)


def close(actual: Tensor, expected: np.ndarray, where: str, relative: float, absolute: float) -> None:
    """Within a share of the largest expected value: single gradients may be sums that cancel."""
    truth = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    assert actual.shape == truth.shape, where
    off = (actual.detach().double() - truth).abs().max().item()
    bound = absolute + relative * truth.abs().max().item()
    assert off <= bound, f"{where}: off by {off}, allowed {bound}"


def teacher(vectors: Vectors) -> Gaussians:
    factor = vectors["teacher_chol"]
    return Gaussians.make(vectors["teacher_logw"], vectors["teacher_mean"], factor @ factor.mT)


def described(actions: int, **network: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Interface and network of a teacher whose scaled actions are the raw ones."""
    ones, zeros = ([value] * actions for value in (1.0, 0.0))
    scaling = {
        "observation": {"mean": [0.0], "std": [1.0], "change": [1.0]},
        "action": {"mean": zeros, "std": ones, "low": [-1e3] * actions, "high": [1e3] * actions},
    }
    backbone = {"name": "mlp", "width": 2, "layers": 0, "dropout": 0.0, "residual": False}
    interface = {"observations": 1, "actions": actions, "scaling": scaling, "environment": None}
    return interface, {"window": 1, "goals": 0, "backbone": backbone, **network}


class Known(nn.Module):
    """What the network of a BESO or, with alpha-bar, of a DDPM says if it knows the truth of every state."""

    def __init__(self, truth: Gaussians, kept: Tensor | None = None) -> None:
        super().__init__()
        self.truth, self.kept = truth, kept

    def forward(self, observations: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        points = noisy.squeeze(1)
        if self.kept is not None:
            own, noise = self.kept[level].sqrt(), 1 - self.kept[level]
            clean = self.truth.clean(points, own, noise)
            return ((points - own[:, None] * clean) / noise.sqrt()[:, None])[:, None]
        skip, out, into = (x[:, None] for x in karras(level, 0.5))
        clean = self.truth.clean(points / into, torch.ones_like(level), level**2)
        return ((clean - skip * points / into) / out)[:, None]


def exploding(points: Tensor, sigma: Tensor, truth: Gaussians) -> Values:
    """Score and expected clean actions (B, K, V, A) by a BESO whose network knows the truth."""
    known = truth.repeat(sigma[0].numel())
    if not sigma.any():
        return {"score": known.score(points.flatten(0, 2)).view_as(points), "denoised": points}
    network = {"sigma_min": 0.1, "sigma_max": 1.0, "sigma_data": 0.5, "spread": 0.5, "rho": 5.0, "steps": 8}
    beso = BESO(*described(points.shape[3], sampler="ddim", **network))
    beso.network = Known(known)
    arguments = points.flatten(0, 2)[:, None], torch.zeros(len(points), 1, 1).to(points), sigma.flatten()
    return {
        "score": beso.score(*arguments).view_as(points),
        "denoised": beso.denoise(*arguments).view_as(points),
    }


def preserving(points: Tensor, index: Tensor, steps: int, truth: Gaussians) -> Values:
    """Scores (B, K, V, A) by a DDPM whose network knows the truth."""
    ddpm = DDPM(*described(points.shape[3], steps=steps))
    ddpm.kept = cosine_schedule(steps)[1].to(points.dtype)
    ddpm.network = Known(truth.repeat(index[0].numel()), ddpm.kept)
    arguments = points.flatten(0, 2)[:, None], torch.zeros(len(points), 1, 1).to(points), index.flatten()
    return {
        "score": ddpm.score(*arguments).view_as(points),
        "score_rescaled": clean_score(ddpm, *arguments).view_as(points),
        "eps_pred": ddpm(*arguments).view_as(points),
        "abar": ddpm.kept[index],
        "schedule_abar": ddpm.kept,
    }


def mixture(vectors: Vectors) -> Values:
    """One evaluation, a trajectory, and where there are lagged experts, the bound by quadrature."""
    truth, noise, actions = teacher(vectors), vectors["eps"], vectors["demo_action"]
    logits = vectors["gate_logits"].requires_grad_()
    experts = Output(vectors["student_mean"], vectors["student_chol"], logits.log_softmax(1).detach())
    states = len(actions)

    def scored(points: Tensor) -> Values:
        if "t_index" in vectors:
            return preserving(points, vectors["t_index"], len(vectors.arrays["schedule_abar"]), truth)
        return exploding(points, vectors["sigma"], truth)

    samples = draw(experts.mean, experts.factor, noise)
    told = scored(samples)
    own = responsibilities(samples, experts, noise)
    again = responsibilities(samples, experts)
    for one, other in zip(own, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 if vectors.dtype == torch.float64 else 1e-3)
    components = log_densities(samples.flatten(1, 2), experts.mean, experts.factor)
    components = components.unflatten(2, samples.shape[1:3]).transpose(1, 2)
    official = ascend(experts, noise, samples, told["score"], reduction="mean")
    plain = ascend(experts, noise, samples, told["score"], weight="none")
    responsibility = data_responsibilities(experts, actions)
    loss = gate_loss(logits.log_softmax(1), responsibility)
    values = {
        **told,
        "samples": samples,
        "log_comp": components,
        "log_mix": (components + experts.log_gate[:, None, :, None]).logsumexp(2),
        "log_resp": own.log,
        "grad_log_resp": own.slope,
        "entropy": entropies(experts.factor),
        "expert_objective": official.objective,
        "grad_obj_mean": -states * plain.mean,
        "grad_obj_chol": -states * plain.factor,
        "gate_prob": experts.log_gate.exp(),
        "expert_loss": official.loss,
        "expert_loss_grad_mean": official.mean,
        "expert_loss_grad_chol": official.factor,
        "data_resp": responsibility,
        "data_loglik": log_likelihood(experts, actions),
        "gate_loss": loss,
        "gate_loss_meanK": gate_loss(logits.log_softmax(1), responsibility, "mean"),
        "gate_grad_logits": torch.autograd.grad(loss, logits)[0],
    }
    rates = vectors["traj_lr_expert"], vectors["traj_lr_gate"]
    found: dict[str, list[Tensor]] = {}
    for drawn in vectors["traj_eps"]:
        samples = draw(experts.mean, experts.factor, drawn)
        step = ascend(experts, drawn, samples, scored(samples)["score"], reduction="mean")
        experts = experts._replace(
            mean=experts.mean - rates[0] * step.mean, factor=experts.factor - rates[0] * step.factor
        )
        responsibility = data_responsibilities(experts, actions)
        loss = gate_loss(logits.log_softmax(1), responsibility)
        logits = (logits - rates[1] * torch.autograd.grad(loss, logits)[0]).detach().requires_grad_()
        experts = experts._replace(log_gate=logits.log_softmax(1).detach())
        now = {"expert_loss": step.loss, "gate_loss": loss, "mean": experts.mean, "chol": experts.factor}
        for key, value in {**now, "logits": logits, "data_resp": responsibility}.items():
            found.setdefault(f"traj_{key}", []).append(value)
    values |= {key: torch.stack(parts) for key, parts in found.items()}
    return values | (quadrature(vectors, truth, told["score"]) if "old_mean" in vectors else {})


def quadrature(vectors: Vectors, truth: Gaussians, score: Tensor) -> Values:
    """J, U and what is between them, by Gauss-Hermite nodes as noise, and what lagged experts say (card 3.1)."""
    mean, factor = vectors["student_mean"], vectors["student_chol"]
    experts = Output(mean, factor, vectors["gate_logits"].log_softmax(1))
    lagged = Output(vectors["old_mean"], vectors["old_chol"], vectors["old_logits"].log_softmax(1))
    states, count, size = mean.shape
    nodes, shares = (torch.from_numpy(x).to(vectors.dtype) for x in np.polynomial.hermite_e.hermegauss(NODES))
    noise = torch.cartesian_prod(*[nodes] * size).view(-1, 1, 1, size).expand(-1, states, count, size)
    weight = torch.cartesian_prod(*[shares / shares.sum()] * size).view(-1, size).prod(1)
    samples = draw(mean, factor, noise)

    def joint(mixture: Output) -> Tensor:
        """log pi_j + log N_j of every sample, (B, K, K, V): of i under j."""
        found = log_densities(samples.flatten(1, 2), mixture.mean, mixture.factor).unflatten(2, samples.shape[1:3])
        return found.transpose(1, 2) + mixture.log_gate[:, None, :, None]

    def expected(values: Tensor) -> Tensor:
        """Over the mixture, of (B, K, V) at its samples."""
        return ((values * weight).sum(2) * experts.log_gate.exp()).sum(1)

    log_teacher = truth.repeat(samples[0, ..., 0].numel()).log_density(samples.flatten(0, 2)).view(samples.shape[:3])
    ours, theirs = joint(experts), joint(lagged)
    log_mixture = ours.logsumexp(2)
    log_own = ours.diagonal(dim1=1, dim2=2).movedim(2, 1)

    def bound(log_responsibility: Tensor) -> Tensor:
        return log_own - log_teacher - log_responsibility

    exact, tight = log_mixture - log_teacher, bound(responsibilities(samples, experts, noise).log)
    loose = bound(responsibilities(samples, lagged).log)
    between = (ours.softmax(2) * (ours.log_softmax(2) - theirs.log_softmax(2))).sum(2)
    values = {"J_exact": exact, "U_tight": tight, "U_loose": loose, "EKL": between}
    values = {key: expected(value) for key, value in values.items()}
    if vectors.dtype == torch.float64:
        torch.testing.assert_close(tight, exact, rtol=0, atol=1e-10)  # at every sample
        torch.testing.assert_close(values["U_loose"] - values["J_exact"], values["EKL"], rtol=0, atol=1e-6)
        assert (between >= -1e-12).all()
    step = ascend(experts, vectors["eps"], draw(mean, factor, vectors["eps"]), score, lagged=lagged, weight="none")
    return {
        **values,
        "lag_log_resp": step.log_responsibility,
        "lag_expert_objective": step.objective,
        "lag_grad_obj_mean": -states * step.mean,
        "lag_grad_obj_chol": -states * step.factor,
    }


def auxiliary(vectors: Vectors) -> Values:
    """Heads, schedules, preconditioning and metrics."""
    raw, stds = vectors["head_raw"], [float(vectors[f"head_{name}_std"]) for name in ("init", "min")]
    size = vectors.arrays["head_chol_rowmajor"].shape[-1]
    rows, columns = torch.tril_indices(size, size)
    # As TensorFlow Probability fills a triangle: the numbers after the first row, then all backwards.
    spiral = torch.cat([raw[:, size:], raw.flip(1)], 1).view(-1, size, size)[:, rows, columns]
    skip, out, into = karras(vectors["karras_sigma"], float(vectors["karras_sigma_data"]))
    by_context = [vectors[f"align_{name}"].numpy() for name in ("mode", "success")]
    values = {
        "head_chol_rowmajor": factors(raw, *stds),
        "head_chol_spiral": factors(spiral, *stds),
        "head_std_diag": deviations(vectors["head_raw_diag"], *stds),
        "karras_c_skip": skip,
        "karras_c_out": out,
        "karras_c_in": into,
        "avoid_entropy": mode_entropy(*(vectors[f"avoid_{name}"].numpy() for name in ("mode", "success")), len(MODES)),
        "align_entropy_all_contexts": context_entropy(*by_context, 2),
        "align_entropy_success_contexts": context_entropy(*by_context, 2, failed_as_zero=False),
    }
    for key in vectors.arrays:
        if key.startswith("cosine_T"):
            steps, kind = key.removeprefix("cosine_T").split("_")
            values[key] = cosine_schedule(int(steps))[["beta", "abar"].index(kind)]
    return {key: torch.as_tensor(value, dtype=torch.float64) for key, value in values.items()}


CHECKS = {"student_mean": mixture, "head_raw": auxiliary}
