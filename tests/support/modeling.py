# SPDX-License-Identifier: Apache-2.0
"""Pico artifacts with the modeling file of Hugging Face folders, and an oracle for what it computes.

The oracle is the native class with cos and sin from numpy, for a tier that the test itself chooses. Tests that use this
also run on the oldest transformers, without the rest of the suite: nothing but pytest, torch, transformers and numpy is
needed.
"""

import json
import math
import os
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf-modules-"))

torch = pytest.importorskip("torch", reason="needs lrconvert[hf]")
transformers = pytest.importorskip("transformers", reason="needs lrconvert[hf]")
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache  # noqa: E402

import lrconvert  # noqa: E402

MODELING = Path(lrconvert.__file__).parent / "targets" / "hf" / "modeling_longrope.py"
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
VERSION = int(transformers.__version__.split(".")[0])
HEAD_DIM, VOCABULARY, BASE = 16, 101, 10000.0
# The middle tier is narrow: a generation that crosses both boundaries is short, and its cost is that of its steps.
WINDOWS = (64, 80, 256)
# fp32 rounding in logits of up to 45: 3e-4 was measured, in both transformers versions.
BOUND = 2e-3
# Native code makes its angles in fp32, and sharp attention amplifies that: 7e-3 was measured.
NATIVE_BOUND = 2e-2
# The mildest mistake, dropped start tokens, moves logits by 12 (test_the_bounds_see_a_wrong_tier).

torch.set_num_threads(1)

# ---- pico artifacts


def rotary_dim(family):
    return HEAD_DIM // 2 if family == "phi3" else HEAD_DIM


def make_tiers(family, start_tokens=0, windows=WINDOWS, attention_factor=None):
    """Factors that differ clearly between tiers and rise with the frequency index."""
    index = np.linspace(0, 1, rotary_dim(family) // 2)
    tiers = []
    for k, window in enumerate(windows):
        scale = window / windows[0]
        factors = (1 + 0.02 * k) * (1.1 * scale) ** index + 0.01 * k
        tiers.append(
            {
                "max_length": window,
                "factors": [float(f) for f in factors],
                "start_tokens": start_tokens * min(k, 1),
                "attention_factor": attention_factor or 1.0 + 0.1 * k,
            }
        )
    return tiers


def native_attention_factor(windows):
    """What phi3 always uses, as its config cannot say."""
    return math.sqrt(1 + math.log(windows[-1] / windows[0]) / math.log(windows[0]))


def write_artifact(folder, family, tiers, switch="reprefill", **changes):
    """A pico checkpoint with the modeling file, the way lrconvert lays it out."""
    lists = {"short_factor": tiers[0]["factors"], "long_factor": tiers[-1]["factors"]}
    full = {
        "rope_type": "longrope",
        "factor": tiers[-1]["max_length"] / tiers[0]["max_length"],
        "attention_factor": float(tiers[-1]["attention_factor"]),
        "original_max_position_embeddings": tiers[0]["max_length"],
    }
    config = {
        "model_type": family,
        "architectures": [FAMILIES[family]],
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "rope_theta": BASE,
        "max_position_embeddings": tiers[-1]["max_length"],
        "original_max_position_embeddings": tiers[0]["max_length"],
        "rope_scaling": {"type": "longrope", **lists} if family == "phi3" else {**full, **lists},
        "auto_map": {"AutoModelForCausalLM": "modeling_longrope.LongRopeForCausalLM"},
        "longrope": {
            "version": 1,
            "rope_theta": BASE,
            "rotary_dim": rotary_dim(family),
            "switch": switch,
            "tiers": tiers,
        },
    }
    if family == "phi3":
        config["partial_rotary_factor"] = 0.5
    elif family != "qwen2":
        config["head_dim"] = HEAD_DIM
    if family in ("mistral", "phi3"):
        config["sliding_window"] = None
    config |= changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    line = "from transformers import LlamaForCausalLM as NativeForCausalLM\n"
    source = MODELING.read_text()
    assert source.count(line) == 1
    source = source.replace(line, line.replace("LlamaForCausalLM", FAMILIES[family]))
    (folder / "modeling_longrope.py").write_text(source)

    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[family])(AutoConfig.from_pretrained(folder))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():  # widen q and k: attention far from uniform
        if name.endswith(("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")):
            tensor *= 2.0
        elif name.endswith("qkv_proj.weight"):
            tensor[: 6 * HEAD_DIM] *= 2.0
        elif name == "lm_head.weight":
            tensor *= 8.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)
    assert type(model).__name__ == "LongRopeForCausalLM"
    return model.eval()


