"""What is expected of demonstrations: sound ones pass, and every planted fault is found with its ids."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from data import policy
from data.errors import UserError
from stages import fetch, prepare, validate

sys.path.insert(0, str(Path(__file__).parent))
import policy_files as files

FOLDER = Path("data/prepared/policy/tiny")
PROOF = Path("data/validated/policy/tiny.json")
BETWEEN = "expect_column_values_to_be_between"
RIGHTS = {"licence": "none", "credit": "nobody", "redistributable": True}
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def declare(source: dict[str, Any], entry: Any, **fields: Any) -> None:
    written = {**entry.model_dump(exclude_none=True, mode="json"), **fields}
    parameters = {"sources": {"toy": {**source, **RIGHTS}}, "datasets": {"tiny": written}}
    Path("params.yaml").write_text(yaml.safe_dump(parameters))


def build(change: Callable[[Arrays], Any] | None = None, **fields: Any) -> list[str]:
    """A project in the working directory with the data set `tiny`, prepared by the real stage; ids of its episodes."""
    content = files.demos()
    if change is not None:
        change(content)
    files.write_arrays(Path("data/raw/toy/demos.npz"), content)
    declare({"kind": "folder", "path": "unused", "tree_digest": "0" * 64}, files.arrays(), **fields)
    prepare.main("tiny")
    return facts()["id"].tolist()


def facts() -> pd.DataFrame:
    return pd.read_csv(FOLDER / "manifest.csv", dtype={"mode": str})


def edit(change: Callable[[pd.DataFrame], Any]) -> None:
    manifest = pd.read_csv(FOLDER / "manifest.csv", dtype=str)
    change(manifest)
    manifest.to_csv(FOLDER / "manifest.csv", index=False, lineterminator="\n")


def alter(name: str, place: Any, value: Any) -> None:
    array = np.load(FOLDER / f"{name}.npy")
    array[place] = value
    np.save(FOLDER / f"{name}.npy", array)


def refused() -> tuple[dict[str, list[str]], str]:
    """The ids per expectation that is not met, and the message."""
    with pytest.raises(UserError) as caught:
        validate.main("tiny")
    assert not PROOF.exists()
    report = json.loads(Path("reports/validation/policy/tiny/findings.json").read_text(encoding="utf-8"))
    found = {}
    for finding in report["findings"]:
        if not finding["success"]:
            wanted = finding["expectation"]
            columns = [wanted[key] for key in ("column", "column_A", "column_B") if key in wanted]
            found[f"{wanted['type']}({', '.join(columns)})"] = [row["id"] for row in finding["rows"]]
    return found, str(caught.value)


def test_sound_demonstrations_pass_and_the_bounds_are_tight() -> None:
    content = files.demos()
    starts = np.concatenate([[0], content["episode_ends"][:-1]])
    changes = np.abs(np.diff(content["observation"], axis=0))
    largest = float(np.delete(changes, starts[1:] - 1, axis=0).max())
    action = float(np.abs(content["action"]).max())
    bounds = {"episodes": 12, "modes": 3, "shortest": 4, "longest": 10, "largest_action": action}
    build(expect={**bounds, "largest_change": largest})
    validate.main("tiny")
    assert json.loads(PROOF.read_text())["rows"] == {"manifest": 12, "modes": 3}


def test_demonstrations_without_ways_pass() -> None:
    build(lambda content: content.pop("mode"), keys={})
    validate.main("tiny")


def test_generated_demonstrations_pass_from_no_source_at_all() -> None:
    """Everything by the real stages, and within the bounds that recordings have."""
    bounds = {"episodes": 72, "modes": 24, "shortest": 45, "longest": 107}
    entry = files.generated(3, expect={**bounds, "largest_action": 0.01251, "largest_change": 0.0151})
    declare({"kind": "none"}, entry)
    fetch.main("toy")
    prepare.main("tiny")
    validate.main("tiny")
    assert json.loads(PROOF.read_text())["rows"] == {"manifest": 72, "modes": 24}


def test_an_episode_in_two_splits_is_found() -> None:
    """The first two are the same, the others are not."""

    def change(content: Arrays) -> None:
        content["episode_ends"] = np.cumsum([6] * 12)
        for name in ("observation", "action"):
            content[name] = content[name][:72]
            content[name][6:72] = np.tile(content[name][:6], (11, 1))
            content[name][12:72] += np.arange(60)[:, None] // 6 + 1
        content["mode"][:] = 0

    build(change)
    parts = facts()["split"]
    edit(lambda table: table.loc.__setitem__((1, "split"), next(part for part in policy.SPLITS if part != parts[0])))
    found, message = refused()
    assert found == {f"{BETWEEN}(splits_of_content)": ["episode-00000", "episode-00001"]}
    assert "the same episode never stands in two splits; 2 rows are not so" in message


def test_numbers_that_are_not_finite_are_found() -> None:
    ids = build()
    alter("observations", (0, 1), np.nan)
    alter("actions", (8, 0), np.inf)
    alter("actions", (9, slice(2)), np.nan)
    found, message = refused()
    assert found == {
        f"{BETWEEN}(wrong_numbers)": ids[:2],
        "expect_column_pair_values_to_be_equal(sha256, stored_sha256)": ids[:2],
    }
    assert "all observations and actions are finite; 2 rows are not so: episode-00000 (1), episode-00001 (3)" in message


def test_what_was_changed_after_preparation_is_found() -> None:
    ids = build()
    alter("observations", (0, 0), 0.123)
    alter("actions", (75, 1), 0.5)
    found, _ = refused()
    assert found == {"expect_column_pair_values_to_be_equal(sha256, stored_sha256)": [ids[0], ids[-1]]}


def test_an_action_beyond_its_bound_is_found() -> None:
    def change(content: Arrays) -> None:
        content["action"][7 + 2, 1] = -1.25  # in the second episode

    ids = build(change, expect={"largest_action": 1.0})
    found, message = refused()
    assert found == {f"{BETWEEN}(largest_action)": [ids[1]]}
    assert "no action is larger than 1 in any direction; 1 row is not so: episode-00001 (1.25)" in message


def test_a_jump_inside_an_episode_is_found_and_none_between_two() -> None:
    def change(content: Arrays) -> None:
        content["observation"][:] = np.linspace(0, 1, 76)[:, None]
        content["observation"][7:] += 50  # where the second episode begins
        content["observation"][11 + 4 :, 2] += 3  # inside the third

    ids = build(change, expect={"largest_change": 0.5})
    found, message = refused()
    assert found == {f"{BETWEEN}(largest_change)": [ids[2]]}
    assert "observations are continuous: none changes by more than 0.5 from step to step; 1 row is not so" in message


def test_episodes_that_are_too_short_or_too_long_are_found() -> None:
    ids = build(expect={"shortest": 5, "longest": 9})
    expected = [name for name, length in zip(ids, files.LENGTHS, strict=True) if not 5 <= length <= 9]
    assert len(expected) == 3
    assert refused()[0] == {f"{BETWEEN}(length)": expected}


def test_an_episode_of_one_step_is_found_unasked() -> None:
    def change(content: Arrays) -> None:
        content["episode_ends"][-1:] = 72
        for name in ("observation", "action"):
            content[name] = content[name][:72]

    ids = build(change)
    assert refused()[0] == {f"{BETWEEN}(length)": [ids[-1]]}


def test_a_way_that_a_split_lacks_is_found() -> None:
    def change(content: Arrays) -> None:
        content["mode"][:] = [0] * 6 + [1] * 4 + [2] * 2

    build(change)
    found, message = refused()
    assert found == {f"{BETWEEN}(lacking)": ["2"]}
    assert "every way is taken in every split; 1 row is not so: 2 (1)" in message


def test_a_way_of_the_environment_that_nobody_took_is_found() -> None:
    declare({"kind": "none"}, files.generated(3))
    fetch.main("toy")
    prepare.main("tiny")
    edit(lambda table: table.loc.__setitem__((slice(0, 2), "mode"), "1-2-3"))
    assert refused()[0] == {f"{BETWEEN}(lacking)": ["0-0-0"]}
    edit(lambda table: table.loc.__setitem__((5, "mode"), "1-2-4"))
    found, _ = refused()
    assert found["expect_column_values_to_be_in_set(mode)"] == ["episode-00005"]


def test_another_number_of_episodes_or_ways_is_found() -> None:
    build(expect={"episodes": 13, "modes": 4})
    found, message = refused()
    assert list(found) == ["expect_table_row_count_to_equal()"]
    assert "manifest: the number of rows must be 13; found 12" in message
    assert "modes: the number of rows must be 4; found 3" in message


def test_ways_that_are_expected_and_not_told_apart_are_found() -> None:
    build(lambda content: content.pop("mode"), keys={}, expect={"modes": 3})
    assert "modes: the number of rows must be 3; found 0" in refused()[1]


def test_missing_values_and_an_unknown_split_are_found() -> None:
    ids = build()
    edit(lambda table: table.loc.__setitem__((4, "split"), "training"))
    found, _ = refused()
    assert found["expect_column_values_to_be_in_set(split)"] == [ids[4]]
    for row, column in enumerate(("id", "split", "mode", "sha256")):
        edit(lambda table, row=row, column=column: table.loc.__setitem__((row, column), None))  # type: ignore[misc]
    found, _ = refused()
    for row, column in enumerate(("id", "split", "mode", "sha256")):
        expected = None if column == "id" else ids[row]
        assert found[f"expect_column_values_to_not_be_null({column})"] == [expected]


def test_a_split_without_an_episode_is_found() -> None:
    build(lambda content: content.pop("mode"), keys={})
    edit(lambda table: table.__setitem__("split", table["split"].replace("test", "train")))
    found, message = refused()
    assert list(found) == ["expect_column_distinct_values_to_contain_set(split)"]
    assert "every split has episodes" in message


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda: np.save(FOLDER / "actions.npy", np.zeros((76, 3), np.float32)), "holds float32 of shape (76, 3)"),
        (lambda: np.save(FOLDER / "observations.npy", np.zeros((76, 3))), "float64 of shape (76, 3); manifest and"),
        (lambda: np.save(FOLDER / "observations.npy", np.zeros((75, 3), np.float32)), "of shape (75, 3); manifest and"),
        (lambda: (FOLDER / "actions.npy").write_bytes(b"\x93NUMPY"), "actions.npy cannot be read"),
        ((FOLDER / "observations.npy").unlink, "observations.npy cannot be read"),
        (lambda: edit(lambda table: table.loc.__setitem__((1, "start"), "8")), "do not follow one another without a"),
        (lambda: edit(lambda table: table.loc.__setitem__((1, "length"), "0")), "do not follow one another without a"),
        (lambda: edit(lambda table: table.loc.__setitem__((1, "length"), None)), "do not follow one another"),
        (lambda: (FOLDER / "manifest.csv").write_text(",".join(policy.COLUMNS)), "do not follow one another"),
        (lambda: edit(lambda table: table.__delitem__("sha256")), "'sha256'"),
        (lambda: (FOLDER / "dataset.json").write_text("{"), "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_users(damage: Callable[[], Any], complaint: str) -> None:
    build()
    damage()
    with pytest.raises(UserError) as caught:
        validate.main("tiny")
    assert complaint in str(caught.value)
    assert not PROOF.exists()


def test_every_column_that_is_expected_exists() -> None:
    build(expect={"largest_action": 1.0, "largest_change": 1.0, "episodes": 12, "modes": 3})
    tables, description = policy.tables(FOLDER), policy.describe(FOLDER)
    expected = policy.expectations(files.arrays(), description)
    for name, wanted in expected.items():
        for one in wanted:
            assert {one[key] for key in ("column", "column_A", "column_B") if key in one} <= set(tables[name].columns)
