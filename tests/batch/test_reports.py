"""What is told of published slides: verify, export, metrics, reference, status, history. One run serves all."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from s4mil_monai.checksum import sha256_of
from s4mil_monai.cli.main import main
from s4mil_monai.models.manifest import write_manifest
from s4mil_monai.models.seal import seal_bundle
from s4mil_monai.processes import name_machine
from tests.batch.small_site import SmallSite

TABLE = "slide,scanner,mpp\nelsewhere.svs,,0.25\n"


@pytest.fixture(scope="module")
def scored(tmp_path_factory, sealed_bundle):
    """A site after a night: three slides, one of which is none, scored with features kept."""
    site = SmallSite(tmp_path_factory.mktemp("site"), sealed_bundle)
    (site.folder / "mpp.csv").write_text(TABLE)
    site.configure(tries=1, features="features", resolutions="mpp.csv")
    for seed in (1, 2):
        site.scan(f"Müller {seed}.tif", seed=seed)
    (site.share / "bad.svs").write_bytes(b"no slide")
    done = site.call("run")
    assert done.returncode == 1, done.stderr
    assert "ller" not in done.stderr, "names of files, which may be those of patients, are in no log"
    return site


@pytest.fixture
def copy(scored, tmp_path):
    """The same site, to be spoilt."""
    shutil.copytree(scored.folder, tmp_path / "site")
    return SmallSite(tmp_path / "site", scored.bundle)


def command(capsys, *arguments):
    """Exit code and output of ``s4mil …`` in this process."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def config(site):
    return f"--config={site.file}"


def test_an_untouched_site_verifies_and_names_the_end_of_its_chain(scored, capsys):
    head = json.loads(next(scored.out.glob("runs/*/run.json")).read_text())["provenance_head"]
    assert command(capsys, "verify", config(scored), f"--head={head}") == (
        0,
        f"2 results are as they were recorded; the chain ends with {head}\n",
        "",
    )


