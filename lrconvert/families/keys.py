# SPDX-License-Identifier: Apache-2.0
"""Config keys that change what a decoder computes and that lrconvert doesn't compute: refused by name.

A config may carry another architecture's keys under a model_type that we read (a Granite saved as llama, a MiniCPM as
mistral). Code that doesn't know a key computes another model, without a word. How the keys were found:

1. Every field of the config classes of transformers 5.23 for our families, and every `config.X` in their modeling
   files, is in `READ` or `INERT`. `tests/families/test_keys.py` reads both again from the installed transformers.
2. Every field of all its other config classes with a causal decoder was looked through for what scales, caps, shifts
   or masks something. Those are in `CHANGES`, each with the values that change nothing; the same test looks for new
   ones by their words (`TELLING`).
3. A key in neither, whose name has one of these words, is refused as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lrconvert.errors import UnsupportedError

# What `read_shape`, `read_rope` and the readers of attention windows understand.
READ = frozenset({
    "model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers",
    "intermediate_size", "vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor", "max_position_embeddings", "original_max_position_embeddings", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "hidden_act", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "longrope",
})  # fmt: skip
# Training, bookkeeping, and how a program runs: no logit depends on them. `pretraining_tp` cuts products into parts.
INERT = frozenset({
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "classifier_dropout", "dtype", "embd_pdrop",
    "eos_token_id", "initializer_range", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "resid_pdrop", "torch_dtype", "transformers_version", "use_cache", "_attn_implementation", "num_logits_to_keep",
    "logits_to_keep", "cross_attention_hidden_size", "output_router_logits", "residual_in_fp32",
    "scale_attention_softmax_in_fp32", "attention_softmax_in_fp32",
})  # fmt: skip
ONE, NO = (1, 1.0, True), (False, 0, 0.0, "")
# Key: values with which it changes nothing. None (null) never does.
CHANGES: dict[str, tuple[Any, ...]] = {
    # Multipliers: Granite, MiniCPM, Falcon-H1, Cohere, Gemma and their kin.
    **dict.fromkeys((
        "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "lm_head_multiplier",
        "attention_in_multiplier", "attention_out_multiplier", "key_multiplier", "ssm_in_multiplier", "scale_emb",
        "embedding_scale", "attention_value_scale", "residual_scale", "residual_weight", "output_multiplier_scale",
        "embedding_multiplier_scale", "mup_scale_factor", "final_logit_scale", "mlp_alpha_factor", "mlp_beta_factor",
        "full_attn_alpha_factor", "full_attn_beta_factor", "use_rope", "is_causal", "causal",
    ), ONE),
    **dict.fromkeys((
        "attention_multiplier", "attn_multiplier", "query_pre_attn_scalar", "scale_depth", "dim_model_base",
        "softmax_scale", "mlp_multipliers", "attn_scale", "floor_scale", "num_attention_heads_per_layer",
        "block_configs", "no_rope_layers", "no_rope_layer_interval", "layer_rope_theta", "rope_local_base_freq",
        "qk_rope_head_dim",
        "rope_embedding_base", "rotary_emb_base", "rotary_pct", "rotary_dim", "swiglu_alpha", "logits_scale",
    ), ()),
    # Caps, norms, masks and wirings that are off unless they are on.
    **dict.fromkeys((
        "attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "attention_logit_cap", "gate_soft_cap",
        "clip_qkv", "swiglu_limit", "qk_layernorm", "qk_ln", "alibi", "attn_temperature_tuning", "use_logn_attn",
        "attention_chunk_size", "use_bidirectional_attention", "use_parallel_residual", "parallel_attn",
        "apply_residual_connection_post_layernorm", "scale_embedding", "rescale_embeddings", "normalize_embedding",
        "rope_interleave", "rope_interleaved", "use_mem_rope", "sliding_window_pattern", "num_kv_shared_layers",
        "attention_k_eq_v", "kv_lora_rank", "q_lora_rank", "scale_attn_by_inverse_layer_idx", "mup_enabled",
        "use_attention_gate", "attention_sink", "add_cross_attention", "is_encoder_decoder", "use_dynamic_ntk",
        "use_mup", "norm_reduction_force_float32", "prefix_lm", "num_local_experts", "num_experts", "n_routed_experts",
        "lm_head_bias",
    ), NO),
    "mlp_only_layers": ([],),  # which layers have experts: those of all families that are read, or none
    "decoder_sparse_step": ONE,
    "use_qk_norm": NO,
    "hidden_activation": ("silu", "swish"),
    "position_embedding_type": ("rope", "rotary", "absolute"),  # the last is what old configs inherited, unread
    "scale_attn_weights": ONE,
}  # fmt: skip
# Of the rotary settings. What is not here is refused there, whatever its name.
ROPE_READ = frozenset({
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "short_factor", "long_factor", "short_mscale", "long_mscale", "attention_factor", "mscale", "mscale_all_dim",
    "beta_fast", "beta_slow", "truncate", "low_freq_factor", "high_freq_factor",
})  # fmt: skip
ROPE_CHANGES: dict[str, tuple[Any, ...]] = {
    "finetuned": (True, False),  # a remark of YaRN's authors
    "attn_factor": ONE,  # YaRN's authors' multipliers
    "extrapolation_factor": ONE,
    "llama_4_scaling_beta": NO,  # an attention scale that grows with the position, in families that lack one
    "mrope_interleaved": NO,
}
TELLING = re.compile(
    r"multiplier|soft_?cap|scal(e|ing|ar)|logit|alibi|rope|rotary|sliding|window|clip_|temperature_tuning|logn|residual|"
    r"mup|softmax|sink|parallel",
    re.IGNORECASE,
)


def check_keys(
    config: Mapping[str, Any],
    section: Mapping[str, Any],
    name: str,
    read: Collection[str] = (),
    settings: Collection[str] = (),
) -> None:
    """Raise `UnsupportedError` (exit code 4) that names every key which changes what the model computes and which
    lrconvert doesn't compute. `section`: the rotary settings; `name`: the family's, "" for one that is not converted,
    whose config counts only as far as its rotation goes; `read` and `settings`: keys and rotary settings that this
    family has beyond those of all."""
    odd = [*(_odd(config, read) if name else ()), *_odd_settings(section, settings)]
    if odd:
        raise UnsupportedError(
            f"config.json: {', '.join(odd)}: {'a key that changes' if len(odd) == 1 else 'keys that change'} what the "
            f"model computes, and that {name or 'lrconvert'} as lrconvert knows it does not have",
            remedy="Remove a key from config.json only if the model was trained without it",
        )


def _odd(config: Mapping[str, Any], read: Collection[str]) -> Iterator[str]:
    for key, value in config.items():
        if value is None or key in READ or key in INERT or key in read:
            continue
        if key in CHANGES:
            if value not in CHANGES[key]:
                yield f"{key} {value!r:.40}"
        elif TELLING.search(key) and isinstance(value, bool | int | float | list) and value not in NO:
            yield f"{key} {value!r:.40}"


def _odd_settings(section: Mapping[str, Any], read: Collection[str]) -> Iterator[str]:
    for key, value in section.items():
        if value is not None and key not in ROPE_READ and key not in read and value not in ROPE_CHANGES.get(key, ()):
            yield f"{key} {value!r:.40} in the rotary settings"
