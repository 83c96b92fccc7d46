"""The MONAI Application Package: its build context, field by field, and the application started from it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.make_map import PACKAGE, docker_works, stage_application, write_context
from s4mil_monai import __version__
from s4mil_monai.models.manifest import MANIFEST, stage_models
from tests.deploy.test_app import ROOT, WHOLE, rows_of, run_app


@pytest.fixture(scope="module")
def context(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    stage_models(bundle, folder / "models")
    write_context(stage_application(folder / "application"), folder / "models", folder / "context")
    return folder / "context"


def manifest_of(context, name):
    return json.loads((context / "map" / name).read_text())


def test_application_manifest_has_every_field_of_the_specification(context):
    app = manifest_of(context, "app.json")
    assert app["apiVersion"] == "1.0.0"
    assert json.loads(app["command"]) == ["python3", "/opt/holoscan/app"]
    assert (app["sdk"], app["sdkVersion"], app["version"]) == ("monai-deploy", "4.0.0", __version__)
    assert (app["timeout"], app["workingDirectory"]) == (0, "/var/holoscan")
    assert app["input"]["formats"] == app["output"]["formats"] == ["file", "dicom"]
    wanted = {
        "HOLOSCAN_APPLICATION": "/opt/holoscan/app",
        "HOLOSCAN_WORKDIR": "/var/holoscan",
        "HOLOSCAN_MODEL_PATH": "/opt/holoscan/models",
        "HOLOSCAN_CONFIG_PATH": "/var/holoscan/app.yaml",
        "HOLOSCAN_APP_MANIFEST_PATH": "/etc/holoscan/app.json",
        "HOLOSCAN_PKG_MANIFEST_PATH": "/etc/holoscan/pkg.json",
    }
    assert wanted.items() <= app["environment"].items()


def test_package_manifest_has_every_field_of_the_specification(context):
    package = manifest_of(context, "pkg.json")
    assert (package["apiVersion"], package["version"]) == ("1.0.0", __version__)
    assert (package["applicationRoot"], package["modelRoot"]) == ("/opt/holoscan/app", "/opt/holoscan/models")
    assert package["resources"] == {"cpu": 2, "gpu": 0, "memory": "8Gi", "gpuMemory": "0Gi"}


def test_the_packager_departs_from_the_specification_in_four_ways(context):
    """When one of these fails, the packager has changed: look at the specification, then at deploy/README.md."""
    app, package = manifest_of(context, "app.json"), manifest_of(context, "pkg.json")
    assert package["models"] == {"tiny": "/opt/holoscan/models/tiny"}  # an object, not an array
    assert {"HOLOSCAN_DOCS_PATH", "HOLOSCAN_LOGS_PATH"} <= app["environment"].keys()  # variables of its own
    assert (app["input"]["path"], app["output"]["path"]) == ("input/", "output/")  # relative
    assert (app["readiness"], app["liveness"]) == (None, None)


def test_image_runs_as_another_user_and_starts_the_tools(context):
    lines = (context / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER $UNAME"]
    assert [line for line in lines if line.startswith("ENTRYPOINT")] == ['ENTRYPOINT ["/var/holoscan/tools"]']
    copied = {tuple(line.split()[1:]) for line in lines if line.startswith("COPY")}
    assert copied == {
        ("./tools", "/var/holoscan/tools"),
        ("./pip/requirements.txt", "/tmp/requirements.txt"),
        ("./models", "/opt/holoscan/models"),
        ("./map/app.json", "/etc/holoscan/app.json"),
        ("./app.config", "/var/holoscan/app.yaml"),
        ("./map/pkg.json", "/etc/holoscan/pkg.json"),
        ("./app", "/opt/holoscan/app"),
    }
    for source, _ in copied:
        assert (context / source).exists()


def test_requirements_are_one_a_line_pinned_as_tested(context):
    lines = (context / "pip" / "requirements.txt").read_text().splitlines()
    wanted = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {_folded(name): version for name, version in wanted.items()}
    required = [line for line in lines if line and not line.startswith("#")]
    for line in required:
        name, _, version = line.partition("==")
        assert pins[_folded(name)] == version, line
    direct = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    names = {_folded(name) for name in re.findall(r'"([\w-]+)', direct)}
    names |= {"psycopg", "psycopg-binary"}  # the batch's ledger in Kubernetes is on PostgreSQL
    assert names - {_folded(line.partition("==")[0]) for line in required} == set()


def _folded(name):
    return re.sub(r"[-_.]+", "-", name.lower())


def test_context_holds_the_models_with_their_checksums_and_the_whole_package(context):
    assert (context / "models" / "tiny" / MANIFEST).is_file()
    shipped = {path.relative_to(context / "app") for path in (context / "app").rglob("*") if path.is_file()}
    package = {path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py")}
    assert package <= shipped
    assert Path("s4mil_monai/outputs/report.html.j2") in shipped


def test_application_runs_from_what_the_context_holds_and_writes_nothing_into_it(context, white_slide, tmp_path):
    """As the image starts it: its folder alone, another place to be in, paths from the environment."""
    for name in ("input", "output", "work", "elsewhere"):
        (tmp_path / name).mkdir()
    shutil.copy(white_slide, tmp_path / "input")
    before = sorted(context.rglob("*"))
    environment = {
        "HOLOSCAN_INPUT_PATH": str(tmp_path / "input"),
        "HOLOSCAN_OUTPUT_PATH": str(tmp_path / "output"),
        "HOLOSCAN_MODEL_PATH": str(context / "models"),
        "HOLOSCAN_WORKDIR": str(tmp_path / "work"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # without the editable install of this checkout
    program = ("-c", PROGRAM.format(root=str(ROOT), app=str(context / "app")))
    ran = run_app(program=program, environment=environment, cwd=tmp_path / "elsewhere")
    assert str(context / "app" / "s4mil_monai") in ran.stdout
    assert ran.returncode == 3, ran.stderr  # there is no tissue on it
    slides, _ = rows_of(tmp_path / "output")
    assert slides["white.tif"]["status"] == "no_tissue"
    assert {path.name for path in (tmp_path / "output" / "white").iterdir()} == WHOLE - {"features.h5"}
    assert sorted(context.rglob("*")) == before
    assert list((tmp_path / "work").iterdir()) == []


PROGRAM = """
import runpy, sys
sys.path[:] = [path for path in sys.path if path not in ("", {root!r})]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.argv = [{app!r}]
sys.path.insert(0, {app!r})
import s4mil_monai
print(s4mil_monai.__file__, flush=True)
runpy.run_path({app!r}, run_name="__main__")
"""


def test_plain_dockerfile_is_sound():
    file = ROOT / "deploy" / "Dockerfile"
    hadolint = Path(sys.executable).parent / "hadolint"
    found = subprocess.run([str(hadolint), str(file)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("#", " "))]
    assert "USER 1000" in lines
    assert [line.split()[0] for line in lines if line.startswith("HEALTHCHECK")] == ["HEALTHCHECK"]
    for source in re.findall(r"^COPY (\S+) ", file.read_text(), re.MULTILINE):
        assert (ROOT / source).exists()


@pytest.mark.slow
def test_image_is_built_where_docker_runs(context):
    if not docker_works():
        pytest.skip("Docker, or its buildx plugin, does not run here")
    settings = {"UNAME": "holoscan", "UID": "1000", "GID": "1000", "GPU_TYPE": "dgpu"}
    given = [part for name, value in settings.items() for part in ("--build-arg", f"{name}={value}")]
    command = ["docker", "buildx", "build", *given, "--load", "--tag", "s4mil-test", str(context)]
    assert subprocess.run(command, check=False).returncode == 0
