# SPDX-License-Identifier: Apache-2.0
"""`inspect`: what a model is, which RoPE it carries, what it can become."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrconvert.artifact.manifest import Manifest, manifest_path
from lrconvert.checkpoint import Checkpoint, Model, build_model, language_part, locate
from lrconvert.checkpoint.rope_config import FoundRope
from lrconvert.engines.engine import Verdict
from lrconvert.engines.table import assess
from lrconvert.recipe import Provenance, Recipe
from lrconvert.recipe.plotting import sparklines
from lrconvert.rope import RopeSpec
from lrconvert.targets import all_targets, target_of

LONGROPE_KINDS = ("longrope", "su", "lrconvert")  # their config is what an engine reads


@dataclass(frozen=True)
class Origin:
    """What the manifest beside an artifact says."""

    model: str
    recipe: str
    parity: str


@dataclass(frozen=True)
class Inspection:
    """The facts. `foreign`: an artifact that another program wrote, of which `words` are all that is known.

    `targets`: every format with the reason why the model can't become it, None where it can; empty for what can't be
    converted. `engines`: what other programs make of the rotation.
    """

    model: str
    family: str | None
    format: str
    words: list[str]
    foreign: bool = False
    graph: str | None = None
    tensors: int = 0
    files: int = 0
    bytes: int = 0
    parameters: int = 0
    dtype: str = ""
    quantised: str | None = None
    part_of: str | None = None  # the model_type of the larger model whose language model this is
    shape: dict[str, Any] = field(default_factory=dict)
    rope: FoundRope | None = None
    problems: tuple[str, ...] = ()
    sparklines: list[str] = field(default_factory=list)
    engines: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    targets: dict[str, str | None] = field(default_factory=dict)
    manifest: Origin | None = None

    @property
    def kind(self) -> str:
        """The kind of scaling: "default" for none, "broken" for one that means nothing."""
        return "broken" if self.problems else self.rope.kind if self.rope else "unknown"

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `lrconvert inspect --json` prints it."""
        about = {"model": self.model, "family": self.family, "format": self.format}
        if self.foreign or self.rope is None:
            return {**about, "rope": {"words": self.words}, "graph": self.graph}
        counted = ("tensors", "files", "bytes", "parameters", "dtype", "quantised", "part_of", "shape")
        return {
            **about,
            **{name: getattr(self, name) for name in counted},
            "rope": {
                "kind": self.kind,
                "original_window": self.rope.original_window,
                "words": self.words,
                "problems": list(self.problems),
                "tiers": [asdict(tier) for tier in self.rope.tiers],
            },
            "sparklines": self.sparklines,
            "engines": [{**verdict.to_json(), "text": str(verdict)} for verdict in self.engines],
            "notes": self.notes,
            "targets": self.targets,
            "manifest": None if self.manifest is None else asdict(self.manifest),
        }


def inspect(model: str | Path, *, revision: str | None = None) -> Inspection:
    """What `model` is: a folder, a GGUF file, a Hub id or an artifact. Raises `InputError` for what can't be read."""
    reference = str(model)
    path = locate(reference, revision=revision)
    for target in all_targets():
        if (found := target.foreign(path)) is not None:
            return Inspection(
                reference, found.family, f"foreign {target.name}", found.words, foreign=True, graph=found.file
            )
    target = target_of(path)
    found, of_part = language_part(target.open(path))
    opened = build_model(reference, found)
    checkpoint, rotation = opened.checkpoint, opened.rotation
    recipe = _as_recipe(opened, rotation)
    tensors, files = checkpoint.tensors, checkpoint.weight_files()
    open_questions = [rotation.question] if rotation.question else []
    return Inspection(
        model=reference,
        family=opened.family.name,
        format=checkpoint.format,
        words=target.explain(checkpoint),
        tensors=len(tensors),
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        parameters=sum(math.prod(info.shape) for info in tensors.values()),
        dtype=opened.dtype,
        quantised=opened.quantised,
        shape=asdict(opened.shape),
        rope=rotation,
        problems=checkpoint.rope_problems,
        sparklines=sparklines(recipe) if rotation.scaled else [],
        engines=_engines(opened, rotation),
        notes=[
            *opened.read_dequantised("its weights are read dequantised"),
            *of_part,
            *opened.notes,
            *rotation.notes,
            *open_questions,
            *(recipe.warnings() if rotation.scaled else []),
        ],
        part_of=None if checkpoint.part_of is None else str(checkpoint.part_of["model_type"]),
        targets={t.name: t.refuses(opened) for t in reversed(all_targets())} if checkpoint.tiers is None else {},
        manifest=_origin(checkpoint),
    )


def _as_recipe(model: Model, rotation: FoundRope) -> Recipe:
    """The rotation in the form that plots and warnings take."""
    return Recipe(
        schema_version=1,
        name="found",
        family=model.family.name,
        original_window=rotation.original_window,
        rope_theta=model.shape.theta,
        rotary_dim=model.shape.rotary_dim,
        tiers=rotation.tiers,
        provenance=Provenance("published"),
    )


def _engines(model: Model, rotation: FoundRope) -> list[Verdict]:
    """What engines make of the rotation; of the config's keys too, where they are longrope's."""
    if not rotation.scaled or model.checkpoint.tiers:
        return []
    shape, window = model.shape, rotation.tiers[-1].max_length
    spec = RopeSpec(model.family.name, shape.rotary_dim, shape.theta, rotation.original_window, window, rotation.tiers)
    readable = rotation.kind in LONGROPE_KINDS and model.checkpoint.gguf is None
    config = model.checkpoint.config if readable else None
    return assess(spec, model.family.name, config, shape)


def _origin(checkpoint: Checkpoint) -> Origin | None:
    """The manifest's own words; None where there is none, or that of a file of a similar name."""
    path = checkpoint.path
    if not manifest_path(path).is_file():
        return None
    read = Manifest.read(path)
    if not path.is_dir() and path.name not in read.files:
        return None
    parity = (read.parity or {}).get("summary", "not verified yet")
    return Origin(str(read.source["model"]), str(read.recipe["name"]), str(parity))
