"""The special tokens that every tokenizer trained here knows, with the same ids in all of them."""

PAD = "<pad>"
BOS = "<s>"
EOS = "</s>"
UNK = "<unk>"
MASK = "<mask>"

SPECIAL_TOKENS = (
    PAD,
    BOS,
    EOS,
    UNK,
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    MASK,
)
"""The id of a token is its place in this tuple; new ones are only ever added at the end."""


def is_marker(token: str) -> bool:
    """Whether a token is written like a mark, as `<think>`, `[INST]` and `|||IP|||` are.

    Vocabularies made elsewhere hold such tokens without calling them special, next to words and
    runs of spaces that belong to ordinary text; the spelling alone tells them apart.
    """
    return len(token) > 2 and token[0] in "<[{|" and token[-1] in ">]}|"
