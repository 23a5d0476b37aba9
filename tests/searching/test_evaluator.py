# SPDX-License-Identifier: Apache-2.0
"""Losses of the evaluator are those of transformers and of the reference, for every family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.gguf_files import converter_gguf
from support.onnx_files import write_adapter
from support.pico import FAMILIES

from lrconvert.artifact.sliding import lifted_note
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.errors import UsageError
from lrconvert.evals.texts import Text
from lrconvert.reference import FactorSet, Reference, Rotation
from lrconvert.runtimes.base import scores_of
from lrconvert.searching.evaluator import TransformersEvaluator, batches
from lrconvert.searching.objective import Document, Objective, build_objective
from lrconvert.searching.protocol import Answer, Question
from lrconvert.searching.space import Candidate, space_for
from lrconvert.training import losses as chunked
from lrconvert.training.losses import MAX_LOGITS

WINDOW, TARGET = 64, 192


def objective_for(model: Model, documents: int = 1) -> Objective:
    rng = np.random.default_rng(1)
    text = Text("random", "0" * 64, rng.integers(0, model.shape.vocab, 700))
    return build_objective(
        "perplexity",
        {WINDOW: 0.25, TARGET: 0.75},
        original_window=WINDOW,
        texts=[text],
        documents=documents,
        needles=lambda lengths: [],
    )


def candidate_for(model: Model, start_tokens: int = 8) -> Candidate:
    space = space_for(model.shape.rotary_dim, model.shape.theta, WINDOW, TARGET)
    return space.make(np.linspace(1.0, 3.5, space.size), start_tokens)


def loss_of(evaluator: TransformersEvaluator, objective: Objective, candidate: Candidate, **options: Any) -> Answer:
    (answer,) = evaluator.answer(objective, [Question(candidate, **options)])
    return answer


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_reference_s(family: str, pico: Callable[..., Model]) -> None:
    """Start tokens, attention factor, tied and grouped heads, sliding windows, partial rotation; float32 against
    float64."""
    model = pico(family)
    objective, candidate = objective_for(model), candidate_for(model)
    answer = loss_of(TransformersEvaluator(model, device="cpu"), objective, candidate)
    factors = FactorSet(TARGET, candidate.factors, candidate.start_tokens, candidate.attention_factor)
    reference = Reference(model, Rotation(model.shape.theta, model.shape.rotary_dim, [factors]))
    tokens = objective.documents[0].tokens
    wanted = scores_of(reference.logits(tokens)[:-1], tokens[1:]).losses
    assert answer.losses[f"text@{TARGET}"] == pytest.approx(wanted.mean(), abs=2e-6)
    assert answer.losses[f"text@{WINDOW}"] == pytest.approx(wanted[: WINDOW - 1].mean(), abs=2e-6)
    # The check can fail: a fiftieth more on one factor is seen.
    moved = replace(candidate, steps=_moved(candidate, 1, 2))
    changed = loss_of(TransformersEvaluator(model, device="cpu"), objective, moved)
    assert abs(changed.losses[f"text@{TARGET}"] - wanted.mean()) > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_differences(family: str, pico: Callable[..., Model]) -> None:
    """d loss / d ln λ against central differences in float64, with and without recomputing activations."""
    model = pico(family)
    evaluator = TransformersEvaluator(model, device="cpu", dtype="float64")
    objective, candidate = objective_for(model, documents=2), candidate_for(model)
    plain = loss_of(evaluator, objective, candidate)
    with_gradient = loss_of(evaluator, objective, candidate, gradient=True)
    assert with_gradient.gradient is not None
    assert with_gradient.loss == pytest.approx(plain.loss, abs=1e-6)  # tables are float32 beside a gradient
    evaluator.model.recompute = True
    again = loss_of(evaluator, objective, candidate, gradient=True)
    assert again.gradient == pytest.approx(with_gradient.gradient, abs=1e-7)
    last = len(candidate.steps) - 1
    for index in (last - 1, last):  # losses are smooth in slow frequencies alone
        ends = [replace(candidate, steps=_moved(candidate, index, by)) for by in (2, -2)]
        losses = [loss_of(evaluator, objective, end).loss for end in ends]
        apart = np.log(ends[0].steps[index] / ends[1].steps[index])
        assert with_gradient.gradient[index] == pytest.approx((losses[0] - losses[1]) / apart, rel=0.05, abs=2e-5)


def test_a_gradient_made_in_chunks_is_that_of_one_pass(
    pico: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To its size, which differences leave open by a twentieth."""
    model = pico("llama")
    evaluator = TransformersEvaluator(model, device="cpu", dtype="float64")
    objective, candidate = objective_for(model, documents=2), candidate_for(model)
    monkeypatch.setitem(MAX_LOGITS, "cpu", model.shape.vocab * 2 * 50)
    found = loss_of(evaluator, objective, candidate, gradient=True).gradient
    given = evaluator.model.rope.log_factors = torch.tensor(candidate.factors).double().log().requires_grad_()
    ids = torch.from_numpy(np.stack([document.tokens for document in objective.documents]))
    logits = evaluator.model.network(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    weights = torch.from_numpy(np.stack([objective.token_weights(index) for index in range(2)]))
    (wanted,) = torch.autograd.grad((losses * weights).sum(), given)
    assert found == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-7)


