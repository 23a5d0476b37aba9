# SPDX-License-Identifier: Apache-2.0
"""`generate` with the modeling file of Hugging Face artifacts: every step is that of a full forward pass in the tier of
its length, whatever the cache.
"""

import copy
import sys
from pathlib import Path

import pytest
from support.modeling import (
    BOUND,
    CACHES,
    FAMILIES,
    VERSION,
    VOCABULARY,
    DynamicCache,
    Oracle,
    StaticCache,
    artifact,
    far,
    generate,
    load,
    load_native,
    make_tiers,
    oracle_steps,
    padded,
    tokens,
    torch,
    transformers,
    workshop,
    write_artifact,
)

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
every_family = pytest.mark.parametrize("family", FAMILIES)


# ---- tiers that follow the length


@every_family
def test_greedy_generate_equals_full_forwards_across_two_boundaries(family):
    """With every kind of cache: what was kept in a tier is read again in the next one."""
    _, oracle, model = artifact(family)
    for kind, extra in CACHES.items():
        out, logits = generate(model, tokens(60), **extra)
        assert out.sequences.shape == (1, 84), kind
        assert far(logits[0], oracle_steps(oracle, out.sequences[0], 60)) <= BOUND, kind


def test_the_oracle_for_all_lengths_equals_a_fresh_pass_at_each():
    """One pass a tier is enough for every length in it."""
    _, oracle, _ = artifact("llama")
    ids = tokens(90)
    fresh = torch.stack([oracle.logits(ids[:n])[-1] for n in range(55, 90)])
    assert far(fresh, oracle_steps(oracle, ids, 55)) <= BOUND


def test_native_cached_generate_is_wrong_across_the_boundary():
    """Control: the same comparison fails for native code with a cache."""
    folder, _, _ = artifact("llama")
    native = load_native(folder)
    out, logits = generate(native, tokens(60), 20)
    want = torch.stack([native(out.sequences[:, :n]).logits[0, -1] for n in range(60, 80)])
    assert far(logits[0, :5], want[:5]) < BOUND
    assert far(logits[0, 5:], want[5:]) > 100 * BOUND


def test_a_sliding_window_cache_can_be_refilled():
    """Mistral with a window keeps its keys in other cache layers."""
    tiers = make_tiers("mistral")
    folder = Path(workshop().name) / "mistral_sliding"
    write_artifact(folder, "mistral", tiers, sliding_window=70)  # less than the second boundary
    oracle, model = Oracle(folder, "mistral", tiers), load(folder)
    for kind, extra in CACHES.items():
        out, logits = generate(model, tokens(60), **extra)
        assert far(logits[0], oracle_steps(oracle, out.sequences[0], 60)) <= BOUND, kind


@every_family
def test_left_padded_rows_that_cross_at_different_steps_equal_the_rows_alone(family):
    """Each row has the tier of its own length at every step."""
    _, oracle, model = artifact(family)
    lengths = (60, 20, 50, 70)
    ids, mask = padded(lengths)
    for kind, extra in CACHES.items():
        out, logits = generate(model, ids, 22, attention_mask=mask, **extra)
        for row, n in enumerate(lengths):
            alone = out.sequences[row, max(lengths) - n :]
            assert far(logits[row], oracle_steps(oracle, alone, n)) <= BOUND, (kind, n)


@every_family
def test_beam_search_equals_beam_search_without_a_cache(family):
    """Beams that are reordered in a cache that is read again."""
    _, _, model = artifact(family)
    ids, mask = padded((60, 55))
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask, "output_scores": True}
    want, _ = generate(model, ids, 12, **kwargs, **CACHES["none"])
    for kind in ("dynamic", "static"):
        got, _ = generate(model, ids, 12, **kwargs, **CACHES[kind])
        assert torch.equal(got.sequences, want.sequences), kind
        assert far(got.sequences_scores, want.sequences_scores) < 1e-3, kind


@every_family
def test_sampling_with_a_seed_equals_sampling_without_a_cache(family):
    """The same tokens are drawn, three different rows of them, each step from the logits of a full pass."""
    _, oracle, model = artifact(family)
    kwargs = {"do_sample": True, "temperature": 3.0, "top_k": 0, "num_return_sequences": 3}
    runs = {}
    for kind, extra in CACHES.items():
        torch.manual_seed(11)
        runs[kind] = generate(model, tokens(60), 22, **kwargs, **extra)
    wanted = runs["none"][0].sequences
    assert len({tuple(row.tolist()) for row in wanted}) == 3
    for kind in ("dynamic", "static"):
        out, logits = runs[kind]
        assert torch.equal(out.sequences, wanted), kind
        for row in range(3):
            assert far(logits[row], oracle_steps(oracle, wanted[row], 60)) <= BOUND, (kind, row)


