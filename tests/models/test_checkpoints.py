"""Checkpoints of the original authors, in our models."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from s4mil_monai.errors import WeightsError
from s4mil_monai.models.checkpoints import import_checkpoint, load_imported, save_imported
from s4mil_monai.models.clam import ClamMB, ClamSB, clam_mb_authors_names, clam_sb_authors_names
from s4mil_monai.models.s4mil import S4MIL, authors_names
from s4mil_monai.models.transmil import AUTHORS_NAMES, TransMIL

REFERENCES = {
    "s4model_tiny": "S4Model",
    "s4model_state32": "S4Model",
    "clam_sb": "CLAM_SB",
    "clam_mb": "CLAM_MB",
    "transmil": "TransMIL",
}


@pytest.mark.parametrize(("name", "kind"), REFERENCES.items())
def test_outputs_are_those_of_the_authors_code(shared, name, kind):
    path = shared / "reference" / f"{name}.safetensors"
    imported = import_checkpoint(path)
    assert imported.kind == kind
    with safe_open(path, "pt") as file, torch.inference_mode():
        output = imported.model(file.get_tensor("input.features"))
        for found, wanted in (
            (output.logits, file.get_tensor("expected.logits")),
            (output.logits.softmax(1), file.get_tensor("expected.probabilities")),
        ):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        if "expected.attention_raw" in file.keys():  # noqa: SIM118
            wanted = file.get_tensor("expected.attention_raw")
            assert (output.attention_raw[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def as_theirs(model, names) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {theirs: state[ours] for ours, theirs in names.items()}


def made(kind: str, classes: int):
    torch.manual_seed(0)
    if kind == "S4Model":
        model = S4MIL(20, classes=classes, width=12, state_dim=6)
        return model, as_theirs(model, authors_names())
    if kind == "CLAM_SB":
        model = ClamSB(20, classes=classes)
        return model, as_theirs(model, clam_sb_authors_names(classes))
    if kind == "CLAM_MB":
        model = ClamMB(20, classes=classes)
        return model, as_theirs(model, clam_mb_authors_names(classes))
    model = TransMIL(20, classes=classes)
    return model, as_theirs(model, AUTHORS_NAMES)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("kind", ["S4Model", "CLAM_SB", "CLAM_MB", "TransMIL"])
def test_any_number_of_classes_and_wrappers_prefixes_are_read_off_the_file(tmp_path, kind, prefix, classes):
    model, state = made(kind, classes)
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "theirs.pt")
    imported = import_checkpoint(tmp_path / "theirs.pt")
    assert (imported.kind, imported.settings["classes"]) == (kind, classes)
    for key, value in model.state_dict().items():
        assert torch.equal(imported.model.state_dict()[key], value), key


def test_clam_without_dropout_has_its_attention_one_place_earlier(tmp_path):
    _, state = made("CLAM_SB", 2)
    state = {key.replace("attention_net.3", "attention_net.2"): value for key, value in state.items()}
    torch.save(state, tmp_path / "theirs.pt")
    assert import_checkpoint(tmp_path / "theirs.pt").kind == "CLAM_SB"


def test_imported_model_comes_back_from_its_file(tmp_path):
    _, state = made("CLAM_MB", 3)
    torch.save(state, tmp_path / "theirs.pt")
    imported = import_checkpoint(tmp_path / "theirs.pt")
    save_imported(imported, tmp_path / "ours.safetensors")
    back = load_imported(tmp_path / "ours.safetensors")
    features = torch.randn(1, 9, 20)
    assert back.settings == imported.settings
    assert torch.equal(back.model(features).logits, imported.model(features).logits)


def test_checkpoint_of_another_model_is_refused_with_what_was_found(tmp_path):
    torch.save({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "vit.pt")
    with pytest.raises(
        WeightsError, match="none of S4Model, CLAM_SB, CLAM_MB, TransMIL; its first parameter is encoder"
    ):
        import_checkpoint(tmp_path / "vit.pt")


def test_incomplete_checkpoint_names_what_it_lacks(tmp_path):
    _, state = made("S4Model", 2)
    del state["fc1.0.bias"]
    torch.save(state, tmp_path / "theirs.pt")
    with pytest.raises(WeightsError, match=r"is a S4Model that lacks fc1\.0\.bias"):
        import_checkpoint(tmp_path / "theirs.pt")


def test_parameter_of_another_size_is_named(tmp_path):
    _, state = made("S4Model", 2)
    state["fc2.weight"] = torch.zeros(2, 13)
    torch.save(state, tmp_path / "theirs.pt")
    with pytest.raises(WeightsError, match=r"size differs: head\.weight is \(2, 13\), wanted \(2, 12\)"):
        import_checkpoint(tmp_path / "theirs.pt")


def test_plain_weights_are_no_imported_model(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match="does not say which model it is"):
        load_imported(tmp_path / "plain.safetensors")
