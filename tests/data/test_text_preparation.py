"""Texts: prepared to the same bytes everywhere, split without leaks, and made into the tokens that others make."""

import hashlib
import json
import os
import string
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import text
from data.errors import UserError
from data.files import sha256, tree_digest
from data.splits import split
from data.text import GLUE, SPECIAL, adopt_tokenizer, encode, learn_tokenizer, read_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
import text_files as files

ROOT = Path(__file__).resolve().parents[2]
NEWSWIRE = "CHAMPION PRODUCTS <CH> APPROVES 2-for-1 Stock Split;\n its Café & Ångström units rose 3.5 pct, to $1.2mln."


def manifest_of(folder: Path) -> pd.DataFrame:
    kept = {"dtype": str, "keep_default_na": False}
    return pd.read_csv(folder / "manifest.csv", **kept)  # type: ignore[call-overload,no-any-return]


def normalised(kind: str, found: str) -> str:
    """What a tokenizer's normaliser makes of a text."""
    return str(learn_tokenizer(["a"], 100, kind).normalizer.normalize_str(found))


def small(raw: Path, output: Path, samples: list[tuple[str, str]], /, **fields: Any) -> Path:
    files.write_csv(raw / "train.csv", samples)
    return files.prepared(raw, files.table_entry(**fields), output)


def balanced(count: int = 100, classes: str = "xyz") -> list[tuple[str, str]]:
    return [(found, classes[n % len(classes)]) for n, found in enumerate(files.some_texts(count))]


# The folder


def test_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """The trainer of the vocabulary is random in every process: it breaks ties by the order of a hash table."""
    files.write_csv(tmp_path / "raw/train.csv", balanced(150))
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import text_files as files\n"
        "for normalise in ('letters', 'bert'):\n"
        "    vocabulary = {'kind': 'wordpiece', 'pieces': 130, 'normalise': normalise}\n"
        "    entry = files.table_entry(tokenizer=vocabulary, flip={'share': 0.2})\n"
        "    files.prepared(Path(sys.argv[2]), entry, Path(sys.argv[3]) / normalise)\n"
    )
    running = []
    for seed in ("0", "1", "2"):
        arguments = [Path(__file__).parent, tmp_path / "raw", tmp_path / seed]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo"}
        environment["TOKENIZERS_PARALLELISM"] = "true" if seed == "2" else "false"
        running.append(subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment))
    assert [process.wait() for process in running] == [0] * 3
    assert len({tree_digest(tmp_path / seed) for seed in "012"}) == 1
    assert sorted(path.name for path in (tmp_path / "0/bert").iterdir()) == [
        "dataset.json",
        "labels.npy",
        "manifest.csv",
        "tokenizer.json",
        "tokens.npy",
    ]


def test_neither_chance_nor_the_order_of_the_texts_decides_a_tie() -> None:
    """A corpus of ties: every pair of letters is as frequent as every other."""
    corpus = [a + b + c + d for a, b, c, d in zip("abcdefgh", "bcdefgha", "cdefghab", "defghabc", strict=True)]
    learnt = [learn_tokenizer(texts * 3, 100, "letters").get_vocab() for texts in (corpus, corpus, corpus[::-1])]
    assert learnt[0] == learnt[1] == learnt[2]
    assert len(learnt[0]) > len(SPECIAL) + 16, "nothing was merged"


