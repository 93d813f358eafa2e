"""An engine of a tiny model whose text is the ids that it writes."""

import jax
import pytest

from jaxllm.inference.engine import Engine
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer


class Numbers(ByteTokenizer):
    """A tokenizer whose text is the ids, each a word."""

    def __init__(self):
        super().__init__()
        self.bos_id, self.eos_id = 48, 49

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


@pytest.fixture
def one_device():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def numbers():
    return Numbers()


@pytest.fixture(scope="session")
def model(tiny_model):
    return tiny_model(layers=2, tied=False)


@pytest.fixture(scope="session")
def make_engine(tiny_params, numbers):
    """Makes an engine of a model."""

    def made(model, slots=3, context=0, **options):
        return Engine(model, tiny_params(model), numbers, context=context, slots=slots, **options)

    return made
