# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed, that find the disk full, and that meet another of their kind: `tools/torture`.

    scenarios  every command that writes: what lies there before, what it asks for, what may lie there afterwards
    trials     the three kinds of misfortune, and what must hold after each

Real processes, forked from one that has the imports; SIGKILL; a file system that is full; no mocks.
"""