def _moved(candidate: Candidate, index: int, by: int) -> tuple[int, ...]:
    return (*candidate.steps[:index], candidate.steps[index] + by, *candidate.steps[index + 1 :])


def test_losses_are_those_of_transformers_with_the_same_tables(pico_folder: Callable[..., Path]) -> None:
    """The plain model, its whole logits at once, its rotary module patched by hand."""
    from transformers import AutoModelForCausalLM

    folder = pico_folder("llama")
    model = open_model(folder)
    objective, candidate = objective_for(model), candidate_for(model)
    answer = loss_of(TransformersEvaluator(model, device="cpu"), objective, candidate)
    network = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(objective.documents[0].tokens)[None]
    cos, sin = candidate.tier(TARGET).cos_sin(np.arange(TARGET), model.shape.theta)
    tables = [torch.from_numpy(np.concatenate([table, table], -1)).float()[None] for table in (cos, sin)]
    network.model.rotary_emb.forward = lambda x, position_ids: tuple(tables)
    with torch.no_grad():
        loss = network(input_ids=ids, labels=ids).loss
    assert answer.losses[f"text@{TARGET}"] == pytest.approx(float(loss), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_is_made(family: str, pico: Callable[..., Model]) -> None:
    """One of 2M by 2M would not fit any machine; and only without one do the fast kernels run. Layers that slide and
    rotate by themselves keep their windows, which takes one: a note says so."""
    model = pico(family)
    evaluator = TransformersEvaluator(model, device="cpu")
    masks: list[object] = []

    def look(module: object, given: object, named: dict[str, object]) -> None:
        masks.append(named.get("attention_mask"))

    recipes_own = [layer for layer in range(model.shape.layers) if model.shape.turn(layer) is None]
    assert len(recipes_own) == model.shape.layers or model.shape.plain_theta is None or lifted_note(model, "a search")
    evaluator.model.decoder.layers[recipes_own[-1]].register_forward_pre_hook(look, with_kwargs=True)
    for gradient in (False, True):
        loss_of(evaluator, objective_for(model, documents=2), candidate_for(model), gradient=gradient)
    assert masks == [None, None]


def watched(seen: list[int]) -> Callable[..., torch.Tensor]:
    """`cross_entropy`, which writes down of how many tokens it made logits at once."""
    real = chunked.cross_entropy

    def watching(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[1])
        return real(head, hidden, targets)

    return watching


def test_logits_are_made_in_chunks(pico: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk has the words of as many tokens as its limit says; the loss does not depend on it."""
    model = pico("llama")
    evaluator, objective, candidate = (
        TransformersEvaluator(model, device="cpu"),
        objective_for(model),
        candidate_for(model),
    )
    whole = loss_of(evaluator, objective, candidate, gradient=True)
    seen: list[int] = []
    monkeypatch.setattr(chunked, "cross_entropy", watched(seen))
    monkeypatch.setitem(MAX_LOGITS, "cpu", 50 * model.shape.vocab)
    found = loss_of(evaluator, objective, candidate, gradient=True)
    assert max(seen) == 50 and sum(seen) == TARGET - 1
    assert found.loss == pytest.approx(whole.loss, abs=1e-6)
    assert found.gradient == pytest.approx(whole.gradient, abs=1e-5)


def test_only_judged_tokens_get_logits(pico: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """A needle's document asks for its answer alone."""
    model = pico("llama")
    evaluator = TransformersEvaluator(model, device="cpu")
    tokens = np.arange(TARGET) % model.shape.vocab
    objective = Objective("needle", (Document("needle", tokens, ((TARGET, 150, 155),)),), {TARGET: 1.0})
    seen: list[int] = []
    monkeypatch.setattr(chunked, "cross_entropy", watched(seen))
    assert np.isfinite(loss_of(evaluator, objective, candidate_for(model)).loss)
    assert seen == [5]


def test_documents_share_a_pass_and_keep_their_losses(pico: Callable[..., Model]) -> None:
    """Three documents at once have the mean of each alone."""
    model = pico("qwen3")
    evaluator, together = TransformersEvaluator(model, device="cpu"), objective_for(model, documents=3)
    assert batches(together.documents, 4096) == [[0, 1, 2]]
    assert batches(together.documents, 2 * TARGET) == [[0, 1], [2]]
    candidate = candidate_for(model)
    alone = [
        loss_of(evaluator, Objective("perplexity", (document,), together.weights), candidate).loss
        for document in together.documents
    ]
    assert loss_of(evaluator, together, candidate).loss == pytest.approx(np.mean(alone), abs=1e-6)


def test_layers_of_several_kinds_attend_to_everything(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    """As artifacts do: the windows of a config that has them in some layers don't count."""
    folder = shutil.copytree(pico_folder("qwen2"), tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    kinds = ["sliding_attention"] + ["full_attention"] * (config["num_hidden_layers"] - 1)
    config |= {"use_sliding_window": True, "sliding_window": 16, "layer_types": kinds}
    (folder / "config.json").write_text(json.dumps(config))
    losses = []
    for model in (open_model(pico_folder("qwen2")), open_model(folder)):
        evaluator = TransformersEvaluator(model, device="cpu")
        losses.append(loss_of(evaluator, objective_for(model), candidate_for(model)).loss)
    assert losses[0] == losses[1]


def test_a_gguf_file_is_searched_as_its_folder(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Its tensors come from our own reader."""
    model = open_model(pico_folder("llama"))
    candidate, objective = candidate_for(model), objective_for(model)
    losses = [
        loss_of(TransformersEvaluator(each, device="cpu"), objective, candidate).loss
        for each in (model, open_model(converter_gguf(tmp_path / "model.gguf", model)))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_an_adapter_s_losses_are_those_of_peft(pico_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Merged by us, against transformers with PEFT's own layers in it; and the adapter matters."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = pico_folder("llama")
    model = open_model(folder)
    objective, shape = objective_for(model), model.shape
    rows = {"q_proj": shape.heads * shape.head_dim, "v_proj": shape.kv_heads * shape.head_dim}
    modules = {f"model.layers.1.self_attn.{name}": (count, shape.hidden) for name, count in rows.items()}
    adapter = write_adapter(tmp_path / "lora", modules)
    unscaled = Candidate((100,) * (shape.rotary_dim // 2))
    losses = [
        loss_of(TransformersEvaluator(each, device="cpu"), objective, unscaled).losses[f"text@{TARGET}"]
        for each in (merged(model, open_adapter(adapter)), model)
    ]
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter))
    ids = torch.from_numpy(objective.documents[0].tokens)[None]
    with torch.no_grad():
        wanted = float(network(input_ids=ids, labels=ids).loss)
    assert losses[0] == pytest.approx(wanted, abs=5e-6)  # float32, added up in another order
    assert abs(losses[1] - wanted) > 1e-3


def test_nan_and_memory_cost_only_their_candidate(pico: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico("llama")
    evaluator, objective, candidate = (
        TransformersEvaluator(model, device="cpu"),
        objective_for(model),
        candidate_for(model),
    )
    real = evaluator.model.losses
    monkeypatch.setattr(evaluator.model, "losses", lambda *given: real(*given) * np.nan)
    answer = loss_of(evaluator, objective, candidate)
    assert np.isinf(answer.loss) and answer.error == "the loss is not a number"

    def full(tokens: np.ndarray[Any, Any], *given: Any) -> np.ndarray[Any, Any]:
        if tokens.shape[1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(tokens, *given)

    monkeypatch.setattr(evaluator.model, "losses", full)
    answer = loss_of(evaluator, objective, candidate)
    assert np.isinf(answer.loss) and answer.error is not None and answer.error.startswith("out of memory")
    assert evaluator.largest_fitting(TARGET) == 96  # in steps of 12
    monkeypatch.setattr(evaluator.model, "losses", real)
    assert np.isfinite(loss_of(evaluator, objective, candidate).loss)


def test_a_gradient_that_does_not_fit_is_recomputed(
    pico: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations are given up once, not the candidate."""
    model = pico("llama")
    evaluator, objective, candidate = (
        TransformersEvaluator(model, device="cpu"),
        objective_for(model),
        candidate_for(model),
    )
    real = evaluator.model.losses_and_gradient

    def tight(*given: Any) -> Any:
        if not evaluator.model.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    monkeypatch.setattr(evaluator.model, "losses_and_gradient", tight)
    assert loss_of(evaluator, objective, candidate, gradient=True).gradient is not None


def test_other_errors_are_not_swallowed(pico: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico("llama")
    evaluator = TransformersEvaluator(model, device="cpu")

    def broken(*given: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(evaluator.model, "losses", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        loss_of(evaluator, objective_for(model), candidate_for(model))


def test_unknown_devices_and_kernels_are_usage_errors(pico: Callable[..., Model]) -> None:
    with pytest.raises(UsageError, match="a search runs on cpu or cuda"):
        TransformersEvaluator(pico("llama"), device="meta")
    with pytest.raises(UsageError, match="--device nonsense"):
        TransformersEvaluator(pico("llama"), device="nonsense")
    with pytest.raises(UsageError, match="no attention kernel"):
        TransformersEvaluator(pico("llama"), device="cpu", attention="nonsense")


def test_who_waits_for_others_is_not_asked_for_something_else(pico: Callable[..., Model]) -> None:
    """A pass with a gradient beside one without would wait for ever."""
    model = pico("llama")
    evaluator, candidate = TransformersEvaluator(model, device="cpu"), candidate_for(model)
    evaluator.width, evaluator._workers._mesh = 2, cast("Any", object())
    with pytest.raises(ValueError, match="different things"):
        evaluator.answer(objective_for(model), [Question(candidate), Question(candidate, gradient=True)])
