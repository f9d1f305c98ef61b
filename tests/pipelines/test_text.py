"""Text as the registry and its callers meet it: raw strings, served, evaluated from the ONNX file, promoted."""

import copy
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from data import text as data
from data.errors import UserError
from data.files import sha256
from models import text as models
from pipelines import tracking
from pipelines.promotion import promote, rollback
from pipelines.registry import REQUIREMENTS, register
from pipelines.serving.text import BATCH, MOST_CHARACTERS, Student
from pipelines.tasks import text
from pipelines.versions import aliases, stored
from stages.evaluate import text as evaluation
from stages.export import text as export
from stages.export.onnx_graph import FILE, write_onnx
from stages.parameters.text import Dataset, Task

sys.path.insert(0, str(Path(__file__).parent))
from small_project import CLASSES, TEST, Model, usual
from small_server import post, server
from small_text import LENGTH, WORDS, SmallText, written

TASK = "text"
TINY = {"name": "bert", "layers": 2, "hidden": 16, "heads": 2, "intermediate": None, "positions": None, "dropout": 0.1}
VERBS = ["rose", "fell", "fetched", "shipped", "paid", "cut", "opened", "sold"]
NOUNS = ["oil", "wheat", "gold", "dollar", "shares", "crude", "coffee", "profit", "tonnes", "interest"]
# A newswire text as it is written, and as the data set of the default pipeline has such texts.
RAW = "U.S. OIL & GAS Corp said its 4th-qtr net profit rose 12.5% to $3.1 mln;\n  shares fell at Café São-Paulo."
NORMALISED = "u s oil gas corp said its th qtr net profit rose to mln shares fell at cafe sao paulo"


