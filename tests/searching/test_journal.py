# SPDX-License-Identifier: Apache-2.0
"""The journal keeps every evaluation through kills, and knows its own search."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, cast

import pytest
from support.search_helpers import small_space

from lrconvert.errors import EnvironmentFailure, InputError, UsageError
from lrconvert.searching.journal import Journal, Record, digest, read_journal
from lrconvert.searching.protocol import Answer, Question

IDENTITY = {"seed": 0, "texts": [{"name": "a.txt", "sha256": "00"}], "weights": {"512": 1.0}}


def records() -> list[Record]:
    """A plain one, one with a gradient, one that failed."""
    (_, one), (_, other), (_, third), *_ = small_space().seeds()
    return [
        Record(512, Question(one, "pi"), Answer(3.25, {"text@512": 3.25}, seconds=1.5)),
        Record(512, Question(other, "gradient", True), Answer(3.1, {}, tuple([0.1] * 8), seconds=2.0)),
        Record(512, Question(third, "yarn"), Answer.failed("the loss is not a number")),
    ]


def write(path: Path, entries: list[Record]) -> Path:
    with Journal.open(path, IDENTITY) as journal:
        journal.begin({"device": "cpu"})
        for entry in entries:
            journal.append(entry)
    return path


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    """Losses and gradients to the last bit; no loss is null in the file and infinite in memory."""
    path = write(tmp_path / "folder" / "j.jsonl", records())
    found = read_journal(path)
    assert found.records == records()
    assert [(run["device"], run["began"] > 1.7e9) for run in found.runs] == [("cpu", True)]
    assert '"loss": null' in path.read_text()
    assert math.isinf(found.records[2].answer.loss)


def test_it_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", records()[:1])
    with Journal.open(path, IDENTITY) as journal:
        assert journal.found.records == records()[:1]
        journal.append(records()[1])
    assert read_journal(path).records == records()[:2]


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_last_line_is_dropped_with_a_message(cut: int, tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", records())
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal.open(path, IDENTITY) as journal:
        assert journal.found.records == records()[:2]
        assert journal.found.torn is not None and "is incomplete and is dropped" in journal.found.torn
        journal.append(records()[2])
    assert read_journal(path).records == records()


def test_a_torn_head_is_begun_again(tmp_path: Path) -> None:
    """A kill may come before the first line is whole; an empty file is one that was only created."""
    for start in ("", '{"jour', '{"journal": "lrconvert search", "version": 1, "iden'):
        path = tmp_path / "j.jsonl"
        path.write_text(start)
        with Journal.open(path, IDENTITY):
            pass
        assert read_journal(path).head["identity"] == IDENTITY


def test_another_search_s_journal_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", records())
    before = path.read_bytes()
    other = {"seed": 1, "texts": [{"name": "b.txt", "sha256": "11"}], "weights": {"512": 1.0}}
    with pytest.raises(InputError) as error, Journal.open(path, other):
        pass
    assert "seed was 0, is 1" in str(error.value)
    assert 'texts was [{"name": "a.txt"' in str(error.value)
    assert "weights" not in str(error.value)
    assert path.read_bytes() == before


def test_a_journal_without_evaluations_is_begun_again_by_another_search(tmp_path: Path) -> None:
    """A search that was refused or killed before its first answer leaves a head and a run: nothing would be lost."""
    path = write(tmp_path / "j.jsonl", [])
    other = {**IDENTITY, "seed": 1}
    with Journal.open(path, other) as journal:
        assert not journal.found.head and not journal.found.runs
        journal.append(records()[0])
    found = read_journal(path)
    assert found.head["identity"] == other and found.records == records()[:1] and not found.runs


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a text that somebody wrote\n", "not the journal of a search"),
        ("a text without an end", "not the journal of a search"),
        ('{"journal": "another program"}\n', "not the journal of a search"),
        ('{"journal": "lrconvert search", "version": 9, "identity": {}}\n', "a journal of version 9"),
        ('{"journal": "lrconvert search", "version": 1}\n', "not the journal of a search"),
        ("[" * 9999 + "\n", "not the journal of a search"),
    ],
)
def test_other_files_are_refused_and_left_alone(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=expected), Journal.open(path, IDENTITY):
        pass
    assert path.read_text() == content


def test_damage_in_the_middle_is_no_torn_line(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", records())
    lines = path.read_text().splitlines()
    lines[3] = lines[3][:50]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="line 4 is damaged"):
        read_journal(path)


WHOLE = {
    "tier": 512,
    "made": "pi",
    "loss": 3.0,
    "losses": {"text@512": 3.0},
    "candidate": {"factors": [1.0, 2.0], "start_tokens": 0, "attention_factor": 1.0},
    "cost": 1.0,
    "seconds": 1.0,
}
CANDIDATE: Any = WHOLE["candidate"]
ODD_LINES: dict[str, dict[str, Any]] = {
    "seconds in words": {"seconds": "long"},
    "no tier": {"tier": None},
    "losses of another type": {"losses": [3.0]},
    "neither loss nor error": {"loss": None},
    "a gradient of words": {"gradient": ["up"]},
    "start tokens in words": {"candidate": {**CANDIDATE, "start_tokens": "none"}},
    "a factor of nothing": {"candidate": {**CANDIDATE, "factors": [0.0, 1.0]}},
    "half of a pair": {"made": "\ud800"},
    "no number": {"losses": {"text@512": math.inf}},
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_a_line_that_no_search_writes_is_damage(name: str, tmp_path: Path) -> None:
    """In journals of earlier versions, whose lines have no digests, types and numbers are all that tells."""
    head = {"journal": "lrconvert search", "version": 1, "identity": IDENTITY}
    lines = [json.dumps(line) for line in (head, WHOLE, {**WHOLE, **ODD_LINES[name]}, WHOLE)]
    path = tmp_path / "j.jsonl"
    path.write_text("\n".join(lines[:2]) + "\n")
    assert len(read_journal(path).records) == 1
    path.write_text("\n".join(lines).replace("Infinity", "1e999") + "\n")
    with pytest.raises(InputError, match="line 3 is damaged"):
        read_journal(path)


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    refused = pytest.raises(UsageError, match="another process is writing this journal")
    with Journal.open(tmp_path / "j.jsonl", IDENTITY), refused:
        Journal.open(tmp_path / "j.jsonl", IDENTITY)


def test_the_digest_does_not_depend_on_time(tmp_path: Path) -> None:
    """But on every loss."""
    slow = [
        Record(entry.tier, entry.question, Answer(**{**vars(entry.answer), "seconds": 99.0})) for entry in records()
    ]
    assert digest(IDENTITY, slow) == digest(IDENTITY, records())
    other = [Record(512, records()[0].question, Answer(3.2500001, {"text@512": 3.25})), *records()[1:]]
    assert digest(IDENTITY, other) != digest(IDENTITY, records())


def test_lines_are_plain_json(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in write(tmp_path / "j.jsonl", records()).read_text().splitlines()]
    assert lines[2]["candidate"]["factors"] == [8.0] * 8
    assert lines[3]["gradient"] == [0.1] * 8 and lines[3]["cost"] == 3.4
    assert lines[4]["error"] == "the loss is not a number"


# --- what is hidden in it ---------------------------------------------------------------------------------


def edited(path: Path, change: Callable[[list[str]], object]) -> Path:
    lines = path.read_text().splitlines(keepends=True)
    change(lines)
    path.write_text("".join(lines))
    return path


def replaced(number: int, old: str, new: str) -> Callable[[list[str]], object]:
    def change(lines: list[str]) -> None:
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new, 1)

    return change


LIES: dict[str, Callable[[list[str]], object]] = {
    "a better loss": replaced(2, '"loss": 3.25', '"loss": 0.001'),
    "another identity": replaced(0, '"seed": 0', '"seed": 1'),
    "a line taken out": lambda lines: lines.pop(2),
    "a line twice": lambda lines: lines.insert(2, lines[2]),
    "two lines swapped": lambda lines: lines.insert(2, lines.pop(3)),
    "the last line": replaced(4, '"seconds": 0', '"seconds": 1'),
    "no digest": lambda lines: lines.__setitem__(3, re.sub(', "chain": "[0-9a-f]+"', "", lines[3])),
    "another digest": lambda lines: lines.__setitem__(3, re.sub('"chain": "....', '"chain": "0000', lines[3])),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_edited_journal_is_found(lie: str, tmp_path: Path) -> None:
    """A chain of digests: whatever was changed, taken out or put in, wherever."""
    path = edited(write(tmp_path / "j.jsonl", records()), LIES[lie])
    before = path.read_bytes()
    with pytest.raises(InputError, match="does not fit the digest"):
        read_journal(path)
    identity = {**IDENTITY, "seed": 1} if lie == "another identity" else IDENTITY
    with pytest.raises(InputError, match="does not fit the digest"):
        Journal.open(path, identity)
    assert path.read_bytes() == before


def without_digests(lines: list[str]) -> None:
    """As earlier versions wrote them."""
    lines[:] = [re.sub(', "chain": "[0-9a-f]+"', "", line) for line in lines]


def test_a_journal_of_an_earlier_version_is_read_and_continued_without_digests(tmp_path: Path) -> None:
    path = edited(write(tmp_path / "j.jsonl", records()[:2]), without_digests)
    assert read_journal(path).chain is None
    with Journal.open(path, IDENTITY) as journal:
        journal.append(records()[2])
    assert read_journal(path).records == records() and "chain" not in path.read_text()


@pytest.mark.parametrize("loss", ["NaN", "-5", "Infinity", "-0.1", '"3.0"', "true", "1e999"])
def test_what_no_loss_can_be_is_damage(loss: str, tmp_path: Path) -> None:
    """In a journal without digests too."""
    path = write(tmp_path / "j.jsonl", records())
    edited(path, without_digests)
    edited(path, replaced(2, '"loss": 3.25', f'"loss": {loss}'))
    with pytest.raises(InputError, match="line 3 is damaged"):
        read_journal(path)


# --- a disk that takes less -------------------------------------------------------------------------------


class Short:
    """A file that takes `left` more bytes, then nothing or an error."""

    def __init__(self, file: FileIO, left: int, code: int | None) -> None:
        self.file, self.left, self.code = file, left, code

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        if not self.left and self.code:
            raise OSError(self.code, os.strerror(self.code))
        part = data[: self.left]
        self.left -= len(part)
        return self.file.write(part)


@pytest.mark.parametrize("code", [None, errno.ENOSPC, errno.EFBIG])
@pytest.mark.parametrize("left", [0, 1, 100])
def test_a_short_write_is_an_error_at_once_and_tears_nothing(left: int, code: int | None, tmp_path: Path) -> None:
    """What was written of the line is taken back; with room again the search goes on."""
    path = tmp_path / "j.jsonl"
    with Journal.open(path, IDENTITY) as journal:
        journal.append(records()[0])
        whole, real = path.read_bytes(), journal._file
        journal._file = cast(FileIO, Short(real, left, code))
        with pytest.raises(EnvironmentFailure, match="can't be written"):
            journal.append(records()[1])
        assert path.read_bytes() == whole
        journal._file = real
        journal.append(records()[1])
    assert read_journal(path).records == records()[:2]


def test_a_write_in_parts_is_whole(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j.jsonl", IDENTITY) as journal:
        real = journal._file

        class Parts(Short):
            def write(self, data: bytes) -> int:
                return self.file.write(data[:7])

        journal._file = cast(FileIO, Parts(real, 0, None))
        journal.append(records()[0])
        journal._file = real
        journal.append(records()[1])
    assert read_journal(tmp_path / "j.jsonl").records == records()[:2]
