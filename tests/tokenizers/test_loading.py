"""Loading tokenizers made elsewhere: ids as their own library gives them, special tokens told."""

import io
import json
from pathlib import Path

import pytest
import tokenizers as hf
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, models, pre_tokenizers

from jaxllm.errors import UserError
from jaxllm.tokenizers.byte_tokenizer import byte_characters
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.tokenizer import configured_tokenizer, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared"


def write(folder, **files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")


def byte_level(*added, **model):
    """A byte-level `tokenizer.json` with the merge `a`+`b`, and added tokens."""
    vocabulary = {c: i for i, c in enumerate(byte_characters())} | {"ab": 256}
    backend = hf.Tokenizer(models.BPE(vocabulary, [("a", "b")], **model))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    for token in added:
        add = backend.add_tokens if isinstance(token, AddedToken) else backend.add_special_tokens
        add([token])
    return backend


@pytest.fixture
def gpt2_pair(tmp_path):
    """GPT-2's two files, with a learnt token that looks like a mark."""
    tokens = [*byte_characters(), "ab", "[.", "[.]", "<|endoftext|>"]
    write(
        tmp_path,
        vocab__json={token: i for i, token in enumerate(tokens)},
        merges__txt="#version: 0.2\na b\n[ .\n[. ]\n",
    )
    return tmp_path


def sentencepiece_model(texts, **options):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=380, minloglevel=2, **options
    )
    return model.getvalue()