def test_prefill_in_chunks_uses_the_tier_of_the_whole_prompt():
    """And none stays behind for the next prompt, though the model keeps a static cache between calls."""
    _, oracle, model = artifact("llama")
    for kind in ("dynamic", "static"):
        for chunk in (32, 50):
            for prompt in (60, 64, 65, 80, 100):
                out, logits = generate(model, tokens(prompt), 6, **CACHES[kind], prefill_chunk_size=chunk)
                assert far(logits[0], oracle_steps(oracle, out.sequences[0], prompt)) <= BOUND, (kind, chunk, prompt)
            out, logits = generate(model, tokens(40), 10, **CACHES[kind])
            assert far(logits[0], oracle_steps(oracle, out.sequences[0], 40)) <= BOUND, (kind, chunk)


@every_family
def test_inputs_embeds_can_be_refilled(family):
    """Alone, and beside the ids that they are of."""
    _, oracle, model = artifact(family)
    ids = tokens(60)
    embeds = model.get_input_embeddings()(ids[None]).detach()
    for given, skip in ((None, 0), (ids[None], 60)):
        out, logits = generate(model, given, inputs_embeds=embeds)
        whole = torch.cat((ids, out.sequences[0, skip:]))
        assert far(logits[0], oracle_steps(oracle, whole, 60)) <= BOUND


@every_family
def test_generate_can_go_on_with_a_cache(family):
    """A chat: the caller's cache object is used for several turns that end in other tiers."""
    _, oracle, model = artifact(family)
    for kept in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=256)):
        ids = tokens(30)
        for turn, new in enumerate((10, 4, 10, 6)):
            ids = torch.cat((ids, tokens(12, seed=turn)))
            prompt = len(ids)
            mask = torch.ones(1, prompt, dtype=torch.long)  # a generated 0 is no padding
            out, logits = generate(model, ids, new, attention_mask=mask, past_key_values=kept)
            ids = out.sequences[0]
            assert far(logits[0], oracle_steps(oracle, ids, prompt)) <= BOUND, (type(kept).__name__, turn)
        assert len(ids) > 80


def test_a_prefix_cache_can_be_copied_for_several_prompts():
    """Prompts that end before, at and behind a boundary, from one cache."""
    _, oracle, model = artifact("llama")
    prefix = tokens(50)
    with torch.no_grad():
        filled = model(prefix[None], past_key_values=DynamicCache()).past_key_values
    for length in (4, 13, 14, 15, 90):
        ids = torch.cat((prefix, tokens(length, seed=length)))
        out, logits = generate(model, ids, 6, past_key_values=copy.deepcopy(filled))
        assert far(logits[0], oracle_steps(oracle, out.sequences[0], len(ids))) <= BOUND


def test_only_new_tokens_with_a_cache_are_refused_at_a_boundary():
    """The old ones are not at hand, to be read again."""
    _, _, model = artifact("llama")
    ids = tokens(70)
    with torch.no_grad():
        kept = model(ids[None, :50], past_key_values=DynamicCache()).past_key_values
    with pytest.raises(ValueError, match="cannot be rotated again"):
        mask = torch.ones(1, 70, dtype=torch.long)
        generate(model, ids[50:], 4, attention_mask=mask, past_key_values=kept)


def test_a_cropped_cache_is_refilled_in_the_shorter_tier():
    """Its keys are those of the longer one."""
    _, oracle, model = artifact("llama")
    ids = tokens(100)
    with torch.no_grad():
        kept = model(ids[None], past_key_values=DynamicCache()).past_key_values
    kept.crop(40 if VERSION == 4 else -60)
    out, logits = generate(model, ids[:50], 20, past_key_values=kept)
    assert far(logits[0], oracle_steps(oracle, out.sequences[0], 50)) <= BOUND


def test_a_refilled_chunk_is_not_taken_for_the_whole_prompt():
    """A kept cache of another tier, and a prompt in chunks: the old tokens are not at hand."""
    _, _, model = artifact("llama")
    ids = tokens(120)
    with torch.no_grad():
        kept = model(ids[None, :30], past_key_values=DynamicCache()).past_key_values
    if VERSION == 4:  # its chunks start at position 0 whatever the cache holds
        pytest.skip("transformers 4 cannot prefill in chunks with a cache that is not empty")
    with pytest.raises(ValueError, match="cannot be rotated again"):
        generate(model, ids, 4, past_key_values=kept, prefill_chunk_size=50)


