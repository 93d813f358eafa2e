"""New tokens a second, beside `generate` of Transformers; and continuous batching.

    python benchmarks/generate.py [--turns=5] [--only=jaxllm_1,transformers_1]

Needs `pip install -e .[peers]`. Every competitor is a process of its own, on a GPU where JAX and
PyTorch have one (set XLA_PYTHON_CLIENT_PREALLOCATE=false, so that they share its memory), else on
as many threads as there are cores; they write in turn. The model is a Llama of 8.5 M parameters
(256 wide, 8 layers, 4 heads, MLP of 704, vocabulary of 8,192, tied), float32, random weights;
prompts of 64 tokens are continued by 128, greedily, without an end: one at a time, and 16 at once.

The others write 64 requests of 8 to 256 new tokens (evenly drawn, the same for all) after prompts
of 16 on 16 slots: `fixed` takes 16 requests at a time, in the given order, and each batch lasts as
long as its longest; `continuous` refills a slot as soon as it is free, without knowing when a text
will end, as in a rollout; `continuous_known` is told each request's limit. All are the same engine,
and write the same texts.
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
from in_turn import Step, measure, work
from llama import HEADS, LAYERS, MLP, VOCAB, WIDTH, transformers_llama

PROMPT, NEW = 64, 128
SLOTS, REQUESTS, SHORT_PROMPT, SHORTEST, LONGEST = 16, 64, 16, 8, 256
PEERS = {
    "jaxllm_1": "transformers_1",
    "jaxllm_16": "transformers_16",
    "continuous": "fixed",
    "continuous_known": "fixed",
}


def prompts(count: int, length: int) -> np.ndarray:
    """Random prompts of ids that end nothing."""
    return np.random.default_rng(0).integers(0, VOCAB - 1, (count, length))


def engine():
    """Ours, in use; the mesh stays set."""
    import jax

    from jaxllm.inference.engine import Engine
    from jaxllm.models.config import ModelConfig
    from jaxllm.models.families import architecture
    from jaxllm.models.transformer import init_params
    from jaxllm.sharding.mesh import MeshConfig, make_mesh

    class Silent:
        """A tokenizer whose end is never written; to decode is not measured on either side."""

        eos_id, special_ids = VOCAB, frozenset()

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return ""

    config = ModelConfig(layers=LAYERS, width=WIDTH, heads=HEADS, mlp_width=MLP)
    model = architecture(config, VOCAB)
    jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    # At first a layer adds nothing, and every text would be one token again and again.
    params = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), params
    )
    return Engine(model, params, Silent(), context=4096, slots=SLOTS)


def jaxllm_step(batch: int) -> Step:
    """Our engine on prompts of equal length."""
    from jaxllm.inference.requests import Request, Sampling

    ours, sampling = engine(), Sampling(NEW, temperature=0.0)
    requests = [Request(tuple(row), sampling) for row in prompts(batch, PROMPT).tolist()]

    def run() -> None:
        done = ours.complete(requests)
        assert [len(one.ids) for one in done] == [NEW] * batch

    return run


def transformers_step(batch: int) -> Step:
    """`generate` of Transformers, with its cache."""
    import torch

    model = transformers_llama(
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0
    ).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    rows = torch.tensor(prompts(batch, PROMPT), device=device)

    def run() -> None:
        with torch.inference_mode():
            done = model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=NEW,
                do_sample=False,
                use_cache=True,
            )
        assert done.cpu().shape == (batch, PROMPT + NEW)

    return run


def uneven_step(how: str) -> Step:
    """Requests of uneven lengths; `how` says what is known of them, as in `STEPS`."""
    from jaxllm.inference.requests import Request, Sampling

    ours = engine()
    prompted = [tuple(row) for row in prompts(REQUESTS, SHORT_PROMPT).tolist()]
    lengths = np.random.default_rng(1).integers(SHORTEST, LONGEST + 1, REQUESTS).tolist()
    greedy = Sampling(LONGEST, temperature=0.0)
    # A text ends at the first token from its length on that is not in it before.
    whole = ours.complete([Request(prompt, greedy) for prompt in prompted])
    ends = [
        next(n for n in range(length - 1, LONGEST) if text.ids[n] not in text.ids[:n])
        for length, text in zip(lengths, whole, strict=True)
    ]
    wanted = [text.ids[: end + 1] for text, end in zip(whole, ends, strict=True)]

    def request(number: int, limit: int, stops: bool = False) -> Request:
        stop_ids = (wanted[number][-1],) if stops else ()
        return Request(prompted[number], Sampling(limit, temperature=0.0), stop_ids=stop_ids)

    numbers = range(REQUESTS)
    calls = {
        "unknown": [[request(n, LONGEST, stops=True) for n in numbers]],
        "known": [[request(n, ends[n] + 1) for n in numbers]],
        "fixed": [
            [request(n, max(ends[i] + 1 for i in batch)) for n in batch]
            for batch in (numbers[i : i + SLOTS] for i in range(0, REQUESTS, SLOTS))
        ],
    }[how]

    def run() -> None:
        done = [text.ids for requests in calls for text in ours.complete(requests)]
        assert [ids[: end + 1] for ids, end in zip(done, ends, strict=True)] == wanted

    for _ in range(4):  # until the engine finds it worth while to compile for fewer slots
        run()
    return run


STEPS: dict[str, Callable[[], Step]] = {
    "jaxllm_1": lambda: jaxllm_step(1),
    "transformers_1": lambda: transformers_step(1),
    "jaxllm_16": lambda: jaxllm_step(16),
    "transformers_16": lambda: transformers_step(16),
    "continuous": lambda: uneven_step("unknown"),
    "continuous_known": lambda: uneven_step("known"),
    "fixed": lambda: uneven_step("fixed"),
}


def main() -> None:
    """Prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", default=",".join(STEPS))
    parser.add_argument("--worker", choices=STEPS)
    options = parser.parse_args()
    if options.worker:
        work(STEPS[options.worker]())
        return

    from jaxllm.reporting.tables import print_table

    names = options.only.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"--only: {', '.join(unknown)} is unknown; there are {', '.join(STEPS)}")
    seconds = measure(__file__, names, options.turns)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = []
    for name, times in seconds.items():
        peer = PEERS.get(name, "")
        ratio = f"{medians[peer] / medians[name]:.2f} times {peer}" if peer in medians else ""
        count = name.rsplit("_", 1)[-1]
        rate = f"{int(count) * NEW / medians[name]:,.0f}" if count.isdigit() else ""
        rows.append((name, f"{medians[name]:.3f}", f"{min(times):.3f}", rate, ratio))
    heads = ("", "median s", "fastest s", "tokens/s", "")
    print_table(heads, rows, f"{2 * options.turns} of each")


if __name__ == "__main__":
    main()
