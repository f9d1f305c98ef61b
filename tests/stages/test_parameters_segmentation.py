"""Mistakes in entries of the task segmentation."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import UserError
from stages.parameters import load
from stages.parameters.segmentation import CWD

ROOT = Path(__file__).resolve().parents[2]
SHA256 = "0" * 64


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The shipped entries with one changed value."""
    raw: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    place = raw
    *way, last = path.split(".")
    for step in way:
        place = place.setdefault(step, {})
    place[last] = value
    return raw


CROP = "must fit into the images, datasets.scenes.image_size = [64, 64], got [64, 65]"
MISTAKES = [
    ("datasets.scenes.image_size", [64], "list should have at least 2 items"),
    ("datasets.scenes.fit", "pad", "format 'scenes' takes no 'fit'"),
    ("datasets.scenes.split_seed", 1, "format 'scenes' takes no 'split_seed'"),
    ("datasets.scenes.ignore", 3, "format 'scenes' takes no 'ignore'"),
    ("datasets.scenes.validation", 0.1, "format 'scenes' takes no 'validation'"),
    ("datasets.scenes.backgrounds", None, "format 'scenes' needs 'backgrounds'"),
    ("datasets.scenes.scenes.height", [32, 24], "height must be [lowest, highest], got [32, 24]"),
    ("tasks.segmentation.noise", [0.1], "list should have at least 3 items"),
    ("tasks.segmentation.blur", [1, 2, 3, 4], "list should have at most 3 items"),
    ("tasks.segmentation.darkness", [0.5, 0.4, 1], "must be < 1, got 1"),
    ("teachers.segmentation-pspnet.training.augment.crop", [64, 65], CROP),
    ("students.segmentation-gdd.training.augment.crop", [64, 65], CROP),
    ("students.segmentation-gdd.training.augment.scale", [2.0, 1.0], "scale must be [smallest, largest]"),
    ("students.segmentation-gdd.training.floor", 1.0, "'floor' (1) must not exceed 'learning_rate' (0.1)"),
    ("students.segmentation-gdd.temperature", 0, "must be > 0, got 0"),
    ("students.segmentation-gdd.noise", {"std": -0.5}, "std: must be >= 0, got -0.5"),
    ("students.segmentation-gdd.places", [], "list should have at least 1 item"),
    ("students.segmentation-gdd.places", [{"student": "first"}], "string should match pattern"),
    ("students.segmentation-gdd.network.encoder.weights", "a.pth", "'weights' and 'sha256' go together"),
    ("students.segmentation-gdd.network.encoder.widths", [8, 16, 16], "list should have at least 4 items"),
    ("gates.segmentation.metric", "top_1", "input should be 'miou' or 'pixel_accuracy', got 'top_1'"),
]


@pytest.mark.parametrize(("path", "value", "message"), MISTAKES)
def test_a_mistake_is_named_by_its_path(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(with_value(path, value)))
    with pytest.raises(UserError) as caught:
        load(file)
    (line,) = str(caught.value).splitlines()[1:]
    assert message in line
    assert line.strip().startswith(".".join(path.split(".")[:2])), line


def test_weights_of_torchvision_need_its_stem(tmp_path: Path) -> None:
    raw = with_value("students.segmentation-gdd.network.encoder.weights", "a.pth")
    encoder = raw["students"]["segmentation-gdd"]["network"]["encoder"]
    encoder["sha256"] = SHA256
    file = tmp_path / "params.yaml"
    for stem in ("wide", "deep", "light"):
        encoder["stem"] = stem
        file.write_text(yaml.safe_dump(raw))
        if stem == "wide":
            assert load(file).students["segmentation-gdd"]
        else:
            with pytest.raises(UserError, match="whose stem is 'wide'"):
                load(file)


def test_places_belong_to_features() -> None:
    entry = {"task": "segmentation", "dataset": "x", "method": "cwd", "teacher": "t", "places": [{}]}
    network = {"name": "pspnet", "encoder": {"name": "resnet", "widths": [4, 4, 4, 4]}}
    assert CWD.model_validate({**entry, "network": network, "compare": "features"})
    with pytest.raises(ValueError, match="'places' are those of features"):
        CWD.model_validate({**entry, "network": network})


def test_words_stay_words(tmp_path: Path) -> None:
    """YAML 1.1 takes on, off, yes and no for truth values; DVC does not."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    file = tmp_path / "params.yaml"
    file.write_text(
        text.replace('classes: ["0", "1", "2"', 'classes: [no, on, "2"').replace(
            "redistributable: true", "redistributable: True"
        )
    )
    assert load(file).datasets["mnist"].classes[:2] == ["no", "on"]  # type: ignore[attr-defined]
    assert load(file).sources["mnist"].redistributable is True
