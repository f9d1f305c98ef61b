"""Demonstrations: made or read as they are, dealt to splits, loaded as episodes and windows."""

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import avoiding, policy
from data.errors import UserError
from data.files import tree_digest

sys.path.insert(0, str(Path(__file__).parent))
import policy_files as files

Arrays = dict[str, np.ndarray]


def read(tmp_path: Path, content: Arrays, **fields: Any) -> tuple[Path, pd.DataFrame, dict[str, Any]]:
    """A prepared folder of one .npz, its manifest and its description."""
    files.write_arrays(tmp_path / "raw" / "demos.npz", content)
    folder = files.prepared(tmp_path / "raw", files.arrays(**fields), tmp_path / "out")
    manifest = pd.read_csv(folder / "manifest.csv", dtype={"mode": str}, keep_default_na=False)
    return folder, manifest, policy.describe(folder)


# Preparing


def test_what_was_read_is_what_is_kept(tmp_path: Path) -> None:
    content = files.demos()
    folder, manifest, description = read(tmp_path, content)
    observations, actions = np.load(folder / "observations.npy"), np.load(folder / "actions.npy")
    np.testing.assert_array_equal(observations, content["observation"])
    np.testing.assert_array_equal(actions, content["action"])
    assert observations.dtype == actions.dtype == np.float32
    assert manifest["id"].tolist() == [f"episode-{number:05d}" for number in range(12)]
    assert manifest["length"].tolist() == list(files.LENGTHS)
    assert manifest["mode"].tolist() == ["0", "1", "2"] * 4
    for row in manifest.itertuples():
        place = slice(row.start, row.start + row.length)
        content_of_it = observations[place].tobytes() + actions[place].tobytes()
        assert row.sha256 == hashlib.sha256(content_of_it).hexdigest()
    assert (description["observations"], description["actions"]) == (3, 2)
    assert description["modes"] == ["0", "1", "2"]
    assert description["environment"] is None
    assert description["source"] == files.PROVENANCE


def test_scaling_is_that_of_the_training_steps_alone(tmp_path: Path) -> None:
    content = files.demos()
    content["observation"][:, 1] = 4.0
    _, manifest, description = read(tmp_path, content)
    rows = [
        row
        for one in manifest[manifest["split"] == "train"].itertuples()
        for row in range(one.start, one.start + one.length)
    ]
    assert 0 < len(rows) < len(content["action"])
    for name, scale in description["scaling"].items():
        values = content[name][rows].astype(np.float64)
        mean = values.sum(axis=0) / len(rows)
        std = np.sqrt(((values - mean) ** 2).sum(axis=0) / len(rows))
        if name == "observation":
            assert (scale["mean"][1], scale["std"][1]) == (4.0, 1.0), "what never changes has no scale"
            std[1] = 1.0
        np.testing.assert_allclose(scale["mean"], mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(scale["std"], std, rtol=1e-9)
    action = description["scaling"]["action"]
    np.testing.assert_array_equal(action["low"], content["action"][rows].min(axis=0))
    np.testing.assert_array_equal(action["high"], content["action"][rows].max(axis=0))
    counts = Counter(dict(manifest.groupby("split")["length"].sum()))
    assert description["samples"] == dict(counts)
    assert description["episodes"] == dict(Counter(manifest["split"]))


def test_generated_demonstrations_are_those_of_the_rules(tmp_path: Path) -> None:
    """They are kept in order, every way is in every split, and they come again byte for byte."""
    entry = files.generated(4, demonstrations={"episodes": 4, "noise": 0.005, "seed": 3})
    folders = [files.prepared(tmp_path, entry, tmp_path / name) for name in ("one", "two")]
    assert tree_digest(folders[0]) == tree_digest(folders[1])
    made = avoiding.demonstrate(4, 0.005, 3)
    manifest = pd.read_csv(folders[0] / "manifest.csv", dtype={"mode": str})
    assert manifest["mode"].tolist() == [avoiding.MODES[mode] for mode, *_ in made]
    np.testing.assert_array_equal(np.load(folders[0] / "observations.npy"), np.vstack([seen for _, seen, _ in made]))
    np.testing.assert_array_equal(np.load(folders[0] / "actions.npy"), np.vstack([actions for *_, actions in made]))
    counts = pd.crosstab(manifest["mode"], manifest["split"])
    assert (counts[["train", "validation", "test"]] == [2, 1, 1]).all(axis=None)
    description = policy.describe(folders[0])
    assert description["environment"] == {"name": "avoiding", **avoiding.Avoiding.constants()}
    assert description["modes"] == avoiding.MODES
    other = files.prepared(tmp_path, files.generated(4), tmp_path / "other")
    assert not set(pd.read_csv(other / "manifest.csv")["sha256"]) & set(manifest["sha256"])


def test_an_episode_of_avoiding_begins_where_something_is_done(tmp_path: Path) -> None:
    """What is done later is kept, pauses too; and an episode in which nothing is ever done."""
    content = files.demos((5,) * 72) | {
        "mode": np.array([list(map(int, name.split("-"))) for name in avoiding.MODES] * 3)
    }
    content["observation"] = np.tile(content["observation"], (1, 2))[:, :4]
    content["action"][:3] = 0
    content["action"][4] = 0
    content["action"][5:10] = 0
    content["action"][10] = [0, 0.1]
    content["action"][15] = 0
    folder, manifest, description = read(tmp_path, content, environment="avoiding")
    rows = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, *range(16, 360)]
    np.testing.assert_array_equal(np.load(folder / "actions.npy"), content["action"][rows])
    np.testing.assert_array_equal(np.load(folder / "observations.npy"), content["observation"][rows])
    assert manifest["length"].tolist() == [2, 5, 5, 4, *[5] * 68]
    assert description["dropped"] == {"waiting": 4}
    (tmp_path / "other").mkdir()
    _, manifest, description = read(tmp_path / "other", content)
    assert (manifest["length"] == 5).all()
    assert description["dropped"] == {"waiting": 0}