def test_gpt2s_pair_of_files_is_read(gpt2_pair):
    for path in (gpt2_pair, gpt2_pair / "vocab.json", gpt2_pair / "merges.txt"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.vocab_size == 260
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (259, 259, 259)
        assert tokenizer.unk_id is None
        assert tokenizer.encode("ab[.]") == [256, 258]
        assert tokenizer.decode([256, 258]) == "ab[.]"  # a learnt token is not special
        assert 259 not in tokenizer.encode("ab<|endoftext|>")
        assert tokenizer.encode("ab<|endoftext|>", parse_special_tokens=True) == [256, 259]
        assert tokenizer.decode([256, 259]) == "ab"


def test_gpt2s_files_may_name_end_of_text_for_unknown(gpt2_pair):
    end = "<|endoftext|>"
    write(gpt2_pair, special_tokens_map__json={"unk_token": {"content": end}, "eos_token": end})
    assert load_tokenizer(gpt2_pair).unk_id is None


def test_the_pair_of_another_class_is_refused(gpt2_pair):
    write(gpt2_pair, tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(UserError, match="Qwen2Tokenizer splits text by rules that"):
        load_tokenizer(gpt2_pair)
    (gpt2_pair / "tokenizer_config.json").unlink()
    (gpt2_pair / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt is missing"):
        load_tokenizer(gpt2_pair)


def test_the_real_gpt2_gives_the_ids_of_transformers():
    transformers = pytest.importorskip("transformers")
    folder = SHARED / "tokenizers" / "gpt2"
    if not folder.is_dir():
        pytest.skip("GPT-2's files are not here")
    tokenizer = load_tokenizer(folder)
    reference = transformers.GPT2Tokenizer.from_pretrained(folder)
    lines = [line for path in sorted(SHARED.glob("data/*.jsonl")) for line in _some_lines(path)]
    assert tokenizer.encode_batch(lines) == [reference.encode(line) for line in lines]


def _some_lines(path):
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[:25]


def test_the_real_gpt2_gives_well_known_ids():
    folder = SHARED / "tokenizers" / "gpt2"
    if not folder.is_dir():
        pytest.skip("GPT-2's files are not here")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]


@pytest.mark.parametrize(
    ("words", "settings", "expected"),
    [
        (["fox", "##es"], {}, [5, 6]),
        (["fox", "##es", "Ox"], {}, [1]),  # a capital: the vocabulary is cased
        (["fox", "##es", "Ox"], {"do_lower_case": True}, [5, 6]),
        (["fox", "##es"], {"do_lower_case": False}, [1]),
    ],
)
def test_berts_word_list_is_read(tmp_path, words, settings, expected):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    write(tmp_path, vocab__txt="\n".join([*special, *words, ""]), tokenizer_config__json=settings)
    for path in (tmp_path, tmp_path / "vocab.txt"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode("Foxes") == expected
        ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
        assert ids == (0, 1, 2, 3)
        assert tokenizer.encode("[MASK]", parse_special_tokens=True) == [4]
        assert 4 not in tokenizer.encode("[MASK]")
        assert tokenizer.vocab_size == 5 + len(words)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_marks_that_are_not_special_are_not_read_from_text_either(tmp_path):
    plain = AddedToken("<think>", special=False), AddedToken("  ", special=False, normalized=False)
    backend = byte_level("<|endoftext|>", *plain)
    backend.enable_truncation(2)
    backend.enable_padding()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert 258 not in tokenizer.encode("ab<think>")
    assert tokenizer.encode("ab<think>ab", parse_special_tokens=True) == [256, 258, 256]
    assert tokenizer.encode("ab  ab") == [256, 259, 256]  # ordinary text, as the original has it
    assert tokenizer.decode([257, 258, 256]) == "<think>ab"  # not special when decoding
    assert len(tokenizer.encode("no truncation")) == 13


def test_dropout_of_training_is_left_out(tmp_path):
    byte_level("<|endoftext|>", dropout=0.5).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(" ab" * 50) == [32, 256] * 50


def test_ids_with_gaps_are_below_the_vocabulary_size(tmp_path):
    backend = byte_level("<|endoftext|>")
    content = json.loads(backend.to_str())
    content["model"]["vocab"]["far"] = 999
    write(tmp_path, tokenizer__json=content)
    assert load_tokenizer(tmp_path).vocab_size == 1000


@pytest.mark.parametrize(
    "options",
    [
        {},  # NFKC, spaces joined, a space before the text: as most published models
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
        {"byte_fallback": True, "user_defined_symbols": ["<turn>", "  ", "fox"]},
    ],
)
def test_sentencepiece_models_give_sentencepieces_own_ids(texts, tmp_path, options):
    sentences = texts[0].splitlines()
    vocabulary = {} if options.get("byte_fallback") else {"hard_vocab_limit": False}
    model = sentencepiece_model(sentences, **options, **vocabulary)
    (tmp_path / "spiece.model").write_bytes(model)
    reference = SentencePieceProcessor(model_proto=model)
    for path in (tmp_path, tmp_path / "spiece.model"):
        tokenizer = load_tokenizer(path)
        for workers in (0, 1):
            assert tokenizer.encode_batch(sentences, workers=workers) == reference.encode(sentences)
        for sentence in [*sentences, " a  fox ", "한 ﬁ \u2581"]:
            ids = reference.encode(sentence)
            assert tokenizer.encode(sentence) == ids
            assert (
                tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids)
                or reference.unk_id() in ids
            )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.pad_id == tokenizer.eos_id
    if "user_defined_symbols" in options:
        mark = reference.piece_to_id("<turn>")
        assert reference.encode("work<turn>")[-1] == mark  # SentencePiece itself is forged
        assert mark not in tokenizer.encode("work<turn>")
        assert tokenizer.encode("work<turn>", parse_special_tokens=True)[-1] == mark
        assert tokenizer.decode([mark]) == "<turn>"


def test_our_sentencepiece_kinds_give_sentencepieces_own_ids(trained, texts, tmp_path):
    for kind in ("sentencepiece_bpe", "sentencepiece_unigram"):
        trained(kind).save(tmp_path / kind)
        path = tmp_path / kind / "tokenizer.model"
        assert trained(kind).encode_batch(texts) == SentencePieceProcessor(str(path)).encode(texts)


def test_special_tokens_are_those_asked_for_declared_or_well_known(tmp_path):
    backend = byte_level("<|endoftext|>", "<s>", "<|im_end|>", "<mine>", "<unk>")
    backend.save(str(tmp_path / "tokenizer.json"))

    def ids(**asked):
        tokenizer = configured_tokenizer(TokenizerConfig(path=str(tmp_path), **asked))
        assert tokenizer.fingerprint not in fingerprints
        fingerprints.add(tokenizer.fingerprint)
        tokenizer.save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
        return tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id

    fingerprints = set()
    assert ids() == (258, 257, 257, 261)
    assert ids(bos_token="<mine>") == (260, 257, 257, 261)
    settings = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": {"content": "<mine>"}}
    write(tmp_path, tokenizer_config__json=settings)
    assert ids() == (258, 259, 260, 261)
    assert ids(eos_token="<|endoftext|>", unk_token="<mine>") == (258, 257, 260, 260)


def test_special_tokens_that_cannot_be_are_told_with_the_field(tmp_path):
    byte_level("<|end|>", "<unk>").save(str(tmp_path / "tokenizer.json"))

    def load(**asked):
        return configured_tokenizer(TokenizerConfig(path=str(tmp_path), **asked))

    with pytest.raises(UserError, match=r"^no token that ends .*config\.tokenizer\.eos_token.*end"):
        load()
    with pytest.raises(UserError, match=r"^config\.tokenizer\.eos_token: '<end>' .* <\|end\|>"):
        load(eos_token="<end>")
    with pytest.raises(UserError, match=r"^config\.tokenizer\.bos_token: 'abba' is not one token"):
        load(eos_token="<|end|>", bos_token="abba")
    with pytest.raises(UserError, match=r"^config\.tokenizer\.eos_token: eos_token and unk_token"):
        load(eos_token="<unk>")
    with pytest.raises(UserError, match=r"^config\.tokenizer\.unk_token: bos_token and unk_token"):
        load(eos_token="<|end|>", unk_token="<|end|>")
    assert load(eos_token="<|end|>").bos_id == 257


def test_an_end_that_the_model_itself_gives_for_unknown_text_is_refused(tmp_path):
    backend = hf.Tokenizer(models.WordPiece({"</s>": 0, "fox": 1}, unk_token="</s>"))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="are the same token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b'{"model": {}, "added_tokens": []}'),
        ("tokenizer.model", b"not a model"),
        ("tokenizer.model", b""),
        ("vocab.txt", b"no\nspecial\ntokens\n"),
        ("tokenizer.json/../other.bin", b"?"),
    ],
)
def test_files_that_are_broken_are_named(tmp_path, name, content):
    path = tmp_path / Path(name).name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: is not a readable tokenizer: "):
        load_tokenizer(path)
    with pytest.raises(UserError, match=f"^config.tokenizer.path: {path}: is not a "):
        configured_tokenizer(TokenizerConfig(path=str(path)))


def test_a_broken_configuration_beside_is_told(trained, tmp_path):
    trained("bpe").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        load_tokenizer(tmp_path)


def test_a_folder_without_one_tokenizer_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"^{path}: there is no tokenizer here"):
            load_tokenizer(path)
    for name in ("a.model", "b.model"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="has several"):
        load_tokenizer(tmp_path)
