# SPDX-License-Identifier: Apache-2.0
"""Damaged input for every reader of lrconvert: `tools/fuzz`.

    trees     what JSON can say, and more than it can: values changed by their structure, written as JSON, TOML, lines
    formats   the same for safetensors, GGUF, ONNX, tables, arrays: a function from healthy bytes to damaged ones
    readers   healthy files of every kind, and who reads them
    limits    what a reader may take and touch: time, memory, files, processes, the network
    hunting   inputs by number, in processes that may die; findings

An input is known by its reader, a seed and its number, so that it can be made again without those before it: a reader
that never returns, or that takes its process along, is found by the number that was last begun. hypothesis, which
the tests use, can't name an example without its history; it shrinks better, and here is little to shrink: an input has
one to three injuries.
"""
