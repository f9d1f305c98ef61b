"""params.yaml for the task `policy`, with every default of that task."""

from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from stages.parameters import shared
from stages.parameters.shared import Count, Positive, Rate, Real, Section, Weight, Whole

Held = Annotated[Real, Field(gt=0, lt=1)]
Dropout = Annotated[Real, Field(ge=0, lt=1)]


class Split(Section):
    """Shares of the episodes that are held out, of every way that they took where it is known."""

    validation: Held = 0.1
    test: Held = 0.1
    seed: Count = 0


class Demonstrations(Section):
    """How demonstrations are made: `episodes` of each way, all different.

    `noise` is the standard deviation, in metres, of where a path passes a gap, from the middle of it.
    """

    episodes: Positive
    noise: Weight = 0.014
    seed: Count = 0


class Keys(Section):
    """What the arrays of a source are called. `mode` is the way that an episode took, where that is known."""

    observation: str = "observation"
    action: str = "action"
    episode_ends: str = "episode_ends"
    mode: str | None = None


class Expectation(Section):
    """What validation demands of the prepared data, beyond what holds for every data set.

    `shortest` and `longest` are lengths of episodes in steps. `largest_action` is the largest absolute value of any
    coordinate, `largest_change` that of an observation between two steps, both in the data's own units.
    """

    episodes: Positive | None = None
    modes: Positive | None = None
    shortest: Annotated[Whole, Field(ge=2)] = 2
    longest: Positive | None = None
    largest_action: Rate | None = None
    largest_change: Rate | None = None


class Dataset(shared.Dataset):
    """Demonstrations: episodes of observations and actions.

    `format: generated` makes them from the rules of `environment`. `arrays` reads one `.npz` (`file`) with all steps of
    all episodes one after the other, and where each episode ends; `zarr` reads the same out of a replay buffer
    (`folder`), where they lie under `data/` and `meta/`.
    """

    task: Literal["policy"]
    encoder: Literal["none"]
    format: Literal["generated", "arrays", "zarr"]
    environment: Literal["avoiding", "pusht", "none"]
    demonstrations: Demonstrations | None = None
    file: str | None = None
    folder: str | None = None
    keys: Keys | None = None
    split: Split = Split()
    expect: Expectation = Expectation()

    @model_validator(mode="after")
    def _fields_of_its_format(self) -> "Dataset":
        wanted = {"generated": {"demonstrations"}, "arrays": {"file", "keys"}, "zarr": {"folder", "keys"}}[self.format]
        for name in ("demonstrations", "file", "folder", "keys"):
            if (getattr(self, name) is not None) != (name in wanted):
                raise ValueError(f"format {self.format!r} {'needs' if name in wanted else 'takes no'} {name!r}")
        if self.format == "generated" and self.environment != "avoiding":
            raise ValueError("format 'generated' knows one environment, 'avoiding'")
        if self.split.validation + self.split.test >= 1:
            raise ValueError("'split.validation' and 'split.test' leave nothing to train on")
        return self


class Transformer(Section):
    """A causal transformer over the steps of a window (pre-norm, GELU, learned positions).

    `init_std` is that of the initial weights; null: by the width of what goes into a layer, which small networks that
    train for a short time are better off with.
    """

    name: Literal["transformer"]
    layers: Positive = 4
    heads: Positive = 4
    width: Positive = 72
    attention_dropout: Dropout = 0.1
    dropout: Dropout = 0.1
    init_std: Rate | None = 0.02

    @model_validator(mode="after")
    def _heads_divide(self) -> "Transformer":
        if self.width % self.heads:
            raise ValueError(f"'heads' = {self.heads} has to divide 'width' = {self.width}")
        return self


class Perceptron(Section):
    """Linear layers with an activation between them; `residual`: pairs of hidden layers with a shortcut around each.

    `prelu` is what becomes of `mish` in the official code; `silu` takes a tenth of the time on processors.
    """

    width: Positive
    layers: Count
    residual: bool = False
    activation: Literal["mish", "prelu", "silu"] = "mish"

    @model_validator(mode="after")
    def _pairs(self) -> "Perceptron":
        if self.residual and (self.layers == 0 or self.layers % 2):
            raise ValueError(f"'residual' needs an even number of 'layers', at least two, got {self.layers}")
        return self


class MLP(Perceptron):
    """A perceptron on the observations of a window up to a step, one after the other; of a teacher also on the action.

    A student with 0 `layers` has no trunk: its heads see the observations themselves. With `frequencies` sines and
    cosines of the latest observation, scaled and times each of these, are seen too: what turns on small differences of
    place is learnt much sooner.
    """

    name: Literal["mlp"]
    width: Positive = 256
    layers: Count = 2
    dropout: Dropout = 0.0
    frequencies: list[Rate] = []


Backbone = Annotated[Transformer | MLP, Field(discriminator="name")]


