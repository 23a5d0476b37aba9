# SPDX-License-Identifier: Apache-2.0
"""The modeling file that ships in Hugging Face artifacts, loaded as a user loads it: a forward pass.

Everything is compared with `Oracle`. Bounds are stated beside a known mistake that exceeds them (see BOUND). `generate`
is in test_modeling_generate.py, loops written by hand in test_modeling_loops.py.
"""

import copy
from pathlib import Path

import pytest
from support.cases import case
from support.modeling import (
    BASE,
    BOUND,
    FAMILIES,
    NATIVE_BOUND,
    DynamicCache,
    NaiveRope,
    Oracle,
    artifact,
    far,
    load,
    load_native,
    make_tiers,
    native_attention_factor,
    padded,
    tokens,
    torch,
    workshop,
    write_artifact,
)

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
every_family = pytest.mark.parametrize("family", FAMILIES)


# ---- a forward pass


@every_family
def test_a_forward_pass_uses_the_tier_of_its_length(family):
    """At both sides of every boundary, with start tokens and without."""
    for start_tokens in (0, 4):
        _, oracle, model = artifact(family, start_tokens)
        for n in (1, 5, 63, 64, 65, 79, 80, 81, 200, 256):
            ids = tokens(n)
            with torch.no_grad():
                assert far(model(ids[None]).logits[0], oracle.logits(ids)) <= BOUND, (start_tokens, n)


@every_family
def test_the_bounds_see_a_wrong_tier(family):
    """Control: the neighbouring tier, and dropped start tokens, are far outside both bounds."""
    _, oracle, _ = artifact(family)
    _, other, _ = artifact(family, 0)
    ids = tokens(81)
    assert far(oracle.logits(ids[:64]), oracle.logits(ids[:64], tier=1)) > 100 * NATIVE_BOUND
    assert far(oracle.logits(ids[:65]), oracle.logits(ids[:65], tier=0)) > 100 * NATIVE_BOUND
    assert far(oracle.logits(ids), oracle.logits(ids, tier=1)) > 100 * NATIVE_BOUND
    assert far(oracle.logits(ids), other.logits(ids)) > 100 * NATIVE_BOUND


@every_family
def test_custom_and_native_code_agree_where_both_can_express_the_recipe(family):
    """Two tiers and one attention factor; lists of factors and code mean the same."""
    windows = (64, 256)
    scale = native_attention_factor(windows)
    tiers = make_tiers(family, windows=windows, attention_factor=scale)
    folder = write_artifact(Path(workshop().name) / f"{family}_two_tiers", family, tiers)
    model, native = load(folder), load_native(folder)
    assert type(native).__name__ == FAMILIES[family]
    for n in (1, 63, 64, 65, 200, 256):
        with torch.no_grad():
            ids = tokens(n)[None]
            assert far(model(ids).logits, native(ids).logits) <= NATIVE_BOUND


@every_family
def test_each_row_of_a_batch_has_its_own_tier(family):
    """Padded on the left, rows on both sides of two boundaries."""
    _, oracle, model = artifact(family)
    lengths = (40, 64, 65, 80, 100)
    ids, mask = padded(lengths)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, n in enumerate(lengths):
        assert far(got[row, -n:], oracle.logits(tokens(n, seed=n))) <= BOUND


def test_beyond_the_last_tier_the_last_one_is_used():
    """A sequence longer than the window is no error."""
    _, oracle, model = artifact("llama")
    ids = tokens(270)
    with torch.no_grad():
        assert far(model(ids[None]).logits[0], oracle.logits(ids)) <= BOUND


@every_family
def test_optional_inputs_change_nothing(family):
    """No mask, a 2D and a 4D mask, given positions, inputs_embeds, no cache: one answer."""
    _, oracle, model = artifact(family)
    ids = tokens(70)[None]
    want = oracle.logits(ids[0])
    causal = torch.full((1, 1, 70, 70), torch.finfo(torch.float32).min).triu(1)
    embeds = model.get_input_embeddings()(ids)
    for kwargs in (
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": ids, "attention_mask": causal},
        {"input_ids": ids, "position_ids": torch.arange(70)[None]},
        {"input_ids": ids, "use_cache": False},
        {"input_ids": ids, "past_key_values": DynamicCache()},
        {"inputs_embeds": embeds},
    ):
        with torch.no_grad():
            assert far(model(**kwargs).logits[0], want) <= BOUND, list(kwargs)
    with torch.no_grad():  # positional, on the inner model
        assert far(model.lm_head(model.model(ids).last_hidden_state)[0], want) <= BOUND


# ---- precision and life cycle


@pytest.mark.parametrize("how", ["load", "to"])
def test_bfloat16_rounds_cos_and_sin_only(how):
    """Native code after .to(bfloat16) in transformers 5 is off by 1e-1 at position 200."""
    folder, oracle, _ = artifact("llama")
    model = load(folder, dtype=torch.bfloat16 if how == "load" else torch.float32)
    model = model.to(torch.bfloat16)
    positions = torch.arange(250)[None]
    naive = NaiveRope(oracle.dim, oracle.tiers[2])
    want = naive(torch.zeros(1, dtype=torch.float64), positions)
    got = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16
        assert far(g.double(), w.to(torch.bfloat16).double()) == 0
    got = model.model.rotary_emb(torch.zeros(1), positions + 2_000_000)
    want = naive(torch.zeros(1, dtype=torch.float64), positions + 2_000_000)
    for g, w in zip(got, want, strict=True):
        assert far(g.double(), w) < 1e-6


