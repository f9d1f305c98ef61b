"""params.yaml for the task `zero_shot`, with every default of that task."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.parameters import shared
from stages.parameters.shared import Count, Positive, Rate, Real, Section, Share, Weight, Whole

Names = Annotated[list[str], Field(min_length=1)]


class Split(Section):
    """What is held out of training.

    `validation` and `test` are shares of the samples of every seen class. `validation_classes` are seen classes of the
    source that are treated as unseen, to select and to calibrate with: their names, or how many are drawn at random; 0
    leaves nothing to select with. A format that knows its test samples takes no `test`.
    """

    validation: Annotated[Real, Field(ge=0, lt=1)] = 0.1
    test: Annotated[Real, Field(gt=0, lt=1)] | None = None
    validation_classes: Count | Names = 0
    seed: Count = 0


class Expectation(Section):
    """What validation demands of the prepared data, beyond what holds for every data set."""

    samples: Positive | None = None
    smallest_class: Share = 0.0
    largest_class: Share = 1.0


class Dataset(shared.Dataset):
    """Samples of classes with attributes; of the unseen classes none is trained on.

    `format: renderings` paints the digits of `file` (rows of 784 pixels and a label) in one of six ways each: classes
    are digit x rendering, and `unseen` names those that are unseen. `encoded` are the features that `encoder`, a
    teacher of images, makes of the images it was trained on. `xlsa17` reads the two `.mat` files of that benchmark out
    of `folder`, `arrays` one `.npz` (`file`) with features (N, D), labels, att (classes, attributes), allclasses_names
    and trainval_loc, test_seen_loc, test_unseen_loc, all counted from 0.
    """

    task: Literal["zero_shot"]
    encoder: str
    format: Literal["renderings", "encoded", "xlsa17", "arrays"]
    file: str | None = None
    folder: str | None = None
    unseen: Names | None = None
    split: Split | None = None
    expect: Expectation = Expectation()

    @model_validator(mode="after")
    def _fields_of_its_format(self) -> "Dataset":
        wanted = {
            "renderings": {"file", "unseen", "split"},
            "encoded": set(),
            "xlsa17": {"folder", "split"},
            "arrays": {"file", "split"},
        }[self.format]
        for name in ("file", "folder", "unseen", "split"):
            if (getattr(self, name) is not None) != (name in wanted):
                raise ValueError(f"format {self.format!r} {'needs' if name in wanted else 'takes no'} {name!r}")
        if (self.format == "encoded") == (self.encoder == "none"):
            raise ValueError("'encoder' names a teacher for format 'encoded', and is none for all others")
        if self.split is not None and (self.format == "renderings") != (self.split.test is not None):
            verb = "needs" if self.format == "renderings" else "takes no"
            raise ValueError(f"format {self.format!r} {verb} 'split.test', the share of seen samples that are tested")
        return self


class Encoder(Section):
    """A residual network from images to features that are not negative: one stage per entry of `widths`."""

    name: Literal["encoder"]
    widths: Annotated[list[Positive], Field(min_length=1)]
    blocks: Positive = 1


class MLP(Section):
    """A linear classifier on one hidden layer of `hidden` units, or (null) on the features themselves."""

    name: Literal["mlp"]
    hidden: Positive | None = 2048


class Training(shared.Training):
    """Adam. An epoch has as many steps as it takes batches to see every training sample once."""

    epochs: Positive = 30
    batch: Annotated[Whole, Field(ge=2)] = 128
    learning_rate: Rate = 1e-4
    betas: tuple[Annotated[Real, Field(ge=0, lt=1)], Annotated[Real, Field(ge=0, lt=1)]] = (0.5, 0.999)
    clip: Rate | None = None
    seed: Count = 0
    threads: Positive = 1
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: Positive = 1
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"


class Teacher(shared.Teacher):
    """Learns to tell the seen classes apart: an encoder from images, or an MLP from features.

    `factor` multiplies the cross-entropy, as the official code has it; Adam's steps hardly change.
    """

    task: Literal["zero_shot"]
    start: Literal["none"]
    network: Annotated[Encoder | MLP, Field(discriminator="name")]
    factor: Rate = 1e-3
    training: Training = Training()
    outside: None = None

    @property
    def pretrained(self) -> bool:
        """An encoder makes features; its classifier is left behind."""
        return isinstance(self.network, Encoder)


class AnyStudent(shared.Student):
    task: Literal["zero_shot"]
    network: MLP
    training: Training = Training()


class Alone(AnyStudent):
    """No teacher and no generator: cross-entropy on the seen classes, as if there were no others."""

    method: Literal["alone"]
    teacher: Literal["none"]


class ESZSL(AnyStudent):
    """A bilinear map between features and attributes, by two ridge regressions in closed form."""

    method: Literal["eszsl"]
    teacher: Literal["none"]
    feature_penalty: Rate = 1.0
    attribute_penalty: Rate = 1.0

    @property
    def needs_teacher(self) -> bool:
        return False

    @model_validator(mode="after")
    def _linear(self) -> "ESZSL":
        if self.network.hidden is not None or "training" in self.model_fields_set:
            raise ValueError(
                "'eszsl' is linear and in closed form: 'network.hidden' is null, and it takes no 'training'"
            )
        return self


class CLSWGAN(Section):
    """f-CLSWGAN without its classification term: a conditional Wasserstein GAN with gradient penalty.

    `noise` is its width, that of the attributes by default.
    """

    name: Literal["clswgan"]
    hidden: Positive = 4096
    noise: Positive | None = None
    critic_steps: Positive = 5
    penalty: Rate = 10.0


class CEGZSL(Section):
    """CE-GZSL: the same with contrastive losses between samples (of embeddings) and between a sample and classes."""

    name: Literal["cegzsl"]
    hidden: Positive = 4096
    noise: Positive | None = None
    critic_steps: Positive = 5
    penalty: Rate = 10.0
    embedding: Positive = 512
    comparator: Positive = 2048
    instance_weight: Weight = 1e-3
    class_weight: Weight = 1e-3
    instance_temperature: Rate = 0.1
    class_temperature: Rate = 0.1


class Distribution(Section):
    """D3: what teacher and student say of batches that mix real seen and synthesised unseen samples.

    `per_class` samples are synthesised of every unseen class per step. `kl: double` takes the softmax twice, as the
    official code does. `similarity: logits` uses similarities in [0, 1] as logits, `probabilities` as probabilities.
    `renormalise` takes a softmax of the pair (confidence, 1 - confidence). `target` is what a pair of samples should
    have in common: their class, or being real or synthesised.
    """

    per_class: Positive = 5
    classification: Weight = 1e-4
    in_distribution: Weight = 1e-4
    out_of_distribution: Weight = 1e-4
    kl: Literal["single", "double"] = "single"
    similarity: Literal["logits", "probabilities"] = "logits"
    renormalise: bool = True
    target: Literal["class", "domain"] = "class"
    score: Literal["max_log_softmax", "energy"] = "max_log_softmax"
    scores_growth: Rate = 0.99
    student_growth: Rate = 0.98

    @model_validator(mode="after")
    def _weighs_something(self) -> "Distribution":
        if not (self.classification or self.in_distribution or self.out_of_distribution):
            raise ValueError(
                "'classification', 'in_distribution' and 'out_of_distribution' are all 0, and the student learns "
                "nothing · set 'distribution' to null for the generator alone"
            )
        return self


class Classifier(Section):
    """How the last layer comes about, once generator and hidden layer are there.

    `end_to_end` is the student's own, trained along. `two_stage` is a new one: `samples` synthesised of every unseen
    class beside all real ones of seen classes, embedded, and a softmax trained on them.
    """

    mode: Literal["end_to_end", "two_stage"]
    samples: Positive = 300
    epochs: Positive = 20
    batch: Positive = 256
    learning_rate: Rate = 1e-4


class GeneratorTraining(Training):
    """One step is `critic_steps` updates of the critic and one of the generator, each with Adam.

    The rate of generator and critic is multiplied by `growth` every `growth_every` epochs; 1.09 every 20 in the
    official code, constant by default.
    """

    epochs: Positive = 2000
    batch: Annotated[Whole, Field(ge=2)] = 256
    growth: Rate = 1.0
    growth_every: Positive = 20


class D3GZSL(AnyStudent):
    """A generator of features from attributes, and a student that learns with it.

    Without `distribution` it is the generator alone, with a two-stage classifier and no teacher. Every `select_every`
    epochs the student is measured on the validation split: the best by harmonic mean is kept, the one at the end
    beside it. 0 keeps the one at the end. `test_best` keeps a copy of the student of every such epoch, from which
    evaluation says, labelled so, what selection on the test split would have given.
    """

    method: Literal["d3gzsl"]
    generator: Annotated[CLSWGAN | CEGZSL, Field(discriminator="name")]
    distribution: Distribution | None = Distribution()
    classifier: Classifier = Classifier(mode="end_to_end")
    select_every: Count = 10
    test_best: bool = False
    training: GeneratorTraining = GeneratorTraining()

    @property
    def known_as(self) -> str:
        """Without D3 it is another method: its generator's."""
        return self.method if self.distribution is not None else self.generator.name

    @property
    def needs_teacher(self) -> bool:
        return self.distribution is not None

    @model_validator(mode="after")
    def _parts_fit(self) -> "D3GZSL":
        if self.distribution is None:
            if self.teacher != "none":
                raise ValueError("without 'distribution' nobody teaches: 'teacher' is none")
            if self.classifier.mode == "end_to_end":
                raise ValueError("without 'distribution' no student learns along: 'classifier.mode' is two_stage")
            if isinstance(self.generator, CLSWGAN) and self.network.hidden is not None:
                raise ValueError("without 'distribution' nothing trains a hidden layer: 'network.hidden' is null")
        if isinstance(self.generator, CEGZSL) and self.network.hidden is None:
            raise ValueError("generator 'cegzsl' shares the hidden layer of the student: 'network.hidden' is a number")
        return self


