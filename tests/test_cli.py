"""The command line: one line for whoever runs it, an exit code for whatever runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from s4mil_monai import cli


@pytest.fixture
def s4mil(capfd, monkeypatch, tmp_path):
    """Run the command in this process; gives exit code, lines out, lines of complaint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("s4mil_monai.allocator.keep_large_buffers", lambda: None)

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        out, complaint = capfd.readouterr()
        return left.value.code, out.splitlines(), complaint.splitlines()

    return run


def test_slide_is_scored_and_what_to_open_is_said(s4mil, tissue_slide, bundle, tmp_path):
    code, out, complaint = s4mil("score", tissue_slide, "--bundle", bundle, "--out", tmp_path / "o")
    assert (code, complaint) == (0, [])
    assert out[0].startswith("tissue.tif: ")
    assert out[-1] == f"open {tmp_path / 'o' / 'tissue' / 'report.html'}"


def test_slide_is_embedded_into_one_file(s4mil, tissue_slide, tmp_path):
    code, out, _ = s4mil("embed", tissue_slide, "--out", tmp_path / "features")
    assert code == 0
    assert out == [f"tissue.tif: 12 patches of 1280 features in {tmp_path}/features/tissue.h5"]


def test_white_slide_leaves_with_its_own_code_and_a_result(s4mil, white_slide, bundle, tmp_path):
    code, _, complaint = s4mil("score", white_slide, "--bundle", bundle, "--out", tmp_path)
    assert code == cli.EXIT_NO_SCORE
    assert complaint[0].startswith("s4mil: white.tif: no score, no tissue found")
    assert (tmp_path / "white" / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["score", "nowhere.svs"], 2, "nowhere.svs: there is no such slide"),
        (["score"], 2, "score needs SLIDE"),
        (["score", "a", "b"], 2, "score takes 1 argument(s), got also 'b'"),
        (["socre", "a"], 2, "unknown command 'socre'; known: score, embed, import-checkpoint, version"),
        (
            ["score", "SLIDE", "--ouput", "x"],
            2,
            "unknown option --ouput; did you mean --out? known: --slide, --out",
        ),
        (["score", "SLIDE", "--assume_mpp", "fast"], 2, "--assume_mpp is a positive number, got 'fast'"),
        (["score", "SLIDE", "--assume_mpp=-1"], 2, "--assume_mpp is a positive number, got -1"),
        (
            ["score", "SLIDE", "--encoder", "vgg"],
            1,
            "unknown encoder 'vgg'; known: resnet50_block3, efficientnet_lite0",
        ),
        (["score", "SLIDE", "--patch_stage", "cv"], 1, "unknown patch stage 'cv'; known: torch, dali"),
        (["score", "SLIDE", "--bundle", "gone"], 1, "gone: is not a bundle: configs/metadata.json is missing"),
        (["score", "SLIDE", "--device", "tpu9"], 2, "--device tpu9 is not there"),
        (["score", "SLIDE", "-o", "/proc/x"], 1, "cannot be written"),
        (["score", "SLIDE", "--encoder_weights", "gone.pt"], 1, "gone.pt: there is no such weights file"),
        (["embed", "SLIDE", "--scan_order", "spiral"], 1, "unknown scan order 'spiral'; known: row_major"),
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
        "import sys; from s4mil_monai import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as left: assert left.code == 0, left.code\n"
        "heavy = {'torch', 'monai', 'mlflow', 'cucim', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for argument in ("--help", "--version"):
        subprocess.run([sys.executable, "-c", program, argument], check=True, capture_output=True)


def test_progress_is_shown_on_a_terminal_and_not_elsewhere(monkeypatch, capsys):
    import sys as system

    for terminal in (False, True):
        monkeypatch.setattr(system.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        with cli._ProgressBar() as bar:
            bar.show(3, 10)
            bar.show(10, 10)
        assert ("patch" in capsys.readouterr().err) is terminal
