# SPDX-License-Identifier: Apache-2.0
"""What `generate` computed at each step, against a fresh full forward pass of the same length."""

from __future__ import annotations

from typing import Any


def step_errors(model: Any, prompt: Any, new_tokens: int, **options: Any) -> list[float]:
    """Largest logit difference at every step of a greedy `generate` from the pass without a cache."""
    import torch

    with torch.inference_mode():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
            **options,
        )
        errors = []
        for step, logits in enumerate(out.logits):
            sequence = out.sequences[:, : prompt.shape[1] + step]
            fresh = model(sequence, use_cache=False).logits[:, -1]
            errors.append((fresh.float() - logits.to(fresh.device).float()).abs().max().item())
    return errors