def test_the_module_adds_no_weights_and_survives_copies(tmp_path):
    """A copy is right by itself, and knows for itself which tier its cache is of."""
    folder, oracle, _ = artifact("llama")
    model, native = load(folder), load_native(folder)
    assert list(model.state_dict()) == list(native.state_dict())
    assert not list(model.model.rotary_emb.buffers())
    ids = tokens(70)
    torch.save(model, tmp_path / "whole.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        with torch.no_grad():
            assert far(twin(ids[None]).logits[0], oracle.logits(ids)) <= BOUND
        assert twin.model.rotary_emb is not model.model.rotary_emb
        out = twin(ids[None, :64], use_cache=True)
        with pytest.raises(ValueError, match="cannot be rotated again"):
            twin(ids[None, 64:], past_key_values=out.past_key_values)


def test_save_pretrained_of_the_custom_model_loads_again(tmp_path):
    """With its code and its tiers."""
    folder, oracle, _ = artifact("phi3")
    load(folder).save_pretrained(tmp_path / "saved")
    twin, ids = load(tmp_path / "saved"), tokens(130)
    with torch.no_grad():
        assert far(twin(ids[None]).logits[0], oracle.logits(ids)) <= BOUND


@pytest.mark.parametrize("checkpointing", [False, True])
@every_family
def test_a_training_step_works(family, checkpointing):
    """The loss is that of the oracle, and every weight gets a gradient."""
    folder, oracle, _ = artifact(family)
    model = load(folder)
    ids = tokens(70)[None]
    with torch.inference_mode():  # tables made here must not poison autograd (inductor saves them)
        model(ids)
    tables = model.model.rotary_emb._tables_on(torch.device("cpu"))
    assert not any(table.is_inference() for table in tables)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss = model(ids, labels=ids).loss
    loss.backward()
    want = torch.nn.functional.cross_entropy(oracle.logits(ids[0])[:-1], ids[0, 1:])
    assert far(loss.detach(), want) < 1e-3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_gives_the_same_logits(backend):
    """In every tier, with lengths that change. One layer: all are traced alike, and tracing takes seconds."""
    tiers = make_tiers("llama")
    folder = write_artifact(Path(workshop().name) / "one_layer", "llama", tiers, num_hidden_layers=1)
    oracle, model = Oracle(folder, "llama", tiers), load(folder)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for n in (60, 70, 140):
        ids = tokens(n)
        with torch.no_grad():
            assert far(compiled(ids[None], use_cache=False).logits[0], oracle.logits(ids)) <= BOUND


def test_the_rotary_forward_traces_without_a_graph_break():
    """And gives the numbers of its tier."""
    _, oracle, model = artifact("llama")
    torch._dynamo.reset()
    rope = torch.compile(copy.deepcopy(model.model.rotary_emb), backend="eager", fullgraph=True)
    for n in (60, 70, 140):
        positions = torch.arange(n)[None]
        want = NaiveRope(oracle.dim, oracle.tiers[(n > 64) + (n > 80)])(torch.zeros(1), positions)
        for g, w in zip(rope(torch.zeros(1), positions), want, strict=True):
            assert far(g, w) <= 1e-6


# ---- what is refused


def longrope_with(**changes):
    tiers = make_tiers("llama")
    tiers[1] |= changes.pop("tier", {})
    key = {"version": 1, "rope_theta": BASE, "rotary_dim": 16, "switch": "reprefill", "tiers": tiers}
    return {"longrope": key | changes}


GARBLED = [
    ({"longrope": None}, "longrope is missing"),
    ({"longrope": [1]}, "longrope is not an object"),
    (longrope_with(version=2), "of version 2"),
    (longrope_with(version=None), "of version None"),
    (longrope_with(tiers=[]), "tiers is .*at least one"),
    (longrope_with(tiers=[3]), "tiers is .*at least one"),
    (longrope_with(rotary_dim=8), "rotary_dim is 8, needed: 16"),
    (longrope_with(rope_theta="1e4"), "rope_theta is '1e4'"),
    (longrope_with(switch="sometimes"), "switch is 'sometimes'.*'upfront'"),
    (longrope_with(tier={"factors": [1.0] * 7}), r"tiers\[1\].factors.*8 numbers"),
    (longrope_with(tier={"factors": [1.0] * 7 + [0.0]}), r"tiers\[1\].factors"),
    (longrope_with(tier={"factors": [1.0] * 7 + [float("nan")]}), r"tiers\[1\].factors"),
    (longrope_with(tier={"max_length": 64}), r"tiers\[1\].max_length is 64.*above 64"),
    (longrope_with(tier={"start_tokens": -1}), r"tiers\[1\].start_tokens is -1"),
    (longrope_with(tier={"attention_factor": None}), r"tiers\[1\].attention_factor is None"),
    (
        longrope_with(rotary_dim=8, tier={"start_tokens": "4"}),
        r"rotary_dim.*; tiers\[1\].start_tokens",
    ),
]


def test_a_garbled_key_is_refused_by_name(tmp_path):
    """What is wrong in config.json is named, all of it at once."""
    for number, (changes, words) in enumerate(GARBLED):
        folder = write_artifact(tmp_path / f"garbled{number}", "llama", make_tiers("llama"), **changes)
        named = r"config\.json: longrope.*" + words.removeprefix("longrope")
        with case(words), pytest.raises(ValueError, match=named):
            load(folder)
