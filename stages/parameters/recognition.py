"""params.yaml for the task `recognition`, with every default of that task."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.parameters import shared
from stages.parameters.shared import Count, Positive, Rate, Real, Section, Sha256, Share, Weight, Whole


class Split(Section):
    """What is held out: so many samples, taken from every class in proportion, or (`by: classes`) so many classes.

    By classes, in the order of their labels, the last `test` are the test split, the `validation` before them the
    validation split, and the others are trained on: the protocol of RKD (Park et al., CVPR 2019) for CUB and Cars.
    `seed` draws samples and, for verification, pairs.
    """

    by: Literal["samples", "classes"] = "samples"
    validation: Positive
    test: Positive
    seed: Count = 0


class Verification(Section):
    """Pairs of images: are both of one class (one face)? A threshold is chosen on all folds but the one it is tried on.

    `pairs` is a list of pairs in the source, in the format of LFW's View 2 (pairs.txt); without it pairs are drawn.
    """

    folds: Annotated[Whole, Field(ge=2)] = 10
    pairs: str | None = None


class Expectation(Section):
    """What validation demands of the prepared data, beyond what holds for every data set."""

    samples: Positive | None = None
    smallest_class: Share = 0.0
    largest_class: Share = 1.0


class Keys(Section):
    """What the arrays of a file are called: images (N, H, W) or (N, H, W, 3) uint8, labels (N,) whole numbers."""

    images: str = "images"
    labels: str = "labels"


class Dataset(shared.Dataset):
    """Images with one label each.

    `format: csv` reads `file`, rows of pixels followed by the label; `format: folder` reads one folder of images
    per class, out of `folder`; `format: arrays` reads `file`, a .npz with the arrays that `keys` names. `image_size` is
    the side of the square images after preparation, in pixels. `classes` are in the order of their labels.
    """

    task: Literal["recognition"]
    encoder: Literal["none"]
    format: Literal["csv", "folder", "arrays"]
    file: str | None = None
    folder: str = "."
    keys: Keys = Keys()
    image_size: Annotated[Whole, Field(ge=4)]
    channels: Literal[1, 3]
    classes: list[str] | None = None
    split: Split
    verification: Verification | None = None
    expect: Expectation = Expectation()

    @model_validator(mode="after")
    def _fields_of_its_format(self) -> "Dataset":
        if self.format == "csv" and (self.file is None or self.classes is None):
            raise ValueError("format 'csv' needs 'file' and 'classes' (the names of the labels 0, 1, ...)")
        if self.format == "arrays" and self.file is None:
            raise ValueError("format 'arrays' needs 'file', a .npz with images and labels")
        if self.format == "folder" and self.file is not None:
            raise ValueError("format 'folder' takes no 'file': it reads one folder of images per class")
        for name, owner in (("folder", "folder"), ("keys", "arrays")):
            if name in self.model_fields_set and self.format != owner:
                raise ValueError(f"format {self.format!r} takes no {name!r}: it belongs to format {owner!r}")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("'classes' names a class twice")
        return self

    @model_validator(mode="after")
    def _pairs_of_held_out_classes(self) -> "Dataset":
        if self.verification is None:
            return self
        if self.verification.pairs is None and self.split.by != "classes":
            raise ValueError("'verification' needs 'split.by: classes', or 'verification.pairs', a list of pairs")
        if self.verification.pairs is not None and self.format != "folder":
            raise ValueError("'verification.pairs' needs format 'folder': it names folders and numbers of files")
        return self


class ResNet(Section):
    """A residual network for small images: one stage per entry of `widths`, halving the image from stage to stage.

    `embedding` adds a linear layer of that width between pooling and classifier; `unit` scales embeddings to length 1.
    """

    name: Literal["resnet"]
    widths: Annotated[list[Positive], Field(min_length=1)]
    blocks: Positive = 1
    embedding: Positive | None = None
    unit: bool = False


class EfficientNetLite(Section):
    """EfficientNet-Lite, with three input channels, and `embedding` and `unit` as in `resnet`.

    `freeze_batchnorm` keeps the means and variances of weights from elsewhere: those of a batch of images that are all
    alike (birds, faces) cost it most of what it knows, and a short training does not bring it back.
    """

    name: Literal["efficientnet_lite"]
    variant: Literal["lite0", "lite1", "lite2", "lite3", "lite4"]
    embedding: Positive | None = None
    unit: bool = False
    freeze_batchnorm: bool = False


class TorchvisionNetwork(Section):
    """A ResNet of torchvision, with three input channels; for models that were trained elsewhere. `embedding` and
    `unit` are those of `resnet`.
    """

    name: Literal["torchvision"]
    model: Annotated[str, Field(pattern=r"^(resnet|resnext|wide_resnet)")]
    embedding: Positive | None = None
    unit: bool = False


Network = Annotated[ResNet | EfficientNetLite | TorchvisionNetwork, Field(discriminator="name")]


class Augment(Section):
    """Shared by all models that look at the same image: a random shift in pixels, and mirroring left to right."""

    shift: Annotated[Whole, Field(ge=0, le=64)] = 2
    flip: bool = False


class Training(shared.Training):
    """SGD with Nesterov momentum, or Adam; the rate rises over `warmup` (a share of all steps), then falls as a
    cosine to 0.

    `per_class` makes batches of whole classes, with so many images of each.
    """

    epochs: Positive = 12
    batch: Annotated[Whole, Field(ge=2)] = 64  # BatchNorm has no statistics of one sample
    per_class: Annotated[Whole, Field(ge=2)] | None = None
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: Rate = 0.1
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    weight_decay: Weight = 5e-4
    warmup: Share = 0.1
    clip: Rate | None = None
    seed: Count = 0
    threads: Positive = 1
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: Positive = 1
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _whole_classes(self) -> "Training":
        if self.per_class is not None and self.batch % self.per_class:
            raise ValueError(f"'batch' = {self.batch} must be a multiple of 'per_class' = {self.per_class}")
        return self

    @model_validator(mode="after")
    def _fields_of_its_optimizer(self) -> "Training":
        if self.optimizer == "adam" and "momentum" in self.model_fields_set:
            raise ValueError("'momentum' goes with optimizer 'sgd'")
        if self.optimizer == "adam" and "learning_rate" not in self.model_fields_set:
            raise ValueError("optimizer 'adam' needs 'learning_rate': the default is for 'sgd'; 1e-4 to 1e-3 is usual")
        return self


class Initial(Section):
    """Existing weights to begin with: of all layers but embedding and classifier; those in the file are left out.

    `mean` and `std` are what the pixels in [0, 1] were normalised with, and are; the data set's own by default.
    """

    file: str
    sha256: Sha256
    origin: shared.Origin | None = None
    mean: list[float] | None = None
    std: list[Rate] | None = None


class Learning(Section):
    """What a network learns by itself, and what it begins with.

    `objective: classes` is cross-entropy over the classes of the training split. `triplets` draws images of one class
    nearer to each other than to those of others, by `margin`, and needs `training.per_class`. A model that learns no
    classes answers with an embedding alone. `initial` are weights to begin with; random ones by default.
    """

    objective: Literal["classes", "triplets"] = "classes"
    margin: Rate = 0.2
    initial: Initial | None = None
    training: Training = Training()

    @property
    def learns(self) -> str | None:
        """The objective that it is trained by; None where a teacher alone says what is learnt."""
        return self.objective

    @property
    def origins(self) -> list[shared.Origin]:
        return [self.initial.origin] if self.initial is not None and self.initial.origin is not None else []

    @model_validator(mode="after")
    def _margin_of_triplets(self) -> "Learning":
        if "margin" in self.model_fields_set and self.objective != "triplets":
            raise ValueError("'margin' goes with objective 'triplets'")
        return self


class Outside(shared.Outside):
    """`mean` and `std` are what its pixels in [0, 1] are normalised with; the data set's own by default."""

    network: Network
    mean: list[float] | None = None
    std: list[Rate] | None = None


