"""``s4mil pacs``: new slides of a PACS scored, results stored back."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from s4mil_monai.cli.console import EXIT_ERROR, complain, say
from s4mil_monai.cli.options import as_device, as_patch_stage, shipped_bundle
from s4mil_monai.cli.usage import UsageError, require_positive

PASSWORD_VARIABLE = "S4MIL_PACS_PASSWORD"


def pacs(
    url: str,
    *,
    out: str = "results",
    bundle: str | None = None,
    user: str | None = None,
    password_file: str | None = None,
    ca_file: str | None = None,
    c_store: str | None = None,
    own_aet: str = "S4MIL",
    timeout_s: float = 30.0,
    settle_s: float = 30.0,
    retry_failed: bool = False,
    encoder_weights: str | None = None,
    patch_stage: str = "torch",
    batch_size: int = 16,
    device: str = "auto",
) -> int:
    """Score the new slides of a PACS and store the results in their studies; run it again for the next ones.

    Args:
        url: Root of the PACS's DICOMweb services.
        out: Folder that gets a folder for each series, and notes what has been done.
        bundle: Folder of the trained model; the shipped demonstration model by default.
        user: For the PACS; the password is in S4MIL_PACS_PASSWORD or in a file.
        password_file: File with the password and nothing else.
        ca_file: Certificates to trust instead of the public ones.
        c_store: AET@host:port to send results to by C-STORE, instead of DICOMweb.
        own_aet: Our application entity title for C-STORE.
        timeout_s: Seconds that the PACS may take for an answer, or the next piece of it.
        settle_s: Seconds a series must have had the same instances for before it is scored.
        retry_failed: Try slides again that could not be scored.
        encoder_weights: Weights file of the encoder, instead of the published one.
        patch_stage: What prepares patches: torch, dali, or auto, the faster one here.
        batch_size: Patches the encoder takes at once.
        device: cpu, cuda, or auto.
    """
    require_positive("timeout_s", timeout_s)
    require_positive("batch_size", batch_size)
    if isinstance(settle_s, bool) or not isinstance(settle_s, (int, float)) or not 0 <= settle_s < math.inf:
        raise UsageError(f"--settle_s is a number of seconds, 0 or more, got {settle_s!r}")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"URL begins with http:// or https://, got {url}")
    from s4mil_monai.pacs.dimse import parse_target, send_files
    from s4mil_monai.pacs.web import PacsWeb

    server = PacsWeb(
        url, user=user, password=_password(password_file), ca_file=ca_file, timeout_s=float(timeout_s)
    )
    try:
        peer = None if c_store is None else parse_target(c_store, own_aet=own_aet, timeout_s=float(timeout_s))
    except ValueError as error:
        raise UsageError(f"--c_store: {error}") from error
    server.check()  # before models are loaded
    from s4mil_monai.pacs.rounds import Round
    from s4mil_monai.scoring import load_scorer

    scorer = load_scorer(
        bundle or shipped_bundle(),
        encoder_weights=encoder_weights,
        patch_stage=as_patch_stage(patch_stage),
        batch_size=batch_size,
        device=as_device(device),
    )

    one_pass = Round(
        server,
        scorer,
        Path(out),
        store=server.store_all if peer is None else partial(send_files, target=peer),
        target=str(peer or server.url),
        retry_failed=retry_failed,
        settle_s=float(settle_s),
    )
    counts: Counter[str] = Counter()
    for outcome in one_pass.run():
        counts[outcome.status] += 1
        place = "" if outcome.folder is None else f"; in {outcome.folder}"
        tell = complain if outcome.status == "failed" else say
        tell(f"{outcome.series.series}: {outcome.detail}{place}")
    say(sum_up(counts))
    return EXIT_ERROR if counts["failed"] else 0


def sum_up(counts: Mapping[str, int]) -> str:
    """The last line, of how many series became what."""
    if not any(counts.values()):
        return "nothing to do"
    arriving = f", {counts['arriving']} still arriving" if counts["arriving"] else ""
    return f"{counts['stored']} stored, {counts['failed']} failed{arriving}"


def _password(file: str | None) -> str | None:
    """Of the file, else of the environment; never of the command line, which everybody on the machine can read."""
    if file is None:
        return os.environ.get(PASSWORD_VARIABLE)
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--password_file {file} cannot be read") from error
