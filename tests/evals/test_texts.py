# SPDX-License-Identifier: Apache-2.0
"""Long texts: files, folders, token ids, and data sets from a folder; the Hub stands in for a network that fails."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrconvert.errors import EnvironmentFailure, InputError, UsageError
from lrconvert.evals import data_sets
from lrconvert.evals.data_sets import Address
from lrconvert.evals.texts import Text, read_texts, sources_of


def encode(text: str) -> list[int]:
    """Bytes as tokens."""
    return list(text.encode())


def read(*named: str | Path, tokens: int = 1) -> list[Text]:
    return read_texts(sources_of(named), lambda: encode, vocab=256, tokens=tokens)


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A folder with a data set: rows of 10, 200, 30, 400 and 500 tokens."""
    sizes = (10, 200, 30, 400, 500)
    return write_rows(tmp_path / "books", [{"title": f"no. {n}", "text": "abc " * (n // 4) + "." * (n % 4)}
                                           for n in sizes])  # fmt: skip


# --- files -----------------------------------------------------------------------------------------------


def test_texts_are_files_folders_and_token_ids(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("bb")
    (tmp_path / "a.txt").write_text("aaa")
    (tmp_path / "notes.md").write_text("no")
    np.save(tmp_path / "ids.npy", np.array([1, 2, 3], dtype=np.uint16))
    found = read(tmp_path, tmp_path / "ids.npy")
    assert [(text.name, text.tokens.tolist()) for text in found] == [
        ("a.txt", [97] * 3),
        ("b.txt", [98] * 2),
        ("ids.npy", [1, 2, 3]),
    ]
    assert found[0].record() == {"name": "a.txt", "sha256": hashlib.sha256(b"aaa").hexdigest(), "tokens": 3}
    assert found[2].sha256 == hashlib.sha256((tmp_path / "ids.npy").read_bytes()).hexdigest()
    assert len({text.sha256 for text in found}) == 3


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    """Where there is none, they are read all the same; of an unknown vocabulary any id may be."""
    np.save(tmp_path / "ids.npy", np.array([1, 10**6]))

    def missing() -> Any:
        raise InputError("no tokenizer.json")

    (found,) = read_texts(sources_of([tmp_path / "ids.npy"]), missing)
    assert found.tokens.tolist() == [1, 10**6]
    with pytest.raises(InputError, match="no tokenizer"):
        read_texts(sources_of([tmp_path / "a.txt"]), missing)


HEAD = b"\x93NUMPY\x01\x00G\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,)}\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.txt", None, r"can.t be read \(No such file or directory\)"),
        ("empty.txt", b" \n", "no text in it"),
        ("binary.txt", b"\xff\xfe\x00", "not a text in UTF-8"),
        ("no.npy", b"not an array", "can't be read as token ids"),
        ("archive.npy", b"PK\x03\x04 of several", "can't be read as token ids"),
        ("damaged.npy", HEAD.replace(b"G", b":"), "can't be read as token ids"),
        ("vast.npy", HEAD, "can't be read as token ids"),
        ("float.npy", np.zeros(3), "a list of integer token ids is needed"),
        ("large.npy", np.array([1, 999]), "token ids 1 … 999; the model has 256"),
        ("edge.npy", np.array([1, 256]), "token ids 1 … 256; the model has 256"),
        ("folder", "folder", "no .txt file"),
    ],
)
def test_what_is_not_text_is_reported(name: str, content: object, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(InputError, match=expected):
        read(path)


# --- data sets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:emozilla/pg19-test", Address("emozilla/pg19-test")),
        ("hf:a/b:test", Address("a/b", split="test")),
        ("hf:a/b:en:test#12", Address("a/b", config="en", split="test", count=12)),
        ("hf:a/b@refs/convert/parquet?column=body#1", Address("a/b", "refs/convert/parquet", column="body", count=1)),
        ("hf:./folder:train", Address("./folder", split="train")),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert Address.parse(text) == expected


@pytest.mark.parametrize("text", ["hf:", "hf:a/b:", "hf:a/b#0", "hf:a/b#many", "hf:a:b:c:d", "hf:a/b?row=3"])
def test_what_is_no_address_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="does not name a data set"):
        sources_of([text])


