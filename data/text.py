"""Texts, or pairs of texts, with one label each: reading, splitting, tokens, what is expected of them, and batches.

A prepared data set is a folder:

    tokens.npy      (N, length) int32: the start token, a text and the separator, for pairs the second text and another
                    separator, then padding
    labels.npy      (N,) int64, an index into the classes
    manifest.csv    a row per sample: id, split, label, length in tokens before it was cut, sha256 of the
                    words of the normalised text, the text itself; `pair`, the second text of pairs; `score` where
                    labels are rounded scores; `flipped`, 1 where the label was changed on purpose
    tokenizer.json  normaliser, vocabulary and template, as the library tokenizers keeps them
    dataset.json    classes, length, vocabulary and special tokens, metric, samples per split, what was dropped and cut
"""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from data.errors import UserError, suggest
from data.files import sha256, write_json
from data.splits import TRAIN, split

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

log = logging.getLogger("distillery")

HELD_OUT = "held_out"
SPLITS = (TRAIN, HELD_OUT, "validation", "test")
PAD, UNKNOWN, START, SEPARATOR, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER = "tokenizer.json"
COLUMNS = ("id", "split", "label", "length", "sha256")  # of every manifest


@dataclass(frozen=True)
class Glue:
    """How a task of GLUE is published.

    Attributes:
        columns: of text, pair (or None) and label: names of the header, or places where there is none.
        labels: their names, in order, by what stands in the file; empty where scores from 0 to 5 stand there.
        test: the file that is evaluated on, because the labels of the real test split are not public.
    """

    columns: tuple[str, str | None, str] | tuple[int, None, int]
    labels: dict[str, str] = field(default_factory=dict)
    test: str = "dev.tsv"


ENTAILED = {"entailment": "entailment", "not_entailment": "not_entailment"}
INFERRED = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
GLUE = {
    "CoLA": Glue((3, None, 1), {"0": "unacceptable", "1": "acceptable"}),
    "MNLI": Glue(("sentence1", "sentence2", "gold_label"), INFERRED, "dev_matched.tsv"),
    "MNLI-mm": Glue(("sentence1", "sentence2", "gold_label"), INFERRED, "dev_mismatched.tsv"),
    "MRPC": Glue(("#1 String", "#2 String", "Quality"), {"0": "not_paraphrase", "1": "paraphrase"}),
    "QNLI": Glue(("question", "sentence", "label"), ENTAILED),
    "QQP": Glue(("question1", "question2", "is_duplicate"), {"0": "not_duplicate", "1": "duplicate"}),
    "RTE": Glue(("sentence1", "sentence2", "label"), ENTAILED),
    "SST-2": Glue(("sentence", None, "label"), {"0": "negative", "1": "positive"}),
    "STS-B": Glue(("sentence1", "sentence2", "score")),
}
SCORES = ["0", "1", "2", "3", "4", "5"]


# Reading. Every reader gives a row per sample: its place below the header (`row`, from 1), `text`, `pair` where there
# are two, and `label` as it stands there.


def read_table(file: Path, columns: Any, separator: str) -> pd.DataFrame:
    """A CSV or TSV whose first line names the columns. In a TSV quotes are letters like any other.

    Raises:
        UserError: it is no such table, or has no column of a wanted name.
    """
    names, *rows = (_lines(file) if separator == "tab" else _quoted(file)) or [[]]
    return _chosen(file, _frame(file, names, rows), columns.text, columns.pair, columns.label)


def read_orange(file: Path, columns: Any) -> pd.DataFrame:
    """A .tab file of Orange: three lines of header (names, types, roles), then rows.

    Raises:
        UserError: it is no such file, or has no column of a wanted name.
    """
    names, *rows = _lines(file) or [[]]
    return _chosen(file, _frame(file, names, rows[2:]), columns.text, columns.pair, columns.label)


def read_glue(file: Path, task: Glue) -> pd.DataFrame:
    """A TSV of GLUE: tabs between columns, no quoting. Lines that lack columns are left out, as is usual there.

    Raises:
        UserError: it is no such file, or lacks a column.
    """
    rows = _lines(file)
    if isinstance(task.columns[0], int):
        names: list[Any] = list(range(len(rows[0]) if rows else 0))
    else:
        names, *rows = rows or [[]]
    broken = [bool(row) and len(row) != len(names) for row in rows]
    whole = [[] if wrong else row for row, wrong in zip(rows, broken, strict=True)]
    table = _chosen(file, _frame(file, names, whole), *task.columns)
    table.attrs["broken"] = sum(broken)
    return table


