"""Configuration files and the command line over them."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.cli.configs import config_folders, config_names, load_config, parse_train_args
from mlra_jax.config import ConfigError, TrainConfig, from_dict, to_dict

PAPER = [name for name in config_names() if name not in ("small", "long", "tiny")]
MINIMAL = "from mlra_jax.config import *\ndef get_config(): return TrainConfig(name='mine')\n"


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def failing(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.smoke
def test_the_shipped_configurations_are_the_promised_ones():
    runs = Path(__file__).parent.parent / "parity" / "official_configs.json"
    assert set(config_names()) >= {*json.loads(runs.read_text())["runs"], "tiny", "small", "long"}
    assert not any(name.startswith("_") for name in config_names())


@pytest.mark.smoke
@pytest.mark.parametrize("name", [*PAPER, "tiny", "small", "long"])
def test_every_shipped_configuration_is_legal_named_after_its_file_and_survives_json(name):
    config = load_config(name)
    config.validate()
    assert config.name == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", PAPER)
def test_full_size_runs_differ_only_in_attention_mlp_width_and_initial_outputs(name):
    config, base = load_config(name), load_config("mlra_4")
    fields = ("attention", "n_heads", "gated_attention", "d_ff", "output_init")
    same = dataclasses.replace(config.model, **{field: getattr(base.model, field) for field in fields})
    assert dataclasses.replace(config, name=base.name, model=same) == base


def test_full_size_step_is_983_040_tokens_and_runs_on_eight_devices():
    config = load_config("mlra_4")
    mesh = config.mesh.resolve(8)
    assert config.data.global_batch * config.data.seq_len == 983_040
    assert config.data.accumulation(mesh.data * mesh.fsdp) == 60


@pytest.mark.parametrize("name", config_names())
def test_header_gives_the_command_hardware_time_and_result(name):
    folder = next(f for f in config_folders() if (f / f"{name}.py").exists())
    header = (folder / f"{name}.py").read_text().split('"""')[1]
    assert f"python train.py configs/{name}.py" in header
    assert all(word in header for word in ("Hardware", "Wall time", "Result"))


def test_path_and_name_load_the_same(repository):
    assert load_config(str(repository / "configs" / "tiny.py")) == load_config("tiny")


def test_local_configs_folder_comes_before_the_shipped_one(tmp_path, monkeypatch):
    write(tmp_path / "configs" / "tiny.py", MINIMAL)
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny").name == "mine"
    assert load_config("small").name == "small"


def test_neighbours_are_imported_relatively_without_touching_the_import_path(tmp_path):
    before = list(sys.path)
    for folder, name in (("a", "first"), ("b", "second")):
        write(tmp_path / folder / "_base.py", f"NAME = {name!r}\n")
        text = "from mlra_jax.config import TrainConfig\nfrom ._base import NAME\n"
        path = write(
            tmp_path / folder / "mine.py", text + "def get_config(): return TrainConfig(name=NAME)\n"
        )
        assert load_config(path).name == name  # the second folder's `_base` is not the first's
    assert sys.path == before


def test_edited_configuration_is_read_again(tmp_path):
    path = write(tmp_path / "mine.py", MINIMAL)
    assert load_config(path).name == "mine"
    write(tmp_path / "mine.py", MINIMAL.replace("mine", "edited"))
    assert load_config(path).name == "edited"


def test_unknown_name_is_refused_with_a_suggestion_and_the_list():
    message = failing(load_config, "tinny")
    assert "No configuration tinny. Did you mean tiny?" in message
    assert all(name in message for name in PAPER)


def test_missing_path_is_refused_with_a_suggestion():
    assert "Did you mean mlra_4?" in failing(load_config, "somewhere/mlra4.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", "defines no function get_config()"),
        ("get_config = 3\n", "defines no function get_config()"),
        ("def get_config(): return {}\n", "returned a dict; it must return a TrainConfig"),
        ("def get_config(:\n", "mine.py, line 1: "),
        (
            "\nimport no_such_module\n",
            "mine.py, line 2: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("\n\ndef get_config():\n    return 1 / 0\n", "mine.py, line 4: ZeroDivisionError"),
        (MINIMAL.replace("name='mine'", "model=ModelConfig(n_layer=3)"), "line 2: TypeError"),
    ],
)
def test_broken_configuration_is_one_sentence_with_the_place(tmp_path, text, expected):
    message = failing(load_config, write(tmp_path / "mine.py", text))
    assert expected in message
    assert "\n" not in message


def test_misspelt_field_in_a_file_fails_with_a_suggestion(tmp_path):
    text = MINIMAL.replace("name='mine'", "model=ModelConfig(n_layer=3)")
    message = failing(load_config, write(tmp_path / "mine.py", text))
    assert "'n_layer'" in message
    assert "Did you mean n_layers?" in message


