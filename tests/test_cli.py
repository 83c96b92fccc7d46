"""The command line: one line for whoever runs it, an exit code for whatever runs it."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
from PIL import Image

from s4mil_monai.cli.console import EXIT_NO_SCORE, ProgressBar
from s4mil_monai.cli.main import COMMANDS, main
from s4mil_monai.features.store import load_bag
from s4mil_monai.outputs.tissue_picture import PATCH, TISSUE
from s4mil_monai.result import read_result
from s4mil_monai.scoring import load_scorer, score_to_folder


@pytest.fixture
def s4mil(capfd, monkeypatch, tmp_path):
    """Run the command in this process; gives exit code, lines out, lines of complaint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("s4mil_monai.allocator.keep_large_buffers", lambda: None)

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out, complaint = capfd.readouterr()
        return left.value.code, out.splitlines(), complaint.splitlines()

    return run


def test_slide_is_scored_and_what_to_open_is_said(s4mil, tissue_slide, bundle, tmp_path):
    code, out, complaint = s4mil("score", tissue_slide, "--bundle", bundle, "--out", tmp_path / "o")
    assert (code, complaint) == (0, [])
    assert out[0].startswith("tissue.tif: ")
    assert out[-1] == f"open {tmp_path / 'o' / 'tissue' / 'report.html'}"


def test_slide_is_scored_with_objects_for_the_pacs(s4mil, tissue_slide, bundle, tmp_path):
    (tmp_path / "studies.csv").write_text("slide,patient_id,accession_number\ntissue.tif,P7,A7\n")
    options = ("--dicom", "--studies", tmp_path / "studies.csv")
    code, _, complaint = s4mil("score", tissue_slide, *options, "--bundle", bundle, "--out", tmp_path / "o")
    assert (code, complaint) == (0, [])
    assert {path.name for path in (tmp_path / "o" / "tissue").iterdir()} >= {"dicom", "fhir.json"}
    report = pydicom.dcmread(tmp_path / "o" / "tissue" / "dicom" / "report.dcm")
    assert (report.PatientID, report.AccessionNumber) == ("P7", "A7")


def test_slide_is_embedded_into_one_file(s4mil, tissue_slide, tmp_path):
    code, out, _ = s4mil("embed", tissue_slide, "--out", tmp_path / "features", "--runtime", "torch")
    assert code == 0
    assert [line.split(" of ")[0] for line in out] == ["tissue.tif: warn: only 0.2 mm²", "tissue.tif: 12 patches"]
    assert out[-1] == f"tissue.tif: 12 patches of 1280 features in {tmp_path}/features/tissue.h5"


def test_inspection_says_and_draws_what_would_be_read(s4mil, tissue_slide, tmp_path):
    code, out, complaint = s4mil("inspect", tissue_slide, "--out", tmp_path / "look", "--encoder", "none")
    assert (code, complaint) == (0, [])
    said = "\n".join(out)
    assert "resolution   0.5 µm/px, from tiff" in said
    assert "level 1      768 x 640 px, downsample 2.0000" in said
    assert "patches      12 of 256 px at 0.5 µm/px, row_major, read as 256 px of level 0" in said
    assert out[-1] == f"open {tmp_path / 'look' / 'tissue.png'}"
    facts = json.loads((tmp_path / "look" / "tissue.json").read_text())
    assert (facts["grid"]["patches"], facts["mpp"], facts["quality"]["verdict"]) == (12, 0.5, "warn")
    with Image.open(tmp_path / "look" / "tissue.png") as picture:
        colours = {tuple(rgb) for _, rgb in picture.getcolors(1 << 24)}
    assert {TISSUE, PATCH} <= colours


def test_inspection_estimates_the_time_from_a_few_patches(s4mil, tissue_slide):
    _, out, _ = s4mil("inspect", tissue_slide)
    assert [line for line in out if line.startswith("  estimated") and "efficientnet_lite0 on cpu" in line]


