# SPDX-License-Identifier: Apache-2.0
"""Loops written by hand around the modeling file of Hugging Face artifacts: right within a tier, refused beyond it,
since old keys cannot be rotated again.
"""

import pytest
from support.cases import case
from support.modeling import (
    BOUND,
    FAMILIES,
    VERSION,
    DynamicCache,
    StaticCache,
    artifact,
    far,
    loop,
    padded,
    some_cache,
    tokens,
    torch,
)

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_a_loop_within_a_tier_equals_a_full_forward_and_beyond_it_raises(family):
    """With every kind of cache, from prompts below, at and beyond a boundary."""
    _, oracle, model = artifact(family)
    ids = tokens(200)
    for kind in ("dynamic", "static", "made by the model"):
        for first, bound in ((50, 64), (70, 80), (64, 64)):
            with case(kind, first):
                got, kept = loop(model, ids, some_cache(model, kind), first, bound - first)
                assert far(got, oracle.logits(ids[:bound])) <= BOUND
                with pytest.raises(ValueError, match=f"sequence of {bound + 1} needs"), torch.no_grad():
                    model(ids[None, bound : bound + 1], past_key_values=kept)


def test_a_loop_over_padded_rows_stops_at_the_first_row_that_crosses():
    """Until then both rows are right."""
    _, oracle, model = artifact("llama")
    ids, mask = padded((58, 20))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    new = tokens(10, seed=5, rows=2)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        for step in range(7):
            mask = torch.cat((mask, mask.new_ones(2, 1)), 1)
            kwargs = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
            kwargs["past_key_values"] = out.past_key_values
            if step == 6:
                with pytest.raises(ValueError, match="cannot be rotated again"):
                    model(new[:, step : step + 1], **kwargs)
                break
            out = model(new[:, step : step + 1], **kwargs)
    for row, n in enumerate((58, 20)):
        whole = torch.cat((tokens(n, seed=n), new[row, :6]))
        assert far(out.logits[row, -1], oracle.logits(whole)[-1]) <= BOUND


@pytest.mark.parametrize("tagged", [True, False])
def test_a_chunk_across_a_boundary_raises_also_without_a_tag(tagged):
    """A cache that others rebuilt has lost the tag; its length still tells."""
    _, _, model = artifact("llama")
    ids = tokens(140)
    for first in (50, 64, 70):
        with torch.no_grad():
            kept = model(ids[None, :first], past_key_values=DynamicCache()).past_key_values
            assert hasattr(kept, "longrope_tag")
            if not tagged:
                del kept.longrope_tag
            with pytest.raises(ValueError, match="cannot be rotated again"):
                model(ids[None, first:], past_key_values=kept)


def test_a_cropped_cache_of_a_longer_tier_raises():
    """Where what is left, with the next token, belongs in a shorter one."""
    _, _, model = artifact("llama")
    ids = tokens(80)
    for kind in ("dynamic", "made by the model"):
        for left, fine in ((70, True), (64, True), (63, False), (30, False)):
            with case(kind, left), torch.no_grad():
                kept = some_cache(model, kind)
                kept = model(ids[None], past_key_values=kept, use_cache=True).past_key_values
                kept.crop(left if VERSION == 4 else left - 80)
                if fine:
                    model(ids[None, left : left + 1], past_key_values=kept)
                else:
                    with pytest.raises(ValueError, match="cannot be rotated again"):
                        model(ids[None, left : left + 1], past_key_values=kept)


def test_a_static_cache_that_was_reset_can_be_used_again():
    """In another tier than before, longer or shorter."""
    _, oracle, model = artifact("llama")
    kept = StaticCache(config=model.config, max_cache_len=256)
    ids = tokens(100)
    for first in (70, 1, 50, 100):
        got, _ = loop(model, ids, kept, first, 0 if first > 64 else 64 - first)
        assert far(got, oracle.logits(ids[: max(first, 64)])) <= BOUND
        kept.reset()


def test_a_cache_that_was_reset_forgets_its_tag():
    """The second batch is padded: its short row leaves its tier before the first batch would."""
    _, _, model = artifact("llama")
    kept = StaticCache(config=model.config, max_cache_len=256)
    ids, mask = padded((66, 54))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(tokens(66, rows=2), past_key_values=kept)
        kept.reset()
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=kept)
        for new, fine in ((10, True), (1, False)):
            mask = torch.cat((mask, mask.new_ones(2, new)), 1)
            positions = (mask.cumsum(-1) - 1)[:, -new:]
            given = {"attention_mask": mask, "position_ids": positions, "past_key_values": kept}
            if fine:
                model(tokens(new, rows=2), **given)
            else:
                with pytest.raises(ValueError, match="cannot be rotated again"):
                    model(tokens(new, rows=2), **given)


def test_continuous_batching_is_refused():
    """Its cache says nothing of the lengths of its rows."""
    _, _, model = artifact("llama")
    with pytest.raises(ValueError, match="Continuous batching"):
        model.model(tokens(9)[None], cache=object())
