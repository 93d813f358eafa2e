"""lm-evaluation-harness runs its own tasks on a model of ours, with the scores of our own."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.errors import UserError
from jaxllm.evaluation import harness

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: {kind}
"""
CHOICES = """
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_bytes, aggregation: mean, higher_is_better: true}
"""
CONTINUATION = """
doc_to_text: "{{context}}"
doc_to_target: " {{continuation}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""
WRITTEN = """
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
TEXT = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


def test_without_the_harness_one_line_tells_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    with pytest.raises(UserError, match="pip install"):
        harness.register()
    assert harness.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny model, trained for a few steps on words."""
    from jaxllm.command_line import load_config, override
    from jaxllm.main import run as run_stage

    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.jsonl"
    words = "the bee sees the tree and the tree sees a bee".split()
    documents = [" ".join(words[n % 11 :] + words[: n % 7]) for n in range(80)]
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    configs = Path(__file__).parent.parent.parent / "configs"
    config = load_config(f"{configs / 'pretrain.py'}:tiny")
    fields = {"data.train": text, "tokenizer.vocab_size": 290, "prompt": "the", "steps": 20}
    fields |= {"data.cleaning.near_duplicates": 0.0, "data.seq_len": 32, "batch_size": 8}
    override(config, [f"--config.{path}={value}" for path, value in fields.items()])
    run_stage(config, folder / "run")
    return folder / "run"


@pytest.fixture
def tasks(tmp_path):
    """A file of records and the harness's description of each of four tasks."""
    words = ["bee", "tree", "sees", "the"]
    records = {
        "choice": [
            {"query": f"the {word} and a", "choices": words, "gold": n}
            for n, word in enumerate(words)
        ],
        "continuation": [{"context": f"the {a} sees", "continuation": b} for a in words
                         for b in words],
        "written": [{"prompt": f"the {word}", "answer": word} for word in words],
        "text": [{"text": " ".join(words * n)} for n in (1, 3, 30)],
    }  # fmt: skip
    kinds = {
        "choice": ("multiple_choice", CHOICES),
        "continuation": ("loglikelihood", CONTINUATION),
        "written": ("generate_until", WRITTEN),
        "text": ("loglikelihood_rolling", TEXT),
    }
    for name, (kind, rest) in kinds.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records[name]))
        head = TASK.format(name=name, file=file, kind=kind)
        (tmp_path / f"{name}.yaml").write_text(head + rest)
    return tmp_path


@pytest.mark.slow
def test_the_harness_gives_the_scores_of_our_own_evaluation(run, tasks, monkeypatch):
    pytest.importorskip("lm_eval")
    from jaxllm.evaluation.suite import TasksConfig, measure, prepare, scores
    from jaxllm.evaluation.text_model import TrainedTextModel
    from jaxllm.inference.requests import Sampling
    from jaxllm.inference.trained import load_trained
    from jaxllm.sharding.mesh import MeshConfig, make_mesh

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    output = tasks / "results"
    names = "choice,continuation,written,text"
    arguments = ["--model", "jaxllm", "--model_args", f"path={run}", "--tasks", names]
    arguments += ["--include_path", str(tasks), "--batch_size", "8"]
    assert harness.main([*arguments, "--output_path", str(output), "--log_samples"]) == 0
    (file,) = output.rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]

    from jaxllm.data.documents import RejectedLines

    spec = ",".join(str(tasks / f"{name}.jsonl") for name in ("choice", "continuation"))
    with RejectedLines(tasks / "rejected.jsonl") as rejected:
        prepared = prepare(TasksConfig(tasks=spec), 0, 0.0, rejected)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        model = TrainedTextModel(load_trained(run, mesh))
        ours = scores(measure(prepared, model, (0,)))
        prompts = [json.loads(line) for line in (tasks / "written.jsonl").open()]
        how = Sampling(6, temperature=0.0, stop=("e",))
        written = [one.text for one in model.write([(p["prompt"], how) for p in prompts])]
        texts = [json.loads(line)["text"] for line in (tasks / "text.jsonl").open()]
        totals = [one.total for one in model.log_likelihoods([("", text) for text in texts])]

    pairs = {
        ("choice", "acc"): "choice/score",
        ("choice", "acc_bytes"): "choice/acc_norm",
        ("choice", "acc_stderr"): "choice/stderr",
        ("continuation", "acc"): "continuation/score",
        ("continuation", "acc_stderr"): "continuation/stderr",
        ("continuation", "perplexity"): "continuation/perplexity",
    }
    for (task, metric), name in pairs.items():
        assert theirs[task][f"{metric},none"] == pytest.approx(ours[f"evaluate/{name}"], rel=1e-5)
    assert 0 < ours["evaluate/continuation/score"] < 1
    (samples,) = output.rglob("samples_written_*.jsonl")
    lines = sorted(map(json.loads, samples.open()), key=lambda line: line["doc_id"])
    assert [line["resps"][0][0] for line in lines] == written
    assert not any("e" in text for text in written)
    bits = -sum(totals) / sum(len(text.encode()) for text in texts) / 0.6931471805599453
    assert theirs["text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("seed=1", "path is missing"),
        ("path=nowhere", "nowhere: is no run directory"),
        ("path=nowhere,revision=main", "revision is unknown"),
        ("path=nowhere,fsdp=0", "config.mesh.fsdp: must be positive"),
        ("path=nowhere,seed=x", "--model_args: seed: must be a whole number from 0; was 'x'"),
        ("path=123", "123: is no run directory"),
        ("path=nowhere --batch_size abc", "--batch_size: must be a whole number from 1; was 'abc'"),
        ("path=nowhere --batch_size 0", "--batch_size: must be a whole number from 1"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(tasks, arguments, message, capsys):
    pytest.importorskip("lm_eval")
    command = ["--model", "jaxllm", "--model_args", *arguments.split(), "--tasks", "choice"]
    assert harness.main([*command, "--include_path", str(tasks)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_conversation_is_written_by_the_tokenizers_template(run):
    pytest.importorskip("lm_eval")
    from jaxllm.evaluation.harness_model import HarnessModel

    model = HarnessModel(path=str(run))
    messages = [{"role": "user", "content": "the bee"}]
    asked = model.apply_chat_template(messages)
    assert "the bee" in asked and asked.startswith(model.apply_chat_template(messages, False))
    begun = [*messages, {"role": "assistant", "content": "sees the"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False).endswith("sees the")
    assert model.chat_template(True) and model.chat_template(False) is None
    assert "/" not in model.tokenizer_name
    shouting = dataclasses.replace(model._template, source="{{ messages[0].content | upper }}")
    model.__dict__["_template"] = shouting
    with pytest.raises(UserError, match="changes the message 'the bee'"):
        model.apply_chat_template(messages, False)
