"""Export and latency of policies: the graph against the network it was made of, whatever the length of the history."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from policy_rollouts import LENGTHS, SCALING, WINDOW, describe, network, write_prepared

from data import policy as data
from data.errors import UserError
from data.files import sha256
from models.artifacts import load_model, save_model
from models.policy import Decision, Mixture
from stages import latency, paths
from stages.export import __main__ as command
from stages.export import policy as export

TASK, EXPERTS = "policy", 3
WINDOWS = sum(length - WINDOW + 1 for length in LENGTHS["validation"])
every_backbone = pytest.mark.parametrize("backbone", ["mlp", "transformer"])
STUDENTS: dict[str, dict[str, Any]] = {
    "flat": {"backbone": "mlp"},
    "tokens": {"backbone": "transformer"},
    "wants": {"backbone": "transformer", "goals": 1},
    "uniform": {"backbone": "mlp", "gate": "uniform", "covariance": "diagonal"},
}


def parameters() -> dict[str, Any]:
    """Teachers are called after their kind."""
    dataset = {"task": TASK, "source": "x", "encoder": "none", "format": "arrays", "file": "x", "keys": {}}
    backbone = {"name": "mlp", "width": 8, "layers": 2}
    entry = {"task": TASK, "dataset": "toy"}
    student = {"method": "alone", "teacher": "none", "network": {"name": "mixture", "backbone": backbone}}
    source = {"kind": "folder", "path": ".", "tree_digest": "0" * 64, "licence": "-", "credit": "-"}
    return {
        "sources": {"x": {**source, "redistributable": True}},
        "datasets": {"toy": {**dataset, "environment": "none"}},
        "teachers": {
            name: {**entry, "start": "none", "network": {"name": name, "backbone": backbone}}
            for name in ("ddpm", "beso")
        },
        "students": {name: {**entry, **student} for name in STUDENTS},
        "exports": dict.fromkeys(STUDENTS, entry),
        "tasks": {TASK: {}},
    }


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Students with random weights."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(parameters()))
    write_prepared(paths.prepared(TASK, "toy"), None)
    for name, settings in STUDENTS.items():
        save(name, "mixture", **settings)
    return tmp_path


def save(name: str, kind: str, **settings: Any) -> None:
    description = describe(kind, environment=None, model=name, **settings)
    paths.trained(TASK, name).mkdir(parents=True, exist_ok=True)
    save_model(paths.trained(TASK, name), calm(network(description, len(name))), description)


def calm(network: Any) -> Any:
    """With weights so small that actions are not all at their bounds."""
    for parameter in network.parameters():
        parameter.data.mul_(0.5)
    return network


def exported(name: str) -> tuple[onnxruntime.InferenceSession, dict[str, Any], Mixture]:
    command.main(name)
    folder = paths.exported(TASK, name)
    description = json.loads((folder / "model.json").read_text())
    assert description["onnx_sha256"] == sha256(folder / "model.onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.onnx"]
    found, _ = load_model(paths.trained(TASK, name))
    assert isinstance(found, Mixture)
    return onnxruntime.InferenceSession(str(folder / "model.onnx")), description, found


def asked(length: int, count: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Situations as they may come: any history, any mask, drawn or not."""
    generator = np.random.default_rng(seed)
    mean, std = (np.array(SCALING["observation"][name]) for name in ("mean", "std"))
    allowed = generator.random((count, EXPERTS)) < 0.6
    allowed[np.arange(count), generator.integers(EXPERTS, size=count)] = True
    draw = np.where(generator.random(count) < 0.3, -1, generator.random(count))
    return {
        "observations": (mean + 2 * std * generator.normal(size=(count, length, 4))).astype(np.float32),
        "draw": draw.astype(np.float32),
        "allowed": allowed,
    }