@pytest.mark.parametrize(
    ("name", "text", "faults"),
    [
        (
            "mine.py",
            MINIMAL.replace("name='mine'", "steps=0, model=ModelConfig(output_init='zero')"),
            [
                "model.output_init='zero' must be one of zeros, normal. Did you mean zeros?",
                "steps=0 must be at",
            ],
        ),
        (
            "config.json",
            '{"steps": "40", "sed": 1}',
            ["Unknown field sed. Did you mean seed?", "steps='40' must"],
        ),
        ("config.json", "[1]", ["The configuration=[1] must be TrainConfig, not list."]),
        ("config.json", "{", ["is not the config.json of a run"]),
    ],
)
def test_illegal_values_in_a_file_are_listed_with_its_path_before_the_command_line_is_read(
    tmp_path, name, text, faults
):
    path = write(tmp_path / name, text)
    message = failing(parse_train_args, [path, "--steps", "3"])
    assert all(fault in message for fault in faults)
    assert message.count(path) == len(faults)


def test_file_that_is_not_python_is_refused(tmp_path):
    assert "is not a Python file" in failing(load_config, write(tmp_path / "mine.yaml", "a: 1\n"))


def test_overrides_change_what_they_name_and_nothing_else(capsys):
    options = "--optim.lr 3e-4 --mesh.tensor=4 --model.attention.n-branches 2 --log.no_tensorboard"
    changed = parse_train_args(["mlra_4", *options.split(), "--model.remat", "dots", "--name", "x"])
    base = load_config("mlra_4")
    expected = to_dict(base)
    expected["optim"]["lr"] = 3e-4
    expected["mesh"]["tensor"] = 4
    expected["model"]["attention"]["n_branches"] = 2
    expected["log"]["tensorboard"] = False
    expected["execution"]["remat"] = "dots"
    expected["name"] = "x"
    assert to_dict(changed) == expected
    assert capsys.readouterr().err == "--model.remat is called --execution.remat now.\n"


def test_profile_is_short_for_the_number_of_steps_to_record():
    assert parse_train_args(["tiny", "--profile", "3"]).log.profile_steps == 3
    assert load_config("tiny").log.profile_steps == 0


def test_grouped_attention_is_overridden_in_its_own_fields():
    config = parse_train_args(["gqa", "--model.attention.n_kv_heads", "12"])
    assert config.model.attention == GroupedAttentionConfig(n_kv_heads=12, d_head=128)


def test_no_override_leaves_the_configuration_as_it_is():
    assert parse_train_args(["tiny"]) == load_config("tiny")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["tiny", "--optim.lrr", "1"], "--optim.lr"),
        (["tiny", "--n_layers", "1"], "--model.n_layers"),
        (["gqa", "--model.attention.kv_head", "1"], "--model.attention.n_kv_heads"),
        (["tiny", "--steps", "many"], "--steps"),
        (["tiny", "--execution.remat", "fulll"], "'dots'"),
        (["tiny", "--steps"], "--steps"),
    ],
)
def test_unknown_or_malformed_option_exits_with_2_and_shows_what_is_meant(capsys, argv, expected):
    with pytest.raises(SystemExit) as caught:
        parse_train_args(argv)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_every_fault_of_the_overrides_is_listed_at_once():
    message = failing(parse_train_args, ["tiny", "--optim.lr", "-1", "--model.n_heads", "0", "--steps", "0"])
    assert all(word in message for word in ("optim.lr=-1", "model.n_heads=0", "steps=0"))


@pytest.mark.parametrize("argv", [[], ["--steps", "3"]])
def test_command_line_without_a_configuration_is_refused_with_the_list(argv):
    message = failing(parse_train_args, argv)
    assert "CONFIG" in message
    assert all(name in message for name in PAPER)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--help"], "(default: mlra_4)"),
        (["tiny", "--help"], "(default: tiny)"),
        (["-h"], "usage: prog CONFIG"),
    ],
)
def test_help_shows_every_section_the_names_and_the_values(capsys, argv, shown):
    with pytest.raises(SystemExit) as caught:
        parse_train_args(argv, "prog")
    assert not caught.value.code
    text = capsys.readouterr().out
    assert shown in text
    assert "mlra_4" in text
    for part in ("model", "model.attention", "data", "optim", "mesh", "checkpoint", "log"):
        assert f"{part} options" in text


def test_every_field_has_help(capsys):
    with pytest.raises(SystemExit):
        parse_train_args(["--help"], "prog")
    text = capsys.readouterr().out

    def check(config: object, prefix: str) -> None:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                check(value, f"{prefix}{field.name}.")
            else:
                assert f"--{prefix}{field.name}" in text

    check(TrainConfig(), "")