def load_native(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()


class NaiveRope(torch.nn.Module):
    """One tier for everything, written with numpy straight from the formulas."""

    def __init__(self, dim, tier):
        super().__init__()
        self.dim, self.tier = dim, tier

    def forward(self, x, position_ids):
        positions = position_ids.numpy().astype(np.float64)[:, :, None]
        inverse = BASE ** (-2 * np.arange(self.dim // 2) / self.dim)
        divisor = np.where(positions < self.tier["start_tokens"], 1.0, np.asarray(self.tier["factors"]))
        angles = positions * inverse / divisor
        angles = np.concatenate([angles, angles], -1)
        scale = self.tier["attention_factor"]
        return (
            torch.from_numpy(np.cos(angles) * scale).to(x.dtype),
            torch.from_numpy(np.sin(angles) * scale).to(x.dtype),
        )


class Oracle:
    """The native class with a tier chosen by hand; no cache, one row without padding."""

    def __init__(self, folder, family, tiers):
        self.model, self.tiers, self.dim = load_native(folder), tiers, rotary_dim(family)

    @torch.no_grad()
    def logits(self, ids, tier=None):
        fitting = [k for k, t in enumerate(self.tiers) if t["max_length"] >= len(ids)]
        tier = (fitting or [len(self.tiers) - 1])[0] if tier is None else tier
        self.model.model.rotary_emb = NaiveRope(self.dim, self.tiers[tier])
        return self.model(torch.as_tensor(ids)[None], use_cache=False).logits[0]


@cache
def workshop():
    return tempfile.TemporaryDirectory(prefix="pico-")


@cache
def artifact(family, start_tokens=4, switch="reprefill"):
    """(folder, oracle, custom model) of a three-tier pico model; built once."""
    tiers = make_tiers(family, start_tokens)
    folder = Path(workshop().name) / f"{family}_{start_tokens}_{switch}"
    write_artifact(folder, family, tiers, switch)
    return folder, Oracle(folder, family, tiers), load(folder)


def tokens(n, seed=0, rows=None):
    shape = (n,) if rows is None else (rows, n)
    return torch.from_numpy(np.random.default_rng(seed).integers(1, VOCABULARY, shape))


def padded(lengths):
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, -n:], mask[row, -n:] = tokens(n, seed=n), 1
    return ids, mask


def far(a, b):
    return (a - b).abs().max().item()


# ---- generate


def generate(model, ids, new=24, **kwargs):
    """Sequences, from 60 tokens across both boundaries, and the logits of each step as (rows, steps, vocabulary)."""
    ids = ids if ids is None or ids.ndim == 2 else ids[None]
    kwargs = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0} | kwargs
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **kwargs)
    return out, torch.stack(out.logits, 1)


def oracle_steps(oracle, ids, prompt, tier=None):
    """The last logits of a full forward at each length from `prompt` to the end, exclusive.

    Attention is causal, so one pass in a tier serves all lengths in it."""
    passes, steps = {}, []
    for n in range(prompt, len(ids)):
        k = min(sum(n > w for w in WINDOWS), len(WINDOWS) - 1) if tier is None else tier
        if k not in passes:
            passes[k] = oracle.logits(ids, tier=k)
        steps.append(passes[k][n - 1])
    return torch.stack(steps)


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}


# ---- a loop written by hand


def loop(model, ids, kept, first, steps):
    """Prefill, then one token at a time; the logits of every position."""
    with torch.no_grad():
        out = model(ids[None, :first], past_key_values=kept, use_cache=True)
        rows = [out.logits[0]]
        for n in range(first, first + steps):
            out = model(ids[None, n : n + 1], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    return torch.cat(rows), out.past_key_values


def some_cache(model, kind):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=256)
    return DynamicCache() if kind == "dynamic" else None
