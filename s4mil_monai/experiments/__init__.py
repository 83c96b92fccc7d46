"""Models x data set x folds: planned, run so that a stop costs one fold, and put into tables and figures."""