def test_inspection_of_a_slide_that_would_be_refused_shows_what_is_known(s4mil, tissue_slide):
    code, out, complaint = s4mil("inspect", tissue_slide, "--mpp", "0.1", "--encoder", "none")
    assert code == 1
    assert "  resolution   0.5 µm/px, from tiff" in out
    assert "the model wants 0.1 µm/px" in complaint[0]


def test_resolutions_of_the_site_win_over_the_file(s4mil, tissue_slide, tmp_path):
    (tmp_path / "site.csv").write_text("slide,scanner,mpp\ntissue.tif,,0.48\n")
    _, out, _ = s4mil("inspect", tissue_slide, "--resolutions", tmp_path / "site.csv", "--encoder", "none")
    assert "  resolution   0.48 µm/px, from override:slide" in out


def test_features_are_verified_and_a_changed_byte_is_found(s4mil, tissue_slide, tmp_path):
    s4mil("embed", tissue_slide, "--out", tmp_path / "features", "--runtime", "torch")
    assert s4mil("features", "verify", tmp_path / "features") == (
        0,
        [f"{tmp_path}/features: 1 feature files, nothing wrong"],
        [],
    )
    file = tmp_path / "features" / "tissue.h5"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, out, complaint = s4mil("features", "verify", tmp_path / "features")
    assert (code, out) == (1, [])
    assert complaint[0].startswith(f"s4mil: {file}: ")


def test_a_folder_without_feature_files_is_not_found_to_be_in_order(s4mil, tmp_path):
    (tmp_path / "empty").mkdir()
    code, out, complaint = s4mil("features", "verify", tmp_path / "empty")
    assert (code, out, complaint) == (1, [], [f"s4mil: {tmp_path}/empty: holds no feature files"])


@pytest.mark.parametrize("command", ["score", "inspect"])
def test_a_folder_of_several_slides_is_refused_though_one_of_them_is_dicom(
    s4mil, command, tissue_slide, dicom_slide, tmp_path
):
    folder = tmp_path / "slides"
    shutil.copytree(dicom_slide, folder)
    for name in ("a.svs", "b.tif"):
        shutil.copy(tissue_slide, folder / name)
    code, out, complaint = s4mil(command, folder)
    advice = f"{command} takes one: name the file, or use `s4mil batch run`"
    assert (code, out, complaint) == (2, [], [f"s4mil: {folder}: holds 3 slides; {advice}"])


def test_a_folder_with_one_dicom_slide_is_that_slide_and_one_with_another_file_is_none(
    s4mil, tissue_slide, dicom_slide, tmp_path
):
    assert s4mil("inspect", dicom_slide, "--encoder", "none")[0] == 0
    (tmp_path / "slides").mkdir()
    shutil.copy(tissue_slide, tmp_path / "slides" / "a.tif")
    code, _, complaint = s4mil("inspect", tmp_path / "slides")
    assert code == 2
    assert complaint[0].endswith(f"slides: is no slide but holds one; name it: {tmp_path}/slides/a.tif")


def test_inspection_of_a_slide_without_tissue_leaves_as_score_does(s4mil, white_slide):
    code, _, complaint = s4mil("inspect", white_slide, "--encoder", "none")
    assert (code, len(complaint)) == (EXIT_NO_SCORE, 1)


def test_inspection_takes_the_weights_that_the_encoder_lacks(s4mil, tissue_slide):
    options = ("--encoder", "resnet50_block3", "--encoder_weights", "gone.pt")
    code, _, complaint = s4mil("inspect", tissue_slide, *options)
    assert (code, complaint) == (1, ["s4mil: gone.pt: there is no such weights file"])


