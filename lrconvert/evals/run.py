# SPDX-License-Identifier: Apache-2.0
"""What all evaluations share: their options, a session on what is evaluated, and what is kept of the result."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from lrconvert import __version__
from lrconvert.checkpoint.tokenizer import Encode
from lrconvert.errors import UsageError, require
from lrconvert.evals.passkey import PasskeyRow, by_length
from lrconvert.evals.subject import REFERENCE, Subject, opened
from lrconvert.precision import long_name
from lrconvert.progress import Progress, silent
from lrconvert.runtimes.base import Session
from lrconvert.writing import replace_file

if TYPE_CHECKING:
    from lrconvert.evals.earlier import Difference


class Options(TypedDict, total=False):
    """What every evaluation takes.

    recipe: Evaluate a plain model under this recipe, without baking it.
    code: Which code of the artifact runs: native, custom, or reference for our own implementation; default: its own.
    device: cpu, cuda, cuda:1 …; default: cpu. dtype: f32 (default), bf16, f16, or by the long names.
    threads: Threads of the runtime. library: libllama for a GGUF.
    trust_code: Run code that a folder brings even where it is not lrconvert's.
    seed: Of everything that is random; default: 0.
    output: A stem: STEM.json and the picture STEM.png are written.
    progress: Gets every step.
    """

    recipe: str | None
    code: str | None
    device: str
    dtype: str
    threads: int | None
    library: str | None
    trust_code: bool
    seed: int
    output: str | Path | None
    progress: Progress | None


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: `rows` (PerplexityRow, PasskeyRow, RulerRow or BenchmarkRow), how they were measured, and
    `result`, all of it, as in STEM.json.

    `incomparable` is why an earlier result could not be compared after all; then there are no `differences`.
    """

    kind: str
    protocol: str
    title: str
    rows: tuple[Any, ...]
    result: dict[str, Any]
    warnings: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    incomparable: UsageError | None = None


@dataclass
class Run:
    """What an evaluation is of, and how it is computed and kept."""

    subject: Subject
    code: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    library: str | None = None
    trust_code: bool = False
    seed: int = 0
    output: Path | None = None
    progress: Progress = silent
    warnings: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)  # the runtime's

    @classmethod
    def of(cls, artifact: str | Path, options: Options) -> Run:
        given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        subject = Subject.of(str(artifact), given.pop("recipe", None))
        output, dtype = given.pop("output", None), given.pop("dtype", None)
        run = cls(subject, output=None if output is None else Path(output), **given)
        if dtype is not None:
            run.dtype = long_name(dtype)
            if run.code != REFERENCE:
                run.warnings += subject.runtime.ignored(run.dtype)
        return run

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """`UsageError` for documents beyond the window of an artifact whose window is fixed."""
        window = self.subject.window if self.subject.runtime.fixed else None
        if window is not None and max(lengths) > window:
            raise UsageError(
                f"{self.subject.reference} serves {window} tokens; documents of {max(lengths)} are beyond that",
                remedy="Use shorter --lengths, or bake it for a longer window",
            )

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    @contextlib.contextmanager
    def session(self, *, text: bool = True) -> Iterator[tuple[Session, Encode]]:
        """A session on the artifact and its tokenizer, which no one needs without `text`."""
        if self.output is not None:
            require("matplotlib", "plot", "the plot that -o writes")  # an error before anything is computed
        with opened(
            self.subject,
            code=self.code,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            library=self.library,
            trust_code=self.trust_code,
            progress=self.progress,
            text=text,
        ) as (session, encode):
            yield session, encode
            self.info = session.info

    def evaluation(
        self,
        kind: str,
        protocol: str,
        rows: Sequence[Any],
        found: dict[str, Any],
        changes: Sequence[Difference] = (),
        incomparable: UsageError | None = None,
    ) -> Evaluation:
        name, recipe = Path(self.subject.reference).name, self.subject.recipe
        under = "" if recipe is None else f" under {recipe.name}"
        result = {
            "lrconvert": __version__,
            "artifact": name,
            "recipe": None if recipe is None else recipe.name,
            "seed": self.seed,
            "runtime": self.info,
            "evaluation": kind,
            "protocol": protocol,
            **found,
        }
        title = f"{name}{under}: {kind}, seed {self.seed}"
        warnings = tuple(self.warnings)
        return Evaluation(kind, protocol, title, tuple(rows), result, warnings, tuple(changes), incomparable)

    def keys_found(self, kind: str, protocol: str, form: Path, rows: Sequence[PasskeyRow], **more: Any) -> Evaluation:
        """An evaluation that counts keys; `form` is the file of their sentences."""
        found = {
            "form": {"name": form.name, "sha256": sha256(form.read_bytes()).hexdigest()},
            **more,
            "lengths": [total.to_json() for total in by_length(rows)],
            "rows": [row.to_json() for row in rows],
        }
        evaluation = self.evaluation(kind, protocol, rows, found)

        def plot(path: Path) -> None:
            from lrconvert.evals.plotting import plot_passkey

            plot_passkey(rows, path, title=evaluation.title, protocol=protocol)

        return self.saved(evaluation, plot)

    def saved(self, evaluation: Evaluation, plot: Callable[[Path], None]) -> Evaluation:
        """STEM.json and STEM.png, if wanted."""
        if self.output is not None:
            path = json_of(self.output)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(evaluation.result, indent=1, ensure_ascii=False) + "\n")
            plot(self.output.with_name(self.output.name + ".png"))
        return evaluation


def json_of(stem: Path) -> Path:
    """Where the result with that stem lies."""
    return stem.with_name(stem.name + ".json")
