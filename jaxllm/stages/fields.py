"""Groups of fields that mean the same in every stage that has them."""

import dataclasses
from typing import ClassVar

from jaxllm.checkpoints.checkpointer import CheckpointConfig
from jaxllm.inference.requests import Sampling
from jaxllm.models.config import HeadConfig, ModelConfig
from jaxllm.models.families import architecture
from jaxllm.models.lora import LoraConfig, kept_pattern, trained_pattern
from jaxllm.models.stacks import last_stacks
from jaxllm.sharding.mesh import MeshConfig
from jaxllm.training.config import TrainConfig
from jaxllm.training.loop import EvalConfig
from jaxllm.training.optimizer import OptimizerConfig
from jaxllm.training.recorder import LogConfig


@dataclasses.dataclass(frozen=True)
class WritingFields:
    """How the next token is chosen, and when a text ends."""

    max_new_tokens: int = 128
    """Tokens to write at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Choose among the k likeliest tokens only; 0: all."""
    top_p: float = 1.0
    """Choose among the fewest tokens whose probabilities sum to this (nucleus); 1: all."""
    min_p: float = 0.0
    """Choose among tokens at least this times as probable as the likeliest; 0: all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that are in the text already, where positive, and multiplies
    them where negative; 1: none."""
    stop: str = ""
    """Text before which what is written ends, `\\n` a new line; several are separated by commas."""

    def __post_init__(self) -> None:
        self.sampling()

    def sampling(self) -> Sampling:
        """These fields as the engine takes them.

        Raises:
            ValueError: one of them is out of its range.
        """
        stop = self.stop.replace("\\n", "\n").split(",")
        return Sampling(
            self.max_new_tokens,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            tuple(filter(None, stop)),
        )


@dataclasses.dataclass(frozen=True)
class SamplingFields(WritingFields):
    """What to write, and how the next token is chosen."""

    prompt: str = ""
    """Text to continue; empty: the beginning of a document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.prompt.encode()
        except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
            raise ValueError("prompt: is not Unicode text") from None


@dataclasses.dataclass(frozen=True)
class TrainingFields:
    """What every stage that updates parameters has."""

    seed: int = 0
    """Of initialisation, of the order of rows, and of all that is drawn."""
    steps: int = 1000
    """Optimizer updates."""
    init: str = ""
    """Run directory or Hugging Face folder to take parameters, model and tokenizer from; empty:
    begin at random."""
    batch_size: int = 32
    """Rows of an update, over all devices."""
    micro_batch_size: int = 0
    """Rows at once, to save memory; the result does not depend on it. 0: all."""
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, and was given {getattr(self, name)}")
        if self.micro_batch_size < 0:
            raise ValueError("micro_batch_size: must not be negative")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} does not divide "
                f"batch_size {self.batch_size}"
            )

    @property
    def micro_batches(self) -> int:
        """Into how many parts the batch of an update is cut."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)

    @property
    def trained(self) -> str:
        """Pattern of the parameters that are trained."""
        return self.train.trainable

    @property
    def kept(self) -> str:
        """Pattern of the parameters that checkpoints hold: all but those of a frozen base."""
        return ".*"


@dataclasses.dataclass(frozen=True)
class ModelTrainingFields(TrainingFields):
    """What every stage has that trains one model."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()

    has_head: ClassVar[bool] = False
    """Whether the stage trains a head that reads texts."""
    random_head: ClassVar[bool] = False
    """Whether a new one begins with random numbers, rather than with 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.head != HeadConfig() and not self.has_head:
            raise ValueError("model.head: this stage trains no head; leave it out")
        if self.model.top_layers not in (0, self.train.last_layers):
            raise ValueError("model.top_layers: train.trainable=last:N sets it; leave it out")
        if self.lora.rank and (self.train.last_layers or self.train.trainable == "head"):
            raise ValueError(
                f"train.trainable: {self.train.trainable} does not train low-rank pairs; leave "
                "lora.rank out, or choose their layers by lora.pattern"
            )
        if self.lora.rank and not self.init:
            raise ValueError("lora.rank: pairs are trained beside a trained model; give it as init")
        if self.train.trainable == "lora" and not self.lora.rank:
            raise ValueError("train.trainable: lora asks for pairs; give lora.rank too")

    @property
    def trained(self) -> str:
        return trained_pattern(self._trainable, self.lora)

    @property
    def trained_of_model(self) -> str:
        """`trained`, of the paths within the model that `init` is, where that is one of several."""
        return self.trained

    @property
    def kept(self) -> str:
        return kept_pattern(self._trainable, self.lora)

    @property
    def _trainable(self) -> str:
        """`train.trainable` as a pattern, but for `lora`."""
        if layers := self.train.last_layers:
            stacks = last_stacks(architecture(self.model, 1).stacks, layers)
            return f"stack_({'|'.join(map(str, stacks))})/.*|final_norm/.*|output|head/.*"
        return "head/.*" if self.train.trainable == "head" else self.train.trainable
