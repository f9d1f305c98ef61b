"""params.yaml for the task `text`, with every default of that task."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from stages.parameters import shared
from stages.parameters.shared import Count, Positive, Rate, Real, Section, Sha256, Share, Weight, Whole

# Its tasks of one or two sentences; what each is read from stands in data/text.py.
GLUE = Literal["CoLA", "MNLI", "MNLI-mm", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B"]
OpenShare = Annotated[Real, Field(gt=0, lt=1)]


class Files(Section):
    """Of a table: what is trained on, and validation and test where they have files of their own."""

    train: str
    validation: str | None = None
    test: str | None = None


class Columns(Section):
    """Names of a table's columns; `pair` is the second text where there are two."""

    text: str = "text"
    label: str = "label"
    pair: str | None = None


class Split(Section):
    """What is taken from the training file, from every class in proportion.

    `validation` and `test` are numbers of samples, for data without files of their own. `held_out` is the share of what
    is then left that students with a held-out loss do not train on; all other students do, and so do all teachers.
    """

    validation: Positive | None = None
    test: Positive | None = None
    held_out: OpenShare = 0.1
    seed: Count = 0


class Flip(Section):
    """Labels of the training split that are changed on purpose, to see whether they are found."""

    share: OpenShare
    seed: Count = 0


class WordPiece(Section):
    """A vocabulary of so many `pieces`, learnt from the texts that are trained on, held-out ones included.

    `normalise: letters` makes lower-case words of a to z: accents are taken off, and whatever else there is becomes a
    space. `bert` lowers case, takes off accents and keeps punctuation and digits as tokens.
    """

    kind: Literal["wordpiece"]
    pieces: Annotated[Whole, Field(ge=100)] = 4000
    normalise: Literal["letters", "bert"] = "bert"


class Vocabulary(Section):
    """The vocabulary of an existing BERT: `file` of the source, a word piece per line."""

    kind: Literal["vocabulary"]
    file: str
    normalise: Literal["letters", "bert"] = "bert"


class Expectation(Section):
    """What validation demands of the prepared data, beyond what holds for every data set.

    `duplicates` and `truncated` are the largest shares of samples whose text stands there before, in the same split,
    and of texts that are longer than `length`.
    """

    samples: Positive | None = None
    smallest_class: Share = 0.0
    largest_class: Share = 1.0
    duplicates: Share = 0.0
    truncated: Share = 1.0


class Dataset(shared.Dataset):
    """Texts, or pairs of texts, with one label each.

    `format: table` reads a CSV (or, with `separator: tab`, a TSV) whose first line names the columns; `orange` the
    .tab files of Orange, with three lines of header; `glue` a task of GLUE as it is published, in the folder `folder`
    of the source. `length` is the longest input in tokens, what marks its ends included; longer ones are cut.
    `classes` are the labels in order; those of the training file, sorted, by default. `rows` takes so many of the
    training file's rows, from every class in proportion.
    """

    task: Literal["text"]
    encoder: Literal["none"]
    format: Literal["table", "orange", "glue"]
    files: Files | None = None
    columns: Columns = Columns()
    separator: Literal["comma", "tab"] = "comma"
    glue: GLUE | None = None
    folder: str | None = None
    classes: Annotated[list[str], Field(min_length=2)] | None = None
    tokenizer: Annotated[WordPiece | Vocabulary, Field(discriminator="kind")]
    length: Annotated[Whole, Field(ge=8, le=512)] = 128
    rows: Positive | None = None
    split: Split = Split()
    flip: Flip | None = None
    metric: Literal["accuracy", "macro_f1", "f1", "matthews", "spearman"] = "accuracy"
    expect: Expectation = Expectation()

    @model_validator(mode="after")
    def _fields_of_its_format(self) -> "Dataset":
        if self.format == "glue":
            if self.glue is None or self.folder is None:
                raise ValueError("format 'glue' needs 'glue' (the task) and 'folder' (of the source, with its TSVs)")
            if self.files is not None or self.classes is not None or "columns" in self.model_fields_set:
                raise ValueError("format 'glue' takes no 'files', 'columns' and 'classes': the task says what they are")
            if self.split.test is not None:
                raise ValueError("format 'glue' takes no 'split.test': the published dev split is the test split")
        else:
            if self.glue is not None or self.folder is not None:
                raise ValueError(f"format {self.format!r} takes no 'glue' and no 'folder'")
            if self.files is None:
                raise ValueError(f"format {self.format!r} needs 'files' ('train' at least)")
            for name in ("validation", "test"):
                if (getattr(self.files, name) is None) == (getattr(self.split, name) is None):
                    raise ValueError(f"needs either 'files.{name}' or 'split.{name}', how many are taken from 'train'")
        if self.format == "glue" and self.split.validation is None:
            raise ValueError("format 'glue' needs 'split.validation': how many are taken from the training file")
        if self.format != "table" and "separator" in self.model_fields_set:
            raise ValueError(f"format {self.format!r} takes no 'separator': its columns are separated by tabs")
        if (self.metric == "spearman") != (self.glue == "STS-B"):
            raise ValueError("metric 'spearman' is for scores, and goes with the GLUE task STS-B")
        several = len(self.classes or ()) > 2 or (self.glue or "").startswith("MNLI")
        if self.metric == "f1" and several:
            raise ValueError("metric 'f1' is for two classes: 'macro_f1' is its mean over several")
        if self.flip is not None and self.glue == "STS-B":
            raise ValueError("'flip' changes labels, and STS-B has scores")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("'classes' names a class twice")
        return self


