"""The `generate_data` stage: a teacher answers prompts, for others to learn from (black-box
distillation)."""

import contextlib
import dataclasses
import functools
import math
import time
from contextlib import closing
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxllm.checkpoints.base import parameter_checksums
from jaxllm.checkpoints.run_directory import RunDirectory
from jaxllm.data.corpus import check_expected
from jaxllm.data.documents import RejectedLines
from jaxllm.data.numbered import NumberedLines
from jaxllm.data.questions import Questions, read_questions
from jaxllm.data.rankings import joint_of, layout_of
from jaxllm.data.selection import fingerprint_of
from jaxllm.errors import UserError
from jaxllm.files import locked
from jaxllm.inference.chat import Chat
from jaxllm.inference.endpoint import EndpointTeacher
from jaxllm.inference.reward_model import load_reward_model
from jaxllm.inference.teacher import LocalTeacher, Teacher
from jaxllm.inference.trained import load_trained
from jaxllm.reporting.tables import print_summary
from jaxllm.rollouts.answered import KEEP, Selection
from jaxllm.rollouts.config import RolloutConfig
from jaxllm.rollouts.judging import Judge, make_judge
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.stages.answering import Answering, Asking
from jaxllm.stages.answering_teacher import AnsweringTeacherFields, check_answering_teacher
from jaxllm.stages.fields import WritingFields

REJECTED_FILE = "rejected.jsonl"
_FREE = (
    *(f"teacher.{name}" for name in ("concurrency", "retries", "timeout", "key_variable")),
    *("batch_size", "max_failed_fraction"),
)
"""What a run that goes on may change: no answer depends on it."""
_PATIENCE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class PromptsFields:
    """What is asked."""

    train: str = ""
    """Sources of prompts, separated by commas: records of `prompt`, `messages` or `instruction` and
    `input`, with whatever rewards read of them, such as `answer` (docs/data.md)."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of a source's lines is bad; bad ones are set aside."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError("max_bad_fraction: must be from 0 to 1")


@dataclasses.dataclass(frozen=True)
class RewardModelInit:
    """The reward model, called `reward_model` among the rewards."""

    init: str = ""
    """Run directory of the stage `reward`."""


@dataclasses.dataclass(frozen=True)
class GenerateDataConfig(WritingFields):
    """A teacher's answers to prompts, as records to learn from."""

    stage: str = "generate_data"
    """Always `generate_data`."""
    teacher: AnsweringTeacherFields = AnsweringTeacherFields()
    data: PromptsFields = PromptsFields()
    seed: int = 0
    """Of the draws."""
    samples: int = 1
    """Responses to each prompt."""
    batch_size: int = 32
    """Texts that `teacher.init` writes at once, and the reward model reads."""
    rewards: str = ""
    """What responses are worth, as `numeric:1,format:0.2`: docs/rewards.md. `reward_model` is that
    of `reward.init`; empty: it alone."""
    reward: RewardModelInit = RewardModelInit()
    least: str = ""
    """A number: responses that are worth less are left out; with `rewards=numeric` and 1, those
    whose answer is wrong. Empty: none is left out."""
    keep: str = "all"
    """Of the responses to a prompt that are worth as much: `all`, the `best`, or the `first`."""
    keep_cut_off: bool = True
    """Keep responses that have no end by `max_new_tokens`."""
    max_failed_fraction: float = 0.05
    """End with exit code 2 when more than this share of the prompts gets no answer."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError("max_failed_fraction: must be from 0 to 1")
        if self.keep not in KEEP:
            raise ValueError(f"keep: must be one of {', '.join(KEEP)}; was {self.keep!r}")
        for name, wanted in (("least", self.least), ("keep", self.keep == "best")):
            if wanted and not self.is_judged:
                raise ValueError(f"{name}: needs rewards; give them, as in rewards=numeric")
        self.selection()

    @property
    def is_judged(self) -> bool:
        """Whether there are rewards."""
        return bool(self.rewards or self.reward.init)

    def selection(self) -> Selection:
        """Which responses are kept.

        Raises:
            ValueError: `least` is no number.
        """
        try:
            least = float(self.least or -math.inf)
        except ValueError:
            least = math.nan
        if math.isnan(least):
            raise ValueError(f"least: must be a number; was {self.least!r}")
        return Selection(least, self.keep, self.keep_cut_off)


def run(config: GenerateDataConfig, workdir: Path | None) -> None:
    """Has the prompts answered, and writes what is kept of the answers to `data.jsonl`; goes on
    where an earlier life of the run was stopped."""
    if workdir is None:
        raise UserError("--workdir is missing: give the directory that the answers go to.")
    check_answering_teacher(config.teacher)
    if not config.data.train.strip(", "):
        raise UserError("config.data.train: names no prompts; give a source, as in my.jsonl.")
    directory = RunDirectory(workdir)
    directory.open(dataclasses.asdict(config), dataclasses.asdict(GenerateDataConfig()), _FREE)
    with locked(directory.path, _PATIENCE_SECONDS):
        if directory.config_path.exists() and directory.final_scores().get("data/failed") == 0:
            print(f"{directory.path}: the run is finished; its data are {directory.answered}.")
            return
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            _answered(config, directory, mesh)


def _answered(config: GenerateDataConfig, directory: RunDirectory, mesh: Mesh) -> None:
    """What `run` does, in a directory that is nobody else's."""
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        rejected = stack.enter_context(RejectedLines(directory.path / REJECTED_FILE))
        answers = stack.enter_context(closing(NumberedLines(directory.answers)))
        teacher, questions, made_by = _teacher_and_questions(config, mesh, answers, rejected)
        judge, judged_by = _judge(config, mesh)
        rewards = None
        if judge is not None:
            judge.check(placed.prompt for placed in questions.prompts)
            rewards = stack.enter_context(closing(NumberedLines(directory.answer_rewards)))
        fingerprints = {"text": questions.fingerprint} | made_by | judged_by
        for name, fingerprint in fingerprints.items():
            cause = "a source has changed since" if name == "text" else "it has changed since"
            check_expected(directory.data(), name, fingerprint, cause)
        answering = Answering(
            _asking(config, judge),
            questions,
            directory,
            answers,
            rewards,
            rejected,
            lambda: directory.begin(dataclasses.asdict(config), fingerprints),
        )
        scores = answering.run(teacher)
    scores["time/total"] = time.monotonic() - begin
    directory.write_summary(scores)
    print_summary(scores)
    if scores["data/failed"]:
        print(f"{rejected.path}: prompts without an answer; the same command asks them again")
    print(f"data: {directory.answered}")


