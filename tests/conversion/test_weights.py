"""Published weights read and written: the same parameters, whatever the files and the mesh."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxllm import trees
from jaxllm.conversion import reading
from jaxllm.conversion.configuration import read_config
from jaxllm.conversion.reading import published_dtype, read_params
from jaxllm.conversion.tables import TABLES
from jaxllm.conversion.tensor_files import TensorFiles
from jaxllm.conversion.weights import tensors
from jaxllm.errors import UserError
from jaxllm.models.families import FAMILIES, architecture
from jaxllm.models.transformer import param_shapes
from jaxllm.sharding.mesh import MeshConfig, make_mesh

WEIGHTS = "model.safetensors"


def assert_equal(tree, expected):
    for (path, ours), (other, theirs) in zip(
        trees.leaves_with_paths(tree), trees.leaves_with_paths(expected), strict=True
    ):
        assert path == other
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=path)


def read(folder, mesh, **options):
    config = read_config(folder)
    return read_params(folder, architecture(config, config.vocab_size, **options), mesh)


def changed(folder, change):
    """Puts other tensors in the place of those in `folder`."""
    weights = load_file(folder / WEIGHTS)
    save_file(change(weights) or weights, folder / WEIGHTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_exported_is_imported_to_the_bit(
    family, tied, publish, config_of, one_device, tmp_path
):
    params = publish(tmp_path, config_of(family, tied=tied))
    assert_equal(read(tmp_path, one_device), params)


# Of the first layer, expert and matrix, and outside of layers, as published models have them.
NAMES = {
    "llama": ["model.layers.0.mlp.gate_proj.weight", "model.norm.weight", "lm_head.weight"],
    "gpt2": ["transformer.h.0.attn.c_attn.bias", "transformer.wpe.weight", "transformer.ln_f.bias"],
    "mistral": ["model.layers.2.self_attn.o_proj.weight"],
    "qwen2": ["model.layers.1.self_attn.k_proj.bias"],
    "qwen3": ["model.layers.1.self_attn.k_norm.weight"],
    "gemma2": ["model.layers.0.pre_feedforward_layernorm.weight"],
    "gemma3": ["model.layers.2.post_feedforward_layernorm.weight"],
    "mixtral": ["model.layers.0.block_sparse_moe.experts.2.w2.weight"],
    "qwen3_moe": [
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.mlp.gate.weight",
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_have_the_published_names_and_every_parameter_a_place(family, config_of):
    model = architecture(config_of(family, tied=False), 24)
    laid_out = tensors(TABLES[family].weights, model)
    names = [tensor.name for tensor in laid_out]
    assert len(set(names)) == len(names)
    assert set(NAMES[family]) <= set(names)
    sizes = sum(int(np.prod(tensor.shape)) for tensor in laid_out)
    assert sizes == trees.size(param_shapes(model))


def test_a_matrix_is_where_its_layer_is_in_the_stacks(publish, config_of, one_device, tmp_path):
    # Three layers of a unit of two: two stacks, of which the second has layer 2 alone.
    params = publish(tmp_path, config_of("gemma2"))
    weights = load_file(tmp_path / WEIGHTS)
    for layer, place in enumerate(
        (("stack_0", "layer_0"), ("stack_0", "layer_1"), ("stack_1", "layer_0"))
    ):
        stack, unit = place
        kernel = params[stack][unit]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(
            weights[f"model.layers.{layer}.mlp.up_proj.weight"], kernel[0].T
        )


def test_a_fused_matrix_is_taken_apart_in_order(publish, config_of, tmp_path):
    params = publish(tmp_path, config_of("gpt2"))
    attention = params["stack_0"]["layer_0"]["attention"]
    parts = np.split(load_file(tmp_path / WEIGHTS)["transformer.h.1.attn.c_attn.weight"], 3, axis=1)
    for name, part in zip(("query", "key", "value"), parts, strict=True):
        np.testing.assert_array_equal(part, attention[name]["kernel"][1])


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("gpt2", {"fsdp": 2, "tensor": 4, "data": 1}),
        ("gemma2", {"tensor": 2, "fsdp": 4, "data": 1}),
        ("mixtral", {"expert": 2, "fsdp": 2, "tensor": 2, "data": 1}),
    ],
)
def test_a_mesh_gets_its_shards_of_the_same_parameters(family, axes, publish, config_of, tmp_path):
    changes = {"experts": 4} if family == "mixtral" else {}
    params = publish(tmp_path, config_of(family, **changes))
    sharded = read(tmp_path, make_mesh(MeshConfig(**axes)))
    assert_equal(sharded, params)
    kernel = sharded["stack_0"]["layer_0"]["mlp"]
    kernel = (kernel["experts"] if family == "mixtral" else kernel)["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_many_files_are_one_model(publish, config_of, one_device, tmp_path):
    params = publish(tmp_path, config_of("qwen3"), max_shard_bytes=2000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * trees.size(params)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="numpy") as opened:
            assert opened.get_tensor(name).nbytes <= 2000
    assert_equal(read(tmp_path, one_device), params)
    (tmp_path / files[1]).unlink()
    with pytest.raises(UserError, match=rf"{files[1]}: is missing, and .*lists it; download"):
        read(tmp_path, one_device)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_files_of_another_dtype_are_read(dtype, publish, config_of, one_device, tmp_path):
    params = publish(tmp_path, config_of("llama"))
    changed(tmp_path, lambda weights: {name: w.astype(dtype) for name, w in weights.items()})
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), params)
    assert_equal(read(tmp_path, one_device), rounded)


def test_half_the_bytes_are_written_and_read_where_asked(publish, config_of, one_device, tmp_path):
    config = config_of("llama", param_dtype="bfloat16")
    params = publish(tmp_path, config_of("llama"), dtype="bfloat16")
    (dtype,) = {w.dtype for w in load_file(tmp_path / WEIGHTS).values()}
    assert dtype == ml_dtypes.bfloat16
    halved = read_params(tmp_path, architecture(config, 24), one_device)
    assert_equal(halved, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params))


@pytest.mark.parametrize(
    ("family", "pattern", "other"),
    [
        ("gpt2", "transformer.", ""),
        ("llama", "model.", ""),
        ("gemma3", "model.", "model.language_model."),
        ("gemma3", "model.", "language_model.model."),
    ],
)
def test_names_may_begin_otherwise(
    family, pattern, other, publish, config_of, one_device, tmp_path
):
    params = publish(tmp_path, config_of(family))
    changed(
        tmp_path,
        lambda weights: {other + name.removeprefix(pattern): w for name, w in weights.items()},
    )
    assert_equal(read(tmp_path, one_device), params)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt2", "h.1.attn.bias"),
        ("gemma3", "vision_tower.encoder.weight"),
        ("gemma3", "model.multi_modal_projector.weight"),
    ],
)
def test_tensors_that_say_nothing_are_passed_over(
    family, name, publish, config_of, one_device, tmp_path
):
    params = publish(tmp_path, config_of(family))
    changed(tmp_path, lambda weights: weights | {name: np.ones((2, 2), np.uint8)})
    assert_equal(read(tmp_path, one_device), params)


def test_an_output_matrix_beside_the_embedding_must_be_the_same(
    publish, config_of, one_device, tmp_path, monkeypatch
):
    monkeypatch.setattr(reading, "_ROWS_AT_ONCE", 5)
    params = publish(tmp_path, config_of("llama"))
    embedding = load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"]
    changed(tmp_path, lambda weights: weights | {"lm_head.weight": embedding})
    assert_equal(read(tmp_path, one_device), params)
    other = embedding.copy()
    other[-1, 0] += 1
    changed(tmp_path, lambda weights: weights | {"lm_head.weight": other})
    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight, and"):
        read(tmp_path, one_device)


def test_wrong_tensors_are_named_with_ours(publish, config_of, one_device, tmp_path):
    publish(tmp_path, config_of("llama"))
    name = "model.layers.1.self_attn.q_proj.weight"

    def refuse(message):
        with pytest.raises(UserError, match=message):
            read(tmp_path, one_device)

    whole = load_file(tmp_path / WEIGHTS)
    changed(tmp_path, lambda weights: {n: w for n, w in weights.items() if n != name})
    ours = r"of our stack_0/layer_0/attention/query/kernel \[8, 16\]"
    refuse(rf"the tensor {name} \[16, 8\] {ours} is missing\. The weights are not those")
    changed(tmp_path, lambda _: whole | {name: np.zeros((16, 9), np.float32)})
    refuse(rf"the tensor {name} {ours} is \[16, 9\], and should be \[16, 8\]\.")
    changed(tmp_path, lambda _: whole | {"model.extra": np.zeros(3, np.float32)})
    refuse(r"the tensor model.extra \[3\] has no place in the model\.")
    changed(tmp_path, lambda weights: {"model.embed_tokens.weight": weights["model.norm.weight"]})
    refuse("embed_tokens.*; the tensor.*; the tensor.*; and 26 more")
    changed(tmp_path, lambda _: whole | {name: np.zeros((16, 8), np.int8)})
    refuse(rf"{WEIGHTS}: the tensor {name} is of dtype I8; quantised weights are not read")


@pytest.mark.parametrize("kept", [4, 100, -4])
def test_a_file_cut_short_is_told(kept, publish, config_of, one_device, tmp_path):
    publish(tmp_path, config_of("llama"))
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(UserError, match=rf"{WEIGHTS}: is cut short or damaged \(.*; download it"):
        read(tmp_path, one_device)


def test_a_folder_without_weights_is_told(publish, config_of, one_device, tmp_path):
    publish(tmp_path, config_of("llama"))
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"holds no weights \(model.safetensors, "):
        read(tmp_path, one_device)
    (tmp_path / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(UserError, match="is missing, and"):
        read(tmp_path, one_device)
    (tmp_path / f"{WEIGHTS}.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"index\.json: cannot be read"):
        read(tmp_path, one_device)
    for name in (5, None, ["x"]):
        index = json.dumps({"weight_map": {"a": name}})
        (tmp_path / f"{WEIGHTS}.index.json").write_text(index)
        with pytest.raises(UserError, match=r"index\.json: .*weight_map: .* is no file's name"):
            read(tmp_path, one_device)


def test_a_tensor_that_is_there_twice_is_told(publish, config_of, one_device, tmp_path):
    publish(tmp_path, config_of("llama"))
    name = "layers.0.input_layernorm.weight"
    changed(tmp_path, lambda weights: weights | {name: 5 * weights[f"model.{name}"]})
    with pytest.raises(UserError, match=rf"{name} and model\.{name} are the same tensor twice"):
        read(tmp_path, one_device)


def test_the_dtype_that_loses_nothing_is_found(publish, config_of, tmp_path):
    for dtype in ("float32", "bfloat16"):
        publish(tmp_path / dtype, config_of("llama"), dtype=dtype)
        assert published_dtype(tmp_path / dtype) == dtype
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = tmp_path / "bfloat16"
    changed(folder, lambda weights: weights | {buffer: np.ones(2, np.float32)})
    assert published_dtype(folder) == "bfloat16"
    norm = "model.norm.weight"
    changed(folder, lambda weights: weights | {norm: weights[norm].astype(np.float32)})
    assert published_dtype(folder) == "float32"


def test_files_of_pytorch_need_it(publish, config_of, one_device, tmp_path, monkeypatch):
    publish(tmp_path, config_of("llama"))
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pytorch_model.bin: only PyTorch reads this format; ins"):
        read(tmp_path, one_device)


@pytest.mark.slow
def test_files_of_pytorch_are_read_and_never_run(
    publish, config_of, one_device, tmp_path, monkeypatch
):
    torch = pytest.importorskip("torch")
    params = publish(tmp_path, config_of("llama"), max_shard_bytes=3000, dtype="bfloat16")
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
    (tmp_path / f"{WEIGHTS}.index.json").unlink()
    for file in set(index["weight_map"].values()):
        weights = load_file(tmp_path / file)
        tensors_of_file = {
            name: torch.from_numpy(w.view(np.uint16).copy()).view(torch.bfloat16)
            for name, w in weights.items()
        }
        old = {} if "00001" in file else {"_use_new_zipfile_serialization": False}
        torch.save(tensors_of_file, tmp_path / file.replace("safetensors", "bin"), **old)
        (tmp_path / file).unlink()
    text = json.dumps(index).replace("safetensors", "bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    assert_equal(read(tmp_path, one_device), rounded)

    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"model.norm.weight": Code()}, tmp_path / "pytorch_model.bin")
    told = r"pytorch_model\.bin: holds more than tensors, or is damaged, and is not read; take the"
    with pytest.raises(UserError, match=told):
        read(tmp_path, one_device)


@pytest.mark.slow
def test_other_things_than_tensors_by_name_are_told(publish, config_of, one_device, tmp_path):
    torch = pytest.importorskip("torch")
    params = publish(tmp_path, config_of("llama"))
    weights = {name: torch.from_numpy(w) for name, w in load_file(tmp_path / WEIGHTS).items()}
    (tmp_path / WEIGHTS).unlink()
    file = tmp_path / "pytorch_model.bin"
    name = "model.norm.weight"
    for saved, reason in (
        (weights[name], "holds no tensors by name, but a Tensor"),
        ([weights[name]], "holds no tensors by name, but a list"),
        (None, "holds no tensors by name, but a NoneType"),
        ({1: weights[name]}, "holds 1, a Tensor, and not tensors by name alone"),
        ({"model": weights}, "holds 'model', a dict, and not tensors by name alone"),
        (weights | {name: weights[name].to("meta")}, f"the tensor {name} has no plain values"),
        (weights | {name: weights[name].to_sparse()}, f"the tensor {name} has no plain values"),
    ):
        torch.save(saved, file)
        with pytest.raises(UserError, match=rf"pytorch_model\.bin: {reason}"):
            read(tmp_path, one_device)
    torch.save({name: torch.nn.Parameter(w) for name, w in weights.items()}, file)
    assert_equal(read(tmp_path, one_device), params)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"pytorch_model\.bin: is cut short or damaged; download"):
        read(tmp_path, one_device)


def test_nothing_that_is_there_is_overwritten(publish, config_of, tmp_path):
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(UserError, match="is there and not empty; give a folder that is new"):
        publish(tmp_path, config_of("llama"))
    with pytest.raises(UserError, match="is there and not empty"):
        publish(tmp_path / "precious", config_of("llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_export_that_is_cut_off_is_no_model(publish, config_of, tmp_path, monkeypatch):
    import jaxllm.conversion.writing as writing

    def full(*_):
        raise OSError(28, "No space left on device")  # of a write, it has no file's name

    for place in ("_value", "write_json"):
        folder = tmp_path / place
        with monkeypatch.context() as patch:
            patch.setattr(writing, place, full)
            with pytest.raises(UserError, match=rf"^{folder}: cannot be written \(No space left"):
                publish(folder, config_of("llama"))
        assert not (folder / "config.json").exists()
    assert list((tmp_path / "_value").iterdir()) == []


def test_one_tensor_is_read_at_a_time_and_only_what_a_device_holds(
    publish, config_of, tmp_path, monkeypatch
):
    publish(tmp_path, config_of("llama"))
    elements = []
    plain = TensorFiles.read

    def counting(self, name, where):
        part = plain(self, name, where)
        elements.append((name, part.size))
        return part

    monkeypatch.setattr(TensorFiles, "read", counting)
    params = read(tmp_path, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    matrices = [size for name, size in elements if name.endswith("up_proj.weight")]
    assert set(matrices) == {8 * 16 // 8}  # an eighth of a layer's matrix at once
    assert sum(matrices) == 3 * 8 * 16  # and each part of it once
    assert trees.size(params) > 0


def test_the_host_reads_into_one_layer_of_one_parameter_at_a_time(
    publish, config_of, one_device, tmp_path, monkeypatch
):
    publish(tmp_path, config_of("mixtral"))
    held = []
    plain = reading._read

    def counting(*arguments):
        result = plain(*arguments)
        held.append(result.size)
        return result

    monkeypatch.setattr(reading, "_read", counting)
    params = read(tmp_path, one_device)
    assert max(held) == 3 * 8 * 16  # of the three experts of a layer
    assert sum(held) == trees.size(params)
