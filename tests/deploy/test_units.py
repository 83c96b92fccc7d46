"""The systemd units and Kubernetes manifests, read by the tools that would read them at a site."""

from __future__ import annotations

import configparser
import copy
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError

from s4mil_monai.cli.main import COMMANDS
from s4mil_monai.cli.usage import check_usage, find_command

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SYSTEMD, K8S = DEPLOY / "systemd", DEPLOY / "k8s"
HARDENING = "s4mil-.service.d/10-hardening.conf"
UNITS = sorted(path.name for path in SYSTEMD.iterdir() if path.suffix in (".service", ".timer"))
SERVICES = [name for name in UNITS if name.endswith(".service")]
MANIFESTS = sorted(path.name for path in K8S.glob("*.yaml") if path.name != "kustomization.yaml")

TARGETS = "basic local-fs multi-user network-online remote-fs shutdown sysinit time-sync timers"
PROGRAMS = ("opt/s4mil/bin/s4mil", "etc/s4mil/on-failure", "bin/sh")


# systemd


@pytest.fixture
def machine(tmp_path):
    """The root of a machine on which the units are installed; its programs do nothing."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    units = tmp_path / "etc/systemd/system"
    shutil.copytree(SYSTEMD, units)
    for target in TARGETS.split():
        (units / f"{target}.target").write_text(f"[Unit]\nDescription={target}\n")
    for program in PROGRAMS:
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    return tmp_path


def analyze(machine, *arguments):
    command = ["systemd-analyze", *arguments[:1], f"--root={machine}", *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def verify(machine, *names):
    """Everything systemd has to say about some units; unknown keys are only warned about, with exit code 0."""
    files = [str(machine / "etc/systemd/system" / name.replace("@.", "@s4mil-batch.service.")) for name in names]
    done = analyze(machine, "verify", "--man=no", *files)
    return done.stdout + done.stderr


def test_systemd_finds_nothing_to_say_about_the_units(machine):
    assert len(UNITS) == 6
    assert verify(machine, *UNITS) == ""


@pytest.mark.parametrize("name", ["s4mil-batch.service", "s4mil-batch.timer", HARDENING])
def test_an_unknown_key_in_a_unit_is_reported(machine, name):
    with (machine / "etc/systemd/system" / name).open("a") as file:
        file.write("Bogus=1\n")
    assert "Unknown key 'Bogus'" in verify(machine, *UNITS)


def test_a_program_that_is_not_where_a_unit_says_is_reported(machine):
    (machine / "opt/s4mil/bin/s4mil").unlink()
    assert "/opt/s4mil/bin/s4mil is not executable" in verify(machine, *UNITS)


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_exposed_no_more_than_it_has_to_be(machine, name):
    name = name.replace("@.", "@x.")
    hardened = analyze(machine, "security", "--offline=true", "--threshold=20", name)
    assert hardened.returncode == 0, hardened.stdout
    shutil.rmtree(machine / "etc/systemd/system/s4mil-.service.d")
    bare = analyze(machine, "security", "--offline=true", "--threshold=20", name)
    assert bare.returncode != 0


def test_the_user_of_the_units_is_made(tmp_path):
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("systemd-sysusers is not installed")
    (tmp_path / "etc").mkdir()
    command = ["systemd-sysusers", f"--root={tmp_path}", str(SYSTEMD / "s4mil.sysusers")]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    passwd = (tmp_path / "etc/passwd").read_text()
    assert re.search(r"^s4mil:x:\d+:\d+:s4mil batch:/var/lib/s4mil:/usr/sbin/nologin$", passwd, re.M)
    assert "User=s4mil\nGroup=s4mil\n" in (SYSTEMD / HARDENING).read_text()


def unit(name):
    """A unit's keys, by section."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read(SYSTEMD / name)
    return parser


def test_a_run_that_is_told_to_stop_has_time_to_hand_back_and_its_readers_are_left_to_it():
    for name in ("s4mil-batch.service", "s4mil-batch-always.service"):
        service = unit(name)["Service"]
        assert (service["KillSignal"], service["KillMode"], service["TimeoutStopSec"]) == (
            "SIGTERM",
            "mixed",
            "30",
        )


