"""The training loop: what it resumes, what it refuses, and what it leaves alone."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.errors import UserError
from stages.training import Context, Run, Stopped, Stream, derive_seed, train
from stages.training.fit import exclusive

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("toys.py")

sys.path.insert(0, str(SCRIPT.parent))
import toys  # noqa: E402


def command(name: str, folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), name, str(folder), *options]


def environment(checkpoint_seconds: float = 0) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "DISTILLERY_CHECKPOINT_SECONDS": str(checkpoint_seconds)}


def finished(name: str, folder: Path, *options: str) -> str:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        command(name, folder, *options), env=environment(), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    """Wait until the process has saved a checkpoint after at least `steps` steps."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        assert process.poll() is None, "the toy ended before it could be killed"
        for path in folder.glob(".checkpoints/*/*/*/checkpoint.pt"):
            if torch.load(path, weights_only=True)["step"] >= steps:
                return
        time.sleep(0.01)
    raise AssertionError("no checkpoint within a minute")


@pytest.fixture
def run() -> Run:
    return Run(toys.settings())


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(name: str, run: Run, *, steps: int = toys.STEPS, **options: object) -> toys.Toy:
    toy = toys.TOYS[name](run, 16)
    train(toy, run, stage="toy", key=name, steps=steps, seed=7, identity={"toy": name}, **options)
    return toy


