"""Where models lie: those of params.yaml, what was trained beside them, and nothing else."""

import re
from pathlib import Path

import pytest

from data.errors import UserError
from stages import paths


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(path: str, content: str = "x") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)


def test_every_model_is_followed_by_what_was_trained_beside_it() -> None:
    for companion in ("teacher", "another", "generator"):
        put(f"models/companions/text/b/{companion}/model.json")
    put("models/companions/text/b/contents.json", '{"evaluated": ["another", "teacher"]}')
    put("models/companions/text/b/influence.csv")
    put("models/companions/text/none")
    put("models/companions/text/c/model.csv")
    put("models/companions/text/stranger/teacher/model.json")
    put("models/companions/recognition/a/teacher/model.json")
    found = paths.models("text", ["a", "b", "c"])
    assert list(found.items()) == [
        ("a", Path("models/trained/text/a")),
        ("b", Path("models/trained/text/b")),
        ("b.another", Path("models/companions/text/b/another")),
        ("b.teacher", Path("models/companions/text/b/teacher")),
        ("c", Path("models/trained/text/c")),
    ]


def test_known_models_and_none_are_no_strangers() -> None:
    paths.refuse_strangers("text", ["a"])
    for folder in ("trained", "companions"):
        put(f"models/{folder}/text/none")
        put(f"models/{folder}/text/a/model.json")
        put(f"models/{folder}/text/.gitignore")
        put(f"models/{folder}/text/.b.part-7/model.json")
        put(f"models/{folder}/recognition/b/model.json")
    paths.refuse_strangers("text", ["a"])


@pytest.mark.parametrize("folder", ["trained", "companions"])
def test_a_stranger_is_named_with_what_removes_it(folder: str) -> None:
    for name in ("a", "b", "c"):
        put(f"models/{folder}/text/{name}/model.json")
    message = (
        f"models/{folder}/text holds models that params.yaml does not name: a, c · name them there, or remove them: "
        f"rm -r models/{folder}/text/a models/{folder}/text/c"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        paths.refuse_strangers("text", ["b"])
