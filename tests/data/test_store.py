"""The token store: what goes in comes out, in whole shards, or not at all."""

import json

import numpy as np
import pytest

from jaxllm.data import store as store_module
from jaxllm.data.store import TokenStore, write_stores
from jaxllm.errors import UserError
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.training import train_tokenizer

TEXTS = [
    f"document {number} " + "床前明月光 words and words " * (number % 5) for number in range(97)
]


def write_store(path, texts, tokenizer, fingerprint, **options):
    """One store of all texts, in the folder `path / "all"`."""
    named = (("all", text) for text in texts)
    return write_stores(path, ["all"], named, tokenizer, fingerprint, **options)["all"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerConfig(vocab_size=280), TEXTS)


def expected(tokenizer):
    return [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id] for t in TEXTS]


@pytest.mark.parametrize("tokens_per_shard", [1, 500, 1 << 26])
def test_documents_come_back_in_order(tokenizer, tmp_path, tokens_per_shard):
    store = write_store(tmp_path / "s", TEXTS, tokenizer, "abc", tokens_per_shard=tokens_per_shard)
    documents = []
    for number, counts in enumerate(store.shards):
        tokens, offsets = store.tokens(number), store.offsets(number)
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        assert offsets[-1] == len(tokens) == counts.tokens
        documents += [part.tolist() for part in np.split(tokens, offsets[1:-1])]
        if number + 1 < len(store.shards):
            last = offsets[-1] - offsets[-2]
            assert len(tokens) >= tokens_per_shard > len(tokens) - last
    assert documents == expected(tokenizer)
    assert store.num_documents == len(TEXTS)
    assert store.num_tokens == sum(map(len, documents))
    assert store.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert (store.fingerprint, store.vocab_size) == ("abc", tokenizer.vocab_size)
    assert TokenStore.open(tmp_path / "s" / "all") == store


def test_large_vocabularies_take_four_bytes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 65_537)
    assert write_store(tmp_path / "s", TEXTS, tokenizer, "").tokens(0).dtype == np.uint32
    monkeypatch.setattr(tokenizer, "vocab_size", 65_536)
    assert write_store(tmp_path / "s", TEXTS, tokenizer, "").tokens(0).dtype == np.uint16


def test_an_unfinished_store_is_not_trusted_and_is_cleared_away(tokenizer, tmp_path):
    def texts():
        yield from TEXTS[:50]
        raise KeyboardInterrupt

    whole = write_store(tmp_path / "whole", TEXTS, tokenizer, "", tokens_per_shard=500)
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s", texts(), tokenizer, "", tokens_per_shard=500)
    with pytest.raises(UserError, match="not a complete token store"):
        TokenStore.open(tmp_path / "s" / "all")
    write_store(tmp_path / "s", TEXTS, tokenizer, "", tokens_per_shard=500)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "whole"]
    for path in whole.path.iterdir():
        assert (tmp_path / "s" / "all" / path.name).read_bytes() == path.read_bytes()


def test_progress_counts_bytes(tokenizer, tmp_path):
    done = []
    store = write_store(tmp_path / "s", TEXTS, tokenizer, "", progress=done.append)
    assert done == sorted(done)
    assert done[-1] == store.num_bytes


def test_damage_is_noticed(tokenizer, tmp_path):
    def damaged(change):
        write_store(tmp_path / "s", TEXTS, tokenizer, "")
        change(tmp_path / "s" / "all")
        with pytest.raises(UserError, match="not a complete token store"):
            TokenStore.open(tmp_path / "s" / "all")

    damaged(lambda path: (path / "manifest.json").unlink())
    damaged(lambda path: (path / "manifest.json").write_text("[]"))
    damaged(lambda path: (path / "offsets_00000.npy").unlink())
    damaged(lambda path: (path / "tokens_00000.npy").write_bytes(b""))
    damaged(lambda path: (path / "tokens_00000.npy").open("r+b").truncate(300))
    damaged(lambda path: np.save(path / "tokens_00000.npy", np.zeros(5, np.uint16)))

    def other_version(path):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 0}))

    damaged(other_version)


def test_each_document_goes_to_its_store(tokenizer, tmp_path):
    names = ["even", "odd", "none"]
    texts = [(names[number % 2], text) for number, text in enumerate(TEXTS)]
    stores = write_stores(tmp_path / "s", names, texts, tokenizer, "abc")
    for name, wanted in (("even", expected(tokenizer)[::2]), ("odd", expected(tokenizer)[1::2])):
        tokens, offsets = stores[name].tokens(0), stores[name].offsets(0)
        assert [part.tolist() for part in np.split(tokens, offsets[1:-1])] == wanted
    assert stores["none"].num_documents == 0
    assert TokenStore.open(tmp_path / "s" / "none") == stores["none"]


def test_the_bytes_do_not_depend_on_the_workers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_BATCH_BYTES", 200)  # many batches
    contents = []
    for workers in (1, 2, 4, 0):
        folder = tmp_path / str(workers)
        write_store(folder, TEXTS, tokenizer, "abc", workers=workers, tokens_per_shard=500)
        contents.append({path.name: path.read_bytes() for path in (folder / "all").iterdir()})
    assert len(contents[0]) > 5
    assert all(content == contents[0] for content in contents)