def test_the_folder_says_what_it_holds(tmp_path: Path) -> None:
    rows = balanced(100)
    folder = small(tmp_path / "raw", tmp_path / "out", rows)
    manifest, description = manifest_of(folder), text.describe(folder)
    assert list(manifest) == ["id", "split", "label", "length", "sha256", "flipped", "text"]
    assert manifest["id"].tolist() == [f"train-{row:06d}" for row in range(1, 101)]
    assert manifest["text"].tolist() == [found for found, _ in rows]
    assert [description["classes"][int(label)] for label in manifest["label"]] == [label for _, label in rows]
    assert manifest["flipped"].unique().tolist() == ["0"]
    for row in manifest.itertuples():
        assert row.sha256 == hashlib.sha256(normalised("bert", str(row.text)).encode()).hexdigest()
    tokens, labels = np.load(folder / "tokens.npy"), np.load(folder / "labels.npy")
    assert (tokens.dtype, tokens.shape, labels.dtype, labels.shape) == (np.int32, (100, 16), np.int64, (100,))
    assert labels.tolist() == manifest["label"].astype(int).tolist()
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    lengths = [len(tokenizer.encode(found).ids) for found in manifest["text"]]
    assert manifest["length"].astype(int).tolist() == lengths
    assert ((tokens != description["pad"]).sum(1) == np.minimum(lengths, 16)).all()
    assert description == {
        "classes": ["x", "y", "z"],
        "length": 16,
        "vocabulary": tokenizer.get_vocab_size(),
        "pad": tokenizer.token_to_id("[PAD]"),
        "separator": tokenizer.token_to_id("[SEP]"),
        "mask": tokenizer.token_to_id("[MASK]"),
        "tokenizer_sha256": sha256(folder / "tokenizer.json"),
        "pair": False,
        "metric": "accuracy",
        "samples": {"train": 64, "held_out": 16, "validation": 10, "test": 10},
        "dropped": {"broken": 0, "in_another_split": 0, "repeated": 0},
        "cut": sum(length > 16 for length in lengths),
        "source": files.PROVENANCE,
    }
    for parts in (("train",), ("train", "held_out"), ("test", "validation")):
        chosen = np.flatnonzero(manifest["split"].isin(parts))
        ids, loaded, classes = text.load(folder, *parts)
        assert ids == manifest["id"].iloc[chosen].tolist()
        assert (loaded.dtype, classes.dtype) == (torch.int64, torch.int64)
        assert (loaded.numpy() == tokens[chosen]).all()
        assert (classes.numpy() == labels[chosen]).all()
        assert text.rows(folder, *parts).tolist() == chosen.tolist()


@pytest.mark.parametrize("task", GLUE)
def test_every_task_of_glue_can_be_prepared(tmp_path: Path, task: str) -> None:
    files.write_glue_task(tmp_path, task)
    folder = files.prepared(tmp_path, files.glue_entry(task, length=32), tmp_path / "out")
    manifest, description = manifest_of(folder), text.describe(folder)
    samples = files.glue_samples(task, 72)
    order = [(row.split("-")[0], int(row.split("-")[1]) - 1) for row in manifest["id"]]
    wanted = [samples[index + 60 * (part == "test")] for part, index in order]
    assert manifest["text"].tolist() == [files.plain(first) for first, _, _ in wanted]
    assert description["pair"] == ("pair" in manifest) == (task not in ("CoLA", "SST-2"))
    if "pair" in manifest:
        assert manifest["pair"].tolist() == [files.plain(second) for _, second, _ in wanted]
        tokens = np.load(folder / "tokens.npy")
        assert ((tokens == description["separator"]).sum(1) == 2).all()
    assert ("score" in manifest) == (task == "STS-B")
    if "score" in manifest:
        assert manifest["score"].astype(float).tolist() == [float(label) for _, _, label in wanted]
        assert manifest["label"].astype(int).tolist() == [round(float(label)) for _, _, label in wanted]
    assert description["samples"]["test"] == 12
    assert (manifest["split"].eq("test") == manifest["id"].str.startswith("test-")).all()


def test_texts_that_need_care_come_back_from_the_manifest(tmp_path: Path) -> None:
    odd = ['"', "a,b", "x\ry", "p\r\nq", "v\nw", "nan", "NA", "1", "\u2028 a\u2029b\x85c", 'say "no", or', "#", "\\"]
    rows = [*balanced(60), *((found, "xyz"[n % 3]) for n, found in enumerate(odd))]
    folder = small(tmp_path / "raw", tmp_path / "out", rows)
    assert text.tables(folder)["manifest"]["text"].tolist() == [files.plain(found) for found, _ in rows]
    assert (text.tables(folder)["manifest"]["wrong_tokens"] == 0).all()


# Splits


