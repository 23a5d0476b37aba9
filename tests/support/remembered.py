# SPDX-License-Identifier: Apache-2.0
"""The reference's answers, remembered from one verification to the next.

Tests verify hundreds of files of a few models against the same recipes: most of what they ask the reference is what
another test has asked it. It is a function of weights, rotation and tokens, so the answer is the same, and here it is
looked up by all of these, the weights by their digest. What is wrong in a file is in its runtime's answer, which is
never remembered.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from lrconvert.reference import Reference

MOST = 1500  # answers, of 100 kB and less


def remember(patch: pytest.MonkeyPatch) -> None:
    """From now on, until `patch` is undone."""
    computed = Reference.logits
    answers: OrderedDict[object, np.ndarray] = OrderedDict()

    def logits(self: Reference, tokens: Any, **asked: Any) -> np.ndarray:
        rounded = (str(self.dtype), str(self._cache), self._block)
        place = (repr(self.shape), str(self.device), rounded, digest_of(self))
        key = (place, repr(self.rotation), *map(_plain, (tokens, *asked.values())), *asked)
        if key not in answers:
            answers[key] = computed(self, tokens, **asked)
            answers[key].flags.writeable = False  # nobody changes what another one will be given
            if len(answers) > MOST:
                answers.popitem(last=False)
        answers.move_to_end(key)
        return answers[key]

    patch.setattr(Reference, "logits", logits)


def digest_of(reference: Reference) -> bytes:
    """Of all weights as the reference computes with them."""
    known = vars(reference)
    if "digest" not in known:
        digest = hashlib.blake2b()
        for tensor in reference.model.roles.values():
            digest.update(repr(tensor.key).encode())
            digest.update(reference._weight(tensor.role, tensor.layer, tensor.expert).numpy().tobytes())
        known["digest"] = digest.digest()
    return known["digest"]


def _plain(value: Any) -> object:
    return None if value is None else np.asarray(value).tobytes()