def test_arrays_of_any_shape_per_step_are_rows_of_numbers(tmp_path: Path) -> None:
    content = files.demos()
    steps = len(content["action"])
    content = {
        "keypoint": np.arange(steps * 6, dtype=np.float64).reshape(steps, 3, 2),
        "target": np.arange(steps, dtype=np.uint8).reshape(steps, 1),
        "ends": content["episode_ends"].astype(np.uint32),
    }
    keys = {"observation": "keypoint", "action": "target", "episode_ends": "ends"}
    folder, manifest, description = read(tmp_path, content, keys=keys)
    np.testing.assert_array_equal(np.load(folder / "observations.npy"), content["keypoint"].reshape(steps, 6))
    np.testing.assert_array_equal(np.load(folder / "actions.npy"), content["target"])
    assert (description["observations"], description["actions"], description["modes"]) == (6, 1, [])
    assert set(manifest["mode"]) == {""}
    assert set(manifest["split"]) == {"train", "validation", "test"}


def test_ways_of_several_numbers_are_named_after_them_all(tmp_path: Path) -> None:
    content = files.demos((3,) * 24) | {"mode": np.tile([[0, 1, 2], [1, 0, 3]], (12, 1)).astype(np.int8)}
    content["observation"] = np.tile(content["observation"], (1, 2))[:, :4]
    _, manifest, description = read(tmp_path, content, environment="avoiding")
    assert manifest["mode"].tolist() == ["0-1-2", "1-0-3"] * 12
    assert description["modes"] == avoiding.MODES


def test_a_replay_buffer_in_zarr_is_read_as_the_same_arrays(tmp_path: Path) -> None:
    pytest.importorskip("zarr", reason="the optional package zarr is not installed")
    content = files.demos()
    folder, manifest, _ = read(tmp_path, content)
    files.write_zarr(tmp_path / "raw" / "demos.zarr", content)
    entry = files.dataset(format="zarr", environment="none", folder="demos.zarr", keys={"mode": "mode"})
    other = files.prepared(tmp_path / "raw", entry, tmp_path / "zarr")
    assert tree_digest(other) == tree_digest(folder)
    assert len(manifest) == 12
    (tmp_path / "raw" / "demos.zarr" / "data" / "action" / ".zarray").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a zarr group"):
        files.prepared(tmp_path / "raw", entry, tmp_path / "damaged")
    absent = files.dataset(format="zarr", environment="none", folder="demos.zarr", keys={"observation": "img"})
    files.write_zarr(tmp_path / "fresh" / "demos.zarr", content)
    with pytest.raises(UserError, match=r"demos\.zarr lacks img"):
        files.prepared(tmp_path / "fresh", absent, tmp_path / "absent")


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    entry = files.dataset(format="zarr", environment="none", folder="demos.zarr", keys={})
    with pytest.raises(UserError, match=re.escape('pip install ".[zarr]"')):
        files.prepared(tmp_path, entry, tmp_path / "out")


