"""Small data sets of the task segmentation, as files of exactly the formats that are read."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.segmentation import prepare
from stages.parameters.segmentation import Dataset

PROVENANCE = {"name": "toy", "licence": "none", "credit": "random numbers", "redistributable": True}
CLASSES = ["road", "sky", "tree"]
PALETTE = np.random.default_rng(0).integers(0, 256, 768).tolist()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def targets(height: int, width: int, values: list[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), (height, width))


def save(path: Path, pixels: np.ndarray, palette: bool = False, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(PALETTE)
    image.save(path, **options)
    return path


def dataset(form: str, **changes: Any) -> Dataset:
    entry: dict[str, Any] = {
        "task": "segmentation",
        "source": "toy",
        "encoder": "none",
        "format": form,
        "image_size": [16, 20],
    }
    return Dataset.model_validate(
        {**entry, **({"validation": 0.3} if form in ("cityscapes", "voc") else {}), **changes}
    )


def folders(**changes: Any) -> Dataset:
    return dataset("folders", **{"classes": CLASSES, "ignore": 11, **changes})


def prepared(raw: Path, entry: Dataset, output: Path) -> Path:
    output.mkdir()
    prepare(raw, entry, output, PROVENANCE)
    return output


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_folders(folder: Path) -> None:
    """Three splits; 11 marks pixels without a label."""
    for number, (name, count) in enumerate({"train": 4, "val": 2, "test": 3}.items()):
        for index in range(count):
            seed = 10 * number + index
            save(folder / name / "images" / f"frame {index}.png", picture(16, 20, seed))
            save(folder / name / "labels" / f"frame {index}.png", targets(16, 20, [0, 1, 2, 11], seed))
    (folder / "README.md").write_text("about")
