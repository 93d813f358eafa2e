"""A trained reward model at work: prompts and responses in, a number for each out."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from jaxllm import config as configuration
from jaxllm.checkpoints.load import LoadedModel, load_model, model_config_of
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.cleaning import Cleaner, CleaningConfig
from jaxllm.data.config import DataConfig
from jaxllm.data.conversations import cleaned_message
from jaxllm.data.rankings import ResponseIds, fitted_responses, response_ids
from jaxllm.errors import UserError
from jaxllm.inference.heads import outputs_of
from jaxllm.models.config import TransformerConfig
from jaxllm.objectives.objective import Params
from jaxllm.tokenizers.chat_template import ChatTemplate, Message, chat_template


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """Tells how good responses are, several at once. The mesh must be set."""

    model: TransformerConfig
    params: Params
    template: ChatTemplate
    """By which prompt and response are laid out."""
    context: int
    """Tokens of a prompt and its response at most. What is longer loses the beginning of the
    prompt; a response that is longer alone loses its end."""
    mean: float = 0.0
    """Reward of the reference answers, which is taken from all, so that theirs is 0."""
    batch_size: int = 32
    cleaning: CleaningConfig | None = None
    """What is done to each text first; None: nothing."""

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str]
    ) -> list[float]:
        """The reward of each response to the messages at its place.

        Raises:
            UserError: the template cannot render one.
            ValueError: it writes nothing of a response.
        """
        clean = Cleaner(self.cleaning) if self.cleaning else None
        found = []
        for messages, response in zip(prompts, responses, strict=True):
            if clean:
                messages = [cleaned_message(dict(message), clean) for message in messages]
                response = clean(response) or ""
            found += response_ids(self.template, messages, [response])
        return self.of_ids(found)

    def of_ids(self, responses: Sequence[ResponseIds]) -> list[float]:
        """The reward of each response, which is laid out already."""
        fitted = (fitted_responses([each], self.context)[0] for each in responses)
        rows = [[*prompt, *response] for prompt, response in fitted]
        outputs = outputs_of(self.model, self.params, rows, self.context, self.batch_size)
        return [float(output[0]) - self.mean for output in outputs]


def load_reward_model(path: str | Path, mesh: Mesh, batch_size: int = 32) -> RewardModel:
    """The reward model that the run of the stage `reward` at `path` has trained.

    Raises:
        UserError: there is no such run, it is of another stage, or it has no checkpoint yet.
    """
    model_config_of(path)  # a wrong path is told as such
    run = RunDirectory(path)
    if not is_reward_model(path):
        raise UserError(f"{path}: is no run of the stage reward.")
    return reward_model_of(run, load_model(path, mesh), batch_size)


def is_reward_model(path: str | Path) -> bool:
    """Whether `path` is a run of the stage `reward`."""
    run = RunDirectory(path)
    return run.config_path.exists() and run.config().get("stage") == "reward"


def reward_mean(path: str | Path) -> float:
    """What a run of the stage `reward` has found its rewards to be in the mean; 0 before it ends.

    Raises:
        UserError: what it has kept of them cannot be read.
    """
    rewards = RunDirectory(path).rewards
    try:
        return float(json.loads(rewards.read_text())["mean"])
    except FileNotFoundError:
        return 0.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{rewards}: cannot be read ({error}).") from None


def reward_model_of(run: RunDirectory, loaded: LoadedModel, batch_size: int = 32) -> RewardModel:
    """The reward model of a run whose parameters are loaded; it reads texts as the run did."""
    mean = reward_mean(run.path)
    data = configuration.from_dict(DataConfig, run.group("data"), "data")
    template = chat_template(loaded.tokenizer)
    return RewardModel(
        loaded.model, loaded.params, template, data.seq_len, mean, batch_size, data.cleaning
    )
