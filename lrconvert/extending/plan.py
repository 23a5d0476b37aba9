# SPDX-License-Identifier: Apache-2.0
"""The plan of an extension: its stages in order, read from TOML. The dataclasses here are the definition of the file.

    [[stage]]
    kind = "tune"
    window = "256k"      # lengths are numbers of tokens; 1k is 1024
    length = "64k"
    steps = 200

docs/extend.md explains every key.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, MinLen
from pydantic import BeforeValidator, Discriminator

from lrconvert.data import DATA
from lrconvert.errors import InputError, UsageError
from lrconvert.recipe.file import Method, read_bounded
from lrconvert.rope import STRICT

PLANS = DATA / "plans"
UNNAMED = "plan"  # a plan whose file says no name has the file's
_UNITS = {"": 1, "k": 1024, "m": 1024**2}


def _tokens(value: Any) -> Any:
    """A number of tokens, which may have a unit."""
    matched = re.fullmatch(r"(\d{1,10})([km]?)", value.lower()) if isinstance(value, str) else None
    return value if matched is None else int(matched[1]) * _UNITS[matched[2]]


Tokens = Annotated[int, BeforeValidator(_tokens), Ge(2)]
TokensOrNone = Annotated[int, BeforeValidator(_tokens), Ge(0)]
Lengths = tuple[Tokens, ...]
Count = Annotated[int, Ge(1)]
Jumps = tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]]


@dataclass(frozen=True)
class Derive:
    """An analytic set for `window`, on top of the sets that there are. `ratio` is what its base is scaled for; by
    default twice the extension ratio for ntk, the ratio itself for the others."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["derive"]
    window: Tokens
    method: Method = "ntk"
    ratio: Annotated[float, Gt(1)] | None = None


@dataclass(frozen=True)
class Search:
    """A set searched for `window`; with `start_tokens`, their number too. With `row_length`, evaluations read `rows`
    rows with `jumps` jumps over the window instead of whole documents: for a model that was trained so. The `finalists`
    best are then decided among on whole documents of `decide` tokens, of whose text the last `judged` count."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["search"]
    window: Tokens
    algorithm: Literal["guided", "evolution"] = "guided"
    space: Literal["longrope", "longrope2"] = "longrope"
    objective: Literal["perplexity", "needle", "mixed"] = "perplexity"
    budget: Count | None = None
    documents: Count = 1
    start_tokens: bool = False
    row_length: Tokens | None = None
    rows: Count = 4
    jumps: Jumps = (1, 4)
    keys: Annotated[int, Ge(0)] = 24
    decide: Tokens | None = None
    finalists: Count = 5
    judged: Tokens = 65536


@dataclass(frozen=True)
class Tune:
    """Fine-tuning under the set for `window`: `steps` of `rows` rows of `length` tokens, whose positions make `jumps`
    over the window. Every row hides `keys` keys. Every `mixed_every`-th step keeps a lower window, one after the other:
    the original one with `mixed_rows` rows of it under the short set, the others with rows as above under their own
    sets; 0: none. LoRA trains `projections`: all of the blocks, those of the attention, or queries and keys, which are
    what the rotation turns. With `distil`, the text's own tokens are not learned: the model learns to say of it what it
    said before the stage, when it read windows of so many tokens; 0: without."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["tune"]
    window: Tokens
    length: Tokens
    steps: Count
    rows: Count = 1
    jumps: Jumps = (1, 4)
    keys: Annotated[int, Ge(0)] = 24
    mixed_every: Annotated[int, Ge(0)] = 4
    mixed_rows: Count = 8
    method: Literal["lora", "full"] = "lora"
    rank: Count = 32
    projections: Literal["all", "attention", "turned"] = "all"
    rate: Annotated[float, Gt(0)] = 1e-3
    norm_rate: Annotated[float, Gt(0)] = 2e-4
    warmup: Annotated[int, Ge(0)] = 8
    final: Annotated[float, Ge(0)] = 0.05
    answer_weight: Annotated[float, Ge(0)] = 0.5
    distil: TokensOrNone = 0


@dataclass(frozen=True)
class Recover:
    """The set of the original window searched again on the trained weights, with its attention factor. An evaluation
    reads as many tokens as `documents` of the next window have."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["recover"]
    budget: Count | None = None
    documents: Count = 1


@dataclass(frozen=True)
class Calibrate:
    """On text that was not trained on: how much of the training is kept, and the attention factor of every set beyond
    the original window that serves one of `lengths`. Both are tried on the ends of the first `documents` texts, of
    whose text the last `judged` tokens count; the factors λ stay."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["calibrate"]
    lengths: Annotated[Lengths, MinLen(1)]
    documents: Count = 1
    objective: Literal["perplexity", "needle", "mixed"] = "perplexity"
    keys: Annotated[int, Ge(0)] = 24
    judged: Tokens = 16384