class Bert(Section):
    """A BERT encoder of `layers` layers, and a classifier on its pooled first token.

    `positions` is the longest input that it could take, the data set's `length` by default; weights from elsewhere
    fix it. `intermediate` is 4 * `hidden` by default.
    """

    name: Literal["bert"]
    layers: Positive
    hidden: Positive
    heads: Positive
    intermediate: Positive | None = None
    positions: Positive | None = None
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> "Bert":
        if self.hidden % self.heads:
            raise ValueError(f"'hidden' = {self.hidden} must be a multiple of 'heads' = {self.heads}")
        return self


class Training(shared.Training):
    """AdamW as LGTM's official code has it; the rate rises over `warmup` (a share of all steps) and falls to 0, in
    straight lines.
    """

    epochs: Positive = 6
    batch: Positive = 32
    learning_rate: Rate = 5e-5
    weight_decay: Weight = 0.0
    warmup: Share = 0.0
    clip: Rate | None = None
    seed: Count = 0
    threads: Positive = 1
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: Positive = 1
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"


class Outside(shared.Outside):
    """Weights of a BERT encoder, with the names that transformers gives them; a classifier is not among them."""

    network: Bert


class Teacher(shared.Teacher):
    """`objective: task` trains on labels, `mlm` on masked tokens, its classifier left at zero; `none` takes an existing
    encoder (`from`) as it is. `start` names another teacher, whose weights it begins with. Texts that students hold out
    are among those that teachers train on.

    `masked` is the share of tokens that `mlm` asks for.
    """

    task: Literal["text"]
    objective: Literal["none", "mlm", "task"]
    network: Bert | None = None
    masked: OpenShare = 0.15
    training: Training = Training()
    outside: Outside | None = Field(default=None, alias="from")

    @property
    def pretrained(self) -> bool:
        return self.objective != "task"

    @model_validator(mode="after")
    def _trained_or_taken(self) -> "Teacher":
        if (self.network is None) == (self.outside is None):
            raise ValueError("needs either 'network' (it is trained here) or 'from' (existing weights)")
        if "masked" in self.model_fields_set and self.objective != "mlm":
            raise ValueError("'masked' goes with objective 'mlm'")
        if (self.objective == "none") != (self.outside is not None):
            raise ValueError("'from' goes with objective 'none'; to train it further, name it as another's 'start'")
        if self.outside is not None and ("training" in self.model_fields_set or self.start != "none"):
            raise ValueError("takes neither 'training' nor 'start': the weights of 'from' are taken as they are")
        return self


class Initial(Section):
    """What a student begins with: embeddings and the given layers, in their order, of its teacher or of a `file`."""

    layers: Annotated[list[Count], Field(min_length=1)]
    file: str | None = None
    sha256: Sha256 | None = None
    origin: shared.Origin | None = None

    @model_validator(mode="after")
    def _pinned(self) -> "Initial":
        if (self.file is None) != (self.sha256 is None) or (self.origin is not None and self.file is None):
            raise ValueError("'file' and 'sha256' go together, and 'origin' with them")
        return self


class AnyStudent(shared.Student):
    """`initial` are weights to begin with; random ones by default."""

    task: Literal["text"]
    network: Bert
    initial: Initial | None = None
    training: Training = Training()

    @property
    def origins(self) -> list[shared.Origin]:
        return [self.initial.origin] if self.initial is not None and self.initial.origin is not None else []

    @model_validator(mode="after")
    def _layers_fit(self) -> "AnyStudent":
        if self.initial is not None and len(self.initial.layers) != self.network.layers:
            raise ValueError(
                f"'initial.layers' names {len(self.initial.layers)} layers, 'network.layers' is {self.network.layers}"
            )
        return self


class Alone(AnyStudent):
    """No teacher: the task's own objective."""

    method: Literal["alone"]
    teacher: Literal["none"]

    @model_validator(mode="after")
    def _no_teacher_to_begin_with(self) -> "Alone":
        if self.initial is not None and self.initial.file is None:
            raise ValueError("'initial' needs 'file': there is no teacher to take layers from")
        return self


