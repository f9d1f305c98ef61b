"""Demonstrations of a task: making or reading them, what is expected, episodes and windows, and where to act.

A prepared data set is a folder:

    observations.npy  (N, O) float32, all steps of all episodes, one after the other, not scaled
    actions.npy       (N, A) float32, what was done at each step
    manifest.csv      a row per episode: id (its place in the source, from 0), split, mode (the name of the way that it
                      took, empty where ways are not told apart), start (its first row), length in steps, sha256 of the
                      bytes of its observations and actions
    dataset.json      observations and actions (O and A), scaling (mean and std of both, the standard deviation of the
                      change of observations from step to step, the bounds low and high of actions; over the steps of
                      the training split), environment (its name and constants, or null), modes (their names, or none),
                      samples (steps) and episodes per split, how many steps were dropped
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from data.avoiding import Avoiding, Outcome, demonstrate
from data.errors import UserError, suggest
from data.files import write_json
from data.pusht import PushT
from data.splits import TRAIN

if TYPE_CHECKING:
    from torch import Tensor

VALIDATION, TEST = "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
COLUMNS = ("id", "split", "mode", "start", "length", "sha256")


@dataclass(frozen=True)
class Demonstrations:
    """Episodes in memory.

    Attributes:
        observations: (N, O) float32. actions: (N, A) float32. ends: (E,) int64, the row after the last of each episode.
        modes: the name of the way of each episode; empty where ways are not told apart.
    """

    observations: np.ndarray
    actions: np.ndarray
    ends: np.ndarray
    modes: list[str]

    @property
    def starts(self) -> np.ndarray:
        """(E,) int64: the first row of each episode."""
        return np.concatenate([[0], self.ends[:-1]])


# Environments


class Environment(Protocol):
    """Rollouts side by side (`data.avoiding.Avoiding` says what each part is)."""

    observations: int
    actions: int
    limit: int
    modes: list[str]
    ended: np.ndarray

    def reset(self, seeds: Sequence[int]) -> np.ndarray: ...

    def step(self, actions: np.ndarray) -> np.ndarray: ...

    def outcome(self) -> Outcome: ...

    @staticmethod
    def constants() -> dict[str, Any]: ...


ENVIRONMENTS: dict[str, type[Environment]] = {"avoiding": Avoiding, "pusht": PushT}


def environment(name: str) -> Environment:
    """The environment of that name.

    Raises:
        UserError: there is none, or a package that it needs is missing.
    """
    if name not in ENVIRONMENTS:
        raise UserError(f"unknown environment {name!r}; {suggest(name, ENVIRONMENTS)}")
    return ENVIRONMENTS[name]()


def seeds(part: str, count: int) -> list[int]:
    """Of `count` rollouts: even ones for the validation split, odd ones for test, whatever the count."""
    return [2 * number + (part == TEST) for number in range(count)]


# Reading


def make_demonstrations(settings: Any) -> Demonstrations:
    """Every way through Avoiding, from its rules.

    Args:
        settings: `demonstrations` of the data set.
    """
    made = demonstrate(settings.episodes, settings.noise, settings.seed)
    modes, observations, actions = zip(*made, strict=True)
    return Demonstrations(
        np.concatenate(observations),
        np.concatenate(actions),
        np.cumsum([len(one) for one in actions]),
        [Avoiding.modes[mode] for mode in modes],
    )


def read_arrays(file: Path, keys: Any) -> Demonstrations:
    """One `.npz` with all steps one after the other, and where each episode ends.

    Args:
        keys: of the data set, the names of the arrays.

    Raises:
        UserError: the file is missing or damaged, or holds objects; and as `demonstrations`.
    """
    try:
        with np.load(file, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in keys.model_dump().values() if name in loaded}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} cannot be read as .npz of plain arrays ({error}) · is it complete?") from None
    return demonstrations(arrays, keys, file)


def read_zarr(folder: Path, keys: Any) -> Demonstrations:
    """A replay buffer, as diffusion policies are trained on: arrays per step in `data/`, `episode_ends` in `meta/`.

    Args:
        keys: of the data set, the names of the arrays; `mode` too lies in `meta/`.

    Raises:
        UserError: the package zarr is missing; the folder is no such buffer; and as `demonstrations`.
    """
    try:
        import zarr
    except ImportError as error:
        raise UserError(
            f"a data set of format 'zarr' needs the package zarr, which cannot be imported ({error}) · "
            'pip install ".[zarr]"'
        ) from None
    places = {"observation": "data", "action": "data", "episode_ends": "meta", "mode": "meta"}
    try:
        buffer = zarr.open_group(str(folder), mode="r")
        wanted = {name: f"{places[role]}/{name}" for role, name in keys.model_dump().items() if name is not None}
        arrays = {name: np.asarray(buffer[path]) for name, path in wanted.items() if path in buffer}
    except Exception as error:  # whatever reading damaged bytes may raise
        raise UserError(
            f"{folder} cannot be read as a zarr group ({type(error).__name__}: {error}) · is it complete, and is "
            "`folder` of the data set right?"
        ) from None
    return demonstrations(arrays, keys, folder)


def demonstrations(arrays: Mapping[str, np.ndarray], keys: Any, where: object) -> Demonstrations:
    """The arrays of a file, checked.

    A step may have an array of any shape. A way is a number or a row of numbers per episode; its name joins them, as in
    0-1-2.

    Args:
        arrays: by name. keys: their names. where: what a message names.

    Raises:
        UserError: an array is missing; shapes do not fit; a number is not finite; the ends of episodes do not rise from
            1 to the number of steps.
    """
    names = {role: name for role, name in keys.model_dump().items() if name is not None}
    if missing := [name for name in names.values() if name not in arrays]:
        raise UserError(f"{where} lacks {', '.join(missing)} · correct `keys` of the data set, or complete the source")
    observations, actions = (_steps(arrays[names[role]], names[role], where) for role in ("observation", "action"))
    if len(observations) != len(actions):
        raise UserError(
            f"{where}: {names['observation']} has shape {observations.shape}, {names['action']} {actions.shape} · both "
            "need a row per step"
        )
    ends = np.asarray(arrays[names["episode_ends"]])
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or not ends.size:
        raise UserError(
            f"{where}: {names['episode_ends']} must be a vector of whole numbers, one per episode, got {ends.dtype} of "
            f"shape {ends.shape} · mend it"
        )
    ends = ends.astype(np.int64)
    if (np.diff(ends, prepend=0) <= 0).any() or ends[-1] != len(actions):
        place = int(np.argmax(np.append(np.diff(ends, prepend=0) <= 0, True)))
        raise UserError(
            f"{where}: {names['episode_ends']} must rise from episode to episode, up to the {len(actions)} steps, got "
            f"{ends[max(place - 1, 0) : place + 2].tolist()} at episode {min(place, len(ends) - 1)} · mend it"
        )
    modes: list[str] = []
    if "mode" in names:
        found = np.asarray(arrays[names["mode"]])
        if found.dtype.kind not in "iu" or found.ndim not in (1, 2) or len(found) != len(ends):
            raise UserError(
                f"{where}: {names['mode']} must be a whole number, or a row of them, for each of {len(ends)} episodes, "
                f"got {found.dtype} of shape {found.shape} · mend it, or set `keys.mode` of the data set to null"
            )
        modes = ["-".join(map(str, row)) for row in found.reshape(len(ends), -1).tolist()]
    return Demonstrations(observations, actions, ends, modes)


def _steps(array: Any, name: str, where: object) -> np.ndarray:
    """(N, D) float32, a row per step."""
    steps = np.asarray(array)
    if steps.ndim < 2 or not steps.size or steps.dtype.kind not in "fiu":
        raise UserError(
            f"{where}: {name} must be numbers with a row per step, got {steps.dtype} of shape {steps.shape} · mend it"
        )
    # What is finite in the file may be too large for float32, in which it is stored.
    with np.errstate(over="ignore"):
        rows: np.ndarray = steps.reshape(len(steps), -1).astype(np.float32)
    if not np.isfinite(rows).all():
        row, column = (int(place) for place in np.argwhere(~np.isfinite(rows))[0])
        raise UserError(
            f"{where}: {name} holds {int((~np.isfinite(rows)).sum())} numbers that are not finite, first "
            f"{rows[row, column]} (step {row}, value {column}, from 0) · mend it"
        )
    return rows


def without_waiting(source: Demonstrations) -> Demonstrations:
    """Episodes from the first step at which something is done; one in which nothing ever is stays as it is.

    People wait before they begin, and the arm trembles meanwhile. In Avoiding it stands still: nothing would tell a
    policy whether to wait or to go, and who has learnt to wait would wait for ever.
    """
    acting = (source.actions != 0).any(axis=1)
    kept = np.ones(len(acting), dtype=bool)
    for start, end in zip(source.starts, source.ends, strict=True):
        kept[start : start + int(np.argmax(acting[start:end]))] = False
    ends = np.cumsum(kept)[source.ends - 1]
    return Demonstrations(source.observations[kept], source.actions[kept], ends, source.modes)


# Preparing


def deal(modes: Sequence[str], shares: Mapping[str, float], seed: int) -> np.ndarray:
    """(E,) splits of episodes, drawn at random among those of the same way.

    Of each way every split has its share, rounded, and one episode at least. Where there are too few for that, training
    comes first, then the splits in the order of `shares`.

    Raises:
        UserError: a split gets no episode at all.
    """
    names = np.array(modes)
    parts = np.full(len(names), TRAIN, dtype=object)
    generator = np.random.default_rng(seed)
    for name in sorted(set(modes)):
        rows = generator.permutation(np.flatnonzero(names == name))
        wanted = {part: max(1, round(share * len(rows))) for part, share in shares.items()}
        if sum(wanted.values()) >= len(rows):
            wanted = dict.fromkeys(shares, 1)
        free = rows[: len(rows) - 1]  # one is always left to train on
        for part, number in wanted.items():
            parts[free[:number]] = part
            free = free[number:]
    if empty := [part for part in (TRAIN, *shares) if part not in parts]:
        raise UserError(
            f"the {len(parts)} episodes of the data set do not suffice for every split: nothing is left for "
            f"{', '.join(empty)} · take more episodes"
        )
    return parts


def prepare(raw: Path, dataset: Any, output: Path, provenance: dict[str, Any]) -> None:
    """Make or read demonstrations, split them and write the prepared folder.

    Args:
        raw: the fetched source. dataset: its entry in params.yaml (`stages.parameters.policy.Dataset`).
        output: an existing empty folder. provenance: what dataset.json says of the source.

    Raises:
        UserError: a file is missing, damaged or contradicts itself, or does not fit the environment.
    """
    if dataset.format == "generated":
        source = make_demonstrations(dataset.demonstrations)
    elif dataset.format == "arrays":
        source = read_arrays(raw / dataset.file, dataset.keys)
    else:
        source = read_zarr(raw / dataset.folder, dataset.keys)
    place = ENVIRONMENTS[dataset.environment] if dataset.environment != "none" else None
    if place is not None:
        _check_environment(source, place, dataset.environment)
    found = len(source.actions)
    if dataset.environment == "avoiding":
        source = without_waiting(source)
    count = len(source.ends)
    shares = {VALIDATION: dataset.split.validation, TEST: dataset.split.test}
    parts = deal(source.modes or [""] * count, shares, dataset.split.seed)
    lengths = source.ends - source.starts
    manifest = pd.DataFrame(
        {
            "id": [f"episode-{number:05d}" for number in range(count)],
            "split": parts,
            "mode": source.modes or [""] * count,
            "start": source.starts,
            "length": lengths,
            "sha256": content_hashes(source.observations, source.actions, source.starts, lengths),
        }
    )
    manifest.to_csv(output / "manifest.csv", index=False, lineterminator="\n")
    np.save(output / "observations.npy", source.observations)
    np.save(output / "actions.npy", source.actions)
    train, number = np.repeat(parts == TRAIN, lengths), np.repeat(np.arange(count), lengths)
    named = place.modes if place is not None and place.modes and source.modes else sorted(set(source.modes))
    write_json(
        output / "dataset.json",
        {
            "observations": source.observations.shape[1],
            "actions": source.actions.shape[1],
            "scaling": {
                "observation": {
                    **_moments(source.observations[train]),
                    "change": _spread(
                        np.diff(source.observations, axis=0)[train[1:] & (np.diff(number) == 0)]
                    ).tolist(),
                },
                "action": {
                    **_moments(source.actions[train]),
                    "low": source.actions[train].min(axis=0).tolist(),
                    "high": source.actions[train].max(axis=0).tolist(),
                },
            },
            "environment": {"name": dataset.environment, **place.constants()} if place is not None else None,
            "modes": list(named),
            "samples": {part: int(lengths[parts == part].sum()) for part in SPLITS},
            "episodes": {part: int((parts == part).sum()) for part in SPLITS},
            "dropped": {"waiting": found - len(source.actions)},
            "source": provenance,
        },
    )


def _check_environment(source: Demonstrations, place: type[Environment], name: str) -> None:
    for what, found, wanted in (
        ("observation", source.observations.shape[1], place.observations),
        ("action", source.actions.shape[1], place.actions),
    ):
        if found != wanted:
            raise UserError(
                f"the demonstrations have {found} numbers per {what}, but the environment {name!r} has {wanted} · "
                f"correct `keys.{what}` or `environment` of the data set"
            )
    if place.modes and (unknown := sorted(set(source.modes) - set(place.modes))):
        raise UserError(
            f"the demonstrations take a way {unknown[0]!r}, which the environment {name!r} does not have; "
            f"{suggest(unknown[0], place.modes)} · correct `keys.mode` or `environment` of the data set"
        )


def _moments(rows: np.ndarray) -> dict[str, list[float]]:
    """Mean and `_spread`."""
    return {"mean": rows.mean(axis=0, dtype=np.float64).tolist(), "std": _spread(rows).tolist()}


def _spread(rows: np.ndarray) -> np.ndarray:
    """Standard deviation of each column; 1 for a column that never changes or has no rows: that has no scale."""
    if not len(rows):
        return np.ones(rows.shape[1])
    spread: np.ndarray = np.where(np.ptp(rows, axis=0) > 0, rows.std(axis=0, dtype=np.float64), 1.0)
    return spread


def content_hashes(observations: np.ndarray, actions: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> list[str]:
    """sha256 of the bytes of each episode's observations, then actions."""
    return [
        hashlib.sha256(
            b"".join(np.ascontiguousarray(rows[start : start + length]).tobytes() for rows in (observations, actions))
        ).hexdigest()
        for start, length in zip(starts, lengths, strict=True)
    ]


