# SPDX-License-Identifier: Apache-2.0
"""`lrconvert search`: find the factor sets of a recipe."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrconvert.cli import _output as out
from lrconvert.cli._common import (
    SEED,
    TOKENS,
    Number,
    OutputName,
    force_option,
    model_argument,
    revision_option,
    text_option,
)

if TYPE_CHECKING:
    from lrconvert.checkpoint import Model
    from lrconvert.recipe import Recipe
    from lrconvert.search.objective import Document
    from lrconvert.search.run import SearchPlan, TierPlan, Watch


class WeightedLengths(click.ParamType):
    """Lengths with weights: 8k:0.5,64k:0.5; a length without one weighs 1."""

    name = "tokens:weight,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[int, float]:
        if isinstance(value, dict):
            return value
        found: dict[int, float] = {}
        for part in str(value).split(","):
            matched = re.fullmatch(r"([^:]+)(?::(\d+\.?\d*|\.\d+))?", part.strip())
            if not matched or not 0 < (weight := float(matched[2] or 1)) < math.inf:
                self.fail(f"{part!r} is not a length with a weight above 0; 8k:0.5 is", param, ctx)
            if (length := TOKENS.convert(matched[1], param, ctx)) < 2:
                self.fail("a length of 1 has no token that could be predicted", param, ctx)
            found[length] = weight
        return found


class TierLength(click.ParamType):
    """`short`, `long`, or a number of tokens."""

    name = "short|long|tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        return value if value in ("short", "long") else TOKENS.convert(value, param, ctx)


@click.command(name="search", short_help="Find a recipe's factor sets on your own text.")
@model_argument
@click.option("--target", type=TOKENS, required=True, help="The window to reach, in tokens: 64k.")
@text_option
@click.option("-o", "--output", type=OutputName(".journal.jsonl"), required=True, metavar="RECIPE",
              help="Folder or .json file.")  # fmt: skip
@click.option("--algorithm", type=click.Choice(["guided", "evolution"]), default="guided", show_default=True)
@click.option("--space", type=click.Choice(["longrope", "longrope2"]), default="longrope", show_default=True)
@click.option("--objective", type=click.Choice(["perplexity", "needle", "mixed"]), default="perplexity",
              show_default=True)  # fmt: skip
@click.option("--lengths", type=WeightedLengths(), metavar="TOKENS:WEIGHT,…",
              help="Lengths that count, with weights: 8k:0.5,64k:0.5; default: the target alone.")  # fmt: skip
@click.option("--documents", type=click.IntRange(1), default=1, show_default=True,
              help="Documents of the target's length in one evaluation; the paper has 5.")  # fmt: skip
@click.option("--tier", "tiers", type=TierLength(), multiple=True,
              help="Sets to search: short (original window), long (target), a length; default: both.")  # fmt: skip
@click.option("--budget", type=click.IntRange(1), metavar="EVALS",
              help="Evaluations of the long set, a quarter for a short one; default: the algorithm's.")  # fmt: skip
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--start-from", metavar="RECIPE", help="Begin with this recipe's sets; those not searched are kept.")
@click.option("--journal", type=click.Path(path_type=Path), metavar="FILE",
              help="Every evaluation; default: RECIPE.journal.jsonl.")  # fmt: skip
@click.option("--attention-factor", type=Number(0), help="Of the long set; default: LongRoPE's formula.")
@click.option("--uniform", is_flag=True, help="The long set's attention factor for all, for code that knows only one.")
@click.option("--allow-concatenate", is_flag=True, help="Join texts that are shorter than the target.")
@click.option("--form", type=click.Path(path_type=Path), metavar="FILE",
              help="passkey.json with the sentences of needle documents.")  # fmt: skip
@click.option("--original-window", type=TOKENS, help="Where the model's config is wrong about it.")
@click.option("--name", help="The recipe's name.")
@click.option("--device", help="cpu, cuda, cuda:1 …; default: a GPU where there is one.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Default: bfloat16 on a GPU, float32 on a CPU.")  # fmt: skip
@click.option("--attention", type=click.Choice(["cudnn", "flash", "efficient", "math"]),
              help="Attention kernel on a GPU; default: the fastest, measured.")  # fmt: skip
@click.option("--context-parallel", type=click.IntRange(1), default=1, metavar="N",
              help="So many of torchrun's processes share a document that doesn't fit one GPU.")  # fmt: skip
@click.option("--shard-weights", is_flag=True, help="torchrun's processes share the weights (FSDP).")
@click.option("--adapter", metavar="PATH|HUB_ID", help="Search with this LoRA adapter merged.")
@click.option("--dry-run", is_flag=True, help="Say what would be evaluated and what it costs.")
@force_option
@revision_option
@click.pass_context
def command(ctx: click.Context, model: str, output: Path, **options: Any) -> None:
    """Find factor sets for MODEL that keep its loss low up to the target window.

    The journal has every evaluation: after an interruption of any kind the same command goes on.

    \b
    lrconvert search MODEL --target 64k --text book.txt -o recipes/my-model-64k
    lrconvert search MODEL --target 64k --text books/ --algorithm evolution --documents 5 -o recipes/paper
    torchrun --nproc-per-node 8 --no-python lrconvert search MODEL --target 256k --text books/ -o recipes/long
    """
    from lrconvert.errors import UsageError
    from lrconvert.recipe import RECIPE_FILE, write_recipe

    leading = os.environ.get("RANK", "0") == "0"
    target = output if output.suffix == ".json" else output / RECIPE_FILE
    if output.suffix != ".json" and output.is_file():
        raise UsageError(f"{output} is a file", remedy="Name a folder, or a file that ends in .json")
    if target.exists() and not options["force"] and not options["dry_run"]:
        raise UsageError(f"{target} exists", remedy="Choose another name, or replace it with --force")
    plan = _plan(model, output, options)
    if options["dry_run"]:
        _show_cost(plan)
        return
    recipe = _run(plan, output, options, leading)
    if not leading:
        return
    for text in recipe.warnings():
        out.warn(text)
    path = write_recipe(recipe, output, force=options["force"])
    _summary(recipe)
    out.say(f"{path}: {len(recipe.tiers)} tiers, up to {recipe.tiers[-1].max_length} tokens")
    baked = recipe.name if output.resolve() != Path(recipe.name).resolve() else f"{recipe.name}-model"
    out.hint(f"next: {shlex.join(['lrconvert', 'hf', model, '--recipe', str(output), '-o', baked])}")


def _run(plan: SearchPlan, output: Path, options: dict[str, Any], leading: bool) -> Recipe:
    """Search with a journal and a progress bar; an interruption says how to go on."""
    from lrconvert.errors import require
    from lrconvert.search.journal import Journal
    from lrconvert.search.run import Search, journal_path

    path = options["journal"] or journal_path(output)
    with contextlib.ExitStack() as stack:
        if leading:
            # Opened first: a journal of another search is said before anything is loaded.
            journal = stack.enter_context(Journal.open(path, plan.identity))
            found = journal.found
            if found.torn:
                out.warn(found.torn)
            if found.records:
                out.hint(f"{path}: going on after {len(found.records)} evaluations")
        else:
            journal, found = None, None
        for module in ("torch", "transformers"):
            require(module, "search", "a search")
        from lrconvert.search.evaluator import TransformersEvaluator

        attention = options["attention"]
        if attention is None and found is not None and found.runs:
            attention = found.runs[-1].get("attention")  # kernels differ in the fourth digit of a loss
        evaluator = TransformersEvaluator(
            plan.model,
            device=options["device"],
            dtype=plan.dtype,
            attention=attention,
            team=options["context_parallel"],
            sharded=options["shard_weights"],
        )
        if journal is not None:
            read = [text.data_set for text in plan.texts if text.data_set]
            journal.begin({**evaluator.describe(), **({"data_sets": read} if read else {})})
        watch = stack.enter_context(_progress(quiet=not leading))
        try:
            return Search(plan, evaluator, journal, watch).run()
        except KeyboardInterrupt:
            if leading:
                command = shlex.join(["lrconvert", *sys.argv[1:]])
                out.hint(f"\nevery evaluation so far is in {path}; the same command goes on from there: {command}")
            raise


# --- planning --------------------------------------------------------------------------------------------


def _plan(reference: str, output: Path, options: dict[str, Any]) -> SearchPlan:
    from lrconvert.checkpoint import open_model
    from lrconvert.checkpoint.adapter import merged, open_adapter
    from lrconvert.checkpoint.base import refuse_quantised
    from lrconvert.evals.subject import tokenizer_of
    from lrconvert.evals.texts import read_texts, sources_of
    from lrconvert.recipe import load_recipe
    from lrconvert.search.run import SearchPlan

    sources = sources_of(options["texts"]) if options["objective"] != "needle" or options["texts"] else []
    model = open_model(reference, revision=options["revision"])
    refuse_quantised(model, "a search")
    adapter = open_adapter(options["adapter"]) if options["adapter"] else None
    if adapter is not None:
        model = merged(model, adapter)
    window = options["original_window"] or _original_window(reference, model)
    start = load_recipe(options["start_from"]) if options["start_from"] else None
    if start is not None:
        model.resolve(start)
    lengths = _tier_lengths(options["tiers"], options["lengths"] or (), window, options["target"])
    shortest = 1 if options["allow_concatenate"] else options["target"]
    path, vocab = model.checkpoint.path, model.shape.vocab
    texts = read_texts(sources, lambda: tokenizer_of(path), vocab=vocab, tokens=shortest)
    # The longest first: what is too short for it is said in its words.
    tiers = tuple(_tier(model, window, length, texts, start, options) for length in reversed(lengths))[::-1]
    kept = [tier for tier in start.tiers if tier.max_length not in lengths] if start else []
    return SearchPlan(
        model=model,
        original_window=window,
        algorithm=options["algorithm"],
        seed=options["seed"],
        tiers=tiers,
        texts=tuple(texts),
        dtype=options["dtype"] or ("float32" if options["dry_run"] else _default_dtype(options["device"])),
        name=options["name"] or output.name.removesuffix(".json"),
        # A recipe travels: of a local path it keeps the name.
        base_model=model.checkpoint.path.resolve().name.removesuffix(".gguf")
        if Path(reference).exists()
        else reference,
        kept=tuple(tier for tier in kept if tier.max_length <= options["target"]),
        uniform=options["uniform"],
        adapter=adapter,
        adapter_path=None if adapter is None else _beside(adapter.reference, output),
    )


def _beside(reference: str, output: Path) -> str:
    """A path relative to the recipe's folder; a Hub id is what it is."""
    if not Path(reference).exists():
        return reference
    return Path(os.path.relpath(reference, output.parent if output.suffix == ".json" else output)).as_posix()


