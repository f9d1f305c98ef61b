"""GDD and its relatives against reference vectors: every $REFERENCE_ROOT/gdd/*.npz, one test per file.

What a file is for follows from the beginning of its name, what it holds from its keys. Every key is either an input,
which is used, or a value, which is compared. Whatever has two forms is computed in both.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.distill.gdd import generate
from stages.distill.kd import soft_target_loss
from stages.distill.mgd import generation_loss, keep
from stages.training import Generator, channel_divergence

FOLDER = Path(os.environ.get("REFERENCE_ROOT") or Path(__file__).parent) / "gdd"
FILES = sorted(FOLDER.glob("*.npz"))
LAYERS = {"align": "align.convolution", "gen1": "first", "gen2": "second"}
WEIGHTS = {f"{layer}_{kind}": f"{name}.{kind}" for layer, name in LAYERS.items() for kind in ("weight", "bias")}
WEIGHTS = {key.replace("weight", "w").replace("bias", "b"): name for key, name in WEIGHTS.items()}
GRADIENTS = {"grad_feat_s", *(f"grad_{key}" for key in WEIGHTS)}
OFFICIAL = {"official_loss_f64", "official_loss_f32"}
FORMS = (False, True)
Arrays = dict[str, np.ndarray]


def test_there_are_vectors() -> None:
    assert FILES, f"no .npz in {FOLDER} · set REFERENCE_ROOT to the folder that holds gdd/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_vectors(path: Path) -> None:
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    check = {
        "gdd": trajectory if "steps" in arrays else levels if "levels" in arrays else generated,
        "variant": generated,
        "mgd": masked,
        "cwd": maps,
        "kd": maps,
    }.get(path.name.split("_")[0])
    assert check is not None, f"the name of {path.name} does not say what it is for"
    for dtype in (torch.float64, torch.float32):
        for fast in FORMS:
            check(arrays, dtype, fast, path.name)


def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array).to(dtype)


def known(arrays: Arrays, inputs: set[str], values: set[str], where: str) -> None:
    assert not arrays.keys() - inputs - values, f"keys of unknown meaning in {where}"
    assert not inputs - arrays.keys(), f"inputs are missing in {where}"
    assert "loss" in arrays or "distill_loss" in arrays, f"nothing to compare in {where}"


def close(actual: Tensor, expected: np.ndarray, where: str, *, relative: float, absolute: float) -> None:
    """Within a share of the largest expected value: single gradients may be sums that cancel."""
    truth = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    assert actual.shape == truth.shape, where
    off = (actual.detach().double() - truth).abs().max().item()
    bound = absolute + relative * truth.abs().max().item()
    assert off <= bound, f"{where}: off by {off}, allowed {bound}"


def within(dtype: torch.dtype) -> dict[str, float]:
    return {torch.float64: {"relative": 1e-9, "absolute": 1e-12}, torch.float32: {"relative": 1e-5, "absolute": 1e-6}}[
        dtype
    ]


def build(arrays: Arrays, dtype: torch.dtype, prefix: str = "") -> Generator:
    """A generator with the file's weights; each of them is used."""
    outputs = len(arrays[f"{prefix}gen1_w"])
    inputs = arrays["align_w"].shape[1] if "align_w" in arrays else outputs
    generator = Generator(inputs, outputs).to(dtype)
    state = {name: tensor(arrays[prefix + key], dtype) for key, name in WEIGHTS.items() if prefix + key in arrays}
    generator.load_state_dict(state)
    return generator


