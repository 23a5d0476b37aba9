# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: a model or an artifact, the recipe that it carries or is given, opened in its runtime."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.artifact.manifest import Manifest, manifest_path
from lrconvert.checkpoint import Model, locate, open_checkpoint, open_model
from lrconvert.checkpoint.adapter import Adapter, choose_adapter, merged, open_adapter
from lrconvert.errors import InputError, UsageError, require
from lrconvert.evals.texts import Encode, Text
from lrconvert.parity.codes import Code, Options, codes_of, kind_of
from lrconvert.recipe import Recipe, load_recipe, parse_recipe, recipe_folder
from lrconvert.runtimes.base import Session
from lrconvert.targets import hf
from lrconvert.training.devices import torch_device

Say = Callable[[str], None]
REFERENCE = "reference"  # not code of an artifact: our implementation over its weights


@dataclass(frozen=True)
class Subject:
    """A model or an artifact, as the user named it and where it lies. `recipe` is what it carries, or what it is to be
    evaluated under, if that was `given` (file, folder or name)."""

    reference: str
    artifact: Path
    recipe: Recipe | None = None
    given: str | None = None

    @classmethod
    def of(cls, reference: str, recipe: str | None = None) -> Subject:
        """Raises `UsageError` for a recipe to something that has one already, `InputError` for another model's."""
        artifact = locate(reference)
        if recipe is None:
            return cls(reference, artifact, _carried(artifact))
        chosen = load_recipe(recipe)
        model = open_model(artifact)
        if (carried := _carried(artifact)) is not None or model.checkpoint.tiers:
            name = "a rotation" if carried is None else f"the recipe {carried.name}"
            raise UsageError(
                f"{reference} already carries {name}, so --recipe {recipe} can't be tried on it",
                remedy="Leave --recipe out, or name the model that it was made of",
            )
        found = model.rope
        if found.scaled:
            raise UsageError(
                f"{reference} already carries {found.kind} scaling, so --recipe {recipe} can't be tried on it",
                remedy=f"Bake it to replace that scaling: lrconvert hf {reference} --recipe {recipe}",
            )
        model.resolve(chosen)
        return cls(reference, artifact, chosen, recipe)

    @property
    def adapter(self) -> Adapter | None:
        """The adapter of a recipe that was given."""
        if self.recipe is None or self.given is None:
            return None
        path = choose_adapter(None, self.recipe.adapter, recipe_folder(self.given))
        return None if path is None else open_adapter(path)

    def model(self) -> Model:
        """Its own weights, with the adapter of a recipe that was given."""
        model, adapter = open_model(self.artifact), self.adapter
        if adapter is None:
            return model
        return merged(model, adapter, rounded=model.checkpoint.native)

    def vocab(self) -> int | None:
        """Tokens of the vocabulary, where the config says it."""
        size = open_checkpoint(self.artifact, tolerant=True).config.get("vocab_size")
        return size if isinstance(size, int) else None

    def searched_on(self, texts: Sequence[Text]) -> list[Text]:
        """Texts that the recipe was searched on: a figure on them flatters it."""
        search = (self.recipe.provenance.search if self.recipe else None) or {}
        known = {str(value) for key, value in search.items() if "sha256" in key}
        known |= {text["sha256"] for text in search.get("texts", ()) if isinstance(text, dict) and "sha256" in text}
        return [text for text in texts if text.sha256 in known]


def _carried(artifact: Path) -> Recipe | None:
    """The recipe that an artifact's manifest has."""
    path = manifest_path(artifact)
    if not path.is_file():
        return None
    return parse_recipe(json.dumps(Manifest.read(artifact).recipe), path.name)


# --- opening ---------------------------------------------------------------------------------------------


@contextmanager
def opened(
    subject: Subject,
    *,
    code: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    library: str | None = None,
    progress: AbstractContextManager[Say],
    text: bool = True,
) -> Iterator[tuple[Session, Encode, Say]]:
    """A session, its tokenizer, and what reports progress. A folder runs its own code where it has some; a model with a
    recipe is baked for as long as the session lives. Without `text` no tokenizer is needed.

    Raises `UsageError` for a `code` that the artifact does not have, `InputError` for one without tokenizer.
    """
    if code == REFERENCE and dtype != "float32":
        raise UsageError("the reference computes in float64, on a GPU in float32", remedy="Leave --dtype out")
    folder = subject.given is not None or kind_of(subject.artifact) == "hf"
    for module in ("torch", "transformers") if folder and code != REFERENCE else ():
        require(module, "hf", "an evaluation in transformers")
    if folder and device.startswith("cuda"):
        torch_device(device, "hf", "an evaluation in transformers")
    options = Options(device=device, dtype=dtype, threads=threads, library=library)
    with ExitStack() as stack:
        say = stack.enter_context(progress)
        say("loading")
        encode = tokenizer_of(subject.artifact) if text else _no_text
        if code == REFERENCE:
            from lrconvert.evals.reference import open_reference

            session: Session = stack.enter_context(open_reference(subject, device=device, threads=threads))
        else:
            artifact = subject.artifact
            if subject.given is not None:
                say("baking")
                artifact = stack.enter_context(baked(subject))
            session = stack.enter_context(_code_of(subject, artifact, options, code).open(artifact, options))
        yield session, encode, say


def _code_of(subject: Subject, artifact: Path, options: Options, name: str | None) -> Code:
    there = codes_of(artifact, options)
    if able := [code for code in there if name in (None, code.name)]:
        return able[-1]
    names = ", ".join([*(code.name for code in there), REFERENCE])
    raise UsageError(f"{subject.reference} has no {name} code", remedy=f"What can be asked: {names}")


@contextmanager
def baked(subject: Subject) -> Iterator[Path]:
    """The model under the recipe it was given, as `lrconvert hf` bakes it, in a folder that goes away again.

    Weights are hard links where the temporary folder (TMPDIR) is on their file system, copies elsewhere.
    """
    assert subject.recipe is not None
    with tempfile.TemporaryDirectory(prefix="lrconvert-eval-") as folder:
        model = open_model(subject.artifact)
        planned = hf.plan(model, subject.recipe, Path(folder) / "model", adapter=subject.adapter)
        hf.write(planned)
        yield planned.output


# --- tokenizer -------------------------------------------------------------------------------------------


def _no_text(piece: str) -> list[int]:
    raise AssertionError("an evaluation on token ids was asked to read text")


def tokenizer_of(artifact: Path) -> Encode:
    """Text to ids, without special tokens."""
    tokenizer = read_tokenizer(artifact)
    return lambda piece: tokenizer.encode(piece, add_special_tokens=False).ids


def read_tokenizer(artifact: Path) -> Any:
    """The artifact's tokenizer, as the library `tokenizers` has it; it reads texts of any length.

    Raises `InputError` where there is none, or a damaged one.
    """
    tokenizers = require("tokenizers", "hf", "an evaluation on text")
    source: Any = open_checkpoint(artifact, tolerant=True).side_files().get("tokenizer.json")
    if source is None:
        raise InputError(f"{artifact}: no tokenizer.json, so no text can be read")
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source.decode()
        json.loads(text)
        found = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # what the library raises for a damaged file
        raise InputError(f"{artifact}: tokenizer.json can't be used ({str(error)!r:.200})") from error
    found.no_truncation()  # a file may ask for both, of every text
    found.no_padding()
    return found
