"""Models as files: the same outputs after loading, the same bytes twice, and nothing that can run code."""

import dataclasses
import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from data.errors import UserError
from data.files import sha256
from models.artifacts import (
    DESCRIPTION,
    WEIGHTS,
    Description,
    load_model,
    read_description,
    read_outside_state,
    save_model,
)
from models.recognition import build

NETWORK = {"name": "resnet", "widths": [3, 5], "blocks": 2, "embedding": 4}
INTERFACE = {
    "classes": ["cat", "dog", "größer"],
    "channels": 3,
    "resolution": 8,
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "resize": "none",
}
FRESH = Description(
    name="toy",
    task="recognition",
    kind="student",
    network=NETWORK,
    interface=INTERFACE,
    recipe={"method": "alone", "training": {"epochs": 3}},
    dataset={"name": "toy", "digest": "1" * 64},
    teacher=None,
    start=None,
    sources=[{"name": "toy", "licence": "none", "credit": "nobody", "redistributable": True}],
)


def network(seed: int = 0) -> nn.Module:
    """As if it had been trained: all weights and statistics away from their fresh values."""
    torch.manual_seed(seed)
    built = build({"network": NETWORK, "interface": INTERFACE})
    for _ in range(3):
        built(torch.rand(8, 3, 8, 8))
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.5)
    return built.eval()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    folder = tmp_path / "a model"
    folder.mkdir()
    trained = network()
    save_model(folder, trained, FRESH)
    return folder, trained


def test_a_loaded_model_computes_the_same_bits(saved: tuple[Path, nn.Module]) -> None:
    folder, trained = saved
    torch.manual_seed(99)
    loaded, _ = load_model(folder)
    assert not any(module.training for module in loaded.modules())
    x = torch.rand(5, 3, 8, 8)
    for found, wanted in zip(loaded(x), trained(x), strict=True):
        assert torch.equal(found, wanted)
    state = loaded.state_dict()
    assert list(state) == list(trained.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype for name, tensor in trained.state_dict().items()
    }


def test_saving_twice_gives_the_same_bytes_whatever_the_memory_looks_like(saved: tuple[Path, nn.Module]) -> None:
    folder, trained = saved
    for name, other in (
        ("again", trained),
        ("channels_last", network().to(memory_format=torch.channels_last)),  # type: ignore[call-overload]
        ("training", network().train()),
    ):
        (folder.parent / name).mkdir()
        save_model(folder.parent / name, other, FRESH)
        for file in (WEIGHTS, DESCRIPTION):
            assert (folder.parent / name / file).read_bytes() == (folder / file).read_bytes(), (name, file)
    (folder.parent / "other").mkdir()
    save_model(folder.parent / "other", network(1), FRESH)
    assert sha256(folder.parent / "other" / WEIGHTS) != sha256(folder / WEIGHTS)


def test_a_folder_holds_weights_and_description_and_the_weights_nothing_else(saved: tuple[Path, nn.Module]) -> None:
    folder, trained = saved
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, DESCRIPTION])
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(trained.state_dict())
        assert file.metadata() is None


def test_the_description_is_true(saved: tuple[Path, nn.Module]) -> None:
    folder, trained = saved
    returned = save_model(folder, trained, FRESH)
    count = sum(tensor.numel() for tensor in trained.parameters())
    expected = dataclasses.replace(FRESH, parameters=count, weights_sha256=sha256(folder / WEIGHTS))
    assert returned == read_description(folder) == load_model(folder)[1] == expected
    assert count > 500
    assert json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")) == dataclasses.asdict(expected)
    assert FRESH.weights_sha256 == ""


def test_weights_that_were_changed_are_refused_with_both_digests(saved: tuple[Path, nn.Module]) -> None:
    folder, _ = saved
    wanted = sha256(folder / WEIGHTS)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    for damaged in (bytes(content), bytes(content[:-4]), b""):
        (folder / WEIGHTS).write_bytes(damaged)
        found = sha256(folder / WEIGHTS)
        with pytest.raises(UserError, match=f"wanted sha256 {wanted}, got {found}") as caught:
            load_model(folder)
        assert str(folder / WEIGHTS) in str(caught.value)
        assert "dvc" in str(caught.value)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"wanted sha256 {wanted}, got nothing"):
        load_model(folder)


@pytest.mark.parametrize("read", [load_model, read_description])
def test_a_missing_model_is_named(tmp_path: Path, read: Any) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=rf"there is no model in {re.escape(str(folder))} · run `dvc repro`"):
            read(folder)


# Weights from elsewhere

