# SPDX-License-Identifier: Apache-2.0
"""The evaluator of the search on a GPU: kernels, precision, memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from lrconvert.checkpoint import locate, open_model
from lrconvert.searching.objective import Document, Objective
from lrconvert.searching.protocol import Question
from lrconvert.searching.space import space_for

pytestmark = pytest.mark.gpu
LENGTH = 16384


@pytest.fixture(scope="module")
def model() -> Any:
    return open_model("demo")


@cache
def heldout() -> list[int]:
    from lrconvert.checkpoint.tokenizer import tokenizer_of

    return tokenizer_of(locate("demo"))((locate("demo") / "heldout.txt").read_text(encoding="utf-8"))


def objective(length: int = LENGTH) -> Objective:
    """The embedded model's held-out text, from its start again where it is too short."""
    tokens = np.resize(np.asarray(heldout(), dtype=np.int64), length)
    return Objective("perplexity", (Document("text", tokens, ((length, 0, length - 1),)),), {length: 1.0})


def question(model: Any, **options: Any) -> Question:
    space = space_for(model.shape.rotary_dim, model.shape.theta, 4096, LENGTH)
    return Question(dict(space.seeds())["yarn"], **options)


@pytest.mark.parametrize("kernel", [None, "cudnn", "flash"])
def test_every_kernel_gives_the_loss_of_float32_on_a_cpu(kernel: str | None, model: Any) -> None:
    """bfloat16 within 0.002 nats; the kernel that is chosen by itself is one of the fast ones."""
    from lrconvert.searching.evaluator import TransformersEvaluator

    (wanted,) = TransformersEvaluator(model, device="cpu").answer(objective(2048), [question(model)])
    evaluator = TransformersEvaluator(model, device="cuda", attention=kernel)
    assert evaluator.model.attention in ((kernel,) if kernel else ("cudnn", "flash"))
    (found,) = evaluator.answer(objective(2048), [question(model)])
    assert found.loss == pytest.approx(wanted.loss, abs=2e-3)
    assert evaluator.answer(objective(2048), [question(model)])[0].loss == found.loss  # again, to the last bit


def test_a_kernel_that_refuses_is_a_usage_error(model: Any) -> None:
    """PyTorch's memory-efficient attention wants as many key heads as query heads."""
    from lrconvert.errors import UsageError
    from lrconvert.searching.evaluator import TransformersEvaluator

    with pytest.raises(UsageError, match="--attention efficient"):
        TransformersEvaluator(model, device="cuda", attention="efficient")


def test_gradients_in_bfloat16_point_where_those_of_float32_do(model: Any) -> None:
    """In the slow frequencies, whose gradient is used; recomputed activations change nothing."""
    from lrconvert.searching.evaluator import TransformersEvaluator
    from lrconvert.searching.guided import slow_indices

    space = space_for(model.shape.rotary_dim, model.shape.theta, 4096, LENGTH)
    slow = slow_indices(space, question(model).candidate, 12.5)
    gradients = []
    for dtype in ("bfloat16", "float32"):
        evaluator = TransformersEvaluator(model, device="cuda", dtype=dtype)
        (answer,) = evaluator.answer(objective(), [question(model, gradient=True)])
        evaluator.model.recompute = True
        (again,) = evaluator.answer(objective(), [question(model, gradient=True)])
        assert answer.gradient is not None and again.gradient is not None
        kept, recomputed = (np.array(found)[slow] for found in (answer.gradient, again.gradient))
        np.testing.assert_allclose(recomputed, kept, atol=0.05 * np.abs(kept).max())
        gradients.append(kept)
    ours, exact = gradients
    assert ours @ exact / np.linalg.norm(ours) / np.linalg.norm(exact) > 0.9


def test_memory_that_is_taken_costs_one_candidate(model: Any) -> None:
    """With hardly any memory left a candidate fails, and with it back the next one does not."""
    import torch

    from lrconvert.searching.evaluator import TransformersEvaluator

    evaluator = TransformersEvaluator(model, device="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        (failed,) = evaluator.answer(objective(2**18), [question(model)])
        fits = evaluator.largest_fitting(2**18)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failed.error is not None and failed.error.startswith("out of memory")
    assert 0 < fits < 2**18
    assert evaluator.answer(objective(), [question(model)])[0].error is None
