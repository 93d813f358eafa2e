"""What all tests share: eight simulated devices, and runtime checking of shapes and types."""

import functools
import http.server
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# Before JAX is imported. Simulated devices share few cores: without NPROC their rendezvous can
# time out and abort the process.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the time of these tests: a train step 4 s rather than 10.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()

from jaxtyping import install_import_hook  # noqa: E402

# Every annotation of jaxllm is checked at run time, array shapes and dtypes included.
install_import_hook("jaxllm", "beartype.beartype")

import jax  # noqa: E402
import jax.extend  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from jaxllm import trees  # noqa: E402
from jaxllm.models.config import ModelConfig, TransformerConfig  # noqa: E402
from jaxllm.models.families import architecture  # noqa: E402
from jaxllm.models.transformer import init_params  # noqa: E402

# How long an example takes says how busy the machine is.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")

_TINY = {"layers": 3, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 32, "dtype": "float32"}
# Windows and patterns that show in rows of a dozen tokens, and few experts.
_TINY_OF_FAMILY = {
    "mistral": {"window": 3},
    "gemma2": {"window": 3},
    "gemma3": {"window": 3, "pattern": "local,local,global"},
    "mixtral": {"experts": 4},
    "qwen3_moe": {"experts": 4, "experts_per_token": 3},
}


@pytest.fixture(scope="module", autouse=True)
def bounded_programs():
    """Drops compiled programs when there are many: some tests compile a thousand.

    Each takes several mappings of memory, of which Linux allows a process 65,530; behind them
    LLVM dies of a segmentation fault.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_model():
    """Makes the architecture of a decoder that compiles in a second; options change it."""

    def make(vocab_size: int = 50, **options) -> TransformerConfig:
        of_family = _TINY_OF_FAMILY.get(options.get("family", ""), {})
        return architecture(ModelConfig(**_TINY | of_family | options), vocab_size)

    return make


@pytest.fixture(scope="session")
def tiny_params():
    """Makes random parameters of an architecture, every matrix of them large.

    At initialisation every layer is the identity, and a fault in one of them could hide.
    """

    @functools.cache
    def make(model: TransformerConfig, seed: int = 0, scale: float = 3.0) -> dict:
        def enlarged(key: jax.Array) -> dict:
            def draw(path: str, leaf: jax.Array) -> jax.Array:
                own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
                drawn = jax.random.normal(own_key, leaf.shape)
                if path.endswith("kernel"):
                    return scale * leaf.shape[-2] ** -0.5 * drawn
                if "post_norm" in path:
                    return drawn
                of_layer = path.endswith(("scale", "bias"))
                return leaf + 0.3 * drawn if of_layer else leaf * scale

            return trees.map_with_paths(draw, init_params(model, key))

        return jax.jit(enlarged)(jax.random.key(seed))

    return make


@pytest.fixture(scope="session")
def all_equations():
    """Goes through the equations of a program, those of loops, branches and calls included."""

    def walk(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
        for equation in jaxpr.eqns:
            yield equation
            for parameter in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    return walk


@pytest.fixture(scope="session")
def packed_rows():
    """Makes one row a list of document lengths: tokens, targets, positions, segments, weights.

    A document of n tokens has n - 1 targets; what is left of the row is padding.
    """

    def make(rows: list[list[int]], seq: int, vocab_size: int = 50, seed: int = 0) -> dict:
        rng = np.random.default_rng(seed)
        names = ("tokens", "targets", "positions", "segment_ids")
        batch = {name: np.zeros((len(rows), seq), np.int32) for name in names}
        batch["loss_weights"] = np.zeros((len(rows), seq), np.float32)
        for row, lengths in enumerate(rows):
            begin = 0
            for segment, length in enumerate(lengths, start=1):
                here = (row, slice(begin, begin + length))
                tokens = rng.integers(0, vocab_size, length)
                batch["tokens"][here] = tokens
                batch["targets"][here] = np.append(tokens[1:], 0)
                batch["positions"][here] = np.arange(length)
                batch["segment_ids"][here] = segment
                batch["loss_weights"][row, begin : begin + length - 1] = 1
                begin += length
        return batch

    return make


class ChatEndpoint:
    """An endpoint of `/chat/completions` on this machine, which keeps what it is asked."""

    def __init__(self) -> None:
        self.reply: Callable[[dict, int], tuple[int, dict, bytes] | None] = self.answer
        """Status, headers and body for a request and how often it was made; None: nothing comes."""
        self.requests: list[tuple[str, dict, dict]] = []
        self.busiest = 0
        self.delay = 0.0
        self._busy, self._times = 0, dict[str, int]()
        self._lock, self.ended = threading.Lock(), threading.Event()
        self.url = ""

    def answer(self, body: dict, time: int) -> tuple[int, dict, bytes]:
        """A text that depends on what is asked and on the seed alone."""
        asked = body["messages"][-1]["content"]
        drawn = zlib.crc32(f"{asked} {body.get('seed')}".encode()) % 10
        return self.says(f"{asked} {drawn}")

    @staticmethod
    def says(text: str | None, finish: str = "stop", **message) -> tuple[int, dict, bytes]:
        choice = {"message": {"content": text, **message}, "finish_reason": finish}
        told = {"choices": [choice], "usage": {"completion_tokens": 3}}
        return 200, {}, json.dumps(told).encode()

    @property
    def asked(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for _, _, body in self.requests]

    def take(self, path: str, headers: dict, body: dict) -> tuple[int, dict, bytes] | None:
        with self._lock:
            self.requests.append((path, headers, body))
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
            asked = json.dumps(body)
            self._times[asked] = self._times.get(asked, 0) + 1
            time = self._times[asked]
        self.ended.wait(self.delay)
        try:
            return self.reply(body, time)
        finally:
            with self._lock:
                self._busy -= 1


@pytest.fixture
def chat_endpoint(monkeypatch):
    """An endpoint that answers at once, until a test has it do something else."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    endpoint = ChatEndpoint()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = endpoint.take(self.path, dict(self.headers), body)
            if reply is None:
                endpoint.ended.wait(10)
                return
            status, headers, content = reply
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield endpoint
    endpoint.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()