class Network(Section):
    """What holds for teachers and students. `window` is the number of observations that they see at a time.

    `goals` observations come before them and say what is wanted; while training, the last ones of the same episode.
    """

    window: Positive = 5
    goals: Count = 0
    backbone: Backbone


class DDPM(Network):
    """Predicts the noise in actions: `steps` noise levels of the cosine schedule, and as many calls per action."""

    name: Literal["ddpm"]
    steps: Positive = 8


class BESO(Network):
    """A denoiser with Karras preconditioning: `steps` calls per action, from noise `sigma_max` down to `sigma_min`.

    `rho` bends the levels in between; `spread` is that of the log-logistic distribution of levels in training.
    """

    name: Literal["beso"]
    sigma_min: Rate = 0.1
    sigma_max: Rate = 1.0
    sigma_data: Rate = 0.5
    spread: Rate = 0.5
    sampler: Literal["euler_ancestral", "ddim"] = "euler_ancestral"
    steps: Positive = 8
    rho: Rate = 5.0

    @model_validator(mode="after")
    def _in_order(self) -> "BESO":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"'sigma_min' = {self.sigma_min} has to be below 'sigma_max' = {self.sigma_max}")
        return self


class Mixture(Network):
    """A mixture of Gaussian experts on one trunk: heads for means, covariances and gate.

    `bias` bounds the biases that the experts' means begin with, `init_std` is the standard deviation of each at the
    beginning, `min_std` the floor under the diagonal of its Cholesky factor; all in scaled actions. `gain` is that of
    the orthogonal weights of the heads. A `uniform` gate is not trained.
    """

    name: Literal["mixture"]
    experts: Positive = 8
    covariance: Literal["full", "diagonal"] = "full"
    gate: Literal["learned", "uniform"] = "learned"
    heads: Perceptron = Perceptron(width=512, layers=1)
    gate_head: Perceptron = Perceptron(width=64, layers=2, residual=True)
    gain: Rate = 0.01
    bias: Weight = 1.0
    init_std: Rate = 1.0
    min_std: Rate = 1e-4

    @model_validator(mode="after")
    def _above_the_floor(self) -> "Mixture":
        if self.init_std <= self.min_std:
            raise ValueError(f"'init_std' = {self.init_std} has to be above 'min_std' = {self.min_std}")
        return self


class Training(shared.Training):
    """Adam; AdamW where there is `weight_decay`. The rate falls linearly to 0, or stays (`decay: none`).

    An iteration of a method may have several updates, with a batch of windows each. Every `look_every` iterations the
    network is measured on the validation split.
    """

    iterations: Positive = 40_000
    batch: Positive = 1024
    learning_rate: Rate = 1e-4
    weight_decay: Weight = 0.0
    decay: Literal["linear", "none"] = "linear"
    look_every: Positive = 1000
    clip: Rate | None = None
    seed: Count = 0
    threads: Positive = 1
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: Positive = 1
    precision: Literal["32-true", "64-true", "bf16-mixed"] = "32-true"


class TeacherTraining(Training):
    """`ema`: the moving average of the weights that is kept, 0.995 for 'ddpm' and 0.999 for 'beso' by default."""

    learning_rate: Rate = 5e-4
    decay: Literal["linear", "none"] = "none"
    ema: Dropout | None = None


class Teacher(shared.Teacher):
    """A diffusion policy, trained on the demonstrations."""

    task: Literal["policy"]
    start: Literal["none"]
    network: Annotated[DDPM | BESO, Field(discriminator="name")]
    training: TeacherTraining = TeacherTraining()
    outside: None = None

    @model_validator(mode="after")
    def _has_a_trunk(self) -> "Teacher":
        if isinstance(self.network.backbone, MLP) and not self.network.backbone.layers:
            raise ValueError("0 'layers' in 'network.backbone' are for students, whose heads have layers of their own")
        return self

    @property
    def ema(self) -> float:
        """Of the network, where the training states none (D3IL)."""
        if self.training.ema is not None:
            return self.training.ema
        return 0.995 if isinstance(self.network, DDPM) else 0.999


class AnyStudent(shared.Student):
    task: Literal["policy"]
    network: Mixture
    training: Training = Training()


class Alone(AnyStudent):
    """A mixture density network: the likelihood of the demonstrations, no teacher. Its gate trains the trunk too."""

    method: Literal["alone"]
    teacher: Literal["none"]


class Alternating(AnyStudent):
    """Experts and gate by turns: in an iteration `expert_steps` updates of the one, `gate_steps` of the other.

    `reduction` is that over experts, in both losses. `lr_total` is what the linear decay is stretched over: all
    updates of an optimiser, or so many as there are iterations, as in the official code, after which it stands still.
    """

    expert_steps: Positive = 2
    gate_steps: Positive = 1
    reduction: Literal["sum", "mean"] = "sum"
    lr_total: Literal["updates", "iterations"] = "updates"