@pytest.mark.parametrize("name", toys.TOYS)
def test_killed_and_started_again_gives_the_same_bits(name: str, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    process = subprocess.Popen(
        command(name, folder, "--pause", "0.02"), env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for_steps(process, folder, 23)  # behind two recorded steps, before the end
    finally:
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not output
    resumed = finished(name, folder)
    uninterrupted = toys.fingerprint(trained(name, run))
    assert resumed == uninterrupted
    records = [path.read_text() for path in tmp_path.rglob("record.jsonl")]
    lines = [text.splitlines()[1:] for text in records]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert len({json.loads(line)["step"] for line in lines[0]}) == toys.STEPS // 10


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The global batch is the same, so in float64 only the order of additions differs."""
    options = ("--devices", "2", "--batch", "8", "--precision", "64-true", "--plain")
    finished("all", tmp_path / "two", *options, "--weights", str(tmp_path / "two.pt"))
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    monkeypatch.setattr(toys.Toy, "norm", False)
    run = Run(toys.settings(precision="64-true"))
    for name in toys.TOYS:
        one = trained(name, run)
        parts = {part: module.state_dict() for part, module in one.modules.items()} | {"state": one.state()}
        for part, state in parts.items():
            for key, value in state.items():
                found, expected = torch.as_tensor(two[name][part][key]), torch.as_tensor(value)
                message = f"{name}: {part}.{key}"
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=message)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(run: Run) -> None:
    prints = []
    for seed in (7, 7, 8):
        toy = toys.Feature(run, 16)
        train(toy, run, stage="toy", key="seeds", steps=10, seed=seed, identity={"nothing": len(prints)})
        prints.append(toys.fingerprint(toy))
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


def test_evaluation_and_foreign_random_numbers_do_not_disturb_training(run: Run) -> None:
    def noisy() -> dict[str, float]:
        torch.manual_seed(int(time.time()))
        torch.rand(17)
        return {"nothing": 0.0}

    quiet = toys.fingerprint(trained("average", run))
    shutil.rmtree(".checkpoints")
    assert toys.fingerprint(trained("average", run, monitor=noisy, monitor_every=3)) == quiet


def test_a_changed_identity_starts_anew(run: Run) -> None:
    for rate in ("slow", "fast"):
        toy = toys.Feature(run, 16)
        train(toy, run, stage="toy", key="x", steps=5, seed=7, identity={"rate": rate}, checkpoint_seconds=0)
    checkpoints = list(Path(".checkpoints/toy/x").glob("*/checkpoint.pt"))
    assert len(checkpoints) == 2
    assert all(torch.load(checkpoint, weights_only=True)["step"] == 4 for checkpoint in checkpoints)


def test_two_processes_never_train_the_same_model() -> None:
    script = (
        "from stages.training.fit import exclusive\n"
        "with exclusive('distill', 'x'): print('mine', flush=True); input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "mine\n"
    with exclusive("distill", "y"):
        pass
    with pytest.raises(UserError, match="distill x is being trained by another process"), exclusive("distill", "x"):
        raise AssertionError("both hold it")
    other.kill()
    other.communicate()
    with exclusive("distill", "x"):
        pass


@pytest.mark.parametrize("damage", [b"", b"half of a checkpoint"])
def test_a_damaged_checkpoint_is_not_used(damage: bytes, run: Run) -> None:
    whole = toys.fingerprint(trained("feature", run, checkpoint_seconds=0))
    (checkpoint,) = Path(".checkpoints/toy/feature").glob("*/checkpoint.pt")
    checkpoint.write_bytes(damage)
    assert toys.fingerprint(trained("feature", run)) == whole


def test_the_time_between_checkpoints_must_be_a_number(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_CHECKPOINT_SECONDS", "often")
    with pytest.raises(UserError, match="DISTILLERY_CHECKPOINT_SECONDS must be a number of seconds, got 'often'"):
        trained("feature", run)


def test_a_checkpoint_without_its_record_is_not_used(run: Run) -> None:
    whole = toys.fingerprint(trained("feature", run, checkpoint_seconds=0))
    (record,) = Path(".checkpoints/toy/feature").glob("*/record.jsonl")
    lines = record.read_text()
    record.unlink()
    assert toys.fingerprint(trained("feature", run)) == whole
    assert record.read_text() == lines


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_code(
    number: signal.Signals, code: int, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stopped"
    folder.mkdir()
    process = subprocess.Popen(
        command("feature", folder, "--pause", "0.05"), env=environment(0), stdout=subprocess.PIPE, text=True
    )
    wait_for_steps(process, folder, 3)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    (checkpoint,) = folder.glob(".checkpoints/*/*/*/checkpoint.pt")
    assert 3 <= torch.load(checkpoint, weights_only=True)["step"] < toys.STEPS
    assert finished("feature", folder) == toys.fingerprint(trained("feature", run))


def test_stopping_saves_the_very_step(run: Run) -> None:
    toy = toys.Feature(run, 16)
    step = toy.step

    def stop_at_five(context: Context) -> object:
        if context.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(context)

    toy.step = stop_at_five  # type: ignore[method-assign, assignment]
    with pytest.raises(Stopped) as stopped:
        train(toy, run, stage="toy", key="s", steps=20, seed=7, identity={})
    assert stopped.value.code == 143
    (checkpoint,) = Path(".checkpoints/toy/s").glob("*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["step"] == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stops_with_step_and_term(value: float, run: Run) -> None:
    toy = toys.Feature(run, 16)
    step = toy.step

    def poisoned(context: Context) -> object:
        terms = dict(step(context))
        if context.step == 12:
            terms["feature"] = torch.tensor(value)
        return terms

    toy.step = poisoned  # type: ignore[method-assign, assignment]
    with pytest.raises(UserError, match=rf"feature became {value} at step 12 of 20;"):
        train(toy, run, stage="toy", key="x", steps=20, seed=7, identity={}, checkpoint_seconds=0)
    (checkpoint,) = Path(".checkpoints/toy/x").glob("*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["step"] == 12
    (record,) = Path(".checkpoints/toy/x").glob("*/record.jsonl")
    assert max(json.loads(line)["step"] for line in record.read_text().splitlines()[1:]) < 12


def test_a_failing_write_leaves_the_old_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch hides the full disk in the context of its own error; the user hears of the disk."""
    save = torch.save
    calls = []

    def failing(state: dict[str, object], file: object) -> None:
        calls.append(state["step"])
        if len(calls) == 4:
            try:
                file.write(b"half of it")  # type: ignore[attr-defined]
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError:
                raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0")  # noqa: B904
        save(state, file)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(UserError, match="disk is full"):
        trained("feature", run, checkpoint_seconds=0)
    (folder,) = (path for path in Path(".checkpoints/toy/feature").iterdir() if path.is_dir())
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "record.jsonl"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == calls[-2]
    monkeypatch.setattr(torch, "save", save)
    resumed = toys.fingerprint(trained("feature", run))
    shutil.rmtree(".checkpoints")
    assert resumed == toys.fingerprint(trained("feature", run))


def test_frozen_modules_stay_as_they_are(run: Run) -> None:
    toy = toys.Feature(run, 16)
    before = {name: tensor.clone() for name, tensor in toy.modules["teacher"].state_dict().items()}
    train(toy, run, stage="toy", key="x", steps=5, seed=7, identity={})
    after = toy.modules["teacher"].state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not toy.modules["teacher"].training
    assert toy.modules["student"].training
    assert all(parameter.grad is None for module in toy.modules.values() for parameter in module.parameters())


def test_the_objects_of_the_student_are_never_replaced(run: Run) -> None:
    for name, kind in toys.TOYS.items():
        toy = kind(run, 16)
        before = [id(parameter) for parameter in toy.student.parameters()]
        train(toy, run, stage="toy", key=name, steps=3, seed=7, identity={})
        assert [id(parameter) for parameter in toy.student.parameters()] == before


def test_update_steps_only_what_it_names(run: Run) -> None:
    toy = toys.Adversarial(run, 16)
    context = Context(toy, run, 0)
    context.begin(0)
    before = {name: [p.clone() for p in module.parameters()] for name, module in toy.modules.items()}
    x, y = toy.data(context)
    context.update("student", {"task": torch.nn.functional.cross_entropy(toy.modules["student"](x), y)})
    for name, module in toy.modules.items():
        same = all(torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
        assert same == (name != "student")
    assert context.counts == {"generator": 0, "critic": 0, "student": 1, "confidence": 0}


def test_update_equals_plain_torch(run: Run) -> None:
    """Sum of terms, weight decay, clipping and rate against torch's own backward and step."""
    toy, plain = toys.Feature(run, 16), toys.Feature(run, 16)
    toy.clip = {"student": 0.1}
    toy.schedules = {"student": lambda count: 0.3 / (count + 1)}
    optimizer = plain.optimizers["student"]
    context, twin = Context(toy, run, 3), Context(plain, run, 3)
    for step in range(4):
        context.begin(step)
        toy.step(context)
        twin.begin(step)
        twin.update = lambda names, outputs: None  # type: ignore[method-assign]
        terms = plain.step(twin)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.1)
        for group in optimizer.param_groups:
            group["lr"] = 0.3 / (step + 1)
        optimizer.step()
    for ours, theirs in zip(toy.student.parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_bfloat16_resumes_exactly(run: Run) -> None:
    mixed = Run(toys.settings(precision="bf16-mixed"))
    whole = toys.fingerprint(trained("feature", mixed))
    shutil.rmtree(".checkpoints")
    toy = toys.Feature(mixed, 16)
    step = toy.step
    toy.step = lambda context: (os.kill(os.getpid(), signal.SIGTERM), step(context))[1]  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        train(toy, mixed, stage="toy", key="feature", steps=toys.STEPS, seed=7, identity={"toy": "feature"})
    assert toys.fingerprint(trained("feature", mixed)) == whole


def test_nothing_uses_fabric_but_its_launch() -> None:
    """Wrappers, its own checkpoints and seeds break functional calls, gradients given by hand and old checkpoints."""
    forbidden = (".setup(", ".setup_module", ".setup_optim", ".setup_dataloaders", ".backward(", "fabric.save")
    forbidden += ("fabric.load", "seed_everything", "ddp_fork", "ddp_spawn")
    for path in (ROOT / "stages").rglob("*.py"):
        text = path.read_text()
        assert not [word for word in forbidden if word in text], path
        assert "fabric" not in text.lower() or path.name in ("run.py", "shared.py", "__init__.py"), path


def test_a_stream_sees_every_sample_once_per_epoch() -> None:
    stream = Stream([torch.arange(23)], 4)
    epochs = [[int(i) for _ in range(5) for i in stream.draw(1, 0, 1)[0]] for _ in range(3)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1]
    stream.position = 5
    assert [int(i) for _ in range(5) for i in stream.draw(1, 0, 1)[0]] == epochs[1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_global_batch(world: int) -> None:
    whole = Stream([torch.arange(60)], 6)
    parts = [Stream([torch.arange(60)], 6 // world) for _ in range(world)]
    for _ in range(25):
        expected = whole.draw(5, 0, 1)[0]
        assert torch.equal(torch.cat([part.draw(5, rank, world)[0] for rank, part in enumerate(parts)]), expected)


def test_a_stream_says_what_is_too_small() -> None:
    with pytest.raises(ValueError, match="3 samples do not fill a batch of 4"):
        Stream([torch.arange(3)], 4).draw(0, 0, 1)
    with pytest.raises(ValueError, match=r"same length, got \[3, 4\]"):
        Stream([torch.arange(3), torch.arange(4)], 2)


def test_seeds_depend_on_every_part() -> None:
    seeds = {derive_seed(*parts) for parts in (("a", 1), ("a", 2), ("b", 1), ("a", 1, 0), ("a1",))}
    assert len(seeds) == 5
