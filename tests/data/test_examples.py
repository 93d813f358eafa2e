"""Examples: the layouts token by token, limits, and rows that keep what is learnt."""

import json

import numpy as np
import pytest

from jaxllm.data.examples import ExamplesConfig
from jaxllm.data.packing import packed_rows
from jaxllm.data.store import TokenStore, write_stores
from jaxllm.errors import UserError
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.chat_template import chat_template
from jaxllm.tokenizers.interface import SpecialIds, Tokenizer

TOKENIZER = ByteTokenizer()


class Numbers(Tokenizer):
    """Its text is numbers, `"1 2"` being [1, 2]; `bos` is 8, `eos` 16 and `pad` 0."""

    vocab_size, fingerprint = 300, "numbers"

    def __init__(self):
        self._set_special_ids(SpecialIds(bos=8, eos=16, pad=0, unk=None), [])

    def encode(self, text, parse_special_tokens=False):
        return list(map(int, text.split()))

    def encode_batch(self, texts, parse_special_tokens=False, workers=0):
        return list(map(self.encode, texts))

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))

    def save(self, directory):
        raise NotImplementedError


def conversation(*contents):
    roles = ("user", "assistant") * len(contents)
    turns = zip(roles, contents, strict=False)
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})


def numbers(begin, end):
    return " ".join(map(str, range(begin, end + 1)))


def rows_of(texts, tmp_path, config=ExamplesConfig(), seq_len=15, packing="none", tokenizer=None):  # noqa: B008
    tokenizer = tokenizer or Numbers()
    encoder = config.encoder(tokenizer, seq_len)
    named = (("all", text) for text in texts)
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    store = write_stores(path, ["all"], named, tokenizer, "", encoder=encoder)["all"]
    assert TokenStore.open(store.path) == store
    rows = packed_rows(store, packing, seq_len)
    return [rows[number] for number in range(len(rows))], store


@pytest.mark.parametrize(
    ("answer", "y", "mask"),
    [
        ((9, 15), [*range(2, 17)], [0] * 6 + [1] * 9),
        ((9, 13), [*range(2, 14), 16, 0, 0], [0] * 6 + [1] * 7 + [0] * 2),
    ],
)
@pytest.mark.parametrize("train_on_bos", [True, False])
def test_the_documented_examples(answer, y, mask, train_on_bos, tmp_path):
    """With prompt 1..7, bos 8, eos 16, pad 0 and 16 tokens at most."""
    config = ExamplesConfig(train_on_bos=train_on_bos)
    [row], store = rows_of([conversation(numbers(1, 7), numbers(*answer))], tmp_path, config)
    size = 15 - mask[::-1].index(1)
    assert row["tokens"].tolist() == [*range(1, answer[1] + 1)] + [0] * (15 - size)
    assert row["targets"].tolist() == y
    mask[6] = int(train_on_bos)
    assert row["loss_weights"].tolist() == mask
    assert row["segment_ids"].tolist() == [1] * size + [0] * (15 - size)
    assert store.num_predicted == sum(mask)


def test_every_answer_of_a_conversation_is_learnt(tmp_path):
    [row], _ = rows_of([conversation("1", "9", "2 3", "10")], tmp_path, seq_len=9)
    assert row["tokens"].tolist() == [1, 8, 9, 16, 2, 3, 8, 10, 0]
    assert row["targets"].tolist() == [8, 9, 16, 2, 3, 8, 10, 16, 0]
    assert row["loss_weights"].tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 0]


def test_the_prompt_is_learnt_if_asked(tmp_path):
    config = ExamplesConfig(train_on_prompt=True, train_on_bos=False)
    [row], _ = rows_of([conversation("1 2", "9")], tmp_path, config, seq_len=4)
    assert row["loss_weights"].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "tokens", "targets", "truncated"),
    [
        ({"max_prompt": 2}, [1, 2, 8, 9, 10], [2, 8, 9, 10, 16], 1),
        ({"max_answer": 1}, [1, 2, 3, 8], [2, 3, 8, 9], 1),
        ({"max_prompt": 3, "max_answer": 2}, [1, 2, 3, 8, 9, 10], [2, 3, 8, 9, 10, 16], 0),
    ],
)
def test_what_is_too_long_loses_its_end_and_is_counted(
    options, tokens, targets, truncated, tmp_path
):
    config = ExamplesConfig(**options)
    [row], store = rows_of([conversation("1 2 3", "9 10")], tmp_path, config)
    assert row["tokens"].tolist() == tokens + [0] * (15 - len(tokens))
    assert row["targets"].tolist() == targets + [0] * (15 - len(targets))
    assert store.truncated == truncated