def test_the_split_is_in_proportion_and_comes_from_one_place(tmp_path: Path) -> None:
    rows = [(found, "xxxyyz"[n % 6]) for n, found in enumerate(files.some_texts(120))]
    folder = small(tmp_path / "raw", tmp_path / "out", rows)
    manifest = manifest_of(folder)
    expected = split(
        np.array(["xyz".index(label) for _, label in rows]), {"validation": 10, "test": 10, "held_out": 20}, 3
    )
    assert manifest["split"].tolist() == expected.tolist()
    for part, number in {"train": 80, "held_out": 20, "validation": 10, "test": 10}.items():
        counts = Counter(manifest["label"][manifest["split"] == part])
        assert sum(counts.values()) == number
        for label, share in (("0", 1 / 2), ("1", 1 / 3), ("2", 1 / 6)):
            assert abs(counts[label] - share * number) <= 1


@pytest.mark.parametrize("rows", [30, 59, 90, 119, 120, 500])
def test_so_many_rows_are_taken_from_every_class_in_proportion(tmp_path: Path, rows: int) -> None:
    samples = [(found, "xxxyyz"[n % 6]) for n, found in enumerate(files.some_texts(120))]
    wanted = {"validation": 4, "test": 4, "held_out": 0.1}
    folder = small(tmp_path / "raw", tmp_path / "out", samples, rows=rows, split=wanted)
    manifest = manifest_of(folder)
    kept = min(rows, 120)
    assert len(manifest) == kept
    counts = Counter(manifest["label"])
    for label, share in (("0", 1 / 2), ("1", 1 / 3), ("2", 1 / 6)):
        assert abs(counts[label] - share * kept) <= 1
    assert text.describe(folder)["samples"]["held_out"] == round(0.1 * (kept - 8))


def test_rows_that_leave_a_class_out_are_refused(tmp_path: Path) -> None:
    """A rare class may be taken whole; it may not vanish."""
    samples = [(found, "z" if n < 3 else "xy"[n % 2]) for n, found in enumerate(files.some_texts(120))]
    wanted = {"validation": 1, "test": 1, "held_out": 0.01}
    assert len(manifest_of(small(tmp_path / "raw", tmp_path / "a", samples, rows=118, split=wanted))) == 118
    with pytest.raises(UserError, match="rows = 10 leaves some class without a sample · raise it"):
        small(tmp_path / "raw", tmp_path / "b", samples, rows=10, split=wanted)


def test_a_held_out_share_is_at_least_one_sample(tmp_path: Path) -> None:
    folder = small(
        tmp_path / "raw", tmp_path / "out", balanced(30), split={"validation": 5, "test": 5, "held_out": 1e-9}
    )
    assert text.describe(folder)["samples"] == {"train": 19, "held_out": 1, "validation": 5, "test": 5}


def test_more_held_back_than_there_is(tmp_path: Path) -> None:
    message = r"split.validation \+ split.test \+ split.held_out = 31, but there are only 30 samples"
    with pytest.raises(UserError, match=message):
        small(tmp_path / "raw", tmp_path / "out", balanced(30), split={"validation": 20, "test": 10})


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 39), min_size=90, max_size=120), st.integers(0, 99))
def test_no_text_stands_in_two_splits_and_leaks_leave_training_only(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[int], seed: int
) -> None:
    """Rows drawn with repetition into three files, some of them in other letters."""
    generator = np.random.default_rng(seed)
    texts = files.some_texts(40)
    rows = [(texts[n].upper() if generator.random() < 0.3 else texts[n], "xy"[n % 2]) for n in chosen]
    # Every class keeps samples that no other file holds.
    own = [(f"{found} {label}", label) for found in texts[:6] for label in "xy"]
    parts = {"train": [*rows[:60], *own], "validation": rows[60:75], "test": rows[75:]}
    raw = tmp_path_factory.mktemp("raw")
    for name, part in parts.items():
        files.write_csv(raw / f"{name}.csv", part)
    entry = files.table_entry(
        files={name: f"{name}.csv" for name in parts}, classes=["x", "y"], split={"held_out": 0.2, "seed": seed}
    )
    folder = files.prepared(raw, entry, raw / "out")
    manifest = manifest_of(folder)
    content = manifest["text"].str.lower()
    for name in ("validation", "test"):
        assert manifest["text"][manifest["split"] == name].tolist() == [found for found, _ in parts[name]]
    trained = manifest["split"].isin(["train", "held_out"])
    assert not content[trained].duplicated().any()
    elsewhere = set(content[~trained])
    assert not set(content[trained]) & elsewhere
    lower = [found.lower() for found, _ in parts["train"]]
    assert set(content[trained]) == set(lower) - elsewhere
    leaks = sum(found in elsewhere for found in lower)
    dropped = {"in_another_split": leaks, "repeated": len(lower) - leaks - int(trained.sum())}
    assert text.describe(folder)["dropped"] == {"broken": 0, **dropped}