def _lines(file: Path) -> list[list[str]]:
    """The cells of a file whose columns are separated by tabs; an empty line is a row without cells."""
    # Only line feeds end a line: other characters that Python counts among the ends of lines stand inside texts.
    lines = [line.removesuffix("\r") for line in _decoded(file).removesuffix("\n").split("\n")]
    return [line.split("\t") if line.strip("\t") else [] for line in lines]


def _quoted(file: Path) -> list[list[str]]:
    """The cells of a CSV; an empty line is a row without cells."""
    try:
        return list(csv.reader(io.StringIO(_decoded(file), newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"{file} is no CSV ({error}) · is it complete, and every quote closed?") from None


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}) · is it there, complete and UTF-8?") from None


def _frame(file: Path, names: list[Any], rows: list[list[str]]) -> pd.DataFrame:
    """A table of the rows that have cells; its index is their place, from 1."""
    filled = {place: row for place, row in enumerate(rows, start=1) if row}
    for place, row in filled.items():
        if len(row) != len(names):
            raise UserError(
                f"{file} has {len(names)} columns, but {len(row)} in row {place} below the header: {row[0][:40]!r} · "
                "mend the file"
            )
    return pd.DataFrame(list(filled.values()), index=list(filled), columns=names, dtype=object)


def _chosen(file: Path, table: pd.DataFrame, text: Any, pair: Any, label: Any) -> pd.DataFrame:
    wanted = {"text": text, "pair": pair, "label": label}
    known = list(table.columns)
    for role, name in wanted.items():
        if name is not None and known.count(name) != 1:
            what = f"two columns {name!r}" if name in known else f"no column {name!r}"
            raise UserError(
                f"{file} has {what} for `{role}`; {suggest(str(name), map(str, known))} · correct `columns` of the "
                "data set, or the file"
            )
    if table.empty:
        raise UserError(f"{file} holds no sample · is it complete?")
    # A carriage return would end a line of the manifest.
    found = {
        role: table[name].str.replace(r"\r\n?", "\n", regex=True).str.strip()
        for role, name in wanted.items()
        if name is not None
    }
    return pd.DataFrame({"row": table.index, **found}).reset_index(drop=True)


def read(raw: Path, dataset: Any) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Samples by the split that their file is of, with `label` as an index; and the names of the labels.

    Args:
        raw: the fetched source. dataset: its entry in params.yaml (`stages.parameters.text.Dataset`).

    Raises:
        UserError: a file cannot be read, lacks a column, or holds an unknown label.
    """
    if dataset.format == "glue":
        task, folder = GLUE[dataset.glue], raw / dataset.folder
        tables = {TRAIN: read_glue(folder / "train.tsv", task), "test": read_glue(folder / task.test, task)}
        return _labelled(tables, task.labels or None, folder)
    files = {name: file for name, file in dataset.files.model_dump().items() if file is not None}
    if dataset.format == "orange":
        tables = {name: read_orange(raw / file, dataset.columns) for name, file in files.items()}
    else:
        tables = {name: read_table(raw / file, dataset.columns, dataset.separator) for name, file in files.items()}
    classes = dataset.classes or sorted(set(tables[TRAIN]["label"]) - {""})
    if len(classes) < 2:
        raise UserError(f"{raw / files[TRAIN]} has one label only: {', '.join(classes)!r} · correct `columns.label`")
    return _labelled(tables, {name: name for name in classes}, raw)


def _labelled(
    tables: dict[str, pd.DataFrame], labels: dict[str, str] | None, folder: Path
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    for part, table in tables.items():
        if labels is None:
            table["score"] = pd.to_numeric(table["label"], errors="coerce")
            wrong = ~table["score"].between(0, len(SCORES) - 1)
            known = "a number from 0 to 5"
            indices = table["score"].where(~wrong, 0).round()
        else:
            wrong, known = ~table["label"].isin(labels), ", ".join(labels)
            indices = table["label"].map({name: index for index, name in enumerate(labels)}).fillna(0)
        if wrong.any():
            first, count = table[wrong].iloc[0], int(wrong.sum())
            raise UserError(
                f"{folder} has {count} unknown label{'s' * (count > 1)} among its {part} samples: {first['label']!r} "
                f"in row {first['row']} below the header; known: {known} · correct the file, or `classes`"
            )
        table["label"] = indices.astype(np.int64)
    return tables, list(labels.values()) if labels is not None else list(SCORES)


# Tokens. tokenizers is imported inside: whoever only looks at a data set does not need it.


def _blank(model: Any, normalise: str) -> "Tokenizer":
    """A tokenizer without a vocabulary of its own: its normaliser, and where words end."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    tokenizer = Tokenizer(model)
    if normalise == "letters":
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFKD(),
                normalizers.StripAccents(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex("[^a-z]+"), " "),
                normalizers.Strip(),
            ]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _with_vocabulary(vocabulary: dict[str, int], normalise: str) -> "Tokenizer":
    from tokenizers import models, processors

    model = models.WordPiece(vocab=vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100)
    tokenizer = _blank(model, normalise)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {SEPARATOR}",
        pair=f"{START} $A {SEPARATOR} $B:1 {SEPARATOR}:1",
        special_tokens=[(name, vocabulary[name]) for name in (START, SEPARATOR)],
    )
    return tokenizer


