"""Objectives by name, and the refusal of those that leak or cannot be computed."""

import pytest

from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.objectives.pretraining import KINDS, ObjectiveConfig, check_model, make_objective
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_made_and_its_term_bears_its_name(tiny_model, kind):
    model = tiny_model(vocab_size=273, causal=kind != "masked_word")
    config = ObjectiveConfig(kind=kind, z_loss=0.25)
    check_model(model, config)
    objective = make_objective(model, config, ByteTokenizer())
    assert dict(objective.coefficients) == {kind: 1.0}


@pytest.mark.parametrize(
    ("kind", "causal", "message"),
    [
        ("next_token", False, "next_token would be shown the tokens that it has to predict"),
        ("prefix_lm", False, "prefix_lm would be shown the tokens that it has to predict"),
        ("masked_word", True, r"masked_word fills in .* give --config\.model\.causal=False"),
    ],
)
def test_what_leaks_or_sees_too_little_is_refused(tiny_model, kind, causal, message):
    with pytest.raises(UserError, match=rf"^config\.objective\.kind: {message}"):
        check_model(tiny_model(causal=causal), ObjectiveConfig(kind=kind))


def test_the_attention_backend_is_asked_for_a_prefix_where_one_is_needed(tiny_model, monkeypatch):
    asked = []

    def refuse(backend, **features):
        asked.append((backend, features["prefix"], features["window"]))
        raise UserError(f"config.model.attention: {backend} knows no prefix.")

    model = tiny_model(pattern="local", window=4)  # the real check has passed it without a prefix
    monkeypatch.setattr("jaxllm.models.attention.check_backend", refuse)
    check_model(model, ObjectiveConfig())
    assert not asked
    with pytest.raises(UserError, match="knows no prefix"):
        check_model(model, ObjectiveConfig(kind="prefix_lm"))
    assert asked == [(model.unrolled[0].attention.backend, True, 4)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "cloze"),
        ("mask_fraction", 0.0),
        ("mask_fraction", 1.1),
        ("prefix_fraction", -0.1),
        ("prefix_fraction", 1.0),
        ("z_loss", -1.0),
        ("label_smoothing", 1.0),
    ],
)
def test_every_option_is_checked(name, value):
    with pytest.raises(UserError, match=rf"^config\.objective\.{name}: must"):
        from_dict(ObjectiveConfig, {name: value}, "objective")


@pytest.mark.parametrize(
    ("kind", "option"), [("prefix_lm", "mask_fraction"), ("masked_word", "prefix_fraction")]
)
def test_an_option_of_another_kind_is_refused(kind, option):
    with pytest.raises(UserError, match=rf"^config\.objective\.{option}: belongs to the kind "):
        from_dict(ObjectiveConfig, {"kind": kind, option: 0.25}, "objective")


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (ObjectiveConfig(), 1.0),
        (ObjectiveConfig(kind="masked_word", mask_fraction=0.25), 0.25),
        (ObjectiveConfig(kind="prefix_lm", prefix_fraction=0.25), 0.75),
    ],
)
def test_a_kind_tells_the_share_of_places_that_it_predicts(config, share):
    assert KINDS[config.kind].predicted(config) == share