def _asking(config: GenerateDataConfig, judge: Judge | None) -> Asking:
    teacher = config.teacher
    who = {"url": teacher.url, "model": teacher.model} if teacher.url else {"init": teacher.init}
    return Asking(
        teacher.system,
        config.seed,
        config.samples,
        {"teacher": who, "temperature": config.temperature},
        config.selection(),
        judge,
        bool(config.rewards),
        config.max_failed_fraction,
    )


def _teacher_and_questions(
    config: GenerateDataConfig, mesh: Mesh, answers: NumberedLines, rejected: RejectedLines
) -> tuple[Teacher, Questions, dict[str, str]]:
    """Who answers, what is asked, as it reads it, and the fingerprint of a model on this machine.

    Raises:
        UserError: there is no such teacher, the key is missing, or there are no prompts.
    """
    teacher, done = config.teacher, frozenset(answers)
    read = functools.partial(
        read_questions, config.data.train, config.data.max_bad_fraction, rejected=rejected
    )
    if teacher.url:
        connection = teacher.connection()
        endpoint = EndpointTeacher(connection, config.sampling(), config.seed, config.samples, done)
        return endpoint, read(joint="\n"), {}
    trained = load_trained(teacher.init, mesh, config.batch_size)
    template = layout_of(trained.loaded.tokenizer, teacher.template, "config.teacher.template")
    chat = Chat(template, trained.loaded.context, config.sampling(), config.seed)
    made_by = {"teacher": fingerprint_of(parameter_checksums(trained.loaded.params))}
    local = LocalTeacher(trained, chat, config.samples, done)
    return local, read(joint=joint_of(template)), made_by


def _judge(config: GenerateDataConfig, mesh: Mesh) -> tuple[Judge | None, dict[str, str]]:
    """What judges the answers, if anything does, and the fingerprint of the reward model.

    Raises:
        UserError: `rewards` is wrong, or the reward model is none.
    """
    if not config.is_judged:
        return None, {}
    init = config.reward.init
    model = load_reward_model(init, mesh, config.batch_size) if init else None
    judge = make_judge(
        RolloutConfig(), config.rewards, config.max_new_tokens, model, False, bool(init)
    )
    checksums = parameter_checksums(model.params) if model else {}
    return judge, {"reward model": fingerprint_of(checksums)} if model else {}