def compare(arrays: Arrays, values: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
    for key in sorted(values.keys() & arrays.keys()):
        bounds = within(dtype)
        if key.endswith("grad_gen2_b") and not where.startswith("mgd"):
            # Exactly 0 in exact arithmetic: what is left is rounding, and the weight multiplies it.
            bounds["absolute"] *= max(1.0, float(arrays["alpha"]))
        close(values[key], arrays[key], f"{where}, {key} in {dtype}", **bounds)


def gradients(loss: Tensor, student: Tensor, generator: Generator) -> dict[str, Tensor]:
    loss.backward()
    assert student.grad is not None
    found = {"grad_feat_s": student.grad}
    parameters = dict(generator.named_parameters())
    for key, name in WEIGHTS.items():
        if name in parameters:
            gradient = parameters[name].grad
            assert gradient is not None
            found[f"grad_{key}"] = gradient
    return found


def generated(arrays: Arrays, dtype: torch.dtype, fast: bool, where: str) -> None:
    weights = {key for key in WEIGHTS if key in arrays}
    inputs = {"feat_s", "feat_t", "noise", "T", "alpha"} | weights
    known(arrays, inputs, {"aligned", "generated", "loss", "p_s", "p_t"} | GRADIENTS | OFFICIAL, where)
    temperature, alpha = float(arrays["T"]), float(arrays["alpha"])
    generator, student = build(arrays, dtype), tensor(arrays["feat_s"], dtype).requires_grad_()
    teacher, noise = tensor(arrays["feat_t"], dtype), tensor(arrays["noise"], dtype)
    g = generate(student, generator, noise, fast)
    g.retain_grad()
    loss = alpha * channel_divergence(g, teacher, temperature, closed_form=fast)
    values = {"aligned": generator.align(student), "generated": g, "loss": loss}
    values |= gradients(loss, student, generator)
    compare(arrays, values, dtype, where)
    for key in OFFICIAL & arrays.keys():
        if np.isfinite(arrays[key]):
            exact = dtype == torch.float64 and key.endswith("f64")
            close(loss, arrays[key], f"{where}, {key}", **within(torch.float64 if exact else torch.float32))
    if "p_s" in arrays:
        assert g.grad is not None
        rows = alpha * temperature / len(g) / g.shape[1] * (arrays["p_s"] - arrays["p_t"])
        close(g.grad.flatten(2), rows, f"{where}, p_s - p_t in {dtype}", **within(dtype))


def levels(arrays: Arrays, dtype: torch.dtype, fast: bool, where: str) -> None:
    temperature, alpha, count = float(arrays["T"]), float(arrays["alpha"]), int(arrays["levels"])
    weights = [key for key in WEIGHTS if not key.startswith("align")]
    inputs = {f"l{level}_{key}" for level in range(count) for key in ("feat_s", "feat_t", "noise", *weights)}
    values = {f"l{level}_{key}" for level in range(count) for key in GRADIENTS} | {"loss", "per_level_loss"}
    known(arrays, inputs | {"T", "alpha", "levels"}, values, where)
    losses: list[Tensor] = []
    found: dict[str, Tensor] = {}
    for level in range(count):
        part = f"l{level}_"
        generator = build(arrays, dtype, part)
        student = tensor(arrays[f"{part}feat_s"], dtype).requires_grad_()
        g = generate(student, generator, tensor(arrays[f"{part}noise"], dtype), fast)
        loss = alpha * channel_divergence(g, tensor(arrays[f"{part}feat_t"], dtype), temperature, closed_form=fast)
        found |= {part + key: value for key, value in gradients(loss, student, generator).items()}
        losses.append(loss.detach())
    found |= {"per_level_loss": torch.stack(losses), "loss": torch.stack(losses).sum()}
    compare(arrays, found, dtype, where)


def trajectory(arrays: Arrays, dtype: torch.dtype, fast: bool, where: str) -> None:
    weights = {key for key in WEIGHTS if key in arrays} | {"student_w", "student_b"}
    settings = {"T", "alpha", "lr", "momentum", "weight_decay", "steps"}
    values = {"distill_loss", "task_loss"} | {f"final_{key}" for key in weights}
    known(arrays, {"x", "y", "feat_t", "noise"} | settings | weights, values, where)
    numbers = {key: float(arrays[key]) for key in settings}
    x, y, teacher, noise = (tensor(arrays[key], dtype) for key in ("x", "y", "feat_t", "noise"))
    generator = build(arrays, dtype)
    student = nn.Conv2d(x.shape[1], y.shape[1], 3, padding=1, dtype=dtype)
    student.load_state_dict({"weight": tensor(arrays["student_w"], dtype), "bias": tensor(arrays["student_b"], dtype)})
    optimizer = torch.optim.SGD(
        [*student.parameters(), *generator.parameters()],
        lr=numbers["lr"],
        momentum=numbers["momentum"],
        weight_decay=numbers["weight_decay"],
    )
    task_losses, distill_losses = [], []
    for step in range(int(arrays["steps"])):
        f = F.relu(student(x))
        task = 0.5 * F.mse_loss(f, y)
        g = generate(f, generator, noise[step], fast)
        distill = numbers["alpha"] * channel_divergence(g, teacher, numbers["T"], closed_form=fast)
        optimizer.zero_grad()
        (task + distill).backward()
        optimizer.step()
        task_losses.append(task.detach())
        distill_losses.append(distill.detach())
    ends = {key: generator.state_dict()[name] for key, name in WEIGHTS.items() if key in arrays}
    ends |= {"student_w": student.weight, "student_b": student.bias}
    found = {"task_loss": torch.stack(task_losses), "distill_loss": torch.stack(distill_losses)}
    found |= {f"final_{key}": value for key, value in ends.items()}
    for key in sorted(found.keys() & arrays.keys()):
        bounds = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-7)}[dtype]
        close(found[key], arrays[key], f"{where}, {key} in {dtype}", relative=bounds[0], absolute=bounds[1])


def masked(arrays: Arrays, dtype: torch.dtype, fast: bool, where: str) -> None:
    weights = {key for key in WEIGHTS if key in arrays}
    inputs = {"feat_s", "feat_t", "rand", "mask_ratio", "alpha"} | weights
    known(arrays, inputs, {"mask", "generated", "loss"} | GRADIENTS, where)
    generator, student = build(arrays, dtype), tensor(arrays["feat_s"], dtype).requires_grad_()
    mask = keep(tensor(arrays["rand"], dtype), float(arrays["mask_ratio"]))
    g = generator(generator.align(student) * mask)
    loss = float(arrays["alpha"]) * generation_loss(g, tensor(arrays["feat_t"], dtype))
    values = {"mask": mask, "generated": g, "loss": loss} | gradients(loss, student, generator)
    compare(arrays, values, dtype, where)


def maps(arrays: Arrays, dtype: torch.dtype, fast: bool, where: str) -> None:
    known(arrays, {"feat_s", "feat_t", "T"}, {"loss", "grad_feat_s"}, where)
    student, teacher = tensor(arrays["feat_s"], dtype).requires_grad_(), tensor(arrays["feat_t"], dtype)
    temperature = float(arrays["T"])
    if where.startswith("kd"):
        loss = soft_target_loss(student, teacher, temperature)
    else:
        loss = channel_divergence(student, teacher, temperature, closed_form=fast)
    loss.backward()
    assert student.grad is not None
    compare(arrays, {"loss": loss, "grad_feat_s": student.grad}, dtype, where)
