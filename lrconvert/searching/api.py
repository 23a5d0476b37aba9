# SPDX-License-Identifier: Apache-2.0
"""`lrconvert.search`: find the factor sets of a recipe, from a model and long texts to the recipe's file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lrconvert.errors import UsageError, require
from lrconvert.evals.texts import Text
from lrconvert.recipe import Recipe, check_output, find_recipe, load_recipe, write_recipe
from lrconvert.searching.estimate import check_fits
from lrconvert.searching.journal import Contents, Journal, differences, digest, journal_path, read_journal
from lrconvert.searching.objective import JumpingRows
from lrconvert.searching.objective import Kind as ObjectiveKind
from lrconvert.searching.plan import SearchPlan, plan_search
from lrconvert.searching.request import AlgorithmName, SearchRequest
from lrconvert.searching.run import Progress, Search
from lrconvert.searching.space import Kind as SpaceKind
from lrconvert.training.devices import computing_threads, default_dtype, is_leading


@dataclass(frozen=True)
class Note:
    """Something to know about a search: a `warning`, or only how it goes on."""

    text: str
    warning: bool = True


Watch = Callable[[Progress | Note], None]


@dataclass(frozen=True)
class SearchResult:
    """The recipe that was found, the file it was written to, and the journal of all evaluations.

    `leading` is whether this is the process that writes: under torchrun one of them.
    """

    recipe: Recipe
    path: Path | None = None
    journal: Path | None = None
    notes: tuple[Note, ...] = ()
    leading: bool = True


def search(
    model: str | Path,
    *,
    target: int,
    texts: Sequence[str | Path | Text] = (),
    output: str | Path | None = None,
    algorithm: AlgorithmName = "guided",
    space: SpaceKind = "longrope",
    objective: ObjectiveKind = "perplexity",
    lengths: Mapping[int, float] | None = None,
    documents: int = 1,
    tiers: Sequence[int | Literal["short", "long"]] = (),
    budget: int | None = None,
    seed: int = 0,
    start_from: str | Path | None = None,
    on: str | Path | None = None,
    rows: JumpingRows | None = None,
    start_tokens: bool = False,
    from_plain: bool = False,
    runtime: str | None = None,
    attention_factor: float | None = None,
    uniform: bool = False,
    allow_concatenate: bool = False,
    form: Path | None = None,
    original_window: int | None = None,
    name: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    journal: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    attention: str | None = None,
    context_parallel: int = 1,
    shard_weights: bool = False,
    force: bool = False,
    watch: Watch | None = None,
) -> SearchResult:
    """Find factor sets that keep the loss of `model` low up to `target` tokens.

    Args:
        model: A folder, a GGUF file or a Hub id (`revision`: its branch, tag or commit).
        target: The window to reach, in tokens.
        texts: Long texts: files, folders of .txt, token ids (.npy), data sets (`hf:NAME…`). Only the objective
            `needle` needs none. `allow_concatenate` joins texts that are shorter than the target.
        output: A folder or a .json file for the recipe; None: it is only returned. An existing recipe is replaced with
            `force` alone.
        algorithm: `guided`, or `evolution` as in the LongRoPE paper.
        space: `longrope` or `longrope2`: which factor sets are candidates.
        objective: What is minimised: `perplexity` of the texts, `needle` (retrieval of a hidden key, with the sentences
            of the passkey.json `form`), or `mixed`.
        lengths: Lengths that count, each with its weight; None: the target alone.
        documents: Documents of the target's length in one evaluation.
        tiers: The sets to search: "short" (the original window), "long" (the target), or lengths; empty: both.
        budget: Evaluations for the long set, a quarter of them for the short one; None: the algorithm's own number.
        seed: Of everything that is random.
        start_from: A recipe whose sets are the first candidates. Its sets that are not searched are kept.
        on: A recipe that the model has already (with its adapter): factors are searched on top of its own, which stay
            as they are up to its window.
        rows: Evaluate rows whose positions jump over the target, instead of whole documents: for a model that was
            fine-tuned on such rows.
        start_tokens: Search their number too. Otherwise there are none: on SmolLM2 they gained no more than another
            seed does (docs/search.md).
        runtime: What the recipe is for, a key of `engines.capability.SEARCHABLE`: sets that it can't express are no
            candidates. "any": one attention factor, no start tokens, two sets.
        attention_factor: The long set's; None: LongRoPE's formula. `uniform`: all sets take the long one's.
        original_window: The window that the model serves today; None: what its config says. A model with scaling of
            its own keeps it up to there, and factors are searched on top of it; `from_plain` replaces it.
        name: The recipe's name; None: the output's.
        adapter: A LoRA adapter, merged into the model for the search and named in the recipe.
        journal: The file of all evaluations; None: beside `output`. A search that finds its journal goes on from it.
        device: cpu, cuda, cuda:1 …; None: a GPU where there is one. `dtype`: f32, bf16 or f16, or by the long names;
            None: bf16 on a GPU. `threads`: PyTorch's, on a CPU; None: its own number. `attention`: the kernel on a GPU;
            None: the fastest, measured.
        context_parallel: How many of torchrun's processes share a document. `shard_weights`: all share the weights.
        watch: Called with a `Note` or the `Progress` of a tier as they come.

    Raises:
        UsageError: Options that don't go together, an output that exists, a journal in use.
        InputError: A model, text, recipe or journal that is damaged, too short, or another one's.
        UnsupportedError: A model quantised in a way that can't be read.
        EnvironmentFailure: PyTorch or a GPU is missing, or a document does not fit the memory.
    """
    where = None if output is None else Path(output)
    journal_file, exists = _journal_file(journal, where), None
    try:
        if where is not None:
            check_output(where, force=force)
    except UsageError as error:  # unless it is this search's own, killed after it had written it
        if journal_file is None or not journal_file.is_file():
            raise
        exists = error
    request = SearchRequest(
        model=model,
        target=target,
        texts=texts,
        output=where,
        algorithm=algorithm,
        space=space,
        objective=objective,
        lengths=lengths,
        documents=documents,
        tiers=tiers,
        budget=budget,
        seed=seed,
        start_from=start_from,
        on=on,
        rows=rows,
        start_tokens=start_tokens,
        from_plain=from_plain,
        runtime=runtime,
        attention_factor=attention_factor,
        uniform=uniform,
        allow_concatenate=allow_concatenate,
        form=form,
        original_window=original_window,
        name=name,
        adapter=adapter,
        dtype=dtype,
        revision=revision,
    )
    plan = plan_search(request)
    if dtype is None:
        plan = replace(plan, dtype=default_dtype(device, "a search"))
    if exists is not None and where is not None and journal_file is not None:
        return _finished(plan, where, journal_file, watch, exists)
    run = _Run(plan, device, threads, attention, context_parallel, shard_weights, watch)
    recipe = run.carried_out(journal_file)
    path = write_recipe(recipe, where, force=force) if where is not None and run.leading else None
    return SearchResult(recipe, path, run.journal, tuple(run.notes), run.leading)


def _finished(plan: SearchPlan, output: Path, journal: Path, watch: Watch | None, exists: UsageError) -> SearchResult:
    """The recipe at `output`, where it is what this very search made of its journal; raises `exists` otherwise."""
    path = find_recipe(output)
    found, recipe = read_journal(journal), load_recipe(output)
    # As they come back from a file: the journal's head has the identity that the digest is made of.
    same = found.head and not differences(found.head["identity"], json.loads(json.dumps(plan.identity)))
    made_of = (recipe.provenance.search or {}).get("journal_sha256")
    if path is None or not same or made_of != digest(plan.identity, found.records):
        raise exists
    leading = is_leading()
    note = Note(f"{path} is what this search found already; --force searches again", warning=False)
    if watch is not None and leading:
        watch(note)
    return SearchResult(recipe, path, journal, (note,), leading)


def _journal_file(journal: str | Path | None, output: Path | None) -> Path | None:
    if journal is not None:
        return Path(journal)
    return None if output is None else journal_path(output)


class _Run:
    """A plan on this machine: the journal, the model in memory, the search."""

    def __init__(
        self,
        plan: SearchPlan,
        device: str | None,
        threads: int | None,
        attention: str | None,
        context_parallel: int,
        shard_weights: bool,
        watch: Watch | None,
    ) -> None:
        self.plan, self.watch = plan, watch
        self.device, self.threads, self.attention = device, threads, attention
        self.context_parallel, self.shard_weights = context_parallel, shard_weights
        self.leading = is_leading()
        self.journal: Path | None = None
        self.notes: list[Note] = []

    def carried_out(self, path: Path | None) -> Recipe:
        """The recipe, with all evaluations in the journal at `path` where there is one."""
        for text in self.plan.notes:
            self._note(Note(text))
        self.journal = path
        with contextlib.ExitStack() as stack:
            journal = None
            if path is not None and self.leading:
                # Opened first: a journal of another search is refused before anything is loaded.
                journal = stack.enter_context(Journal.open(path, self.plan.identity))
                self._note_found(path, journal.found)
            for module in ("torch", "transformers"):
                require(module, "search", "a search")
            processes = int(os.environ.get("WORLD_SIZE", "1")) if self.shard_weights else 1
            check_fits(self.plan, self.device, team=self.context_parallel, processes=processes)
            from lrconvert.searching.evaluator import TransformersEvaluator

            stack.enter_context(computing_threads(self.threads))
            evaluator = TransformersEvaluator(
                self.plan.model,
                device=self.device,
                dtype=self.plan.dtype,
                attention=self.attention or _earlier_kernel(journal),
                team=self.context_parallel,
                sharded=self.shard_weights,
            )
            if journal is not None:
                read = [text.data_set for text in self.plan.texts if text.data_set]
                journal.begin({**evaluator.describe(), **({"data_sets": read} if read else {})})
            return Search(self.plan, evaluator, journal, self._watched).run()

    def _note_found(self, path: Path, found: Contents) -> None:
        if found.torn:
            self._note(Note(found.torn))
        if found.records and found.chain is None:
            self._note(Note(f"{path}: written by an earlier lrconvert, without digests: changes to it can't be seen"))
        if found.records:
            self._note(Note(f"{path}: continuing after {len(found.records)} evaluations", warning=False))

    def _note(self, note: Note) -> None:
        self.notes.append(note)
        if self.watch is not None and self.leading:
            self.watch(note)

    def _watched(self, progress: Progress) -> None:
        if self.watch is not None and self.leading:
            self.watch(progress)


def _earlier_kernel(journal: Journal | None) -> str | None:
    """The attention kernel of the last run: kernels differ in the fourth digit of a loss."""
    runs = [] if journal is None else journal.found.runs
    return runs[-1].get("attention") if runs else None