STATE = OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.tensor([True]))


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        path.write_bytes(save(content))
    else:
        torch.save(content, path)
    return path


def check(found: dict[str, Tensor]) -> None:
    assert list(found) == ["a", "b"]
    for name, tensor in STATE.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


PREFIXED = {f"module.{name}": tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.safetensors", dict(STATE)),
        ("m.safetensors", PREFIXED),
        ("m.pt", STATE),
        ("m.pth", dict(STATE)),
        ("m.bin", PREFIXED),
        ("m.ckpt", {"state_dict": STATE, "epoch": 3, "optimizer": {"lr": 0.1}}),
        ("m.tar", {"model": STATE}),
        ("m.tar", {"epoch": 1, "state_dict": PREFIXED}),
        ("m.tar", {"state_dict": {"model": STATE}}),
    ],
)
def test_the_usual_files_are_read(tmp_path: Path, name: str, content: Any) -> None:
    file = write(tmp_path / name, content)
    check(read_outside_state(file, sha256(file)))


def test_the_file_format_of_old_torch_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "m.pt")
    check(read_outside_state(tmp_path / "m.pt", sha256(tmp_path / "m.pt")))


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_another_file_than_the_pinned_one_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no weights at all")
    found = sha256(tmp_path / name)
    with pytest.raises(UserError, match=f"not what is pinned: wanted sha256 {'0' * 64}, got {found}"):
        read_outside_state(tmp_path / name, "0" * 64)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UserError, match=re.escape(f"the model file {path} does not exist")):
            read_outside_state(path, "0" * 64)


class Touch:
    """What a malicious file holds: unpickling it calls Path.touch."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def raw_pickle(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)


def as_zip(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_old_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("pack", [raw_pickle, as_zip, as_old_file])
@pytest.mark.parametrize("place", ["alone", "beside weights", "in a wrapper"])
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_code_in_a_file_does_not_run(tmp_path: Path, pack: Any, place: str, name: str) -> None:
    marker = tmp_path / "it ran"
    evil = Touch(marker)
    value = {"alone": evil, "beside weights": {**STATE, "c": evil}, "in a wrapper": {"state_dict": STATE, "x": evil}}
    file = tmp_path / name
    file.write_bytes(pack(value[place]))
    with pytest.raises(UserError, match=re.escape(str(file))) as caught:
        read_outside_state(file, sha256(file))
    assert not marker.exists()
    # torch's own text advises to switch the protection off.
    assert re.search(r"weights.only", str(caught.value), re.IGNORECASE) is None
    assert ("holds more than weights" in str(caught.value)) == (name == "m.pt")
    if pack is raw_pickle:
        with file.open("rb") as opened:
            pickle.load(opened)  # noqa: S301 - the trap works: it would have caught a careless reader
        assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [torch.ones(3), [torch.ones(3)], {"a": 1}, {"a": torch.ones(1), "b": [1]}, {0: torch.ones(1)}, "text", None,
     {"state_dict": [torch.ones(1)]}, {"model": {"a": 1}}],
)  # fmt: skip
def test_what_is_no_mapping_of_names_to_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    file = write(tmp_path / "m.pt", content)
    with pytest.raises(UserError, match=re.escape(f"{file} is no state_dict")):
        read_outside_state(file, sha256(file))


@pytest.mark.parametrize(
    ("error", "said"), [(RuntimeError("one\ntwo"), "(one)"), (EOFError(), "(EOFError())"), (KeyError("x"), "('x')")]
)
def test_whatever_reading_raises_is_told_in_one_line(
    tmp_path: Path, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    file = write(tmp_path / "m.pt", STATE)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError) as caught:
        read_outside_state(file, sha256(file))
    assert str(caught.value) == f"{file} cannot be read as weights {said}"


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content = write(tmp_path / name, dict(STATE)).read_bytes()
    damaged = [content[:end] for end in range(0, len(content), max(1, len(content) // 60))]
    for index, start in enumerate(range(0, len(content) - 4, max(1, len(content) // 60))):
        damaged.append(content[:start] + bytes([index % 251] * 4) + content[start + 4 :])
    reasons = []
    for each in [b"a text", b"PK\3\4", b"\x80\2.", *damaged]:
        (tmp_path / name).write_bytes(each)
        try:
            read_outside_state(tmp_path / name, sha256(tmp_path / name))
        except UserError as error:
            reasons.append(str(error))
    assert len(reasons) >= 63, "a file that ends early was read"
    assert all(str(tmp_path / name) in reason and "\n" not in reason for reason in reasons)
