# SPDX-License-Identifier: Apache-2.0
"""A model in memory that answers and trains: loading, trial rotations, attention kernels, losses, processes, devices.

Everything that searches or fine-tunes uses it, and it imports nothing of them.
"""