class Teacher(Learning, shared.Teacher):
    """Either `network` and `training`, or `from` (an existing model)."""

    task: Literal["recognition"]
    network: Network | None = None
    outside: Outside | None = Field(default=None, alias="from")

    @property
    def origins(self) -> list[shared.Origin]:
        return [made.origin for made in (self.outside, self.initial) if made is not None and made.origin is not None]

    @model_validator(mode="after")
    def _trained_or_taken(self) -> "Teacher":
        if (self.network is None) == (self.outside is None):
            raise ValueError("needs either 'network' (it is trained here) or 'from' (an existing model)")
        if self.outside is not None and (self.model_fields_set & Learning.model_fields.keys() or self.start != "none"):
            raise ValueError(
                "takes neither 'training', 'objective' nor 'initial', and no 'start': the model of 'from' is taken as "
                "it is"
            )
        if self.initial is not None and self.start != "none":
            raise ValueError("begins either with 'initial' or with 'start'")
        return self


class AnyStudent(Learning, shared.Student):
    """`resolution` is the side of the image that the student sees, in pixels."""

    task: Literal["recognition"]
    resolution: Annotated[Whole, Field(ge=2)]
    network: Network


class Alone(AnyStudent):
    """No teacher: the task's own objective."""

    method: Literal["alone"]
    teacher: Literal["none"]


class KD(AnyStudent, shared.KD):
    """Soft labels at `temperature`; `alpha` is their share of the loss."""

    method: Literal["kd"]
    temperature: Rate = 4.0
    alpha: Share = 0.9


