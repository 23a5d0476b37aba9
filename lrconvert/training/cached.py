# SPDX-License-Identifier: Apache-2.0
"""A long text read once, and many short rows scored behind it with its keys and values in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from lrconvert.training.attention import use_kernel
from lrconvert.training.losses import cross_entropy

if TYPE_CHECKING:
    from lrconvert.training.loaded import LoadedModel, Tokens


class Prefilled:
    """The cache of a text [n] in a model, under the rotation that the model has now.

    It takes 2 · layers · KV heads · head size · n numbers of the model's dtype. Of one process: a team shares no cache.
    """

    def __init__(self, model: LoadedModel, tokens: Tokens) -> None:
        from transformers import DynamicCache

        self._model, self._cache = model, DynamicCache()
        with torch.no_grad(), use_kernel(model.attention):
            self._read(tokens)

    def score(self, tokens: Tokens, judged: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the last `judged` of `tokens`, read behind the text: losses in nats, and whether each is the first choice.

        Raises `ValueError` unless a token stands before the judged ones.
        """
        if not 0 < judged < len(tokens):
            raise ValueError(f"{judged} judged tokens of {len(tokens)}")
        with torch.no_grad():  # a mask of few rows: the kernel for whole documents may take none
            hidden = self._read(tokens)[:, -judged - 1 : -1]
            targets = torch.from_numpy(tokens[None, -judged:]).to(hidden.device)
            losses = cross_entropy(self._model.head, hidden, targets)[0]
            preferred = self._model.head(hidden).argmax(-1)[0] == targets[0]
        self._cache.crop(-len(tokens))
        return losses.double().cpu().numpy(), preferred.cpu().numpy()

    def _read(self, tokens: Tokens) -> torch.Tensor:
        """Hidden states [1, n, c] of tokens behind what the cache has."""
        start, device = self._cache.get_seq_length(), self._model.device
        ids = torch.from_numpy(tokens[None]).to(device)
        positions = torch.arange(start, start + len(tokens), device=device)[None]
        mask = torch.ones(1, start + len(tokens), dtype=torch.bool, device=device)
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
        return self._model.run(**given, past_key_values=self._cache, use_cache=True)