def without(name: str) -> Callable[[Arrays], Any]:
    return lambda content: content.pop(name)


def changed(name: str, value: Any) -> Callable[[Arrays], Any]:
    return lambda content: content.__setitem__(name, np.asarray(value))


def at(name: str, place: Any, value: Any) -> Callable[[Arrays], Any]:
    return lambda content: content[name].__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without("action"), "demos.npz lacks action · correct `keys`"),
        (without("mode"), "lacks mode"),
        (changed("action", np.zeros((75, 2))), "observation has shape (76, 3), action (75, 2)"),
        (changed("action", np.zeros(76)), "action must be numbers with a row per step, got float64 of shape (76,)"),
        (changed("observation", [["a"]] * 76), "observation must be numbers"),
        (
            at("action", (5, 1), np.nan),
            "action holds 1 numbers that are not finite, first nan (step 5, value 1, from 0)",
        ),
        (changed("observation", np.full((76, 3), 1e300)), "228 numbers that are not finite, first inf"),
        (changed("episode_ends", [1.5, 76.0]), "one per episode, got float64 of shape (2,)"),
        (changed("episode_ends", np.zeros((0,), int)), "got int64 of shape (0,)"),
        (at("episode_ends", 3, 20), "up to the 76 steps, got [20, 20, 31] at episode 3"),
        (at("episode_ends", 0, 0), "got [0, 11] at episode 0"),
        (at("episode_ends", -1, 75), "up to the 76 steps, got [75] at episode 11"),
        (changed("mode", np.zeros(11, int)), "for each of 12 episodes, got int64 of shape (11,)"),
        (changed("mode", np.zeros(12)), "got float64 of shape (12,)"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(
    tmp_path: Path, change: Callable[[Arrays], Any], complaint: str
) -> None:
    content = files.demos()
    change(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert complaint in str(caught.value)


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 and nothing more"):
        (tmp_path / "demos.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read as \.npz of plain arrays"):
            policy.read_arrays(tmp_path / "demos.npz", files.arrays().keys)
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        policy.read_arrays(tmp_path / "absent.npz", files.arrays().keys)


def test_demonstrations_that_do_not_fit_the_environment_are_refused(tmp_path: Path) -> None:
    content = files.demos()
    with pytest.raises(UserError, match="3 numbers per observation, but the environment 'avoiding' has 4"):
        read(tmp_path / "one", content, environment="avoiding")
    content["observation"] = np.tile(content["observation"], (1, 2))[:, :4]
    with pytest.raises(UserError, match="take a way '0', which the environment 'avoiding' does not have"):
        read(tmp_path / "two", content, environment="avoiding")
    content["action"] = np.tile(content["action"], (1, 2))
    with pytest.raises(UserError, match="4 numbers per action, but the environment 'avoiding' has 2"):
        read(tmp_path / "three", content, environment="avoiding")
    with pytest.raises(UserError, match="4 numbers per observation, but the environment 'pusht' has 5"):
        read(tmp_path / "four", content, environment="pusht")


# Splits


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(0.01, 0.45), st.floats(0.01, 0.45), st.integers(0)
)
def test_every_way_is_dealt_on_its_own(numbers: list[int], validation: float, test: float, seed: int) -> None:
    modes = np.random.default_rng(seed % 2**32).permutation(
        np.repeat([f"way {n}" for n in range(len(numbers))], numbers)
    )
    shares = {"validation": validation, "test": test}
    if max(numbers) < 3:
        with pytest.raises(UserError, match=r"nothing is left for (validation, )?test"):
            policy.deal(modes.tolist(), shares, seed)
        return
    parts = policy.deal(modes.tolist(), shares, seed)
    np.testing.assert_array_equal(parts, policy.deal(modes.tolist(), shares, seed))
    for number, count in enumerate(numbers):
        found = Counter(parts[modes == f"way {number}"])
        wanted = {name: max(1, round(share * count)) for name, share in shares.items()}
        if sum(wanted.values()) < count:
            assert found == {**wanted, "train": count - sum(wanted.values())}
        elif count >= 3:
            assert found == {"train": count - 2, "validation": 1, "test": 1}
        else:
            assert found == {1: {"train": 1}, 2: {"train": 1, "validation": 1}}[count]


def test_another_seed_deals_others() -> None:
    modes = [""] * 40
    dealt = {tuple(policy.deal(modes, {"validation": 0.2, "test": 0.2}, seed)) for seed in range(10)}
    assert len(dealt) == 10


# Loading


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_split_is_its_episodes_one_after_the_other(tmp_path: Path, part: str) -> None:
    content = files.demos()
    folder, manifest, _ = read(tmp_path, content)
    chosen = manifest[manifest["split"] == part]
    episodes = policy.load(folder, part)
    assert episodes.ids == chosen["id"].tolist()
    assert episodes.lengths.tolist() == chosen["length"].tolist()
    assert (episodes.starts.dtype, episodes.lengths.dtype) == (torch.int64, torch.int64)
    for place, row in enumerate(chosen.itertuples()):
        begin = int(episodes.starts[place])
        for name, found in (("observation", episodes.observations), ("action", episodes.actions)):
            expected = content[name][row.start : row.start + row.length]
            np.testing.assert_array_equal(found[begin : begin + row.length].numpy(), expected)
    assert len(episodes.actions) == len(episodes.observations) == chosen["length"].sum()


def of_lengths(*lengths: int) -> policy.Episodes:
    steps, counts = sum(lengths), torch.tensor(lengths)
    ids = [f"episode-{number:05d}" for number in range(len(lengths))]
    return policy.Episodes(ids, torch.zeros(steps, 3), torch.zeros(steps, 2), counts.cumsum(0) - counts, counts)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=8), st.data())
