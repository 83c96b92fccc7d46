"""A configuration that would call what it should not is refused by file and place, and nothing of it has run."""

from __future__ import annotations

import json
import pydoc
import re
import shutil
from pathlib import Path
from types import CodeType

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from s4mil_monai.errors import BundleError, ConfigRefusedError
from s4mil_monai.models import config_allowed
from s4mil_monai.models.config_check import check_configs
from s4mil_monai.models.expression_check import LONGEST, find_objection

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
SHIPPED = sorted(path for path in BUNDLES.iterdir() if path.is_dir())


@pytest.fixture
def folder(tmp_path) -> Path:
    """A bundle whose configuration is harmless so far."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps({"version": "1.0"}))
    return tmp_path


def write(folder: Path, config: object, name: str = "configs/train.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config) if name.lower().endswith("json") else yaml.safe_dump(config))
    return path


def refusal(folder: Path) -> ConfigRefusedError:
    with pytest.raises(ConfigRefusedError) as refused:
        check_configs(folder)
    assert "\n" not in str(refused.value)
    return refused.value


@pytest.mark.parametrize("bundle", SHIPPED, ids=lambda path: path.name)
def test_every_configuration_that_is_shipped_passes(bundle):
    check_configs(bundle)


# Expressions --------------------------------------------------------------------------------------------------

HOSTILE = [
    "$__import__('os').system('id')",
    "$eval('1')",
    "$exec('import os')",
    "$compile('1', 'x', 'eval')",
    "$open('/etc/passwd').read()",
    "$input()",
    "$breakpoint()",
    "$globals()",
    "$vars()",
    "$getattr(@network, 'run')",
    "$setattr(@network, 'run', 1)",
    "$type(@network)",
    "$().__class__.__bases__[0].__subclasses__()",
    "$@network.__class__",
    "$@network.forward.__globals__",
    "$''.join(['a'])",
    "$'{0.x}'.format(@network)",
    "$f'{@network}'",
    "$'%s' % @network",
    "$lambda: 1",
    "$(lambda: 1)()",
    "$[x for x in (1, 2)]",
    "$(x for x in (1, 2))",
    "${'a': 1}",
    "$(x := 1)",
    "$9 ** 9 ** 9",
    "$'a' * 99999999999",
    "$torch",
    "$os",
    "$os.system('id')",
    "$os.environ",
    "$os.environ['AWS_SECRET_ACCESS_KEY']",
    "$os.environ[@key]",
    "$torch.load('x.pt')",
    "$torch.hub.load('owner/repository', 'model')",
    "$torch.ops.load_library('x.so')",
    "$torch.os.system('id')",
    "$torch.device.mro()",
    "$monai.bundle.run('x')",
    "$monai.utils.run_cmd(['id'])",
    "$monai.utils.instantiate('os.system', 'default', command='id')",
    "$logging.os.system('id')",
    "$logging.FileHandler('/tmp/x')",
    "$numpy.load('x.npy', allow_pickle=True)",
    "$Path('/tmp/x').write_text('x')",
    "$Path('/tmp/x').unlink()",
    "$Path('/tmp/x').resolve().parent.rmdir()",
    "$@network.load_state_dict({})",
    "$@network()",
    "$@network.run()()",
    "$(@a or @b)()",
    "$@handlers[0]",
    "$@network.to(*@everything)",
    "$@network.to(**@everything)",
    "$dist.init_process_group(backend='gloo', init_method='tcp://198.51.100.7:1')",
    "$dist.init_process_group('gloo')",
    "$dist.broadcast_object_list([1])",
    "$import subprocess",
    "$import os as torch",
    "$import os, subprocess",
    "$import torch; os.system('id')",
    "$import monai.bundle.scripts as objective",
    "$from os import system",
    "$from os import system as find_bundle",
    "$from pathlib import *",
    "$from . import x",
    "$x = 1",
    "$del @x",
    "$1; 2",
    "$1 if",
    "$ 1",
    "$",
    "$@",
    "$@a::",
    "$@::a",
    "$@##a",
    "$1 @ 2",
    "$'%::'",
    "$'%##'",
    "$'@a' + eval + '@b'",
    "$... ",
    "$b'x'",
    "$1j",
    "$ｅｖａｌ('1')",
    "$await @x",
    "$@x < (yield)",
    "$" + "not " * 50 + "eval",
    "$'\x00'",
]


@pytest.mark.parametrize("expression", HOSTILE)
def test_hostile_expression_is_refused_where_it_stands(folder, expression):
    path = write(folder, {"train": {"handlers": [1, {"key": expression}]}})
    found = refusal(folder)
    assert (found.path, found.place, found.found) == (str(path), "train::handlers::1::key", expression)
    assert str(found).startswith(f"{path}: train::handlers::1::key: {expression!r}"[:200])


@pytest.mark.parametrize(
    "expression",
    [
        "$@network_def.to(@device)",
        "$[@device] if @device.type == 'cuda' else None",
        "$torch.device('cuda', int(os.environ['LOCAL_RANK']))",
        "$'sqlite:///' + str(Path(@output_dir).resolve() / 'mlruns.db')",
        "$@train#trainer.run()",
        "$not @quiet and -1.5 < @x - 1 <= 2",
        "$from pathlib import Path",
    ],
)
def test_expression_of_what_is_on_the_lists_passes(folder, expression):
    write(folder, {"x": expression})
    check_configs(folder)


@pytest.mark.parametrize(
    "name",
    [
        "configs/metadata.json",
        "configs/a.json",
        "configs/a.YML",
        "configs/models/deep/a.yaml",
        "docs/a.yaml",
        "a.json",
    ],
)
def test_every_file_that_monai_could_read_is_checked(folder, name):
    path = write(folder, {"x": "$eval('1')"}, name)
    assert refusal(folder).path == str(path)


def test_monai_would_have_run_code_hidden_in_a_key(folder):
    """The reason why relative references are refused: MONAI writes keys into the code, strings or not."""
    config = {"' + str(6 * 7) + '": {"key": "$'%::'"}}
    parser = ConfigParser(json.loads(json.dumps(config)))
    assert parser.get_parsed_content("' + str(6 * 7) + '::key") == "%42::"
    write(folder, config)
    assert "refers relatively" in str(refusal(folder))


def test_what_is_checked_is_what_python_will_see_not_what_is_written():
    """MONAI replaces references in strings too, which ends the string."""
    parser = ConfigParser({"in": 1, "x": "$'@in'"})
    assert parser.get_parsed_content("x") is False  # '__local_refs[' in ']'
    assert find_objection("$'@in'") is None
    assert "names eval" in str(find_objection("$'@in' and eval and '@in'"))


def test_nothing_has_run_when_a_configuration_is_refused(folder):
    mark = folder.parent / f"{folder.name}.mark"
    write(folder, {"imports": ["$import os"], "run": f"$Path('{mark}').touch()"})
    refusal(folder)
    assert not mark.exists()


FRAGMENTS = [
    *("@a", "@a::b", "torch", ".device", ".run", ".to", "(", ")", "(@x)", "[", "]", "'", "'a'", ",", " ", "="),
    *("os.environ", "['LOCAL_RANK']", "Path", "str", "eval", ".model", ".f_globals", "*", "+", "/", "if "),
    *("lambda", "not ", " in ", " or ", " else ", "1", "$", "{", "}", "monai.handlers.from_engine", "@", "::"),
    *("init_process_group", "import ", "from ", " as ", "\n", ";", "__", "%", ":", "@in", "dist.", "#"),
]  # fmt: skip


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=9).map("".join)))
def test_whatever_passes_compiles_to_names_of_the_lists_only(text):
    if find_objection("$" + text) is not None or re.match(r"\s*(import|from)\b", text):
        return
    # as MONAI writes it for Python; the compiler's own table of names is the second opinion
    code = compile(re.sub(r"@(\w+(?:::\w+)*)", r"__local_refs['\1']", text.replace("#", "::")), "x", "eval")
    parts = {part for value in config_allowed.VALUES for part in value.split(".")}
    known = parts | config_allowed.ATTRIBUTES | config_allowed.METHODS | {"__local_refs", "os", "environ"}
    assert set(code.co_names) <= known
    assert not any(isinstance(constant, CodeType) for constant in code.co_consts)


def test_expression_of_any_length_is_answered_at_once():
    assert find_objection("$" + "1 + " * 100_000 + "1") == f"is longer than {LONGEST} characters"


# Targets, modes, macros ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "builtins.exec",
        "pdb.runcall",
        "torch.load",
        "torch.hub.load",
        "torch.nn.functional.F",
        "torch.nn.modules.module.functools.partial",
        "torch.nn.Module.__init__",
        "torch.nn.Linear.from_pretrained",
        "torch.optim.adam.torch.hub.load",
        "monai.bundle.run",
        "monai.utils.instantiate",
        "monai.utils.run_cmd",
        "monai.apps.download_and_extract",
        "monai.data.utils.os.system",
        "monai.transforms.LoadImage",
        "monai.losses.PerceptualLoss",
        "s4mil_monai.cli.main.main",
        "s4mil_monai.whole_file.write_whole",
        "s4mil_monai.training.run_folder.Path",
        "monai.data.Dataset ",
        "Dataset",
        "run_cmd",
        "@network",
        "%network",
        "$@network.run",
        "$torch.load",
        "",
        None,
        ["os.system"],
        {"_target_": "monai.data.Dataset"},
    ],
)
def test_unknown_target_is_refused_where_it_stands(folder, target):
    path = write(folder, {"train": {"dataset": {"_target_": target, "data": []}}})
    found = refusal(folder)
    assert (found.path, found.place, found.found) == (str(path), "train::dataset::_target_", str(target))


def test_layers_optimizers_and_schedules_of_torch_pass(folder):
    names = ("torch.nn.Linear", "torch.optim.AdamW", "torch.optim.lr_scheduler.OneCycleLR")
    write(folder, [{"_target_": name} for name in names])
    check_configs(folder)


@pytest.mark.parametrize("key", ["train::dataset::_target_", "train#dataset#_target_", "+_target_"])
def test_target_set_from_an_overlay_by_its_place_is_refused(folder, key):
    write(folder, {key: "os.system"})
    assert refusal(folder).place == key


@pytest.mark.parametrize(
    "entry",
    [
        {"_mode_": "debug"},
        {"_mode_": "@mode"},
        {"_mode_": "%mode"},
        {"_debug_": True},
        {"network::_debug_": True},
        {"_meta_": {"s4mil": 1}},
        {"key": "%/tmp/other.json::network"},
        {"key": "%other.yaml"},
        {"key": "%../other.yml#a"},
        {"key": "%::network"},
        {"key": "%"},
        {"_requires_": ["$eval('1')"]},
        {"_disabled_": "$eval('1')"},
        {"_desc_": "$eval('1')"},
    ],
)
def test_debugger_foreign_file_and_code_under_special_keys_are_refused(folder, entry):
    path = write(folder, {"part": {"_target_": "monai.data.Dataset", **entry}})
    assert refusal(folder).path == str(path)


def test_text_that_only_mentions_code_passes(folder):
    write(
        folder, {"note": "costs 5 $; see @author, 100 % of __import__('os')", "at": "@nobody::1", "of": "%a::0::b"}
    )
    check_configs(folder)


# Files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "x: [1", "cannot be read as configuration"),
        ("a.yaml", "x: !!python/object/apply:os.system [id]", "cannot be read as configuration"),
        ("a.yaml", "x: 1\n---\ny: 2\n", "cannot be read as configuration"),
        ("a.yaml", "[" * 3000, "cannot be read as configuration"),
        ("a.json", "{'x': 1}", "cannot be read as configuration"),
        ("a.json", "[" * 200_000, "cannot be read as configuration"),
        ("a.yaml", b"x: \xff\xfe", "cannot be read as configuration"),
        ("a.yaml", "x: !!binary JGV2YWw=", "is a bytes, which no configuration has"),
        ("a.yaml", "x: &x [1, *x, $eval]", r"x::2: '\$eval'"),
        ("logging.conf", "class=x", "cannot be read as configuration"),
        ("a.txt", "x", "is no YAML, JSON or logging file"),
        ("a.py", "x = 1", "configs/a.py is code"),
    ],
)
def test_file_that_is_no_configuration_is_refused_by_name(folder, name, content, message):
    (folder / "configs" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BundleError, match=message) as refused:
        check_configs(folder)
    assert name in str(refused.value)


def test_yaml_whose_aliases_multiply_is_read_once(folder):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    (folder / "configs" / "a.yaml").write_text("\n".join(lines))
    check_configs(folder)


LOGGING = (BUNDLES / "s4mil_slide" / "configs" / "logging.conf").read_text()


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ("(sys.stdout,)", "(__import__('os').system('id'),)", "handler_console::args"),
        ("(sys.stdout,)", "(sys.stdout,)\nkwargs={'x': exit()}", "handler_console::kwargs"),
        ("StreamHandler", "__import__('os').system", "handler_console::class"),
        ("StreamHandler", "FileHandler", "handler_console::class"),
        ("StreamHandler", "handlers.SocketHandler", "handler_console::class"),
        ("[formatter_line]", "[formatter_line]\nclass=os.system", "formatter_line::class"),
        ("[loggers]", "[DEFAULT]\nargs=(exit(),)\n[loggers]", "loggers::args"),
    ],
)
def test_logging_file_with_code_is_refused(folder, before, after, place):
    path = folder / "configs" / "logging.conf"
    path.write_text(LOGGING.replace(before, after))
    found = refusal(folder)
    assert (found.path, found.place) == (str(path), place)


def test_long_value_is_cut_in_the_message(folder):
    write(folder, {"x": "$" + "a" * 5000})
    assert len(str(refusal(folder))) < 400


# The lists ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", sorted(config_allowed.TARGETS))
def test_target_on_the_list_is_a_class_or_function_of_its_library(target):
    found = pydoc.locate(target)
    assert callable(found)
    assert found.__module__.split(".")[0] == target.split(".")[0]


def test_every_import_on_the_list_gives_one_name_one_meaning():
    names: dict[str, object] = {}
    for statement in config_allowed.IMPORTS:
        exec(statement, before := {})
        bound = {key: value for key, value in before.items() if key != "__builtins__"}
        assert not names.keys() & bound.keys()
        names.update(bound)
    for value in config_allowed.VALUES - config_allowed._BUILTINS:
        assert eval(value, dict(names)) is not None


def test_a_bundle_is_refused_by_its_overlay_as_by_any_other_file(tmp_path):
    copy = shutil.copytree(BUNDLES / "s4mil_slide", tmp_path / "s4mil_slide")
    overlay = copy / "configs" / "models" / "lstm.yaml"
    overlay.write_text(overlay.read_text().replace("$@split.classes", "$@split.__class__"))
    assert refusal(copy).path == str(overlay)
