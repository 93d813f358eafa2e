"""The `generate` stage: a model continues one prompt, or each of a file's."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.records import BadLine
from jaxllm.data.sources import make_source
from jaxllm.errors import UserError
from jaxllm.files import write_atomically
from jaxllm.inference.adapters import check_known, parse_adapters
from jaxllm.inference.engine import check_prompt
from jaxllm.inference.requests import Completion, Request, seed_of
from jaxllm.inference.trained import TrainedModel, load_trained
from jaxllm.reporting.samples import append_samples
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.sharding.processes import is_main
from jaxllm.stages.fields import SamplingFields
from jaxllm.tokenizers.interface import check_unicode

GENERATIONS_FILE = "generations.jsonl"


@dataclasses.dataclass(frozen=True)
class GenerateConfig(SamplingFields):
    """Text from a trained model."""

    stage: str = "generate"
    """Always `generate`."""
    init: str = ""
    """Run directory or Hugging Face folder whose model writes."""
    prompts: str = ""
    """Source of records with a `prompt` each, to be continued in the place of `prompt`: a file, a
    glob, `builtin:`, …; what is written goes to `generations.jsonl` in the work directory."""
    adapters: str = ""
    """Low-rank adapters of `init`, `NAME=RUN` separated by commas: each prompt is continued by the
    one that it names, in one batch with the others (docs/lora.md)."""
    adapter: str = ""
    """The adapter that continues `prompt`, and those prompts of `prompts` whose record has no field
    `adapter`; empty: `init` as it is."""
    seed: int = 0
    """Of the draws; the same seed gives the same text."""
    samples: int = 1
    """Continuations to write of each prompt."""
    batch_size: int = 32
    """Texts written at once; a finished one makes room for the next."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        parse_adapters(self.adapters)
        if self.prompts and self.prompt:
            raise ValueError("prompts: is given, and prompt too; give one of them")


def run(config: GenerateConfig, workdir: Path | None) -> None:
    """Prints the prompt with its continuations, and with a work directory writes `samples.md` too;
    those of a file of prompts go to `generations.jsonl`."""
    if not config.init:
        raise UserError("config.init: give the run directory or Hugging Face folder of a model.")
    if workdir is not None and RunDirectory(workdir).config_path.exists():
        raise UserError(f"--workdir={workdir}: holds a run, whose samples would be lost.")
    if config.prompts and workdir is None:
        raise UserError("--workdir is missing: what is written of config.prompts goes there.")
    adapters = parse_adapters(config.adapters)
    prompts = list(_prompts(config))
    for prompt in prompts:
        own = prompt.adapter != config.adapter
        check_known(prompt.adapter, list(adapters), prompt.where if own else "config.adapter")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trained = load_trained(config.init, mesh, config.batch_size, adapters)
        written = _written(config, trained, prompts)
    if not is_main():
        return
    if config.prompts:
        assert workdir is not None
        _write_generations(workdir / GENERATIONS_FILE, prompts, written, config.samples)
        return
    for completion in written:
        print(f"{config.prompt}{completion.text}")
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        samples = [(config.prompt, completion.text) for completion in written]
        append_samples(workdir / "samples.md", trained.loaded.step, samples)


class _Prompt(NamedTuple):
    """What is to be continued."""

    where: str
    """Where it stands, for messages."""
    text: str
    adapter: str


def _prompts(config: GenerateConfig) -> Iterator[_Prompt]:
    """Each prompt.

    Raises:
        UserError: a record has none.
    """
    if not config.prompts:
        yield _Prompt("config.prompt", config.prompt, config.adapter)
        return
    source = make_source(config.prompts, "config.prompts", parse_special_tokens=False)
    for record in source.records():
        where = f"{record.file}, line {record.line}"
        if isinstance(record, BadLine):
            raise UserError(f"{where}: {record.reason}.")
        prompt = record.fields.get("prompt")
        if not isinstance(prompt, str):
            raise UserError(f"{where}: has no text `prompt`; give each record one.")
        try:
            check_unicode([prompt])
        except ValueError as error:
            raise UserError(f"{where}: the prompt is {error}.") from None
        adapter = record.fields.get("adapter", config.adapter)
        if not isinstance(adapter, str):
            raise UserError(f"{where}: its `adapter` is no text.")
        yield _Prompt(where, prompt, adapter)


def _written(
    config: GenerateConfig, trained: TrainedModel, prompts: Sequence[_Prompt]
) -> list[Completion]:
    """The continuations, `config.samples` of each prompt in turn.

    Raises:
        UserError: a prompt has more tokens than the model sees at once.
    """
    tokenizer, context = trained.loaded.tokenizer, trained.loaded.context
    encoded = tokenizer.encode_batch([prompt.text for prompt in prompts])
    for prompt, ids in zip(prompts, encoded, strict=True):
        check_prompt(len(ids) + 1, context, prompt.where)
    asked = [pair for pair in zip(prompts, encoded, strict=True) for _ in range(config.samples)]
    requests = [
        Request(
            (tokenizer.bos_id, *ids),
            config.sampling(),
            seed_of(config.seed, number),
            adapter=prompt.adapter,
        )
        for number, (prompt, ids) in enumerate(asked)
    ]
    return trained.complete(requests)


def _write_generations(
    path: Path, prompts: Sequence[_Prompt], written: Sequence[Completion], samples: int
) -> None:
    lines = [
        {
            "prompt": prompts[number // samples].text,
            **({"adapter": name} if (name := prompts[number // samples].adapter) else {}),
            "response": completion.text,
            "finish": completion.finish,
            "tokens": len(completion.ids),
            "log_prob": sum(completion.log_probs),
        }
        for number, completion in enumerate(written)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, text)
    print(f"{path}: {len(lines):,} continuations of {len(prompts):,} prompts")
