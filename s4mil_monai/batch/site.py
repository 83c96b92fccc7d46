"""Site: settings, ledger, model and folders of a site, opened together and checked against each other."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s4mil_monai.batch.database import Database
from s4mil_monai.batch.intake import Intake
from s4mil_monai.batch.kind import describe_kind
from s4mil_monai.batch.ledger import JobKind, Ledger
from s4mil_monai.batch.local_executor import LocalExecutor
from s4mil_monai.batch.publish import Places, Publisher
from s4mil_monai.batch.ray_cluster import check_address
from s4mil_monai.batch.ray_executor import RayExecutor
from s4mil_monai.batch.scheduler import Scheduler
from s4mil_monai.batch.settings import LEDGER_FILE, SiteSettings, check_places, read_site
from s4mil_monai.batch.work import Executor, WorkerSettings
from s4mil_monai.checksum import sha256_of
from s4mil_monai.errors import (
    FeatureFileError,
    LedgerError,
    OutputError,
    PathError,
    SettingsError,
    TableError,
    WeightsError,
)
from s4mil_monai.extras import require
from s4mil_monai.features.encoder import load_encoder
from s4mil_monai.features.store import read_origin
from s4mil_monai.models.bundle import BundleSettings
from s4mil_monai.models.manifest import told_as_bundle_error
from s4mil_monai.models.seal import verify_bundle
from s4mil_monai.outputs.hospital import HospitalWriter
from s4mil_monai.processes import name_machine
from s4mil_monai.slides.overrides import read_overrides

READINGS = 10
"""So often a settings file that is being saved is read again."""


class DeviceAwayError(PathError):
    """The GPU that the settings name is not there now; ``path`` is its name."""


def new_run() -> str:
    """A name for a pass: when it began, and something to tell two of one second apart."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"


def open_ledger(
    site: SiteSettings, *, must_exist: bool = False, clock: Callable[[], float] | None = None
) -> Ledger:
    """The ledger of a site.

    Args:
        site: Settings.
        must_exist: Otherwise it is made where there is none.
        clock: See :class:`Database`.

    Raises:
        LedgerError: It cannot be opened, or there is none.
        OutputError: The folder it lies in cannot be made.
    """
    if must_exist and site.ledger is None and not (site.out / LEDGER_FILE).is_file():
        raise LedgerError(str(site.out / LEDGER_FILE), "there is no ledger yet; `s4mil batch run` makes it")
    try:
        if site.ledger is None:
            site.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(str(site.out), f"cannot be made ({error.strerror})") from error
    database = Database(site.ledger_url, clock=clock, patience_s=site.ledger_patience_s)
    return Ledger(database, lease_s=site.lease_s, tries=site.tries, losses=site.losses, backoff_s=site.backoff_s)


