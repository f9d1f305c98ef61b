"""params.yaml for the task `segmentation`, with every default of that task."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.parameters import shared
from stages.parameters.shared import Count, Positive, Rate, Real, Section, Share, Weight, Whole

Side = Annotated[Whole, Field(ge=16)]
Size = Annotated[list[Side], Field(min_length=2, max_length=2)]
Strengths = Annotated[list[Rate], Field(min_length=3, max_length=3)]
Place = Annotated[str, Field(pattern=r"^(last|stage[1-9])$")]


class Scenes(Section):
    """How many scenes are made per split; the fewest and most digits in each (one that finds no room is left out);
    their least and largest height in pixels, with their paper and before they are turned; and the seed.
    """

    train: Positive
    validation: Positive
    test: Positive
    digits: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [2, 3]
    height: Annotated[list[Annotated[Whole, Field(ge=12)]], Field(min_length=2, max_length=2)] = [24, 32]
    seed: Count = 0

    @model_validator(mode="after")
    def _ordered(self) -> "Scenes":
        for name in ("digits", "height"):
            lowest, highest = getattr(self, name)
            if lowest > highest:
                raise ValueError(f"{name} must be [lowest, highest], got [{lowest}, {highest}]")
        return self


class Expectation(Section):
    """What validation demands of the prepared data, beyond what holds for every data set.

    `ignored` is the largest share of pixels without a label, in any split; `smallest_class` and `largest_class` bound
    the share of labelled pixels that a class has in any split.
    """

    samples: Positive | None = None
    ignored: Share = 0.5
    smallest_class: Share = 0.0
    largest_class: Share = 1.0


class Dataset(shared.Dataset):
    """Images with a class per pixel.

    `format: scenes` makes them: digits of `digits` (a table as recognition reads it) over `backgrounds` (photographs).
    `format: folders` reads {train,val,test}/{images,labels}; `cityscapes` and `voc` read those data sets' own folders,
    take their `val` for testing, and hold `validation` (a share of `train`, whole cities or images) out.
    `image_size` is [height, width] after preparation: images are resized to it, or (`fit: pad`) reduced if they are
    larger, then filled up with pixels that have no label. `ignore` is the label in the files of pixels that have none.
    """

    task: Literal["segmentation"]
    encoder: Literal["none"]
    format: Literal["scenes", "folders", "cityscapes", "voc"]
    image_size: Size
    fit: Literal["resize", "pad"] = "resize"
    classes: Annotated[list[str], Field(min_length=2, max_length=255)] | None = None
    ignore: Annotated[Whole, Field(ge=0, le=255)] | None = None
    digits: str | None = None
    backgrounds: list[str] | None = None
    scenes: Scenes | None = None
    validation: Annotated[Real, Field(gt=0, lt=1)] | None = None
    split_seed: Count = 0
    expect: Expectation = Expectation()

    @model_validator(mode="after")
    def _fields_of_its_format(self) -> "Dataset":
        wanted = {
            "scenes": {"digits", "backgrounds", "scenes"},
            "folders": {"classes"},
            "cityscapes": {"validation"},
            "voc": {"validation"},
        }[self.format]
        given = {
            name
            for name in ("classes", "digits", "backgrounds", "scenes", "validation")
            if getattr(self, name) is not None
        }
        if missing := sorted(wanted - given):
            raise ValueError(f"format {self.format!r} needs {', '.join(map(repr, missing))}")
        if extra := sorted(given - wanted):
            raise ValueError(f"format {self.format!r} takes no {', '.join(map(repr, extra))}")
        if self.ignore is not None and self.format != "folders":
            raise ValueError(f"format {self.format!r} takes no 'ignore': it is known")
        if "split_seed" in self.model_fields_set and self.validation is None:
            raise ValueError(f"format {self.format!r} takes no 'split_seed': its split is given")
        if "fit" in self.model_fields_set and self.format == "scenes":
            raise ValueError("format 'scenes' takes no 'fit': they are made in their size")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("'classes' names a class twice")
        if self.scenes is not None and 2 * self.scenes.height[1] > min(self.image_size):
            raise ValueError(
                f"'scenes.height' may reach half of the smaller side of 'image_size' {self.image_size}, got "
                f"{self.scenes.height}"
            )
        return self


class ResNet(Section):
    """A ResNet encoder at stride 8: one stage per entry of `widths`, the last two dilated by 2 and 4 (the first block
    of each by half of that).

    `widths` are those of the stages' outputs; bottleneck blocks compute at a quarter of them. `stem: deep` is three 3x3
    convolutions ("v1c"), `wide` one 7x7 as in torchvision. Both reduce by 4; `light` (two 3x3) reduces by 2, and the
    stages then by 4, for small images.
    `weights` is a local file with torchvision's state_dict for this encoder (its stem is `wide`), `sha256` its digest;
    pixels are then normalised as for that file, with the mean and spread of ImageNet.
    """

    name: Literal["resnet"]
    widths: Annotated[list[Positive], Field(min_length=4, max_length=4)]
    blocks: Annotated[list[Positive], Field(min_length=4, max_length=4)] = [1, 1, 1, 1]
    block: Literal["basic", "bottleneck"] = "basic"
    stem: Literal["deep", "wide", "light"] = "light"
    # A path belongs to one machine: it enters no description of a model, and no digest.
    weights: Annotated[str | None, Field(exclude=True)] = None
    sha256: shared.Sha256 | None = None

    @model_validator(mode="after")
    def _pinned(self) -> "ResNet":
        if (self.weights is None) != (self.sha256 is None):
            raise ValueError("'weights' and 'sha256' go together: a file is taken only if it is what is pinned")
        if self.weights is not None and self.stem != "wide":
            raise ValueError(f"'weights' are torchvision's, whose stem is 'wide', not {self.stem!r}")
        if self.block == "bottleneck" and any(width % 4 for width in self.widths):
            raise ValueError("bottleneck blocks need 'widths' that 4 divides")
        return self


class PSPNet(Section):
    """Pyramid pooling over `pools` x `pools` cells, then one 3x3 convolution of `width` channels."""

    name: Literal["pspnet"]
    encoder: ResNet
    width: Positive = 64
    pools: Annotated[list[Positive], Field(min_length=1)] = [1, 2, 3, 6]
    auxiliary: Positive | None = 32
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.1


class DeepLabV3(Section):
    """Atrous spatial pyramid pooling at `dilations`, then one 3x3 convolution of `width` channels."""

    name: Literal["deeplabv3"]
    encoder: ResNet
    width: Positive = 64
    dilations: Annotated[list[Positive], Field(min_length=1)] = [1, 12, 24, 36]
    auxiliary: Positive | None = 32
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.1


Network = Annotated[PSPNet | DeepLabV3, Field(discriminator="name")]


class Augment(Section):
    """Shared by teacher and student: both see the same pixels.

    `scale` are the bounds of a random zoom; `crop` is [height, width] of a random window (the whole image by default).
    Where either is set, a window is drawn again, ten times at most, while one class covers more than `crowded` of its
    labelled pixels or none has a label. `flip` mirrors half of the images left to right; `photometric` is the strength
    of random changes of brightness, contrast, saturation and hue.
    """

    scale: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [1.0, 1.0]
    crop: Size | None = None
    crowded: Share = 0.75
    flip: bool = True
    photometric: Share = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> "Augment":
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be [smallest, largest], got {self.scale}")
        return self


class Training(shared.Training):
    """SGD with momentum; the rate falls as (1 - t)^power from `learning_rate` to `floor`.

    `auxiliary` is the weight of the auxiliary head's loss.
    """

    epochs: Positive = 20
    batch: Annotated[Whole, Field(ge=2)] = 8
    learning_rate: Rate = 0.01
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    weight_decay: Weight = 5e-4
    power: Rate = 0.9
    floor: Weight = 1e-4
    auxiliary: Weight = 0.4
    clip: Rate | None = None
    seed: Count = 0
    threads: Positive = 1
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: Positive = 1
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _falling(self) -> "Training":
        if self.floor > self.learning_rate:
            raise ValueError(f"'floor' ({self.floor:g}) must not exceed 'learning_rate' ({self.learning_rate:g})")
        return self


class Outside(shared.Outside):
    """`mean` and `std` are what its pixels in [0, 1] are normalised with; the data set's own by default."""

    network: Network
    mean: list[float] | None = None
    std: list[Rate] | None = None

    @model_validator(mode="after")
    def _one_file(self) -> "Outside":
        if self.network.encoder.weights is not None:
            raise ValueError("'file' holds all weights: 'network.encoder' takes no 'weights' of its own")
        return self


