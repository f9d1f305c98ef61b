"""Text as a training task: batches and their rows, the rate, masked tokens, and weights from elsewhere."""

import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from data import text as data
from data.errors import UserError
from data.files import sha256
from models.artifacts import load_model, save_model
from models.text import Bert
from stages.distill import alone
from stages.parameters import text as schema
from stages.teach.text import (
    Head,
    MaskedLanguageModel,
    Text,
    begin_with_layers,
    cross_entropy,
    for_student,
    for_teacher,
    mask_tokens,
)
from stages.training import AdamW, Context, Run, Stopped, train
from stages.training.fit import describe

sys.path.insert(0, str(Path(__file__).parent))
import text_project as project


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project.write(tmp_path_factory.mktemp("text"))


@pytest.fixture
def run() -> Run:
    return Run(schema.Training.model_validate(project.TRAINING))


def state_of(network: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def theirs(network: Bert, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a network's encoder under the names of transformers."""
    return {f"{prefix}{key}": value.clone() for key, value in network.encoder.state_dict().items()}


def steps(learner: Any, run: Run, count: int, seed: int = 0) -> list[dict[str, float]]:
    context, found = Context(learner, run, seed), []
    for name, module in learner.modules.items():
        module.train(name not in learner.frozen)
    for step in range(count):
        context.begin(step)
        found.append({name: value.item() for name, value in learner.step(context).items()})
    return found


# Batches


@pytest.mark.parametrize("hold_out", [False, True])
def test_a_batch_is_so_many_samples_with_their_rows(prepared: Path, run: Run, hold_out: bool) -> None:
    entry = project.student(training={"batch": 4})
    task = Text(prepared, entry.network, entry.training, run, hold_out=hold_out)
    manifest = pd.read_csv(prepared / "manifest.csv")
    sizes = manifest["split"].value_counts()
    wanted = {"train": sizes["train"], "held_out": sizes["held_out"]}
    if not hold_out:
        wanted = {"train": sizes["train"] + sizes["held_out"]}
    assert {name: stream.size for name, stream in task.streams().items()} == wanted
    assert task.steps_per_epoch == wanted["train"] // 4
    assert task.steps == 2 * task.steps_per_epoch
    learner = alone.Learner(task, entry, run)
    context = Context(learner, run, 0)
    tokenizer = data.read_tokenizer(prepared / "tokenizer.json")
    widths, seen = set(), []
    for step in range(task.steps_per_epoch):
        context.begin(step)
        for name, draw in (("train", task.views), ("held_out", task.held_out))[: 1 + hold_out]:
            views = draw(context)
            assert views.rows is not None
            rows = views.rows.tolist()
            parts = {"train": ["train", "held_out"][: 2 - hold_out], "held_out": ["held_out"]}[name]
            assert manifest["split"].iloc[rows].isin(parts).all()
            assert views.student is views.teacher
            assert views.target.tolist() == manifest["label"].iloc[rows].tolist()
            for tokens, written in zip(views.student.tolist(), manifest["text"].iloc[rows], strict=True):
                ids = tokenizer.encode(written).ids
                assert tokens == ids + [task.interface["pad"]] * (len(tokens) - len(ids))
            assert views.student.shape == (4, manifest["length"].iloc[rows].max()), "trimmed to its longest"
            if name == "train":
                seen += rows
                widths.add(views.student.shape[1])
    assert len(set(seen)) == len(seen) == 4 * task.steps_per_epoch
    assert len(widths) > 1
    if not hold_out:
        with pytest.raises(UserError, match="needs samples that are held out of training"):
            task.held_out(context)


@pytest.mark.parametrize(
    ("fields", "hold_out"),
    [
        ({}, True),
        ({"influence_scale": 0.5}, True),
        ({"influence_scale": 0}, False),
        ({"influence_scale": 0, "hold_out": True}, True),
        ({"influence_scale": {"ratio": 0.1}}, True),
    ],
)
def test_who_needs_held_out_samples_has_them(prepared: Path, run: Run, fields: dict[str, Any], hold_out: bool) -> None:
    teacher = project.trained(prepared)
    task = for_student(project.student("lgtm", **fields), prepared, run, teacher)
    assert ("held_out" in task.streams()) == hold_out
    assert "held_out" not in for_student(project.student("kd"), prepared, run, teacher).streams()
    assert "held_out" not in for_teacher(project.teacher(), prepared, run).streams()


def test_the_interface_says_what_goes_in(prepared: Path, run: Run) -> None:
    description = data.describe(prepared)
    task = for_student(project.student(), prepared, run, None)
    assert task.interface == {
        name: description[name]
        for name in ("classes", "length", "vocabulary", "pad", "separator", "tokenizer_sha256", "pair")
    }
    assert task.source == project.PROVENANCE
    assert task.features(task.student) == {"pooled": 8}


def test_the_seed_of_the_training_decides_the_weights(prepared: Path, run: Run) -> None:
    first, again, other = (
        for_student(project.student(training={"seed": seed}), prepared, run, None).student.state_dict()
        for seed in (0, 0, 1)
    )
    assert same(first, again)
    assert not same(first, other)


# Objective and optimiser


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 2**31))
def test_the_loss_is_the_mean_over_the_batch(batch: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, dtype=torch.float64, generator=generator) * 5
    target = torch.randint(0, classes, (batch,), generator=generator)
    total = sum(
        math.log(sum(math.exp(score) for score in row)) - row[label]
        for row, label in zip(logits.tolist(), target.tolist(), strict=True)
    )
    assert cross_entropy(logits, target).item() == pytest.approx(total / batch, rel=1e-9)


