"""The `generate` stage: a run's model continues a prompt."""

import dataclasses
from pathlib import Path

import jax

from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.errors import UserError
from jaxllm.inference.trained import load_trained
from jaxllm.reporting.samples import append_samples
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.stages.fields import SamplingFields


@dataclasses.dataclass(frozen=True)
class GenerateConfig(SamplingFields):
    """Text from a trained model."""

    stage: str = "generate"
    """Always `generate`."""
    init: str = ""
    """Run directory whose model writes."""
    seed: int = 0
    """Of the draws; the same seed gives the same text."""
    samples: int = 1
    """Continuations to write."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError("samples: must be at least 1")


def run(config: GenerateConfig, workdir: Path | None) -> None:
    """Prints the prompt with its continuations; with a work directory, writes `samples.md` too."""
    if not config.init:
        raise UserError("config.init: give the run directory of a trained model.")
    if workdir is not None and RunDirectory(workdir).config_path.exists():
        raise UserError(f"--workdir={workdir}: holds a run, whose samples would be lost.")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trained = load_trained(config.init, mesh)
        prompts = [config.prompt] * config.samples
        texts = trained.generate(prompts, config.sampling(), config.seed)
    for text in texts:
        print(f"{config.prompt}{text}")
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        append_samples(
            workdir / "samples.md", trained.loaded.step, list(zip(prompts, texts, strict=True))
        )
