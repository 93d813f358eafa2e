"""The engine against repeated full forward passes, and its independence of batch and slot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.inference import decoding, engine
from jaxllm.inference.engine import Engine
from jaxllm.inference.requests import Request, Sampling
from jaxllm.models.families import FAMILIES
from jaxllm.models.transformer import SHARDING_RULES, Transformer, output_head, param_shapes
from jaxllm.ops.vocabulary import logits
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.sharding.rules import shardings
from jaxllm.tokenizers.config import TokenizerConfig
from jaxllm.tokenizers.training import train_tokenizer

NEW = 9
PROMPTS = [(7, 3, 9, 4, 1), (5, 8), (6,), (6, 2, 11, 5, 30, 21, 17, 2, 9, 40, 12), (3, 3, 3)]
GREEDY = Sampling(NEW, temperature=0.0)


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def full(tiny_params):
    """Logits of every next token of a text, from one pass over all of it."""

    @functools.cache
    def program(model):
        @jax.jit
        def run(tokens):
            positions = jnp.arange(tokens.shape[1])[None]
            output = Transformer(model).apply(
                {"params": tiny_params(model)}, tokens, positions, jnp.ones_like(tokens)
            )
            return logits(output.hidden, output_head(model, tiny_params(model)))

        return run

    def of(model, ids):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(program(model)(padded))[0, : len(ids)]

    return of


def requests(sampling=GREEDY, prompts=PROMPTS, **options):
    return [
        Request(prompt, sampling, seed=number, **options) for number, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_and_its_log_probabilities_are_those_of_full_passes(
    family, tiny_model, make_engine, full, numbers
):
    """Five prompts of uneven lengths on three slots, one of them longer than any window."""
    options = {"positions": "learned", "max_positions": 32} if family == "gpt2" else {}
    model = tiny_model(family=family, **options)
    for request, done in zip(requests(), make_engine(model).complete(requests()), strict=True):
        log_probs = jax.nn.log_softmax(full(model, (*request.prompt, *done.ids)))
        begin = len(request.prompt) - 1
        of_new = log_probs[begin : begin + len(done.ids)]
        chosen = of_new[np.arange(len(done.ids)), done.ids]
        assert len(done.ids) == NEW or done.ids[-1] == numbers.eos_id
        np.testing.assert_allclose(done.log_probs, chosen, atol=2e-4)
        # A difference from the likeliest counts only where the two are far apart.
        np.testing.assert_allclose(chosen, of_new.max(axis=-1), atol=2e-4)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gemma3"])
def test_scanned_layers_write_what_unrolled_ones_do(family, tiny_model, make_engine, monkeypatch):
    """As on GPUs and TPUs."""
    model = tiny_model(family=family, layers=6)
    unrolled = make_engine(model).complete(requests())
    monkeypatch.setattr(engine, "_prepared", lambda model, params: (model, params))
    scanned = make_engine(model).complete(requests())
    assert [done.ids for done in scanned] == [done.ids for done in unrolled]


@pytest.mark.parametrize(
    "options",
    [{"latent_width": 8, "rope_head_dim": 4, "kv_heads": 0}, {"family": "mistral", "window": 7}],
)
def test_a_prompt_longer_than_a_chunk_is_continued_as_after_a_full_pass(
    options, tiny_model, tiny_params, make_engine
):
    """So long that its attention goes over the cache in blocks."""
    model = tiny_model(layers=2, **options)
    prompt = tuple(np.random.default_rng(2).integers(0, 48, 150).tolist())
    done = make_engine(model).complete([Request(prompt, GREEDY)])[0]
    text = jnp.array((*prompt, *done.ids))[None]
    output = Transformer(model).apply(
        {"params": tiny_params(model)}, text, jnp.arange(text.shape[1])[None], jnp.ones_like(text)
    )
    scores = logits(output.hidden, output_head(model, tiny_params(model)))[0, len(prompt) - 1 : -1]
    of_text = jax.nn.log_softmax(scores)[np.arange(len(done.ids)), list(done.ids)]
    np.testing.assert_allclose(done.log_probs, of_text, atol=2e-4)


def test_long_prompts_are_read_in_chunks(make_engine, tiny_model, full, monkeypatch):
    model = tiny_model(family="gemma3")
    whole = make_engine(model).complete(requests())
    monkeypatch.setattr(engine, "_CHUNK", 4)
    in_chunks = make_engine(model).complete(requests())
    assert [done.ids for done in in_chunks] == [done.ids for done in whole]


@pytest.mark.parametrize("count", [1, 4])
def test_a_step_copies_no_cache(model, make_engine, count):
    run = make_engine(model, slots=count)
    slots, cache = run._empty([Request((1,), Sampling(4096))], count)
    arguments = (run._params, slots, cache, np.ones(count, bool), np.int32(1), np.int32(0))
    program = engine.decode.lower(*arguments, model=run._model).compile()
    of_cache = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert program.memory_analysis().temp_size_in_bytes < of_cache / 2


def test_a_window_keeps_no_more_than_its_tokens(tiny_model):
    cache = jax.eval_shape(
        lambda: decoding.empty_cache(tiny_model(family="gemma3"), batch=2, length=64)
    )
    lengths = [layer.key.shape[-2] for layer in cache[0]]
    assert lengths == [3, 3, 64]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(NEW, 1.3), Sampling(NEW, 1.3, 20, 0.95)])
def test_a_text_depends_on_neither_neighbours_nor_slot(model, make_engine, sampling):
    run = make_engine(model, slots=3)
    together = run.complete(requests(sampling))
    for others in (
        [requests(sampling)[3]],
        [*requests(Sampling(2 * NEW, 0.7, min_p=0.1))[:4], requests(sampling)[3]],
        [requests(sampling)[3], *requests(GREEDY)],
    ):
        found = run.complete(others)
        same = found[[other == requests(sampling)[3] for other in others].index(True)]
        assert same.ids == together[3].ids
        np.testing.assert_allclose(same.log_probs, together[3].log_probs, atol=1e-5)


def test_a_mixture_of_experts_depends_on_no_neighbour_either(tiny_model, make_engine):
    run = make_engine(tiny_model(family="qwen3_moe"), slots=3)
    together = run.complete(requests())
    assert [run.complete([one])[0].ids for one in requests()] == [done.ids for done in together]


def test_the_seed_decides_the_text(model, make_engine):
    run, hot = make_engine(model), Sampling(NEW, 1.5)
    same = [Request(PROMPTS[0], hot, seed=seed) for seed in (1, 1, 2, 3)]
    one, again, *others = (done.ids for done in run.complete(same))
    assert one == again
    assert len({one, *others}) == 3


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_likeliest_alone_is_left_by_the_narrowest_limits(model, make_engine, options):
    narrow = make_engine(model).complete(requests(Sampling(NEW, 1.0, **options)))
    greedy = make_engine(model).complete(requests())
    assert [done.ids for done in narrow] == [done.ids for done in greedy]


def test_limits_are_of_each_request_alone(model, make_engine):
    run = make_engine(model, slots=5)
    mixed = [Request(PROMPTS[0], Sampling(NEW, 2.0, top_k=k), seed=5) for k in (0, 1, 2)]
    found = run.complete([*mixed, *requests()])
    assert found[1].ids == found[3].ids  # top_k of 1 beside a greedy one
    assert found[0].ids == run.complete(mixed[:1])[0].ids
    assert found[0].ids != found[1].ids


def test_a_repetition_penalty_counts_prompt_and_new_tokens(model, make_engine, full):
    penalty = 1.7
    done = make_engine(model).complete(requests(Sampling(NEW, 0.0, repetition_penalty=penalty)))
    for request, found in zip(requests(), done, strict=True):
        text = list(request.prompt)
        for token in found.ids:
            # Log-probabilities do not do: the sign of a logit decides.
            scores = full(model, text)[-1]
            seen = np.isin(np.arange(len(scores)), text)
            scores = np.where(
                seen, np.where(scores > 0, scores / penalty, scores * penalty), scores
            )
            assert scores[token] >= scores.max() - 1e-4
            text.append(token)
    plain = make_engine(model).complete(requests())
    assert [found.ids for found in done] != [found.ids for found in plain]


def test_stop_ids_end_a_text_with_them(model, make_engine, numbers):
    run = make_engine(model)
    whole = run.complete(requests())
    ends = [done.ids[4] for done in whole]
    cut = run.complete(
        [Request(p, GREEDY, stop_ids=(48, end)) for p, end in zip(PROMPTS, ends, strict=True)]
    )
    for done, before, end in zip(cut, whole, ends, strict=True):
        length = before.ids.index(end) + 1
        assert done.ids == before.ids[:length]
        assert done.finish == "stop"
        assert done.text == numbers.decode(done.ids[:-1])


def test_stop_strings_end_a_text_before_them(model, make_engine, numbers):
    run = make_engine(model)
    whole = run.complete(requests())[0]
    stop = f" {whole.ids[3]} {whole.ids[4]}"
    cut = run.complete([Request(PROMPTS[0], Sampling(NEW, 0.0, stop=("xyz", stop)))])[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish == "stop"
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert stop in numbers.decode(cut.ids)
    assert stop not in numbers.decode(cut.ids[:-1])


def test_limits_of_length_are_each_requests_own(model, make_engine):
    lengths = [1, 4, 9, 2, 7]
    mixed = [
        Request(prompt, Sampling(length, 0.0))
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]
    done = make_engine(model, slots=2).complete(mixed)
    assert [len(one.ids) for one in done] == lengths
    assert {one.finish for one in done} == {"length"}
    whole = make_engine(model).complete(requests())
    assert all(a.ids == b.ids[: len(a.ids)] for a, b in zip(done, whole, strict=True))


@pytest.fixture(scope="module")
def trained_tokenizer():
    words = ["the quick brown fox jumps over the lazy dog"]
    return train_tokenizer(TokenizerConfig(vocab_size=300), words)


def test_texts_continue_prompts_as_beginnings_of_documents(
    trained_tokenizer, tiny_model, tiny_params
):
    tokenizer = trained_tokenizer
    model = tiny_model(vocab_size=tokenizer.vocab_size, layers=2, tied=False)
    run = Engine(model, tiny_params(model), tokenizer, context=64)
    prompts = ["the fox", "", "a lazy dog over"]
    asked = [Request((tokenizer.bos_id, *tokenizer.encode(prompt)), GREEDY) for prompt in prompts]
    texts = run.generate(prompts, GREEDY)
    assert texts == [done.text for done in run.complete(asked)]
    assert len(set(texts)) == 3
    hot = Sampling(NEW)
    before = run.generate(["fox", "fox", "the dog"], hot)
    assert run.generate(["fox", "fox", "the dog"], hot) == before
    assert before[0] != before[1]  # the same prompt in another row draws anew
    assert run.generate(["fox", "a lazy dog jumps", "quick"], hot)[0] == before[0]
    assert run.generate(["fox", "fox", "the dog"], hot, seed=1) != before


def test_a_text_keeps_to_the_context_and_a_longer_prompt_is_refused(model, make_engine):
    run = make_engine(model, context=8)
    done = run.complete([Request(PROMPTS[0], Sampling(40, 0.0))])[0]
    assert len(done.ids) == 4  # the last one is never read
    assert done.finish == "length"
    with pytest.raises(UserError, match=r"^prompt: 11 tokens are more than the 8 .* sees at once"):
        run.complete(requests())
    with pytest.raises(UserError, match=r"^prompt: is empty"):
        run.complete([Request((), GREEDY)])
    assert run.complete([]) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("stop", "END"),
        ("stop", ("",)),
    ],
)
def test_a_senseless_sampling_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises((ValueError, TypeError), match=field):
        Sampling(**{field: value})


def test_ids_of_another_vocabulary_are_refused(model, make_engine):
    for wrong in (50, -1):
        with pytest.raises(UserError, match=r"^prompt: has token ids outside .* of 50"):
            make_engine(model).complete([Request((1, wrong), GREEDY)])


def test_all_learned_positions_are_written_to_and_no_more(tiny_model, make_engine, full):
    model = tiny_model(layers=1, positions="learned", max_positions=8)
    done = make_engine(model, context=8).complete([Request(PROMPTS[0], Sampling(40, 0.0))])[0]
    assert len(done.ids) == 4
    assert done.ids[0] == full(model, PROMPTS[0])[-1].argmax()


def test_a_prompt_that_is_a_prefix_sees_all_of_itself(tiny_model, tiny_params, make_engine):
    model = tiny_model(layers=2)
    done = make_engine(model, prompt_is_prefix=True).complete(requests())

    @jax.jit
    def likeliest(tokens, prefix):
        positions = jnp.arange(tokens.shape[1])[None]
        prefix = jnp.broadcast_to(prefix, tokens.shape)
        output = Transformer(model).apply(
            {"params": tiny_params(model)},
            tokens,
            positions,
            jnp.ones_like(tokens),
            prefix=prefix,
        )
        return jnp.argmax(logits(output.hidden, output_head(model, tiny_params(model))), axis=-1)

    for request, found in zip(requests(), done, strict=True):
        length = len(request.prompt)
        text = np.full((1, 24), 7, np.int32)
        text[0, : length + len(found.ids)] = (*request.prompt, *found.ids)
        expected = np.asarray(likeliest(text, length))[0, length - 1 :][: len(found.ids)]
        np.testing.assert_array_equal(found.ids, expected)
    assert [one.ids for one in done] != [one.ids for one in make_engine(model).complete(requests())]


def test_a_model_that_sees_both_ways_is_refused(tiny_model, numbers):
    with pytest.raises(UserError, match=r"config\.model\.causal=False.* cannot continue a text"):
        Engine(tiny_model(causal=False), {}, numbers, context=0)


def test_a_mesh_of_devices_writes_the_same(model, make_engine, tiny_params, numbers):
    alone = make_engine(model, slots=4).complete(requests())
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    params = jax.device_put(
        tiny_params(model), shardings(param_shapes(model), SHARDING_RULES, mesh)
    )
    with jax.set_mesh(mesh):
        sharded = Engine(model, params, numbers, context=0, slots=4).complete(requests())
    assert [done.ids for done in sharded] == [done.ids for done in alone]
