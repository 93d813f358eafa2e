"""The family that docs/importing.md adds is added as it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm.conversion import tables
from jaxllm.conversion.configuration import read_config
from jaxllm.conversion.reading import read_params
from jaxllm.models.families import FAMILIES, Family, architecture
from jaxllm.models.transformer import Transformer, output_head
from jaxllm.ops.vocabulary import logits

PAGE = Path(__file__).parent.parent.parent / "docs" / "importing.md"


@pytest.fixture
def phi3(monkeypatch):
    """Adds the family, as long as the test runs."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.splitlines()) < 50
    families, known = dict(FAMILIES), dict(tables.TABLES)
    exec(block, vars(tables) | {"Family": Family, "FAMILIES": families, "TABLES": known})  # noqa: S102 our own page
    monkeypatch.setitem(FAMILIES, "phi3", families["phi3"])
    monkeypatch.setitem(tables.TABLES, "phi3", known["phi3"])


def test_it_goes_out_and_in(phi3, publish, config_of, one_device, tmp_path):
    config = config_of("phi3", head_dim=0)
    params = publish(tmp_path, config)
    weights = load_file(tmp_path / "model.safetensors")
    # 4 heads of queries, 2 of keys and 2 of values, of 2 features each
    assert weights["model.layers.0.self_attn.qkv_proj.weight"].shape == (16, 8)
    again = read_params(tmp_path, architecture(read_config(tmp_path), 24), one_device)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
def test_it_computes_what_theirs_does(phi3, one_device, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
    config = transformers.Phi3Config(**sizes, vocab_size=24, pad_token_id=0, bos_token_id=1)
    config.eos_token_id = 2
    their = transformers.Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in their.parameters():
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.3)
    their.save_pretrained(tmp_path)
    model = architecture(read_config(tmp_path), 24)
    params = read_params(tmp_path, model, one_device)
    tokens = np.random.default_rng(0).integers(0, 24, (2, 16)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    inputs = (jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens))
    hidden = Transformer(model).apply({"params": params}, *inputs).hidden
    ours = logits(hidden, output_head(model, params))
    with torch.no_grad():
        expected = their(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
