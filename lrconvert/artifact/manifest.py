# SPDX-License-Identifier: Apache-2.0
"""The manifest of an artifact, `lrconvert.json`: how it came to be, and the digest of every file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Predicate

from lrconvert import __version__
from lrconvert.artifact.record import BakeRecord, options_of_version_1
from lrconvert.checkpoint.links import is_inside
from lrconvert.errors import InputError, first_problem

MANIFEST = "lrconvert.json"
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}")
MANIFEST_VERSION = 2  # 1 had no `bake`, and the same facts as words among its `options`
FILES = frozenset({".gguf"})  # artifacts that are files, not folders: their manifest lies beside them
EDITABLE = frozenset({"README.md"})  # the card is for people: they may go on writing it
MAX_MANIFEST_BYTES = 64 * 2**20


# A manifest may come from a stranger: nothing is coerced, and no number is anything else. Keys of later versions pass.
_READ: Any = {"strict": True, "allow_inf_nan": False}


def _is_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


@dataclass
class FileRecord:
    """A file of an artifact. `sha256` is None for a linked file that nobody has read yet (`verify` does)."""

    __pydantic_config__: ClassVar = _READ

    size: Annotated[int, Ge(0)]
    sha256: Annotated[str, Predicate(_is_digest)] | None
    linked: bool = False


@dataclass
class Manifest:
    """`lrconvert.json`: how the artifact came to be and what it holds. No time, no machine: same inputs, same bytes.

    `bake` is what parity reads of it; `options` are the user's other options, for people.
    """

    __pydantic_config__: ClassVar = _READ

    target: str
    source: dict[str, Any]
    recipe: dict[str, Any]
    options: dict[str, Any]
    losses: list[str]
    bake: BakeRecord = field(default_factory=lambda: BakeRecord(window=0))
    notes: list[str] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    parity: dict[str, Any] | None = None
    lrconvert: str = __version__
    manifest_version: int = MANIFEST_VERSION

    def to_json(self) -> str:
        files = {name: vars(self.files[name]) for name in sorted(self.files)}
        values: dict[str, Any] = {**vars(self), "bake": vars(self.bake), "files": files}
        order = ("manifest_version", "lrconvert", "target", "source", "recipe", "bake", "options", "losses", "notes",
                 "files", "parity")  # fmt: skip
        return json.dumps({key: values[key] for key in order}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, artifact: Path) -> Manifest:
        """The manifest of an artifact; `InputError` where there is none or it isn't one."""
        path = manifest_path(artifact)
        if not path.is_file():
            raise InputError(
                f"{artifact}: no {path.name}, so not an lrconvert artifact",
                remedy="To verify an artifact of another program, give model and recipe: --against MODEL --recipe R",
            )
        from pydantic import ValidationError

        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise InputError(f"{path}: {path.stat().st_size} bytes; at most {MAX_MANIFEST_BYTES} are read")
            found = _reader(cls).validate_json(text := path.read_bytes())
            _reader(_Parts).validate_json(text)
        except OSError as error:
            raise InputError(f"{path}: can't be read ({error.strerror or error})") from error
        except ValidationError as error:
            raise InputError(f"{path}: not a manifest ({first_problem(error, 'the file')})") from error
        free = [found.source, found.recipe, found.options, found.parity, found.losses, found.notes]
        try:
            if "\\u0000" in json.dumps(free, allow_nan=False):
                raise InputError(f"{path}: not a manifest (it holds a NUL character)")
        except ValueError as error:  # NaN and infinities, which are no JSON
            raise InputError(f"{path}: not a manifest (it holds a number that is none)") from error
        if odd := sorted(name for name in found.files if not is_inside(name)):
            raise InputError.collect(path, [f"{name[:80]!a} is not a name inside the folder" for name in odd[:8]])
        if found.manifest_version > MANIFEST_VERSION:
            raise InputError(
                f"{path}: manifest version {found.manifest_version}; this lrconvert reads up to {MANIFEST_VERSION}",
                remedy="Install a newer lrconvert",
            )
        found.bake, found.manifest_version = _record(path, found), MANIFEST_VERSION
        return found


@dataclass
class _Adapter:
    """What is read of `source.adapter`."""

    __pydantic_config__: ClassVar = _READ

    reference: str


@dataclass
class _Source:
    """What is read of `source`."""

    __pydantic_config__: ClassVar = _READ

    model: str
    weights: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    adapter: _Adapter | None = None
    adapter_revision: str | None = None


@dataclass
class _Recipe:
    """What is read of `recipe` without parsing it."""

    __pydantic_config__: ClassVar = _READ

    name: str


@dataclass
class _Report:
    """What is read of `parity`, and of each engine's report in it."""

    __pydantic_config__: ClassVar = _READ

    passed: bool = False
    summary: str = ""
    reference: str = ""
    against: str = ""
    rows: list[dict[str, str | float | bool | None]] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    engines: dict[str, _Report] = field(default_factory=dict)


@dataclass
class _Parts:
    """The sections of a manifest that are kept as they are, and the types of what is read of them."""

    __pydantic_config__: ClassVar = _READ

    source: _Source
    recipe: _Recipe
    parity: _Report | None = None


@cache
def _reader(kind: type) -> Any:
    """What checks JSON against a type. Making one takes longer than reading a manifest."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _record(path: Path, manifest: Manifest) -> BakeRecord:
    """The manifest's record; that of version 1 is made from its options."""
    from pydantic import ValidationError

    values: Any = vars(manifest.bake)
    if manifest.manifest_version < 2:
        values = options_of_version_1(manifest.target, manifest.options, _last_window(manifest.recipe))
    try:
        return _reader(BakeRecord).validate_json(json.dumps(values))
    except ValidationError as error:
        raise InputError(f"{path}: not a manifest (bake.{first_problem(error)})") from error


def _last_window(recipe: dict[str, Any]) -> Any:
    tiers = recipe.get("tiers")
    return tiers[-1].get("max_length") if isinstance(tiers, list) and tiers and isinstance(tiers[-1], dict) else None


def manifest_path(artifact: Path) -> Path:
    """Where the manifest of an artifact lies: in its folder, or beside its file (`m.gguf`, or any part of a split
    one, `m-00001-of-00002.gguf`: `m.lrconvert.json`)."""
    if artifact.suffix not in FILES:
        return artifact / MANIFEST
    part = _PART.fullmatch(artifact.stem)
    return artifact.with_name(f"{part['stem'] if part else artifact.stem}.{MANIFEST}")