class Teacher(shared.Teacher):
    """Either `network` and `training`, or `from` (an existing model)."""

    task: Literal["segmentation"]
    network: Network | None = None
    training: Training = Training()
    outside: Outside | None = Field(default=None, alias="from")

    @model_validator(mode="after")
    def _trained_or_taken(self) -> "Teacher":
        if (self.network is None) == (self.outside is None):
            raise ValueError("needs either 'network' (it is trained here) or 'from' (an existing model)")
        if self.outside is not None and ("training" in self.model_fields_set or self.start != "none"):
            raise ValueError("takes neither 'training' nor 'start': the model of 'from' is taken as it is")
        return self


class AnyStudent(shared.Student):
    task: Literal["segmentation"]
    network: Network
    training: Training = Training()


class Alone(AnyStudent):
    """No teacher: the task's own objective."""

    method: Literal["alone"]
    teacher: Literal["none"]


class KD(AnyStudent, shared.KD):
    """Soft labels of every pixel at `temperature`; `alpha` is their share of the loss."""

    method: Literal["kd"]
    temperature: Rate = 4.0
    alpha: Share = 0.5


class Pair(Section):
    """The same place of two encoders, `last` or `stage1`, `stage2`, ...: what the student's is compared with."""

    student: Place = "last"
    teacher: Place = "last"


