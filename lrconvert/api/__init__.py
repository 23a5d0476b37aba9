# SPDX-License-Identifier: Apache-2.0
"""The Python API: the command line's verbs. `lrconvert` itself exports them; each is imported when it is used."""