def test_windows_are_all_that_lie_inside_an_episode(lengths: list[int], data: st.DataObject) -> None:
    length = data.draw(st.integers(1, min(lengths)))
    episode = np.repeat(range(len(lengths)), lengths)
    expected = [
        list(range(first, first + length))
        for first in range(len(episode) - length + 1)
        if episode[first] == episode[first + length - 1]
    ]
    found = policy.windows(of_lengths(*lengths), length)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_a_window_longer_than_an_episode_and_an_episode_of_one_step_are_refused() -> None:
    with pytest.raises(UserError, match=r"episode-00001 has 4 steps, but a window has 5 \(`network.window`\)"):
        policy.windows(of_lengths(6, 4, 5), 5)
    assert len(policy.windows(of_lengths(6, 4, 5), 4)) == 3 + 1 + 2
    for length in (1, 5):
        with pytest.raises(UserError, match="episode-00002 has 1 step, but an episode has two at least"):
            policy.windows(of_lengths(6, 4, 1), length)


# Environments


def test_environments_are_found_by_name() -> None:
    assert isinstance(policy.environment("avoiding"), avoiding.Avoiding)
    with pytest.raises(UserError, match="unknown environment 'avoidin'; did you mean 'avoiding'"):
        policy.environment("avoidin")


@pytest.mark.parametrize(("first", "second"), [(480, 480), (3, 1000)])
def test_seeds_of_validation_and_test_are_disjoint(first: int, second: int) -> None:
    validation, test = policy.seeds("validation", first), policy.seeds("test", second)
    assert (len(set(validation)), len(set(test))) == (first, second)
    assert not set(validation) & set(test)
    assert policy.seeds("test", second + 7)[:second] == test


# Real data


@pytest.mark.bench
@pytest.mark.skipif(not os.environ.get("DISTILLERY_DATA"), reason="DISTILLERY_DATA names no folder with real data")
@pytest.mark.parametrize(
    ("name", "fields", "steps", "episodes"),
    [
        ("d3il-avoiding/avoiding", {"environment": "avoiding", "keys": {"mode": "mode"}}, 7305, 96),
        ("pusht-lowdim/pusht", {"environment": "pusht", "keys": {"observation": "state"}}, 25650, 206),
    ],
)
def test_real_demonstrations_are_read(
    tmp_path: Path, name: str, fields: dict[str, Any], steps: int, episodes: int
) -> None:
    entry = files.arrays(**fields, file=f"{name}.npz")
    folder = files.prepared(Path(os.environ["DISTILLERY_DATA"]), entry, tmp_path / "out")
    description = policy.describe(folder)
    assert sum(description["samples"].values()) + description["dropped"]["waiting"] == steps
    assert (description["dropped"]["waiting"] > 0) == (fields["environment"] == "avoiding")
    assert sum(description["episodes"].values()) == episodes
    found = policy.tables(folder)
    if description["modes"]:
        assert (found["modes"][["train", "validation", "test"]].min() >= 1).all()
    assert (found["manifest"]["splits_of_content"] == 1).all()