def test_of_repeated_texts_the_first_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = balanced(60)
    again = [(found.upper(), "z") for found, _ in rows[:7]]
    folder = small(tmp_path / "raw", tmp_path / "out", [*rows, *again])
    assert manifest_of(folder)["text"].tolist() == [found for found, _ in rows]
    assert text.describe(folder)["dropped"]["repeated"] == 7
    assert [record.message for record in caplog.records if "before" in record.message] == [
        "7 training texts stand there before and are left out"
    ]


@pytest.mark.parametrize("normalise", ["letters", "bert"])
def test_texts_of_the_same_tokens_are_the_same_text(tmp_path: Path, normalise: str) -> None:
    """Spaces between words, and round a point, make no other text: the network would not see them."""
    rows = [(f"{found} , again .", label) for found, label in balanced(40)]
    again = [(found.replace(" , again .", ",  again."), label) for found, label in rows[:6]]
    files.write_csv(tmp_path / "train.csv", [*rows, *again[:3]])
    files.write_csv(tmp_path / "test.csv", [*again[3:], *[(f"new {label}", label) for label in "xyz"]])
    entry = files.table_entry(
        files={"train": "train.csv", "test": "test.csv"},
        split={"validation": 5},
        tokenizer={"kind": "wordpiece", "normalise": normalise},
    )
    dropped = text.describe(files.prepared(tmp_path, entry, tmp_path / "out"))["dropped"]
    assert dropped == {"broken": 0, "in_another_split": 3, "repeated": 3}


def test_f1_is_for_two_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metric 'f1' is for two classes, there are 3"):
        small(tmp_path / "raw", tmp_path / "out", balanced(40), metric="f1")


def test_pairs_are_repeated_only_as_pairs(tmp_path: Path) -> None:
    texts = files.some_texts(30)
    rows = [(texts[n], texts[(n + step) % 30], "xy"[n % 2]) for n in range(30) for step in (1, 2)]
    rows += [(b, a, label) for a, b, label in rows[:5]] + rows[:4]
    # What is one word more here and one less there is another pair.
    rows += [("grain wheat", "corn", "x"), ("grain", "wheat corn", "x")]
    files.write_csv(tmp_path / "train.csv", rows, "text,other,label")
    folder = files.prepared(tmp_path, files.table_entry(columns={"pair": "other"}), tmp_path / "out")
    assert len(manifest_of(folder)) == 67
    assert text.describe(folder)["dropped"]["repeated"] == 4


# Flipped labels


@pytest.mark.parametrize(("share", "classes"), [(0.25, "xyz"), (0.1, "xy"), (0.9, "wxyz")])
def test_so_many_training_labels_are_flipped_and_no_other(tmp_path: Path, share: float, classes: str) -> None:
    rows = balanced(120, classes)
    plain = manifest_of(small(tmp_path / "raw", tmp_path / "a", rows))
    flipped = manifest_of(small(tmp_path / "raw", tmp_path / "b", rows, flip={"share": share, "seed": 5}))
    changed = flipped["flipped"] == "1"
    assert changed.sum() == round(share * (plain["split"] == "train").sum())
    assert (flipped["split"][changed] == "train").all()
    assert ((plain["label"] != flipped["label"]) == changed).all()
    if len(classes) > 2 and changed.sum() > 15:
        assert len(set(zip(plain["label"][changed], flipped["label"][changed], strict=True))) >= 5
    assert (plain.drop(columns=["label", "flipped"]) == flipped.drop(columns=["label", "flipped"])).all(axis=None)
    assert (np.load(tmp_path / "b/labels.npy") == flipped["label"].astype(int)).all()
    other = manifest_of(small(tmp_path / "raw", tmp_path / "c", rows, flip={"share": share, "seed": 6}))
    assert not (other["flipped"] == flipped["flipped"]).all()


