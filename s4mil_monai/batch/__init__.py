"""Many slides, safely: ledger, intake, workers, and what is told about them."""
