"""Figures of text against scikit-learn, scipy and loops; batches of sorted texts against one text at a time."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn
from torch import Tensor, nn

from data.files import write_json
from models.artifacts import Description
from models.text import Output, build
from stages.evaluate.result import Result
from stages.evaluate.text import classify, evaluate
from stages.parameters.text import Task

PAD, SEPARATOR, LENGTH, VOCABULARY = 0, 3, 12, 40
SPLIT = ["train"] * 4 + ["held_out"] * 2 + ["validation"] * 17 + ["test"] * 60
BERT = {
    "name": "bert", "layers": 2, "hidden": 16, "heads": 2, "intermediate": 24, "positions": None, "dropout": 0.1,
}  # fmt: skip


class Lookup(nn.Module):
    """Answers from a table: the token in the second place is the row. Notes what it is shown."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor) -> Output:
        self.shapes.append(tuple(tokens.shape))
        return Output(tokens, tokens, self.logits[tokens[:, 1]])


def texts(seed: int, count: int, length: int = LENGTH) -> np.ndarray:
    """(count, length) int32: a start, words, among them what looks like padding, a separator, padding."""
    generator = np.random.default_rng(seed)
    tokens = np.full((count, length), PAD, np.int32)
    for row in range(count):
        words = int(generator.integers(1, length - 1))
        tokens[row, 1 : 1 + words] = generator.choice([PAD, *range(4, VOCABULARY)], words)
        tokens[row, 0], tokens[row, 1 + words] = 2, SEPARATOR
    return tokens


def description(classes: list[str], network: dict[str, Any] | None = None) -> Description:
    interface = {"classes": classes, "length": LENGTH, "vocabulary": VOCABULARY, "pad": PAD, "separator": SEPARATOR}
    return Description("toy", "text", "student", network or {}, interface, {}, {}, None, None, [])


def lively(classes: list[str]) -> nn.Module:
    """A BERT whose answers differ much from text to text; fresh weights hardly tell any apart."""
    torch.manual_seed(0)
    network = build({"network": BERT, "interface": description(classes).interface}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    return network


def write(folder: Path, labels: np.ndarray, metric: str, scores: np.ndarray | None = None) -> np.ndarray:
    """A prepared data set; its texts in the second place are their own rows. Returns the tokens."""
    tokens = texts(0, len(SPLIT))
    tokens[:, 1] = np.arange(len(SPLIT))
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "labels.npy", labels)
    manifest = pd.DataFrame({"id": [f"{row:03d}" for row in range(len(SPLIT))], "split": SPLIT, "text": "NA"})
    if scores is not None:
        manifest["score"] = scores
    manifest.to_csv(folder / "manifest.csv", index=False)
    write_json(folder / "dataset.json", {"metric": metric})
    return tokens


def case(folder: Path, classes: int, metric: str, seed: int = 0, batch: int = 16) -> tuple[Result, dict[str, Any]]:
    """The evaluation of a lookup, and what it was made from on the test split."""
    generator = np.random.default_rng(seed)
    scores = generator.uniform(0, classes - 1, len(SPLIT)).round(1)
    labels = scores.round().astype(np.int64) if metric == "spearman" else generator.integers(0, classes, len(SPLIT))
    logits = generator.normal(size=(len(SPLIT), classes)) + 1.5 * np.eye(classes)[labels]
    write(folder, labels, metric, scores if metric == "spearman" else None)
    network = Lookup(torch.from_numpy(logits)).eval()
    names = [f"c{label}" for label in range(classes)]
    result = evaluate(network, description(names), folder, "test", Task(batch=batch))
    rows = np.flatnonzero(np.array(SPLIT) == "test")
    return result, {"rows": rows, "labels": labels[rows], "logits": logits[rows], "scores": scores[rows]}


