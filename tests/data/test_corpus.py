"""The whole preparation: made once, reused when nothing changed, made again when something did."""

import dataclasses
import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxllm.data.config import DataConfig
from jaxllm.data.corpus import prepare_corpus, prepare_text
from jaxllm.errors import UserError
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.training import train_tokenizer

TOKENIZER = TokenizerConfig(vocab_size=320)
WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrs"]


def write_corpus(path, count=80, seed=0):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_corpus(tmp_path / "a.jsonl")


class Phases(list):
    """The phases that were worked through, and a check of what is reported of them."""

    def __call__(self, phase, done, total):
        if phase not in self:
            assert done == 0
            self.append(phase)
        assert total == 0 or done <= total
        self.last = (done, total)


def prepare(work_dir, tokenizer=TOKENIZER, **options):
    phases = Phases()
    data = DataConfig(**{"train": "a.jsonl", "eval_fraction": 0.2, **options})
    return prepare_corpus(data, tokenizer, work_dir, phases), phases


def documents(corpus, store):
    parts = [np.split(store.tokens(n), store.offsets(n)[1:-1]) for n in range(len(store.shards))]
    return [corpus.tokenizer.decode(part.tolist()) for part in itertools.chain(*parts)]


def train_documents(corpus):
    return list(itertools.chain(*(documents(corpus, store) for store in corpus.train)))


ALL_PHASES = ["read", "train tokenizer", "tokenise"]


def test_every_text_is_on_one_side_and_in_order(texts, tmp_path):
    corpus, phases = prepare(tmp_path / "run")
    assert phases == ALL_PHASES
    assert phases.last == (corpus.train[0].num_bytes + corpus.eval.num_bytes,) * 2
    train, evaluation = list(corpus.train_texts()), list(corpus.eval_texts())
    assert sorted(train + evaluation) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train
    assert train_documents(corpus) == train
    assert documents(corpus, corpus.eval) == evaluation
    assert corpus.eval.num_bytes == sum(len(text.encode()) for text in evaluation)
    assert 4 < len(evaluation) < 32
    assert corpus.split.bad_lines == 0


def test_a_second_call_reads_no_text(texts, tmp_path):
    first, _ = prepare(tmp_path / "run")
    second, phases = prepare(tmp_path / "run")
    assert phases == []
    assert (second.train, second.eval) == (first.train, first.eval)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert list(second.eval_texts()) == list(first.eval_texts())


def test_what_depends_on_a_change_is_made_again(texts, tmp_path):
    prepare(tmp_path / "run")
    _, phases = prepare(tmp_path / "run", tokenizer=TokenizerConfig(vocab_size=300))
    assert phases == ALL_PHASES[1:]
    _, phases = prepare(tmp_path / "run", eval_fraction=0.3)
    assert phases == ALL_PHASES
    write_corpus(tmp_path / "a.jsonl", 90)
    corpus, phases = prepare(tmp_path / "run", eval_fraction=0.3)
    assert phases == ALL_PHASES
    assert corpus.train[0].num_documents + corpus.eval.num_documents == 90


def test_a_store_of_another_fingerprint_is_made_again(texts, tmp_path):
    corpus, _ = prepare(tmp_path / "run")
    manifest = corpus.eval.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(corpus.eval.fingerprint, "other"))
    again, phases = prepare(tmp_path / "run")
    assert phases == ["tokenise"]
    assert again.eval == corpus.eval


def test_a_shared_store_is_used_by_another_run(texts, tmp_path):
    prepare(tmp_path / "one", store="shared")
    _, phases = prepare(tmp_path / "two", store="shared")
    assert phases == ["train tokenizer"]
    assert not (tmp_path / "one" / "store").exists()


