"""Real servers over loopback: ``tenon serve`` on a tiny model folder with the hash executor, which needs no weights."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

PATIENCE_S = 60.0
"""How long a test waits for what must happen: never reached, however busy the machine is."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 256,
    "eos_token_id": 257,
}


def write_model(folder: Path) -> Path:
    """A model folder whose tokens are the 256 bytes and two special tokens; it has no weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": 257}))
    tokenizer_config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@dataclass
class Running:
    """A server process and where it listens."""

    process: subprocess.Popen[str]
    url: str
    model: str

    def post(self, path: str, body: dict[str, Any], **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, json={"model": self.model} | body, timeout=PATIENCE_S, **kwargs)

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", {"prompt": "hello"} | body)
        assert response.status_code == 200, response.text
        result: dict[str, Any] = response.json()
        return result

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(self.url + "/metrics", timeout=PATIENCE_S).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        named = [int(c) for c in children if b"engine_host" in Path(f"/proc/{c}/cmdline").read_bytes()]
        assert len(named) == 1
        return named[0]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def stream(self, path: str = "/v1/completions", **body: Any) -> Stream:
        return Stream(self, path, body)


class Stream:
    """An open streamed answer: ``events`` yields what comes, ``close`` leaves in the middle."""

    def __init__(self, server: Running, path: str, body: dict[str, Any]) -> None:
        self._client = httpx.Client(timeout=PATIENCE_S)
        asked = {} if "messages" in body else {"prompt": "hello"}
        content = {"model": server.model, "stream": True, "ignore_eos": True} | asked | body
        self._response = self._client.send(
            self._client.build_request("POST", server.url + path, json=content), stream=True
        )
        if self._response.status_code != 200:
            said = self._response.read()
            self.close()
            raise AssertionError(f"status {self._response.status_code}: {said!r}")
        self._lines = self._response.iter_lines()

    def events(self) -> Iterator[dict[str, Any] | str]:
        """Decoded events; the string "[DONE]" for the end."""
        for line in self._lines:
            if line.startswith("data: "):
                yield "[DONE]" if line == "data: [DONE]" else json.loads(line[6:])

    def close(self) -> None:
        self._response.close()
        self._client.close()


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


WITH_LIMITS = """
import json, sys
from tenon.cli.serve import Screen
from pathlib import Path
from rich.console import Console
from tenon.engine.config import EngineConfig
from tenon.server.limits import Limits
from tenon.server.run import ServeConfig, serve
given = json.loads(sys.argv[1])
engine = EngineConfig(given["model"], executor="hash")
config = ServeConfig(engine, port=given["port"], served_name="tiny", limits=Limits(**given["limits"]),
    store=Path(given["store"]) if given.get("store") else None)
sys.exit(serve(config, Screen(Console(stderr=True), warn_remote=False)))
"""


def start(
    model: Path, *options: str, wait_ready: bool = True, limits: dict[str, Any] | None = None, store: Path | None = None
) -> Running:
    """``tenon serve`` as a user would start it; with ``limits``, the same server with smaller ones."""
    port = free_port()
    if limits is None:
        command = ["-m", "tenon.cli", "serve", str(model), "--executor", "hash", "--port", str(port)]
        command += ["--served-name", "tiny", *options, *(["--store", str(store)] if store else [])]
    else:
        command = [
            "-c",
            WITH_LIMITS,
            json.dumps({"model": str(model), "port": port, "limits": limits, "store": str(store or "")}),
        ]
    return launch(command, port, "tiny", wait_ready=wait_ready)


def launch(command: list[str], port: int, model: str, *, wait_ready: bool = True) -> Running:
    """Python with these words, which are to serve ``model`` at ``port``."""
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    running = Running(process, f"http://127.0.0.1:{port}", model)
    try:
        if wait_ready:
            wait_for(lambda: _is_ready(running))
    except BaseException:
        running.close()
        raise
    return running


def _is_ready(running: Running) -> bool:
    assert running.process.poll() is None, running.process.stderr.read() if running.process.stderr else ""
    try:
        return httpx.get(running.url + "/readyz", timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False


def wait_for(
    condition: Callable[[], bool], limit_s: float = PATIENCE_S, told: Callable[[], object] | None = None
) -> None:
    """Poll until true; fails the test where it never is, with what ``told`` says then."""

    async def poll() -> None:
        async with asyncio.timeout(limit_s):
            while not condition():
                await asyncio.sleep(0.02)

    try:
        asyncio.run(poll())
    except TimeoutError:
        pytest.fail(f"not within {limit_s:g} s: {told() if told else condition}")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TENON_STATE", str(tmp_path_factory.mktemp("state")))
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        yield


@pytest.fixture(scope="session")
def server(model_folder: Path) -> Iterator[Running]:
    """One server for all tests that leave it as they found it."""
    running = start(model_folder)
    yield running
    assert running.stop() == 0
    running.close()


@pytest.fixture
def own_server(model_folder: Path) -> Iterator[Callable[..., Running]]:
    """Starts servers for one test, which may do with them as it likes."""
    started: list[Running] = []

    def begin(*options: str, **how: Any) -> Running:
        started.append(start(model_folder, *options, **how))
        return started[-1]

    yield begin
    for running in started:
        running.close()


def hash_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """``tenon serve`` with the hash executor, stopped at the end: the body of a fixture."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TENON_STATE", str(tmp_path_factory.mktemp("state")))
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        running = start(write_model(tmp_path_factory.mktemp("tiny")))
    yield running
    assert running.stop() == 0
    running.close()
