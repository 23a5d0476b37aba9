# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: a model or an artifact, the recipe that it carries or is given, opened in its runtime."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lrconvert.artifact.bake import bake
from lrconvert.artifact.manifest import Manifest, manifest_path
from lrconvert.checkpoint import Model, locate, open_checkpoint, open_model
from lrconvert.checkpoint.adapter import Adapter, choose_adapter, merged, open_adapter
from lrconvert.checkpoint.quantised import is_quantised
from lrconvert.checkpoint.tokenizer import Encode, tokenizer_of
from lrconvert.errors import UsageError
from lrconvert.evals.texts import Text
from lrconvert.parity.expected import expected
from lrconvert.parity.stored import on_stored_weights
from lrconvert.progress import Progress, Step, silent
from lrconvert.recipe import Recipe, load_recipe, parse_recipe, recipe_folder
from lrconvert.rope import RopeSpec
from lrconvert.runtimes import runtime_for
from lrconvert.runtimes.backend import Backend, OpenOptions, Runtime
from lrconvert.runtimes.base import Session
from lrconvert.targets import hf, target_of
from lrconvert.targets.hf.plain import write_plain
from lrconvert.temporary import temporary_folder
from lrconvert.training.devices import torch_device

REFERENCE = "reference"  # not code of an artifact: our implementation over its weights


@dataclass(frozen=True)
class Subject:
    """A model or an artifact: as the user named it, and its path. `recipe` is the one that it carries, or the one that
    was `given` (file, folder or name) to evaluate it under."""

    reference: str
    artifact: Path
    recipe: Recipe | None = None
    given: str | None = None

    @classmethod
    def of(cls, reference: str, recipe: str | None = None) -> Subject:
        """Raises `UsageError` for a recipe on something that has one already, `InputError` for another model's."""
        artifact = locate(reference)
        if recipe is None:
            return cls(reference, artifact, _carried(artifact))
        chosen = load_recipe(recipe)
        model = open_model(artifact)
        if (carried := _carried(artifact)) is not None or model.checkpoint.tiers:
            name = "a rotation" if carried is None else f"the recipe {carried.name}"
            raise UsageError(
                f"{reference} already carries {name}, so --recipe {recipe} can't be applied to it",
                remedy="Omit --recipe, or name the model that it was made from",
            )
        found = model.rotation
        if found.scaled:
            raise UsageError(
                f"{reference} already carries {found.kind} scaling, so --recipe {recipe} can't be applied to it",
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
        """The model with its own weights, and with the adapter of a recipe that was given."""
        model, adapter = open_model(self.artifact), self.adapter
        if adapter is None:
            return model
        return merged(model, adapter, rounded=model.checkpoint.native)

    @property
    def runtime(self) -> Runtime:
        """What runs it: a model under a given recipe is baked to a folder first."""
        return runtime_for("hf" if self.given is not None else target_of(self.artifact).name)

    @property
    def quantised(self) -> bool:
        """Whether it is a model's folder that only the program which quantised it could run."""
        found = open_checkpoint(self.artifact, tolerant=True)
        return is_quantised(found) and not manifest_path(self.artifact).is_file()

    @property
    def window(self) -> int | None:
        """The longest sequence that it serves, if the config has it."""
        window = open_checkpoint(self.artifact, tolerant=True).config.get("max_position_embeddings")
        return window if isinstance(window, int) else None

    def vocab(self) -> int | None:
        """The size of the vocabulary, if the config has it."""
        size = open_checkpoint(self.artifact, tolerant=True).config.get("vocab_size")
        return size if isinstance(size, int) else None

    def searched_on(self, texts: Sequence[Text]) -> list[Text]:
        """Texts that the recipe was searched on: a figure on them is too good."""
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


def computed(subject: Subject) -> tuple[Model, RopeSpec]:
    """The weights, and the rotation to compute on them: of an artifact its own weights under its recipe, of a model the
    recipe that was given or the rotation of its config.

    Raises `UnsupportedError` for weights that can't be read, `InputError` for a recipe of another model.
    """
    model = subject.model()
    stored = model.checkpoint
    if subject.recipe is not None and subject.given is not None:
        return model, model.resolve(subject.recipe)
    if not stored.native:
        model = on_stored_weights(model, stored)
    if subject.recipe is not None:
        record = Manifest.read(subject.artifact).bake
        recipe = record.recipe_for(model.family.name, subject.recipe)
        wanted = expected(model, model.resolve(recipe, record.window), record, subject.artifact)
        return wanted.model, wanted.spec
    found, shape = model.rotation, model.shape
    window = found.tiers[-1].max_length
    return model, RopeSpec(model.family.name, shape.rotary_dim, shape.theta, found.original_window, window, found.tiers)


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
    trust_code: bool = False,
    progress: Progress = silent,
    text: bool = True,
) -> Iterator[tuple[Session, Encode]]:
    """A session and its tokenizer. A folder runs its own code where it has some; a model with a
    recipe is baked for as long as the session lives. Without `text` no tokenizer is needed.

    Raises `UsageError` for a `code` that the artifact does not have, `InputError` for one without tokenizer,
    `UnsupportedError` for code of the folder that isn't ours, unless `trust_code`.
    """
    if code == REFERENCE and dtype != "float32":
        raise UsageError("the reference computes in float64, on a GPU in float32", remedy="Omit --dtype")
    runtime = subject.runtime
    purpose = f"an evaluation in {runtime.name}"
    if code != REFERENCE:
        runtime.require(purpose)
    if runtime.uses_torch and device.startswith("cuda"):
        torch_device(device, "hf", purpose)
    options = OpenOptions(device=device, dtype=dtype, threads=threads, library=library, trust_code=trust_code)
    with ExitStack() as stack:
        progress(Step("loading"))
        encode = tokenizer_of(subject.artifact) if text else _no_text
        if code == REFERENCE:
            from lrconvert.evals.reference import open_reference

            session: Session = stack.enter_context(open_reference(*computed(subject), device=device, threads=threads))
        else:
            artifact = subject.artifact
            if subject.given is not None:
                progress(Step("baking"))
                artifact = stack.enter_context(baked(subject))
            elif subject.quantised:
                progress(Step("dequantising"))
                artifact = stack.enter_context(dequantised(subject))
            backend = _backend_of(subject, artifact, runtime, code)
            backend.check_memory(artifact, options)
            session = stack.enter_context(closing(backend.open(artifact, options)))
        yield session, encode


