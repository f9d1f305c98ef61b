"""A student for text behind `mlflow models serve`: raw strings in, label names and probabilities out.

MLflow copies this one file beside the ONNX file and the tokenizer, and runs it wherever the student is served, so it
imports nothing of the project that made it.

Request: `{"inputs": [TEXT, ...]}`. A TEXT is a string as it was written, with capitals, digits and punctuation: the
tokenizer normalises it as it normalised what the student was trained on. Where the student reads pairs, a TEXT is a
list of two strings, `["the first", "the second"]`.

Answer: `{"predictions": [{"label": ..., "probability": ..., "probabilities": {NAME: ..., ...}, "truncated": ...},
...]}`. `truncated` says that the text is longer than the student reads: its end was cut off, of a pair that of the
longer text first. What cannot be answered gets status 400, and a message that names the text and says what is expected.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from tokenizers import Tokenizer

BATCH = 64
MOST_CHARACTERS = 100_000


class Encoded(NamedTuple):
    """A text, or a pair, as the network reads it.

    Attributes:
        ids: the start, then one or two texts with the separator after each.
        lengths: tokens of each text before it was cut. truncated: whether one was.
    """

    ids: list[int]
    lengths: list[int]
    truncated: bool


class Student(PythonModel):
    """The artifacts are `onnx` (the network), `description` (model.json) and `tokenizer` (tokenizer.json)."""

    def load_context(self, context: Any) -> None:
        """Read the files."""
        description = json.loads(Path(context.artifacts["description"]).read_text(encoding="utf-8"))
        interface = description["interface"]
        self.classes: list[str] = interface["classes"]
        self.length: int = interface["length"]
        self.pad: int = interface["pad"]
        self.pair: bool = interface["pair"]
        self.input: str = description["input"]["name"]
        self.tokenizer = Tokenizer.from_file(context.artifacts["tokenizer"])
        self.tokenizer.encode_special_tokens = True  # a text that spells a separator does not get one
        self.tokenizer.no_padding()
        # The library would keep what it cuts off, and of two long texts every combination: they are cut here.
        self.tokenizer.no_truncation()
        self.start, self.separator = self.tokenizer.encode("").ids
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            context.artifacts["onnx"], options, providers=["CPUExecutionProvider"]
        )

    # The hint keeps MLflow from checking the request in its own words; lists, mappings and tables arrive here too.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> list[dict[str, Any]]:
        """An answer per text.

        Args:
            model_input: the texts, or a mapping or a table whose one column `texts` holds them.

        Raises:
            MlflowException: the request cannot be answered; status 400.
        """
        texts = self.texts(model_input)
        answers: list[dict[str, Any]] = []
        for text, row in zip(texts, self.probabilities([text.ids for text in texts]), strict=True):
            best = int(row.argmax())
            answers.append(
                {
                    "label": self.classes[best],
                    "probability": float(row[best]),
                    "probabilities": dict(zip(self.classes, row.tolist(), strict=True)),
                    "truncated": text.truncated,
                }
            )
        return answers

    def probabilities(self, ids: list[list[int]]) -> np.ndarray:
        """(N, classes) float64. Texts of similar length share a batch, which is padded to its longest."""
        found = np.empty((len(ids), len(self.classes)))
        order = np.argsort([len(one) for one in ids], kind="stable")
        for rows in np.split(order, range(BATCH, len(ids), BATCH)):
            tokens = np.full((len(rows), len(ids[rows[-1]])), self.pad, dtype=np.int64)
            for place, row in enumerate(rows):
                tokens[place, : len(ids[row])] = ids[row]
            logits = self.session.run(["logits"], {self.input: tokens})[0].astype(np.float64)
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
            found[rows] = exponentials / exponentials.sum(axis=1, keepdims=True)
        return found

    def encode(self, *texts: str) -> Encoded:
        """A text, or two: the same tokens as in training. Of two, the longer one is cut first."""
        parts = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        lengths = [len(part) for part in parts]
        room = self.length - 1 - len(parts)
        truncated = sum(lengths) > room
        for left, part in zip(range(len(parts), 0, -1), sorted(parts, key=len), strict=True):
            del part[room // left :]
            room -= len(part)
        return Encoded(
            [self.start, *(token for part in parts for token in (*part, self.separator))], lengths, truncated
        )

    def texts(self, request: Any) -> list[Encoded]:
        """The texts of a request, as tokens."""
        if hasattr(request, "columns"):
            request = {name: request[name].tolist() for name in request.columns}
        if isinstance(request, dict):
            if list(request) != ["texts"]:
                raise refusal(f"the request names {sorted(map(str, request))}; only 'texts' is known")
            request = request["texts"]
        request = plain(request)
        if not isinstance(request, list):
            raise refusal(f"a list of texts is expected, got {str(request)[:40]!r}")
        if len(request) == 0:
            raise refusal("the list of texts is empty")
        return [self.text(value, f"text {index}") for index, value in enumerate(request)]

    def text(self, value: Any, name: str) -> Encoded:
        """One text, or pair, of a request."""
        value = plain(value)
        if not self.pair:
            names, parts = [name], [value]
        elif isinstance(value, list) and len(value) == 2:
            names, parts = [f"{name}, the first of its pair,", f"{name}, the second of its pair,"], value
        else:
            found = f"a list of {len(value)}" if isinstance(value, list) else f"of type {type(value).__name__}"
            raise refusal(f"{name} is {found}; this student reads pairs, and expects a list of two strings")
        for part, called in zip(parts, names, strict=True):
            check(part, called)
        encoded = self.encode(*parts)
        for part, called, length in zip(parts, names, encoded.lengths, strict=True):
            if length == 0:
                raise refusal(f"{called} holds nothing that the student reads: nothing is left of {part[:40]!r}")
        return encoded


def plain(value: Any) -> Any:
    """Lists where there are arrays or tuples: MLflow hands over either, a caller in Python any."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def check(text: Any, name: str) -> None:
    """A text has to be a string that is not empty, of at most MOST_CHARACTERS characters."""
    if not isinstance(text, str):
        raise refusal(f"{name} is of type {type(text).__name__}; a string is expected")
    if not text.strip():
        raise refusal(f"{name} is empty")
    if len(text) > MOST_CHARACTERS:
        raise refusal(f"{name} has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refusal(f"{name} is no Unicode text: its character {error.start} is half of a pair") from None


def refusal(message: str) -> MlflowException:
    """A mistake of the caller's: status 400, no stack trace."""
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


set_model(Student())
