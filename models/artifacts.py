"""A trained model as files: safetensors beside a JSON description. No pickle.

weights.safetensors     every parameter and buffer of the network, and nothing of what trained it
model.json              `Description`
"""

import dataclasses
import importlib
import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from data.errors import UserError
from data.files import sha256, write_file, write_json

WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"


@dataclass(frozen=True)
class Description:
    """What a model is, where it comes from and what may be done with it.

    Attributes:
        name, task, kind: kind is "teacher", "student" or "companion".
        network: what `models.<task>.build` makes it from.
        interface: what goes in and comes out: classes; of images channels, mean, std and resize, for recognition
            resolution, for segmentation size and fit; of texts length and tokenizer; for zero-shot recognition which
            classes are seen, the number of features, and of images, where these go in, channels, size, mean and std.
        recipe: its entry in params.yaml, defaults filled in.
        dataset: name and digest of the data it was trained and evaluated on.
        teacher: name and weights_sha256 of the model it learnt from, or None.
        start: the same of the model whose weights it began with, or None.
        beside: the same of the student that this model was trained beside, or None.
        sources: name, licence, credit and redistributable of everything it was made from.
        chosen: what no parameter says of its training, such as the form of a computation on the machine, by name.
        rows: number of samples that were drawn from, by the name of the stream: "train", and what was held out of it.
        parameters: number of trainable parameters.
        weights_sha256: of weights.safetensors; filled in by `save_model`.
    """

    name: str
    task: str
    kind: str
    network: dict[str, Any]
    interface: dict[str, Any]
    recipe: dict[str, Any]
    dataset: dict[str, str]
    teacher: dict[str, str] | None
    sources: list[dict[str, Any]]
    start: dict[str, str] | None = None
    beside: dict[str, str] | None = None
    chosen: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    weights_sha256: str = ""


def save_model(folder: Path, network: nn.Module, description: Description) -> Description:
    """Write weights and description into an existing folder; returns the description with its digest."""
    state = {name: _plain(tensor) for name, tensor in network.state_dict().items()}
    write_file(folder / WEIGHTS, lambda file: file.write(save(state)))
    description = dataclasses.replace(
        description,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        weights_sha256=sha256(folder / WEIGHTS),
    )
    write_json(folder / DESCRIPTION, dataclasses.asdict(description))
    return description


def _plain(tensor: Tensor) -> Tensor:
    """Networks are built, evaluated and exported in float32; float64 is for training alone."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def copy_model(folder: Path, output: Path) -> None:
    """Weights and description of a model into a new folder."""
    output.mkdir()
    for name in (WEIGHTS, DESCRIPTION):
        shutil.copyfile(folder / name, output / name)


def read_description(folder: Path) -> Description:
    """model.json of a model folder.

    Raises:
        UserError: there is no model.
    """
    try:
        return Description(**json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"there is no model in {folder} · run `dvc repro` for it first") from None


def load_model(folder: Path) -> tuple[nn.Module, Description]:
    """The network in eval mode, and its description.

    Raises:
        UserError: there is no model, or its weights are not those that were described.
    """
    description = read_description(folder)
    weights = folder / WEIGHTS
    found = sha256(weights) if weights.is_file() else "nothing"
    if found != description.weights_sha256:
        raise UserError(
            f"{weights} is not the file that {DESCRIPTION} describes: wanted sha256 {description.weights_sha256}, "
            f"got {found} · remove {folder} and run `dvc checkout` or `dvc repro`"
        )
    network: nn.Module = importlib.import_module(f"models.{description.task}").build(dataclasses.asdict(description))
    network.load_state_dict(load_file(weights))
    return network.eval(), description


def read_outside_state(file: Path, wanted_sha256: str) -> dict[str, Tensor]:
    """The weights of a model that was trained elsewhere: safetensors, or a state_dict saved by torch.

    Raises:
        UserError: no such file, another sha256, or no plain mapping of names to tensors.
    """
    if not file.is_file():
        raise UserError(f"the model file {file} does not exist")
    if (found := sha256(file)) != wanted_sha256:
        raise UserError(f"{file} is not what is pinned: wanted sha256 {wanted_sha256}, got {found}")
    try:
        if file.suffix == ".safetensors":
            loaded: Any = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text advises to load the file all the same
        raise UserError(f"{file} holds more than weights, or is damaged, and is not loaded") from None
    except Exception as error:  # whatever reading damaged bytes may raise
        reason = str(error).partition("\n")[0] or repr(error)
        raise UserError(f"{file} cannot be read as weights ({reason})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise UserError(f"{file} is no state_dict: a mapping of names to tensors is expected")
    return {key.removeprefix("module."): value for key, value in loaded.items()}