Pairs = Annotated[list[Pair], Field(min_length=1)]


class Noise(Section):
    """`std: 0` is the generator without noise, whatever mode and kind say. `shared`: one map for all channels;
    `independent`: one per channel.
    """

    mode: Literal["shared", "independent"] = "shared"
    kind: Literal["gaussian", "uniform", "laplace"] = "gaussian"
    std: Weight = 1.0


class GDD(AnyStudent):
    """Channel-wise KL between the teacher's feature maps and those generated from the student's noisy ones.

    `weight` goes with the sum over `places`, `logits` with the same loss on class logits. `inherit` starts the student
    with the teacher's weights outside the encoder, where they fit. `form` chooses between equal ways to compute it:
    `plain`, `fast`, or whichever pays (`auto`).
    """

    method: Literal["gdd"]
    weight: Weight = 5.0
    temperature: Rate = 4.0
    noise: Noise = Noise()
    places: Pairs = [Pair()]
    logits: Weight = 0.0
    inherit: bool = False
    form: Literal["auto", "plain", "fast"] = "auto"


class CWD(AnyStudent):
    """Channel-wise KL of logits, or (`compare: features`) of the maps of `places` behind an align layer.

    On features `weight` is usually 35 to 40.
    """

    method: Literal["cwd"]
    compare: Literal["logits", "features"] = "logits"
    weight: Weight = 3.0
    temperature: Rate = 4.0
    places: Pairs = [Pair()]

    @model_validator(mode="after")
    def _places_of_features(self) -> "CWD":
        if self.compare == "logits" and "places" in self.model_fields_set:
            raise ValueError("'places' are those of features: with 'compare: logits' there are none")
        return self


class MGD(AnyStudent):
    """Squared error between the teacher's feature maps and those generated from the student's masked ones.

    The error is summed over channels and positions: keep `weight` * channels * height * width of the map near 168.
    """

    method: Literal["mgd"]
    weight: Weight = 2e-5
    masked: Share = 0.75
    places: Pairs = [Pair()]


Student = Annotated[Alone | KD | GDD | CWD | MGD, Field(discriminator="method")]


class Export(shared.Export):
    task: Literal["segmentation"]
    tolerance: Rate = 1e-3
    threads: Positive = 1


class Task(shared.Task):
    """What holds for the whole task. `batch` and `threads` are those of evaluation.

    `boundary` is how far, in pixels, a boundary may be off and still count in the boundary F-score. The robustness
    figures repeat the evaluation with these strengths: `noise` is the standard deviation that is added to pixels in
    [0, 1], `blur` the standard deviation of a Gaussian in pixels, `darkness` what pixels are multiplied with.
    """

    batch: Positive = 16
    threads: Positive = 1
    boundary: Positive = 2
    noise: Strengths = [0.05, 0.1, 0.2]
    blur: Strengths = [0.75, 1.5, 3.0]
    darkness: Annotated[list[Annotated[Real, Field(gt=0, lt=1)]], Field(min_length=3, max_length=3)] = [0.6, 0.4, 0.2]


class Gates(shared.Gates):
    """`metric` is what selects and what is compared."""

    metric: Literal["miou", "pixel_accuracy"] = "miou"


def conflicts(
    model: Teacher | AnyStudent, dataset: Dataset, teacher: shared.Teacher | shared.Student | None
) -> list[tuple[str, str]]:
    """Contradictions between a model, its data set and its teacher, as (field of the model, what is wrong)."""
    crop = model.training.augment.crop
    if crop is not None and (crop[0] > dataset.image_size[0] or crop[1] > dataset.image_size[1]):
        return [
            (
                "training.augment.crop",
                f"must fit into the images, datasets.{model.dataset}.image_size = {dataset.image_size}, got {crop}",
            )
        ]
    return []