def test_of_much_text_a_part_trains_the_tokenizer(texts, tmp_path):
    whole, _ = prepare(tmp_path / "one")
    part = dataclasses.replace(TOKENIZER, train_bytes=whole.split.train_bytes // 4)
    some, _ = prepare(tmp_path / "two", tokenizer=part)
    assert some.tokenizer.fingerprint != whole.tokenizer.fingerprint
    trained = train_tokenizer(TOKENIZER, list(whole.train_texts())[::5])
    assert some.tokenizer.fingerprint == trained.fingerprint


def test_the_tokenizer_is_trained_on_the_training_side_alone(texts, tmp_path):
    first, _ = prepare(tmp_path / "one", eval="b.txt" if write_eval(tmp_path, "zeta") else "")
    write_eval(tmp_path, "omega")
    second, _ = prepare(tmp_path / "two", eval="b.txt")
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint


def write_eval(folder, word):
    return (folder / "b.txt").write_text(f"{word} " * 500)


def test_a_source_of_held_out_text_leaves_all_of_the_training_text(texts, tmp_path):
    write_eval(tmp_path, "omega")
    corpus, _ = prepare(tmp_path / "run", eval="b.txt")
    assert list(corpus.train_texts()) == texts
    assert list(corpus.eval_texts()) == [("omega " * 500).strip()]
    assert train_documents(corpus) == texts


def test_a_saved_tokenizer_is_used_as_it_is(texts, tmp_path):
    first, _ = prepare(tmp_path / "one")
    config = dataclasses.replace(TOKENIZER, path=str(tmp_path / "one" / "tokenizer"))
    second, phases = prepare(tmp_path / "two", tokenizer=config)
    assert "train tokenizer" not in phases
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    with pytest.raises(UserError, match=r"config\.tokenizer\.path: nowhere"):
        prepare(tmp_path / "two", tokenizer=dataclasses.replace(TOKENIZER, path="nowhere"))


@pytest.mark.parametrize("missing", ["eval", "manifest.json", "sides.npy", "trained_from.json"])
def test_a_half_made_preparation_is_finished_to_the_same_end(texts, tmp_path, missing):
    whole, _ = prepare(tmp_path / "run")
    for path in sorted((tmp_path / "run").rglob(missing)):
        if path.is_dir():
            path.rename(path.with_name(f"{path.name}.unfinished"))
        else:
            path.unlink()
    again, phases = prepare(tmp_path / "run")
    assert phases
    assert (again.train, again.eval) == (whole.train, whole.eval)
    np.testing.assert_array_equal(again.split.sides, whole.split.sides)
    assert not list((tmp_path / "run").rglob("*.unfinished"))


def test_each_source_has_a_store_and_weights_change_nothing(texts, tmp_path):
    more = write_corpus(tmp_path / "b.jsonl", 30, seed=1)
    corpus, _ = prepare(tmp_path / "run", train="a.jsonl@0.9,b.jsonl@0.1:4")
    assert [(e.name, e.weight, e.max_epochs) for e in corpus.entries] == [
        ("a.jsonl", 0.9, float("inf")),
        ("b.jsonl", 0.1, 4.0),
    ]
    first, second = (set(documents(corpus, store)) for store in corpus.train)
    assert first < set(texts)
    assert second < set(more)
    assert len(first) + len(second) + corpus.eval.num_documents == 110
    assert list(corpus.train_texts()) == train_documents(corpus)
    again, phases = prepare(tmp_path / "run", train="a.jsonl,b.jsonl")
    assert phases == []
    assert again.train == corpus.train


def test_text_is_cleaned_and_duplicates_are_left_out(texts, tmp_path):
    lines = [json.dumps({"text": f"caf{accent}\u200b {texts[0]}  \n"}) for accent in "eé"]
    copies = [json.dumps({"text": texts[n].replace(" ", "\u00a0")}) for n in range(3)]
    own = " ".join(random.Random(9).choices(WORDS, k=40))
    (tmp_path / "b.jsonl").write_text(
        "\n".join([json.dumps({"text": own}), *lines, *copies, *copies])
    )
    for _ in range(2):  # read, and remembered
        corpus, _ = prepare(tmp_path / "run", train="a.jsonl,b.jsonl")
        assert corpus.split.cleaned == {
            "control_characters": 2,
            "whitespace": 8,
            "exact_duplicates": 6,
            "near_duplicates": 2,
        }
        kept = [*corpus.train_texts(), *corpus.eval_texts()]
        assert sorted(kept) == sorted([*texts, own])
    with pytest.raises(UserError, match=r"\./a\.jsonl: none of its text is left to train on"):
        prepare(tmp_path / "run", train="a.jsonl,./a.jsonl,builtin:sorting:20")


def test_two_processes_that_make_one_store_take_turns(texts, tmp_path):
    with ThreadPoolExecutor() as threads:
        runs = [threads.submit(prepare, tmp_path / name, store="shared") for name in ("one", "two")]
        (one, _), (two, _) = (run.result() for run in runs)
    assert one.train == two.train
    assert train_documents(one) == list(two.train_texts())


def test_held_out_sources_take_no_weights(texts, tmp_path):
    write_eval(tmp_path, "omega")
    with pytest.raises(UserError, match=r"config\.data\.eval: held-out text is read whole"):
        prepare(tmp_path / "run", eval="b.txt@2")


def test_bad_lines_are_counted_and_listed_also_when_nothing_is_read_again(texts, tmp_path):
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("broken\n")
    with pytest.raises(UserError, match=r"1 of the 81 lines"):
        prepare(tmp_path / "one", store="shared")
    for run in ("one", "one", "two"):
        corpus, _ = prepare(tmp_path / run, store="shared", max_bad_fraction=0.02)
        assert corpus.split.bad_lines == 1
        assert corpus.train[0].num_documents + corpus.eval.num_documents == 80
        listed = json.loads((tmp_path / run / "rejected.jsonl").read_text())
        assert (listed["file"], listed["line"]) == ("a.jsonl", 81)


def test_no_text_is_told(texts, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"config\.data\.train: there is no text in empty\.jsonl"):
        prepare(tmp_path / "run", train="empty.jsonl")
    with pytest.raises(UserError, match=r"config\.data\.eval: there is no text in empty\.jsonl"):
        prepare(tmp_path / "run", eval="empty.jsonl")


def test_text_that_changes_while_it_is_prepared_is_noticed(texts, tmp_path):
    corpus, _ = prepare(tmp_path / "run")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one more in front"}) + "\n" + path.read_text())
    with pytest.raises(UserError, match=r"the text of a\.jsonl has changed since"):
        list(corpus.train_texts())
    path.write_text("")
    with pytest.raises(UserError, match=r"the text of a\.jsonl has changed since"):
        list(corpus.eval_texts())


def test_nothing_left_to_train_on_is_told(texts, tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.train: nothing of a\.jsonl is left"):
        prepare(tmp_path / "run", eval="a.jsonl")


@pytest.mark.parametrize("content", ["", "{}", "[]", "{"])
def test_a_damaged_record_is_made_again(texts, tmp_path, content):
    whole, _ = prepare(tmp_path / "run")
    for path in (tmp_path / "run").rglob("*.json"):
        if path.name in ("documents.json", "trained_from.json"):
            path.write_text(content)
    again, phases = prepare(tmp_path / "run")
    assert phases == ["read", "train tokenizer"]
    assert again.train == whole.train


def test_what_does_not_decide_the_split_changes_nothing(texts, tmp_path):
    write_eval(tmp_path, "omega")
    prepare(tmp_path / "run", eval="b.txt", eval_fraction=0.2)
    _, phases = prepare(tmp_path / "run", eval="b.txt", eval_fraction=0.3, workers=2)
    assert phases == []


def test_text_to_measure_on_remembers_its_bad_lines(texts, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "good\\u200b text"}\n' * 9 + "bad\n")
    corpus, _ = prepare(tmp_path / "run")
    data = DataConfig(eval="b.jsonl", max_bad_fraction=0.2, store="shared")
    for workdir in ("one", "one", "two"):
        store, split, _ = prepare_text(data, corpus.tokenizer, tmp_path / workdir)
        assert store.num_documents == 9  # copies stay
        assert split.bad_lines == 1
        assert split.cleaned == {"control_characters": 9}
        assert (tmp_path / workdir / "rejected.jsonl").exists()
    with pytest.raises(UserError, match="1 of the 10 lines"):
        strict = dataclasses.replace(data, max_bad_fraction=0.0)
        prepare_text(strict, corpus.tokenizer, tmp_path / "one")