def slowly(network: Mixture, fed: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Actions, experts and probabilities from all experts' means at all steps, in float64, one after the other."""
    network = network.double()
    with torch.inference_mode():
        mean, _, log_gate = network(torch.from_numpy(fed["observations"]).double())
        raw = network.scaling.raw(network.scaling.clip(mean[:, -1])).numpy()
    actions, experts, probabilities = [], [], []
    for row, logs in enumerate(log_gate[:, -1].exp().numpy()):
        kept = np.where(fed["allowed"][row], logs, 0) / logs[fed["allowed"][row]].sum()
        expert = int(kept.argmax())
        if fed["draw"][row] >= 0:
            expert = int(np.flatnonzero(kept.cumsum() > fed["draw"][row])[0])
        actions.append(raw[row, expert])
        experts.append(expert)
        probabilities.append(kept)
    network.float()
    return np.array(actions), np.array(experts), np.array(probabilities)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_last_step_is_decided_at_every_length(project: Path, name: str) -> None:
    """Gate first, then one expert: what all experts and all steps would have given. Masks and draws are inputs."""
    session, description, found = exported(name)
    goals = STUDENTS[name].get("goals", 0)
    assert description["input"] == {"name": "observations", "shape": ["batch", "length", 4], "dtype": "float32"}
    assert description["further_inputs"] == [
        {"name": "draw", "shape": ["batch"], "dtype": "float32"},
        {"name": "allowed", "shape": ["batch", EXPERTS], "dtype": "bool"},
    ]
    assert [(output["name"], output["shape"]) for output in description["outputs"]] == [
        ("action", ["batch", 2]),
        ("expert", ["batch"]),
        ("probability", ["batch", EXPERTS]),
    ]
    chosen = set()
    for steps in range(1, WINDOW + 1):
        fed = asked(goals + steps, seed=steps)
        actions, experts, probabilities = slowly(found, fed)
        ours = session.run(None, fed)
        np.testing.assert_allclose(ours[0], actions, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(ours[1], experts)
        np.testing.assert_allclose(ours[2], probabilities, rtol=1e-4, atol=1e-6)
        assert (ours[2][~fed["allowed"]] == 0).all()
        assert fed["allowed"][np.arange(len(experts)), experts].all()
        low, high = (np.array(SCALING["action"][bound]) for bound in ("low", "high"))
        assert ((actions > low + 1e-6) & (actions < high - 1e-6)).mean() > 0.5
        chosen |= set(experts.tolist())
    assert chosen == set(range(EXPERTS))


@every_backbone
def test_an_answer_is_the_same_in_any_batch(project: Path, backbone: str) -> None:
    session, _, _ = exported({"mlp": "flat", "transformer": "tokens"}[backbone])
    fed = asked(WINDOW, count=9)
    together = session.run(None, fed)
    for row in range(9):
        one = session.run(None, {name: array[row : row + 1] for name, array in fed.items()})
        np.testing.assert_array_equal(one[1], together[1][row : row + 1])
        np.testing.assert_allclose(one[0], together[0][row : row + 1], rtol=1e-5, atol=1e-7)


def test_the_largest_draw_takes_the_last_expert_that_is_allowed(project: Path) -> None:
    session, _, _ = exported("flat")
    fed = asked(WINDOW)
    fed["draw"][:] = np.nextafter(np.float32(1), np.float32(0))
    _, experts, _ = session.run(None, fed)
    np.testing.assert_array_equal(experts, EXPERTS - 1 - fed["allowed"][:, ::-1].argmax(1))
    fed["draw"][:] = 0
    _, experts, _ = session.run(None, fed)
    np.testing.assert_array_equal(experts, fed["allowed"].argmax(1))


def test_parity_is_measured_on_every_validation_window(project: Path) -> None:
    _, description, found = exported("tokens")
    parity = description["parity"]
    assert parity["samples"] == WINDOWS
    assert set(parity["largest_difference"]) == {"action", "expert", "probability"}
    assert parity["largest_difference"]["expert"] == 0
    assert max(parity["largest_difference"].values()) < 1e-4
    # The metric by hand: how far off the demonstrated actions, in standard deviations of these.
    fed, target = export.inputs(paths.prepared(TASK, "toy"), description_of("tokens"))
    actions, _, _ = slowly(found, fed)
    wanted = np.sqrt(np.mean(((actions - target) / target.std(0)) ** 2))
    assert parity["metric"]["onnx"] == pytest.approx(wanted, rel=1e-4)
    assert parity["metric"]["pytorch"] == pytest.approx(wanted, rel=1e-4)


def description_of(name: str) -> Any:
    return load_model(paths.trained(TASK, name))[1]


@pytest.mark.parametrize("goals", [0, 2])
def test_what_goes_in_are_the_windows_of_validation_behind_what_is_wanted(project: Path, goals: int) -> None:
    prepared = paths.prepared(TASK, "toy")
    fed, target = export.inputs(prepared, describe("mixture", environment=None, goals=goals))
    episodes = data.load(prepared, "validation")
    rows = []
    for start, length in zip(episodes.starts.tolist(), episodes.lengths.tolist(), strict=True):
        own = episodes.observations[start : start + length].numpy()
        done = episodes.actions[start : start + length].numpy()
        for first in range(length - WINDOW + 1):
            last = first + WINDOW
            rows.append((np.concatenate([own[length - goals :], own[first:last]]), done[last - 1]))
    np.testing.assert_array_equal(fed["observations"], np.stack([row for row, _ in rows]))
    np.testing.assert_array_equal(target, np.stack([action for _, action in rows]))
    assert fed["allowed"].any(1).all()
    assert fed["allowed"].all(1).any()
    assert (fed["allowed"].sum(1) == 1).any()
    assert (fed["draw"] < 0).any()
    assert ((fed["draw"] >= 0) & (fed["draw"] < 1)).any()


def test_the_same_bytes_and_no_path_in_them(project: Path) -> None:
    command.main("tokens")
    folder = paths.exported(TASK, "tokens")
    first = {path.name: sha256(path) for path in folder.iterdir()}
    written = (folder / "model.onnx").read_bytes()
    assert str(project).encode() not in written
    assert b"site-packages" not in written
    command.main("tokens")
    assert {path.name: sha256(path) for path in folder.iterdir()} == first


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flat", {"observations": np.zeros((2, WINDOW, 5), np.float32)}),
        ("flat", {"observations": np.zeros((2, 4), np.float32)}),
        ("flat", {"draw": np.zeros((2, 1), np.float32)}),
        ("flat", {"allowed": np.ones((2, EXPERTS + 1), bool)}),
        ("tokens", {"observations": np.zeros((2, WINDOW + 1, 4), np.float32)}),
        ("flat", {"allowed": np.ones((2, EXPERTS), np.float32)}),
    ],
    ids=["wide", "no history", "draws", "experts", "long", "no mask"],
)
def test_other_inputs_are_refused_by_the_graph(project: Path, name: str, changes: dict[str, np.ndarray]) -> None:
    session, _, _ = exported(name)
    with pytest.raises(Exception, match=r"observations|draw|allowed|[Dd]imension|shape|broadcast|data type"):
        session.run(None, {**asked(WINDOW, 2), **changes})


