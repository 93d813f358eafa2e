"""The `generate` stage: a model continues one prompt, or each of a file's."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.records import BadLine
from jaxllm.data.sources import make_source
from jaxllm.errors import UserError
from jaxllm.files import write_atomically
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
    prompts = list(_prompts(config))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trained = load_trained(config.init, mesh, config.batch_size)
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


def _prompts(config: GenerateConfig) -> Iterator[tuple[str, str]]:
    """Each prompt, after where it stands.

    Raises:
        UserError: a record has none.
    """
    if not config.prompts:
        yield "config.prompt", config.prompt
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
        yield where, prompt


def _written(
    config: GenerateConfig, trained: TrainedModel, prompts: Sequence[tuple[str, str]]
) -> list[Completion]:
    """The continuations, `config.samples` of each prompt in turn.

    Raises:
        UserError: a prompt has more tokens than the model sees at once.
    """
    tokenizer, context = trained.loaded.tokenizer, trained.loaded.context
    encoded = tokenizer.encode_batch([prompt for _, prompt in prompts])
    for (where, _), ids in zip(prompts, encoded, strict=True):
        check_prompt(len(ids) + 1, context, where)
    requests = [
        Request((tokenizer.bos_id, *ids), config.sampling(), seed_of(config.seed, number))
        for number, ids in enumerate(ids for ids in encoded for _ in range(config.samples))
    ]
    return trained.complete(requests)


def _write_generations(
    path: Path, prompts: Sequence[tuple[str, str]], written: Sequence[Completion], samples: int
) -> None:
    lines = [
        {
            "prompt": prompts[number // samples][1],
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