def sentences(count: int, seed: int) -> list[str]:
    """Texts of 1 to 30 words, no two alike."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        words = generator.choice(VERBS + NOUNS, generator.integers(1, 30)).tolist()
        found.append(" ".join([*words, f"{NOUNS[number % 10]}{VERBS[number // 10 % 8]}{'x' * (number // 80)}"]))
    return found


@dataclass
class Exported:
    """A student with random weights behind a data set that was really prepared."""

    prepared: Path
    files: Path
    network: torch.nn.Module
    description: SimpleNamespace
    student: Student

    @property
    def plain(self) -> dict[str, Any]:
        return vars(self.description)

    def texts(self) -> pd.DataFrame:
        return pd.read_csv(self.prepared / "manifest.csv", dtype=str, keep_default_na=False)


def prepare(folder: Path, kind: str) -> Path:
    """`letters`: one text with a class; `scores`: pairs with scores, in which punctuation and digits are tokens."""
    raw, prepared = folder / "raw", folder / "prepared"
    raw.mkdir()
    prepared.mkdir()
    common = {"task": TASK, "source": "raw", "encoder": "none", "length": 16}
    texts = [*sentences(190, 0), *sentences(10, 1), NORMALISED]
    if kind == "letters":
        labels = [("grain", "trade", "acq")[index % 3] for index in range(len(texts))]
        pd.DataFrame({"text": texts, "label": labels}).to_csv(raw / "texts.csv", index=False)
        split = {"validation": 40, "test": 60}
        wordpiece = {"kind": "wordpiece", "pieces": 200, "normalise": "letters"}
        dataset = Dataset(**common, format="table", files={"train": "texts.csv"}, split=split, tokenizer=wordpiece)
    else:
        pairs = pd.DataFrame({"sentence1": texts, "sentence2": [f"{one}, 7!" for one in reversed(texts)]})
        pairs["score"] = (np.arange(len(texts)) * 0.35 % 5).round(2)
        for name, table in (("train", pairs.iloc[:140]), ("dev", pairs.iloc[140:])):
            table.to_csv(raw / f"{name}.tsv", sep="\t", index=False)
        wordpiece = {"kind": "wordpiece", "pieces": 200}
        glue = {"glue": "STS-B", "folder": ".", "metric": "spearman", "split": {"validation": 30}}
        dataset = Dataset(**common, format="glue", tokenizer=wordpiece, **glue)
    data.prepare(raw, dataset, prepared, {"name": "raw", "licence": "none", "redistributable": True})
    return prepared


@pytest.fixture(scope="module", params=["letters", "scores"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return build(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return build(tmp_path_factory.mktemp("letters"), "letters")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return build(tmp_path_factory.mktemp("pairs"), "scores")


def build(folder: Path, kind: str) -> Exported:
    prepared, files = prepare(folder, kind), folder / "exported"
    files.mkdir()
    described = data.describe(prepared)
    names = ("classes", "length", "vocabulary", "pad", "separator", "tokenizer_sha256", "pair")
    interface = {name: described[name] for name in names}
    torch.manual_seed(0)
    network = models.build({"network": TINY, "interface": interface}).eval()
    _, tokens, _ = data.load(prepared, "validation")
    with torch.no_grad():  # so that the first token hears of the others, and answers differ
        for weight in network.layers.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)
        logits = network(tokens).logits
        scale = 1 / logits.std(0)
        network.classifier.weight.mul_(scale[:, None])
        network.classifier.bias.copy_(-scale * logits.mean(0))
    example = {export.INPUT: tokens[:2].numpy()}
    write_onnx(export.Graph(network), example, export.OUTPUTS, export.AXES, files / FILE)
    shutil.copyfile(prepared / "tokenizer.json", files / "tokenizer.json")
    description = {"interface": interface, "input": {"name": export.INPUT}}
    (files / "model.json").write_text(json.dumps(description))
    return Exported(prepared, files, network, SimpleNamespace(**description), load(files))


def load(files: Path) -> Student:
    student = Student()
    names = {"onnx": FILE, "description": "model.json", "tokenizer": "tokenizer.json"}
    student.load_context(SimpleNamespace(artifacts={name: str(files / file) for name, file in names.items()}))
    return student


def request(exported: Exported) -> tuple[list[Any], pd.DataFrame]:
    """Every text of the data set as a caller sends it, and its row."""
    table = exported.texts()
    return (table[["text", "pair"]].to_numpy().tolist() if "pair" in table else table["text"].tolist()), table


# Tokens


def test_tokens_are_those_of_training(exported: Exported) -> None:
    texts, table = request(exported)
    tokens = np.load(exported.prepared / "tokens.npy")
    found = exported.student.texts(texts)
    for encoded, wanted, length in zip(found, tokens, table["length"].astype(int), strict=True):
        assert encoded.ids == wanted[wanted != 0].tolist()
        assert encoded.truncated is (length > 16)
    assert 0 < sum(encoded.truncated for encoded in found) < len(found)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(8, 24))
def test_a_pair_is_cut_as_the_library_cuts_it(pairs: Exported, first: int, second: int, length: int) -> None:
    """The longer of two is cut first; of two that are equally long and too long, the first keeps less."""
    texts = " ".join(["oil"] * first), " ".join(["gold"] * second)
    tokenizer = data.read_tokenizer(pairs.files / "tokenizer.json")
    short = copy.copy(pairs.student)
    short.length = length
    for parts in (texts, texts[:1]):
        others = None if len(parts) == 1 else [parts[1]]
        wanted, (lengths,) = data.encode(tokenizer, [parts[0]], others, length)
        encoded = short.encode(*parts)
        assert encoded.ids == [token for token in wanted[0].tolist() if token != short.pad]
        assert encoded.truncated is bool(lengths > length)
        assert sum(encoded.lengths) + 1 + len(parts) == lengths


def test_a_raw_newswire_text_is_the_prepared_one(letters: Exported) -> None:
    """With capitals, digits, punctuation, accents and a line break: the normaliser travels with the student."""
    table = letters.texts()
    (row,) = np.flatnonzero(table["text"] == NORMALISED)
    wanted = np.load(letters.prepared / "tokens.npy")[row]
    raw, prepared = letters.student.texts([RAW, NORMALISED])
    assert raw == prepared
    assert raw.ids == wanted[wanted != 0].tolist()
    # All of it, not only what the student reads.
    tokenizer = data.read_tokenizer(letters.prepared / "tokenizer.json")
    assert tokenizer.encode(RAW).tokens == tokenizer.encode(NORMALISED).tokens
    answers = letters.student.predict(None, [RAW, NORMALISED])
    assert answers[0] == answers[1]
    assert answers[0]["truncated"]


@pytest.mark.parametrize("special", data.SPECIAL)
def test_a_text_that_spells_a_special_token_does_not_get_one(exported: Exported, special: str) -> None:
    parts = ["oil", f"{special} fell {special}"][: 1 + exported.student.pair] if exported.student.pair else [special]
    encoded = exported.student.encode(*parts)
    wanted = 1 + exported.student.pair
    assert encoded.ids.count(exported.student.separator) == wanted
    assert encoded.ids.count(exported.student.start) == 1
    assert exported.student.pad not in encoded.ids
    tokenizer = data.read_tokenizer(exported.files / "tokenizer.json")
    assert tokenizer.token_to_id(data.MASK) not in encoded.ids


def test_two_texts_of_the_greatest_length_take_no_more_than_one(pairs: Exported) -> None:
    """The library would keep every combination of the parts that it cuts off: gigabytes."""
    longest = ("oil " * MOST_CHARACTERS)[:MOST_CHARACTERS]
    (answer,) = pairs.student.predict(None, [[longest, longest]])
    assert answer["truncated"]


# Answers


def test_names_and_probabilities(exported: Exported) -> None:
    texts, _ = request(exported)
    answers = exported.student.predict(None, texts)
    tokens = torch.from_numpy(np.load(exported.prepared / "tokens.npy").astype(np.int64))
    with torch.inference_mode():  # all of them padded to the full length, in one batch
        wanted = exported.network(tokens).logits.double().softmax(1).numpy()
    found = np.array([list(answer["probabilities"].values()) for answer in answers])
    np.testing.assert_allclose(found, wanted, atol=5e-5)
    classes = exported.plain["interface"]["classes"]
    assert len(set(found.argmax(1))) == len(classes)
    for answer, row in zip(answers, found, strict=True):
        assert list(answer["probabilities"]) == classes
        assert answer["label"] == classes[int(row.argmax())]
        assert answer["probability"] == max(answer["probabilities"].values())
        assert json.loads(json.dumps(answer)) == answer


def test_company_and_order_do_not_change_an_answer(exported: Exported) -> None:
    """Alone a text has no padding; among others it stands in a batch of texts of its length."""
    texts, _ = request(exported)
    assert len(texts) > 3 * BATCH
    together = exported.student.predict(None, texts)
    backwards = exported.student.predict(None, texts[::-1])[::-1]
    for alone in range(0, len(texts), 7):
        (one,) = exported.student.predict(None, texts[alone : alone + 1])
        for other in (together[alone], backwards[alone]):
            assert other["probabilities"] == pytest.approx(one["probabilities"], abs=5e-5)
            assert other["truncated"] == one["truncated"]
    # More padding than there was ever in training changes nothing either.
    ids = exported.student.texts(texts[:1])[0].ids
    wide = np.full((1, 16), exported.student.pad)
    wide[0, : len(ids)] = ids
    (logits,) = exported.student.session.run(["logits"], {"tokens": wide})
    (narrow,) = exported.student.session.run(["logits"], {"tokens": wide[:, : len(ids)]})
    np.testing.assert_allclose(logits, narrow, atol=1e-4)


@pytest.mark.parametrize("kind", ["array", "object", "mapping", "table", "tuple"])
def test_every_form_of_a_request(exported: Exported, kind: str) -> None:
    texts, _ = request(exported)
    raw = texts[:5]
    column = np.empty(5, dtype=object)
    column[:] = raw
    requests: dict[str, Any] = {
        "array": np.array(raw),
        "object": np.array(raw, dtype=object),
        "mapping": {"texts": column},
        "table": pd.DataFrame({"texts": raw}),
        "tuple": tuple(tuple(one) if isinstance(one, list) else one for one in raw),
    }
    assert exported.student.predict(None, requests[kind]) == exported.student.predict(None, raw)


MALFORMED: dict[str, tuple[Any, str]] = {
    "empty": ([], "the list of texts is empty"),
    "number": (7, "a list of texts is expected"),
    "one text": ("oil rose", "a list of texts is expected"),
    "no text": (["oil", ""], "text 1 is empty"),
    "spaces": (["oil", " \t\n"], "text 1 is empty"),
    "nothing left": (["oil", "17.5% !!"], r"text 1 holds nothing that the student reads: .*'17\.5% !!'"),
    "nothing": (["oil", None], "text 1 is of type NoneType; a string is expected"),
    "a number": ([3.5], "text 0 is of type float; a string is expected"),
    "boolean": ([True], "text 0 is of type bool"),
    "pair": (["oil", ["oil", "gold"]], "text 1 is of type list; a string is expected"),
    "mappings": ([{"text": "oil"}], "text 0 is of type dict; a string is expected"),
    "long": (["x" * (MOST_CHARACTERS + 1)], "text 0 has 100,001 characters; at most 100,000 are read"),
    "surrogate": (["oil \ud83d"], "text 0 is no Unicode text: its character 4"),
    "other column": ({"sentences": ["oil"]}, "'sentences'"),
}
MALFORMED_PAIRS: dict[str, tuple[Any, str]] = {
    "one text": (["oil rose"], "text 0 is of type str; this student reads pairs"),
    "two texts": (["oil", "gold"], "text 0 is of type str; this student reads pairs"),
    "three": ([["oil", "gold"], ["a", "b", "c"]], "text 1 is a list of 3; .* a list of two strings"),
    "mapping": ([{"text": "oil", "pair": "gold"}], "text 0 is of type dict; this student reads pairs"),
    "half": ([["oil", ""]], "text 0, the second of its pair, is empty"),
    "nothing left": ([["\u0301", "gold"]], "text 0, the first of its pair, holds nothing"),
    "nothing": ([["oil", None]], "text 0, the second of its pair, is of type NoneType"),
    "deep": ([[["oil"], ["gold"]]], "text 0, the first of its pair, is of type list"),
}


def refused(student: Student, request: Any, message: str) -> None:
    with pytest.raises(MlflowException, match=message) as caught:
        student.predict(None, request)
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_the_callers_mistake(letters: Exported, name: str) -> None:
    refused(letters.student, *MALFORMED[name])


@pytest.mark.parametrize("name", MALFORMED_PAIRS)
def test_malformed_pairs_are_the_callers_mistake(pairs: Exported, name: str) -> None:
    refused(pairs.student, *MALFORMED_PAIRS[name])


def test_the_served_file_imports_nothing_of_the_project() -> None:
    file = (Path(__file__).parents[2] / "pipelines/serving/text.py").read_text()
    assert re.findall(r"^\s*(?:from|import) (?:data|models|stages|pipelines)\b", file, re.MULTILINE) == []


# Evaluation


def test_an_onnx_file_is_evaluated_as_the_stage_does(exported: Exported) -> None:
    found = text.evaluate(exported.files, exported.plain, exported.prepared)
    wanted = evaluation.evaluate(exported.network, exported.description, exported.prepared, "test", Task()).samples
    assert ("predicted_score" in found) is exported.student.pair
    assert set(found) == set(wanted) - {"split"}
    pd.testing.assert_frame_equal(found, wanted[list(found)], check_dtype=False, atol=5e-5)


def test_another_question_is_not_answered(letters: Exported, pairs: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the texts have classes"):
        text.evaluate(letters.files, letters.plain, pairs.prepared)
    prepared = tmp_path / "prepared"
    shutil.copytree(letters.prepared, prepared)
    (prepared / "dataset.json").write_text(json.dumps({**data.describe(prepared), "pair": True}))
    with pytest.raises(ValueError, match="the texts have pair True, the student was trained with False"):
        text.evaluate(letters.files, letters.plain, prepared)


def test_what_travels_is_what_the_export_writes() -> None:
    assert text.FILES == export.FILES


# Registration and promotion


@pytest.fixture
def small(root: Path, monkeypatch: pytest.MonkeyPatch) -> SmallText:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    small = usual(root, SmallText)
    del small.models["second"]
    small.write()
    small.commit()
    return small


def decision() -> dict[str, Any]:
    files = sorted(Path("decisions", TASK).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads(files[-1].read_text())
    return found


def test_a_registered_student_takes_raw_strings(small: SmallText) -> None:
    """As a server loads it: from the registry alone, with its tokenizer."""
    register(TASK)
    version = tracking.connect().get_model_version(TASK, aliases(tracking.connect(), TASK)["challenger"])
    assert version.tags["tokenizer_sha256"] == small.tokenizer_sha256
    folder = stored(TASK, version.version)
    assert sha256(folder / "tokenizer.json") == small.tokenizer_sha256
    needed = (folder.parent / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in needed} == {*REQUIREMENTS, "tokenizers"}
    assert not [file for file in folder.parent.rglob("*") if file.suffix in (".pkl", ".pickle")]
    shutil.rmtree("models")
    served = mlflow.pyfunc.load_model(f"models:/{TASK}@challenger")
    raw = [written(3, 1), written(TEST - 1, 0), "ALPHA -- n\u00e1c, says who? beta; alpha"]
    answers = served.predict({"texts": np.array(raw, dtype=object)})
    assert [answer["label"] for answer in answers] == ["b", "c", "a"]
    assert [answer["truncated"] for answer in answers] == [False, False, False]
    assert served.predict({"texts": np.array(["alpha " * LENGTH], dtype=object)})[0]["truncated"]
    with pytest.raises(MlflowException, match="text 1 is empty"):
        served.predict({"texts": np.array(["alpha", " "], dtype=object)})


@pytest.mark.parametrize("where", ["exported", "registry"])
def test_a_tokenizer_that_was_tampered_with_is_found(small: SmallText, where: str) -> None:
    """Were it another, every weight and every digest of the network would be right, and every answer wrong."""
    file = small.folder / f"models/exported/{TASK}/best/tokenizer.json"
    changed = file.read_bytes().replace(b'"alpha":', b'"alphx":')
    assert changed != file.read_bytes()
    if where == "exported":
        file.write_bytes(changed)
        with pytest.raises(UserError, match=f"{small.tokenizer_sha256}, got {sha256(file)}"):
            register(TASK)
        return
    register(TASK)
    challenger = aliases(tracking.connect(), TASK)["challenger"]
    kept = stored(TASK, challenger) / "tokenizer.json"
    kept.write_bytes(changed)
    assert not promote(TASK)
    check = decision()["gates"]["untampered"]
    assert check["verdict"] == "failed"
    assert "own copy of tokenizer.json" in check["sentence"]
    kept.write_bytes(small.tokenizer)
    assert promote(TASK)
    # Neither is it compared with as a champion, nor restored.
    small.change("best", wrong=9, weights="second")
    small.commit()
    register(TASK)
    kept.write_bytes(changed)
    assert not promote(TASK)
    assert "tokenizer.json in the registry is not what was registered" in decision()["gates"]["champion"]["sentence"]
    kept.write_bytes(small.tokenizer)
    assert promote(TASK)
    kept.write_bytes(changed)
    with pytest.raises(UserError, match=f"version {challenger} is not restored: its tokenizer.json"):
        rollback(TASK)


def test_another_tokenizer_is_another_version(small: SmallText) -> None:
    """With the same weights and the same graph: one more word, which no text has."""
    client = tracking.connect()
    register(TASK)
    first = aliases(client, TASK)["challenger"]
    register(TASK)
    assert aliases(client, TASK)["challenger"] == first
    folder = small.folder / f"models/exported/{TASK}/best"
    onnx = (folder / FILE).read_bytes()
    small.words = (*WORDS, "unused")
    small.write()
    described = json.loads((folder / "model.json").read_text())
    (folder / FILE).write_bytes(onnx)
    (folder / "model.json").write_text(json.dumps({**described, "onnx_sha256": sha256(folder / FILE)}))
    register(TASK)
    second = client.get_model_version(TASK, aliases(client, TASK)["challenger"])
    before = client.get_model_version(TASK, first)
    same = {
        tag for tag in ("weights_sha256", "onnx_sha256", "tokenizer_sha256") if second.tags[tag] == before.tags[tag]
    }
    assert str(second.version) != first
    assert same == {"weights_sha256", "onnx_sha256"}


def test_from_the_first_champion_to_moved_test_data(small: SmallText) -> None:
    register(TASK)
    assert promote(TASK)
    gates = decision()["gates"]
    assert gates["baseline"]["figures"]["difference"] == pytest.approx(2 / TEST)
    assert gates["baseline"]["sentence"].startswith("accuracy 96.00 against 95.20 of plain")
    assert gates["teacher_share"]["figures"]["teacher"] == "teacher"
    assert {"tokenizer_sha256", "stored_tokenizer_sha256"} <= set(gates["untampered"]["figures"])

    small.change("best", wrong=60, validation=0.99, weights="second")
    small.commit()
    register(TASK)
    assert not promote(TASK)
    refused = [name for name, check in decision()["gates"].items() if check["verdict"] == "failed"]
    assert refused == ["baseline", "champion"]

    # Today's data has other texts, and was prepared with another vocabulary: the champion reads them with its own.
    small.ids, small.hardest, small.words = "new", TEST - 30, tuple(reversed(WORDS))
    small.change("best", wrong=10, weights="third")
    small.commit()
    register(TASK)
    assert promote(TASK)
    champion = decision()["gates"]["champion"]
    assert champion["figures"]["evaluated_again"]
    assert champion["figures"]["other_score"] == 1.0
    assert aliases(tracking.connect(), TASK)["champion"] == decision()["version"]

    # Texts whose classes are others are no texts that it can be asked about.
    small.ids = "newer"
    small.change("best", weights="fourth")
    file = small.folder / f"data/prepared/{TASK}/tiny/dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "classes": [*CLASSES, "d"]}))
    small.commit()
    register(TASK)
    assert not promote(TASK)
    sentence = decision()["gates"]["champion"]["sentence"]
    assert "cannot answer today's test data: ValueError: the texts have classes" in sentence


def test_a_teacher_that_never_learnt_the_task_is_nothing_to_compare_with(
    small: SmallText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learnt masked tokens; the one that it became, together with the student, learnt the task."""
    monkeypatch.setattr(SmallText, "teacher", {"objective": "mlm"})
    small.models["plain"] = Model(wrong=12, validation=0.99, method="alone")
    small.change("best", method="lgtm")
    small.commit()
    register(TASK)
    assert promote(TASK)
    assert "no teacher" in decision()["gates"]["teacher_share"]["sentence"]
    small.models["best.teacher"] = Model(wrong=5, validation=0.9, method=None)
    small.change("best", validation=1.0)
    small.commit()
    register(TASK)
    assert promote(TASK)
    share = decision()["gates"]["teacher_share"]["figures"]
    assert (share["teacher"], share["teacher_score"]) == ("best.teacher", 245 / TEST)


@pytest.mark.slow
def test_over_http(small: SmallText) -> None:
    register(TASK)
    with server(small.folder, TASK) as address:
        raw = [written(3, 1), written(TEST - 1, 0), "alpha " * LENGTH]
        for body in ({"inputs": raw}, {"inputs": {"texts": raw}}, {"instances": raw}):
            status, answer = post(address, body)
            assert status == 200, answer
            assert [one["label"] for one in answer["predictions"]] == ["b", "c", "a"]
            assert [one["truncated"] for one in answer["predictions"]] == [False, False, True]
        for name, (request, message) in MALFORMED.items():
            status, answer = post(address, {"inputs": request})
            assert 400 <= status < 500, (name, answer)
            assert "Traceback" not in str(answer), name
            if name not in ("mappings", "other column"):  # these MLflow refuses itself
                assert re.search(message, str(answer)), (name, answer)
        assert post(address, {"inputs": raw})[0] == 200
