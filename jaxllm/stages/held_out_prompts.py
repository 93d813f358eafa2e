"""What a policy is worth on prompts that it does not learn from, and what it answers to the
first."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxllm import trees
from jaxllm.data.prompts import Prompt
from jaxllm.inference.requests import Sampling, seed_of
from jaxllm.objectives.objective import Params
from jaxllm.reporting.samples import append_samples
from jaxllm.rollouts.judging import Judge
from jaxllm.rollouts.responses import Response
from jaxllm.rollouts.several import best_of, majority_of
from jaxllm.rollouts.writer import Writer
from jaxllm.sharding.processes import is_main
from jaxllm.stages.on_policy import OnPolicyConfig
from jaxllm.stages.training_run import TrainingRun
from jaxllm.training.state import TrainState

C = TypeVar("C", bound=OnPolicyConfig)


class HeldOutPrompts:
    """Judges a policy's answers to prompts that it does not learn from, and shows the first."""

    def __init__(
        self,
        run: TrainingRun[C],
        prompts: Sequence[Prompt],
        judge: Judge,
        writer: Writer,
    ) -> None:
        """Args:
        run: whose policy it is.
        prompts: those that are held out.
        judge: what answers are worth.
        writer: what writes them.
        """
        config = run.config
        self._run, self._judge, self._writer = run, judge, writer
        self._sampling = Sampling(
            config.max_new_tokens, config.rl.eval_temperature, stop=config.sampling().stop
        )
        self._prompts = prompts
        most = config.eval.max_batches * config.batch_size or len(self._prompts)
        self._some = self._prompts[:: max(1, -(-len(self._prompts) // most))]
        self._latest: dict[int, dict[str, float]] = {}

    def __call__(self, step: int, state: TrainState, frozen: Params) -> dict[str, float]:
        """Scores of `eval.max_batches` batches of prompts spread over all, or of all."""
        scores = self._measured(state, frozen, self._some, step)
        self._latest = {step: scores}
        return scores

    def final_scores(self, state: TrainState, frozen: Params) -> dict[str, float]:
        """Scores of all prompts."""
        latest = self._latest.get(int(state.step))  # the loop has evaluated its last step
        if latest is None or len(self._some) < len(self._prompts):
            return self._measured(state, frozen, self._prompts)
        return latest

    def _measured(
        self,
        state: TrainState,
        frozen: Params,
        prompts: Sequence[Prompt],
        step: int | None = None,
    ) -> dict[str, float]:
        params = trees.merge(state.evaluation_params, frozen)
        count, seed = self._run.config.rl.eval_samples, self._run.config.seed
        asked = [prompt for prompt in prompts for _ in range(count)]
        seeds = [seed_of(seed, number) for number in range(len(asked))]
        written = self._writer(params, asked, seeds, self._sampling)
        judged = self._judge(asked, written)
        if step is not None:
            self._show(step, asked[::count], written[::count], judged.scores[::count])
        means: Mapping[str, Any] = {
            "reward": judged.scores,
            "length": [len(response.ids) for response in written],
            "eos_rate": [response.ended for response in written],
            **{f"rewards/{name}": values for name, values in judged.by_name.items()},
        }
        scores = {f"eval/{name}": float(np.mean(values)) for name, values in means.items()}
        if count > 1:
            texts = [response.text for response in written]
            by_prompt = [texts[first : first + count] for first in range(0, len(texts), count)]
            last = [prompt.text for prompt in prompts]
            for name, values in judged.by_name.items():
                rows = values.reshape(-1, count)
                scores[f"eval/rewards/{name}/best_of_{count}"] = best_of(rows, count)
                scores[f"eval/rewards/{name}/majority_of_{count}"] = majority_of(
                    rows, last, by_prompt
                )
        return scores

    def _show(
        self,
        step: int,
        prompts: Sequence[Prompt],
        written: Sequence[Response],
        scores: np.ndarray,
    ) -> None:
        samples = [
            (prompt.text, response.text) for prompt, response in zip(prompts, written, strict=True)
        ]
        count = self._run.config.rl.shown
        if is_main():
            append_samples(
                self._run.directory.samples, step, samples[:count], scores[:count].tolist()
            )
