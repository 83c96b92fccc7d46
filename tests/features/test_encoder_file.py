"""Encoders that a site brings as YAML with an ONNX or TorchScript file."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from s4mil_monai.errors import UnknownNameError, WeightsError
from s4mil_monai.features.encoder import find_encoder, load_encoder
from s4mil_monai.features.encoder_runtime import find_processor

SIDE_PX = 32
WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


class ColourMean(nn.Module):
    """The mean colour of a patch, times a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4, bias=False)
        self.linear.weight.data = torch.from_numpy(WEIGHT.T.copy())

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        assert patches.shape[2] == 32
        return self.linear(patches.mean(dim=(2, 3)))


def colour_mean_onnx(*, side_px: int = SIDE_PX, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """The same as ONNX."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["patches"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["mean"]),
        helper.make_node("MatMul", ["mean", "weight"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colour mean",
        [helper.make_tensor_value_info("patches", kind, ["B", 3, side_px, side_px])],
        [helper.make_tensor_value_info("features", kind, ["B", 4])],
        [numpy_helper.from_array(WEIGHT.astype(helper.tensor_dtype_to_np_dtype(kind)), "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def describe(model: Path, **changes: object) -> Path:
    """Write the YAML beside a model."""
    settings = {
        "name": "colour_mean",
        "file": model.name,
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest() if model.is_file() else "0" * 64,
        "width": 4,
        "patch_side_px": SIDE_PX,
        "mpp": 0.25,
        "mean": [0.5, 0.5, 0.5],
        "deviation": [0.25, 0.25, 0.25],
        "licence": "CC0-1.0",
        **changes,
    }
    path = model.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return path


@pytest.fixture
def onnx_model(tmp_path):
    onnx.save(colour_mean_onnx(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def torchscript_model(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(ColourMean()).save(tmp_path / "model.ts")
    return tmp_path / "model.ts"


@pytest.mark.parametrize(("kind", "runtime"), [("onnx_model", "onnxruntime"), ("torchscript_model", "torch")])
@pytest.mark.parametrize("asked", ["torch", "auto"])
def test_encoder_of_a_site_embeds_with_what_its_file_needs(request, kind, runtime, asked):
    model = request.getfixturevalue(kind)
    encoder = load_encoder(str(describe(model)), runtime=asked)
    patches = torch.zeros(3, 3, SIDE_PX, SIDE_PX)
    patches[1] = 1.0
    patches[2, 1, :16] = 1.0  # half of the green channel
    # column sums of the matrix; half of its second row
    wanted = torch.tensor([[0.0, 0, 0, 0], [12, 15, 18, 21], [2, 2.5, 3, 3.5]])
    features = encoder.encode(patches)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, wanted)
    assert (encoder.runtime, encoder.precision) == (runtime, "float32")
    assert encoder.fingerprint == hashlib.sha256(model.read_bytes()).hexdigest()


def test_what_the_yaml_says_is_known_without_loading_the_model(onnx_model):
    path = describe(onnx_model)
    onnx_model.unlink()
    spec = find_encoder(str(path))
    assert (spec.name, spec.width, spec.patch_side_px, spec.mpp) == ("colour_mean", 4, SIDE_PX, 0.25)
    assert (spec.mean, spec.deviation) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.skipif(not find_processor().has_bfloat16, reason="this processor has no bfloat16")
def test_torchscript_runs_in_half_precision_when_asked(torchscript_model):
    encoder = load_encoder(str(describe(torchscript_model)), precision="bfloat16")
    features = encoder.encode(torch.ones(2, 3, SIDE_PX, SIDE_PX))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[0], torch.tensor([12.0, 15, 18, 21]), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": None}, "width: Field required"),
        ({"width": 0}, "width: Input should be greater than 0"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"sha256": "abc"}, "sha256: String should match"),
        ({"file": "model.pkl"}, "file: String should match"),
        ({"mean": [124, 116, 104]}, "mean.0: Input should be less than or equal to 1"),
        ({"deviation": [0, 1, 1]}, "deviation.0: Input should be greater than 0"),
        ({"mpp": -1}, "mpp: Input should be greater than 0"),
    ],
)
def test_yaml_that_says_something_wrong_is_refused_by_field(onnx_model, changes, says):
    with pytest.raises(WeightsError, match=r"model\.yaml: ") as caught:
        load_encoder(str(describe(onnx_model, **changes)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: [", "is not YAML"), ("just words", "is no table of settings"), ("\x00", "is not YAML")],
)
def test_what_is_no_yaml_table_is_refused(tmp_path, text, says):
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(WeightsError, match=says) as caught:
        load_encoder(str(tmp_path / "e.yaml"))
    assert "\n" not in str(caught.value)


def test_missing_yaml_and_missing_model_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"gone\.yaml: there is no such encoder file"):
        load_encoder(str(tmp_path / "gone.yaml"))
    with pytest.raises(WeightsError, match=r"gone\.onnx: there is no such model file"):
        load_encoder(str(describe(tmp_path / "gone.onnx")))


@pytest.mark.parametrize("kind", ["onnx_model", "torchscript_model"])
def test_model_that_was_exchanged_is_refused_before_it_is_loaded(request, kind):
    model = request.getfixturevalue(kind)
    path = describe(model)
    model.write_bytes(model.read_bytes() + b" ")
    with pytest.raises(WeightsError, match=r"model\.\w+: is another file than described \(SHA-256"):
        load_encoder(str(path))


@pytest.mark.parametrize(
    ("name", "says"),
    [("model.onnx", "damaged, or not an ONNX model"), ("model.pt", "damaged, or not a TorchScript file")],
)
def test_damaged_model_of_the_right_checksum_is_named(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"\x08\x07 not a model at all")
    with pytest.raises(WeightsError, match=rf"model\.\w+: {says}"):
        load_encoder(str(describe(tmp_path / name)))


def test_state_dict_is_no_torchscript(tmp_path):
    torch.save(ColourMean().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=r"weights\.pt: damaged, or not a TorchScript file"):
        load_encoder(str(describe(tmp_path / "weights.pt")))


@pytest.mark.parametrize("kind", ["onnx_model", "torchscript_model"])
def test_model_of_another_width_or_patch_side_is_refused(request, kind):
    model = request.getfixturevalue(kind)
    with pytest.raises(WeightsError, match=r"gives 4 features a patch, the YAML says 5"):
        load_encoder(str(describe(model, width=5)))
    with pytest.raises(WeightsError, match=r"model\.\w+: does not take patches of 64 px") as caught:
        load_encoder(str(describe(model, patch_side_px=64)))
    assert "\n" not in str(caught.value)


def test_half_precision_onnx_is_refused(tmp_path):
    onnx.save(colour_mean_onnx(kind=TensorProto.FLOAT16), tmp_path / "half.onnx")
    with pytest.raises(WeightsError, match=r"half\.onnx: wants something else than one float32 input"):
        load_encoder(str(describe(tmp_path / "half.onnx")))


@pytest.fixture
def split_model(tmp_path):
    """A model that keeps its matrix in a file of its own."""
    model = colour_mean_onnx()
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="matrix.bin", size_threshold=0)
    return tmp_path / "split.onnx"


def test_weights_in_another_file_need_its_checksum(split_model):
    with pytest.raises(WeightsError, match=r"split\.onnx: keeps weights in 'matrix\.bin'; give its SHA-256"):
        load_encoder(str(describe(split_model)))
    data = split_model.with_name("matrix.bin")
    path = describe(split_model, data={"matrix.bin": hashlib.sha256(data.read_bytes()).hexdigest()})
    encoder = load_encoder(str(path))
    features = encoder.encode(torch.ones(1, 3, SIDE_PX, SIDE_PX))
    torch.testing.assert_close(features[0], torch.tensor([12.0, 15, 18, 21]))
    assert encoder.fingerprint != hashlib.sha256(split_model.read_bytes()).hexdigest()
    data.write_bytes(bytes(len(data.read_bytes())))
    with pytest.raises(WeightsError, match=r"matrix\.bin: is another file than described"):
        load_encoder(str(path))


@pytest.mark.parametrize("location", ["../matrix.bin", "/etc/hostname", "link.bin"])
def test_model_that_reads_files_outside_its_folder_is_refused(split_model, location):
    model = onnx.load(split_model, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    folder = split_model.parent / "inner"
    folder.mkdir()
    (folder / "link.bin").symlink_to(split_model.with_name("matrix.bin"))
    moved = folder / "split.onnx"
    moved.write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match=r"split\.onnx: reads '.*', outside its folder"):
        load_encoder(str(describe(moved)))


def test_tensors_in_attributes_are_looked_at_too(onnx_model):
    model = onnx.load(onnx_model)
    hidden = helper.make_tensor("hidden", TensorProto.FLOAT, [0], [])
    hidden.data_location = TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=hidden))
    onnx_model.write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match="reads '/etc/passwd', outside its folder"):
        load_encoder(str(describe(onnx_model)))


def test_weights_beside_a_yaml_are_refused(onnx_model, tmp_path):
    with pytest.raises(WeightsError, match=r"other\.pt: is not needed: .*model\.yaml names"):
        load_encoder(str(describe(onnx_model)), weights=tmp_path / "other.pt")


def test_runtime_or_precision_that_the_file_cannot_have_is_refused(onnx_model, torchscript_model):
    with pytest.raises(
        UnknownNameError, match=r"runtime of model\.onnx 'compiled'; known: onnxruntime, torch, auto"
    ):
        load_encoder(str(describe(onnx_model)), runtime="compiled")
    with pytest.raises(UnknownNameError, match=r"runtime of model\.ts 'onnxruntime'; known: torch, auto"):
        load_encoder(str(describe(torchscript_model)), runtime="onnxruntime")
    with pytest.raises(UnknownNameError, match=r"precision of .* known: float32"):
        load_encoder(str(describe(onnx_model)), precision="bfloat16")