def test_features_of_clam_are_taken_over(s4mil, tmp_path):
    features, corners = np.random.default_rng(0).normal(size=(6, 8)), [[256 * i, 0] for i in range(6)]
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"] = features.astype(np.float32)
        file["coords"] = np.array(corners)
    code, out, _ = s4mil("features", "import", tmp_path / "clam.h5", "--out", tmp_path / "ours.h5")
    assert (code, len(out)) == (0, 1)
    bag = load_bag(tmp_path / "ours.h5")
    np.testing.assert_allclose(bag.features, features, atol=1e-6)
    assert bag.top_left_px0.tolist() == corners


def test_white_slide_leaves_with_its_own_code_and_a_result(s4mil, white_slide, bundle, tmp_path):
    code, _, complaint = s4mil("score", white_slide, "--bundle", bundle, "--out", tmp_path)
    assert code == EXIT_NO_SCORE
    assert complaint[0].startswith("s4mil: white.tif: no score, no tissue found")
    assert (tmp_path / "white" / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["score", "nowhere.svs"], 2, "nowhere.svs: there is no such slide"),
        (["score"], 2, "score needs SLIDE"),
        (["score", "a", "b"], 2, "score takes 1 argument(s), got also 'b'"),
        (["score", "SLIDE", "--ignore_quality", "no"], 2, "--ignore_quality takes no value, got 'no'"),
        (["score", "SLIDE", "--ignore_quality=perhaps"], 2, "--ignore_quality takes no value, got 'perhaps'"),
        (["score", "SLIDE", "--dicom", "yes"], 2, "--dicom takes no value, got 'yes'"),
        (["pacs", "http://127.0.0.1:9", "--retry_failed", "0"], 2, "--retry_failed takes no value, got '0'"),
        (["batch", "retry", "--config", "x.yaml", "--all", "1"], 2, "--all takes no value, got '1'"),
        (["score", "SLIDE", "--out"], 2, "--out needs a value"),
        (["score", "SLIDE", "-o"], 2, "--out needs a value"),
        (["score", "SLIDE", "--out="], 2, "--out needs a value"),
        (["score", "SLIDE", "--out", "--dicom"], 2, "--out needs a value"),
        (["score", "SLIDE", "--assume_mpp"], 2, "--assume_mpp needs a value"),
        (["batch", "run", "--config"], 2, "--config needs a value"),
        (["score", "SLIDE", "--batch_size", "2.5"], 2, "--batch_size is a whole number, got '2.5'"),
        (["score", "SLIDE", "--batch_size", "0"], 2, "--batch_size is a positive number, got 0"),
        (["score", "SLIDE", "--batch_size", "9" * 30], 2, "--batch_size is a whole number up to 2147483647"),
        (["embed", "SLIDE", "--batch_size", "2.5"], 2, "--batch_size is a whole number, got '2.5'"),
        (["embed", "SLIDE", "--overlap_px", "1.5"], 2, "--overlap_px is a whole number, got '1.5'"),
        (["embed", "SLIDE", "--overlap_px", "-1"], 2, "--overlap_px is at least 0 and less than 256, got -1"),
        (["inspect", "SLIDE", "--side_px", "256.5"], 2, "--side_px is a whole number, got '256.5'"),
        (["inspect", "SLIDE", "--side_px", "8"], 2, "--side_px is at least 16, got 8"),
        (["experiment", "x.yaml", "--workers", "1.5"], 2, "--workers is a whole number, got '1.5'"),
        (["experiment", "x.yaml", "--workers", "many"], 2, "--workers is a whole number, got 'many'"),
        (["pacs", "http://127.0.0.1:9", "--batch_size", "2.5"], 2, "--batch_size is a whole number"),
        (["batch", "reference", "--config", "x.yaml", "--slides", "2.5"], 2, "--slides is a whole number"),
        (
            ["features", "import", "x.pt", "--out", "y.h5", "--patch_side_px", "2.5"],
            2,
            "--patch_side_px is a whole number",
        ),
        (
            ["calibrate", "x.csv", "--bundle", "b", "--model", "m", "--seed", "0.5"],
            2,
            "--seed is a whole number",
        ),
        (["--bogus"], 2, "unknown option --bogus; see s4mil --help"),
        (["-x", "score"], 2, "unknown option -x; see s4mil --help"),
        (["score", "SLIDE", "--aggregator_runtime", "foo"], 2, "unknown aggregator runtime 'foo'; known: auto"),
        (["embed", "SLIDE", "--runtime", "foo"], 2, "unknown encoder runtime 'foo'; known: torch"),
        (["embed", "SLIDE", "--encoder", "nope"], 2, "unknown encoder 'nope'; known: resnet50_block3"),
        (["socre", "a"], 2, "unknown command 'socre'; known: score, inspect, embed, features verify"),
        (["features", "vrefy"], 2, "unknown command 'features vrefy'; known: features verify, features import"),
        (["inspect", "SLIDE", "--overlap_px", "256"], 2, "--overlap_px is at least 0 and less than 256, got 256"),
        (["embed", "SLIDE", "--resolutions", "gone.csv"], 1, "gone.csv: "),
        (["features", "verify", "nowhere"], 1, "nowhere: there is no such folder"),
        (["features", "import", "x.pt", "--out", "y.pt"], 2, "--out is an .h5 file, got y.pt"),
        (
            ["score", "SLIDE", "--ouput", "x"],
            2,
            "unknown option --ouput; did you mean --out? known: --slide, --out",
        ),
        (["score", "SLIDE", "--assume_mpp", "fast"], 2, "--assume_mpp is a positive number, got 'fast'"),
        (["score", "SLIDE", "--assume_mpp=-1"], 2, "--assume_mpp is a positive number, got -1"),
        (
            ["score", "SLIDE", "--encoder", "vgg"],
            2,
            "unknown encoder 'vgg'; known: resnet50_block3, efficientnet_lite0",
        ),
        (["score", "SLIDE", "--patch_stage", "cv"], 2, "unknown patch stage 'cv'; known: torch, dali, auto"),
        (["pacs", "pacs.hospital"], 2, "URL begins with http:// or https://, got pacs.hospital"),
        (["pacs", "http://127.0.0.1:9"], 1, "cannot be reached, or broke off"),
        (["pacs", "http://127.0.0.1:9", "--c_store", "A@b"], 2, "--c_store: AET@host:port is wanted, got 'A@b'"),
        (["score", "SLIDE", "--studies", "x.csv"], 2, "--studies is for --dicom"),
        (["score", "SLIDE", "--dicom", "--studies", "gone.csv"], 1, "gone.csv: cannot be read"),
        (["score", "SLIDE", "--bundle", "gone"], 1, "gone: is not a bundle: configs/metadata.json is missing"),
        (["seal", "gone"], 1, "gone: is not a bundle: configs/metadata.json is missing"),
        (["seal"], 2, "seal needs BUNDLE"),
        (["verify-bundle", "gone"], 1, "gone: there is no such folder of models"),
        (["score", "SLIDE", "--device", "tpu9"], 2, "--device tpu9 is not there"),
        (["score", "SLIDE", "-o", "/proc/x"], 1, "cannot be written"),
        (["score", "SLIDE", "--encoder_weights", "gone.pt"], 1, "gone.pt: there is no such weights file"),
        (["embed", "SLIDE", "--scan_order", "spiral"], 2, "unknown scan order 'spiral'; known: row_major"),
        (["embed", "SLIDE", "--min_tissue", "7"], 2, "--min_tissue is a share between 0 and 1, got 7"),
        (["embed", "SLIDE", "--mpp", "0.1"], 1, "its finest level has 0.5 µm/px, the model wants 0.1 µm/px"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_use_is_one_line_and_a_code(s4mil, tissue_slide, bundle, arguments, code, message):
    arguments = [str(tissue_slide) if argument == "SLIDE" else argument for argument in arguments]
    if arguments[0] == "score" and "--bundle" not in arguments:
        arguments += ["--bundle", str(bundle)] * (len(arguments) > 1 and arguments[1] != "a")
    found, out, complaint = s4mil(*arguments)
    assert found == code
    assert len(complaint) == 1
    assert message in complaint[0]
    assert out == []


def test_checkpoint_of_the_authors_is_imported(s4mil, shared, tmp_path):
    source = shared / "reference/s4model_tiny.safetensors"
    code, out, _ = s4mil("import-checkpoint", source, "--out", tmp_path / "ours.safetensors")
    assert code == 0
    settings = "in_features 16, classes 3, width 8, state_dim 4"
    assert out == [f"{source}: S4Model ({settings}), written to {tmp_path}/ours.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["import-checkpoint", "x.pt"], 2, "import-checkpoint needs --out"),
        (["import-checkpoint", "x.pt", "--out", "y.pt"], 2, "--out is a .safetensors file, got y.pt"),
        (["import-checkpoint", "x.pt", "--out", "y.safetensors"], 1, "x.pt: there is no such weights file"),
    ],
)
def test_import_that_cannot_be_is_one_line(s4mil, arguments, code, message):
    found, out, complaint = s4mil(*arguments)
    assert (found, out, len(complaint)) == (code, [], 1)
    assert message in complaint[0]


