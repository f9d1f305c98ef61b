"""A prepared data set of zero-shot recognition in miniature, and networks that answer from a table."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from data.files import write_json
from models.artifacts import Description
from models.zero_shot import Output

# By number; no order is that of the roles.
ROLES = ["unseen", "seen", "validation", "seen", "unseen", "seen", "validation", "seen", "unseen"]
CLASSES = [f"class <{label}>" for label in range(len(ROLES))]
SEEN = [label for label, role in enumerate(ROLES) if role == "seen"]
FEATURES, ATTRIBUTES = 6, 4
IMAGES = {"channels": 1, "size": 4, "mean": [0.5], "std": [0.25]}


class Lookup(nn.Module):
    """Answers from a table: the first feature, or the first two pixels, are the row. Notes how much it is shown."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("logits", torch.from_numpy(logits))
        self.shown: list[tuple[int, ...]] = []

    def forward(self, inputs: Tensor) -> Output:
        self.shown.append(tuple(inputs.shape))
        if inputs.dim() == 4:
            pixels = (inputs[:, 0, 0, :2] * 255).round().long()
            return Output(inputs, inputs, self.logits[256 * pixels[:, 0] + pixels[:, 1]])
        return Output(inputs, inputs, self.logits[inputs[:, 0].long()])


def labels_of(split: str, generator: np.random.Generator, most: int = 7) -> np.ndarray:
    """Between 1 and `most` samples of every class that the split has, in no order."""
    wanted = {"train": {"seen"}, "validation": {"seen", "validation"}, "test": {"seen", "unseen"}}[split]
    classes = [label for label, role in enumerate(ROLES) if role in wanted]
    return generator.permutation(np.repeat(classes, generator.integers(1, most + 1, len(classes))))


def write_prepared(
    folder: Path, seed: int, without: tuple[str, str] | None = None, holds: Collection[str] = ("features",)
) -> pd.DataFrame:
    """A prepared data set whose features are random but the first, the row; returns its manifest.

    Args:
        without: a split, and a role that has no sample in it. holds: features, images, or both.
    """
    generator = np.random.default_rng(seed)
    parts = [
        pd.DataFrame({"split": split, "label": labels_of(split, generator)})
        for split in ("train", "validation", "test")
    ]
    manifest = pd.concat(parts).sample(frac=1, random_state=seed).reset_index(drop=True)
    if without is not None:
        gone = (manifest["split"] == without[0]) & manifest["label"].map(lambda label: ROLES[label] == without[1])
        manifest = manifest[~gone].reset_index(drop=True)
    rows = np.arange(len(manifest))
    features = generator.random((len(manifest), FEATURES)).astype(np.float32)
    features[:, 0] = rows
    pixels = generator.integers(0, 256, (len(manifest), 1, 4, 4)).astype(np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = rows // 256, rows % 256
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "labels.npy", manifest["label"].to_numpy(dtype=np.int64))
    np.save(folder / "attributes.npy", generator.random((len(ROLES), ATTRIBUTES)).astype(np.float32))
    for name, values in (("images", pixels), ("features", features)):
        if name in holds:
            np.save(folder / f"{name}.npy", values)
    manifest.insert(0, "id", [f"{row:04d}" for row in rows])
    manifest.assign(sha256="", mean=0.0, spread=0.0).to_csv(folder / "manifest.csv", index=False)
    about: dict[str, Any] = {
        "classes": CLASSES,
        "roles": ROLES,
        "attributes": [f"attribute {number}" for number in range(ATTRIBUTES)],
        "features": FEATURES if "features" in holds else None,
        "images": IMAGES if "images" in holds else None,
        "samples": manifest["split"].value_counts().to_dict(),
        "dropped": {},
        "source": {"name": "toy", "licence": "none", "credit": "nobody", "redistributable": True},
    }
    write_json(folder / "dataset.json", about)
    return manifest


def describe(
    classes: list[str], name: str = "toy", kind: str = "student", network: dict[str, Any] | None = None
) -> Description:
    interface = {"classes": classes, "seen": [CLASSES[label] for label in SEEN], "features": FEATURES, "images": None}
    network = network or {"name": "mlp", "hidden": None, "encoder": None}
    return Description(name, "zero_shot", kind, network, interface, {}, {}, None, [])
