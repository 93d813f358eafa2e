"""SentencePiece models, our own and others': ids as SentencePiece itself gives them."""

import io

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from jaxllm.tokenizers.sentence_piece import SentencePieceTokenizer
from jaxllm.tokenizers.tokenizer import load_tokenizer


def sentencepiece_model(texts, **options):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=380, minloglevel=2, **options
    )
    return model.getvalue()


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


@pytest.mark.parametrize("prefix", [True, False])
def test_marks_of_sentencepiece_models_are_parsed_as_sentencepiece_does(texts, prefix):
    model = sentencepiece_model(
        texts[0].splitlines(),
        byte_fallback=True,
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        control_symbols=["<mask>"],
        add_dummy_prefix=prefix,
    )
    reference, tokenizer = SentencePieceProcessor(model_proto=model), SentencePieceTokenizer(model)
    mark, control = map(reference.piece_to_id, ("<start_of_turn>", "<mask>"))
    for text in (
        "Hello there <start_of_turn>user",
        "<start_of_turn>user\nthe work<end_of_turn>\n <start_of_turn> model",
        "<start_of_turn><end_of_turn>  the work ",
    ):
        ids = tokenizer.encode(text, parse_special_tokens=True)
        assert ids == reference.encode(text) and mark in ids
        assert tokenizer.encode_batch([text], parse_special_tokens=True) == [ids]
        assert tokenizer.decode(ids) == reference.decode(ids)
        assert mark not in tokenizer.encode(text)
    halves = [reference.encode(part) for part in ("the work", "of")]
    expected = [*halves[0], control, *halves[1]]
    assert tokenizer.encode("the work<mask>of", parse_special_tokens=True) == expected


def test_our_sentencepiece_kinds_give_sentencepieces_own_ids(trained, texts, tmp_path):
    for kind in ("sentencepiece_bpe", "sentencepiece_unigram"):
        trained(kind).save(tmp_path / kind)
        path = tmp_path / kind / "tokenizer.model"
        assert trained(kind).encode_batch(texts) == SentencePieceProcessor(str(path)).encode(texts)
