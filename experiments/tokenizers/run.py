"""Every kind of tokenizer on real text: one table, and a check that the lossless ones lose nothing.

    python experiments/tokenizers/run.py --workdir=runs/tokenizers --text='text/*.jsonl'

Trains every kind at a vocabulary of 8,192 through the `tokenizer` stage, which prints the table,
and then sends every line of the text (what was trained on and what was held out, as the files have
it, uncleaned) through each tokenizer and back. Ends with code 1 if a lossless kind changes a line.
About three minutes for 10 MB on two cores.
"""

import argparse
import sys
from pathlib import Path

from jaxllm import command_line
from jaxllm.data.records import Record
from jaxllm.data.sources import make_source
from jaxllm.main import run
from jaxllm.reporting.tables import print_table
from jaxllm.tokenizers.tokenizer import load_tokenizer
from jaxllm.tokenizers.trainers import LOSSLESS, TRAINERS

CONFIG = Path(__file__).parents[2] / "configs" / "tokenizer.py"


def main() -> int:
    """Trains, checks, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--text", required=True, help="source of text, as in config.data.train")
    options = parser.parse_args()
    config = command_line.load_config(f"{CONFIG}:compare")
    config.data.train = options.text
    run(config, options.workdir)
    records = make_source(options.text, "data.train", False).records()
    texts = [record.fields["text"] for record in records if isinstance(record, Record)]
    cells, failed = [], False
    for kind in TRAINERS:
        tokenizer = load_tokenizer(options.workdir / "compared" / kind / "tokenizer")
        encoded = tokenizer.encode_batch(texts)
        changed = sum(
            tokenizer.decode(ids, skip_special_tokens=False) != text
            for ids, text in zip(encoded, texts, strict=True)
        )
        failed |= kind in LOSSLESS and changed > 0
        promise = "yes" if kind in LOSSLESS else "no"
        cells.append((kind, promise, f"{len(texts):,}", f"{changed:,}"))
    print_table(("kind", "lossless by promise", "texts", "changed"), cells, title="Round trip")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
