"""A hospital in a folder: a share with slides, settings, and the command run as cron runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from s4mil_monai.batch.ledger import Job, Ledger
from s4mil_monai.batch.settings import read_site
from s4mil_monai.batch.site import open_ledger
from s4mil_monai.batch.states import JobState
from s4mil_monai.slides.pyramid import write_pyramid
from tests.conftest import tissue_picture

FAST = {"settle_s": 0, "backoff_s": 0, "lease_s": 5, "device": "cpu", "stop_within_s": 0}


@dataclass
class SmallSite:
    """Folders and settings of one test."""

    folder: Path
    bundle: Path

    @property
    def share(self) -> Path:
        """Where the scanner writes."""
        return self.folder / "share"

    @property
    def out(self) -> Path:
        """Where results go."""
        return self.folder / "out"

    @property
    def file(self) -> Path:
        """The settings."""
        return self.folder / "site.yaml"

    def configure(self, **settings: Any) -> Path:
        """Write the settings; what is not given is as :data:`FAST` has it."""
        self.share.mkdir(exist_ok=True)
        known = {"sources": [{"folder": "share"}], "out": "out", "bundle": str(self.bundle), **FAST, **settings}
        self.file.write_text(yaml.safe_dump(known))
        return self.file

    def scan(self, name: str, *, seed: int = 0) -> Path:
        """Put a slide with tissue on the share: 12 patches, other pixels for another seed."""
        (self.share / name).parent.mkdir(parents=True, exist_ok=True)
        return write_pyramid(tissue_picture(seed=seed), self.share / name, mpp=0.5)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start ``s4mil batch …`` in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "s4mil_monai", "batch", *arguments, "--config", str(self.file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def call(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``s4mil batch …`` to its end."""
        process = self.start(*arguments, **environment)
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def ledger(self) -> Ledger:
        """The ledger, opened anew."""
        return open_ledger(read_site(self.file))

    def jobs(self) -> dict[str, Job]:
        """All jobs by the name of their slide."""
        return {job.name: job for job in self.ledger().jobs()}

    def states(self) -> dict[str, JobState]:
        """What has become of each slide, by its name."""
        return {name: job.state for name, job in self.jobs().items()}