class Extended(AnyStudent):
    """The student that `teacher` names, with more classes: by its generator, from their attributes alone.

    `added` has the attributes of every new class by name, in the order of the data set. `network` is the teacher's.
    """

    method: Literal["extended"]
    network: MLP | None = None  # type: ignore[assignment]
    added: Annotated[dict[str, list[Real]], Field(min_length=1)]
    classifier: Classifier = Classifier(mode="two_stage")

    @model_validator(mode="after")
    def _two_stage(self) -> "Extended":
        if self.network is not None or "training" in self.model_fields_set or self.classifier.mode != "two_stage":
            raise ValueError("'extended' takes neither 'network' nor 'training', and its classifier is two_stage")
        return self


Student = Annotated[Alone | ESZSL | D3GZSL | Extended, Field(discriminator="method")]


class Export(shared.Export):
    task: Literal["zero_shot"]
    tolerance: Rate = 1e-4
    threads: Positive = 1


class Task(shared.Task):
    """What holds for the whole task. `batch` and `threads` are those of evaluation."""

    batch: Positive = 1024
    threads: Positive = 1


class Gates(shared.Gates):
    """`metric` is what selects and what is compared."""

    metric: Literal["harmonic_mean", "seen", "unseen", "unseen_only", "calibrated_harmonic_mean"] = "harmonic_mean"