@pytest.mark.parametrize(
    ("classes", "metric"),
    [(2, "f1"), (2, "matthews"), (2, "accuracy"), (5, "macro_f1"), (5, "matthews"), (6, "spearman")],
)
def test_every_figure_is_that_of_others(tmp_path: Path, classes: int, metric: str) -> None:
    result, made = case(tmp_path, classes, metric)
    labels = made["labels"]
    exponentials = np.exp(made["logits"])
    shares = exponentials / exponentials.sum(1, keepdims=True)
    guess, sure = shares.argmax(1), shares.max(1)
    recalls = sklearn.recall_score(labels, guess, average=None, labels=range(classes))
    expected = {
        "accuracy": sklearn.accuracy_score(labels, guess),
        "macro_f1": sklearn.f1_score(labels, guess, average="macro"),
        "matthews": sklearn.matthews_corrcoef(labels, guess),
        "worst_class": min(recalls),
        "cross_entropy": sklearn.log_loss(labels, shares, labels=range(classes)),
    }
    if classes == 2:
        expected["f1"] = sklearn.f1_score(labels, guess)
    if metric == "spearman":
        expected["spearman"] = stats.spearmanr((shares * np.arange(6)).sum(1), made["scores"]).statistic
    bins = np.ceil(sure * 15)
    gaps = [abs((guess == labels)[bins == b].sum() - sure[bins == b].sum()) for b in range(1, 16)]
    expected["calibration_error"] = sum(gaps) / len(labels)
    assert result.metrics == pytest.approx(expected, abs=2e-6)
    assert next(iter(result.metrics)) == metric
    assert list(result.metrics)[-3:] == ["worst_class", "calibration_error", "cross_entropy"]

    samples = result.samples
    columns = ["split", "id", "label", "prediction", "confidence", "correct"]
    assert list(samples) == columns + ["predicted_score", "score"] * (metric == "spearman")
    assert samples["id"].tolist() == [f"{row:03d}" for row in made["rows"]]
    assert samples["label"].tolist() == labels.tolist()
    assert samples["prediction"].tolist() == guess.tolist()
    assert samples["confidence"].to_numpy() == pytest.approx(sure, abs=2e-6)
    assert samples["correct"].tolist() == (guess == labels).astype(int).tolist()
    if metric == "spearman":
        assert samples["predicted_score"].to_numpy() == pytest.approx((shares * np.arange(6)).sum(1), abs=2e-6)
        assert samples["score"].tolist() == made["scores"].tolist()

    table = result.classes
    assert list(table) == ["split", "class", "label", "samples", "recall", "precision", "f1"]
    assert table["samples"].tolist() == [(labels == label).sum() for label in range(classes)]
    assert table["recall"].to_numpy() == pytest.approx(recalls, abs=1e-6)
    for name, score in (("precision", sklearn.precision_score), ("f1", sklearn.f1_score)):
        assert table[name].to_numpy() == pytest.approx(score(labels, guess, average=None), abs=1e-6)


def test_a_class_that_is_nowhere(tmp_path: Path) -> None:
    """No recall, no precision, no F1 of a class without texts and predictions; F1 0 of one that is only predicted."""
    labels = np.arange(len(SPLIT)) % 2
    write(tmp_path, labels, "macro_f1")
    logits = torch.eye(4)[torch.from_numpy(np.where(np.arange(len(SPLIT)) % 5, labels, 2))]
    result = evaluate(Lookup(logits).eval(), description(list("abcd")), tmp_path, "test", Task())
    table = result.classes.set_index("class")
    assert table["recall"].isna().tolist() == [False, False, True, True]
    assert table["precision"].isna().tolist() == [False, False, False, True]
    assert table["f1"].isna().tolist() == [False, False, False, True]
    assert table.loc["c", "f1"] == 0
    assert result.metrics["macro_f1"] == pytest.approx(table["f1"].mean(), abs=1e-6)  # of three
    assert result.metrics["worst_class"] == pytest.approx(table["recall"].min(), abs=1e-6)


def test_a_model_that_has_learnt_nothing_has_figures(tmp_path: Path) -> None:
    """A teacher before its task: a classifier of zeros gives one answer, which correlates with nothing."""
    for metric in ("matthews", "spearman", "f1"):
        scores = np.linspace(0, 1, len(SPLIT)) if metric == "spearman" else None
        write(tmp_path, np.arange(len(SPLIT)) % 2, metric, scores)
        result = evaluate(Lookup(torch.zeros(83, 2)).eval(), description(["a", "b"]), tmp_path, "test", Task())
        assert result.metrics[metric] == 0
        assert result.metrics["cross_entropy"] == pytest.approx(math.log(2), abs=1e-6)


def test_no_batch_is_longer_than_its_longest_text(tmp_path: Path) -> None:
    tokens = write(tmp_path, np.arange(len(SPLIT)) % 2, "accuracy")
    lengths = sorted(int(np.flatnonzero(row).max()) + 1 for row in tokens[23:])
    network = Lookup(torch.zeros(len(SPLIT), 2)).eval()
    evaluate(network, description(["a", "b"]), tmp_path, "test", Task(batch=25))
    assert network.shapes == [(25, lengths[24]), (25, lengths[49]), (10, lengths[59])]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_of_sorted_texts_give_what_each_text_gives_alone(batch: int) -> None:
    """Texts with the token of padding inside, which belongs to them, of all lengths and in full length."""
    network = lively(["a", "b", "c"])
    tokens = torch.from_numpy(texts(1, 40)).long()
    found = classify(network, tokens, PAD, batch)
    with torch.inference_mode():
        alone = torch.cat([network(row[None]).logits for row in tokens])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    assert alone.std(0).min() > 0.1


def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, len(SPLIT))
    write(tmp_path, labels, "accuracy")
    np.save(tmp_path / "tokens.npy", texts(2, len(SPLIT)))
    network = lively(["a", "b"])
    results = [evaluate(network, description(["a", "b"]), tmp_path, "validation", Task(batch=b)) for b in (8, 8, 64)]
    assert results[0].metrics == results[1].metrics
    assert results[0].samples.to_csv() == results[1].samples.to_csv()
    assert results[2].metrics == pytest.approx(results[0].metrics, abs=2e-6)
    assert results[2].samples["prediction"].equals(results[0].samples["prediction"])
