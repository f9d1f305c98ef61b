"""A small prepared data set of zero-shot recognition, a teacher for it, and D3GZSL's learner on both."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.files import sha256
from models.artifacts import Description, save_model
from models.zero_shot import MLP, Encoder, Generator, build
from stages import paths
from stages.distill import d3gzsl
from stages.parameters import zero_shot as schema
from stages.parameters.zero_shot import D3GZSL
from stages.teach.zero_shot import ZeroShot, for_student
from stages.training import Context, Method, Run

sys.path.insert(0, str(Path(__file__).parents[1]))
import zero_shot_files

FEATURES, ATTRIBUTES, WIDTH = 6, zero_shot_files.ATTRIBUTES, 7
ROLES, SEEN = zero_shot_files.ROLES, zero_shot_files.SEEN
OTHERS = [label for label in range(len(ROLES)) if label not in SEEN]
TRAINING: dict[str, Any] = {"epochs": 3, "batch": 8, "learning_rate": 1e-3, "accelerator": "cpu"}
# Losses that are seen in weights: of all terms, and none small beside the generator's own.
WEIGHTS = {"classification": 0.5, "in_distribution": 0.3, "out_of_distribution": 0.7}


def prepare(folder: Path, seed: int = 0) -> Path:
    """Features that say something of their class, in all three splits."""
    zero_shot_files.write_prepared(folder, seed)
    labels, attributes = np.load(folder / "labels.npy"), np.load(folder / "attributes.npy")
    random = np.random.default_rng(seed)
    features = attributes[labels] @ random.random((ATTRIBUTES, FEATURES)) + 0.1 * random.random((len(labels), FEATURES))
    np.save(folder / "features.npy", features.astype(np.float32))
    return folder


def encode(folder: Path, seed: int = 0) -> Path:
    """Images, and the features that an encoder with random weights makes of them."""
    zero_shot_files.write_prepared(folder, seed, holds=("images", "features"))
    network = {"name": "encoder", "widths": [4, FEATURES], "blocks": 1}
    seen = [zero_shot_files.CLASSES[label] for label in SEEN]
    interface = {"classes": seen, "seen": seen, "features": FEATURES, "images": zero_shot_files.IMAGES}
    torch.manual_seed(seed)
    encoder = build({"network": network, "interface": interface})
    assert isinstance(encoder, Encoder)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    (folder / "encoder").mkdir()
    save_model(
        folder / "encoder",
        encoder,
        Description("encoder", "zero_shot", "teacher", network, interface, {}, {}, None, []),
    )
    images = torch.from_numpy(np.load(folder / "images.npy")).float() / 255
    with torch.inference_mode():
        np.save(folder / "features.npy", encoder.eval().features(images).numpy())
    return folder


def before(prepared: Path, hidden: int | None = WIDTH, name: str = "before") -> tuple[MLP, Description]:
    """A student that may be extended, with random weights; its generator is written where companions lie."""
    attributes = torch.from_numpy(np.load(prepared / "attributes.npy"))
    torch.manual_seed(2)
    network, generator = MLP(FEATURES, len(ROLES), hidden), Generator(FEATURES, len(ROLES), ATTRIBUTES, 4, 9)
    network.scale.fit(torch.from_numpy(train(prepared)[0]))
    for parameter in [*network.parameters(), *generator.parameters()]:
        torch.nn.init.normal_(parameter, 0, 0.7)
    generator.attributes.copy_(attributes)
    told = zero_shot_files.describe(
        zero_shot_files.CLASSES, name, network={"name": "mlp", "hidden": hidden, "encoder": None}
    )
    told.dataset.update(name=prepared.name, digest=sha256(prepared / "manifest.csv"))
    write_generator(generator, told)
    return network, told


def write_generator(generator: Generator, beside: Description) -> None:
    folder = paths.companions("zero_shot", beside.name) / "generator"
    folder.mkdir(parents=True)
    about = (f"{beside.name}.generator", "zero_shot", "companion", generator.built_from, beside.interface)
    save_model(folder, generator, Description(*about, {}, beside.dataset, None, []))


def teacher(prepared: Path, width: int = WIDTH) -> tuple[MLP, Description]:
    """One that answers with the seen classes, and has not learnt much."""
    torch.manual_seed(1)
    network = MLP(FEATURES, len(SEEN), width)
    network.scale.fit(torch.from_numpy(train(prepared)[0]))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.7)
    description = zero_shot_files.describe([zero_shot_files.CLASSES[label] for label in SEEN], "teacher", "teacher")
    return network, description


def train(prepared: Path) -> tuple[np.ndarray, np.ndarray]:
    import pandas as pd

    rows = np.flatnonzero(pd.read_csv(prepared / "manifest.csv")["split"] == "train")
    return np.load(prepared / "features.npy")[rows], np.load(prepared / "labels.npy")[rows]


def entry(generator: str = "clswgan", **fields: Any) -> D3GZSL:
    """Validated parameters, as params.yaml would give them; `distribution: None` for the generator alone."""
    own = {"name": generator, "hidden": 9, "critic_steps": 2}
    own |= {"embedding": 5, "comparator": 6} if generator == "cegzsl" else {}
    alone = "distribution" in fields and fields["distribution"] is None
    network = {"name": "mlp", "hidden": None if alone and generator == "clswgan" else WIDTH}
    base: dict[str, Any] = {
        "task": "zero_shot",
        "dataset": "toy",
        "method": "d3gzsl",
        "teacher": "none" if alone else "teacher",
        "network": network,
        "generator": own | fields.pop("generator_settings", {}),
        "select_every": 1,
        "training": {**TRAINING, **fields.pop("training", {})},
    }
    if alone:
        base["classifier"] = {"mode": "two_stage", "samples": 5, "epochs": 2, "batch": 16, "learning_rate": 1e-2}
    elif "distribution" in fields:
        fields["distribution"] = {"per_class": 3, **WEIGHTS, **fields["distribution"]}
    else:
        fields["distribution"] = {"per_class": 3, **WEIGHTS}
    return D3GZSL.model_validate({**base, **fields})


def teaching(network: dict[str, Any] | None = None, **fields: Any) -> schema.Teacher:
    """Validated parameters of a teacher."""
    base = {
        "task": "zero_shot",
        "dataset": "toy",
        "start": "none",
        "network": network or {"name": "mlp", "hidden": WIDTH},
    }
    training = {**TRAINING, **fields.pop("training", {})}
    return schema.Teacher.model_validate({**base, **fields, "training": training})


def alone(hidden: int | None = WIDTH, **training: Any) -> schema.Alone:
    """Validated parameters of a student that nobody teaches."""
    base = {"task": "zero_shot", "dataset": "toy", "method": "alone", "teacher": "none"}
    network = {"name": "mlp", "hidden": hidden}
    return schema.Alone.model_validate({**base, "network": network, "training": {**TRAINING, **training}})


def extended(added: dict[str, list[float]], **classifier: Any) -> schema.Extended:
    """Validated parameters of a student with more classes."""
    base = {"task": "zero_shot", "dataset": "toy", "method": "extended", "teacher": "before", "added": added}
    settings = {"mode": "two_stage", "samples": 5, "epochs": 2, "batch": 16, "learning_rate": 1e-2, **classifier}
    return schema.Extended.model_validate({**base, "classifier": settings})


def run(precision: str = "64-true") -> Run:
    return Run(entry(training={"precision": precision}).training)


def task(prepared: Path, parameters: D3GZSL, run: Run, width: int = WIDTH) -> ZeroShot:
    return for_student(parameters, prepared, run, teacher(prepared, width) if parameters.needs_teacher else None)


def learner(prepared: Path, run: Run, width: int = WIDTH, **fields: Any) -> d3gzsl.Learner:
    parameters = entry(**fields)
    return d3gzsl.Learner(task(prepared, parameters, run, width), parameters, run)


def begin(learner: Method) -> None:
    """As the training loop prepares modules."""
    for name, module in learner.modules.items():
        module.train(name not in learner.frozen)
        if name in learner.frozen:
            module.requires_grad_(False)


def steps(learner: Method, run: Run, count: int = 3, seed: int = 0) -> list[dict[str, float]]:
    begin(learner)
    context, found = Context(learner, run, seed), []
    for step in range(count):
        context.begin(step)
        found.append({name: value.item() for name, value in learner.step(context).items()})
    return found


def weights(learner: Method) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in learner.modules.items()
        for name, tensor in module.state_dict().items()
    }


def spoil_other_samples(prepared: Path) -> None:
    """NaN for every sample that training may not use: of the test split, and of validation where it does not select."""
    import pandas as pd

    features = np.load(prepared / "features.npy")
    features[(pd.read_csv(prepared / "manifest.csv")["split"] != "train").to_numpy()] = np.nan
    np.save(prepared / "features.npy", features)
