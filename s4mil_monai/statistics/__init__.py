"""Out-of-fold predictions → numbers with intervals, comparisons, calibration, tables and figures."""
