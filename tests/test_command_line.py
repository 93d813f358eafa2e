"""The command line: configuration files, presets and overrides; mistakes told in one line."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxllm import config as configuration
from jaxllm.command_line import load_config, override, parse
from jaxllm.errors import UserError
from jaxllm.main import RECIPE, STAGES

CONFIGS = Path(__file__).parents[1] / "configs"

_FILE = """\
from ml_collections import ConfigDict


def get_config({parameter}):
    config = ConfigDict()
    config.steps = 10
    config.rate = 0.1
    config.name = "first"
    config.shuffle = True
    config.model = ConfigDict({{"width": 16, "heads": 2}})
    {line}
    return config
"""


@pytest.fixture
def write(tmp_path):
    def make(line="", parameter="", name="config.py"):
        path = tmp_path / name
        path.write_text(_FILE.format(line=line, parameter=parameter))
        return path

    return make


def _message(function, *arguments):
    with pytest.raises(UserError) as refused:
        function(*arguments)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_fields_are_overridden_by_type(write):
    config, workdir = parse(
        [
            f"--config={write()}",
            "--workdir=some/where",
            "--config.steps=20",
            "--config.rate=1e-3",
            "--config.name=a=b c,d",
            "--config.shuffle=False",
            "-config.model.width=32",
        ]
    )
    assert workdir == Path("some/where")
    assert config.to_dict() == {
        "steps": 20,
        "rate": 1e-3,
        "name": "a=b c,d",
        "shuffle": False,
        "model": {"width": 32, "heads": 2},
    }


def test_overrides_may_come_before_the_file_and_the_last_one_counts(write):
    config, workdir = parse(["--config.steps=20", f"--config={write()}", "--config.steps=30"])
    assert config.steps == 30
    assert workdir is None


def test_a_switch_needs_no_value_and_an_empty_string_is_one(write):
    config, _ = parse([f"--config={write()}", "--config.shuffle", "--config.name="])
    assert config.shuffle is True
    assert config.name == ""


def test_a_preset_is_given_to_the_file(write):
    path = write("config.name = preset", "preset='none'")
    assert load_config(f"{path}:large").name == "large"
    assert load_config(str(path)).name == "none"


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--config.stepz=3", "config.stepz: there is no such field; did you mean config.steps?"),
        ("--config.model.widht=3", "did you mean config.model.width?"),
        ("--config.width=3", "did you mean config.model.width?"),
        ("--config.zzzzzz=3", "config.zzzzzz: there is no such field"),
        ("--config.steps=many", "config.steps: must be int, and was given 'many'"),
        ("--config.steps=1.5", "config.steps: must be int"),
        ("--config.rate=fast", "config.rate: must be float"),
        ("--config.shuffle=perhaps", "config.shuffle: must be bool"),
        ("--config.steps", "--config.steps: give a value, as in --config.steps=VALUE"),
        ("--config.model=3", "config.model: "),
        ("--worrkdir=x", "worrkdir"),
        ("x", "'x' is no flag"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(write, argument, says):
    assert says in _message(parse, [f"--config={write()}", argument])


def test_no_configuration_is_told():
    assert "--config is missing; usage: python -m jaxllm.main" in _message(parse, ["--workdir=x"])


def test_a_file_that_is_not_there_is_told(tmp_path):
    message = _message(load_config, str(tmp_path / "nowhere.py"))
    assert f"--config={tmp_path}/nowhere.py: there is no such file" in message
    assert "there is no such file" in _message(load_config, str(tmp_path))


def test_a_preset_of_a_file_without_presets_is_told(write):
    assert "has no presets" in _message(load_config, f"{write()}:large")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("config.model.lock(); config.model.widht = 3", "widht"),
        ("config.lock(); config.stepz = 3", "steps"),
        ("config.steps = 'many'", "many"),
        ("config.model.width = 1.5", "1.5"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("{}['key']", "KeyError: 'key'"),
        ("nonsense", "NameError: name 'nonsense' is not defined"),
        ("import not_installed_at_all", "No module named 'not_installed_at_all'"),
        ("raise ValueError('want\\n better')", "want better"),
        ("assert config.steps > 10, 'too few steps'", "AssertionError: too few steps"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(write, line, says):
    path = write(line)
    number = path.read_text().splitlines().index(f"    {line}") + 1
    message = _message(load_config, str(path))
    assert message.startswith(f"{path}:{number}: ")
    assert says in message


def test_the_line_is_told_for_a_relative_path_too(write, monkeypatch):
    path = write("config.steps = 'many'")
    monkeypatch.chdir(path.parent)
    assert _message(load_config, "config.py").startswith("config.py:11: ")


def test_a_file_may_refuse_by_itself(write):
    line = "from jaxllm.errors import UserError; raise UserError('--config: there is no preset x.')"
    assert _message(load_config, str(write(line))) == "--config: there is no preset x."


def test_a_syntax_error_is_told_with_its_line(write):
    path = write("config.steps = = 3")
    assert _message(load_config, str(path)).startswith(f"{path}:11: SyntaxError: invalid syntax")


def test_a_file_that_makes_no_configuration_is_told(tmp_path, write):
    (tmp_path / "empty.py").write_text("")
    assert "get_config" in _message(load_config, str(tmp_path / "empty.py"))
    assert "must return an ml_collections.ConfigDict" in _message(
        load_config, str(write("return {}"))
    )
    assert "must end in .py" in _message(load_config, str(write(name="config.yaml")))


def test_nothing_is_overridden_by_a_refused_command(write):
    config = load_config(str(write()))
    _message(override, config, ["--config.steps=20", "--config.stepz=3"])
    assert config.steps == 10


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_of_the_project_is_of_its_stage(path):
    config = load_config(str(path))
    assert isinstance(config, ConfigDict)
    # A recipe is called by what comes of it, and holds the configurations of its stages.
    parts = [config[name] for name in config.order.split(",")] if "order" in config else [config]
    assert config.stage == (path.stem if "order" not in config else RECIPE)
    assert {part.stage for part in parts} <= set(STAGES)
    assert f"configs/{path.name}" in path.read_text()  # the command stands on the page
    assert configuration.flatten(config)


def test_a_preset_that_does_not_exist_is_told():
    message = _message(load_config, f"{CONFIGS / 'pretrain.py'}:gigantic")
    assert "gigantic" in message
    assert "tiny" in message  # the ones that exist


def test_what_a_run_recorded_is_a_configuration(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"config": {"stage": "pretrain", "steps": 3, "data": {"train": "x"}}}')
    config, _ = parse([f"--config={path}", "--config.steps=4"])
    assert config.to_dict() == {"stage": "pretrain", "steps": 4, "data": {"train": "x"}}
    path.write_text('{"steps": 3}')
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        parse([f"--config={path}"])