# Vocabulary and tokens


def test_the_vocabulary_knows_nothing_of_validation_and_test(tmp_path: Path) -> None:
    """Other texts there leave it as it is, to the byte; other texts in the held-out split do not."""
    parts = {name: balanced(40) for name in ("train", "validation", "test")}
    parts["validation"] = [(f"{found} zzzq", label) for found, label in parts["validation"]]
    parts["test"] = [(f"vvvx {found}", label) for found, label in parts["test"]]

    def tokenizer(folder: str) -> str:
        for name, rows in parts.items():
            files.write_csv(tmp_path / folder / f"{name}.csv", rows)
        entry = files.table_entry(files={name: f"{name}.csv" for name in parts}, split={"held_out": 0.2})
        prepared = files.prepared(tmp_path / folder, entry, tmp_path / folder / "out")
        held = manifest_of(prepared).query("split == 'held_out'")["id"].iloc[0]
        places.append(int(held.removeprefix("train-")) - 1)
        return (prepared / "tokenizer.json").read_text()

    places: list[int] = []
    first = tokenizer("a")
    assert not {"z", "q", "v"} & set(json.loads(first)["model"]["vocab"])
    parts["validation"] = [(f"{found} qqqj", label) for found, label in parts["validation"]]
    assert tokenizer("b") == first
    found, label = parts["train"][places[0]]
    parts["train"][places[0]] = (f"{found} zzz", label)
    assert "z" in json.loads(tokenizer("c"))["model"]["vocab"]
    assert places[0] == places[2], "the changed text is still held out"


@pytest.mark.parametrize("size", [100, 120, 200])
def test_a_learnt_vocabulary_has_its_size_and_spells_every_word(size: int) -> None:
    texts = files.some_texts(100)
    tokenizer = learn_tokenizer(texts, size, "letters")
    vocabulary = tokenizer.get_vocab()
    assert tokenizer.get_vocab_size() <= size
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert [tokenizer.id_to_token(index) for index in range(5)] == list(SPECIAL)
    for found in texts:
        pieces = tokenizer.encode(found).tokens[1:-1]
        assert "[UNK]" not in pieces
        assert "".join(f" {piece}" if piece[:2] != "##" else piece[2:] for piece in pieces).strip() == found
    unseen = tokenizer.encode("jazz grain").tokens
    assert unseen[1] == "[UNK]"
    assert unseen[-1] == "[SEP]"


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=8),
    st.integers(8, 20), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_tokens_are_those_of_the_librarys_own_padding_and_truncation(
    lengths: list[tuple[int, int]], length: int, pair: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    first, second = (
        [" ".join(generator.choice(files.WORDS.split(), n)) for n in each] for each in zip(*lengths, strict=True)
    )
    tokenizer = LEARNT
    tokens, before = encode(tokenizer, first, second if pair else None, length)
    other = type(tokenizer).from_str(tokenizer.to_str())
    other.enable_truncation(length, strategy="longest_first")
    other.enable_padding(length=length, pad_id=other.token_to_id("[PAD]"), pad_token="[PAD]")
    inputs: Any = list(zip(first, second, strict=True)) if pair else first
    assert tokens.tolist() == [one.ids for one in other.encode_batch(inputs)]
    assert (tokens.dtype, tokens.shape) == (np.int32, (len(first), length))
    other.no_truncation()
    other.no_padding()
    assert before.tolist() == [len(one.ids) for one in other.encode_batch(inputs)]
    again, _ = encode(tokenizer, first, second if pair else None, length)
    assert (again == tokens).all(), "encode leaves the tokenizer as it was"


LEARNT = learn_tokenizer(files.some_texts(100), 120, "bert")


def test_of_a_pair_the_longer_text_is_cut_first() -> None:
    tokenizer = learn_tokenizer(["a b c d e f"], 100, "bert")

    def cut(first: str, second: str, length: int) -> list[str]:
        (ids,), (before,) = encode(tokenizer, [first], [second], length)
        assert before == len(first.split()) + len(second.split()) + 3
        return [tokenizer.id_to_token(index) for index in ids]

    assert cut("a b c d e f", "a b", 8) == ["[CLS]", "a", "b", "c", "[SEP]", "a", "b", "[SEP]"]
    assert cut("a", "b c d e f a b", 8) == ["[CLS]", "a", "[SEP]", "b", "c", "d", "e", "[SEP]"]
    both = cut("a b c d e f", "a b c d e f", 9)
    assert (both.index("[SEP]"), both[-1]) in ((4, "[SEP]"), (5, "[SEP]"))


def test_what_is_cut_is_counted_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(found, "xy"[n % 2]) for n, found in enumerate(files.some_texts(60, shortest=4, longest=8))]
    rows += [(f"{'grain ' * (20 + n)}end", "x") for n in range(9)]
    folder = small(tmp_path / "raw", tmp_path / "out", rows, tokenizer={**files.WORDPIECE, "pieces": 1000})
    assert text.describe(folder)["cut"] == 9
    assert [record.message for record in caplog.records] == ["9 of 69 texts are longer than 16 tokens and are cut"]
    manifest = manifest_of(folder)
    assert (manifest["length"].astype(int) > 16).sum() == 9
    cut = np.load(folder / "tokens.npy")[manifest["length"].astype(int) > 16]
    assert (cut[:, -1] == text.describe(folder)["separator"]).all()


