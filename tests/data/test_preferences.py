"""Preferences: records of every form, what is refused, and how rankings lie in rows."""

import json

import numpy as np
import pytest

from jaxllm.data.cleaning import Cleaner, CleaningConfig
from jaxllm.data.documents import Document
from jaxllm.data.packing import packed_rows
from jaxllm.data.preferences import PreferenceReader
from jaxllm.data.rankings import Rankings, ResponseIds, fitted_responses, response_ids
from jaxllm.data.records import Record
from jaxllm.data.store import TokenStore, write_stores
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.chat_template import chat_template

USER = {"role": "user", "content": "q"}
PAIR = {"chosen": "good", "rejected": "bad"}


def read(fields, **options):
    reader = PreferenceReader("", **options)
    (passage,) = reader(Record(fields, "some/pairs.jsonl", 1), False, Cleaner(CleaningConfig()))
    return json.loads(passage.text)


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"prompt": "q"}, "q"),
        ({"instruction": "q", "input": " of"}, "q of"),
        ({"instruction": "q", "input": "", "prompt": "ignored"}, "q"),
        ({"messages": [USER]}, "q"),
        ({"prompt": [USER]}, "q"),
    ],
)
def test_forms_of_what_is_asked(fields, asked):
    found = read(fields | PAIR)
    assert found["messages"] == [{"role": "user", "content": asked}]
    assert found["responses"] == ["good", "bad"]
    assert found["scores"] == [1, 0]
    assert found["source"] == "pairs.jsonl"


@pytest.mark.parametrize(
    ("fields", "responses", "scores"),
    [
        ({"responses": ["a", "b", "c"]}, ["a", "b", "c"], [2, 1, 0]),
        ({"responses": ["a", "b", "c"], "scores": [1, 9.5, 1]}, ["a", "b", "c"], [1, 9.5, 1]),
        (PAIR | {"margin": 0.25}, ["good", "bad"], [0.25, 0]),
        (
            {"chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
            ["a", "b"],
            [1, 0],
        ),
    ],
)
def test_forms_of_responses(fields, responses, scores):
    found = read({"prompt": "q"} | fields)
    assert (found["responses"], found["scores"]) == (responses, scores)


def test_a_source_may_be_named():
    assert read({"prompt": "q", "source": "forum"} | PAIR)["source"] == "forum"


def test_one_response_with_a_label():
    for label in (True, 1):
        found = read({"prompt": "q", "response": "a", "label": label}, unpaired=True)
        assert (found["responses"], found["scores"]) == (["a"], [1])
    assert read({"prompt": "q", "completion": "a", "label": False}, unpaired=True)["scores"] == [0]


def test_unpaired_responses_are_good_or_bad_each_by_itself():
    reader = PreferenceReader("", unpaired=True)
    fields = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 9, 9]}
    passages = reader(Record(fields, "x.jsonl", 1), False, Cleaner(CleaningConfig()))
    found = [json.loads(passage.text) for passage in passages]
    assert [each["responses"] for each in found] == [["a"], ["b"], ["c"]]
    assert [each["scores"] for each in found] == [[0], [1], [1]]
    assert len({passage.group for passage in passages}) == 1
    assert {each["messages"][0]["content"] for each in found} == {"q"}


