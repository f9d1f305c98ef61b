"""Models that exist before a training: weights from elsewhere, and the teacher that a student names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.errors import UserError
from models.artifacts import Description


def load_weights(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Give a network the weights of a file, all of them.

    Args:
        what: the beginning of the message where they do not fit: which file, which network.

    Raises:
        UserError: weights are missing, unknown or of another shape (both shapes are named).
    """
    own = network.state_dict()
    wrong = [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    # Files from before 2018 do not count batches; nothing depends on the count.
    wrong += [f"{key}: missing in the file" for key in own if key not in state and "num_batches_tracked" not in key]
    wrong += [f"{key}: unknown to the network" for key in state if key not in own]
    if wrong:
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{what}:\n  " + "\n  ".join(wrong[:5]) + more)
    network.load_state_dict(state, strict=False)


def begin_with(
    network: nn.Module, start: tuple[nn.Module, Description], classes: list[str], head: tuple[str, ...]
) -> None:
    """Give a network the weights of another model of its shape; but for its head, where the classes are others.

    Args:
        head: beginnings of the names of parameters that depend on the classes.

    Raises:
        UserError: the two are of different shape (both shapes are named).
    """
    other, description = start
    state, own = other.state_dict(), network.state_dict()
    if description.interface["classes"] != classes:
        kept = {key: value for key, value in own.items() if key.startswith(head)}
        state = kept | {key: value for key, value in state.items() if not key.startswith(head)}
    load_weights(network, state, f"`start`: the network of {description.name!r} is another")


def require_same_question(
    teacher: Description,
    dataset: Mapping[str, Any],
    prepared: Path,
    fields: tuple[str, ...] = ("classes", "channels"),
    what: str = "teacher",
) -> None:
    """A teacher and a data set have to agree in classes and in what goes in.

    Args:
        dataset: dataset.json of the folder `prepared`. fields: of it, and of the teacher's interface.
        what: the field of params.yaml that names the teacher.

    Raises:
        UserError: they do not.
    """
    for field in fields:
        theirs, ours = teacher.interface[field], dataset[field]
        if theirs != ours:
            counts = f"{len(theirs)} against {len(ours)} classes: " if field == "classes" else ""
            raise UserError(
                f"{what} {teacher.name!r} and the data set {prepared.name!r} differ in {field}: "
                f"{counts}{theirs} and {ours} · choose one that was made for this data set"
            )


def normalisation(
    outside: Any, description: Mapping[str, Any], prepared: Path, field: str = "from"
) -> tuple[list[float], list[float]]:
    """Mean and std per channel that an existing model's pixels are normalised with: its own, or the data set's.

    Args:
        outside: what a model says of the existing one, under the name `field`.
        description: dataset.json of the folder `prepared`.

    Raises:
        UserError: not one value per channel.
    """
    mean, std = outside.mean or description["mean"], outside.std or description["std"]
    if not len(mean) == len(std) == description["channels"]:
        raise UserError(
            f"the images of {prepared.name!r} have {description['channels']} channels, but mean has {len(mean)} "
            f"values and std {len(std)} · correct `{field}`"
        )
    return mean, std
