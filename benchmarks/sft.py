"""Tokens that supervised fine-tuning reads in a second on CPU, beside TRL's SFTTrainer.

    python benchmarks/sft.py [--turns=4] [--only=jaxllm,trl_wrapped] [--data=mine.jsonl]

Needs `pip install -e .[peers]`. What is counted are tokens of examples, and not padding. All train
the Llama of benchmarks/llama.py (8.5 M parameters, float32, AdamW, gradients clipped) on the same
token ids, 8 rows of 512 at once, loss on answers alone, in processes of their own and in turn.
`jaxllm` packs whole examples (`best_fit`); TRL pads each batch to its longest (`trl`), packs by
best fit (`trl_bfd`), or cuts examples so that every row is full (`trl_wrapped`). TRL is driven by
its own batches, `training_step` and optimizer. Data are `builtin:pydocs_instruct`, unless given.
"""

import argparse
import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from in_turn import Step, measure, work
from llama import VOCAB, jaxllm_training, transformers_llama

BATCH, SEQ = 8, 512
FOLDER = "JAXLLM_SFT_BENCHMARK"
"""Where the tokenised data is, in the environment of the workers."""
WORK = ("jaxllm", "trl", "trl_bfd", "trl_wrapped")


def prepare(data: str, folder: Path) -> None:
    """Tokenises the data, by a tokenizer trained on them, into a store and a plain file."""
    corpus = _corpus(data, folder)
    store = corpus.train[0]
    documents: list[tuple[list[int], list[bool]]] = []
    for shard in range(len(store.shards)):
        offsets, tokens, trained = store.offsets(shard), store.tokens(shard), store.trained(shard)
        documents += [
            (tokens[begin:end].tolist(), trained[begin:end].tolist())
            for begin, end in itertools.pairwise(offsets.tolist())
        ]
    np.save(folder / "lengths.npy", [len(ids) for ids, _ in documents])
    np.save(folder / "ids.npy", np.concatenate([ids for ids, _ in documents]))
    np.save(folder / "trained.npy", np.concatenate([trained for _, trained in documents]))
    (folder / "data").write_text(data)


def _corpus(data: str, folder: Path) -> Any:
    from jaxllm.data.config import DataConfig
    from jaxllm.data.corpus import prepare_corpus
    from jaxllm.data.examples import ExamplesConfig
    from jaxllm.tokenizers.config import TokenizerConfig

    config = DataConfig(train=data, seq_len=SEQ, packing="best_fit")
    tokenizer = TokenizerConfig(vocab_size=VOCAB)
    return prepare_corpus(config, tokenizer, folder, kind=ExamplesConfig())


def jaxllm_step() -> Step:
    """A step of ours, with its batches."""
    import jax

    from jaxllm.data.batches import BatchSource
    from jaxllm.data.packing import packed_rows
    from jaxllm.data.shuffle import ShuffledEpochs
    from jaxllm.models.transformer import SHARDING_RULES, init_params
    from jaxllm.sharding.mesh import batch_sharding
    from jaxllm.training.step import init_state, jit_step, state_shapes

    model, optimizer, mesh, step = jaxllm_training()
    folder = Path(os.environ[FOLDER])
    store = _corpus((folder / "data").read_text(), folder).train[0]
    source = BatchSource(
        ShuffledEpochs(packed_rows(store, "best_fit", SEQ), 0), BATCH, batch_sharding(mesh)
    )
    with jax.set_mesh(mesh):
        params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
        shapes = state_shapes(jax.eval_shape(lambda: params), optimizer, SHARDING_RULES, mesh)
        state = init_state(params, optimizer, shapes)
        compiled = jit_step(step, shapes, mesh).lower(state, {}, source(0)).compile()
    numbers = itertools.count()

    def run() -> float:
        nonlocal state
        batch = source(next(numbers))
        state, metrics = compiled(state, {}, batch)
        return float(metrics["tokens"])

    return run


def trl_step(strategy: str) -> Step:
    """A step of TRL's, with its batches; `strategy` of packing, empty: none."""
    import datasets
    import torch
    import trl
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    folder = Path(os.environ[FOLDER])
    ends = np.cumsum(np.load(folder / "lengths.npy"))[:-1]
    ids = np.split(np.load(folder / "ids.npy"), ends)
    trained = np.split(np.load(folder / "trained.npy"), ends)
    data = datasets.Dataset.from_dict(
        {
            "input_ids": [each.tolist() for each in ids],
            "completion_mask": [each.astype(int).tolist() for each in trained],
        }
    )
    names = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=names, pad_token="t0", eos_token="t1")
    config = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        max_length=SEQ,
        packing=bool(strategy),
        packing_strategy=strategy or "bfd",
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        completion_only_loss=True,
        disable_tqdm=True,
        max_steps=1000,
    )
    model = transformers_llama(max_position_embeddings=SEQ, use_cache=False).train()
    trainer = trl.SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = 1  # its loop, which is not entered, sets it
    optimizer = trainer.create_optimizer()
    batches = _forever(trainer)

    def run() -> float:
        batch = next(batches)
        optimizer.zero_grad()
        trainer.training_step(model, dict(batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mask = batch.get("attention_mask")
        return float(batch["input_ids"].numel() if mask is None else mask.sum())

    return run


def _forever(trainer: Any) -> Iterator[Any]:
    while True:
        yield from trainer.get_train_dataloader()


def main() -> None:
    """Prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--only", default=",".join(WORK))
    parser.add_argument("--data", default="builtin:pydocs_instruct")
    parser.add_argument("--worker", choices=WORK)
    options = parser.parse_args()
    if options.worker:
        strategy = options.worker.removeprefix("trl").removeprefix("_")
        work(jaxllm_step() if options.worker == "jaxllm" else trl_step(strategy))
        return

    from jaxllm.reporting.tables import print_table

    with tempfile.TemporaryDirectory() as folder:
        prepare(options.data, Path(folder))
        lengths = np.load(Path(folder) / "lengths.npy")
        names = options.only.split(",")
        seconds = measure(__file__, names, options.turns, {FOLDER: folder})
    rates = {name: 1 / statistics.median(times) for name, times in seconds.items()}
    rows = [(name, f"{rate:,.0f}", f"{rates[names[0]] / rate:.2f}") for name, rate in rates.items()]
    title = (
        f"{len(lengths):,} examples of {np.mean(lengths):.0f} tokens in the mean, rows of {SEQ}, "
        f"{2 * options.turns} steps of each"
    )
    print_table(("", "tokens/s", f"{names[0]} is so many times"), rows, title)


if __name__ == "__main__":
    main()