def learn_tokenizer(texts: Sequence[str], size: int, normalise: str) -> "Tokenizer":
    """A WordPiece vocabulary of `size` pieces (more where there are more letters), the same for the same texts.

    Source: Schuster and Nakajima 2012; the trainer is that of the library tokenizers (pairs by frequency).
    """
    from tokenizers import models, trainers

    tokenizer = _blank(models.WordPiece(unk_token=UNKNOWN), normalise)
    letters = sorted({letter for text in texts for letter in tokenizer.normalizer.normalize_str(text)} - {" "})
    # The trainer numbers pieces that continue a word in the random order of a hash table, and breaks ties by these
    # numbers. Named as special, they have numbers before it starts.
    first = [*SPECIAL, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=first, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_vocabulary(tokenizer.get_vocab(), normalise)


def adopt_tokenizer(file: Path, normalise: str) -> "Tokenizer":
    """The tokenizer of an existing BERT, from its vocabulary: a word piece per line.

    Raises:
        UserError: there is no such file, it lacks a special token, or it holds a piece twice.
    """
    try:
        pieces = file.read_bytes().decode("utf-8").rstrip("\r\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the vocabulary {file} cannot be read ({error}) · correct `tokenizer.file`") from None
    vocabulary = {piece.rstrip("\r"): index for index, piece in enumerate(pieces)}
    if missing := [name for name in SPECIAL if name not in vocabulary]:
        raise UserError(f"{file} is no vocabulary of a BERT: it lacks {', '.join(missing)} · correct `tokenizer.file`")
    if len(vocabulary) < len(pieces):
        raise UserError(f"{file} holds a piece twice: its lines are no numbers of pieces · correct `tokenizer.file`")
    return _with_vocabulary(vocabulary, normalise)


def read_tokenizer(file: Path) -> "Tokenizer":
    """tokenizer.json. A text that spells a special token does not become one.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no exception of its own
        raise UserError(f"{file} cannot be read as a tokenizer ({error}) · is the file complete?") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(
    tokenizer: "Tokenizer", texts: Sequence[str], pairs: Sequence[str] | None, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (N, length) int32, padded, and the lengths (N,) int64 that they had before they were cut.

    Of a pair, the longer text is cut first.
    """
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    # The library would keep what it cuts off, and of two long texts every combination: they are cut here.
    tokenizer.no_truncation()
    start, separator = (tokenizer.token_to_id(name) for name in (START, SEPARATOR))
    given = [texts] if pairs is None else [texts, pairs]
    columns = [tokenizer.encode_batch(list(part), add_special_tokens=False) for part in given]
    lengths = np.empty(len(texts), dtype=np.int64)
    tokens = np.full((len(texts), length), tokenizer.token_to_id(PAD), dtype=np.int32)
    for index, row in enumerate(zip(*columns, strict=True)):
        parts = [one.ids for one in row]
        lengths[index] = 1 + sum(len(part) + 1 for part in parts)
        room = length - 1 - len(parts)
        for left, part in zip(range(len(parts), 0, -1), sorted(parts, key=len), strict=True):
            del part[room // left :]
            room -= len(part)
        ids = [start, *(token for part in parts for token in (*part, separator))]
        tokens[index, : len(ids)] = ids
    return tokens, lengths


# Preparing.


def prepare(raw: Path, dataset: Any, output: Path, provenance: dict[str, Any]) -> None:
    """Read raw data, drop what stands there twice, split, make tokens, and write the prepared folder.

    A training text that is also in a file of validation or test, and every training text that stands there before, is
    left out; files of validation and test stay as they are.

    Args:
        raw: the fetched source. dataset: its entry in params.yaml (`stages.parameters.text.Dataset`).
        output: an existing empty folder. provenance: what dataset.json says of the source.
    """
    tables, classes = read(raw, dataset)
    if dataset.metric == "f1" and len(classes) > 2:
        raise UserError(f"metric 'f1' is for two classes, there are {len(classes)} · set `metric: macro_f1`")
    blank = _blank(_no_model(), dataset.tokenizer.normalise)
    for part, table in tables.items():
        table.insert(0, "id", [f"{part}-{row:06d}" for row in table.pop("row")])
        table["sha256"] = _content(table, blank)
    dropped = {"broken": sum(table.attrs.get("broken", 0) for table in tables.values())}
    train = tables.pop(TRAIN)
    elsewhere = {content for table in tables.values() for content in table["sha256"]}
    leaks, repeats = train["sha256"].isin(elsewhere), train["sha256"].duplicated()
    dropped |= {"in_another_split": int(leaks.sum()), "repeated": int((repeats & ~leaks).sum())}
    train = _split(train[~leaks & ~repeats].reset_index(drop=True), dataset)
    samples = pd.concat([train, *(table.assign(split=part) for part, table in tables.items())], ignore_index=True)
    samples["flipped"] = 0
    if dataset.flip is not None:
        _flip(samples, dataset.flip, len(classes))
    tokenizer = _tokenizer(raw, dataset, samples)
    tokenizer.save(str(output / TOKENIZER), pretty=False)
    pairs = samples["pair"].tolist() if "pair" in samples else None
    tokens, samples["length"] = encode(tokenizer, samples["text"].tolist(), pairs, dataset.length)
    cut = int((samples["length"] > dataset.length).sum())
    for what, number in {**dropped, "cut": cut}.items():
        if number:
            log.warning(_NOTES[what].format(number, len(samples), dataset.length))
    last = [name for name in ("score", "flipped", "text", "pair") if name in samples]
    samples[[*COLUMNS, *last]].to_csv(output / "manifest.csv", index=False, lineterminator="\n")
    np.save(output / "tokens.npy", tokens)
    np.save(output / "labels.npy", samples["label"].to_numpy(dtype=np.int64))
    write_json(
        output / "dataset.json",
        {
            "classes": classes,
            "length": dataset.length,
            "vocabulary": tokenizer.get_vocab_size(),
            "pad": tokenizer.token_to_id(PAD),
            "separator": tokenizer.token_to_id(SEPARATOR),
            "mask": tokenizer.token_to_id(MASK),
            "tokenizer_sha256": sha256(output / TOKENIZER),
            "pair": pairs is not None,
            "metric": dataset.metric,
            "samples": {name: int((samples["split"] == name).sum()) for name in SPLITS},
            "dropped": dropped,
            "cut": cut,
            "source": provenance,
        },
    )


_NOTES = {
    "broken": "{} lines lack columns and are left out",
    "in_another_split": "{} training texts are in validation or test too and are left out",
    "repeated": "{} training texts stand there before and are left out",
    "cut": "{} of {} texts are longer than {} tokens and are cut",
}


def _no_model() -> Any:
    from tokenizers import models

    return models.WordPiece(unk_token=UNKNOWN)


def _content(table: pd.DataFrame, blank: "Tokenizer") -> list[str]:
    """sha256 of the words of each text, and of its pair: what makes two of them the same to every vocabulary."""
    parts = [table[name] for name in ("text", "pair") if name in table]

    def words(text: str) -> str:
        found = blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text))
        return " ".join(word for word, _ in found)

    texts = ("\x1f".join(map(words, row)) for row in zip(*parts, strict=True))
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def _split(train: pd.DataFrame, dataset: Any) -> pd.DataFrame:
    """The training file, or `rows` of it, with a column `split`."""
    settings = dataset.split
    if dataset.rows is not None and dataset.rows < len(train):
        try:
            part = split(train["label"].to_numpy(), {"unused": len(train) - dataset.rows}, settings.seed)
        except UserError:
            raise UserError(f"rows = {dataset.rows} leaves some class without a sample · raise it") from None
        train = train[part == TRAIN].reset_index(drop=True)
    wanted = {name: getattr(settings, name) for name in ("validation", "test") if getattr(settings, name) is not None}
    wanted[HELD_OUT] = max(1, round(settings.held_out * (len(train) - sum(wanted.values()))))
    return train.assign(split=split(train["label"].to_numpy(), wanted, settings.seed))


