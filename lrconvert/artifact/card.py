# SPDX-License-Identifier: Apache-2.0
"""The model card: README.md of an artifact.

    render(model, recipe, spec, text, …)     the card as it is baked: nobody has verified the artifact yet
    refreshed(card, manifest, text, repo)    the same with its generated sections made again, when it is published

`text` is what the target says of its format (`CardText`).

Sections between `<!-- lrconvert: NAME -->` and its end belong to lrconvert; the rest of the file is
for its owner to edit. The source's own card is kept below ours, and its licence, languages and base model go
into the metadata. No local path is in it (`redaction`). Same inputs, same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrconvert import __version__
from lrconvert.artifact.manifest import MANIFEST, Manifest
from lrconvert.artifact.redaction import hub_revision, local_name, without_paths
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.adapter import Adapter
from lrconvert.checkpoint.links import check_links
from lrconvert.families import Family
from lrconvert.recipe import Recipe
from lrconvert.recipe.plotting import sparkline
from lrconvert.rope import RopeSpec, Tier

CARD = "README.md"
MAX_CARD_BYTES = 2**20  # of a source's card: longer ones are not carried
# What the licence file of a source says in its first lines: all of the words, the Hub's name of the licence.
LICENCES = ((("apache license", "version 2.0"), "apache-2.0"), (("mit license",), "mit"))

# The number of an evaluation's record that speaks for it.
METRICS = ("perplexity", "accuracy", "share", "hits")

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n.*?\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SOME = re.compile(r"[^\r\n]{1,200}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MARKER = re.compile(r"^[ \t]*<!-- lrconvert: [\w ]+ -->[ \t]*\r?\n?", re.MULTILINE)


@dataclass(frozen=True)
class CardText:
    """What a card says of one format. `run`: lines that say how to run it, given its name on the Hub (None: where it
    lies isn't known yet); `about`: paragraphs on its code, given the family, what was dropped and what native code
    loses."""

    library: str
    tags: tuple[str, ...]
    run: Callable[[str | None], list[str]]
    about: Callable[[Family, Sequence[str], Sequence[str]], list[str]]


# --- the source's card -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceCard:
    """What the source says of itself: metadata that is carried, its text, and what could not be read."""

    metadata: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    notes: tuple[str, ...] = ()


def source_card(model: Model) -> SourceCard:
    """The card and the licence file beside a model; for a GGUF file the same facts from its header."""
    folder, metadata, text, notes = model.checkpoint.path, {}, "", []
    if not folder.is_dir():
        header = model.checkpoint.gguf.metadata if model.checkpoint.gguf is not None else {}
        keys = {"license": "general.license", "license_name": "general.license.name", "language": "general.languages"}
        return SourceCard(carried({key: header.get(name) for key, name in keys.items()}))
    path = folder / CARD
    check_links(folder, [path] if path.is_symlink() else [])
    if path.is_file() and path.stat().st_size > MAX_CARD_BYTES:
        notes.append(f"the source's {CARD} has {path.stat().st_size} bytes: not copied into the artifact's")
    elif path.is_file():
        from huggingface_hub.repocard import metadata_load

        text = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
        try:
            loaded = metadata_load(path)
        except Exception as error:  # whatever a YAML reader raises over somebody else's text
            loaded = None
            notes.append(f"the source's {CARD}: its metadata can't be read ({' '.join(str(error).split())[:200]})")
        metadata = carried(loaded or {})
    if "license" not in metadata:
        files = [name for name in sorted(folder.iterdir()) if name.name.lower().startswith(("license", "licence"))]
        check_links(folder, files[:1])
        metadata |= _licence_of(files[0]) if files and files[0].is_file() else {}
    text = _MARKER.sub("", _FRONT_MATTER.sub("", text)).strip()
    return SourceCard(metadata, text, tuple(notes))


def carried(found: Mapping[str, Any]) -> dict[str, Any]:
    """Licence, languages and base model, where they are texts or lists of texts; a base model is a Hub id."""
    kept = {}
    for key in ("license", "license_name", "license_link", "language", "base_model"):
        value = found.get(key)
        texts = value if isinstance(value, list) else [value]
        wanted = _HUB_ID if key == "base_model" else _SOME
        if texts and all(isinstance(item, str) and wanted.fullmatch(item) for item in texts):
            kept[key] = value
    return kept


def _licence_of(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        start = file.read(2000).decode("utf-8", errors="replace")
    for words, name in LICENCES:
        if all(word in start.lower() for word in words):
            return {"license": name}
    first = next((line for line in start.splitlines() if line.strip(" #*=-")), "")
    name = "-".join(re.findall(r"[a-z0-9.]+", first.lower()))[:80]
    return {"license": "other", "license_name": name or "unnamed", "license_link": path.name}


# --- the card --------------------------------------------------------------------------------------------


def render(
    model: Model,
    recipe: Recipe,
    spec: RopeSpec,
    text: CardText,
    *,
    source: SourceCard,
    dropped: Sequence[str] = (),
    losses: Sequence[str] = (),
    notes: Sequence[str] = (),
    adapter: Adapter | None = None,
) -> str:
    """The card of an artifact that is being baked. `dropped`: what no code of it does of the recipe; `losses`: what
    native code can't express beyond that; `notes`: what the manifest notes."""
    on_hub = hub_revision(model.reference, model.checkpoint.path)
    local = [] if on_hub else [model.reference]
    name = model.reference if on_hub else model_name(model)
    merged = f", with {_adapter_words(adapter, recipe)} merged" if adapter else ""
    base = model.reference if on_hub else source.metadata.get("base_model")
    relation = {"base_model": base, "base_model_relation": "merge" if adapter else "finetune"} if base else {}
    licence = source.metadata.get("license_name") or source.metadata.get("license")
    parts = [
        front_matter({**source.metadata, **relation, **model_index(recipe, local_name(name))}, text),
        f"# {name}, extended to {spec.window} tokens",
        f"The weights of {name}{f' at commit `{on_hub}`' if on_hub else ''}{merged}, and the rotary factors of the "
        f"recipe `{_plain(recipe.name)}`: a window of {spec.original_window} tokens becomes one of {spec.window}. "
        f"Written by lrconvert {__version__}.",
        f"Licence, as the source states it: {_plain(str(licence))}." if licence else "The source states no licence.",
        section("run", text.run(None)),
        *(without_paths(part, local) for part in text.about(model.family, dropped, losses)),
        *tiers_lines(spec),
        "## Where the factors come from",
        facts_table(recipe, local),
        *(["## Notes", without_paths(bullets(*notes), local)] if notes else []),
        section("parity", parity_lines(None)),
        section("files", _files(None)),
    ]
    if source.text:
        heading = "## The source's model card"
        parts += [heading, f"The card of {name}, unchanged. Relative links point into its folder.", source.text]
    return "\n\n".join(parts) + "\n"


def model_name(model: Model) -> str:
    """What people call the model: the name in a GGUF's header, else that of its folder."""
    path, header = model.checkpoint.path.resolve(), model.checkpoint.gguf
    stated = None if header is None else header.metadata.get("general.name")
    if isinstance(stated, str) and _SOME.fullmatch(stated):
        return _plain(local_name(stated))
    return path.stem if path.is_file() else path.name


def tiers_lines(found: Recipe | RopeSpec) -> list[str]:
    """The section on the tiers: a table, and the factors as bars."""
    return [
        "## Tiers",
        "A sequence uses the factors λ of the first tier that is long enough for it. Every inverse frequency is "
        "divided by its λ, except at the first n̂ positions; cos and sin are multiplied by the attention factor.",
        table(["up to (tokens)", "n̂", "attention factor", "λ"], [_tier(tier) for tier in found.tiers]),
        "The factors by frequency index, fast to slow, on a logarithmic scale from 1:",
        "\n".join(["```", *_bars(found.tiers), "```"]),
    ]


def _bars(tiers: Sequence[Tier]) -> list[str]:
    highest = max(max(tier.factors) for tier in tiers)
    width = len(str(tiers[-1].max_length))
    return [f"{tier.max_length:>{width}} {sparkline(tier.factors, highest)} {max(tier.factors):.4g}" for tier in tiers]


def facts_table(recipe: Recipe, local: Sequence[str]) -> str:
    """Where a recipe's factors come from."""
    return table(["", ""], _provenance(recipe, local))


def model_index(recipe: Recipe, name: str) -> dict[str, Any]:
    """The evaluations that a recipe carries, as the Hub's model-index has them; nothing where there are none."""
    evaluation = recipe.evaluation or {}
    measured, texts = evaluation.get("measured"), evaluation.get("texts")
    named = [str(text.get("name")) for text in texts or () if isinstance(text, Mapping)]
    data = {"type": "held-out", "name": _plain(", ".join(named)) or "held-out text"}
    results = []
    for key, values in measured.items() if isinstance(measured, Mapping) else ():
        kind, _, length = str(key).partition("@")
        metric = next((known for known in METRICS if isinstance(values, Mapping) and known in values), None)
        value = values[metric] if metric is not None else None
        value = value.get("value") if isinstance(value, Mapping) else value  # a figure has its interval beside it
        if not isinstance(value, int | float):
            continue
        results.append({
            "task": {"type": "text-generation"},
            "dataset": data,
            "metrics": [{"type": metric, "name": f"{kind} at {length} tokens", "value": value}],
        })  # fmt: skip
    return {"model-index": [{"name": name, "results": results}]} if results else {}


def _adapter_words(adapter: Adapter, recipe: Recipe) -> str:
    """Which adapter it is: a Hub id, the recipe's own, or the name of a folder."""
    if hub_revision(adapter.reference, adapter.path):
        return f"the LoRA adapter {adapter.reference}"
    name = local_name(adapter.reference)
    return "the recipe's LoRA adapter" if name == recipe.adapter else f"the LoRA adapter {name}"


def refreshed(card: str, manifest: Manifest, text: CardText, repo: str | None = None) -> str:
    """A card with its generated sections made from `manifest`; a section that its owner removed stays away."""
    made: dict[str, Callable[[], list[str]]] = {
        "run": lambda: text.run(repo),
        "parity": lambda: parity_lines(manifest.parity),
        "files": lambda: _files(manifest),
    }
    return replaced_sections(card, made)


def replaced_sections(card: str, made: Mapping[str, Callable[[], list[str]]]) -> str:
    """A card with these sections made again; one that its owner removed stays away."""
    for name, lines in made.items():
        start, end = (re.escape(line) for line in markers(name))
        again = section(name, lines())
        card = re.sub(f"{start}.*?{end}", lambda _, new=again: new, card, count=1, flags=re.DOTALL)
    return card


def markers(name: str) -> tuple[str, str]:
    return f"<!-- lrconvert: {name} -->", f"<!-- lrconvert: end of {name} -->"


def section(name: str, lines: Iterable[str]) -> str:
    start, end = markers(name)
    return "\n".join([start, *lines, end])


def front_matter(values: Mapping[str, Any], text: CardText) -> str:
    """The card's front matter. JSON values are YAML too, and spare a bake the import of a YAML library; the tests
    read the result with huggingface_hub."""
    facts = {"library_name": text.library, "pipeline_tag": "text-generation", "tags": list(text.tags)}
    data = {**values, **facts}
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def bullets(*items: str) -> str:
    return "\n".join(f"- {item}." for item in items)


def _tier(tier: Tier) -> list[str]:
    low, high = min(tier.factors), max(tier.factors)
    spread = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
    return [str(tier.max_length), str(tier.start_tokens), f"{tier.attention_factor:.6g}", spread]


def _provenance(recipe: Recipe, local: Sequence[str]) -> list[list[str]]:
    origin = recipe.provenance
    rows = {
        "recipe": recipe.name,
        "kind": origin.kind,
        "method": origin.method,
        "source": origin.source,
        "licence": origin.licence,
        "made for": recipe.base_model,
        "fitted to the weights": origin.weights,
        "RoPE base θ, original window": f"{recipe.rope_theta:g}, {recipe.original_window} tokens",
        **_searched(origin.search or {}),
        **({"notes": "; ".join(origin.notes)} if origin.notes else {}),
    }
    return [[key, without_paths(in_words(value), local)] for key, value in rows.items() if value is not None]


def _searched(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row for every fact of a search; of a list of facts one for each, numbered."""
    rows: dict[str, Any] = {}
    for key, value in values.items():
        name = f"search: {key.replace('_', ' ')}"
        if isinstance(value, list) and len(value) > 1 and all(isinstance(item, Mapping) for item in value):
            rows |= {f"{name}, {number}": item for number, item in enumerate(value, 1)}
        else:
            rows[name] = value
    return rows


def in_words(value: Any) -> str:
    """A value for people: no brackets, no quotes of a programming language."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {in_words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(in_words(item) for item in value) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def parity_lines(report: Mapping[str, Any] | None, how: str = "") -> list[str]:
    """The section on parity. `how`: the command that verifies what isn't yet."""
    if report is None:
        told = f"run `{how}`" if how else "run `lrconvert verify` on this folder"
        return ["## Parity", "", f"**Not verified yet**: {told}."]
    head = ["code", "case", "tokens", "mean KL", "bound", "verdict"]
    rows = [
        [_shown(row.get(key)) for key in ("code", "case", "length", "kl_mean", "bound", "verdict")]
        for row in report.get("rows", ())
    ]
    versions = [
        f"{code} code: " + ", ".join(f"{key} {info[key]}" for key in ("transformers", "torch") if key in info)
        for code, info in sorted(report.get("runtimes", {}).items())
    ]
    reference, against, summary = (_plain(str(report.get(key))) for key in ("reference", "against", "summary"))
    return [
        "## Parity",
        "",
        f"Compared with the {reference}, {against}: {summary}. A `known` row measures a limit of native code and does "
        "not count as a failure.",
        "",
        table(head, rows),
        *(line for loss in report.get("losses", ()) for line in ("", f"Lost: {_plain(str(loss))}.")),
        *(["", f"Run with {'; '.join(versions)}."] if versions else []),
    ]


def _files(manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return ["## Files", "", f"`{MANIFEST}` has the inputs, the recipe, and the sha256 of every file."]
    rows = [[f"`{name}`", str(r.size), f"`{r.sha256}`"] for name, r in sorted(manifest.files.items()) if name != CARD]
    return [
        "## Files",
        "",
        f"`{MANIFEST}` has the inputs and the recipe, as lrconvert {manifest.lrconvert} wrote them.",
        "",
        table(["file", "bytes", "sha256"], rows),
    ]


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """One line without markup of its own."""
    return " ".join(re.sub(r"[|<>`]", " ", text).split())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())

    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