def _default_dtype(device: str | None) -> str:
    from lrconvert.errors import require

    torch = require("torch", "search", "a search")
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return "bfloat16" if cuda else "float32"


def _original_window(reference: str, model: Model) -> int:
    from lrconvert.checkpoint.rope_config import read_rope

    found = read_rope(model.checkpoint.config, model.shape)
    if found.scaled:
        out.warn(
            f"{reference} already carries {found.kind} scaling; the search starts from the plain rotation and its "
            f"original window, {found.original_window}"
        )
    return found.original_window


def _tier_lengths(tiers: tuple[str | int, ...], weighted: Iterable[int], window: int, target: int) -> list[int]:
    """The lengths to search sets for, each once."""
    from lrconvert.errors import UsageError

    if window < 2:
        raise UsageError(f"an original window of {window} token has nothing to extend")
    if target <= window:
        raise UsageError(
            f"--target {target} is within the original window, {window}",
            remedy="Name a longer one; --tier short searches the original window's own set",
        )
    if beyond := [length for length in weighted if length > target]:
        raise UsageError(f"--lengths {beyond[0]} is beyond the target, {target}")
    named = {"short": window, "long": target}
    lengths = {named[tier] if isinstance(tier, str) else tier for tier in tiers or ("short", "long")}
    if off := [length for length in lengths if not window <= length <= target]:
        raise UsageError(f"--tier {off[0]} is not between the original window, {window}, and the target, {target}")
    return sorted(lengths)