def change_picture(site):
    file = next(site.out.glob("results/*/*/heatmap.png"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return "heatmap.png: was changed"


def remove_file(site):
    next(site.out.glob("results/*/*/report.html")).unlink()
    return "report.html: is missing"


def remove_result(site):
    shutil.rmtree(next(site.out.glob("results/*/*")))
    return "the result is gone"


def add_file(site):
    (next(site.out.glob("results/*/*")) / "second opinion.txt").write_text("negative")
    return "second opinion.txt: was not there when the result was recorded"


def add_result(site):
    found = next(site.out.glob("results/*/*"))
    shutil.copytree(found, found.with_name("tiny-1.0-00000000"))
    return "tiny-1.0-00000000: is in no record"


def change_sums_with_the_file(site):
    folder = next(site.out.glob("results/*/*"))
    (folder / "report.html").write_text("negative")
    write_manifest(folder)
    return "report.html: was changed"


def change_record(site):
    sql(site, "UPDATE provenance SET record = replace(record, '\"scored\"', '\"rejected\"') WHERE number = 1")
    return "record 1: was changed"


def remove_last_record(site):
    sql(site, "DELETE FROM provenance WHERE number = 2")
    return "record 1: is the last there is, but the chain ended with record 2"


def remove_first_record(site):
    sql(site, "DELETE FROM provenance WHERE number = 1")
    return "record 2: comes after record 0"


def swap_records(site):
    sql(site, "UPDATE provenance SET number = number + 10", "UPDATE provenance SET number = 13 - number")
    return "does not hold the hash of the record before it"


def sql(site, *statements):
    with sqlite3.connect(site.out / "ledger.sqlite") as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0


@pytest.mark.parametrize(
    "spoil",
    [
        change_picture,
        remove_file,
        remove_result,
        add_file,
        add_result,
        change_sums_with_the_file,
        change_record,
        remove_last_record,
        remove_first_record,
        swap_records,
    ],
)
def test_verify_finds(copy, capsys, spoil):
    said = spoil(copy)
    code, out, err = command(capsys, "verify", config(copy))
    assert (code, out) == (1, "")
    assert said in err
    assert "Traceback" not in err


def test_verify_finds_a_ledger_that_was_put_back_to_an_old_copy(copy, capsys):
    head = json.loads(next(copy.out.glob("runs/*/run.json")).read_text())["provenance_head"]
    sql(
        copy,
        "DELETE FROM provenance WHERE number = 2",
        "UPDATE chain SET number = 1, hash = (SELECT hash FROM provenance)",
    )
    code, _, err = command(capsys, "verify", config(copy), f"--head={head}")
    assert code == 1
    assert f"does not contain {head[:12]}" in err
    assert command(capsys, "verify", config(copy), "--head=abc")[0] == 2


def test_record_says_what_a_result_depends_on(scored):
    facts = json.loads(next(scored.out.glob("results/*/*/provenance.json")).read_text())
    result = json.loads(next(scored.out.glob("results/*/*/result.json")).read_text())
    assert facts["slide"]["mpp"] == 0.5
    assert facts["slide"]["mpp_source"] == "tiff"
    assert facts["slide"]["backend"] == result["slide"]["backend"]
    assert facts["patches"] == 12
    # of 12 corners (x, y), row by row: (256, 256), (512, 256), … (1024, 768)
    corners = [(x, y) for y in (256, 512, 768) for x in (256, 512, 768, 1024)]
    assert facts["patch_order"] == hashlib.sha256(np.array(corners, "<i8").tobytes()).hexdigest()
    assert facts["encoder"]["name"] == "efficientnet_lite0"
    assert facts["model"]["sha256"] == result["model"]["sha256"]
    assert facts["config"] == hashlib.sha256(scored.file.read_bytes()).hexdigest()
    assert facts["bundle"] == sha256_of(scored.bundle / "SHA256SUMS")
    assert facts["tables"] == {"resolutions": hashlib.sha256(TABLE.encode()).hexdigest()}
    assert facts["machine"] == name_machine()
    assert facts["software"]["torch"].startswith("2.")
    assert facts["measures"]["patches"] == 12
    assert sorted(facts["outputs"]) == [
        "features.h5",
        "heatmap.png",
        "regions.geojson",
        "report.html",
        "result.json",
    ]
    assert "Müller" not in json.dumps(facts["slide"], ensure_ascii=False)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_export_has_a_row_for_every_job(scored, capsys, tmp_path, ending):
    file = tmp_path / f"jobs.{ending}"
    code, out, _ = command(capsys, "batch", "export", config(scored), f"--out={file}")
    assert (code, out) == (0, f"3 jobs in {file}\n")
    table = pd.read_csv(file) if ending == "csv" else pd.read_parquet(file)
    assert sorted(table["state"]) == ["published", "published", "quarantined"]
    assert set(table["name"]) == {"Müller 1.tif", "Müller 2.tif", "bad.svs"}
    assert table.loc[table["state"] == "published", "probability"].between(0.5, 1).all()


def test_export_to_an_unknown_format_is_wrong_use(scored, capsys):
    code, _, err = command(capsys, "batch", "export", config(scored), "--out=jobs.xlsx")
    assert (code, err) == (2, "s4mil: --out ends with .csv or .parquet, got jobs.xlsx\n")


def test_metrics_are_what_prometheus_reads(scored, capsys):
    code, out, err = command(capsys, "batch", "metrics", config(scored))
    assert (code, err) == (0, "")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(out)
        for sample in family.samples
    }
    assert samples["s4mil_jobs", "published"] == 2
    assert samples["s4mil_jobs", "quarantined"] == 1
    assert samples["s4mil_slides_scored_total",] == 2
    assert samples["s4mil_slides_published_total", "none"] == 2
    assert samples["s4mil_slide_failures_total", "UnreadableSlideError"] == 1
    assert samples["s4mil_stage_seconds_count", "encoding"] == 2
    assert samples["s4mil_last_run_exit_status",] == 1
    assert samples["s4mil_drift_verdict", "no_reference"] == 1
    assert "Müller" not in out


def test_metrics_come_while_share_and_model_are_away_and_hash_no_model(copy, capsys):
    shutil.rmtree(copy.share)
    bundle = shutil.copytree(copy.bundle, copy.folder / "bundle")
    next((bundle / "models").glob("*.pt")).write_bytes(b"not the weights")
    settings = yaml.safe_load(copy.file.read_text())
    copy.file.write_text(yaml.safe_dump({**settings, "bundle": str(bundle)}))
    code, out, err = command(capsys, "batch", "metrics", config(copy))
    assert (code, err) == (0, "")
    assert 's4mil_jobs{state="published"} 2.0' in out


def test_jobs_of_an_earlier_model_are_told_apart_and_wait_for_nobody(copy, capsys):
    sql(copy, "UPDATE jobs SET model = 'before', state = 'waiting', found_at = 0 WHERE name = 'bad.svs'")
    _, out, _ = command(capsys, "batch", "metrics", config(copy))
    assert 's4mil_jobs{state="waiting"} 0.0' in out
    assert 's4mil_earlier_jobs{state="waiting"} 1.0' in out
    assert "s4mil_oldest_waiting_seconds " not in out
    _, out, _ = command(capsys, "batch", "status", config(copy))
    assert "waiting            0" in out
    assert "of earlier models or settings, which no run scores: 1 waiting\n" in out


def test_status_counts_all_jobs_where_the_bundle_is_away(copy, capsys):
    settings = yaml.safe_load(copy.file.read_text())
    copy.file.write_text(yaml.safe_dump({**settings, "bundle": "gone"}))
    code, out, err = command(capsys, "batch", "status", config(copy))
    assert (code, "published          2" in out, err.count("\n")) == (0, True, 1)
    assert "jobs of all models are counted" in err


def test_a_reference_is_not_written_into_the_bundle_that_is_shipped(copy, capsys):
    settings = yaml.safe_load(copy.file.read_text())
    del settings["bundle"]
    copy.file.write_text(yaml.safe_dump(settings))
    code, _, err = command(capsys, "batch", "reference", config(copy), "--slides=2")
    assert (code, err.count("\n")) == (2, 1)
    assert "bundle: names none" in err


def test_names_of_files_are_spelled_out_on_the_terminal(copy, capsys):
    sql(copy, "UPDATE jobs SET name = 'bad' || char(10) || char(27) || '[2J.svs' WHERE name = 'bad.svs'")
    for arguments in (("status",), ("quarantine",), ("status", "--state=quarantined"), ("retry", "--all")):
        _, out, _ = command(capsys, "batch", *arguments, config(copy))
        assert "bad\\n\\x1b[2J.svs" in out
        assert "\x1b" not in out


def test_a_reference_needs_more_slides_than_two(scored, capsys):
    code, _, err = command(capsys, "batch", "reference", config(scored))
    assert code == 1
    assert "needs 30 scored slides, found 2" in err


def test_status_tells_states_troubles_and_the_last_run(scored, capsys):
    code, out, _ = command(capsys, "batch", "status", config(scored))
    assert code == 0
    assert "published          2  The result is in its folder" in out
    assert "bad.svs" in out
    assert "with exit code 1" in out
    code, out, _ = command(capsys, "batch", "status", config(scored), "--slide=Müller 1.tif")
    assert [line.split("  ")[2] for line in out.splitlines()[1:]] == [
        *("new → waiting", "waiting → running", "running → publishing", "publishing → published"),
    ]


def test_unknown_states_and_slides_are_told_in_one_line(scored, capsys):
    code, _, err = command(capsys, "batch", "status", config(scored), "--state=lost")
    assert (code, err.count("\n")) == (2, 1)
    assert "known: waiting, running" in err
    assert command(capsys, "batch", "retry", config(scored), "--slide=nobody.svs")[0] == 1
    assert command(capsys, "batch", "retry", config(scored))[0] == 2


def test_a_slide_can_be_set_aside_and_tried_again_by_hand(copy, capsys):
    assert command(capsys, "batch", "retry", config(copy), "--all")[0] == 0
    code, out, _ = command(capsys, "batch", "quarantine", config(copy), "--slide=bad.svs", "--reason=asked Dr X")
    assert (code, "asked Dr X" in out) == (0, True)
    assert "asked Dr X" in command(capsys, "batch", "quarantine", config(copy))[1]


@pytest.mark.parametrize("arguments", [("batch", "status"), ("batch", "reference"), ("verify",)])
def test_wrong_settings_leave_with_2_which_units_do_not_start_again(site, capsys, arguments):
    site.configure(tries=0)
    code, out, err = command(capsys, *arguments, config(site))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "tries: Input should be greater than or equal to 1" in err


def test_before_the_first_run_there_is_no_ledger(site, capsys):
    code, _, err = command(capsys, "batch", "status", config(site))
    assert (code, err.count("\n")) == (1, 1)
    assert "there is no ledger yet; `s4mil batch run` makes it" in err
    assert not site.out.exists()


def test_another_model_scores_anew_from_kept_features_and_old_results_stay(copy):
    """A new version of the slide model with the same encoder: the encoder is not asked again."""
    bundle = shutil.copytree(copy.bundle, copy.folder / "newer")
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    state = {name: value * 1.5 if "classify" in name or "head" in name else value for name, value in state.items()}
    torch.save(state, bundle / "models" / "model.pt")
    metadata["version"] = "2.0"
    metadata["s4mil"]["weights"]["sha256"] = sha256_of(bundle / "models" / "model.pt")
    (bundle / "configs" / "metadata.json").write_text(json.dumps(metadata))
    seal_bundle(bundle)
    copy.configure(tries=1, features="features", bundle=str(bundle))
    done = copy.call("run")
    assert "2 published" in done.stdout, done.stderr
    results = sorted(copy.out.glob("results/*/*/result.json"))
    assert len(results) == 4
    by_version = {"1.0": [], "2.0": []}
    for file in results:
        result = json.loads(file.read_text())
        by_version[result["model"]["version"]].append(result)
    assert all("encoding" in result["seconds"] for result in by_version["1.0"])
    assert not any("encoding" in result["seconds"] for result in by_version["2.0"])
    assert {str(result["logits"]) for result in by_version["1.0"]}.isdisjoint(
        {str(result["logits"]) for result in by_version["2.0"]}
    )
