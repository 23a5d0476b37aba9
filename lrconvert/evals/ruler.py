# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks (Hsieh et al. 2024) through lm-eval: its generators make the samples, its definitions the prompts and
the scores; a session writes the answers, greedily.

This module imports lm-eval: `require` it, `wonderwords` and `transformers` first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from lrconvert.checkpoint import open_checkpoint
from lrconvert.errors import EnvironmentFailure, InputError, UsageError
from lrconvert.evals.figures import Figure, share_figure
from lrconvert.evals.prompts import PromptTokenizer
from lrconvert.evals.ruler_tasks import OFFLINE, PACKAGE, TASKS, RulerTask, Sized
from lrconvert.evals.scores import pack
from lrconvert.evals.tasks import quiet
from lrconvert.progress import Progress, Steps
from lrconvert.runtimes.base import Session

FOLDER = Path(lm_eval.__file__).parent / "tasks" / "ruler"
MOST_SAMPLES = 500  # lm-eval's own number
PROTOCOL = (
    "RULER by the definitions of lm-eval {version}: {samples} samples of each task and length, made with the seed and "
    "the artifact's tokenizer; answers by greedy decoding, up to the end of the sequence; score: the share of the "
    "wanted words that stand in the answer; Wilson's intervals"
)


# --- samples ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PreparedRuler:
    """A task at one length, ready to be asked: its prompts with their samples, and lm-eval's definition."""

    name: str
    length: int
    prompts: tuple[str, ...]
    samples: tuple[Mapping[str, Any], ...]
    new_tokens: int
    task: Any

    def score(self, at: int, answer: str) -> float:
        """lm-eval's score of an answer, 0 to 1."""
        return float(self.task.process_results(self.samples[at], [answer])[str(self.length)])

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()