def test_an_example_without_anything_to_learn_is_left_out_and_counted(tmp_path):
    texts = [conversation(numbers(1, 7), "9"), conversation("1", "9"), conversation("1 2", "9")]
    rows, store = rows_of(texts, tmp_path, seq_len=2)
    assert [row["targets"].tolist() for row in rows] == [[8, 9], [2, 8]]
    assert all(row["loss_weights"].any() for row in rows)
    assert (store.dropped, store.truncated, store.num_documents) == (1, 2, 2)


def test_no_example_is_cut_when_rows_are_packed(tmp_path):
    draw = np.random.default_rng(0)
    texts = []
    for number in range(60):
        asked, answered = draw.integers(1, 12, 2)
        texts.append(conversation(f"{number} " * asked, f"{100 + number} " * answered))
    alone, store = rows_of(texts, tmp_path, seq_len=20)
    packed, _ = rows_of(texts, tmp_path, seq_len=20, packing="best_fit")
    assert len(packed) < 0.8 * len(alone)
    assert store.truncated > 0
    names = ("tokens", "targets", "loss_weights", "positions")

    def examples(rows):
        for row in rows:
            for segment in range(1, row["segment_ids"].max() + 1):
                here = row["segment_ids"] == segment
                yield tuple(tuple(row[name][here].tolist()) for name in names)

    assert sorted(examples(packed)) == sorted(examples(alone))


def test_text_among_conversations_is_all_learnt_and_cut_over_rows(tmp_path):
    texts = [conversation("1", "9"), json.dumps({"text": numbers(1, 7)})]
    rows, store = rows_of(texts, tmp_path, seq_len=4)
    weights = [row["loss_weights"].tolist() for row in rows]
    assert weights == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert rows[1]["tokens"].tolist() == [8, 1, 2, 3]
    assert store.num_predicted == 3 + 8


@pytest.mark.parametrize(
    "contents", [("Hi", "Yes"), ("a", "b", "床前", "🌙 </s> <s>"), ("x\n", "\ny")]
)
def test_the_template_of_bos_separated_writes_what_is_trained_on(contents):
    config = ExamplesConfig()
    [trained] = config.encoder(TOKENIZER, 999)([conversation(*contents)], 1)
    written = chat_template(TOKENIZER, "bos_separated").encode_trained(
        json.loads(conversation(*contents))["messages"]
    )
    assert (list(trained.ids), list(trained.trained)) == (written.ids, written.trained)


def test_a_chat_layout_learns_answers_alone():
    config = ExamplesConfig(layout="chat")
    [example] = config.encoder(TOKENIZER, 999)([conversation("Hi", "Yes")], 1)
    learnt = [index for index, now in zip(example.ids, example.trained, strict=True) if now]
    assert TOKENIZER.decode(learnt, skip_special_tokens=False) == "Yes<|im_end|>"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[0].content.missing() }}", "missing"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_told_with_the_record(source, reason, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    encoder = ExamplesConfig(layout="chat", template=str(path)).encoder(TOKENIZER, 99)
    with pytest.raises(UserError, match=rf"mine\.jinja\): .*{reason}.*in the record .*\"Hi\""):
        encoder([conversation("Hi", "Yes")], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "alpaca"}, "layout: must be one of bos_separated, chat"),
        ({"template": "chatml"}, "template: the layout bos_separated does not read it"),
        ({"layout": "chat", "max_answer": 5}, "max_answer: the layout chat does not read it"),
        ({"layout": "chat", "train_on_bos": False}, "train_on_bos: the layout chat"),
        ({"max_prompt": -1}, "max_prompt: must not be negative"),
    ],
)
def test_options_that_would_change_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExamplesConfig(**options)


def test_what_decides_the_tokens_decides_the_fingerprint():
    configs = [
        (ExamplesConfig(), 15),
        (ExamplesConfig(), 16),
        (ExamplesConfig(train_on_bos=False), 15),
        (ExamplesConfig(layout="chat"), 15),
        (ExamplesConfig(layout="chat", template="chatml"), 15),
    ]
    found = [config.encoder(TOKENIZER, length).fingerprint for config, length in configs]
    assert len(set(found)) == 4  # a template is known by its source, however it was named
    assert found[3] == found[4]
