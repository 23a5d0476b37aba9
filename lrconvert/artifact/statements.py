# SPDX-License-Identifier: Apache-2.0
"""What the files of an artifact have to say, as data, and what they say otherwise.

A format's table has a `Statement` for each key that an artifact says of itself: the rotation, the window, where code
lies. What no statement names has to be as the source has it, so a key that was added, lost or changed is found
without being listed. Files are compared as values, not as bytes: spaces and the order of keys mean nothing.

Three things can be missing. Without the source, what only the source could tell is not compared, and a row says so.
Without a manifest another program may have written the files: what it left out or added is shown as `known`, and only
contradictions fail. Keys that name the machine of whoever wrote the source are not compared: `push` drops them.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lrconvert.artifact.checks import Row
from lrconvert.artifact.manifest import Manifest, manifest_path
from lrconvert.artifact.record import BakeRecord
from lrconvert.artifact.redaction import public_value
from lrconvert.checkpoint import Model, describe_source
from lrconvert.checkpoint.base import MAX_TOKENIZER_BYTES, read_json_source
from lrconvert.errors import InputError
from lrconvert.rope import RopeSpec

MOST_ROWS = 12  # of one file; the rest is counted
SHOWN = 60  # characters of a value in a message
Json = Mapping[str, Any]


class Mark(enum.Enum):
    """What isn't a value of JSON."""

    ABSENT = "absent"  # the key must not be there; null is as good
    FREE = "free"  # whatever is there, or nothing
    SOURCE = "source"  # as the source has it


ABSENT, FREE, SOURCE = Mark.ABSENT, Mark.FREE, Mark.SOURCE


@dataclass(frozen=True)
class Such:
    """Any value (`ABSENT` for none) that passes; `words` say what is needed."""

    words: str
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Facts:
    """What an artifact was made from, and what of it is known."""

    artifact: Path
    model: Model  # what it has to compute: folded, padded, lifted as the record says
    spec: RopeSpec
    record: BakeRecord
    dtype: str | None = None  # of most values in its weights, as safetensors spells it
    stored: Any = None  # the artifact as its target opens it, for statements that need it

    @property
    def compared(self) -> bool:
        """Whether there is a source: where it is gone, the artifact stands in for it."""
        return self.model.checkpoint.path.resolve() != self.artifact.resolve()

    @property
    def ours(self) -> bool:
        """Whether it has a manifest."""
        return manifest_path(self.artifact).is_file()

    @cached_property
    def exact(self) -> bool:
        """Whether the files were made from this very source: then nothing may be added to them or lost. A copy of the
        model in another format says some things otherwise."""
        if not self.ours:
            return False
        made_from = Manifest.read(self.artifact).source.get("weights")
        return not self.compared or made_from == describe_source(self.model)["weights"]


@dataclass(frozen=True)
class Statement:
    """A key (dotted where it is inside of another) and what has to stand there: a value, a `Mark` or a `Such`.

    `whose`: who decides, for people. A statement on an object replaces all that the source has inside of it.
    `spelling`: how lrconvert says it; what another program wrote may say it otherwise, and is judged by what code
    computes from it.
    """

    key: str
    wanted: Callable[[Facts], Any]
    whose: str = "the recipe"
    spelling: bool = False


@dataclass(frozen=True)
class Difference:
    """`known` where it may be another program's way of saying the same."""

    where: str
    reason: str
    known: bool = False


# --- values ----------------------------------------------------------------------------------------------


def flat(value: Json, prefix: str = "") -> dict[str, Any]:
    """Values by their dotted keys. Lists are values, and so are objects with nothing in them."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found


def same(found: Any, wanted: Any) -> bool:
    """Whether two values say the same. Numbers may be spelled 1 or 1.0, but true is no number."""
    if isinstance(wanted, Such):
        return wanted.test(found)
    if wanted is ABSENT:
        return found is ABSENT or found is None
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    if isinstance(wanted, int | float) and isinstance(found, int | float):
        return found == wanted or _close(found, wanted)
    if isinstance(wanted, Sequence) and isinstance(found, Sequence) and not isinstance(wanted, str | bytes):
        if isinstance(found, str | bytes) or len(found) != len(wanted):
            return False
        return _alike(found, wanted) or all(same(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        return found.keys() == wanted.keys() and all(same(found[key], value) for key, value in wanted.items())
    return type(found) is type(wanted) and found == wanted


def _alike(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether two lists are spelled alike: a vocabulary's merges are many. Python alone takes true for 1."""
    return found == wanted and json.dumps(found, default=repr) == json.dumps(wanted, default=repr)