@pytest.mark.parametrize("unpaired", [False, True])
def test_copies_in_files_of_other_names_are_copies(unpaired):
    reader = PreferenceReader("", unpaired=unpaired)
    one, other = (
        [
            Document.of(passage.text, passage.group, 0, passage.alike)
            for passage in reader(
                Record({"prompt": "q"} | PAIR, name, 1), False, Cleaner(CleaningConfig())
            )
        ]
        for name in ("a.jsonl", "b.jsonl")
    )
    assert [document.digest for document in one] == [document.digest for document in other]
    assert len({document.digest for document in one}) == len(one)
    assert one[0].text != other[0].text  # which names its file


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "`chosen` and `rejected` are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "`rejected` is empty"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "`chosen` is missing"),
        ({"prompt": "q", "chosen": "a"}, "no `chosen` and `rejected`, or `responses`"),
        ({"prompt": "q", "responses": ["a"]}, "`responses` holds 1; a ranking has at least two"),
        ({"prompt": "q", "responses": ["a", "b", "a"]}, r"`responses\[0\]` and `responses\[2\]`"),
        ({"prompt": "q", "responses": "ab"}, "`responses` is no list"),
        ({"prompt": "q", "responses": ["a", 3]}, r"`responses\[1\]` is not a string but int"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "`scores` is no list of 2"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, "x"]}, "`scores.1.` is no number"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}, "all the same"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [2**24 + 1, 2**24]}, "all the same"),
        ({"prompt": "q", "margin": 1e-50} | PAIR, "`margin` is 1e-50"),
        (
            {"prompt": "q", "rejected": "b"}
            | {"chosen": {"role": "assistant", "content": "a", "reasoning_content": "r"}},
            "`chosen` has more than a text: reasoning_content",
        ),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, float("nan")]}, "is no number"),
        ({"prompt": "q", "margin": -1} | PAIR, "`margin` is -1"),
        ({"prompt": "q", "margin": True} | PAIR, "`margin` is no number"),
        ({"prompt": ""} | PAIR, "empty message"),
        (PAIR, "no `prompt`, `question`, `messages`, or `instruction`"),
        ({"messages": [{"role": "assistant", "content": "a"}]} | PAIR, "ends with an answer"),
        (
            {"messages": [{"role": "assistant", "content": "a"}, USER]} | PAIR,
            "begins with assistant",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "a"}]} | PAIR,
            "ends with an answer",
        ),
        ({"messages": [{"role": "nobody", "content": "a"}]} | PAIR, "role is unknown"),
        ({"prompt": "q", "chosen": [USER], "rejected": "b"}, "is said by user"),
        ({"prompt": "q", "chosen": [USER, USER], "rejected": "b"}, "holds 2 messages"),
        ({"prompt": "q", "chosen": "\ud800", "rejected": "b"}, "lone surrogate"),
    ],
)
def test_bad_records(fields, message):
    with pytest.raises(ValueError, match=message):
        read(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "q", "response": "a"}, "no `label`"),
        ({"prompt": "q", "label": True}, "no `chosen` and `rejected`.*or `response`"),
        ({"prompt": "q", "response": "a", "label": "yes"}, "'yes' is neither true nor false"),
    ],
)
def test_bad_labels(fields, message):
    with pytest.raises(ValueError, match=message):
        read(fields, unpaired=True)


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ("bos_separated", ["hi<s>yo</s>q?", "<s>good</s>"]),
        (
            "chatml",
            [
                "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
                "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n",
                "good<|im_end|>",
            ],
        ),
    ],
)
def test_a_response_begins_where_the_model_is_to_write(named, written):
    tokenizer = ByteTokenizer()
    answer = {"role": "assistant", "content": "yo"}
    asked = [USER | {"content": "hi"}, answer, USER | {"content": "q?"}]
    template = chat_template(tokenizer, named)
    (found,) = response_ids(template, asked, ["good"])
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in found] == written


def test_what_follows_an_answer_is_not_taken_for_it():
    """A tool's empty message stands between two answers, which then stand side by side."""
    tokenizer = ByteTokenizer()
    template = chat_template(tokenizer, "bos_separated")
    asked = [USER, {"role": "assistant", "content": "call"}, {"role": "tool", "content": ""}]
    (found,) = response_ids(template, asked, ["a"])
    written = [tokenizer.decode(ids, skip_special_tokens=False) for ids in found]
    assert written == ["q<s>call</s>", "<s>a</s>"]


def test_a_response_of_which_the_template_writes_nothing_is_left_out(tmp_path):
    path = tmp_path / "strips.jinja"
    path.write_text("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}")
    template = chat_template(ByteTokenizer(), str(path))
    with pytest.raises(ValueError, match="writes nothing of a response"):
        response_ids(template, [USER], ["<think>x</think>"])
    ranking = read({"prompt": "q", "responses": ["<think>x</think>", "a"]})
    assert Rankings(template, 50)([json.dumps(ranking)]) == [None]


def test_tools_are_handed_to_the_template():
    tools = [{"type": "function", "function": {"name": "look"}}]
    found = read({"prompt": "q", "tools": json.dumps(tools)} | PAIR)
    assert found["tools"] == tools
    template = chat_template(ByteTokenizer(), "chatml")
    with_tools, without = (
        response_ids(template, found["messages"], ["a"], given)[0] for given in (tools, None)
    )
    assert len(with_tools.prompt) > len(without.prompt)
    assert with_tools.response == without.response