@pytest.mark.parametrize(
    ("given", "computed"), [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")]
)
def test_the_loss_is_wide(given: str, computed: str) -> None:
    loss = cross_entropy(torch.full((2, 4), 300.0).to(getattr(torch, given)), torch.zeros(2).long())
    assert loss.dtype == getattr(torch, computed)
    assert loss.item() == pytest.approx(math.log(4))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.floats(0, 1), st.none() | st.floats(1e-6, 1))
def test_the_rate_rises_and_falls_in_straight_lines(steps: int, warmup: float, own: float | None) -> None:
    task = object.__new__(Text)
    task._training = schema.Training(learning_rate=0.01, warmup=warmup)
    rate = task.schedule(steps, own)
    peak, rise = own or 0.01, round(warmup * steps)
    for count in range(steps):
        wanted = peak * (count + 1) / rise if count < rise else peak * (steps - count) / (steps - rise)
        assert rate(count) == pytest.approx(wanted)
        assert 0 < rate(count) <= peak * (1 + 1e-12)
    assert max(rate(count) for count in range(steps)) == pytest.approx(peak)
    if rise < steps:
        assert rate(steps) == 0


def test_the_optimiser_has_the_settings_of_the_training(prepared: Path, run: Run) -> None:
    entry = project.student(training={"weight_decay": 0.3, "clip": 0.7, "learning_rate": 0.02})
    task = for_student(entry, prepared, run, None)
    learner = alone.Learner(task, entry, run)
    (optimizer,) = learner.optimizers.values()
    assert isinstance(optimizer, AdamW)
    assert optimizer.defaults == {"lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.3}
    assert learner.clip == {"student": 0.7}
    assert learner.schedules["student"](0) == 0.02


def test_it_learns_and_what_is_watched_is_what_is_right(prepared: Path, run: Run) -> None:
    entry = project.student(training={"epochs": 20, "learning_rate": 1e-2})
    task = for_student(entry, prepared, run, None)
    first = task.monitor(task.student.eval())
    steps(alone.Learner(task, entry, run), run, task.steps)
    network = task.student.eval()
    last = task.monitor(network)
    assert last["accuracy"] > first["accuracy"] + 0.2
    _, tokens, labels = data.load(prepared, "validation")
    with torch.inference_mode():
        logits = network(tokens).logits.double()
    right = [int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True)]
    surprise = [-math.log(row.softmax(0)[label]) for row, label in zip(logits, labels, strict=True)]
    assert last == pytest.approx(
        {"accuracy": sum(right) / len(right), "cross_entropy": sum(surprise) / len(surprise)}, rel=1e-5
    )


