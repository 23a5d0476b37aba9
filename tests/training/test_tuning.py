# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: what it computes, what it learns, what it leaves, and how it goes on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.extending import any_text, encode, key_maker, prose, scaled, write_wordy
from support.pico import FAMILIES
from support.trained import log_of

from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.adapter import merged, open_adapter
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.training import tuning as module
from lrconvert.training.loaded import LoadedModel
from lrconvert.training.rows import RowOptions, make_row
from lrconvert.training.tuning import StepResult, StepRows, TuneOptions, Tuning, load_trainable

TEXT = any_text(2000)
WINDOW = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(write_wordy(tmp_path_factory.mktemp("models") / "wordy"))


def options(**changes: Any) -> TuneOptions:
    return TuneOptions(**{"steps": 4, "rank": 4, "warmup": 2, "rate": 1e-2, **changes})


def any_rows(model: Model, count: int = 3, length: int = 48, keys: int = 0) -> Callable[[int], StepRows]:
    """Other rows in every step, with jumps."""
    tier, made = scaled(model, WINDOW), RowOptions(length, WINDOW, (1, 2), keys)

    def rows_of(step: int) -> StepRows:
        seeds = [np.random.default_rng([step, index]) for index in range(count)]
        return StepRows(tier, tuple(make_row([TEXT], made, key_maker() if keys else None, rng) for rng in seeds))

    return rows_of


class Stop(Exception):
    """An interruption."""


def tune(
    model: Model,
    given: TuneOptions,
    folder: Path,
    rows_of: Callable[[int], StepRows] | None = None,
    *,
    stop: int | None = None,
    adapter: Path | None = None,
    dtype: str = "float32",
) -> tuple[LoadedModel, list[StepResult], Path]:
    """The model after training, the steps of this run, and the adapter. `stop`: interrupted after that step."""
    loaded, trainable = load_trainable(model, given, adapter, base="base", device="cpu", dtype=dtype)
    seen: list[StepResult] = []

    def watch(result: StepResult) -> None:
        seen.append(result)
        if result.step == stop:
            raise Stop

    Tuning(loaded, given, rows_of or any_rows(model), folder, every=0).run(watch)
    trainable.save(loaded, folder / "adapter")
    return loaded, seen, folder / "adapter"


# --- a step ------------------------------------------------------------------------------------------------