# What counts as a difference


def outputs(probability: list[float], expert: int, action: float = 0.0) -> list[np.ndarray]:
    return [np.full((1, 2), action), np.array([expert]), np.array([probability])]


@pytest.mark.parametrize(
    ("draw", "probability", "ours", "theirs", "wrong"),
    [
        (0.2, [0.5, 0.3, 0.2], 0, 0, 0),
        (0.2, [0.5, 0.3, 0.2], 1, 0, 1),
        (0.5, [0.5, 0.3, 0.2], 0, 1, 0),  # between the two
        (0.5, [0.5, 0.3, 0.2], 2, 1, 1),
        (0.49, [0.5, 0.3, 0.2], 1, 0, 1),
        (0.8, [0.5, 0.3, 0.2], 1, 2, 0),
        (-1, [0.4, 0.4, 0.2], 1, 0, 0),  # two are the likeliest
        (-1, [0.41, 0.39, 0.2], 1, 0, 1),
        (0.999999, [0.5, 0.5, 0.0], 2, 1, 1),  # it is not allowed
        (0.0, [0.0, 0.5, 0.5], 0, 1, 1),
    ],
)
def test_another_expert_is_an_error_unless_either_may_be_taken(
    draw: float, probability: list[float], ours: int, theirs: int, wrong: int
) -> None:
    fed = {"draw": np.array([draw]), "allowed": np.array([probability]) > 0}
    found = export.differences(fed, outputs(probability, ours, 7.0), outputs(probability, theirs))
    assert found == [7.0 if ours == theirs else 0.0, wrong, 0.0]


