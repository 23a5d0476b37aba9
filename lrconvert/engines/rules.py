# SPDX-License-Identifier: Apache-2.0
"""How programs choose between two sets, and what follows: the rules that the rows of `table` name."""

from __future__ import annotations

from dataclasses import replace

from lrconvert.engines.engine import Rule

BY_ROW = Rule("every row by its own length; keys are recomputed where a row changes tier")
BY_FORWARD = Rule(
    "every forward pass, by the longest sequence of its batch",
    ("generation across {boundary} keeps keys of the short set", "a batch shares one set"),
)
BY_FORWARD_ANEW = replace(
    BY_FORWARD,
    chooses=f"{BY_FORWARD.chooses}; `generate` reads the sequence again when it grows past {{boundary}}",
    limits=BY_FORWARD.limits[1:],
)
BY_FORWARD_EXPORTED = replace(
    BY_FORWARD, limits=(*BY_FORWARD.limits, "the exported model itself stays at the short set in memory")
)
BY_BATCH = Rule(
    "every forward pass, by any position above {boundary} in the batch",
    (
        "generation across {boundary} keeps keys of the short set",
        "requests that run together share one set",
        "the switch comes one token late",
    ),
)
ONCE = Rule(
    "once, at start: long where its context is longer than {boundary}",
    ("started for more than {boundary} tokens, it uses the long set for shorter sequences too",),
)
ONCE_ASKED = replace(
    ONCE, limits=("it serves {boundary} tokens unless it is started with --max-model-len {window}", *ONCE.limits)
)
ONCE_PADDED = replace(ONCE, limits=(*ONCE.limits, "contexts count in steps of 256"))
ALWAYS_LONG = Rule("the long set, always", ("sequences of up to {boundary} tokens use the long set",))
BY_POSITION = Rule(
    "every position by itself",
    breaks="positions below {boundary} use the short set and the rest the long one, in one sequence",
)
FROZEN_SHORT = Rule("in tracing: the short set", breaks="the short set is baked in for every length")
NEVER_LONG = Rule("the short set, always", breaks="the long set is never used")
DROPPED = Rule("never: the scaling is silently dropped", breaks="plain RoPE, unscaled", always=True)
IN_GRAPH = Rule(
    "in the graph, by the length of the attention mask",
    (
        "generation across {boundary} is recomputed only where that is 4096, batch 1",
        "left padding counts as length",
    ),
)
REFUSED = Rule("not at all", refuses="NotImplementedError: longrope is not supported for this family")