def test_a_step_is_the_mean_of_its_losses_under_its_rotation(model: Model, tmp_path: Path) -> None:
    """Text and answers apart, at the rows' own positions, over all rows and however they share forward passes; the
    norm is that of the gradient of text + weight · answers."""
    given = options(steps=1, answer_weight=0.7)
    step = any_rows(model, 3, 240, keys=2)(0)
    loaded, _ = load_trainable(model, given, device="cpu", dtype="float32")
    loaded.rotation = step.rotation
    losses = [loaded.losses(row.tokens[None], at=row.positions[None])[0] for row in step.rows]
    text = np.concatenate([found[row.text] for found, row in zip(losses, step.rows, strict=True)]).mean()
    answers = np.concatenate([found[row.answers] for found, row in zip(losses, step.rows, strict=True)]).mean()
    norm = naive_norm(loaded, step, 0.7)
    for name, most in (("together", 4096), ("alone", 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(module.FORWARD_TOKENS, "cpu", most)
            _, (result,), _ = tune(model, given, tmp_path / name, lambda _: step)
        assert (result.text, result.answers) == pytest.approx((text, answers), rel=1e-5), name
        assert result.gradient_norm == pytest.approx(norm, rel=1e-4), name
        assert (result.tokens, result.kind) == (720, "long")


def naive_norm(loaded: LoadedModel, step: StepRows, answer_weight: float) -> float:
    """Of the gradient, from the logits of transformers' own forward pass, and autograd through all of it. Without the
    mask transformers would take positions that jump for packed documents."""
    counts = [sum(int(mask.sum()) for mask in masks) for masks in module._masks(step.rows)]
    total = torch.zeros(())
    for row in step.rows:
        ids, at = torch.from_numpy(row.tokens[None]), torch.from_numpy(row.positions[None])
        given = {"input_ids": ids, "position_ids": at, "attention_mask": torch.ones_like(ids)}
        logits = loaded.network(**given, use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        for mask, count, weight in zip((row.text, row.answers), counts, (1.0, answer_weight), strict=True):
            total = total + weight * losses[torch.from_numpy(mask)].sum() / count
    gradients = torch.autograd.grad(total, loaded.trainable)
    return float(sum(gradient.square().sum() for gradient in gradients).sqrt())  # type: ignore[union-attr]


def test_large_gradients_are_cut(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimizer sees is no longer than the largest norm; the log has what was found."""
    monkeypatch.setattr(module, "LARGEST_NORM", 0.01)
    given = options(steps=1)
    loaded, _ = load_trainable(model, given, device="cpu", dtype="float32")
    tuning = Tuning(loaded, given, any_rows(model), tmp_path)
    seen: list[StepResult] = []
    tuning.run(seen.append)
    cut = [master.grad.square().sum() for master in tuning._masters if master.grad is not None]
    assert float(sum(cut)) ** 0.5 == pytest.approx(0.01, rel=1e-4) and seen[0].gradient_norm > 0.1


def test_rates_rise_then_fall() -> None:
    given = TuneOptions(steps=100, warmup=10, final=0.1)
    shares = [given.share(step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and shares[4] == pytest.approx(0.5, abs=0.01)
    assert max(shares) == pytest.approx(shares[9]) and shares[9] > 0.97
    assert shares[10:] == sorted(shares[10:], reverse=True) and shares[-1] == pytest.approx(0.1, abs=0.01)


def test_with_less_memory_it_computes_the_same(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that runs out of memory is made again with activations recomputed, and so are all later ones. What the
    pass that failed had added to the gradients does not count."""
    _, wanted, _ = tune(model, options(), tmp_path / "whole")
    real, refused = LoadedModel.backward, []

    def short(self: LoadedModel, *given: Any) -> Any:
        if not self.recompute:
            refused.append(1)
            for weight in self.trainable:
                weight.grad = torch.full_like(weight, 1e3)
            raise RuntimeError("CUDA out of memory")
        return real(self, *given)

    monkeypatch.setattr(LoadedModel, "backward", short)
    loaded, found, _ = tune(model, options(), tmp_path / "short")
    assert loaded.recompute and len(refused) == 1
    assert [step.text for step in found] == pytest.approx([step.text for step in wanted], rel=1e-5)
    assert [step.gradient_norm for step in found] == pytest.approx([step.gradient_norm for step in wanted], rel=1e-4)


def test_a_loss_that_is_no_number_ends_it(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step [12]: the loss is not a number\. Use a smaller learning rate"):
        tune(model, options(rate=1e30, norm_rate=1e30, warmup=0), tmp_path)


# --- what it learns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_tiny_text_is_learnt(method: Any, model: Model, tmp_path: Path) -> None:
    """Twenty steps on one row of words; what is frozen does not move."""
    text = np.asarray(encode(prose(200)))
    row = make_row([text], RowOptions(128, WINDOW, (1, 1)), None, np.random.default_rng(0))
    rows = StepRows(scaled(model, WINDOW), (row,))
    loaded, steps, _ = tune(
        model, options(method=method, steps=20, rate=2e-2, norm_rate=1e-2), tmp_path, lambda _: rows
    )
    assert steps[-1].text < 0.6 * steps[0].text and steps[0].answers is None
    norms = [weight for weight in loaded.trainable if weight.ndim == 1]
    plain = [name for name in model.checkpoint.tensors if "norm" in name]
    assert len(norms) == len(plain)
    for name in plain:
        assert not any(np.array_equal(norm.detach().numpy(), model.checkpoint.read(name)) for norm in norms)
    embedding = loaded.network.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(embedding, model.checkpoint.read("model.embed_tokens.weight"))
    head = loaded.head.weight.detach().numpy()
    assert np.array_equal(head, model.checkpoint.read("lm_head.weight"))


def test_keys_are_learnt_by_their_weight(model: Model, tmp_path: Path) -> None:
    """The loss of answers falls where it counts, and hardly where it does not."""
    text = np.asarray(encode(prose(400)))
    row = make_row([text], RowOptions(240, WINDOW, (0, 0), 2), key_maker(), np.random.default_rng(0))
    rows = StepRows(scaled(model, WINDOW), (row,))
    falls = []
    for weight in (1.0, 0.0):
        given = options(steps=12, answer_weight=weight)
        _, steps, _ = tune(model, given, tmp_path / str(weight), lambda _: rows)
        assert steps[0].answers is not None and steps[-1].answers is not None
        falls.append(steps[0].answers - steps[-1].answers)
    assert falls[0] > 2.0 and falls[0] > falls[1] + 1.0


def test_small_steps_are_not_lost_in_bf16(model: Model, tmp_path: Path) -> None:
    """Each step is a tenth of bf16's last digit. The optimizer's own float32 weights add them up."""
    before = {name: model.checkpoint.read(name) for name in model.checkpoint.tensors if "q_proj" in name}

    def moved(steps: int) -> float:
        given = options(method="full", steps=steps, rate=2e-5, warmup=0, final=1.0)
        loaded, _, _ = tune(model, given, tmp_path / str(steps), any_rows(model, 1), dtype="bfloat16")
        weights = dict(loaded.network.named_parameters())
        changed = [
            weights[name].detach() != torch.from_numpy(values).to(torch.bfloat16) for name, values in before.items()
        ]
        return float(torch.cat([one.flatten() for one in changed]).float().mean())

    assert moved(24) > 4 * moved(1) > 0


# --- going on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    method: Any, dtype: str, model: Model, tmp_path: Path
) -> None:
    """Interrupted twice: the log and the weights are those of a run without a break, bit for bit, and no step that was
    saved is repeated."""
    given = options(method=method)
    whole, steps, adapter = tune(model, given, tmp_path / "whole", dtype=dtype)
    assert [step.step for step in steps] == [0, 1, 2, 3]
    for stop in (1, 2):
        with pytest.raises(Stop):
            tune(model, given, tmp_path / "broken", stop=stop, dtype=dtype)
    again, rest, other = tune(model, given, tmp_path / "broken", dtype=dtype)
    assert [step.step for step in rest] == [2, 3]  # the step that was interrupted had not been saved
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    for one, two in zip(whole.trainable, again.trainable, strict=True):
        assert torch.equal(one, two)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (adapter / file).read_bytes() == (other / file).read_bytes()
    _, none, _ = tune(model, given, tmp_path / "broken", dtype=dtype)
    assert none == []


def test_a_log_without_a_state_is_another_runs(model: Model, tmp_path: Path) -> None:
    """Killed before its first state, a run starts again, and so does its log."""
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n')
    tune(model, options(steps=1), tmp_path)
    assert [line["step"] for line in log_of(tmp_path)] == [0] and log_of(tmp_path)[0]["tokens"] == 144


def test_one_state_is_kept(model: Model, tmp_path: Path) -> None:
    """The newest: a state of full fine-tuning is three times the model."""
    tune(model, options(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4.state.safetensors", "adapter", "log.jsonl"]


# --- what it leaves ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # PEFT's own
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_adapter_is_what_was_trained(method: Any, family: str, tmp_path: Path) -> None:
    """Merged by our own reader it has the losses of the network in memory, in every family; PEFT loads it too. Its
    files name the model, and no path of this machine."""
    import peft

    folder = write_wordy(tmp_path / "base", family)
    model, tokens = open_model(folder), any_text(96)[None]
    given = options(method=method, steps=2)
    if method == "full" and model.shape.experts is not None:
        with pytest.raises(UnsupportedError, match="full fine-tuning of experts"):
            tune(model, given, tmp_path / "run")
        return
    loaded, _, adapter = tune(model, given, tmp_path / "run")
    wanted = loaded.losses(tokens)
    found = LoadedModel(merged(model, open_adapter(adapter)), device="cpu", dtype="float32")
    found.rotation = loaded.rotation
    np.testing.assert_allclose(found.losses(tokens), wanted, atol=1e-4)
    plain = LoadedModel(model, device="cpu", dtype="float32")
    plain.rotation = loaded.rotation
    assert np.abs(plain.losses(tokens) - wanted).max() > 1e-2
    peft.PeftModel.from_pretrained(plain.network, str(adapter))
    np.testing.assert_allclose(plain.losses(tokens), wanted, atol=1e-4)
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert len({path.stat().st_mode for path in adapter.iterdir()}) == 1  # others may read the weights too
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert str(tmp_path) not in (adapter / "adapter_config.json").read_text()


@pytest.mark.parametrize(("first", "second"), [("lora", "lora"), ("full", "full"), ("lora", "full")])
def test_a_second_run_starts_where_the_first_one_ended(first: Any, second: Any, model: Model, tmp_path: Path) -> None:
    """The adapter goes on training; full fine-tuning starts from a model with it merged, and leaves all of both."""
    tokens = any_text(96)[None]
    before, _, adapter = tune(model, options(method=first, steps=2), tmp_path / "first")
    loaded, _ = load_trainable(model, options(method=second), adapter, device="cpu", dtype="float32")
    loaded.rotation = before.rotation
    np.testing.assert_allclose(loaded.losses(tokens), before.losses(tokens), atol=1e-4)
    after, _, left = tune(model, options(method=second, steps=1), tmp_path / "second", adapter=adapter)
    found = LoadedModel(merged(model, open_adapter(left)), device="cpu", dtype="float32")
    found.rotation = after.rotation
    np.testing.assert_allclose(found.losses(tokens), after.losses(tokens), atol=1e-4)
    assert np.abs(after.losses(tokens) - before.losses(tokens)).max() > 1e-3


def test_the_seed_makes_the_adapter(model: Model) -> None:
    """The first one too, whatever was drawn before it."""
    first = []
    for seed in (0, 0, 1):
        loaded, _ = load_trainable(model, options(seed=seed), device="cpu", dtype="float32")
        first.append(torch.cat([weight.detach().flatten() for weight in loaded.trainable]))
        torch.rand(1)
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_only_the_chosen_projections_train(family: str, tmp_path: Path) -> None:
    """Of fewer projections fewer pairs, always with the norms. Phi-3's fused projection holds queries and keys."""
    model = open_model(write_wordy(tmp_path / "model", family))
    fused = family == "phi3"
    wanted = {"turned": {"qkv_proj"} if fused else {"q_proj", "k_proj"}}
    wanted["attention"] = wanted["turned"] | ({"o_proj"} if fused else {"v_proj", "o_proj"})
    wanted["all"] = wanted["attention"] | {"down_proj"} | ({"gate_up_proj"} if fused else {"gate_proj", "up_proj"})
    for projections, names in wanted.items():
        loaded, _ = load_trainable(model, options(projections=projections), device="cpu", dtype="float32")
        trained = {name for name, weight in loaded.network.named_parameters() if weight.requires_grad}
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name} == names
        assert any("norm" in name for name in trained) and not any("embed" in name for name in trained)


def test_an_adapter_of_another_rank_is_refused(model: Model, tmp_path: Path) -> None:
    _, _, adapter = tune(model, options(steps=1), tmp_path / "first")
    with pytest.raises(InputError, match=r"adapter has rank 4, not 8"):
        load_trainable(model, options(rank=8), adapter, device="cpu", dtype="float32")
