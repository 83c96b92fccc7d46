"""export_jobs(): the ledger as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from s4mil_monai.batch.ledger import Job, Ledger
from s4mil_monai.errors import OutputError
from s4mil_monai.whole_file import write_whole

FORMATS = (".csv", ".parquet")
SUMMARY = ("status", "predicted", "probability", "positive", "calibrated", "decision", "quality", "patches")
COLUMNS = (
    *("slide", "name", "path", "model", "settings", "state", "attempts", "error", "reason"),
    *("found_at", "changed_at", "folder", *SUMMARY, "seconds"),
)


def export_jobs(ledger: Ledger, path: Path) -> int:
    """Write one row a job, as CSV or Parquet by the name's ending; gives how many.

    Raises:
        OutputError: The file cannot be written.
    """
    table = pd.DataFrame([_as_row(job) for job in ledger.jobs()], columns=list(COLUMNS))
    for name in ("found_at", "changed_at"):
        table[name] = pd.to_datetime(table[name], unit="s", utc=True)
    write = table.to_csv if path.suffix == ".csv" else table.to_parquet
    try:
        write_whole(path, lambda part: write(part, index=False))
    except OSError as error:
        raise OutputError(str(path), f"cannot be written ({error.strerror or error})") from error
    return len(table)


def _as_row(job: Job) -> dict[str, Any]:
    summary = job.summary or {}
    known = {name: getattr(job, name) for name in COLUMNS if hasattr(job, name)}
    return {
        **known,
        "state": job.state.value,
        **{name: summary.get(name) for name in SUMMARY},
        "seconds": summary.get("seconds", {}).get("total"),
    }
