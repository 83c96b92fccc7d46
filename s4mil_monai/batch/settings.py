"""What a site wants scored, how, and where to: one YAML file, checked before anything is touched."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from s4mil_monai.errors import SettingsError, SourceAwayError, first_wrong

LEDGER_FILE = "ledger.sqlite"
LEDGER_VARIABLE = "S4MIL_LEDGER_URL"
LEDGERS = ("sqlite", "postgresql")
"""Databases that the ledger may be in."""


DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu)(:(0|[1-9]\d*))?")
"""What PyTorch computes on, by name."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceSettings(_Settings):
    """Where new slides come from: a folder that is looked through, or a worklist that names them."""

    folder: Path | None = None
    """With all folders below it."""
    worklist: Path | None = None
    """CSV with a column ``slide``: paths, relative ones to the worklist."""

    @model_validator(mode="after")
    def _one_of_both(self) -> SourceSettings:
        if (self.folder is None) == (self.worklist is None):
            raise ValueError("a source is either a folder or a worklist")
        return self

    @property
    def path(self) -> Path:
        """The folder or the worklist."""
        found = self.folder or self.worklist
        assert found is not None
        return found


class SiteSettings(_Settings):
    """Everything `s4mil batch` needs to know."""

    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    out: Path
    """Folder of results, run reports and, by default, the ledger."""
    ledger: str | None = None
    """Database URL, such as ``postgresql+psycopg://s4mil@db/s4mil``; by default what ``S4MIL_LEDGER_URL`` says,
    which keeps the password out of the file, else a SQLite file in ``out``. SQLite must not lie on a network
    share."""

    bundle: Path | None = None
    """Folder of the trained model; the shipped demonstration model by default."""
    encoder_weights: Path | None = None
    """Weights file of the encoder, instead of the published one."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, or one of several, such as ``cuda:1``."""
    patch_stage: Literal["torch", "dali", "auto"] = "torch"
    batch_size: int = Field(16, ge=1)
    """Patches the encoder takes at once."""
    aggregator_runtime: Literal["auto", "torch", "onnxruntime", "tensorrt"] = "auto"
    aggregator_precision: Literal["float32", "bfloat16", "float16"] = "float32"

    resolutions: Path | None = None
    """CSV of the site with columns slide, scanner, mpp."""
    ignore_quality: bool = False
    """Score slides even where their quality is judged too bad."""
    dicom: bool = False
    """Write DICOM objects and a FHIR report as well."""
    studies: Path | None = None
    """CSV of the site with patients and studies by slide, for ``dicom``: by file name, or by the end of its path
    (``A/1.svs``) where folders have slides of the same name."""
    features: Path | None = None
    """Folder where features are kept, so that another slide model with the same encoder need not embed again."""

    settle_s: float = Field(60, ge=0)
    """A file counts as whole when it has not changed for this long."""
    lease_s: float = Field(120, gt=0)
    """A scheduler that has not been heard of for this long has lost its slides to the others."""
    tries: int = Field(3, ge=1)
    """After so many failures a slide is put into quarantine."""
    losses: int = Field(5, ge=1)
    """After so many schedulers, or processes with several slides, were killed with it in work, a slide is put into
    quarantine: one that takes all memory takes everything with it."""
    backoff_s: float = Field(600, ge=0)
    """Before the second try; twice as long before each next one, a day at most."""
    slide_limit_s: float = Field(7200, gt=0)
    """A slide that takes longer is given up, with the process that works on it."""
    stop_within_s: float = Field(10, ge=0)
    """After SIGTERM, how long the slide in work may take to finish before it is handed back."""
    ledger_patience_s: float = Field(300, ge=0)
    """How long a database that does not answer is waited for."""

    drift_window: int = Field(100, ge=1)
    """So many slides, the last ones, are compared with the bundle's reference."""

    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    """Of a cluster, such as ``ray://head:10001`` or ``auto``; None starts one on this machine."""
    workers: int = Field(1, ge=1)
    """Processes that hold a model each. They have the GPUs in turn, unless ``device`` names one: where there are
    more of them than GPUs, several share one, and its memory. Ray gives each embedding actor a GPU of its own."""

    @field_validator("device")
    @classmethod
    def _is_device(cls, name: str) -> str:
        if DEVICE.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no device; it is auto, cpu, cuda, or one of several, such as cuda:1")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> SiteSettings:
        if self.studies is not None and not self.dicom:
            raise ValueError("studies are for dicom: true")
        if self.ray_address is not None and self.executor != "ray":
            raise ValueError("ray_address is for executor: ray")
        return self

    @property
    def ledger_url(self) -> str:
        """Of the ledger, the default filled in."""
        return self.ledger or f"sqlite:///{self.out.absolute() / LEDGER_FILE}"