def _flip(samples: pd.DataFrame, flip: Any, classes: int) -> None:
    """Give a share of the training samples another label, each of the others alike."""
    generator = np.random.default_rng(flip.seed)
    rows = np.flatnonzero(samples["split"] == TRAIN)
    chosen = generator.choice(rows, round(flip.share * len(rows)), replace=False)
    shift = generator.integers(1, classes, len(chosen))
    samples.loc[chosen, "label"] = (samples.loc[chosen, "label"].to_numpy() + shift) % classes
    samples.loc[chosen, "flipped"] = 1


def _tokenizer(raw: Path, dataset: Any, samples: pd.DataFrame) -> "Tokenizer":
    settings = dataset.tokenizer
    if settings.kind == "vocabulary":
        return adopt_tokenizer(raw / settings.file, settings.normalise)
    train = samples[samples["split"].isin((TRAIN, HELD_OUT))]
    texts = [text for name in ("text", "pair") if name in train for text in train[name]]
    return learn_tokenizer(texts, settings.pieces, settings.normalise)


# Validation.


def tables(prepared: Path) -> dict[str, pd.DataFrame]:
    """What is validated: the manifest beside what the arrays really hold, the splits, and the balance of the classes.

    Raises:
        UserError: an array is unreadable, or has another shape or type than manifest and description say.
    """
    description = describe(prepared)
    manifest = _read_manifest(prepared)
    wanted = {"tokens": ("int32", (len(manifest), description["length"])), "labels": ("int64", (len(manifest),))}
    arrays = {}
    for name, (dtype, shape) in wanted.items():
        try:
            array = arrays[name] = np.load(prepared / f"{name}.npy")
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{prepared / name}.npy cannot be read ({error}) · is the file complete?") from None
        if array.dtype != dtype or array.shape != shape:
            raise UserError(
                f"{prepared / name}.npy holds {array.dtype} of shape {array.shape}; manifest and dataset.json say "
                f"{dtype} of shape {shape} · run `dvc repro prepare@{prepared.name}` again"
            )
    tokenizer = read_tokenizer(prepared / TOKENIZER)
    pairs = manifest["pair"].tolist() if "pair" in manifest else None
    tokens, _ = encode(tokenizer, manifest["text"].tolist(), pairs, description["length"])
    manifest["wrong_tokens"] = (tokens != arrays["tokens"]).sum(axis=1)
    manifest["stored_label"] = arrays["labels"]
    texts = [manifest[name] for name in ("text", "pair") if name in manifest]
    normalise = tokenizer.normalizer.normalize_str
    manifest["letters"] = np.min([[len(normalise(text).strip()) for text in column] for column in texts], axis=0)
    same_content = manifest.groupby("sha256")
    manifest["splits_of_content"] = same_content["split"].transform("nunique")
    # The name of a sample with the same content, so that a finding shows pairs.
    manifest["twin"] = same_content["id"].transform(lambda ids: ids.iloc[::-1].to_numpy() if len(ids) > 1 else None)
    cut, repeated = manifest["length"] > description["length"], manifest.duplicated(["split", "sha256"])
    parts = manifest.assign(cut=cut, repeated=repeated).groupby("split")[["cut", "repeated"]].mean()
    splits = parts.reindex(SPLITS).rename_axis("id").reset_index()
    classes = range(len(description["classes"]))
    # A class that is rare may be absent from the held-out samples.
    everything = pd.MultiIndex.from_product([[TRAIN, "validation", "test"], classes], names=["split", "label"])
    counts = manifest.groupby(["split", "label"]).size()
    balance = counts.reindex(everything, fill_value=0).rename("samples").reset_index()
    balance["share"] = balance["samples"] / balance.groupby("split")["samples"].transform("sum")
    names = balance["label"].map(dict(enumerate(description["classes"])))
    balance.insert(0, "id", balance["split"] + "/" + names)
    return {"manifest": manifest, "splits": splits, "balance": balance}


