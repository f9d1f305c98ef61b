"""Text as a training task: tokens with one label, cross-entropy, AdamW; and masked language modelling for teachers."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from data import text as data
from data.errors import UserError
from data.files import expand_path
from data.splits import TRAIN
from models import text as models
from models.artifacts import Description, read_outside_state
from stages.parameters.text import LGTM, AnyStudent, Bert, Initial, Outside, Teacher, Training
from stages.training import AdamW, Context, Method, Run, Stream, Task, Views, derive_seed
from stages.training.existing import begin_with, load_weights, require_same_question

Taught = tuple[nn.Module, Description]
HEAD = ("classifier.",)  # what depends on the classes
# Of the tokens that are asked for, those that are shown as the mask, and those that are shown as any other token.
HIDDEN, REPLACED = 0.8, 0.1


class Text(Task):
    """Texts, or pairs, with one label each. Teacher and student see the same tokens.

    Args:
        prepared: the prepared data set. network: of the student.
        teacher: a trained network and its description, or None.
        hold_out: whether the held-out split is kept out of training.
        masked: the share of tokens that the network learns to find (`pretraining`); None: it learns the labels.
        trains: whether batches will be drawn.

    Raises:
        UserError: teacher and data set differ in classes, length or vocabulary, or there are too few samples for a
            batch.
    """

    student: models.Bert

    def __init__(
        self,
        prepared: Path,
        network: Bert,
        training: Training,
        run: Run,
        teacher: Taught | None = None,
        hold_out: bool = False,
        masked: float | None = None,
        trains: bool = True,
    ) -> None:
        description = data.describe(prepared)
        kept = ("classes", "length", "vocabulary", "pad", "separator", "tokenizer_sha256", "pair")
        self.network = network.model_dump(mode="json")
        self.interface = {name: description[name] for name in kept}
        self.source = description["source"]
        self.mask, self.masked = description["mask"], masked
        self.seed, self.clip = training.seed, training.clip
        self._training = training
        self._run = run
        self._pad = description["pad"]
        parts = {"train": (TRAIN,) if hold_out else (TRAIN, data.HELD_OUT)}
        if hold_out:
            parts["held_out"] = (data.HELD_OUT,)
        self._parts = {name: _with_rows(prepared, *splits) for name, splits in parts.items()}
        self._validation = data.load(prepared, "validation")[1:]
        torch.manual_seed(derive_seed(training.seed, "weights"))
        self.student = self._place(models.build({"network": self.network, "interface": self.interface}))
        self.teacher = None
        if teacher is not None:
            require_same_question(teacher[1], description, prepared, ("classes", "length", "pair", "tokenizer_sha256"))
            self.teacher = self._place(teacher[0])
        self.steps = self.steps_per_epoch = 0
        if trains:
            for name, stream in self.streams().items():
                try:
                    stream.batches(run.world)
                except ValueError as error:
                    raise UserError(f"{error} ({prepared}, {name} samples) · lower training.batch") from None
            self.steps_per_epoch = self.streams()["train"].batches(run.world)
            self.steps = training.epochs * self.steps_per_epoch

    def _place(self, network: nn.Module) -> Any:
        return network.to(self._run.device, self._run.dtype)

    def pretraining(self) -> Method | None:
        return None if self.masked is None else MaskedLanguageModel(self, self._run)

    def streams(self) -> dict[str, Stream]:
        return {name: Stream(arrays, self._training.batch) for name, arrays in self._parts.items()}

    def views(self, context: Context) -> Views:
        return self._draw(context, "train")

    def held_out(self, context: Context) -> Views:
        return self._draw(context, "held_out") if "held_out" in self._parts else super().held_out(context)

    def _draw(self, context: Context, stream: str) -> Views:
        tokens, labels, rows = context.draw(stream)
        tokens = data.trim(tokens, self._pad)
        return Views(tokens, tokens, labels, rows)

    def objective(self, output: models.Output, target: Tensor) -> Tensor:
        return cross_entropy(output.logits, target)

    def logits(self, output: models.Output) -> Tensor:
        return output.logits

    def features(self, network: nn.Module) -> Mapping[str, int]:
        return cast(models.Bert, network).features

    def optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        settings = self._training
        return AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def schedule(self, steps: int, learning_rate: float | None = None) -> Callable[[int], float]:
        peak, rise = learning_rate or self._training.learning_rate, round(self._training.warmup * steps)

        def rate(count: int) -> float:
            if count < rise:
                return peak * (count + 1) / rise
            return peak * (steps - count) / max(1, steps - rise)

        return rate

    def monitor(self, network: nn.Module) -> Mapping[str, float]:
        if self.masked is not None:
            return {}  # the network's classifier is not trained
        tokens, labels = self._validation
        right, loss = 0, 0.0
        with torch.inference_mode():
            for part, truth in zip(tokens.split(250), labels.split(250), strict=True):
                logits = network(data.trim(part, self._pad).to(self._run.device)).logits.cpu()
                right += int((logits.argmax(1) == truth).sum())
                loss += F.cross_entropy(logits.double(), truth, reduction="sum").item()
        return {"accuracy": right / len(labels), "cross_entropy": loss / len(labels)}


def _with_rows(prepared: Path, *splits: str) -> list[Tensor]:
    """Tokens, labels and rows of the manifest."""
    _, tokens, labels = data.load(prepared, *splits)
    return [tokens, labels, torch.from_numpy(data.rows(prepared, *splits))]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of logits (B, classes) and labels (B,); a scalar in float32, or wider if the logits are."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


class MaskedLanguageModel(Method):
    """An encoder learns to find tokens that it is not shown; its classifier stays at zero.

    Source: Devlin et al. 2019, "BERT", section 3.1: of the tokens asked for, 80 % are shown as the mask, 10 % as any
    other token, and 10 % as they are. The head (linear layer, GELU, LayerNorm, the embeddings again as decoder) exists
    in training only; with several processes each takes the mean over its own tokens.
    """

    def __init__(self, task: Text, run: Run) -> None:
        super().__init__()
        self._task = task
        network = task.student
        network.zero_head()
        self.modules = {"student": network, "head": Head(network).to(run.device, run.dtype)}
        self.streams = task.streams()
        task.optimize(self, "student", [*network.parameters(), *self.modules["head"].parameters()])

    def step(self, context: Context) -> Mapping[str, Tensor]:
        tokens = self._task.views(context).student
        interface = self._task.interface
        shown, asked = mask_tokens(
            tokens,
            torch.rand(3, *tokens.shape, generator=context.generator("mask"), device=tokens.device),
            share=self._task.masked or 0.0,
            vocabulary=interface["vocabulary"],
            mask=self._task.mask,
            kept=(interface["pad"], interface["separator"]),
        )
        with context.run.autocast():
            found = self.modules["student"](shown).tokens[asked]
            logits = self.modules["head"](found)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens[asked])
        context.update("student", {"task": loss})
        return {"loss/task": loss}


class Head(nn.Module):
    """Features of tokens (N, hidden) to scores (N, vocabulary), through the embeddings of the network itself."""

    def __init__(self, network: models.Bert) -> None:
        super().__init__()
        embeddings = network.embeddings
        self.transform = nn.Sequential(
            nn.Linear(embeddings.embedding_dim, embeddings.embedding_dim),
            nn.GELU(),
            nn.LayerNorm(embeddings.embedding_dim),
        )
        self.bias = nn.Parameter(torch.zeros(embeddings.num_embeddings))
        self._embeddings = [embeddings]  # in a list: the weights stay the network's

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(self.transform(features), self._embeddings[0].weight, self.bias)


def mask_tokens(
    tokens: Tensor, uniform: Tensor, *, share: float, vocabulary: int, mask: int, kept: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """What a masked language model is shown (B, L), and which tokens it is asked for, (B, L) bool; at least one.

    Args:
        tokens: (B, L) int64. uniform: (3, B, L) in [0, 1): which are asked for, how they are shown, and as what.
        share: of the tokens that are asked for. kept: tokens that are never asked for nor shown instead of others; the
            first of each text is never asked for either.
    """
    ends = torch.tensor(kept, device=tokens.device)
    free = ~torch.isin(tokens, ends)
    free[:, 0] = False
    asked = free & (uniform[0] < share)
    if not asked.any():  # of a few short texts: the one that came nearest
        asked.view(-1)[torch.where(free, uniform[0], 2.0).argmin()] = True
    random = (uniform[2] * vocabulary).long().clamp(max=vocabulary - 1)
    # Padding and segments follow from the tokens: none that means an end may turn up inside a text.
    random = torch.where(torch.isin(random, ends), tokens, random)
    instead = torch.where(uniform[1] < HIDDEN, mask, torch.where(uniform[1] < HIDDEN + REPLACED, random, tokens))
    return torch.where(asked, instead, tokens), asked


def adopt(task: Text, outside: Outside) -> None:
    """Give the task's encoder the weights of an existing one; its classifier becomes zero.

    Raises:
        UserError: no such file, another sha256, or weights that do not fit the network (both shapes are named).
    """
    state = read_outside_state(expand_path(outside.file, "from.file"), outside.sha256)
    _load_encoder(task.student, state, f"{outside.file} does not fit the network {outside.network.model_dump()}")
    task.student.zero_head()


def _load_encoder(network: models.Bert, state: Mapping[str, Tensor], what: str) -> None:
    """All of the encoder's weights; the classifier keeps its own."""
    renamed = {models.Bert.own_key(key): value for key, value in state.items()}
    head = {key: value for key, value in network.state_dict().items() if key.startswith(HEAD)}
    load_weights(network, {**head, **{key: value for key, value in renamed.items() if key is not None}}, what)