def _close(found: float, wanted: float) -> bool:
    try:
        return math.isclose(found, wanted, rel_tol=1e-12)
    except OverflowError:  # an integer beyond all floats, and not the same integer
        return False


def shown(value: Any) -> str:
    """A value in a message."""
    if value is ABSENT:
        return "missing"
    text = value.words if isinstance(value, Such) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _apart(found: Any, wanted: Any, whose: str) -> str:
    """How two values differ, in words; of long lists the first item that does."""
    if isinstance(found, list) and isinstance(wanted, list) and max(len(found), len(wanted)) > 4:
        if len(found) != len(wanted):
            return f"has {len(found)} items; {whose} has {len(wanted)}"
        index = next(i for i, pair in enumerate(zip(found, wanted, strict=True)) if not same(*pair))
        return f"has {shown(found[index])} as item {index}; {whose} has {shown(wanted[index])}"
    is_there = "is missing" if found is ABSENT else f"is {shown(found)}"
    return f"{is_there}; {whose} {'has none' if wanted is ABSENT else f'needs {shown(wanted)}'}"


# --- one file --------------------------------------------------------------------------------------------


def differences(
    file: str, found: Json, source: Json | None, table: Iterable[Statement], facts: Facts
) -> Iterator[Difference]:
    """Everything that a file says otherwise than `table` and `source` (None: there is none to compare with)."""
    wanted: dict[str, Any] = {} if source is None else flat(public_value(source))
    whose = dict.fromkeys(wanted, "the source")
    free: set[str] = set()
    stated_keys: set[str] = set()
    for row in table:
        value = FREE if row.spelling and not facts.ours else row.wanted(facts)
        if value is SOURCE:
            continue
        stated_keys.add(row.key)
        for key in [key for key in wanted if _within(key, row.key)]:
            del wanted[key]
        if value is FREE:
            free.add(row.key)
            continue
        stated = flat({row.key: value})
        wanted |= stated
        whose |= dict.fromkeys(stated, row.whose)
    values = flat(public_value(found))
    for key in dict.fromkeys([*values, *wanted]):
        if any(_within(key, name) for name in free):
            continue
        value, right = values.get(key, ABSENT), wanted.get(key, FREE)
        if right is FREE:
            inside = any(_within(key, name) for name in stated_keys)
            if source is None and not inside:  # nobody is left to say
                continue
            reason = f"{file}: {key} is {shown(value)}; neither the source nor the recipe says so"
            yield Difference(f"{file}: {key}", reason, known=not facts.exact and value is not None)
        elif not same(value, right) or (facts.exact and _no_count(value, right, whose[key])):
            lenient = not facts.exact and whose[key] == "the source" and ABSENT in (value, right)
            yield Difference(f"{file}: {key}", f"{file}: {key} {_apart(value, right, whose[key])}", known=lenient)


def _no_count(found: Any, wanted: Any, whose: str) -> bool:
    """Whether a number of layers or a token is 2.0, which transformers refuses. Of a recipe's numbers 1 is as good."""
    return whose in ("the source", "the model", "the window") and type(wanted) is int and type(found) is float


def _within(key: str, outer: str) -> bool:
    return key == outer or key.startswith(f"{outer}.")


