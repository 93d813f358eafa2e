"""How items are scored: one function for each way of answering, and the summary of a task."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.evaluation import answers
from jaxllm.evaluation.instructions import check, check_loosely
from jaxllm.evaluation.items import Item
from jaxllm.evaluation.statistics import mean, ratio, standard_error
from jaxllm.evaluation.text_model import TextModel
from jaxllm.inference.requests import Sampling


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model made of one item."""

    scores: Mapping[str, float]
    """By name; the first is the one that the task is judged by."""
    details: Mapping[str, Any]
    """For the file of items: what it chose or wrote, and what was right."""
    left_out: int
    """Tokens of its prompt that did not fit into the context."""


Measure = Callable[[TextModel, Sequence[Item], Sequence[str], int], list[Outcome]]
"""`measure(model, items, prompts, max_new_tokens)`, with the prompt of each item."""


def choices(
    model: TextModel, items: Sequence[Item], prompts: Sequence[str], max_new_tokens: int
) -> list[Outcome]:
    """The likeliest of the options is the choice; the first of several.

    `acc` compares log-likelihoods, and `acc_norm` those divided by the UTF-8 bytes of the
    continuation (without the white space before it), since long ones are never likely.
    `gold_probability` is that of the right option among them, by the same log-likelihoods: it rises
    long before the choice is right. `chance` is what guessing gives.
    """
    texts = [
        (prompt + context, continuation)
        for prompt, item in zip(prompts, items, strict=True)
        for context, continuation in item.options
    ]
    found = iter(model.log_likelihoods(texts))
    outcomes = []
    for item in items:
        scored = [next(found) for _ in item.options]
        totals = [option.total for option in scored]
        lengths = [len(continuation.strip().encode()) for _, continuation in item.options]
        per_byte = [total / length for total, length in zip(totals, lengths, strict=True)]
        chosen = totals.index(max(totals))
        scores = {
            "acc": float(chosen == item.gold),
            "acc_norm": float(per_byte.index(max(per_byte)) == item.gold),
            "gold_probability": _softmax(totals)[item.gold],
            "chance": 1 / len(item.options),
        }
        details = {
            "choices": ["".join(option).strip() for option in item.options],
            "log_likelihoods": totals,
            "chosen": chosen,
            "gold": item.gold,
        }
        outcomes.append(Outcome(scores, details, max(option.left_out for option in scored)))
    return outcomes


def _softmax(logits: Sequence[float]) -> list[float]:
    most = max(logits)
    powers = [math.exp(logit - most) for logit in logits]
    return [power / sum(powers) for power in powers]


def continuations(
    model: TextModel, items: Sequence[Item], prompts: Sequence[str], max_new_tokens: int
) -> list[Outcome]:
    """Whether the continuation is what greedy decoding writes, and its log-likelihood
    (LAMBADA: Paperno et al. 2016, https://arxiv.org/abs/1606.06031)."""
    texts = [
        (prompt + item.options[0][0], item.options[0][1])
        for prompt, item in zip(prompts, items, strict=True)
    ]
    return [
        Outcome(
            {"acc": float(found.greedy), "log_likelihood": found.total},
            {"gold": continuation.strip(), "log_likelihoods": [found.total]},
            found.left_out,
        )
        for (_, continuation), found in zip(texts, model.log_likelihoods(texts), strict=True)
    ]


def written_answers(
    model: TextModel, items: Sequence[Item], prompts: Sequence[str], max_new_tokens: int
) -> list[Outcome]:
    """Exact match of the answer in what the model writes, greedily, by `answers.extract`."""
    requests = [
        (prompt, Sampling(max_new_tokens, temperature=0.0, stop=item.stop))
        for prompt, item in zip(prompts, items, strict=True)
    ]
    outcomes = []
    for item, written in zip(items, model.write(requests), strict=True):
        extracted = answers.extract(written.text, item.target)
        right = answers.is_right(extracted, item.target)
        details = {"response": written.text, "extracted": extracted, "gold": item.target}
        outcomes.append(Outcome({"exact_match": float(right)}, details, written.left_out))
    return outcomes


def instructions(
    model: TextModel, items: Sequence[Item], prompts: Sequence[str], max_new_tokens: int
) -> list[Outcome]:
    """Whether what the model writes, greedily, keeps to all rules of its prompt; `loose` as
    `instructions.check_loosely` reads it."""
    sampling = Sampling(max_new_tokens, temperature=0.0)
    outcomes = []
    written = model.write([(prompt, sampling) for prompt in prompts])
    for item, (text, left_out) in zip(items, written, strict=True):
        kept, loosely = check(item.rules, text), check_loosely(item.rules, text)
        scores = {"strict": float(all(kept)), "loose": float(all(loosely))}
        details = {"response": text, "rules": item.rules, "kept": kept, "kept_loosely": loosely}
        outcomes.append(Outcome(scores, details, left_out))
    return outcomes


MEASURES: dict[str, Measure] = {
    "choice": choices,
    "continuation": continuations,
    "answer": written_answers,
    "instructions": instructions,
}
"""By `Kind.measure`."""


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The scores of a task, which has at least one item.

    `score` and `stderr` are those of the first score; the others have their means under their own
    names, but of log-likelihoods comes `perplexity`, e^(-mean). Where there are choices, `majority`
    is what always choosing the place that is right most often gives: letters are often unevenly
    right. Of instructions, `rules` and `rules_loose` are the shares of single rules that were kept.
    `items` counts, and `cut` is the share of items whose prompt lost its beginning. What is
    estimated has a standard error `NAME_stderr`, that of the perplexity by the delta method.
    """
    first, *others = outcomes[0].scores
    values = [outcome.scores[first] for outcome in outcomes]
    scores = {"score": mean(values), "stderr": standard_error(values)}
    for name in others:
        values = [outcome.scores[name] for outcome in outcomes]
        average, error = mean(values), standard_error(values)
        if name == "log_likelihood":
            perplexity = math.exp(min(-average, 700.0))
            scores |= {"perplexity": perplexity, "perplexity_stderr": perplexity * error}
        elif name == "chance":  # known, whatever the model
            scores[name] = average
        else:
            scores |= {name: average, f"{name}_stderr": error}
    if "loose" in scores:
        for name, key in (("rules", "kept"), ("rules_loose", "kept_loosely")):
            rows = [outcome.details[key] for outcome in outcomes]
            scores[name], scores[f"{name}_stderr"] = ratio(
                [float(sum(row)) for row in rows], [float(len(row)) for row in rows]
            )
    if "chance" in scores:
        places = collections.Counter(outcome.details["gold"] for outcome in outcomes)
        scores["majority"] = max(places.values()) / len(outcomes)
    scores["items"] = float(len(outcomes))
    scores["cut"] = mean([float(outcome.left_out > 0) for outcome in outcomes])
    return scores