def begin_with_layers(network: models.Bert, state: Mapping[str, Tensor], layers: list[int], what: str) -> None:
    """Give a network the embeddings, the pooling layer and some layers of a deeper encoder of its width.

    Args:
        state: of the deeper encoder, with the names of transformers.
        layers: of the deeper encoder, from 0, in the order that they get.
        what: the beginning of the message where they do not fit.

    Raises:
        UserError: there is no such layer, or the weights do not fit (both shapes are named).
    """
    prefix = "encoder.layer."
    plain = {key.removeprefix("bert."): value for key, value in state.items()}
    deeper = {int(key[len(prefix) :].partition(".")[0]) for key in plain if key.startswith(prefix)}
    if missing := [layer for layer in layers if layer not in deeper]:
        raise UserError(f"{what}: it has no layer {missing[0]}, only 0 to {max(deeper, default=-1)}")
    chosen = {key: value for key, value in plain.items() if not key.startswith(prefix)}
    for place, layer in enumerate(layers):
        start = f"{prefix}{layer}."
        chosen |= {
            f"{prefix}{place}.{key[len(start) :]}": value for key, value in plain.items() if key.startswith(start)
        }
    _load_encoder(network, chosen, what)


def _begin(task: Text, initial: Initial) -> None:
    """What `initial` of a student says."""
    if initial.file is None:
        own = task.taught_by().state_dict()
        state: Mapping[str, Tensor] = {key.removeprefix("encoder."): value for key, value in own.items()}
        what = "the teacher does not fit `initial`"
    else:
        state = read_outside_state(expand_path(initial.file, "initial.file"), str(initial.sha256))
        what = f"{initial.file} does not fit `initial`"
    begin_with_layers(task.student, state, initial.layers, what)


def for_teacher(entry: Teacher, prepared: Path, run: Run, start: Taught | None = None) -> Text:
    """The task as a teacher meets it, with the weights of another or of an existing encoder where one is named."""
    outside = entry.outside
    if outside is not None:
        task = Text(prepared, outside.network, entry.training, run, trains=False)
        adopt(task, outside)
        return task
    masked = entry.masked if entry.objective == "mlm" else None
    task = Text(prepared, cast(Bert, entry.network), entry.training, run, masked=masked)
    if start is not None:
        require_same_question(start[1], data.describe(prepared), prepared, ("tokenizer_sha256",), "start")
        begin_with(task.student, start, task.interface["classes"], HEAD)
    return task


def for_student(entry: AnyStudent, prepared: Path, run: Run, teacher: Taught | None) -> Text:
    """The task as a student meets it, with the teacher it names and the weights it begins with."""
    hold_out = isinstance(entry, LGTM) and entry.holds_out
    task = Text(prepared, entry.network, entry.training, run, teacher, hold_out)
    if entry.initial is not None:
        _begin(task, entry.initial)
    return task