def read_site(path: Path) -> SiteSettings:
    """Read a site's settings; relative paths in it become relative to the working directory.

    Raises:
        SettingsError: The file is missing, no YAML, or says something unknown or wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = _relative_to(SiteSettings.model_validate(content), path.parent)
        if not found.ledger:
            found = found.model_copy(update={"ledger": os.environ.get(LEDGER_VARIABLE)})
        _check_ledger(found.ledger, path)
        return found
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(str(path), f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise SettingsError(str(path), f"is not YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        raise SettingsError(str(path), first_wrong(error)) from error


def _check_ledger(url: str | None, path: Path) -> None:
    """Refuse an address of no database that the ledger knows; it is not repeated, for its password."""
    try:
        if url is None or sa.make_url(url).get_dialect().name in LEDGERS:
            return
    except (ArgumentError, NoSuchModuleError):
        pass
    wanted = "sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
    raise SettingsError(str(path), f"ledger, or {LEDGER_VARIABLE}: is no address of a ledger; wanted {wanted}")


def _relative_to(site: SiteSettings, folder: Path) -> SiteSettings:
    moved: dict[str, Any] = {name: folder / value for name, value in dict(site).items() if isinstance(value, Path)}
    moved["sources"] = tuple(
        source.model_copy(update={name: folder / path for name, path in dict(source).items() if path})
        for source in site.sources
    )
    return site.model_copy(update=moved)


def check_places(site: SiteSettings, path: Path) -> None:
    """Refuse folders that are missing or lie in each other, before anything is touched.

    Args:
        site: The settings.
        path: Their file, for the error.

    Raises:
        SettingsError: With the folder.
        SourceAwayError: A share is not mounted: nothing is wrong with the settings.
    """
    for number, source in enumerate(site.sources):
        place = f"sources.{number}"
        if source.folder is not None and not os.path.isdir(source.folder):
            raise SourceAwayError(str(source.folder), "there is no such folder; is the share mounted?")
        if source.worklist is not None and not os.path.isfile(source.worklist):
            raise SettingsError(str(path), f"{place}: there is no worklist {source.worklist}")
        for name in ("out", "features"):
            named = getattr(site, name)
            if named is not None and _mix(named, source):
                raise SettingsError(str(path), f"{name} {named} and {place} {source.path} lie in each other")
    for name in ("bundle", "encoder_weights", "resolutions", "studies"):
        named = getattr(site, name)
        if named is not None and not os.path.exists(named):
            raise SettingsError(str(path), f"{name}: there is no {named}")
    for name in ("out", "features", "bundle"):
        named = getattr(site, name)
        if named is not None and os.path.exists(named) and not os.path.isdir(named):
            raise SettingsError(str(path), f"{name}: {named} is no folder")


def _mix(written: Path, source: SourceSettings) -> bool:
    """Whether what is written would be found among what is read, or the other way round."""
    if source.folder is None:
        return written.resolve() in source.path.resolve().parents
    return _overlap(written.resolve(), source.path.resolve())


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents
