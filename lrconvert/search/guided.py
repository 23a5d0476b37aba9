# SPDX-License-Identifier: Apache-2.0
from lrconvert.search.evolution import evolution, schedule_for

GUIDED_BUDGET = 140


def guided(space, seed, *, start=()):
    return evolution(space, seed, schedule=schedule_for(space.target), start=start)