def test_a_long_prompt_loses_its_beginning_and_responses_only_then_their_ends():
    found = [ResponseIds(range(10), [20, 21, 22]), ResponseIds(range(10), [30])]
    assert fitted_responses(found, 24) == found
    one, other = fitted_responses(found, 20)
    assert (list(one.prompt), list(other.prompt)) == ([2, 3, 4, 5, 6, 7, 8, 9],) * 2
    assert (one.response, other.response) == ([20, 21, 22], [30])
    one, other = fitted_responses(found, 5)
    assert (list(one.prompt), list(other.prompt)) == ([9], [9])
    assert (one.response, other.response) == ([20, 21], [30])
    # The longest loses its end, and no more of it than must be.
    found = [ResponseIds(range(10), range(96)), ResponseIds(range(10), range(4))]
    one, other = fitted_responses(found, 100)
    assert (len(one.response), len(other.response)) == (94, 4)


@pytest.mark.parametrize("lengths", [(3, 1), (5, 5, 5), (9, 1, 2, 30), (1,) * 7, (40, 2, 1)])
def test_cut_responses_take_so_many_places_at_most(lengths):
    found = [ResponseIds(range(10), range(length)) for length in lengths]
    for places in range(2 * len(lengths), 120):
        fitted = fitted_responses(found, places)
        assert sum(len(part) for each in fitted for part in each) <= places
        assert all(each.prompt and each.response for each in fitted)


@pytest.mark.parametrize("responses", [["ab", "cd"], list("abcdefg")])
@pytest.mark.parametrize("named", ["bos_separated", "chatml"])
def test_rankings_fit_into_rows_or_are_left_out(named, responses):
    """However short rows are, none is longer than one."""
    text = json.dumps(read({"prompt": "q", "responses": responses}))
    template = chat_template(ByteTokenizer(), named)
    counts = []
    for places in range(8, 200):
        (found,) = Rankings(template, places)([text])
        counts.append(found is not None)
        if found:
            assert len(found.ids) - 1 <= places
            assert len(found.parts) == len(responses)
    assert counts == sorted(counts)
    assert counts[-1]


RANKINGS = [("ask", ["good", "worse", "bad"]), ("q", ["ab", "cdefg"]), ("why not", ["x", "yz"])]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    template = chat_template(ByteTokenizer(), "bos_separated")
    encoder = Rankings(template, 40)
    texts = [
        json.dumps({**read({"prompt": prompt, "responses": responses})})
        for prompt, responses in RANKINGS
    ]
    named = [("all", text) for text in texts]
    folder = tmp_path_factory.mktemp("stores") / "store"
    return write_stores(folder, ["all"], named, template.tokenizer, "", encoder=encoder)["all"]


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_rankings_lie_whole_in_rows(store, packing):
    assert (store.most_parts, store.num_documents, store.truncated) == (3, 3, 0)
    assert TokenStore.open(store.path) == store
    tokenizer = ByteTokenizer()
    values = [np.arange(1, 8, dtype=np.float32)]
    rows = packed_rows(store, packing, 40, part_values={"reference_log_probs": values})
    found, ends = [], []
    for row in (rows[number] for number in range(len(rows))):
        for ranking in range(1, row["ranking_ids"].max() + 1):
            inside = row["ranking_ids"] == ranking
            segments = dict.fromkeys(row["segment_ids"][inside].tolist())
            responses = []
            for segment in segments:
                places = np.flatnonzero(row["segment_ids"] == segment)
                assert row["positions"][places].tolist() == list(range(len(places)))
                assert len(set(row["scores"][places])) == 1
                learnt = row["targets"][places][row["loss_weights"][places] > 0]
                responses.append(tokenizer.decode(learnt.tolist()))
                whole = tokenizer.decode(row["tokens"][places].tolist(), skip_special_tokens=False)
                assert whole.endswith("</s>")  # what closes a response is read too
                assert np.count_nonzero(row["reference_log_probs"][places]) == 1
                ends.append(row["reference_log_probs"][places[-1]])
            scores = [row["scores"][row["segment_ids"] == segment][0] for segment in segments]
            assert scores == sorted(scores, reverse=True)
            found.append(responses)
        padding = row["segment_ids"] == 0
        assert not any(row[name][padding].any() for name in row)
    assert sorted(found) == sorted(responses for _, responses in RANKINGS)
    assert sorted(ends) == list(range(1, 8))
    empty = rows.empty()
    assert {name: a.dtype for name, a in empty.items()} == {n: a.dtype for n, a in row.items()}
    assert not any(array.any() for array in empty.values())


def test_responses_that_become_the_same_when_cut_are_left_out():
    encoder = Rankings(chat_template(ByteTokenizer(), "bos_separated"), 10)
    (found,) = encoder([json.dumps(read({"prompt": "q", "responses": ["same end", "same and"]}))])
    assert found is None
