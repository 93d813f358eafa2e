"""The model class that lm-evaluation-harness calls; `jaxllm.evaluation.harness` registers it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from jaxllm.config import from_dict
from jaxllm.errors import UserError
from jaxllm.evaluation.text_model import TrainedTextModel
from jaxllm.inference.requests import Sampling
from jaxllm.inference.scoring import LogLikelihood, encode_pairs, opened
from jaxllm.inference.trained import load_trained
from jaxllm.reporting.phases import Phases
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.tokenizers.chat_template import ChatTemplate, chat_template

_AUTOMATIC_BATCH = 32
_NEW_TOKENS = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(LM):
    """A trained model behind the interface of lm-evaluation-harness 0.4.

    Texts are cut into tokens and scored exactly as the `evaluate` stage does it.
    """

    def __init__(
        self,
        path: str | int = "",
        batch_size: int | str = _AUTOMATIC_BATCH,
        seed: int | str = 0,
        data: int = -1,
        fsdp: int = 1,
        expert: int = 1,
        tensor: int = 1,
        **others: Any,
    ) -> None:
        """Loads the model.

        Args:
            path: a run directory or a Hugging Face folder. (The harness reads 123 as a number.)
            batch_size: rows scored at once, over all devices; `auto` is 32.
            seed: of what is drawn where a task samples.
            data, fsdp, expert, tensor: the mesh, as in `config.mesh`.
            **others: what the harness gives to every model: `device`, `max_batch_size`.

        Raises:
            UserError: there is no model at `path`, or an argument is wrong.
        """
        super().__init__()
        self._path = str(path)
        unknown = set(others) - {"device", "max_batch_size", "trust_remote_code"}
        if unknown or not self._path:
            problem = f"{min(unknown)} is unknown" if unknown else "path is missing"
            raise UserError(f"--model_args: {problem}; give path=RUN[,fsdp=N,tensor=N,seed=N].")
        automatic = str(batch_size).startswith("auto")
        rows = _AUTOMATIC_BATCH if automatic else _whole("--batch_size", batch_size, 1)
        drawn_by = _whole("--model_args: seed", seed, 0)
        axes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
        self._mesh = make_mesh(from_dict(MeshConfig, axes, "mesh"))
        with jax.set_mesh(self._mesh):
            trained = load_trained(self._path, self._mesh, slots=rows)
        self._model = TrainedTextModel(trained, rows, seed=drawn_by, report=Phases())
        self._tokenizer = trained.loaded.tokenizer
        self._chat = False

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding writes it) of each continuation."""
        found = [(one.total, one.greedy) for one in self._score([r.args for r in requests])]
        return self._remembered("loglikelihood", requests, found)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text as a document, in windows where it is too long."""
        found = [one.total for one in self._score([("", r.args[0]) for r in requests])]
        return self._remembered("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes to each prompt, up to one of the request's stop strings."""
        prompts = [request.args[0] for request in requests]
        encoded = self._tokenizer.encode_batch(prompts, parse_special_tokens=self._chat)
        how = [_sampling(request.args[1]) for request in requests]
        given = [opened(ids, self._tokenizer) for ids in encoded]
        stop_ids = self._template.stop_ids if self._chat else ()
        with jax.set_mesh(self._mesh):
            written = self._model.proceed(list(zip(given, how, strict=True)), stop_ids)
        found = [one.text for one in written]
        return self._remembered("generate_until", requests, found)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a generation prompt it ends in the last message.

        Raises:
            UserError: the template changes that message, so that its end cannot be told.
        """
        self._chat = True
        text = self._template.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        before, found, _ = text.rpartition(last)
        if not found:
            raise UserError(
                f"the chat template changes the message {last!r}, which the model is to continue; "
                "evaluate this task without --apply_chat_template."
            )
        return before + found

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the tokenizer's template."""
        return self._template.source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness keeps prompts that it has made."""
        return self._path.replace("/", "__")

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return chat_template(self._tokenizer)

    def _score(self, texts: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        pairs = encode_pairs(self._tokenizer, texts, parse_special_tokens=self._chat)
        with jax.set_mesh(self._mesh):
            return self._model.score(pairs)

    def _remembered(self, kind: str, requests: Sequence[Instance], found: list) -> list:
        """`found`, written down where the harness keeps results (`--use_cache`)."""
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)
        return found


def _whole(argument: str, value: int | str, least: int) -> int:
    """A whole number that the harness may give as text."""
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if number < least:
        raise UserError(f"{argument}: must be a whole number from {least}; was {value!r}.")
    return number


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """The harness's `generation_kwargs`; it is greedy unless they say `do_sample`, or give a
    temperature."""
    stop = options.get("until") or ()
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    limit = next((int(options[name]) for name in _LIMITS if options.get(name)), _NEW_TOKENS)
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        temperature = 0.0
    return Sampling(
        limit,
        temperature,
        top_k=int(options.get("top_k") or 0),
        top_p=float(options.get("top_p") or 1.0),
        min_p=float(options.get("min_p") or 0.0),
        stop=tuple(filter(None, stop)),
    )
