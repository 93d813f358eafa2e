"""Loading tokenizers made elsewhere: ids as their own library gives them, special tokens told."""

import json
from pathlib import Path

import pytest
import tokenizers as hf
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


def test_gpt2s_pair_of_files_is_read(gpt2_pair):
    for path in (gpt2_pair, gpt2_pair / "vocab.json", gpt2_pair / "merges.txt"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.vocab_size == 260
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (259, 259, 259)
        assert tokenizer.unk_id is tokenizer.mask_id is None
        assert tokenizer.special_ids == {259}
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
        assert (*ids, tokenizer.mask_id) == (0, 1, 2, 3, 4)
        assert tokenizer.special_ids == {*range(5)}
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


def test_the_mask_is_the_one_asked_for_declared_or_well_known(tmp_path):
    backend = byte_level("<|endoftext|>", "[MASK]", "<mine>", AddedToken("<mark>", special=False))
    backend.save(str(tmp_path / "tokenizer.json"))

    def load(**asked):
        return configured_tokenizer(TokenizerConfig(path=str(tmp_path), **asked))

    assert load().mask_id == 258
    assert load().special_ids == {257, 258, 259, 260}
    assert load(mask_token="<mine>").mask_id == 259
    # What is hidden from a model decides nothing of the tokens that are stored.
    assert load(mask_token="<mine>").fingerprint == load().fingerprint
    load(mask_token="<mine>").save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").mask_id == 259
    write(tmp_path, tokenizer_config__json={"mask_token": {"content": "<mine>"}})
    assert load().mask_id == 259
    for none in ("<gone>", "<|endoftext|>"):  # it serves nothing, and hinders nothing
        write(tmp_path, tokenizer_config__json={"mask_token": none})
        assert load().mask_id == (258 if none == "<gone>" else None)
    field = r"^config\.tokenizer\.mask_token: "
    with pytest.raises(UserError, match=field + "'<gone>' is not one token"):
        load(mask_token="<gone>")
    with pytest.raises(UserError, match=field + r"'<\|endoftext\|>' is bos_token too"):
        load(mask_token="<|endoftext|>")


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
        ("vocab.txt", b"\xff"),
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


@pytest.mark.parametrize("content", ['{"version": 1}', "{", "[]", '{"added_tokens": 3}', "other"])
def test_what_is_not_bytes_is_not_read_as_bytes(trained, tmp_path, content):
    trained("bytes").save(tmp_path)
    trained("bpe").save(tmp_path / "bpe")
    file = tmp_path / "tokenizer.json"
    if content == "other":
        content = (tmp_path / "bpe" / "tokenizer.json").read_text(encoding="utf-8")
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"^{file}: is not a readable tokenizer: "):
        load_tokenizer(tmp_path)


def test_bytes_take_the_special_tokens_asked_for(trained, tmp_path):
    trained("bytes").save(tmp_path)

    def load(path=tmp_path, **asked):
        return configured_tokenizer(TokenizerConfig(path=str(path), **asked))

    with pytest.raises(
        UserError, match=r"^config\.tokenizer\.eos_token: '<nope>' is not one token"
    ):
        load(eos_token="<nope>")
    asked = load(eos_token="<|im_end|>")
    assert (asked.bos_id, asked.eos_id, asked.pad_id, asked.unk_id) == (1, 5, 0, 3)
    assert asked.fingerprint != load().fingerprint == trained("bytes").fingerprint
    asked.save(tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint == asked.fingerprint


IM_END = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens__json": {"<|im_end|>": 260, "EOS": 261}},
        {
            "tokenizer_config__json": {
                "added_tokens_decoder": {"261": {"content": "EOS"}, "260": IM_END}
            }
        },
        {
            "added_tokens__json": {"<|im_end|>": 260},
            "tokenizer_config__json": {
                "added_tokens_decoder": {"261": {"content": "EOS"}, "260": IM_END}
            },
        },
    ],
)
def test_tokens_added_beside_gpt2s_files_are_read(gpt2_pair, files):
    write(gpt2_pair, special_tokens_map__json={"eos_token": "<|im_end|>"}, **files)
    tokenizer = load_tokenizer(gpt2_pair)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (262, 260, 259)
    assert tokenizer.encode("ab<|im_end|>ab", parse_special_tokens=True) == [256, 260, 256]
    assert 260 not in tokenizer.encode("ab<|im_end|>")
    assert tokenizer.encode("abEOS") == [256, 261]  # ordinary text, as the original has it
    assert tokenizer.decode([256, 260, 261]) == "abEOS"
    tokenizer.save(gpt2_pair / "saved")
    assert load_tokenizer(gpt2_pair / "saved").fingerprint == tokenizer.fingerprint
    byte_level("<|endoftext|>").save(str(gpt2_pair / "tokenizer.json"))
    with pytest.raises(UserError, match="the id 260, but here it has 258"):
        load_tokenizer(gpt2_pair)