@pytest.mark.parametrize("normalise", ["letters", "bert"])
def test_a_special_token_that_is_spelt_in_a_text_is_a_text(tmp_path: Path, normalise: str) -> None:
    rows = [(f"{found} [MASK] [SEP] [PAD] [CLS] [UNK]", label) for found, label in balanced(60)]
    tokenizer = {**files.WORDPIECE, "pieces": 300, "normalise": normalise}
    folder = small(tmp_path / "raw", tmp_path / "out", rows, length=64, tokenizer=tokenizer)
    tokens, description = np.load(folder / "tokens.npy"), text.describe(folder)
    assert description["cut"] == 0
    assert ((tokens == description["separator"]).sum(1) == 1).all()
    assert not (tokens == description["mask"]).any()
    assert (tokens[:, 0] == tokens[0, 0]).all()
    assert (tokens[:, 1:] != tokens[0, 0]).all()
    ends = (tokens != description["pad"]).sum(1)
    assert all((row[end:] == description["pad"]).all() for row, end in zip(tokens, ends, strict=True))
    # Also by a tokenizer that comes from its file, as a registered model's does.
    again = read_tokenizer(folder / "tokenizer.json").encode(rows[0][0]).ids
    assert again == tokens[0][: len(again)].tolist()


# Normalisers


def test_a_raw_newswire_text_gives_the_tokens_of_its_normal_form() -> None:
    """R8 is published in lower case without punctuation; a deployed model meets texts as they are written."""
    form = "champion products ch approves for stock split its cafe angstrom units rose pct to mln"
    tokenizer = learn_tokenizer([form], 200, "letters")
    assert normalised("letters", NEWSWIRE) == form
    assert tokenizer.encode(NEWSWIRE).ids == tokenizer.encode(form).ids
    assert "[UNK]" not in tokenizer.encode(NEWSWIRE).tokens


def letters_of(found: str) -> str:
    """The normaliser `letters` by hand."""
    apart = unicodedata.normalize("NFKD", found)
    plain = "".join(letter for letter in apart if unicodedata.category(letter)[0] != "M").lower()
    return " ".join("".join(letter if letter in string.ascii_lowercase else " " for letter in plain).split())


# Unassigned characters are left out: two versions of Unicode may differ in them.
CHARACTERS = st.text(st.characters(blacklist_categories=["Cs", "Cn", "Co"], max_codepoint=0x2FFF), max_size=30)


@settings(deadline=None, max_examples=150)
@given(CHARACTERS | st.text(string.printable + "éÅßİıſKﬁ²½"))
def test_letters_are_what_they_are_said_to_be_and_normalising_twice_changes_nothing(found: str) -> None:
    once = LETTERS.normalize_str(found)
    assert once == letters_of(found)
    assert LETTERS.normalize_str(once) == once