def test_the_first_rows_that_are_long_enough_are_taken(books: Path) -> None:
    """Rows 1, 3 and 4 have 150 tokens or more; name, split, column, row and digest are recorded, no path is."""
    found = read(f"hf:{books}#2", tokens=150)
    assert [len(text.tokens) for text in found] == [200, 400]
    told = found[1].record()
    assert told == {
        "name": "books, train row 3",
        "sha256": hashlib.sha256(b"abc " * 100).hexdigest(),
        "tokens": 400,
        "data_set": {
            "name": "books", "config": None, "split": "train", "revision": None, "column": "text", "row": 3
        },
    }  # fmt: skip
    assert len(read(f"hf:{books}", tokens=150)) == 3  # no number: what there is
    assert len(read(f"hf:{books}")) == data_sets.ROWS


def test_a_column_is_the_one_with_text_or_the_one_that_is_named(tmp_path: Path) -> None:
    only = write_rows(tmp_path / "only", [{"id": 1, "body": "some words"}])
    several = write_rows(tmp_path / "several", [{"a": "one", "b": "two"}, {"a": None, "b": "x"}, {"a": "y", "b": "z"}])
    assert read(f"hf:{only}")[0].tokens.tolist() == encode("some words")
    assert [text.data_set and text.data_set["row"] for text in read(f"hf:{several}?column=a")] == [0, 2]
    with pytest.raises(InputError, match=r"no column 'text'; columns with text: a, b.*\?column=a"):
        read(f"hf:{several}")
    with pytest.raises(InputError, match="no text in column 'c'; columns with text: a, b"):
        read(f"hf:{several}?column=c")


def test_the_split_is_test_or_the_only_one_or_named(books: Path) -> None:
    write_rows(books, [{"text": "held out"}], "test.jsonl")
    assert read(f"hf:{books}")[0].name == "books, test row 0"
    assert read(f"hf:{books}:train#1")[0].name == "books, train row 0"
    with pytest.raises(InputError, match="no split 'dev'; there are train, test"):
        read(f"hf:{books}:dev")
    (books / "test.jsonl").rename(books / "validation.jsonl")
    with pytest.raises(InputError, match="has the splits train, validation"):
        read(f"hf:{books}")


def test_too_few_long_rows_say_how_long_they_are(books: Path) -> None:
    with pytest.raises(InputError, match=r"1 of its first rows have 450 tokens or more, 2 are needed; .* has 500"):
        read(f"hf:{books}#2", tokens=450)
    with pytest.raises(InputError, match="0 of its first rows have 900 tokens"):
        read(f"hf:{books}", tokens=900)


def test_folders_that_are_no_data_set_are_reported(books: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone: no such folder"):
        read(f"hf:{tmp_path}/gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="any data"):
        read(f"hf:{tmp_path}/empty")
    with pytest.raises(InputError, match="'en' not found"):
        read(f"hf:{books}:en:train")
    (books / "train.jsonl").write_text("{no json\n")
    with pytest.raises(InputError, match="JSON"):
        read(f"hf:{books}")


def test_a_program_that_makes_a_data_set_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "program.py").write_text("raise SystemExit('run')")
    with pytest.raises(InputError, match=r"never runs.*refs/convert/parquet"):
        read(f"hf:{folder}")


def test_without_network_or_library_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 6: the Hub is not asked in tests, which is what it is like offline."""
    with pytest.raises(EnvironmentFailure, match=r"hf:a/b can't be reached \(OfflineModeIsEnabled.*HF_HUB_OFFLINE"):
        read("hf:a/b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFailure, match=r"needs datasets.*lrconvert\[texts\]"):
        read("hf:a/b")


def test_a_name_on_the_hub_is_pinned_to_its_commit(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded is the commit that is recorded; a connection that breaks later is the environment's failure."""
    import datasets

    asked: list[Any] = []
    local = datasets.load_dataset(str(books), streaming=True)

    def breaking() -> Any:
        yield from list(local["train"])[:2]
        raise ConnectionResetError("reset by peer")

    def load(*given: Any, **named: Any) -> Any:
        asked.append((given, named))
        return {"test": breaking()}

    monkeypatch.setattr(data_sets, "_commit", lambda address: "c0ffee")
    monkeypatch.setattr(datasets, "load_dataset", load)
    (found,) = read("hf:a/b#1", tokens=100)
    assert asked == [(("a/b", None), {"revision": "c0ffee", "streaming": True})]
    assert found.data_set is not None and found.data_set["revision"] == "c0ffee"
    with pytest.raises(EnvironmentFailure, match="ConnectionResetError: reset by peer"):
        read("hf:a/b#2", tokens=100)