@pytest.mark.parametrize("switch", ["reprefill", "upfront"])
def test_generate_with_a_compiled_step_refills_too(switch, monkeypatch):
    """A GPU with a static cache compiles each step, where the hooks do not look."""
    _, oracle, model = artifact("llama", switch=switch)
    code, emptied = sys.modules[type(model).__module__], []
    empty = code._empty
    monkeypatch.setattr(code, "_empty", lambda kept: (emptied.append(1), empty(kept)))
    torch._dynamo.reset()
    config = transformers.CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    extra = {"cache_implementation": "static", "compile_config": config}
    ids, mask = padded((60, 55))
    out, logits = generate(model, ids, 16, attention_mask=mask, **extra)
    tier = 1 if switch == "upfront" else None
    assert far(logits[0], oracle_steps(oracle, out.sequences[0], 60, tier)) <= BOUND
    assert far(logits[1], oracle_steps(oracle, out.sequences[1, 5:], 55, tier)) <= BOUND
    assert len(emptied) == (0 if switch == "upfront" else 2)  # once for each row that crosses
    ids = tokens(40)  # and what upfront fixed does not stay behind
    with torch.no_grad():
        assert far(model(ids[None]).logits[0], oracle.logits(ids)) <= BOUND


def test_beam_sampling_and_guidance_equal_those_without_a_cache():
    """Ways to generate that keep more than one cache, or draw from several beams."""
    _, _, model = artifact("llama")
    for kwargs in ({"num_beams": 3, "do_sample": True}, {"guidance_scale": 1.5}):
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            runs.append(generate(model, tokens(60), 20, use_cache=use_cache, **kwargs)[0].sequences)
        assert torch.equal(*runs), kwargs


def test_streamers_and_pipelines_get_the_same_tokens():
    """What is read again is not streamed again, and a pipeline's own arguments change nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0")
    _, _, model = artifact("llama")
    ids = tokens(60)
    want, _ = generate(model, ids, 24)
    streamed = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            streamed.extend(value.flatten().tolist())

        def end(self):
            pass

    generate(model, ids, 24, streamer=Streamer())
    assert streamed == want.sequences[0].tolist()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    got = pipe(tokenizer.decode(ids), max_new_tokens=24, do_sample=False, return_tensors=True)
    assert got[0]["generated_token_ids"] == want.sequences[0].tolist()


# ---- tiers fixed up front


@every_family
def test_upfront_takes_the_tier_of_prompt_and_budget(family):
    """From the first step on, for every row by itself."""
    _, oracle, model = artifact(family, switch="upfront")
    for kind in ("dynamic", "static"):
        for new, tier in ((4, 0), (5, 1), (21, 2)):
            out, logits = generate(model, tokens(60), new, **CACHES[kind])
            assert far(logits[0], oracle_steps(oracle, out.sequences[0], 60, tier)) <= BOUND, (kind, new)
        ids, mask = padded((60, 20))
        out, logits = generate(model, ids, 20, attention_mask=mask, **CACHES[kind])
        assert far(logits[0], oracle_steps(oracle, out.sequences[0], 60, 1)) <= BOUND, kind
        assert far(logits[1], oracle_steps(oracle, out.sequences[1, 40:], 20, 0)) <= BOUND, kind


def test_upfront_goes_on_with_a_cache_in_the_tier_of_the_new_budget():
    """The cache is read again where the new budget ends in another tier, and only there."""
    _, oracle, model = artifact("llama", switch="upfront")
    kept, ids = DynamicCache(config=model.config), tokens(30)
    for new, tier in ((10, 0), (30, 1), (6, 1), (10, 2)):
        prompt = len(ids)
        mask = torch.ones(1, prompt, dtype=torch.long)
        out, logits = generate(model, ids, new, attention_mask=mask, past_key_values=kept)
        ids = out.sequences[0]
        assert far(logits[0], oracle_steps(oracle, ids, prompt, tier)) <= BOUND


@pytest.mark.parametrize("switch", ["reprefill", "upfront"])
@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_decoding_fixes_the_tier_and_equals_greedy(how, switch):
    """Candidates are tried and dropped again, so the tier is that of the whole budget whatever the switch."""
    _, _, greedy = artifact("llama", switch="upfront")
    _, _, model = artifact("llama", switch=switch)
    _, _, assistant = artifact("llama", 0)
    extra: dict = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    extra["eos_token_id"] = VOCABULARY + 1  # never made; 4.57 looks candidates up among end tokens
    for seed in range(4):
        ids = tokens(12, seed=seed).repeat(5)
        want, logits = generate(greedy, ids, 24)
        got, other = generate(model, ids, 24, **extra)
        assert torch.equal(got.sequences, want.sequences)
        assert far(logits, other) < BOUND
