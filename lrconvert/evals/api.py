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

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.errors import InputError, UnsupportedError, UsageError, require
from lrconvert.evals.passkey import PROTOCOL, PasskeyFormat, form_of, measure_passkey
from lrconvert.evals.perplexity import measure_perplexity
from lrconvert.evals.protocols import EXCERPTS, Plan
from lrconvert.evals.retrieval import PROTOCOL as RETRIEVAL_PROTOCOL
from lrconvert.evals.retrieval import evaluation_keys, measure_retrieval
from lrconvert.evals.run import Evaluation, Options, Run, json_of
from lrconvert.evals.subject import REFERENCE
from lrconvert.evals.texts import read_texts, sources_of
from lrconvert.progress import Step
from lrconvert.training.keys import LabelledForm

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    run = Run.of(artifact, options)
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
    run = Run.of(artifact, options)
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
    run = Run.of(artifact, options)
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
    run = Run.of(artifact, options)
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
    if against is not None and output is not None and json_of(Path(output)).resolve() == Path(against).resolve():
        raise UsageError(
            f"-o {output} would overwrite {against}, which --against compares with", remedy="Name another -o"
        )
    run = Run.of(artifact, options)  # before lm-eval is imported, which takes seconds: it may be refused
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