def _tier(model: Model, window: int, length: int, texts: list[Any], start: Recipe | None, options: Any) -> TierPlan:
    from lrconvert.search.objective import build_objective
    from lrconvert.search.run import SHORT_SHARE, TierPlan, default_budget
    from lrconvert.search.space import space_for

    target, shape, factor = options["target"], model.shape, options["attention_factor"]
    fixed = (factor, factor) if factor is not None and length > window else None
    space = space_for(shape.rotary_dim, shape.theta, window, length, kind=options["space"], attention=fixed)
    weights = {at: weight for at, weight in (options["lengths"] or {}).items() if at <= length} or {length: 1.0}
    objective = build_objective(
        options["objective"],
        weights,
        original_window=window,
        texts=texts,
        documents=options["documents"] * (target // length),  # as many tokens for every tier
        join=options["allow_concatenate"],
        needles=lambda lengths: _needles(model, options, lengths),
    )
    budget = options["budget"]
    if budget is None:
        budget = default_budget(options["algorithm"], length, window)
    elif length <= window and len(options["tiers"]) != 1:
        budget = max(1, budget // SHORT_SHARE)
    candidates = []
    if start is not None:
        old = next((tier for tier in start.tiers if tier.max_length >= length), start.tiers[-1])
        candidates = [space.make(old.factors, old.start_tokens, old.attention_factor)]
    return TierPlan(space, objective, budget, tuple(candidates))


def _needles(model: Model, options: dict[str, Any], lengths: Any) -> list[Document]:
    from lrconvert.evals.passkey import PasskeyFormat, form_of
    from lrconvert.evals.subject import tokenizer_of
    from lrconvert.search.objective import needle_documents

    path = model.checkpoint.path
    form = PasskeyFormat.read(options["form"] or form_of(path))
    return needle_documents(form, tokenizer_of(path), lengths, options["seed"])


# --- saying --------------------------------------------------------------------------------------------------


def _show_cost(plan: SearchPlan) -> None:
    """Evaluations, tokens and operations of a search, without a model in memory."""
    import numpy as np

    shape, total = plan.model.shape, 0.0
    parameters = sum(int(np.prod(info.shape, dtype=np.float64)) for info in plan.model.checkpoint.tensors.values())
    for tier in plan.tiers:
        lengths = [len(document.tokens) for document in tier.objective.documents]
        # A product of matrices takes 2 operations a parameter and token; causal attention reads half of all pairs.
        dense = 2.0 * parameters * sum(lengths)
        attention = sum(2.0 * shape.layers * shape.heads * shape.head_dim * length**2 for length in lengths)
        total += tier.budget * (dense + attention)
        out.say(
            f"set for {tier.length:,} tokens: {tier.budget} evaluations of {len(lengths)} documents, "
            f"{sum(lengths):,} tokens and {(dense + attention) / 1e12:.3g} TFLOP each"
        )
    out.say(f"together {total / 1e15:.3g} PFLOP: {_duration(total / 200e12)} at 200 TFLOP/s")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def _summary(recipe: Recipe) -> None:
    from rich.table import Table

    table = Table(title=f"{recipe.name}: losses on the text of the search (nats a token)")
    for name in ("set for", "length", "searched", "start", "best start's loss"):
        table.add_column(name, justify="right")
    for tier in (recipe.evaluation or {}).get("tiers", []):
        for key, loss in tier["losses"].items():
            starts = {name: losses[key] for name, losses in tier["starts"].items() if key in losses}
            best = min(starts, key=lambda name: starts[name], default="")
            row = (f"{tier['max_length']:,}", key, f"{loss:.4f}", best, f"{starts[best]:.4f}" if best else "")
            table.add_row(*row)
    out.console().print(table)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Watch]:
    """A bar with the best loss and the time that is left, where somebody looks."""
    if quiet or not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[int, Any] = {}

        def watch(now: Any) -> None:
            if now.length not in tasks:
                tasks[now.length] = bar.add_task(f"{now.length:,} tokens", total=now.budget, said="")
            left = "" if now.seconds is None else f", {_duration(now.seconds * (now.budget - now.spent))} left"
            said = f"{now.evaluations} evaluations, best loss {now.best:.4f}{left}"
            bar.update(tasks[now.length], completed=now.spent, said=said)

        yield watch