@dataclass(frozen=True)
class Evaluate:
    """Perplexity of the same last `judged` tokens at `perplexity` lengths, over `excerpts` places, and of the model
    before its extension at the original window; `keys` labelled keys from each of `texts` texts at `retrieval` lengths;
    a passkey at each of `depths` depths at `passkey` lengths."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["evaluate"]
    perplexity: Lengths = ()
    excerpts: Count = 2
    judged: Count = 1024
    retrieval: Lengths = ()
    keys: Count = 20
    texts: Count = 1
    passkey: Lengths = ()
    depths: Count = 10


LENGTHS = ("perplexity", "retrieval", "passkey")  # the keys of an evaluation that hold lengths
Stage = Annotated[Derive | Search | Tune | Recover | Calibrate | Evaluate, Discriminator("kind")]


@dataclass(frozen=True)
class Plan:
    """The stages of an extension, in order."""

    __pydantic_config__: ClassVar = STRICT

    stage: Annotated[tuple[Stage, ...], MinLen(1)]
    name: str = UNNAMED

    @property
    def names(self) -> tuple[str, ...]:
        """Of the stages: 1-search, 2-tune, …"""
        return tuple(f"{number}-{stage.kind}" for number, stage in enumerate(self.stage, 1))

    @property
    def target(self) -> int:
        """The longest window of any stage."""
        return max(getattr(stage, "window", 0) for stage in self.stage)

    def up_to(self, target: int) -> Plan:
        """The plan cut at a window: the first set that reaches it is the last one, for it alone.

        Raises `UsageError` for a target that the plan does not reach.
        """
        if target > self.target:
            raise UsageError(
                f"--target {target} is beyond the plan {self.name}, which reaches {self.target}",
                remedy="Write a plan that reaches it (docs/extend.md)",
            )
        kept: list[Stage] = []
        reach, own = 0, 0  # of the last set that is kept: the window now, and in the whole plan

        def up_to(lengths: Lengths) -> Lengths:
            return tuple(length for length in lengths if length <= target)

        for stage in self.stage:
            if isinstance(stage, Evaluate):
                shorter = {key: up_to(getattr(stage, key)) for key in LENGTHS}
                kept += [replace(stage, **shorter)] if any(shorter.values()) else []
            elif isinstance(stage, Recover):
                kept.append(stage)
            elif isinstance(stage, Calibrate):
                kept += [replace(stage, lengths=within)] if (within := up_to(stage.lengths)) else []
            elif isinstance(stage, Tune):  # under the set before it, if that is still there
                length = min(stage.length, reach)
                if stage.window == own and stage.distil < length:
                    kept.append(replace(stage, window=reach, length=length))
            elif reach < target:
                own, reach = stage.window, min(stage.window, target)
                cut = {"decide": min(stage.decide, reach)} if isinstance(stage, Search) and stage.decide else {}
                kept.append(replace(stage, window=reach, **cut))
        return replace(self, stage=tuple(kept))


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Plan)


def parse_plan(text: str, where: object) -> Plan:
    """A plan from the text of its file. Raises `InputError` with every key that is unknown, missing or wrong."""
    from pydantic import ValidationError

    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{where}: not TOML ({reason})") from None
    try:
        return _adapter().validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        # A list whose items are wrong is reported as too short as well: that would only repeat it.
        items = [item for item in error.errors() if not (item["type"] == "too_short" and item["input"])]
        raise InputError.collect(where, [_problem(item) for item in items]) from None


def _problem(item: Any) -> str:
    """One line for an error of pydantic: the key, and what is wrong with it."""
    where = list(item["loc"])
    if len(where) > 1 and where[0] == "stage":
        number, kind = where[1] + 1, where[2:3]
        where = [f"{number}-{kind[0]}" if kind else f"stage {number}", *where[3:]]
    key = ".".join(str(part) for part in where)
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key}"
    if item["type"] in ("missing", "union_tag_not_found"):
        return f"{key}{': kind' if item['type'] != 'missing' else ''} is missing"
    if item["type"] == "union_tag_invalid":
        return f"{key}: kind is {item['ctx']['tag']!r}; one of {item['ctx']['expected_tags']} is needed"
    return f"{key} is {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}"


def built_in_plans() -> dict[str, Path]:
    """Name and file of the plans that come with lrconvert."""
    return {path.stem: path for path in sorted(PLANS.glob("*.toml"))}


def load_plan(reference: str | Path) -> Plan:
    """A plan by its file, or by the name of a built-in one.

    Raises `UsageError` for neither, `InputError` as `parse_plan`.
    """
    path = built_in_plans().get(str(reference), Path(reference))
    if not path.is_file():
        raise UsageError(f"{reference}: no such plan", remedy=f"Built in: {', '.join(built_in_plans())}")
    try:
        text = read_bounded(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8") from error
    found = parse_plan(text, path)
    return found if found.name != UNNAMED else replace(found, name=path.stem)