def rows_from(code: str, good: str, found: Iterable[Difference]) -> list[Row]:
    """A failed row for each difference, one `known` row for all that may be another program's way; one that passes,
    named `good`, where none failed."""
    every = list(found)
    failed = [difference for difference in every if not difference.known]
    known = [difference for difference in every if difference.known]
    rows = [Row(code, difference.where[:80], "fail", reason=difference.reason) for difference in failed[:MOST_ROWS]]
    if len(failed) > MOST_ROWS:
        rows.append(Row(code, "more of them", "fail", reason=f"and {len(failed) - MOST_ROWS} more differences"))
    if not failed:
        rows.append(Row(code, good, "pass"))
    if known:
        told = "; ".join(difference.reason for difference in known[:3])
        more = f"; and {len(known) - 3} more" if len(known) > 3 else ""
        rows.append(Row(code, "said otherwise than by lrconvert", "known", reason=told + more))
    return rows


# --- many files ------------------------------------------------------------------------------------------

Files = Mapping[str, Path | bytes]


def file_differences(
    found: Files, wanted: Files, tables: Mapping[str, Sequence[Statement]], facts: Facts
) -> Iterator[Difference]:
    """Everything about side files that differs from `wanted`, those of the source: missing, added, other contents.

    JSON is compared as values, with the statements that `tables` has for the file, everything else by its bytes.
    """
    for name in sorted({*found, *wanted}):
        if name not in wanted:
            reason = f"{name}: the source has no such file, and programs read it"
            yield Difference(name, reason, known=not facts.exact)
        elif name not in found:
            yield Difference(name, f"{name}: the source has it, and here it is missing", known=not facts.exact)
        else:
            yield from _contents(name, found[name], wanted[name], tables.get(name, ()), facts)


def _contents(
    name: str, found: Path | bytes, wanted: Path | bytes, table: Sequence[Statement], facts: Facts
) -> Iterator[Difference]:
    if not table and _same_bytes(found, wanted):
        return
    if not name.endswith(".json"):
        yield Difference(name, f"{name}: has other contents than the source's")
        return
    try:
        theirs = as_json(wanted, name)
    except InputError:  # damaged in the source too: then it can only be the same
        if not _same_bytes(found, wanted):
            yield Difference(name, f"{name}: has other contents than the source's")
        return
    try:
        ours = as_json(found, name)
    except InputError as error:
        yield Difference(name, error.message)
        return
    yield from differences(name, ours, theirs, table, facts)


def spelling_problem(data: bytes) -> str | None:
    """What makes programs read a JSON file differently, or not at all; None where nothing does."""
    if data.startswith(b"\xef\xbb\xbf"):
        return "begins with a byte order mark, which most programs don't take"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "is not UTF-8"
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in items]
        if len(set(names)) != len(names):
            twice.append(next(name for name in names if names.count(name) > 1))

    try:
        json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return None  # said by whoever reads it
    return f"has {shown(twice[0])} twice, and programs differ in which they take" if twice else None


def spelling_differences(paths: Iterable[Path], source: Files) -> Iterator[Difference]:
    """Of the JSON files that are not copies of the source's own."""
    for path in paths:
        data = path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_TOKENIZER_BYTES else b""
        theirs = source.get(path.name)
        if theirs is not None and _same_bytes(path, theirs):
            continue
        if (problem := spelling_problem(data)) is not None:
            yield Difference(path.name, f"{path.name}: {problem}")


def as_json(source: Path | bytes, name: str) -> dict[str, Any]:
    """The object in a file beside a model; `InputError` for anything else."""
    return read_json_source(source, name, MAX_TOKENIZER_BYTES)


def _same_bytes(one: Path | bytes, other: Path | bytes) -> bool:
    try:
        if isinstance(one, Path) and isinstance(other, Path) and one.samefile(other):
            return True
        first, second = (item.read_bytes() if isinstance(item, Path) else item for item in (one, other))
    except OSError:
        return False
    return first == second


def unasked(facts: Facts, what: str) -> list[Row]:
    """The row that says what nobody could compare, where the source is gone."""
    if facts.compared:
        return []
    reason = f"not compared: {what}. The source is not here, so only what the recipe and the artifact itself say was"
    return [Row("source", "what only the source could tell", "skipped", reason=reason)]
