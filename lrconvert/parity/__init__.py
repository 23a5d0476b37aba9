# SPDX-License-Identifier: Apache-2.0
"""Does an artifact compute what its recipe says? Cases, measures, tolerances, mutants, report."""

from lrconvert.parity.options import Options, kind_of, own_runtime
from lrconvert.parity.report import Report, Row
from lrconvert.parity.verify import verify

__all__ = ["Options", "Report", "Row", "kind_of", "own_runtime", "verify"]
