"""The engine's queue: what is read, compiled, waited for and refilled; and streams."""

import jax
import numpy as np
import pytest

from jaxllm.inference import engine
from jaxllm.inference.engine import Engine
from jaxllm.inference.requests import Request, Sampling
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("one_device")


def test_equal_prompts_are_read_once(model, make_engine, monkeypatch):
    read = []
    prefill = engine.prefill
    monkeypatch.setattr(
        engine,
        "prefill",
        lambda *args, **named: read.append(args[1].shape) or prefill(*args, **named),
    )
    make_engine(model, slots=4).complete(
        [Request((6, 2, 11, 5, 30), Sampling(3, 0.0), seed=n) for n in range(4)]
    )
    assert read == [(1, 16)]


@pytest.fixture
def compilations():
    """The number of programs compiled so far, those of single operations too."""
    events = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(events)
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"temperature": 1.0, "top_k": 3},
        pytest.param({"repetition_penalty": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_few_programs_are_compiled_whatever_is_asked(
    model, make_engine, compilations, sampling, monkeypatch
):
    """Calls of 1 to 12 requests of all lengths up to the context, in any order, on 16 slots."""
    monkeypatch.setattr(engine, "_WORTH_COMPILING", 10**6)
    run = make_engine(model, slots=16, context=64)
    draw = np.random.default_rng(0)

    def some(count):
        return [
            Request(
                tuple(draw.integers(0, 48, draw.integers(1, 50)).tolist()),
                Sampling(length, **{"temperature": 0.0} | sampling),
            )
            for length in draw.integers(1, 60, count).tolist()
        ]

    calls = [some(count) for count in (*range(12, 0, -1), *range(1, 13))]
    for function in (engine.prefill, engine.decode):
        function.clear_cache()
    before = compilations()
    for call in calls:
        run.complete(call)
    assert engine.decode._cache_size() <= 5 * 4  # slots: 1, 2, … 16; rooms: 16, 32, 48, 64
    assert engine.prefill._cache_size() <= 5 * 3  # rows: 1, or the slots; prompts: 16, 32, 64
    assert compilations() - before <= 75
    before = compilations()
    for call in calls:
        run.complete(call)
    assert compilations() == before


def test_nothing_waits_for_the_host_once_a_token(model, make_engine, monkeypatch):
    calls = []
    decode = engine.decode
    monkeypatch.setattr(
        engine, "decode", lambda *args, **named: calls.append(1) or decode(*args, **named)
    )
    make_engine(model, slots=5).complete(
        [Request((5,) * n, Sampling(40, 0.0)) for n in (5, 2, 1, 11, 3)]
    )
    assert len(calls) <= 2


def test_a_free_slot_is_refilled_while_others_go_on(model, make_engine, monkeypatch):
    steps = []
    decode = engine.decode

    def counted(*args, **named):
        result = decode(*args, **named)
        steps.append(int(result[2].steps))
        return result

    monkeypatch.setattr(engine, "decode", counted)
    lengths = [20, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    make_engine(model, slots=2).complete([Request((5, n), Sampling(n, 0.0)) for n in lengths])
    assert sum(steps) == 20  # in fixed pairs they would take 30


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_slots_that_nobody_needs_any_more_are_left_out(
    family, tiny_model, make_engine, monkeypatch
):
    """Once an engine has stood half empty for long; it writes the same."""
    model, sizes = tiny_model(family=family), []
    lengths = [3, 30, 9, 2, 4, 17, 5, 2, 6, 3]
    mixed = [
        Request((7, number), Sampling(length, 1.2, 30), seed=number)
        for number, length in enumerate(lengths)
    ]
    before = make_engine(model, slots=8).complete(mixed)
    monkeypatch.setattr(engine, "_WORTH_COMPILING", 8)
    decode = engine.decode

    def counted(*args, **named):
        sizes.append(args[1].left.shape[0])
        return decode(*args, **named)

    monkeypatch.setattr(engine, "decode", counted)
    run = make_engine(model, slots=8)
    run.complete(mixed)
    sizes.clear()
    assert [done.ids for done in run.complete(mixed)] == [done.ids for done in before]
    assert sizes[0] == 8 and sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)


def test_a_stream_gives_the_text_in_pieces(tiny_model, tiny_params):
    model, tokenizer = tiny_model(vocab_size=273, tied=False), ByteTokenizer()
    run = Engine(model, tiny_params(model), tokenizer, context=0)
    request = Request(tuple(tokenizer.encode("ab")), Sampling(24, 1.0, stop=("~~",)), seed=3)
    pieces = list(run.stream(request))
    assert "".join(pieces) == run.complete([request])[0].text
    assert len(pieces) > 3