LETTERS = learn_tokenizer(["a"], 100, "letters").normalizer


# The vocabulary of an existing BERT

PIECES = [*SPECIAL, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), *",.!'-\"",
          "the", "##ing", "un", "##aff", "##able", "cafe", "2", "##0", "漢"]  # fmt: skip


def write_vocabulary(file: Path, pieces: list[str], end: str = "\n", last: bool = True) -> Path:
    file.write_bytes((end.join(pieces) + end * last).encode())
    return file


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours and that of transformers, of the same file."""
    from models.torchvision_import import import_torchvision

    import_torchvision()
    from transformers import BertTokenizerFast

    file = write_vocabulary(tmp_path_factory.mktemp("bert") / "vocab.txt", PIECES)
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    return adopt_tokenizer(file, "bert"), BertTokenizerFast(vocab=vocabulary, do_lower_case=True)


ENGLISH = st.text("abz THE unaffable ing Café 20 漢字 ,.!'-\"\t\n\x00\ufffd\u200b", max_size=40)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(ENGLISH, ENGLISH), min_size=1, max_size=3), st.booleans())
def test_an_existing_vocabulary_gives_the_tokens_of_transformers(
    both: tuple[Any, Any], samples: list[tuple[str, str]], pair: bool
) -> None:
    ours, theirs = both
    first, second = (list(each) for each in zip(*samples, strict=True))
    tokens, lengths = encode(ours, first, second if pair else None, 24)
    wanted = theirs(first, second if pair else None, padding="max_length", max_length=24, truncation="longest_first")
    assert tokens.tolist() == wanted["input_ids"]
    whole = theirs(first, second if pair else None)
    assert lengths.tolist() == [len(ids) for ids in whole["input_ids"]]


def test_the_ends_of_its_lines_do_not_matter(tmp_path: Path) -> None:
    wanted = {piece: index for index, piece in enumerate(PIECES)}
    for end in ("\n", "\r\n"):
        for last in (True, False):
            file = write_vocabulary(tmp_path / "vocab.txt", PIECES, end, last)
            assert adopt_tokenizer(file, "bert").get_vocab() == wanted


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (PIECES[1:], "vocab.txt is no vocabulary of a BERT: it lacks [PAD] · correct `tokenizer.file`"),
        (PIECES[5:], "it lacks [PAD], [UNK], [CLS], [SEP], [MASK]"),
        ([*PIECES, "the"], "vocab.txt holds a piece twice"),
        (None, "vocab.txt cannot be read ("),
    ],
)
def test_a_wrong_vocabulary_is_refused(tmp_path: Path, pieces: list[str] | None, message: str) -> None:
    if pieces is not None:
        write_vocabulary(tmp_path / "vocab.txt", pieces)
    with pytest.raises(UserError) as caught:
        adopt_tokenizer(tmp_path / "vocab.txt", "bert")
    assert message in str(caught.value)


def test_a_data_set_may_have_the_vocabulary_of_an_existing_bert(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "train.csv", balanced(60))
    write_vocabulary(tmp_path / "vocab.txt", PIECES)
    entry = files.table_entry(tokenizer={"kind": "vocabulary", "file": "vocab.txt"}, length=64)
    folder = files.prepared(tmp_path, entry, tmp_path / "out")
    assert text.describe(folder)["vocabulary"] == len(PIECES)
    assert read_tokenizer(folder / "tokenizer.json").get_vocab() == {piece: n for n, piece in enumerate(PIECES)}


@pytest.mark.parametrize("content", [None, "", "{", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read as a tokenizer \("):
        read_tokenizer(tmp_path / "tokenizer.json")


# Batches


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_batch_is_trimmed_to_its_longest_text(lengths: list[int]) -> None:
    tokens = torch.zeros(len(lengths), 9, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = 7
    trimmed = text.trim(tokens, 0)
    assert trimmed.shape == (len(lengths), max(lengths))
    assert torch.equal(trimmed, tokens[:, : max(lengths)])
