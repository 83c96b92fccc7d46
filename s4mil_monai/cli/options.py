"""Options that several commands share, turned into what the package takes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from s4mil_monai.cli.usage import UsageError, require_positive, require_share, require_slide
from s4mil_monai.errors import BundleError, MissingExtraError, UnknownNameError, first_line

if TYPE_CHECKING:
    from s4mil_monai.outputs.hospital import HospitalWriter
    from s4mil_monai.result import PatchSettings
    from s4mil_monai.slides.overrides import Overrides


LEAST_SIDE_PX = 16
"""Of a patch; as :class:`~s4mil_monai.result.PatchSettings` has it."""


def require_one_slide(path: str, *, command: str) -> None:
    """Refuse a folder that holds anything but one DICOM slide: of several, one would be taken in silence.

    Args:
        path: A slide file, which may be anything, or a folder.
        command: Which takes one slide, for the error.
    """
    require_slide(path)
    folder = Path(path)
    if not folder.is_dir():
        return
    from s4mil_monai.slides.mixed_folder import survey_folder

    try:
        with TemporaryDirectory() as links:
            survey = survey_folder(folder, Path(links))
    except MissingExtraError:  # DICOM, without what tells one series from another; the reader counts them too
        return
    names = [slide.file for slide in survey.slides]
    if len(names) > 1:
        advice = f"{command} takes one: name the file, or use `s4mil batch run`"
        raise UsageError(f"{path}: holds {len(names)} slides; {advice}")
    if not names:
        raise UsageError(f"{path}: holds no slides; name a slide file, or the folder of a DICOM slide")
    if survey.slides[0].path == folder / names[0] or Path(names[0]).parent != Path():
        raise UsageError(f"{path}: is no slide but holds one; name it: {folder / names[0]}")


def as_patch_stage(name: str) -> str:
    """The same name, if there is such a patch stage."""
    from s4mil_monai.features.patch_stage import choose_patch_batches

    choose_patch_batches(name)
    return name


def as_device(name: str) -> str:
    """The device of a name; ``auto`` is a GPU where there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} is not there ({first_line(error)})") from error
    return name


def as_precision(name: str) -> str:
    """The same name, if the aggregator computes in such a precision."""
    from s4mil_monai.precision import find_precision

    find_precision(name)
    return name


def shipped_bundle() -> Path:
    """The demonstration bundle of a source checkout."""
    bundle = Path(__file__).resolve().parents[2] / "bundles" / "s4mil_slide"
    if not bundle.is_dir():
        raise BundleError(
            str(bundle),
            "bundles come with the source, not with the package; "
            "give one with --bundle, or `bundle:` in site.yaml",
        )
    return bundle


def as_overrides(path: str | None) -> Overrides | None:
    """The resolutions of a site's table, if one is given."""
    from s4mil_monai.slides.overrides import read_overrides

    return None if path is None else read_overrides(path)


def as_hospital_writer(dicom: bool, studies: str | None) -> HospitalWriter | None:
    """What writes DICOM and FHIR, if that is asked for."""
    if not dicom:
        if studies is not None:
            raise UsageError("--studies is for --dicom")
        return None
    from s4mil_monai.outputs.hospital import HospitalWriter

    return HospitalWriter(None if studies is None else Path(studies))


def as_patch_settings(
    *, mpp: float, side_px: int, min_tissue: float, overlap_px: int, scan_order: str
) -> PatchSettings:
    """Which patches are read, each option checked."""
    from s4mil_monai.result import PatchSettings

    require_positive("mpp", mpp)
    require_share("min_tissue", min_tissue)
    if side_px < LEAST_SIDE_PX:
        raise UsageError(f"--side_px is at least {LEAST_SIDE_PX}, got {side_px}")
    if not 0 <= overlap_px < side_px:
        raise UsageError(f"--overlap_px is at least 0 and less than {side_px}, got {overlap_px!r}")
    return PatchSettings(
        mpp=mpp,
        side_px=side_px,
        min_tissue=min_tissue,
        overlap_px=overlap_px,
        scan_order=as_scan_order(scan_order),
    )


def as_scan_order(name: str) -> str:
    """The same name, if there is such a scan order."""
    from s4mil_monai.slides.grid import SCAN_ORDERS

    if name not in SCAN_ORDERS:
        raise UnknownNameError("scan order", name, tuple(SCAN_ORDERS))
    return name
