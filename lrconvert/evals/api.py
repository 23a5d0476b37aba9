# SPDX-License-Identifier: Apache-2.0
"""`lrconvert.evaluate`: perplexity, retrieval, RULER and short benchmarks of a model or an artifact.

    evaluate.perplexity("my-model", lengths=[4096, 16384], texts=["book.txt"])
    evaluate.passkey("my-model.gguf", lengths=[4096])
    evaluate.retrieval("my-model", lengths=[4096, 65536], texts=["book.txt"])
    evaluate.ruler("my-model", tasks=["niah_single_1", "vt"], lengths=[4096, 65536])
    evaluate.benchmarks("my-model", tasks=["hellaswag"], limit=200)

Each returns an `Evaluation`: rows with figures and their 95 % intervals, and how they were measured.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from lrconvert import __version__
from lrconvert.checkpoint.tokenizer import Encode, tokenizer_of
from lrconvert.errors import InputError, UnsupportedError, UsageError, require
from lrconvert.evals.passkey import PROTOCOL, PasskeyFormat, PasskeyRow, by_length, form_of, measure_passkey
from lrconvert.evals.perplexity import measure_perplexity
from lrconvert.evals.protocols import EXCERPTS, Plan
from lrconvert.evals.retrieval import PROTOCOL as RETRIEVAL_PROTOCOL
from lrconvert.evals.retrieval import evaluation_keys, measure_retrieval
from lrconvert.evals.subject import REFERENCE, Subject, opened
from lrconvert.evals.texts import read_texts, sources_of
from lrconvert.precision import long_name
from lrconvert.progress import Progress, Step, silent
from lrconvert.runtimes.base import Session
from lrconvert.training.keys import LabelledForm
from lrconvert.writing import replace_file

if TYPE_CHECKING:
    from typing_extensions import Unpack

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


def perplexity(
    artifact: str | Path,
    *,
    lengths: Sequence[int],
    texts: Sequence[str | Path],
    judged: int | None = None,
    excerpts: int = EXCERPTS,
    whole: bool = False,
    step: int | None = None,
    document_tokens: int | None = None,
    **options: Unpack[Options],
) -> Evaluation:
    """Perplexity at the end of contexts of several lengths (tokens).

    By default the same last `judged` tokens of `excerpts` places count at every length. `whole`: all tokens of
    documents cut at each length. `step`: contexts that move by this many tokens over the first `document_tokens` of a
    document. `texts` are files, folders of .txt, token ids (.npy), or data sets (`hf:NAME…`).

    Raises `UsageError` for options that don't go together, `InputError` for texts that are too short or unreadable and
    for a model whose losses are not numbers, and as `Subject.of` and `opened`.
    """
    run = _Run.of(artifact, options)
    plan = Plan(tuple(lengths), judged, excerpts, whole, step, document_tokens)
    run.check_lengths(lengths)
    sources, subject = sources_of(texts), run.subject
    read = read_texts(sources, lambda: tokenizer_of(subject.artifact), vocab=subject.vocab(), tokens=plan.needed)
    plan.check([len(text.tokens) for text in read])
    for text in subject.searched_on(read):
        run.warn(f"{text.name}: the recipe was searched on this text, so the result is too optimistic")
    with run.session(text=False) as (session, _):
        tokens = [text.tokens for text in read]
        rows = measure_perplexity(session, tokens, plan, seed=run.seed, progress=run.progress)
    found = {"texts": [text.record() for text in read], "rows": [row.to_json() for row in rows]}
    evaluation = run.evaluation("perplexity", plan.sentence, rows, found)

    def plot(path: Path) -> None:
        from lrconvert.evals.plotting import plot_perplexity

        plot_perplexity(rows, path, title=evaluation.title, protocol=plan.sentence)

    return run.saved(evaluation, plot)


def passkey(
    artifact: str | Path,
    *,
    lengths: Sequence[int],
    depths: int = 10,
    trials: int = 1,
    form: Path | None = None,
    **options: Unpack[Options],
) -> Evaluation:
    """How often a key of digits, hidden in a text of each length (tokens), is found at the end of the prompt.

    The key is placed at `depths` depths from start to end, in `trials` documents each. `form` is a passkey.json with
    the sentences; None: the model's own, or plain English ones.

    Raises `UsageError` for a GGUF or an ONNX folder and a length beyond its window, `InputError` for a `form` that is
    damaged and a length that is too short, and as `Subject.of` and `opened`.
    """
    run = _Run.of(artifact, options)
    run.check_lengths(lengths)
    path = form or form_of(run.subject.artifact)
    sentences = PasskeyFormat.read(path)
    with run.session() as (session, encode):
        asked = {"depths": depths, "trials": trials, "seed": run.seed, "progress": run.progress}
        rows = measure_passkey(session, sentences, encode, lengths, **asked)
    return run.keys_found("passkey", PROTOCOL, path, rows)


def retrieval(
    artifact: str | Path,
    *,
    lengths: Sequence[int],
    texts: Sequence[str | Path],
    keys: int = 20,
    form: Path | None = None,
    **options: Unpack[Options],
) -> Evaluation:
    """How many labelled keys of digits, hidden in a text of each length (tokens), are found behind it.

    `keys` keys are placed at even depths of each text that is long enough; each is asked for on its own. A runtime
    with a cache reads the text once for all of them. `form` is a passkey.json with labelled sentences; None: the
    model's own, or plain English ones.

    Raises `InputError` for a `form` that is damaged, texts that are too short and lengths without room, and as
    `Subject.of` and `opened`.
    """
    run = _Run.of(artifact, options)
    run.check_lengths(lengths)
    subject = run.subject
    path = form or evaluation_keys(subject.artifact)
    sentences = LabelledForm.read(path)
    read = read_texts(
        sources_of(texts), lambda: tokenizer_of(subject.artifact), vocab=subject.vocab(), tokens=max(lengths)
    )
    if (longest := max(len(text.tokens) for text in read)) < max(lengths):
        raise InputError(
            f"the longest text has {longest} tokens; {max(lengths)} are needed",
            remedy="Give longer texts, or shorter --lengths",
        )
    with run.session() as (session, encode):
        tokens = [text.tokens for text in read]
        asked = {"keys": keys, "seed": run.seed, "progress": run.progress}
        rows = measure_retrieval(session, sentences, encode, tokens, lengths, **asked)
    return run.keys_found("retrieval", RETRIEVAL_PROTOCOL, path, rows, texts=[text.record() for text in read])


def ruler(
    artifact: str | Path,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int = 25,
    **options: Unpack[Options],
) -> Evaluation:
    """RULER's synthetic tasks at several lengths (tokens, the answer's included), through lm-eval.

    `tasks` are niah_single_1, niah_multikey_2, niah_multikey_3, vt, cwe, fwe, and those whose texts come from the
    network: niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue, niah_multiquery, qa_squad, qa_hotpot.
    `samples` (at most 500) of each task are made for every length, and answered by greedy decoding.

    Raises `UsageError` for unknown tasks, for a length that is too short for one and for a length beyond the window of
    a GGUF or an ONNX folder, `UnsupportedError` for the reference, which generates nothing, `EnvironmentFailure` where
    lm-eval or wonderwords is missing or a text can't be fetched, and as `Subject.of` and `opened`.
    """
    run = _Run.of(artifact, options)
    run.check_lengths(lengths)
    if run.code == REFERENCE:
        raise UnsupportedError("the reference does not generate text, which RULER's answers are")
    lm_eval = require("lm_eval", "eval", "RULER")
    for module, extra in (("wonderwords", "eval"), ("nltk", "eval"), ("scipy", "eval"), ("transformers", "hf")):
        require(module, extra, "RULER")
    from lrconvert.evals.ruler import MOST_SAMPLES, PROTOCOL, measure_ruler, prepare_ruler

    if not 2 <= samples <= MOST_SAMPLES:
        raise UsageError(f"{samples} samples; 2 to {MOST_SAMPLES} are possible")
    path, window = run.subject.artifact, run.subject.window if run.subject.runtime.fixed else None
    prepared = prepare_ruler(tasks, lengths, samples, path, seed=run.seed, progress=run.progress)
    with run.session() as (session, _):
        rows = measure_ruler(session, prepared, path, window=window, progress=run.progress)
    sentence = PROTOCOL.format(version=lm_eval.__version__, samples=samples)
    found = {"lm_eval": lm_eval.__version__, "rows": [row.to_json() for row in rows]}
    evaluation = run.evaluation("ruler", sentence, rows, found)

    def plot(path: Path) -> None:
        from lrconvert.evals.plotting import plot_ruler

        plot_ruler(rows, path, title=evaluation.title, protocol=sentence)

    return run.saved(evaluation, plot)


def benchmarks(
    artifact: str | Path,
    *,
    tasks: Sequence[str],
    data: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_tokens: int | None = None,
    against: Path | None = None,
    **options: Unpack[Options],
) -> Evaluation:
    """Scores on short benchmarks, through lm-eval.

    `tasks` are arc_challenge, hellaswag, mmlu, truthfulqa_mc2, or without `data` any of lm-eval's. `data` is a folder
    of JSON lines; None: lm-eval's own data, from the Hub. `shots` examples come before each question; None: the
    LongRoPE paper's number. `limit` questions of each task are drawn; None: all. `against` is the JSON of an earlier
    result: the differences from it are measured question by question.

    Raises `UsageError` for unknown tasks, for an earlier result of other questions and for an `output` that would
    overwrite it, `InputError` for damaged files,
    `UnsupportedError` for a task that generates text, `EnvironmentFailure` where lm-eval is missing or the Hub can't be
    reached, and as `Subject.of` and `opened`.
    """
    output = options.get("output")
    if against is not None and output is not None and _json_of(Path(output)).resolve() == Path(against).resolve():
        raise UsageError(
            f"-o {output} would overwrite {against}, which --against compares with", remedy="Name another -o"
        )
    run = _Run.of(artifact, options)  # before lm-eval is imported, which takes seconds: it may be refused
    lm_eval = require("lm_eval", "eval", "an evaluation on benchmarks")
    from lrconvert.evals.benchmarks import BATCH_TOKENS, measure_benchmarks, protocol, session_model
    from lrconvert.evals.earlier import changed_prompts, check_comparable, differences, read_earlier
    from lrconvert.evals.tasks import prepare

    earlier = None if against is None else read_earlier(against)
    run.progress(Step("questions"))
    asked = prepare(tasks, folder=data, shots=shots, limit=limit, seed=run.seed)
    files = {name: digest for benchmark in asked for name, digest in benchmark.files.items()}
    if earlier is not None:
        check_comparable(earlier, asked, files, run.seed)
    if shots and (fixed := [found.name for found in asked if found.shots != shots]):
        run.warn(f"--shots does not apply to {', '.join(fixed)}, which has examples of its own")
    with run.session() as (session, _):
        most = batch_tokens or BATCH_TOKENS["cuda" if run.device.startswith("cuda") else "cpu"]
        model = session_model(session, run.subject.artifact, most, progress=run.progress)
        rows = measure_benchmarks(model, asked, run.seed)
    found: dict[str, Any] = {
        "lm_eval": lm_eval.__version__,
        "files": files,
        "window": model.window,
        **asdict(model.effort),
        "rows": [row.to_json() for row in rows],
    }
    incomparable = changed_prompts(earlier, rows) if earlier else None
    changes = differences(earlier, rows) if earlier and not incomparable else []
    if earlier and earlier.truncated != model.effort.truncated:
        run.warn(f"{earlier.truncated} prompts were cut at its window then, {model.effort.truncated} now")
    if changes and earlier:
        found["against"] = {"artifact": earlier.artifact, "rows": [asdict(change) for change in changes]}

    def plot(path: Path) -> None:
        from lrconvert.evals.plotting import plot_benchmarks

        plot_benchmarks(rows, path)

    evaluation = run.evaluation("benchmarks", protocol(asked, limit), rows, found, changes, incomparable)
    return run.saved(evaluation, plot)


@dataclass
class _Run:
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
    def of(cls, artifact: str | Path, options: Options) -> _Run:
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
            path = _json_of(self.output)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(evaluation.result, indent=1, ensure_ascii=False) + "\n")
            plot(self.output.with_name(self.output.name + ".png"))
        return evaluation


def _json_of(stem: Path) -> Path:
    return stem.with_name(stem.name + ".json")
