"""Configuration: what is accepted, what is refused and how, and that every field is described."""

import dataclasses

import pytest

from jaxllm.config import config_dict, field_rows, flatten, from_dict
from jaxllm.errors import UserError
from jaxllm.stages.pretrain import PretrainConfig

STAGES = [PretrainConfig]


@dataclasses.dataclass(frozen=True)
class Inner:
    """A group."""

    rate: float = 0.5
    """The rate,
    in two lines."""
    count: int = 3
    """The count."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count: must not be negative")


@dataclasses.dataclass(frozen=True)
class Shared:
    """What stages share."""

    name: str = "x"
    """The name."""


@dataclasses.dataclass(frozen=True)
class Outer(Shared):
    """A stage, with a default of its own for a nested field."""

    inner: Inner = Inner(count=4)
    on: bool = True
    """Whether."""


@pytest.mark.parametrize("cls", [Outer, *STAGES])
def test_defaults_go_to_a_config_dict_and_back(cls):
    assert from_dict(cls, config_dict(cls())) == cls()
    assert from_dict(cls, {}) == cls()


def test_given_values_are_taken_nested_ones_too():
    config = from_dict(Outer, {"inner": {"rate": 2}, "on": False})
    assert config == Outer(inner=Inner(rate=2.0, count=4), on=False)
    assert type(config.inner.rate) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nme": "y"}, r"config\.nme: there is no such field; did you mean config\.name\?"),
        ({"inner": {"rat": 1.0}}, r"config\.inner\.rat: .* did you mean config\.inner\.rate\?"),
        ({"inner": {"name": "y"}}, r"config\.inner\.name: there is no such field"),
        ({"zzzzzzzz": 1}, r"config\.zzzzzzzz: there is no such field; see docs/configuration\.md"),
        ({"name": 3}, r"config\.name: must be str, and was given 3 \(int\)"),
        ({"inner": {"count": 1.5}}, r"config\.inner\.count: must be int, and was given 1\.5"),
        ({"inner": {"count": True}}, r"config\.inner\.count: must be int, and was given True"),
        ({"inner": {"rate": True}}, r"config\.inner\.rate: must be float, and was given True"),
        ({"inner": {"rate": "1"}}, r"config\.inner\.rate: must be float, and was given '1'"),
        ({"on": 1}, r"config\.on: must be bool, and was given 1 \(int\)"),
        ({"inner": 3}, r"config\.inner: is a group of fields, and was given 3"),
        ({"inner": {"count": -1}}, r"config\.inner\.count: must not be negative"),
    ],
)
def test_a_mistake_is_named_by_its_full_path(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(Outer, values)


def test_a_field_put_into_the_wrong_group_is_found_where_it_belongs():
    with pytest.raises(UserError, match=r"did you mean config\.inner\.rate\?"):
        from_dict(Outer, {"rate": 1.0})


def test_flatten_joins_names():
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}
    assert flatten(config_dict(Outer())) == {
        "inner.rate": 0.5,
        "inner.count": 4,
        "name": "x",
        "on": True,
    }


def test_rows_hold_path_default_and_description():
    assert list(field_rows(Outer)) == [
        ("name", "'x'", "The name."),
        ("inner.rate", "0.5", "The rate, in two lines."),
        ("inner.count", "4", "The count."),
        ("on", "True", "Whether."),
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_a_stage_is_described_with_the_default_that_counts(stage):
    rows = list(field_rows(stage))
    assert not [path for path, _, text in rows if not text]
    assert {path: default for path, default, _ in rows} == {
        path: repr(value) for path, value in flatten(dataclasses.asdict(stage())).items()
    }