# Validation


def tables(prepared: Path) -> dict[str, pd.DataFrame]:
    """What is validated: the manifest beside what the arrays really hold, and the ways where there are any.

    Raises:
        UserError: an array is unreadable, or has another shape or type than manifest and description say.
    """
    description, manifest = describe(prepared), _read_manifest(prepared)
    observations, actions = _arrays(prepared, description, manifest)
    starts, lengths = manifest["start"].to_numpy(), manifest["length"].to_numpy()
    manifest["stored_sha256"] = content_hashes(observations, actions, starts, lengths)
    wrong = (~np.isfinite(observations)).sum(axis=1) + (~np.isfinite(actions)).sum(axis=1)
    # A step has no change where its episode begins.
    changes = np.abs(np.diff(observations, axis=0, prepend=observations[:1])).max(axis=1)
    changes[starts] = 0
    manifest["wrong_numbers"] = np.add.reduceat(wrong, starts)
    manifest["largest_action"] = np.maximum.reduceat(np.abs(actions).max(axis=1), starts)
    manifest["largest_change"] = np.maximum.reduceat(changes, starts)
    same_content = manifest.groupby("sha256")
    manifest["splits_of_content"] = same_content["split"].transform("nunique")
    # The name of an episode with the same content, so that a finding shows pairs.
    manifest["twin"] = same_content["id"].transform(lambda ids: ids.iloc[::-1].to_numpy() if len(ids) > 1 else None)
    counts = pd.crosstab(manifest["mode"], manifest["split"])
    counts = counts.reindex(index=description["modes"], columns=list(SPLITS), fill_value=0)
    modes = pd.DataFrame({"id": description["modes"]}).join(counts.reset_index(drop=True))
    modes["lacking"] = (counts == 0).sum(axis=1).to_numpy()
    return {"manifest": manifest, "modes": modes}