def prepare_ruler(
    names: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    artifact: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[PreparedRuler]:
    """Every task at every length, `samples` of each, the same ones whatever else is asked.

    Raises `UsageError` for a task that isn't known and a length without room for one, `InputError` for a tokenizer
    that does not fit, `EnvironmentFailure` where the texts of a task can't be fetched.
    """
    if unknown := [name for name in names if name not in TASKS]:
        raise UsageError(f"{', '.join(unknown)}: RULER has no such task", remedy=f"Choose from {', '.join(TASKS)}")
    tokenizer, found, steps = Sized(artifact), [], Steps("samples", progress)
    if not tokenizer.count("The quick brown fox"):
        raise InputError(f"{artifact}: its tokenizer makes no tokens of a text")
    places = [(name, length) for length in sorted(lengths) for name in names]
    for name, length in places:
        steps.expect(length)
        with quiet(), seeded(seed, length):
            _check(name, tokenizer, length)
    for name, length in places:
        steps.start(f"{name}, {length:,} tokens", length)
        with quiet(), seeded(seed, length):
            found.append(_prepared(name, _made(name, tokenizer, length, samples), length))
    steps.finish()
    return found


def _check(name: str, tokenizer: Sized, length: int) -> None:
    """Before anything is made: a generator may not come to an end."""
    least = TASKS[name].least
    if least is not None and length < (needed := least(tokenizer, length)):
        raise UsageError(
            f"{name} needs at least {needed:.0f} tokens with this tokenizer, not {length}",
            remedy="Use longer --lengths, or omit the task",
        )


def _made(name: str, tokenizer: Sized, length: int, samples: int) -> list[dict[str, Any]]:
    task = TASKS[name]
    try:
        made = task.make(tokenizer, length, samples)
    except Exception as error:  # of what is fetched: whatever the clients of the Hub and of a web server raise
        if "max_seq_length" in str(error):  # not one sample fits
            raise UsageError(f"{name} has no sample of {length} tokens", remedy="Use longer --lengths") from error
        if task.fetched is None:
            raise
        raise _unreachable(name, task, error) from error
    if len(made) < samples:
        raise UsageError(
            f"{name}: only {len(made)} of {samples} samples fit {length} tokens", remedy="Use longer --lengths"
        )
    return made


def _unreachable(name: str, task: RulerTask, error: Exception) -> EnvironmentFailure:
    line = " ".join(str(error).split())[:200]
    return EnvironmentFailure(
        f"{name} needs {task.fetched}, which can't be fetched ({type(error).__name__}: {line})",
        remedy=f"Check the network, or choose tasks that need none: {', '.join(OFFLINE)}",
    )


def _prepared(name: str, samples: list[dict[str, Any]], length: int) -> PreparedRuler:
    """With prompts, limits and score as lm-eval's definition says."""
    common: Any = import_module(f"{PACKAGE}.common_utils")
    config = load_yaml(FOLDER / f"{TASKS[name].definition}.yaml", resolve_func=False)
    config["custom_dataset"] = lambda **_: {"test": Dataset.from_list(samples)}
    config["process_results"] = getattr(common, config["process_results"].rpartition(".")[2])
    # Its own list ends at 131072, and has no length between the powers of two.
    config["metric_list"] = [{"metric": str(length), "aggregation": common.aggregate_metrics, "higher_is_better": True}]
    for key in ("tag", "group"):
        config.pop(key, None)
    task = ConfigurableTask(config=config)
    task.build_all_requests(rank=0, world_size=1)
    asked = [(str(instance.args[0]), instance.doc) for instance in task.instances]
    prompts, docs = zip(*asked, strict=True)
    return PreparedRuler(name, length, prompts, docs, int(config["generation_kwargs"]["max_gen_toks"]), task)


@contextlib.contextmanager
def seeded(seed: int, length: int) -> Iterator[None]:
    """What is random in lm-eval's generators is global: it is seeded, and goes on afterwards as before."""
    states = random.getstate(), np.random.get_state()
    drawn = int(np.random.SeedSequence([seed, length]).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


# --- answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RulerRow:
    """One task at one length: the score over all samples, every sample's own, the tokens of the longest prompt, how
    many prompts lost their start, and the SHA-256 of all prompts."""

    task: str
    length: int
    score: Figure
    scores: tuple[float, ...]
    prompt_tokens: int
    truncated: int
    prompts_sha256: str

    def to_json(self) -> dict[str, Any]:
        """With the scores of all samples as one string."""
        return asdict(self) | {"samples": len(self.scores), "scores": pack(self.scores)}


def measure_ruler(
    session: Session,
    prepared: Sequence[PreparedRuler],
    artifact: Path,
    *,
    window: int | None = None,
    progress: Progress | None = None,
) -> list[RulerRow]:
    """Every task at every length. Of a prompt that does not fit `window` tokens with its answer the start is cut."""
    tokenizer, ends = PromptTokenizer.of(artifact), end_tokens(artifact)
    rows, steps = [], Steps("answers", progress)
    for found in prepared:
        steps.expect(found.length, len(found.prompts))
    for found in prepared:
        encoded = tokenizer.encode(found.prompts)
        room = None if window is None else window - found.new_tokens
        scores, longest, truncated = [], 0, 0
        for at, prompt in enumerate(found.prompts):
            steps.start(f"{found.name}, {found.length:,} tokens", found.length)
            tokens = encoded[prompt].tolist()
            kept = tokens if room is None else tokens[-room:]
            truncated += len(kept) < len(tokens)
            longest = max(longest, len(kept))
            scores.append(found.score(at, answer_of(session, tokenizer.tokenizer, kept, found.new_tokens, ends)))
        figure = share_figure(sum(scores), len(scores))
        rows.append(RulerRow(found.name, found.length, figure, tuple(scores), longest, truncated, found.sha256))
    steps.finish()
    return rows


def answer_of(session: Session, tokenizer: Any, prompt: Sequence[int], new_tokens: int, ends: frozenset[int]) -> str:
    """What greedy decoding writes before a token that ends the sequence.

    Some sessions write the next best token there and go on: the logits tell where the end was preferred.
    """
    tokens, logits = session.generate(prompt, new_tokens)
    if not np.isfinite(logits).all():
        raise InputError(f"the model's logits after a prompt of {len(prompt)} tokens are not all numbers")
    preferred = logits.argmax(axis=-1).tolist()
    stop = next((at for at, token in enumerate(preferred) if token in ends), len(tokens))
    return tokenizer.decode(tokens[:stop], skip_special_tokens=True)


def end_tokens(artifact: Path) -> frozenset[int]:
    """Ids of the tokens that end a sequence, by config.json and generation_config.json."""
    checkpoint = open_checkpoint(artifact, tolerant=True)
    source: Any = checkpoint.side_files().get("generation_config.json")
    generation: Any = {}
    if source is not None:
        with contextlib.suppress(OSError, ValueError):
            generation = json.loads(source.read_bytes() if isinstance(source, Path) else source)
    found: list[Any] = []
    for config in (checkpoint.config, generation if isinstance(generation, dict) else {}):
        ids = config.get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    return frozenset(token for token in found if isinstance(token, int))
