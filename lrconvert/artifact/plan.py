# SPDX-License-Identifier: Apache-2.0
"""What a bake would write, before it writes anything: every file, every tensor, every byte count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lrconvert.artifact.prefetch import Job
from lrconvert.artifact.record import BakeRecord
from lrconvert.checkpoint import Model
from lrconvert.recipe import Recipe
from lrconvert.rope import RopeSpec


@dataclass(frozen=True)
class StreamTensor:
    """A tensor of a file that is written block by block. `jobs` make its `nbytes`, in order; zeros follow."""

    name: str
    nbytes: int
    jobs: Callable[[], Iterator[Job]]
    padding: int = 0


@dataclass(frozen=True)
class Stream:
    """A file of tensors: its header, and the tensors in order."""

    name: str
    tensors: Sequence[StreamTensor]
    header: bytes = b""

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes + tensor.padding for tensor in self.tensors)


@dataclass(frozen=True)
class Edit:
    """One value that the artifact has otherwise than the source."""

    file: str
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.file}: {self.key} {_brief(self.old)} → {_brief(self.new)}"


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(value) + "}"
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Plan:
    """An artifact that isn't written yet.

    `spec` is what its code has to rotate with. Files come in three kinds: `texts` are made here, `copies` come along
    unchanged, `streams` are written from the model's tensors. `place`: a folder of their own, or files in an existing
    folder (`output` is then the first of them).
    """

    target: str
    model: Model  # with its adapter merged
    recipe: Recipe
    spec: RopeSpec
    output: Path
    record: BakeRecord
    texts: dict[str, bytes]
    copies: dict[str, Path]
    streams: list[Stream]
    headline: str  # what is special about this artifact, in a few words
    edits: list[Edit] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # what the recipe asks and no code of this artifact does
    losses: list[str] = field(default_factory=list)  # what native code, without the artifact's own, can't express
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # what else the user asked for: recorded, never read back
    place: Literal["folder", "files"] = "folder"
    stamps: dict[Path, tuple[int, int]] = field(default_factory=dict, repr=False)  # of the sources: `check_unchanged`
    # The same with options that take less room, by what they are called: for a disk that is too small.
    lighter: Mapping[str, Callable[[], Plan]] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """Every file but the manifest; the one that a program opens is the first stream."""
        return [*(stream.name for stream in self.streams), *self.texts, *self.copies]

    @property
    def opens(self) -> Path:
        """What a program is given: the folder, or the first file."""
        return self.output if self.place == "folder" else self.output.parent / self.streams[0].name

    @property
    def sizes(self) -> dict[str, int]:
        """Every file but the manifest, with its size in bytes."""
        sizes = {name: len(data) for name, data in self.texts.items()}
        sizes |= {name: path.stat().st_size for name, path in self.copies.items()}
        sizes |= {stream.name: stream.nbytes for stream in self.streams}
        return dict(sorted(sizes.items()))