class EM(Alternating):
    """Responsibilities of the demonstrations, and experts and gate by weighted likelihood; no teacher."""

    method: Literal["em"]
    teacher: Literal["none"]
    expert_steps: Positive = 1

    @property
    def needs_teacher(self) -> bool:
        return False


Levels = TypeVar("Levels", "Uniform", "Anneal", "Steps")


class Uniform(Section):
    """For 'beso': a level per sample, uniform in [low, high]."""

    kind: Literal["uniform"]
    low: Rate
    high: Rate

    @model_validator(mode="after")
    def _in_order(self) -> "Uniform":
        return _in_order(self)


class Last(Section):
    """For 'beso': the teacher's `sigma_min`, always."""

    kind: Literal["last"]


class Anneal(Section):
    """For 'beso': one level, from `high` down to `low` in a line over so many `iterations`, and `low` from then on."""

    kind: Literal["anneal"]
    low: Rate
    high: Rate
    iterations: Positive

    @model_validator(mode="after")
    def _in_order(self) -> "Anneal":
        return _in_order(self)


class Steps(Section):
    """For 'ddpm': a step of its schedule per sample, uniform among `low` to `high`; both count, and 0 is the first."""

    kind: Literal["steps"]
    low: Count
    high: Count

    @model_validator(mode="after")
    def _in_order(self) -> "Steps":
        return _in_order(self)


def _in_order(levels: Levels) -> Levels:
    if levels.low > levels.high:
        raise ValueError(f"'low' = {levels.low} is above 'high' = {levels.high}")
    return levels


class VDD(Alternating):
    """Variational distillation of a diffusion policy.

    `levels` are the noise levels at which the teacher's score is asked for, `samples` how many actions are drawn of
    each expert. `vp_input: scaled` asks a 'ddpm' for the score of the clean actions; `raw`, as the official code does,
    makes means smaller. `weight` is that of an expert's objective: its probability, or none. `lag` is how many
    iterations the experts in the responsibilities are held for before they are renewed; 0: always the current ones.
    """

    method: Literal["vdd"]
    levels: Annotated[Uniform | Last | Anneal | Steps, Field(discriminator="kind")]
    samples: Positive = 2
    vp_input: Literal["raw", "scaled"] = "raw"
    weight: Literal["gate", "none"] = "gate"
    lag: Count = 0


Student = Annotated[Alone | EM | VDD, Field(discriminator="method")]


class Export(shared.Export):
    task: Literal["policy"]
    tolerance: Rate = 1e-4
    threads: Positive = 1


class Task(shared.Task):
    """What holds for the whole task: closed-loop evaluation, and the threads of evaluation.

    `steps` ends a rollout; null: as many as the environment says. `greedy` takes the likeliest expert instead of
    drawing one. `fewer_calls` are numbers of network calls per action that teachers are run with beside their own.
    """

    rollouts: Positive = 480
    steps: Positive | None = None
    greedy: bool = False
    fewer_calls: list[Positive] = [1]
    seed: Count = 0
    threads: Positive = 1


class Gates(shared.Gates):
    """`metric` is what selects and what is compared."""

    metric: Literal["success", "entropy", "reward"] = "success"


def conflicts(
    model: Teacher | AnyStudent, dataset: Dataset, teacher: shared.Teacher | shared.Student | None
) -> list[tuple[str, str]]:
    """Contradictions between a model, its data set and its teacher, as (field of the model, what is wrong)."""
    if not isinstance(model, VDD) or teacher is None:
        return []  # none, or a name that leads nowhere: said elsewhere
    if not isinstance(teacher, Teacher):
        return [("teacher", f"{model.teacher!r} is no diffusion policy, and has no score to learn from")]
    found, theirs, ours = [], teacher.network, model.network
    if ours.window > theirs.window:
        what = f"{ours.window} is longer than that of the teacher {model.teacher!r}, {theirs.window}"
        found.append(("network.window", what))
    if ours.goals != theirs.goals:
        found.append(("network.goals", f"{ours.goals}, and the teacher {model.teacher!r} has {theirs.goals}"))
    levels = model.levels
    if isinstance(levels, Steps) != isinstance(theirs, DDPM):
        kinds = "'steps'" if isinstance(theirs, DDPM) else "'uniform', 'last' or 'anneal'"
        found.append(("levels.kind", f"{model.teacher!r} is a {theirs.name!r}, which has levels of kind {kinds}"))
    elif not isinstance(levels, Last):
        low, high = (0, theirs.steps - 1) if isinstance(theirs, DDPM) else (theirs.sigma_min, theirs.sigma_max)
        if levels.low < low or levels.high > high:
            what = f"{levels.low} to {levels.high} goes beyond what {model.teacher!r} was trained with, {low} to {high}"
            found.append(("levels", what))
    if model.vp_input == "scaled" and not isinstance(theirs, DDPM):
        found.append(("vp_input", f"'scaled' is for a 'ddpm', and {model.teacher!r} is a {theirs.name!r}"))
    return found