def test_status_3_which_a_batch_never_leaves_with_means_nothing_to_the_units():
    success = {name: unit(name)["Service"].get("SuccessExitStatus", "").split() for name in SERVICES}
    assert not {name for name, codes in success.items() if "3" in codes}
    [cronjob] = documents("cronjob.yaml")
    policy = cronjob["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]
    assert policy["rules"][0]["onExitCodes"]["values"] == [1, 2]
    assert unit("s4mil-batch-always.service")["Service"]["RestartPreventExitStatus"] == "2"  # see test_reports.py


def test_timer_and_standing_service_exclude_each_other():
    assert unit("s4mil-batch-always.service")["Unit"]["Conflicts"] == "s4mil-batch.timer s4mil-batch.service"


@pytest.mark.parametrize(("code", "content"), [(0, "s4mil_waiting 3\n"), (1, "before\n")])
def test_metrics_replace_what_is_there_when_whole_and_stay_when_the_command_fails(tmp_path, code, content):
    (tmp_path / "s4mil.prom").write_text("before\n")
    command = tmp_path / "s4mil"
    command.write_text(f"#!/bin/sh\necho s4mil_waiting 3\nexit {code}\n")
    command.chmod(0o755)
    shell = unit("s4mil-batch-metrics.service")["Service"]["ExecStart"].replace(
        "/opt/s4mil/bin/s4mil", str(command)
    )
    done = subprocess.run(shlex.split(shell), cwd=tmp_path, check=False, timeout=300)
    assert done.returncode == code
    assert (tmp_path / "s4mil.prom").read_text() == content
    if code == 0:
        assert (tmp_path / "s4mil.prom").stat().st_mode & 0o777 == 0o644  # node_exporter is another user


# Kubernetes


def documents(*names):
    return [document for name in names for document in yaml.safe_load_all((K8S / name).read_text())]


def validate(document):
    tool = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    tool.validate(document, tool.latest_version(), strict=True)


def pod_of(document):
    spec = document["spec"]
    return (spec["jobTemplate"]["spec"] if document["kind"] == "CronJob" else spec)["template"]["spec"]


WORKLOADS = documents("cronjob.yaml", "always.yaml")


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_document_is_what_kubernetes_takes(name):
    for document in documents(name):
        validate(document)


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_unknown_key_in_a_manifest_is_reported(name):
    for document in documents(name):
        with pytest.raises(ValidationError, match="bogus"):
            validate({**document, "bogus": 1})


@pytest.mark.parametrize("document", WORKLOADS, ids=["cronjob", "always"])
def test_an_unknown_key_of_a_container_is_reported(document):
    copied = copy.deepcopy(document)
    pod_of(copied)["containers"][0]["securityContext"]["bogus"] = True
    with pytest.raises(ValidationError, match="bogus"):
        validate(copied)


def test_kustomization_takes_every_manifest_and_one_of_the_two_ways_to_run():
    taken = yaml.safe_load((K8S / "kustomization.yaml").read_text())["resources"]
    assert sorted([*taken, "always.yaml"]) == MANIFESTS


def test_kubectl_builds_the_kustomization():
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(K8S)]
    built = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    kinds = [document["kind"] for document in yaml.safe_load_all(built)]
    assert kinds.count("PersistentVolumeClaim") == 3
    assert {"Namespace", "ConfigMap", "NetworkPolicy", "CronJob"} < set(kinds)


def test_both_ways_to_run_are_the_same_pod_but_for_the_command():
    cronjob, always = (pod_of(document) for document in documents("cronjob.yaml", "always.yaml"))
    assert cronjob.pop("restartPolicy") == "Never"
    assert always["containers"][0]["command"] == [*cronjob["containers"][0].pop("command"), "--every", "10m"]
    del always["containers"][0]["command"]
    assert cronjob == always


@pytest.mark.parametrize("document", WORKLOADS, ids=["cronjob", "always"])
def test_pods_are_what_the_restricted_profile_of_the_namespace_lets_in(document):
    [namespace] = documents("namespace.yaml")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod, [container] = pod_of(document), pod_of(document)["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostPath"} & {key for volume in pod["volumes"] for key in volume}


@pytest.mark.parametrize("document", WORKLOADS, ids=["cronjob", "always"])
def test_what_a_pod_mounts_exists_and_slides_are_only_read(document):
    pod, [container] = pod_of(document), pod_of(document)["containers"]
    claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert [each["claimName"] for each in claims] == [
        each["metadata"]["name"] for each in documents("storage.yaml")
    ]
    [site] = documents("site.yaml")
    maps = [volume["configMap"] for volume in pod["volumes"] if "configMap" in volume]
    assert maps == [{"name": site["metadata"]["name"]}]
    mounts = {mount["name"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert [name for name, read_only in mounts.items() if not read_only] == ["results", "tmp", "shm"]


# Both


def commands():
    """Every call of s4mil in units and manifests, as its arguments."""
    calls = []
    for name in SERVICES:
        line = unit(name)["Service"]["ExecStart"]
        calls += [shlex.split(call) for call in re.findall(r"/opt/s4mil/bin/s4mil ([^>&|;']+)", line)]
    for document in documents("cronjob.yaml", "always.yaml"):
        command = pod_of(document)["containers"][0]["command"]
        assert command[:3] == ["python3", "-m", "s4mil_monai"]
        calls.append(command[3:])
    return calls


def test_every_call_names_the_same_configuration():
    assert [call[call.index("--config") + 1] for call in commands()] == ["/etc/s4mil/site.yaml"] * 5
    [site] = documents("site.yaml")
    assert list(site["data"]) == ["site.yaml"]


@pytest.mark.parametrize("call", commands(), ids=" ".join)
def test_every_call_is_one_that_the_command_line_takes(call):
    name, rest = find_command(COMMANDS, call)
    check_usage(name, COMMANDS[name], rest)