def test_float64_and_bfloat16_train(prepared: Path) -> None:
    for precision, dtype in (("64-true", torch.float64), ("bf16-mixed", torch.float32)):
        run = Run(schema.Training.model_validate({**project.TRAINING, "precision": precision}))
        for method in ("task", "mlm"):
            entry = project.teacher(method, {"precision": precision})
            task = for_teacher(entry, prepared, run)
            learner = task.pretraining() or alone.Learner(task, entry, run)
            assert all(math.isfinite(value) for each in steps(learner, run, 2) for value in each.values())
            assert {parameter.dtype for parameter in task.student.parameters()} == {dtype}


# Masked tokens


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.floats(0.01, 0.99), st.integers(0, 2**31), st.booleans())
def test_masking_by_hand(lengths: list[int], share: float, seed: int, double: bool) -> None:
    pad, separator, start, mask, vocabulary = 0, 3, 2, 4, 12
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), 12), pad)
    for row, length in enumerate(lengths):
        words = torch.randint(5, vocabulary, (length,), generator=generator)
        tokens[row, : length + 2] = torch.cat([torch.tensor([start]), words, torch.tensor([separator])])
    uniform = torch.rand(3, *tokens.shape, generator=generator, dtype=torch.float64 if double else torch.float32)
    shown, asked = mask_tokens(tokens, uniform, share=share, vocabulary=vocabulary, mask=mask, kept=(pad, separator))
    wanted, hidden = tokens.clone(), torch.zeros_like(asked)
    free = [(row, place) for row, length in enumerate(lengths) for place in range(1, length + 1)]
    chosen = [at for at in free if uniform[0][at] < share] or sorted(free, key=lambda at: float(uniform[0][at]))[:1]
    for at in chosen:
        hidden[at] = True
        if uniform[1][at] < 0.8:
            wanted[at] = mask
        elif uniform[1][at] < 0.9:
            token = int(float(uniform[2][at]) * vocabulary)
            wanted[at] = tokens[at] if token in (pad, separator) else token
    if free:
        assert torch.equal(asked, hidden)
        assert torch.equal(shown, wanted)
        assert asked.any()
    assert ((shown == pad) == (tokens == pad)).all(), "padding follows from the tokens"
    assert ((shown == separator) == (tokens == separator)).all(), "and so do segments"