@dataclass(frozen=True)
class Site:
    """A site that was found to be in order, or, as :func:`read_site_as_told` gives it, says that it is."""

    file: Path
    settings: SiteSettings
    bundle: Path
    kind: JobKind
    model: BundleSettings
    """What the bundle's model is, and expects."""
    config_sha256: str = field(compare=False)
    """Of the file of settings that was read; sites that differ in a comment are equal."""
    bundle_sha256: str | None = None
    """Of the bundle's list of checksums, and so of every file in it; None where they were not checked."""
    tables: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the tables of resolutions and studies, those there are."""

    @property
    def places(self) -> Places:
        """Folders below ``out``."""
        return Places(self.settings.out)

    def make_executor(self) -> Executor:
        """What scores; nothing is started."""
        workers = self.settings.workers
        if self.settings.executor == "ray":
            return RayExecutor(self.worker_settings(), workers=workers, address=self.settings.ray_address)
        return LocalExecutor(self.worker_settings(), workers=workers)

    def make_scheduler(self, ledger: Ledger, executor: Executor, *, run: str) -> Scheduler:
        """One pass."""
        publisher = Publisher(ledger, self.places, kind=self.kind, origin=self._origin(), run=run)
        return Scheduler(
            self.settings,
            self.kind,
            ledger=ledger,
            intake=Intake(self.settings, ledger, self.kind),
            executor=executor,
            publisher=publisher,
            places=self.places,
        )

    def _origin(self) -> dict[str, Any]:
        """What every record of a pass says of settings, model and the machine that publishes."""
        return {
            "config": self.config_sha256,
            "bundle": self.bundle_sha256,
            "tables": self.tables,
            "machine": name_machine(),
        }

    def worker_settings(self) -> WorkerSettings:
        """What a process that scores has to know."""
        site = self.settings
        return WorkerSettings(
            bundle=self.bundle.absolute(),
            model=self.kind.model,
            encoder_weights=_absolute(site.encoder_weights),
            device=site.device,
            patch_stage=site.patch_stage,
            batch_size=site.batch_size,
            aggregator_runtime=site.aggregator_runtime,
            aggregator_precision=site.aggregator_precision,
            resolutions=_absolute(site.resolutions),
            ignore_quality=site.ignore_quality,
            dicom=site.dicom,
            studies=_absolute(site.studies),
            features=_absolute(site.features),
        )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def read_checked_site(file: Path, *, default_bundle: Callable[[], Path]) -> Site:
    """Read a site's settings and check all that can be checked before anything is touched.

    Args:
        file: YAML.
        default_bundle: Gives the bundle where the settings name none.

    Raises:
        SettingsError: Something in the settings is wrong, missing or impossible.
        BundleError: The bundle is none, was changed since it was sealed, or holds what no bundle may.
        ClusterError: Nobody answers where the cluster should be.
        DeviceAwayError: The GPU that the settings name is not there.
        MissingExtraError: The site wants Ray or DALI, which is not installed.
    """
    settings, config_sha256 = read_hashed_site(file)
    check_places(settings, file)
    _check_tables(settings, file)
    if settings.executor == "ray":
        check_address(settings.ray_address)
    else:
        _check_machine(settings)
    verified = verify_bundle(settings.bundle or default_bundle())
    kind, expected = describe_kind(settings, verified.bundle)
    _check_weights(settings, expected, file)
    _check_features(settings, expected, file)
    hashes = {"config_sha256": config_sha256, "bundle_sha256": verified.sha256}
    return Site(file, settings, verified.bundle, kind, expected, tables=_hash_tables(settings, file), **hashes)


def read_site_as_told(file: Path, *, default_bundle: Callable[[], Path]) -> Site:
    """Read a site's settings and its bundle's metadata and nothing else, to tell of its ledger and not to score.

    Shares and clusters may be away, and no file of the bundle is hashed.

    Raises:
        SettingsError: The settings cannot be read.
        BundleError: The bundle is none, or its metadata cannot be read.
    """
    settings, config_sha256 = read_hashed_site(file)
    bundle = settings.bundle or default_bundle()
    with told_as_bundle_error(bundle):
        kind, expected = describe_kind(settings, bundle)
    return Site(file, settings, bundle, kind, expected, config_sha256)


def read_hashed_site(file: Path) -> tuple[SiteSettings, str]:
    """A site's settings, and the SHA-256 of the file they were read from.

    The file is read twice, and again where it was changed in between: the hash is of the text that was parsed.

    Raises:
        SettingsError: It cannot be read, or is changed all the time.
    """
    for _ in range(READINGS):
        before = _hash(file, file, "the settings")
        settings = read_site(file)
        if _hash(file, file, "the settings") == before:
            return settings, before
    raise SettingsError(str(file), "is changed while it is read, again and again; try again when it is saved")


def _hash_tables(settings: SiteSettings, file: Path) -> dict[str, str]:
    named = {"resolutions": settings.resolutions, "studies": settings.studies}
    return {name: _hash(path, file, name) for name, path in named.items() if path is not None}


def _hash(path: Path, file: Path, name: str) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise SettingsError(str(file), f"{name}: {path} cannot be read ({error.strerror or error})") from error


def _check_tables(settings: SiteSettings, file: Path) -> None:
    name = "resolutions"
    try:
        if settings.resolutions is not None:
            read_overrides(settings.resolutions)
        name = "studies"
        if settings.studies is not None:
            HospitalWriter(settings.studies)
    except TableError as error:
        raise SettingsError(str(file), f"{name}: {error}") from error


def _check_machine(settings: SiteSettings) -> None:
    """Refuse what this machine has not got, before a slide is blamed for it."""
    if settings.patch_stage == "dali":
        require("nvidia.dali", extra="dali")
    kind, _, number = settings.device.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        found = f"PyTorch finds {torch.cuda.device_count()} GPUs on this machine"
        raise DeviceAwayError(f"device: {settings.device}", found)


def _check_weights(settings: SiteSettings, expected: BundleSettings, file: Path) -> None:
    """Refuse weights of the encoder that are damaged, or not those the model was trained with."""
    if settings.encoder_weights is None:
        return
    try:
        found = load_encoder(expected.encoder.name, weights=settings.encoder_weights).fingerprint
    except WeightsError as error:
        raise SettingsError(str(file), f"encoder_weights: {error}") from error
    if found != expected.encoder.sha256:
        raise SettingsError(
            str(file),
            f"encoder_weights: {settings.encoder_weights} are other weights of {expected.encoder.name} "
            f"({found[:12]}…) than the model was trained with ({expected.encoder.sha256[:12]}…)",
        )


def _check_features(settings: SiteSettings, expected: BundleSettings, file: Path) -> None:
    """Features that were kept are of one encoder; a model of another would embed all slides of all years again."""
    if settings.features is None or not settings.features.is_dir():
        return
    kept = next(settings.features.glob("*.h5"), None)
    if kept is None:
        return
    try:
        found = read_origin(kept)
    except FeatureFileError as error:
        raise SettingsError(str(file), f"features: {error}") from error
    if found.encoder_sha256 != expected.encoder.sha256:
        raise SettingsError(
            str(file),
            f"features: {settings.features} holds features of {found.encoder} ({found.encoder_sha256[:12]}…), "
            f"the model wants {expected.encoder.name} ({expected.encoder.sha256[:12]}…); name another folder",
        )