def conflicts(
    model: Teacher | AnyStudent, dataset: Dataset, teacher: shared.Teacher | shared.Student | None
) -> list[tuple[str, str]]:
    """Contradictions between a model, its data set and its teacher, as (field of the model, what is wrong)."""
    images = dataset.format == "renderings"
    if isinstance(model, Teacher):
        if images != isinstance(model.network, Encoder):
            kind, other = ("images", "an 'encoder'") if images else ("features", "an 'mlp'")
            return [("network.name", f"data set {model.dataset!r} holds {kind}, and {other} learns from them")]
        return []
    if images:
        return [
            (
                "dataset",
                f"{model.dataset!r} holds images; students learn from a data set of format 'encoded' made of it",
            )
        ]
    if teacher is None:
        return []  # none, or a name that leads nowhere: said elsewhere
    if isinstance(model, Extended) and not isinstance(teacher, D3GZSL | Extended):
        return [("teacher", f"{model.teacher!r} has no generator: name a student of method 'd3gzsl' or 'extended'")]
    if isinstance(model, D3GZSL) and model.needs_teacher and not isinstance(teacher, Teacher):
        return [("teacher", f"{model.teacher!r} is no teacher: it has to know the seen classes only")]
    if teacher.dataset != model.dataset:
        of = f"{model.teacher!r} is of data set {teacher.dataset!r}, and this student of {model.dataset!r}"
        return [("teacher", f"{of}: name one of the same data set, or set 'dataset' to {teacher.dataset!r}")]
    return []