def test_tokens_added_beside_a_tokenizer_json_are_read(tmp_path):
    byte_level("<|endoftext|>").save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config__json={"eos_token": IM_END, "added_tokens_decoder": {}})
    with pytest.raises(
        UserError, match=r"eos_token: '<\|im_end\|>', which the files beside .* name"
    ):
        load_tokenizer(tmp_path)
    write(tmp_path, added_tokens__json={"<|endoftext|>": 257, "<|im_end|>": 258})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (259, 258, 257)
    assert 258 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.decode([256, 258]) == "ab"


@pytest.mark.parametrize("content", [["<x>"], {"<x>": "many"}, {"<x>": None}])
def test_added_tokens_that_are_malformed_are_told(gpt2_pair, content):
    write(gpt2_pair, added_tokens__json=content)
    with pytest.raises(UserError, match=r"is not a readable tokenizer"):
        load_tokenizer(gpt2_pair)


def test_sentencepiece_models_must_hold_the_tokens_added(trained, tmp_path):
    trained("sentencepiece_bpe").save(tmp_path)
    write(tmp_path, added_tokens__json={"<think>": 6})
    assert load_tokenizer(tmp_path).fingerprint == trained("sentencepiece_bpe").fingerprint
    write(tmp_path, added_tokens__json={"<think>": 6, "<extra>": 420})
    with pytest.raises(UserError, match="'<extra>' the id 420, but it is not in this vocabulary"):
        load_tokenizer(tmp_path)
    write(tmp_path, added_tokens__json={"<think>": 7})
    with pytest.raises(UserError, match="'<think>' the id 7, but here it has 6"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("source", ["tokenizer_config__json", "special_tokens_map__json"])
@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token", "unk_token"])
def test_a_declared_token_that_is_missing_is_told(gpt2_pair, source, role):
    write(gpt2_pair, **{source: {role: "<gone>"}})
    with pytest.raises(UserError, match=rf"^config\.tokenizer\.{role}: '<gone>', which the files"):
        load_tokenizer(gpt2_pair)
    asked = TokenizerConfig(path=str(gpt2_pair), **{role: "[.]"})
    assert 258 in vars(configured_tokenizer(asked)).values()


def test_berts_word_list_may_have_another_unknown_token(tmp_path):
    write(tmp_path, vocab__txt="<pad>\nUNKNOWN\n<s>\n</s>\nfox\n")
    with pytest.raises(UserError, match=r"^config\.tokenizer\.unk_token: '\[UNK\]', for words"):
        load_tokenizer(tmp_path)
    tokenizer = configured_tokenizer(TokenizerConfig(path=str(tmp_path), unk_token="UNKNOWN"))
    assert tokenizer.encode("fox dog") == [4, 1]
    assert (tokenizer.unk_id, tokenizer.decode([4, 1])) == (1, "fox")
    write(tmp_path, tokenizer_config__json={"unk_token": "UNKNOWN"})
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


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