def test_differences_of_actions_and_probabilities_are_seen() -> None:
    fed = {"draw": np.array([0.1]), "allowed": np.ones((1, 3), bool)}
    found = export.differences(fed, outputs([0.5, 0.3, 0.2], 0, 1.5), outputs([0.4, 0.4, 0.2], 0, 1.0))
    assert found == [0.5, 0, pytest.approx(0.1)]


@pytest.mark.parametrize("what", ["action", "expert", "probability"])
def test_a_graph_that_answers_otherwise_is_not_written(
    project: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written differs from what PyTorch says afterwards."""

    def step(self: Mixture, *given: Any) -> Decision:
        found = Mixture_step(self, *given)
        if not torch.jit.is_tracing():  # type: ignore[attr-defined]
            return found
        changed = {
            "action": found.action + 1e-3,
            "expert": (found.expert + 1) % EXPERTS,
            "probability": found.probability.roll(1, 1),
        }
        return found._replace(**{what: changed[what]})

    Mixture_step = Mixture.step
    monkeypatch.setattr(Mixture, "step", step)
    with pytest.raises(UserError, match=r"differs from PyTorch .* exports.flat.tolerance = 0.0001"):
        command.main("flat")
    assert not paths.exported(TASK, "flat").exists()


# Teachers


@every_backbone
@pytest.mark.parametrize("name", ["ddpm", "beso"])
def test_all_of_a_teachers_sampling_is_in_its_graph(name: str, backbone: str, tmp_path: Path) -> None:
    """Of any number of rows; for `latency`, which measures an action beside a student's."""
    described = describe(name, backbone)
    found = calm(network(described))
    write_prepared(tmp_path, None)
    fed, _ = export.inputs(tmp_path, described)
    assert fed["noise"].shape == (WINDOWS, described.network["steps"], WINDOW, 2)
    graph = importlib.import_module("stages.export.onnx_graph")
    two = {name: array[:2] for name, array in fed.items()}
    graph.write_onnx(export.Graph(found), two, export.OUTPUTS, export.AXES, tmp_path / "teacher.onnx")
    action, expert, probability = graph.session(tmp_path / "teacher.onnx", 1).run(None, fed)
    calls = torch.from_numpy(fed["noise"]).transpose(0, 1)
    with torch.inference_mode():
        wanted = found.decide(torch.from_numpy(fed["observations"]), calls).numpy()
    np.testing.assert_allclose(action, wanted, rtol=1e-4, atol=1e-6)
    assert np.ptp(action, axis=0).min() > 1e-3
    assert (expert == 0).all()
    assert (probability == 1).all()


def test_latency_is_of_students_and_teachers_at_a_full_window(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    monkeypatch.setattr(latency, "LEAST", 2)
    for name in ("ddpm", "beso"):
        save(name, name)
    for name in STUDENTS:
        command.main(name)
    shapes = set()
    times = latency._times
    monkeypatch.setattr(
        latency,
        "_times",
        lambda run, *rest: (shapes.add(tuple(array.shape for array in run.args[1].values())), times(run, *rest))[1],
    )
    latency.main(TASK)
    measured = json.loads(paths.latency(TASK).read_text())
    assert set(measured["models"]) == {"ddpm", "beso", *STUDENTS}
    assert shapes == {
        (given, *further(rows))
        for rows in (1, 32)
        for given, further in (
            ((rows, WINDOW, 4), lambda rows: [(rows,), (rows, EXPERTS)]),
            ((rows, 1 + WINDOW, 4), lambda rows: [(rows,), (rows, EXPERTS)]),
            ((rows, WINDOW, 4), lambda rows: [(rows, 3, WINDOW, 2)]),
        )
    }
    assert "full length" in measured["inputs"]