def _backend_of(subject: Subject, artifact: Path, runtime: Runtime, name: str | None) -> Backend:
    """The one of that name, by default the last that the artifact has: its own code before native code."""
    there = runtime.backends_of(artifact)
    if able := [backend for backend in there if name in (None, backend.name)]:
        return able[-1]
    names = ", ".join([*(backend.name for backend in there), REFERENCE])
    raise UsageError(f"{subject.reference} has no {name} code", remedy=f"Available: {names}")


@contextmanager
def baked(subject: Subject) -> Iterator[Path]:
    """The model under the recipe it was given, as `lrconvert hf` bakes it, in a folder that goes away again.

    Weights are hard links where the temporary folder (TMPDIR) is on their file system, copies elsewhere.
    """
    assert subject.recipe is not None
    with temporary_folder() as folder:
        model = open_model(subject.artifact)
        planned = hf.plan(model, subject.recipe, folder / "model", adapter=subject.adapter)
        bake(planned)
        yield planned.output


@contextmanager
def dequantised(subject: Subject) -> Iterator[Path]:
    """A quantised model with plain weights, in a folder that goes away again."""
    with temporary_folder() as folder:
        write_plain(open_model(subject.artifact), folder)
        yield folder


def _no_text(piece: str) -> list[int]:
    raise AssertionError("no text is read in an evaluation on token ids")
