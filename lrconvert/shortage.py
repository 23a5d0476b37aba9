# SPDX-License-Identifier: Apache-2.0
"""Whether an error says that memory ran out. Workers load this file by its path, so it imports nothing."""

NAMES = {"MemoryError", "OutOfMemoryError"}  # Python's and NumPy's; PyTorch's on a GPU
# PyTorch on a CPU, ONNX Runtime and C++ raise what they raise for anything else.
WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
)


def is_shortage(error: BaseException) -> bool:
    text = str(error).lower()
    return any(kind.__name__ in NAMES for kind in type(error).__mro__) or any(words in text for words in WORDS)


def told(error: BaseException) -> str:
    """What it says of sizes. PyTorch says that first, and then gives advice."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ". ".join(lines[0].split(". ")[:3]).rstrip(".")
