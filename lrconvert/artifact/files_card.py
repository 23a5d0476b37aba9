# SPDX-License-Identifier: Apache-2.0
"""The model card of a repository with GGUF files: one for all quantisations, made from their manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.artifact.card import (
    CardText,
    carried,
    facts_table,
    front_matter,
    model_index,
    parity_lines,
    replaced_sections,
    section,
    table,
    tiers_lines,
)
from lrconvert.artifact.manifest import Manifest, manifest_path
from lrconvert.recipe import Recipe, parse_recipe

TAGS = ("longrope", "long-context", "gguf")


@dataclass(frozen=True)
class Quantised:
    """A file of the repository: the stem of its name, the tag of its type, its manifest."""

    stem: str
    tag: str
    manifest: Manifest

    @property
    def window(self) -> int:
        return self.manifest.bake.window

    @property
    def files(self) -> list[str]:
        return sorted(name for name in self.manifest.files if name.endswith(".gguf"))

    @property
    def modelfile(self) -> str | None:
        return next((name for name in self.manifest.files if name.endswith(".Modelfile")), None)


def rendered_files(every: Sequence[Quantised], metadata: Mapping[str, Any], repo: str) -> str:
    """A new card. `metadata`: of the first file's header, for what the source says of itself."""
    first = every[0]
    recipe = _recipe(first.manifest)
    title = repo.rpartition("/")[2]
    named = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    values: dict[str, Any] = carried({key: metadata.get(f"general.{name}") for key, name in named.items()})
    if isinstance(metadata.get("general.base_model.0.repo_url"), str):
        values["base_model"] = str(metadata["general.base_model.0.repo_url"]).removeprefix("https://huggingface.co/")
        values["base_model_relation"] = "quantized"
    values |= model_index(recipe, title)
    licence = values.get("license_name") or values.get("license")
    stated = metadata.get("general.name")
    source = stated if isinstance(stated, str) and stated else title
    text = CardText("gguf", TAGS, lambda repo: [], lambda family, dropped, losses: [])
    parts = [
        front_matter(values, text),
        f"# {title}",
        f"GGUF files of {source}, extended by the recipe `{recipe.name}`: a window of {recipe.original_window} tokens "
        f"becomes one of {first.window}. For llama.cpp and what is built on it.",
        f"Licence, as the source states it: {licence}." if licence else "The source states no licence.",
        section("run", []),
        "llama.cpp chooses the short or the long set once, when a context is made, by the context's size.",
        *tiers_lines(recipe),
        "## Where the factors come from",
        facts_table(recipe, []),
        section("parity", []),
        section("files", []),
    ]
    return "\n\n".join(parts) + "\n"


def refreshed_files(card: str, every: Sequence[Quantised], repo: str) -> str:
    """A card with its generated sections made again; what its owner wrote, and sections that they removed, stay so."""
    return replaced_sections(
        card, {"run": lambda: _run(every, repo), "parity": lambda: _parity(every), "files": lambda: _files(every)}
    )


def _run(every: Sequence[Quantised], repo: str) -> list[str]:
    first = every[0]
    lines = ["## How to run", "", "The size of the context chooses the factor set.", "", "```sh"]
    lines += ["# llama.cpp", f"llama-cli -hf {repo}:{first.tag} -c {first.window}", "# Ollama"]
    lines.append(f"ollama run hf.co/{repo}:{first.tag}      # then: /set parameter num_ctx {first.window}")
    lines += ["# LM Studio", f"lms get https://huggingface.co/{repo}@{first.tag.lower()}", "```"]
    if named := [item.modelfile for item in every if item.modelfile]:
        told = f"ollama create {repo.rpartition('/')[2].lower()} -f {named[0]}"
        lines += ["", f"With its Modelfile Ollama takes the whole window from the start: `{told}`."]
    return lines


def _parity(every: Sequence[Quantised]) -> list[str]:
    lines = ["## Parity"]
    for item in every:
        own = parity_lines(item.manifest.parity, f"lrconvert verify {item.files[0] if item.files else item.stem}")
        lines += ["", f"### {item.tag}", *own[1:]]
    return lines


def _files(every: Sequence[Quantised]) -> list[str]:
    rows = []
    for item in every:
        report = item.manifest.parity
        verdict = "not verified" if report is None else "verified" if report.get("passed") else "failed"
        for name, record in sorted(item.manifest.files.items()):
            rows.append([f"`{name}`", item.tag, str(record.size), verdict, f"`{record.sha256}`"])
    manifests = ", ".join(f"`{manifest_name(item.stem)}`" for item in every)
    told = f"{manifests} {'has' if len(every) == 1 else 'have'} the inputs and the recipe."
    return ["## Files", "", told, "", table(["file", "type", "bytes", "parity", "sha256"], rows)]


def manifest_name(stem: str) -> str:
    return manifest_path(Path(f"{stem}.gguf")).name


def _recipe(manifest: Manifest) -> Recipe:
    return parse_recipe(json.dumps(manifest.recipe), "the manifest")