def _arrays(prepared: Path, description: Mapping[str, Any], manifest: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Observations and actions, of the shape and type that they should have."""
    again = f"run `dvc repro prepare@{prepared.name}` again"
    lengths = manifest["length"].to_numpy()
    if not len(manifest) or (lengths < 1).any() or (manifest["start"] != np.cumsum(lengths) - lengths).any():
        raise UserError(f"{prepared / 'manifest.csv'}: episodes do not follow one another without a gap · {again}")
    found = []
    for name in ("observations", "actions"):
        shape = (int(lengths.sum()), description[name])
        try:
            array = np.load(prepared / f"{name}.npy")
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{prepared / name}.npy cannot be read ({error}) · is the file complete?") from None
        if array.dtype != np.float32 or array.shape != shape:
            raise UserError(
                f"{prepared / name}.npy holds {array.dtype} of shape {array.shape}; manifest and dataset.json say "
                f"float32 of shape {shape} · {again}"
            )
        found.append(array)
    return found[0], found[1]


def expectations(dataset: Any, description: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is expected, as plain data: per table of `tables`, Great Expectations' type names and arguments.

    Args:
        dataset: the entry in params.yaml. description: dataset.json.
    """
    expect, between = dataset.expect, "expect_column_values_to_be_between"
    modes = description["modes"]
    manifest: list[dict[str, Any]] = [
        *(
            {"type": "expect_column_values_to_not_be_null", "column": name}
            for name in COLUMNS
            if modes or name != "mode"
        ),
        {"type": "expect_column_values_to_be_unique", "column": "id"},
        {"type": "expect_column_values_to_be_in_set", "column": "split", "value_set": list(SPLITS)},
        {
            "type": "expect_column_distinct_values_to_contain_set",
            "column": "split",
            "value_set": list(SPLITS),
            "description": "every split has episodes",
        },
        {
            "type": between,
            "column": "splits_of_content",
            "min_value": 1,
            "max_value": 1,
            "description": "the same episode never stands in two splits",
        },
        {"type": "expect_column_pair_values_to_be_equal", "column_A": "sha256", "column_B": "stored_sha256"},
        _at_most("wrong_numbers", 0, "all observations and actions are finite"),
        {
            "type": between,
            "column": "length",
            "min_value": expect.shortest,
            **({} if expect.longest is None else {"max_value": expect.longest}),
        },
    ]
    if expect.largest_action is not None:
        bound = float(np.float32(expect.largest_action))  # as the actions are stored
        manifest.append(_at_most("largest_action", bound, f"no action is larger than {bound:g} in any direction"))
    if expect.largest_change is not None:
        bound = float(np.float32(expect.largest_change))
        words = f"observations are continuous: none changes by more than {bound:g} from step to step"
        manifest.append(_at_most("largest_change", bound, words))
    if modes:
        manifest.append({"type": "expect_column_values_to_be_in_set", "column": "mode", "value_set": modes})
    if expect.episodes is not None:
        manifest.append({"type": "expect_table_row_count_to_equal", "value": expect.episodes})
    ways = [_at_most("lacking", 0, "every way is taken in every split")] if modes else []
    if expect.modes is not None:
        ways.append({"type": "expect_table_row_count_to_equal", "value": expect.modes})
    return {"manifest": manifest, **({"modes": ways} if ways else {})}


def _at_most(column: str, bound: float, description: str) -> dict[str, Any]:
    return {
        "type": "expect_column_values_to_be_between",
        "column": column,
        "max_value": bound,
        "description": description,
    }


def describe(prepared: Path) -> dict[str, Any]:
    """dataset.json of a prepared data set."""
    description: dict[str, Any] = json.loads((prepared / "dataset.json").read_text(encoding="utf-8"))
    return description


def _read_manifest(prepared: Path) -> pd.DataFrame:
    text = {"id": str, "split": str, "mode": str, "sha256": str}
    return pd.read_csv(prepared / "manifest.csv", dtype=text)


# Batches. torch is imported inside: preparing and validating do not need it, and every stage pays its imports.


class Episodes(NamedTuple):
    """The episodes of one split.

    Attributes:
        ids: their names. observations: (N, O) float32, all steps one after the other. actions: (N, A) float32.
        starts: (E,) int64, first row of each. lengths: (E,) int64, in steps.
    """

    ids: list[str]
    observations: "Tensor"
    actions: "Tensor"
    starts: "Tensor"
    lengths: "Tensor"


def load(prepared: Path, part: str) -> Episodes:
    """One split."""
    import torch

    manifest = _read_manifest(prepared)
    chosen = (manifest["split"] == part).to_numpy()
    rows = np.flatnonzero(np.repeat(chosen, manifest["length"]))
    observations, actions = (
        torch.from_numpy(np.load(prepared / f"{name}.npy", mmap_mode="r")[rows]) for name in ("observations", "actions")
    )
    lengths = torch.from_numpy(manifest["length"].to_numpy()[chosen])
    return Episodes(manifest["id"][chosen].tolist(), observations, actions, lengths.cumsum(0) - lengths, lengths)


def windows(episodes: Episodes, length: int) -> "Tensor":
    """(W, length) int64: the rows of every window of so many steps that lies inside one episode.

    Raises:
        UserError: an episode is shorter than the window, or has one step.
    """
    import torch

    shortest = int(episodes.lengths.argmin())
    steps = int(episodes.lengths[shortest])
    if steps < max(length, 2):
        raise UserError(
            f"{episodes.ids[shortest]} has {steps} step{'s' * (steps > 1)}, but "
            + (f"a window has {length} (`network.window`)" if steps > 1 else "an episode has two at least")
            + " · shorten the window, or leave out what is shorter: `expect.shortest` of the data set says so early"
        )
    counts = episodes.lengths - length + 1
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return (episodes.starts.repeat_interleave(counts) + within)[:, None] + torch.arange(length)
