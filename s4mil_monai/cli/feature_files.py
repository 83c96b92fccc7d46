"""``s4mil features``: check feature files, and take over those of other tools."""

from __future__ import annotations

from pathlib import Path

from s4mil_monai.cli.console import EXIT_ERROR, complain, say
from s4mil_monai.cli.usage import UsageError, require_positive


def verify_features(folder: str, *, slides: str | None = None, encoder_sha256: str | None = None) -> int:
    """Find damaged, half-written or mismatched feature files in a folder; leave with 1 if there are any.

    Args:
        folder: With feature files, in folders of any depth.
        slides: Where the slides lie; each is then read from end to end and compared.
        encoder_sha256: Fingerprint of the encoder that all features have to come from.
    """
    from s4mil_monai.features.audit import audit_features

    files = sum(not path.name.startswith(".") for path in Path(folder).rglob("*.h5"))
    findings = audit_features(
        Path(folder), slides=None if slides is None else Path(slides), encoder_sha256=encoder_sha256
    )
    for finding in findings:
        complain(f"{finding.path}: {finding.code}: {finding.text}")
    if not findings and not files:
        complain(f"{folder}: holds no feature files")
        return EXIT_ERROR
    if not findings:
        say(f"{folder}: {files} feature files, nothing wrong")
    return EXIT_ERROR if findings else 0


def import_features(
    file: str,
    *,
    out: str,
    slide: str | None = None,
    slide_mpp: float | None = None,
    encoder: str | None = None,
    encoder_sha256: str = "",
    patch_side_px: int | None = None,
    patch_side_px0: float | None = None,
    scan_order: str | None = None,
) -> int:
    """Take over features of CLAM, TRIDENT (.pt, .h5) or STAMP (.h5); what they do not say stays unknown.

    Args:
        file: Their feature file of one slide.
        out: The .h5 file to write.
        slide: Name of the slide, where the file does not say it.
        slide_mpp: Micrometres per pixel of the slide's finest level, where the file does not say it.
        encoder: What made the features, where the file does not say it.
        encoder_sha256: Fingerprint of its weights, where you know it.
        patch_side_px: Side of a patch as the encoder saw it, where the file does not say it.
        patch_side_px0: Side of a patch in pixels of the slide's finest level, where the file does not say it.
        scan_order: Sort the patches into this order: row_major, column_major, serpentine or hilbert.
    """
    from s4mil_monai.features.foreign import import_features as read
    from s4mil_monai.features.store import save_bag

    require_positive("slide_mpp", slide_mpp)
    require_positive("patch_side_px", patch_side_px)
    require_positive("patch_side_px0", patch_side_px0)
    if not out.endswith(".h5"):
        raise UsageError(f"--out is an .h5 file, got {out}")
    found = read(
        Path(file),
        slide=slide,
        slide_mpp=slide_mpp,
        encoder=encoder,
        encoder_sha256=encoder_sha256,
        patch_side_px=patch_side_px,
        patch_side_px0=patch_side_px0,
        scan_order=scan_order,
    )
    save_bag(Path(out), found.to_bag())
    origin = found.origin
    say(
        f"{file}: {len(found)} patches of {found.features.shape[1]} features, encoder {origin.encoder}, "
        f"scan order {origin.scan_order}, in {out}"
    )
    return 0
