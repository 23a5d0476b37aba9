# SPDX-License-Identifier: Apache-2.0
"""A model that answers and trains: loading, trial rotations, processes."""
