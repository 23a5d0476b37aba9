# SPDX-License-Identifier: Apache-2.0
"""What lrconvert writes: one folder a format, each with `plan`, `write` and `read_rope`."""