class KD(AnyStudent, shared.KD):
    """Soft labels at `temperature`; `alpha` is their share of the loss."""

    method: Literal["kd"]
    temperature: Rate = 2.0
    alpha: Share = 0.9


class Relative(Section):
    """An influence term of `ratio` times the norm of the teacher's own gradient, measured every `every` steps and held
    in between; 1 is exact.
    """

    ratio: Rate
    every: Positive = 1


def _kind(value: object) -> str:
    return "word" if isinstance(value, str) else "mapping" if isinstance(value, dict | Relative) else "number"


# Told apart by their type, so that a mistake is one mistake.
Scale = Annotated[
    Annotated[Literal["teacher_lr", "student_lr"], Tag("word")]
    | Annotated[Weight, Tag("number")]
    | Annotated[Relative, Tag("mapping")],
    Discriminator(_kind),
]


class LGTM(AnyStudent):
    """Teacher and student learn together; the teacher's gradient has a term that fits its soft labels to the student.

    The student's loss is `alpha` soft labels at `temperature` + (1 - alpha) labels, the teacher's `teacher_alpha` soft
    labels of the student + (1 - teacher_alpha) labels. `teacher_learning_rate` is the student's by default.
    `zero_heads` sets both classifiers to zero before they learn, as the official code does: the teacher is an encoder
    that has not learnt the task. The influence term is multiplied by `influence_scale`: a learning rate, a number, or
    relative to the other term; with 0 the method is online distillation (ProKT).
    `influence_loss` is the loss whose influence counts: of the teacher (official code) or of the student (the true
    bilevel direction). `influence_form` is a central difference of `influence_radius`, or the exact derivative.
    `dropout: official` draws new masks for every pass and none for the influence; `shared` has one mask for all passes
    over a batch, which takes fewer of them. `hold_out` keeps the held-out split out of training; where the influence
    needs it, by default.
    """

    method: Literal["lgtm"]
    temperature: Rate = 1.0
    alpha: Share = 1.0
    teacher_alpha: Share = 0.4
    teacher_learning_rate: Rate | None = None
    influence_scale: Scale = "teacher_lr"
    influence_loss: Literal["teacher_kl", "student_kl"] = "teacher_kl"
    influence_form: Literal["difference", "exact"] = "difference"
    influence_radius: Rate = 0.01
    dropout: Literal["official", "shared"] = "official"
    zero_heads: bool = True
    hold_out: bool | None = None

    @property
    def holds_out(self) -> bool:
        """Whether the held-out split is kept out of training."""
        return self.influence_scale != 0 if self.hold_out is None else self.hold_out

    @model_validator(mode="after")
    def _something_to_hold_out_for(self) -> "LGTM":
        if self.influence_scale != 0 and self.hold_out is False:
            raise ValueError("'hold_out: false' goes with 'influence_scale: 0' only: influence is on held-out samples")
        return self


Student = Annotated[Alone | KD | LGTM, Field(discriminator="method")]


class Export(shared.Export):
    task: Literal["text"]
    tolerance: Rate = 1e-4
    threads: Positive = 1


class Task(shared.Task):
    """What holds for the whole task. `batch` and `threads` are those of evaluation."""

    batch: Positive = 256
    threads: Positive = 1


class Gates(shared.Gates):
    """`metric` is what selects and what is compared."""

    metric: Literal["accuracy", "macro_f1", "f1", "matthews", "spearman"] = "accuracy"


def conflicts(
    model: Teacher | AnyStudent, dataset: Dataset, teacher: shared.Teacher | shared.Student | None
) -> list[tuple[str, str]]:
    """Contradictions between a model, its data set and its teacher, as (field of the model, what is wrong)."""
    found = []
    outside = isinstance(model, Teacher) and model.outside is not None
    network = model.outside.network if isinstance(model, Teacher) and model.outside is not None else model.network
    if network is not None and network.positions is not None and network.positions < dataset.length:
        field = "from.network.positions" if outside else "network.positions"
        found.append(
            (
                field,
                f"must be at least the length of its texts, datasets.{model.dataset}.length = {dataset.length}, "
                f"got {network.positions}",
            )
        )
    learnt = isinstance(teacher, Teacher) and not teacher.pretrained
    if isinstance(model, KD) and isinstance(teacher, Teacher) and not learnt:
        found.append(
            (
                "teacher",
                f"{model.teacher!r} has objective {teacher.objective!r}: it has not learnt the task, and its answers "
                "would teach nothing; name one with objective 'task'",
            )
        )
    if isinstance(model, LGTM) and learnt and "zero_heads" not in model.model_fields_set:
        found.append(
            (
                "zero_heads",
                f"teacher {model.teacher!r} has learnt the task, and would lose its classifier; set it to false, "
                "or to true if that is meant",
            )
        )
    return found