class HORKD(AnyStudent):
    """Relations of order 1 (points), 2 (pairs) and 3 (triplets) between embeddings; a weight of 0 skips its term.

    Relatives are settings: FitNet has the weights 0 for pairs and triplets, RKD 0 for points, and `direct` (no
    assistant) names the teacher itself. Without the task (weight 0) the student learns no classes. Where its width and
    its source's differ, points are compared through a linear layer without bias, which exists in training only.
    `vertices` compares angles at so many samples of a batch, drawn anew at every step, instead of at all: for very
    large batches.
    """

    class Weights(Section):
        task: Weight = 1.0
        points: Weight = 1.0
        pairs: Weight = 25.0
        triplets: Weight = 50.0

    class Shares(Section):
        """Instead of a weight: how long a term's gradient at the embeddings shall be, at every step, as a share of that
        of the weighted task. It may be more than 1.
        """

        points: Rate | None = None
        pairs: Rate | None = None
        triplets: Rate | None = None

    method: Literal["horkd"]
    weights: Weights = Weights()
    shares: Shares = Shares()
    tap: Literal["pooled", "embedding"] = "pooled"
    point_penalty: Literal["mse", "huber", "mse_unit"] = "mse"
    vertices: Positive | None = None

    @model_validator(mode="after")
    def _something_to_learn(self) -> "HORKD":
        if not any(self.wanted(name) for name in HORKD.Weights.model_fields):
            raise ValueError("at least one of 'weights' must be greater than 0")
        for name, share in self.shares:
            if share is not None and not self.weights.task:
                raise ValueError(f"shares.{name} = {share:g} is a share of the task's gradient, and weights.task is 0")
            if share is not None and name in self.weights.model_fields_set:
                raise ValueError(f"weights.{name} and shares.{name} exclude each other")
        if self.learns is None and (unused := sorted(self.model_fields_set & {"objective", "margin"})):
            raise ValueError(f"'{unused[0]}' says what the task is, and weights.task is 0")
        if self.vertices is not None and not self.wanted("triplets"):
            raise ValueError("'vertices' is about triplets, whose weight is 0")
        return self

    @property
    def learns(self) -> str | None:
        return self.objective if self.wanted("task") else None

    def wanted(self, term: str) -> bool:
        """Whether a term (task, points, pairs, triplets) is computed."""
        return getattr(self.shares, term, None) is not None or getattr(self.weights, term) > 0


Student = Annotated[Alone | KD | HORKD, Field(discriminator="method")]


class Export(shared.Export):
    task: Literal["recognition"]
    tolerance: Rate = 1e-4
    threads: Positive = 1


class Task(shared.Task):
    """What holds for the whole task. `batch` and `threads` are those of evaluation, `seed` that of its k-means.

    `resolutions`: every model is also shown images that were reduced to so many pixels before they are brought to its
    own size; those above a data set's own size are left out.
    """

    batch: Positive = 256
    threads: Positive = 1
    seed: Count = 0
    resolutions: list[Annotated[Whole, Field(ge=2)]] = []

    @model_validator(mode="after")
    def _different_resolutions(self) -> "Task":
        if len(set(self.resolutions)) != len(self.resolutions):
            raise ValueError("'resolutions' names one twice")
        return self


class Gates(shared.Gates):
    """`metric` is what selects and what is compared: top-1, or Recall@1 where embeddings are what is deployed."""

    metric: Literal["top_1", "recall_at_1"] = "top_1"


def conflicts(
    model: Teacher | AnyStudent, dataset: Dataset, teacher: shared.Teacher | shared.Student | None
) -> list[tuple[str, str]]:
    """Contradictions between a model, its data set and its teacher, as (field of the model, what is wrong)."""
    found = []
    if isinstance(model, AnyStudent) and model.resolution > dataset.image_size:
        found.append(
            (
                "resolution",
                f"must be at most the size of its images, datasets.{model.dataset}.image_size = {dataset.image_size}, "
                f"got {model.resolution}",
            )
        )
    if model.learns == "triplets":
        settings = model.training
        if settings.per_class is None:
            found.append(
                ("training.per_class", "objective 'triplets' needs it: how many images of a class make a batch")
            )
        elif settings.batch < 2 * settings.per_class:
            found.append(
                (
                    "training.batch",
                    f"objective 'triplets' needs images of two classes at least, 2 * per_class = "
                    f"{2 * settings.per_class}, got {settings.batch}",
                )
            )
    if isinstance(model, KD):
        if model.learns != "classes":
            found.append(("objective", "method 'kd' compares class scores, and so needs 'classes', got 'triplets'"))
        if isinstance(teacher, Teacher | AnyStudent) and teacher.learns != "classes":
            found.append(
                ("teacher", f"method 'kd' compares class scores, and {model.teacher!r} learns no classes; use 'horkd'")
            )
    after_pooling = getattr(model.network, "embedding", None)
    if isinstance(model, HORKD) and model.learns is None and model.tap == "pooled" and after_pooling:
        found.append(
            (
                "tap",
                "without the task (weights.task = 0) nothing after the pooled features is trained, and "
                "network.embedding would keep its first weights; set tap to 'embedding'",
            )
        )
    return found