def expectations(dataset: Any, description: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is expected, as plain data: per table of `tables`, Great Expectations' type names and arguments.

    Args:
        dataset: the entry in params.yaml. description: dataset.json.
    """
    expect, between = dataset.expect, "expect_column_values_to_be_between"
    labels = list(range(len(description["classes"])))
    manifest: list[dict[str, Any]] = [
        *({"type": "expect_column_values_to_not_be_null", "column": name} for name in COLUMNS),
        {"type": "expect_column_values_to_be_unique", "column": "id"},
        {"type": "expect_column_values_to_be_in_set", "column": "label", "value_set": labels},
        {"type": "expect_column_values_to_be_in_set", "column": "split", "value_set": list(SPLITS)},
        {"type": between, "column": "letters", "min_value": 1, "description": "no text is empty"},
        {
            "type": between,
            "column": "splits_of_content",
            "min_value": 1,
            "max_value": 1,
            "description": "the same text never stands in two splits",
        },
        {
            "type": between,
            "column": "wrong_tokens",
            "max_value": 0,
            "description": "the stored tokens are those of the text",
        },
        {"type": "expect_column_pair_values_to_be_equal", "column_A": "label", "column_B": "stored_label"},
    ]
    if expect.samples is not None:
        manifest.append({"type": "expect_table_row_count_to_equal", "value": expect.samples})
    shares = {
        "repeated": (expect.duplicates, "the share of texts that stand before in the same split"),
        "cut": (expect.truncated, "the share of texts that are cut"),
    }
    splits = [
        {"type": between, "column": name, "max_value": most, "description": f"{what} is at most {most:g}"}
        for name, (most, what) in shares.items()
    ]
    balance: list[dict[str, Any]] = [
        {
            "type": between,
            "column": "samples",
            "min_value": 1,
            "description": "every class has a sample in training, validation and test",
        },
        {
            "type": between,
            "column": "share",
            "min_value": expect.smallest_class,
            "max_value": expect.largest_class,
        },
    ]
    return {"manifest": manifest, "splits": splits, "balance": balance}


def describe(prepared: Path) -> dict[str, Any]:
    """dataset.json of a prepared data set."""
    description: dict[str, Any] = json.loads((prepared / "dataset.json").read_text(encoding="utf-8"))
    return description


def _read_manifest(prepared: Path) -> pd.DataFrame:
    """manifest.csv: an empty text is empty, and "nan" is a text like any other; elsewhere an empty cell is missing."""
    return pd.read_csv(
        prepared / "manifest.csv",
        dtype={"id": str, "split": str, "sha256": str, "text": str, "pair": str},
        keep_default_na=False,
        na_values={name: [""] for name in COLUMNS},
    )


# Batches. torch is imported inside: preparing and validating do not need it, and every stage pays its imports.


def rows(prepared: Path, *parts: str) -> np.ndarray:
    """(N,) int64: the rows of the manifest, from 0, that belong to these splits."""
    manifest = pd.read_csv(prepared / "manifest.csv", usecols=["split"], dtype=str)
    return np.flatnonzero(manifest["split"].isin(parts))


def load(prepared: Path, *parts: str) -> tuple[list[str], "Tensor", "Tensor"]:
    """The samples of these splits: ids, tokens (N, length) int64, labels (N,) int64."""
    import torch

    chosen = rows(prepared, *parts)
    ids = pd.read_csv(prepared / "manifest.csv", usecols=["id"], dtype=str)["id"].iloc[chosen].tolist()
    tokens = np.load(prepared / "tokens.npy", mmap_mode="r")[chosen].astype(np.int64)
    return ids, torch.from_numpy(tokens), torch.from_numpy(np.load(prepared / "labels.npy")[chosen])


def trim(tokens: "Tensor", pad: int) -> "Tensor":
    """(B, L) without the columns that are padding in every row."""
    return tokens[:, : int((tokens != pad).sum(1).max())]
