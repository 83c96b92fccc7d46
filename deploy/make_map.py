"""The MONAI Application Package: its build context everywhere, its image where Docker runs.

python -m deploy.make_map --models build/models --out build/map
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from s4mil_monai import __version__

HERE = Path(__file__).resolve().parent
APP = HERE / "app"
PACKAGE = HERE.parent / "s4mil_monai"
SOURCE = HERE / "package_source.json"
"""Images and versions of Holoscan 4.6.0, which the packager's own list does not know."""

TAG = f"s4mil-app:{__version__}"
PLATFORM = "x86_64"
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def stage_application(folder: Path) -> Path:
    """Copy the application with the package beside its modules, where the image finds it.

    Not with the packager's ``--add``: it puts every folder below a library on PYTHONPATH, and
    ``s4mil_monai/statistics`` would stand in for Python's own ``statistics``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(APP, folder, ignore=NOT_SHIPPED)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=NOT_SHIPPED)
    return folder


def packager_arguments(application: Path, models: Path) -> list[str]:
    """The command line of ``monai-deploy``."""
    return [
        *("monai-deploy", "package", str(application), "--sdk", "monai-deploy"),
        *("--config", str(application / "app.yaml"), "--models", str(models)),
        *("--tag", TAG, "--platform", PLATFORM, "--source", str(SOURCE)),
    ]


def write_context(application: Path, models: Path, context: Path) -> None:
    """Write what ``docker build`` would take, with the packager's own functions; Docker is not needed."""
    from holoscan_cli.__main__ import parse_args
    from holoscan_cli.packager import packager
    from holoscan_cli.packager.arguments import PackagingArguments
    from holoscan_cli.packager.container_builder import PythonAppBuilder

    shutil.rmtree(context, ignore_errors=True)
    context.mkdir(parents=True)
    arguments = PackagingArguments(parse_args(packager_arguments(application, models)), str(context))
    packager._create_app_manifest(arguments.application_manifest, str(context))
    packager._create_package_manifest(arguments.package_manifest, str(context))
    builder = PythonAppBuilder(arguments.build_parameters, str(context))
    for platform in arguments.platforms:
        builder._copy_supporting_files(platform)
        builder._write_dockerfile(platform)


def docker_works() -> bool:
    """Whether there is a daemon and buildx; a client alone says nothing."""
    checks = (["docker", "info"], ["docker", "buildx", "version"])
    try:
        return all(subprocess.run(check, capture_output=True, check=False).returncode == 0 for check in checks)
    except FileNotFoundError:
        return False


def main() -> int:
    """Make the package; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="staged by python -m deploy.stage_models")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    application = stage_application(given.out / "application")
    write_context(application, given.models, given.out / "context")
    print(f"build context in {given.out / 'context'}")
    if not docker_works():
        print("no image: Docker or its buildx plugin does not run here")
        return 0
    return subprocess.run(packager_arguments(application, given.models), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