def test_the_shares_of_masking() -> None:
    """Within six standard errors of 15 % asked for, of these 80 % hidden, 10 % as they are, 10 % any other."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 1000, (400, 500), generator=generator)
    uniform = torch.rand(3, *tokens.shape, generator=generator)
    shown, asked = mask_tokens(tokens, uniform, share=0.15, vocabulary=1000, mask=4, kept=(0, 3))
    count, total = int(asked.sum()), 400 * 499

    def near(found: float, share: float, number: int) -> bool:
        return abs(found / number - share) < 6 * math.sqrt(share * (1 - share) / number)

    assert not asked[:, 0].any()
    assert near(count, 0.15, total)
    assert near(int((shown == 4)[asked].sum()), 0.8, count)
    assert near(int((shown == tokens)[asked].sum()), 0.1, count)
    assert torch.equal(shown[~asked], tokens[~asked])
    others = shown[asked & (shown != 4) & (shown != tokens)]
    assert near(len(others), 0.1, count)
    assert others.float().mean() == pytest.approx(500, abs=25), "from all of the vocabulary"


# A masked language model


def test_a_masked_language_model_learns_what_stands_beside_what(run: Run, tmp_path: Path) -> None:
    prepared = project.write(tmp_path, 200)
    entry = project.teacher("mlm", {"epochs": 15, "learning_rate": 2e-2, "batch": 16})
    task = for_teacher(entry, prepared, run)
    learner = task.pretraining()
    assert isinstance(learner, MaskedLanguageModel)
    losses = [each["loss/task"] for each in steps(learner, run, task.steps)]
    assert losses[0] == pytest.approx(math.log(task.interface["vocabulary"]), rel=0.2)
    assert sum(losses[-20:]) / 20 < 0.75 * sum(losses[:5]) / 5


def test_only_encoder_and_head_are_trained_and_the_classifier_stays_at_zero(prepared: Path, run: Run) -> None:
    """Also with weight decay: nothing pulls at the pooling layer either, which no masked token goes through."""
    task = for_teacher(project.teacher("mlm", {"weight_decay": 0.5}), prepared, run)
    learner = task.pretraining()
    assert learner is not None
    assert learner.student is task.student
    before = {name: state_of(module) for name, module in learner.modules.items()}
    steps(learner, run, 3)
    after = {name: state_of(module) for name, module in learner.modules.items()}
    assert before.keys() == {"student", "head"}
    untouched = {key for key in before["student"] if torch.equal(before["student"][key], after["student"][key])}
    pooling = {key for key in before["student"] if ".pooler." in key}
    assert untouched == {"classifier.weight", "classifier.bias", *pooling}
    assert not any(task.student.state_dict()[f"classifier.{name}"].any() for name in ("weight", "bias"))
    assert not any(torch.equal(before["head"][key], after["head"][key]) for key in before["head"])
    assert before["head"].keys() == {f"transform.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")} | {"bias"}


def test_the_head_looks_words_up_in_the_embeddings_of_the_network(prepared: Path, run: Run) -> None:
    network = for_teacher(project.teacher("mlm"), prepared, run).student
    head, features = Head(network).double(), torch.randn(5, 8, dtype=torch.float64)
    network.double()
    with torch.no_grad():
        head.bias.normal_()
        linear, _, norm = head.transform
        middle = features @ linear.weight.T + linear.bias
        middle = middle * 0.5 * (1 + torch.erf(middle / math.sqrt(2)))
        middle = (middle - middle.mean(1, keepdim=True)) / (middle.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        wanted = (middle * norm.weight + norm.bias) @ network.embeddings.weight.T + head.bias
        torch.testing.assert_close(head(features), wanted)


def test_its_loss_is_that_of_the_tokens_that_are_asked_for(prepared: Path, run: Run) -> None:
    task = for_teacher(project.teacher("mlm", masked=0.4), prepared, run)
    learner = task.pretraining()
    assert learner is not None
    learner.schedules["student"] = lambda count: 0.0
    (found,) = steps(learner, run, 1)
    again = for_teacher(project.teacher("mlm", masked=0.4), prepared, run)
    other = again.pretraining()
    assert other is not None
    context = Context(other, run, 0)
    context.begin(0)
    tokens = again.views(context).student
    uniform = torch.rand(3, *tokens.shape, generator=context.generator("mask"))
    kept = (task.interface["pad"], task.interface["separator"])
    shown, asked = mask_tokens(
        tokens, uniform, share=0.4, vocabulary=task.interface["vocabulary"], mask=task.mask, kept=kept
    )
    scores = learner.modules["head"](task.student.eval()(shown).tokens).log_softmax(-1)
    terms = [-scores[row, place, tokens[row, place]] for row, place in asked.nonzero().tolist()]
    assert found["loss/task"] == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-5)


def test_an_interrupted_masked_language_model_goes_on_to_the_same_bits(
    prepared: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = project.teacher("mlm", network={**project.NETWORK, "dropout": 0.2})

    def trained(folder: str, stop: int | None) -> dict[str, Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        task = for_teacher(entry, prepared, run)
        learner = task.pretraining()
        assert learner is not None
        plain = learner.step

        def step(context: Context) -> Any:
            if stop is not None and context.step == stop:
                raise Stopped(1)
            return plain(context)

        learner.step = step  # type: ignore[method-assign]
        train(learner, run, stage="teach", key="x", steps=task.steps, seed=3, identity={}, checkpoint_seconds=0)
        return {**state_of(learner.student), **state_of(learner.modules["head"])}

    with pytest.raises(Stopped):
        trained("resumed", 7)
    assert list((tmp_path / "resumed").rglob("checkpoint.pt"))
    assert same(trained("resumed", None), trained("whole", None))


def test_the_deployed_network_has_no_head(
    prepared: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = for_teacher(project.teacher("mlm"), prepared, run)
    learner = task.pretraining()
    assert learner is not None
    steps(learner, run, 2)
    assert task.monitor(task.student) == {}, "its classifier is not trained: there is nothing to watch"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/prepared/text").mkdir(parents=True)
    (tmp_path / "data/prepared/text/prepared").symlink_to(prepared)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", learner.student, describe("t", project.teacher("mlm"), task))
    loaded, description = load_model(tmp_path / "model")
    assert same(state_of(loaded), state_of(task.student))
    assert description.recipe["objective"] == "mlm"
    tokens = data.load(prepared, "test")[1]
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).tokens, task.student.eval()(tokens).tokens)
        assert not loaded(tokens).logits.any()


# Existing weights


def outside(file: Path, digest: str | None = None, **network: Any) -> schema.Teacher:
    fields = {"file": str(file), "sha256": digest or sha256(file), "network": {**project.NETWORK, **network}}
    return project.teacher("none", **{"from": fields})


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("old", [False, True])
def test_an_existing_encoder_is_taken_as_it_is(
    prepared: Path, run: Run, tmp_path: Path, prefix: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = project.trained(prepared)[0]
    state = theirs(network, prefix)
    state |= {f"{prefix}embeddings.position_ids": torch.arange(16)[None], "cls.predictions.bias": torch.zeros(5)}
    if old:
        state = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for key, value in state.items()
        }
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    file = tmp_path / "model.safetensors"
    task = for_teacher(outside(Path("$WEIGHTS/model.safetensors"), sha256(file)), prepared, run)
    assert same(theirs(task.student), theirs(network))
    assert not task.student.classifier.weight.any()
    assert not task.student.classifier.bias.any()
    assert task.steps == 0
    assert set(task.monitor(task.student.eval())) == {"accuracy", "cross_entropy"}


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"hidden": 12}, r"encoder.embeddings.word_embeddings.weight: \((\d+), 8\) in the file, \(\1, 12\) in the"),
        ({"positions": 20}, r"position_embeddings.weight: \(16, 8\) in the file, \(20, 8\) in the network"),
        ({"layers": 3}, r"encoder.encoder.layer.2.attention.self.query.weight: missing in the file"),
        ({"layers": 1}, r"encoder.encoder.layer.1.attention.self.key.bias: unknown to the network"),
    ],
)
def test_an_encoder_of_another_shape_is_refused(
    prepared: Path, run: Run, tmp_path: Path, network: dict[str, Any], message: str
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(theirs(project.trained(prepared)[0]), file)
    with pytest.raises(UserError, match=message) as caught:
        for_teacher(outside(file, **network), prepared, run)
    assert f"{file} does not fit the network " in str(caught.value)
    with pytest.raises(UserError, match="is not what is pinned"):
        for_teacher(outside(file, "0" * 64), prepared, run)


# Layers to begin with


def layers_of(state: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    start = f"encoder.encoder.layer.{layer}."
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}


@pytest.mark.parametrize("layers", [[0, 1], [3, 1], [2, 2]])
@pytest.mark.parametrize("source", ["teacher", "file", "file of transformers"])
def test_a_student_begins_with_layers_in_their_order(
    prepared: Path, run: Run, tmp_path: Path, layers: list[int], source: str
) -> None:
    teacher = project.trained(prepared, layers=4)
    initial: dict[str, Any] = {"layers": layers}
    if source != "teacher":
        file = tmp_path / "model.safetensors"
        save_file(theirs(teacher[0], "bert." if "transformers" in source else ""), file)
        initial |= {"file": str(file), "sha256": sha256(file)}
    entry = project.student("kd", initial=initial)
    task = for_student(entry, prepared, run, teacher)
    own, big = state_of(task.student), state_of(teacher[0])
    for place, layer in enumerate(layers):
        assert same(layers_of(own, place), layers_of(big, layer))
    rest = [key for key in own if ".layer." not in key and "classifier" not in key]
    assert len(rest) == 7
    assert all(torch.equal(own[key], big[key]) for key in rest)
    fresh = for_student(project.student("kd"), prepared, run, teacher).student.state_dict()
    assert torch.equal(own["classifier.weight"], fresh["classifier.weight"])
    assert not torch.equal(own["classifier.weight"], big["classifier.weight"])
    assert same(state_of(teacher[0]), big)


def test_layers_that_are_not_there_or_do_not_fit_are_named(prepared: Path, run: Run) -> None:
    teacher = project.trained(prepared, layers=4)
    with pytest.raises(UserError, match="the teacher does not fit `initial`: it has no layer 4, only 0 to 3"):
        for_student(project.student("kd", initial={"layers": [0, 4]}), prepared, run, teacher)
    narrow = {**project.NETWORK, "hidden": 6}
    message = r"the teacher does not fit `initial`:\n  .*weight: \((\d+), 8\) in the file, \(\1, 6\) in the network"
    with pytest.raises(UserError, match=message):
        for_student(project.student("kd", initial={"layers": [0, 1]}, network=narrow), prepared, run, teacher)
    with pytest.raises(UserError, match="x: it has no layer 0, only 0 to -1"):
        begin_with_layers(project.trained(prepared)[0], {}, [0], "x")


# Beginning with another teacher


def test_a_teacher_begins_with_the_weights_of_another(prepared: Path, run: Run) -> None:
    first = project.trained(prepared, "pretrained")
    task = for_teacher(project.teacher(), prepared, run, first)
    assert same(state_of(task.student), state_of(first[0]))
    learner = alone.Learner(task, project.teacher(), run)
    before = state_of(first[0])
    steps(learner, run, 2)
    assert same(before, state_of(first[0])), "the other one stays as it was"
    assert not same(before, state_of(task.student))


def test_with_other_classes_it_keeps_a_classifier_of_its_own(prepared: Path, run: Run) -> None:
    own = for_teacher(project.teacher(), prepared, run).student.state_dict()
    for classes in (["a", "b"], ["corn", "trade", "crude"], list("abcdef")):
        first = project.trained(prepared, changes={"classes": classes})
        found = for_teacher(project.teacher(), prepared, run, first).student.state_dict()
        for key, value in found.items():
            assert torch.equal(value, own[key] if key.startswith("classifier.") else first[0].state_dict()[key])


def test_another_tokenizer_or_shape_is_no_beginning(prepared: Path, run: Run) -> None:
    first = project.trained(prepared, changes={"tokenizer_sha256": "f" * 64})
    with pytest.raises(UserError, match=r"start 'big' and .* 'prepared' differ in tokenizer_sha256: ffff"):
        for_teacher(project.teacher(), prepared, run, first)
    first = project.trained(prepared, hidden=12)
    message = r"`start`: the network of 'big' is another:\n  .*: \((\d+), 12\) in the file, \(\1, 8\) in the network"
    with pytest.raises(UserError, match=message):
        for_teacher(project.teacher(), prepared, run, first)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha256": "f" * 64}, "differ in tokenizer_sha256: ffff"),
        ({"classes": ["a", "b"]}, "differ in classes: 2 against 3 classes"),
        ({"length": 12}, "differ in length: 12 and 16"),
        ({"pair": True}, "differ in pair: True and False"),
    ],
)
def test_a_teacher_of_other_data_is_refused(prepared: Path, run: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"teacher 'big' and the data set 'prepared' {message}"):
        for_student(project.student("kd"), prepared, run, project.trained(prepared, changes=changes))


def test_a_batch_larger_than_the_data_is_refused(prepared: Path, run: Run) -> None:
    sizes = data.describe(prepared)["samples"]
    whole = sizes["train"] + sizes["held_out"]
    with pytest.raises(
        UserError, match=rf"{whole} samples do not fill a batch of 99 .*train samples\) · lower training"
    ):
        for_student(project.student(training={"batch": 99}), prepared, run, None)
    many = project.student("lgtm", {"batch": sizes["held_out"] + 1})
    with pytest.raises(UserError, match=rf"{sizes['held_out']} samples do not fill .*held_out samples\) · lower "):
        for_student(many, prepared, run, project.trained(prepared))