def test_identifiers_stay_text(s4mil, tissue_slide, bundle, tmp_path):
    """fire would make the integer 2024001 of it."""
    code, _, _ = s4mil("score", tissue_slide, "--bundle", bundle, "--out", "2024_001")
    assert code == 0
    assert os.listdir(tmp_path) == ["2024_001"]


def test_help_and_version_come_without_heavy_libraries():
    program = (
        "import sys; from s4mil_monai.cli.main import COMMANDS, main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as left: assert left.code == 0, left.code\n"
        "heavy = {'torch', 'monai', 'mlflow', 'cucim', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["score", "--help"], ["--version"]):
        subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)


def test_no_command_at_all_is_wrong_use_that_lists_them(s4mil):
    code, out, complaint = s4mil()
    assert (code, complaint) == (2, [])
    assert {"score", "inspect", "version"} <= {line.split()[0] for line in out[2:]}


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_of_a_group_lists_its_commands(s4mil, asked):
    code, out, complaint = s4mil("batch", asked)
    assert (code, complaint) == (0, [])
    assert out[0] == "s4mil batch COMMAND …; s4mil batch COMMAND --help says what each takes"
    assert {line[2:7] for line in out[2:] if line[2] != " "} == {"batch"}


def test_help_of_a_command_is_one_screen_with_each_option_and_its_default(s4mil, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, complaint = s4mil("batch", "quarantine", "--help")
    assert (code, complaint) == (0, [])
    assert out == [
        "s4mil batch quarantine --config TEXT [OPTIONS]",
        "",
        "List what is in quarantine and why, or put a slide there.",
        "",
        "  --config TEXT  YAML of the site.",
        "  --slide TEXT   The beginning of its fingerprint, or its file name; without it, the quarantine is",
        "                 listed.",
        "  --reason TEXT  Why nobody should try it. [default: set aside by hand]",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_a_sentence_of_everything_a_command_takes(s4mil, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, complaint = s4mil(*name.split(), "--help")
    assert (code, complaint) == (0, [])
    assert out[0].startswith(f"s4mil {name}")
    assert len(out) <= 40
    assert max(map(len, out)) <= 120
    for key, parameter in inspect.signature(COMMANDS[name]).parameters.items():
        shown = key.upper() if parameter.kind is not parameter.KEYWORD_ONLY else f"--{key}"
        (line,) = [line for line in out[1:] if line.split()[:1] == [shown]]
        assert len(line.split()) > 2, line


def test_progress_is_shown_on_a_terminal_and_not_elsewhere(monkeypatch, capsys):
    import sys as system

    for terminal in (False, True):
        monkeypatch.setattr(system.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        with ProgressBar() as bar:
            bar.show(3, 10)
            bar.show(10, 10)
        assert ("patch" in capsys.readouterr().err) is terminal


@pytest.fixture(scope="module")
def scored(tissue_slide, bundle, tmp_path_factory):
    """A result folder of the tissue slide."""
    out = tmp_path_factory.mktemp("scored")
    return score_to_folder(tissue_slide, load_scorer(bundle), out)[1]


def test_ablation_says_the_score_with_and_without_patches(s4mil, scored, bundle):
    code, out, complaint = s4mil("ablate", scored, "--top", 2, "--bundle", bundle)
    assert (code, complaint) == (0, [])
    assert out[0] == "tissue.tif: 2 of 12 patches left out"
    assert out[1].startswith("tissue.tif: normal, probability ")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "ablate needs one of --patches, --top and --region"),
        (("--top", "2", "--patches", "3"), 2, "ablate needs one of --patches, --top and --region"),
        (("--patches", "3,x"), 2, "--patches is a list of whole numbers"),
        (("--region", "1,2,3"), 2, "--region is x,y,width,height"),
        (("--region", "1,2,-3,4"), 2, "--region is x,y,width,height"),
        (("--region", "90000,0,10,10"), 1, "no patch of it lies there"),
        (("--patches", "0,12"), 1, "has patches 0 to 11, not 12"),
        (("--region", "0,0,9000,9000"), 1, "all 12 patches would be left out"),
    ],
)
def test_ablation_that_cannot_be_done_is_one_line(s4mil, scored, bundle, options, code, message):
    found, out, complaint = s4mil("ablate", scored, "--bundle", bundle, *options)
    assert (found, out, len(complaint)) == (code, [], 1)
    assert message in complaint[0]


def test_slide_model_is_exported_and_then_scores_with_it(s4mil, tissue_slide, bundle, scored, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    code, out, complaint = s4mil("export", copy, "--to", "onnx", "--chunk", 64)
    assert (code, complaint) == (0, [])
    assert out[0].startswith(f"{copy}/models/step_float32.onnx: onnx, float32, 64 patches a step; logits within ")
    options = ("--bundle", copy, "--out", tmp_path / "o", "--aggregator_runtime", "onnxruntime")
    assert s4mil("score", tissue_slide, *options)[0] == 0
    with_onnx, with_torch = (read_result(folder / "result.json") for folder in (tmp_path / "o/tissue", scored))
    assert with_onnx.aggregator.runtime == "onnxruntime"
    np.testing.assert_allclose(with_onnx.logits, with_torch.logits, atol=1e-5)


@pytest.fixture
def sealed(s4mil, bundle, tmp_path):
    """A sealed copy of the bundle."""
    copy = shutil.copytree(bundle, tmp_path / "sealed")
    assert s4mil("seal", copy) == (0, [f"{copy}: sealed, 3 files in SHA256SUMS"], [])
    return copy


def test_sealed_bundle_is_verified_and_a_changed_or_hostile_one_refused_in_one_line(s4mil, sealed):
    code, out, complaint = s4mil("verify-bundle", sealed)
    assert (code, complaint) == (0, [])
    assert out == [f"{sealed}: 3 files are as they were sealed; the configuration calls nothing unknown"]
    train = sealed / "configs" / "train.yaml"
    train.write_text("run: $__import__('os').system('id')")
    code, out, complaint = s4mil("verify-bundle", sealed)
    assert (code, out, len(complaint)) == (1, [], 1)
    assert "configs/train.yaml is not in SHA256SUMS" in complaint[0]
    code, out, complaint = s4mil("seal", sealed)
    assert (code, out) == (1, [])
    assert complaint == [
        f"s4mil: {train}: run: \"$__import__('os').system('id')\" reaches for Python's inner names (__)"
    ]


def test_sealed_bundle_stays_sealed_when_it_is_exported_and_calibrated(s4mil, sealed):
    assert s4mil("export", sealed, "--to", "onnx", "--chunk", 64)[0] == 0
    assert s4mil("verify-bundle", sealed)[1][0].startswith(f"{sealed}: 5 files are as they were sealed")
    shares = [(0.8, 0.2) if i % 2 == 0 else (0.3, 0.7) for i in range(40)]
    rows = [f"s4mil,0,{i % 5},s{i},p{i},{i % 2},{p0},{p1}" for i, (p0, p1) in enumerate(shares)]
    Path("predictions.csv").write_text("\n".join(["model,seed,fold,slide,patient,label,p_0,p_1", *rows]))
    options = ("--bundle", sealed, "--model", "s4mil", "--sensitivity", 0.8)
    code, out, complaint = s4mil("calibrate", "predictions.csv", *options)
    assert (code, complaint) == (0, [])
    assert out[1].endswith("; nothing is referred")  # no slide is on the wrong side
    assert s4mil("verify-bundle", sealed)[1][0].startswith(f"{sealed}: 6 files are as they were sealed")
    assert load_scorer(sealed).calibration.threshold is not None


def test_predictions_of_other_classes_calibrate_nothing(s4mil, sealed):
    shares = [tuple(0.6 if c == i % 3 else 0.2 for c in range(3)) for i in range(60)]
    rows = [f"s4mil,0,{i % 5},s{i},p{i},{i % 3},{a},{b},{c}" for i, (a, b, c) in enumerate(shares)]
    Path("predictions.csv").write_text("\n".join(["model,seed,fold,slide,patient,label,p_0,p_1,p_2", *rows]))
    code, _, complaint = s4mil("calibrate", "predictions.csv", "--bundle", sealed, "--model", "s4mil")
    assert (code, complaint) == (1, [f"s4mil: predictions.csv: is of 3 classes, {sealed} of 2"])
    assert load_scorer(sealed).calibration is None


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--to", "onnx", "--chunk", "100"), 2, "--chunk is a multiple of 64 patches, at most 65536, got 100"),
        (("--to", "onnx", "--chunk", "1000000000"), 2, "--chunk is a multiple of 64 patches, at most 65536"),
        (("--to", "onnx", "--targets", "8.9"), 2, "--library and --targets go with --to tensorrt"),
        (("--to", "tflite"), 2, "unknown form to export to 'tflite'; known: onnx, tensorrt, torchscript"),
        (("--to", "onnx", "--precision", "int8"), 2, "unknown precision 'int8'"),
        (("--to", "onnx", "--features", "nothing"), 1, "nothing: holds no feature files"),
    ],
)
def test_export_that_cannot_be_done_is_one_line(s4mil, bundle, options, code, message):
    found, out, complaint = s4mil("export", bundle, *options)
    assert (found, out, len(complaint)) == (code, [], 1)
    assert message in complaint[0]


def test_exported_step_that_is_not_there_is_named_before_a_slide_is_read(s4mil, tissue_slide, bundle, tmp_path):
    code, out, complaint = s4mil(
        "score", tissue_slide, "--bundle", bundle, "--out", tmp_path / "o", "--aggregator_runtime", "onnxruntime"
    )
    assert (code, out) == (1, [])
    assert complaint[0].endswith("models/step_float32.onnx: is not there; make it with s4mil export")
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(find_spec("holoscan") is None, reason="Holoscan is not installed")
def test_a_model_is_registered_without_a_word_about_the_stack(tmp_path):
    """In a process of its own: this one has a larger stack, and has imported MONAI."""
    command = [sys.executable, "-m", "s4mil_monai", "register", str(tmp_path), "--name", "x"]
    small = 'ulimit -s 8192; exec "$@"'
    done = subprocess.run(["bash", "-c", small, "bash", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"s4mil: {tmp_path}: is neither the folder of a training")
