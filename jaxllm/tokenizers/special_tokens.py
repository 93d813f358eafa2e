"""The special tokens that every tokenizer trained here knows, with the same ids in all of them."""

PAD = "<pad>"
BOS = "<s>"
EOS = "</s>"
UNK = "<unk>"

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
)
"""The id of a token is its place in this tuple; new ones are only ever added at the end."""
