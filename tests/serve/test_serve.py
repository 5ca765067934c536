"""``covray serve``: the bits of ``covray generate``, its refusals before Ray starts, and a server that is ended."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from ray import serve

from covray.config import EngineConfig, GenerateConfig, GeneratorConfig, SamplingConfig, ServeConfig, load_config
from covray.config.serve import ThinkServeConfig
from covray.errors import ConfigError
from covray.generation.files import generate
from covray.generation.generator import Generator
from covray.generation.request import Example
from covray.io.images import decode
from covray.serve.answering import Query, Waiting, answer_together, stream_answer
from covray.serve.app import TOKEN_VARIABLE, application, require_servable
from covray.serve.schemas import AnswerResponse, Frame
from covray.serve.thinking import ThoughtModels, ThoughtQuery, open_parts
from tests.support.commands import COVRAY, environment, error_line, free_port, kill_all, run, wait_for
from tests.support.thinking import write_parts

SETTINGS = ("--set", "generator.engine.device=cpu", "--set", "generator.batch=4")
ENGINE = EngineConfig(device="cpu", batch=4, image_batch=4)
Run = Callable[..., str]
Pictures = Callable[..., list[str]]


def query_of(path: str, sampling: SamplingConfig, examples: tuple[Example, ...] = ()) -> Query:
    return Query("run", decode(Path(path).read_bytes()), examples, None, 21, sampling, 5)


def pixels(encoded: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(encoded))))


@pytest.mark.parametrize(
    "sampling", [SamplingConfig(), SamplingConfig(temperature=1.0), SamplingConfig(temperature=1.0, vote=3)]
)
def test_answers_of_a_batch_and_of_a_stream_are_those_of_generate(
    sampling: SamplingConfig, write_run: Run, pictures: Pictures, tmp_path: Path
) -> None:
    run_folder, paths = write_run(method="none"), pictures(3)
    image, label = pictures(2, prefix="example")
    examples = (Example(Path(image).read_bytes(), Path(label).read_bytes()),)
    generator = Generator.load(GeneratorConfig(adapter=run_folder, engine=ENGINE, batch=4))
    queries = [query_of(path, sampling, examples) for path in paths]
    clients = [Waiting(query) for query in queries]
    together = answer_together(generator, clients)
    for path, client, answer in zip(paths, clients, together, strict=True):
        out = tmp_path / "out" / Path(path).stem
        values: dict[str, Any] = {"queries": (path,), "examples": ((image, label),), "out": str(out), "seed": 5}
        config = GenerateConfig(adapter=run_folder, engine=ENGINE, batch=4, sampling=sampling, **values)
        (record,) = generate(config).answers
        expected = {file: (out / record.folder / file).read_bytes() for file in record.files}
        assert isinstance(answer, AnswerResponse)
        assert base64.b64decode(answer.picture) == expected["answer.png"]
        for name, content in answer.data.items():
            assert base64.b64decode(content) == expected[name]
        assert answer.log_likelihood == (*record.log_likelihood.frames, record.log_likelihood.answer)
        *frames, last = stream_answer(generator, client)
        assert isinstance(last, AnswerResponse)
        assert (last.picture, last.data, last.query) == (answer.picture, answer.data, answer.query)
        pictures_sent = [frame.picture for frame in frames if isinstance(frame, Frame)]
        assert pictures_sent[:-1] == list(answer.frames)


# --- mistakes -------------------------------------------------------------------------------------------------------


def config_of(run_folder: str, *sets: str, **options: Any) -> ServeConfig:
    return load_config(ServeConfig, None, {"adapters": [run_folder]} | options, sets)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["a/run", "b/run"], "two adapters have the name run"),
        (["x=a", "x=b"], "two adapters have the name x"),
        ([], "at least 1 item"),
    ],
)
def test_adapters_have_names_that_differ(adapters: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ServeConfig, None, {"adapters": adapters})


def test_what_a_server_cannot_do_is_refused_before_it_starts(write_run: Run) -> None:
    run_folder = write_run(method="none")
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0: others can reach it"):
        require_servable(config_of(run_folder, host="0.0.0.0"), None)
    with pytest.raises(ConfigError, match="--token: is shorter than 16"):
        require_servable(config_of(run_folder), "secret")
    with pytest.raises(ConfigError, match="--host"):
        require_servable(config_of(run_folder, host="192.0.2.1"), "0123456789abcdef")
    with pytest.raises(ConfigError, match=r"^--host a\.\.b: is no name of a host"):
        require_servable(config_of(run_folder, host="a..b"), "0123456789abcdef")
    with pytest.raises(ConfigError, match="generator"):
        config_of(run_folder, "generator.adapter=other")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: another program listens there"):
            require_servable(config_of(run_folder, port=port), None)
    adapters = require_servable(config_of(f"mine={run_folder}", port=free_port()), None)
    assert [(adapter.name, adapter.pictures) for adapter in adapters.adapters] == [("mine", 2)]


def test_a_cluster_serves_the_adapters_that_have_a_token(write_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"adapters": [f"mine={write_run(method='none')}"], "replicas.gpus": 0.5}
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="COVRAY_SERVE_TOKEN: is not set"):
        application(arguments)
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(ConfigError, match="is shorter than 16"):
        application(arguments)
    monkeypatch.setenv(TOKEN_VARIABLE, "0123456789abcdef")
    assert isinstance(application(arguments), serve.Application)
    with pytest.raises(ConfigError, match="no such key"):
        application(arguments | {"colour": "red"})


def test_a_run_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    message = error_line(run("serve", "--adapter", str(tmp_path / "none"), code=2).stderr)
    assert str(tmp_path / "none") in message


def refuses_strangers(port: int) -> bool:
    """Whether the gRPC server of a deployment refuses a call without Ray's token."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=20)
    return bool(refused.value.code() == grpc.StatusCode.UNAUTHENTICATED)


LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


# --- a server -------------------------------------------------------------------------------------------------------


def answers(address: str, route: str) -> bool:
    try:
        return httpx.get(f"{address}{route}", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.ray
@pytest.mark.end_to_end
def test_a_server_answers_as_generate_does_and_leaves_nothing_behind(
    write_run: Run, pictures: Pictures, think_folders: dict[str, str], tmp_path: Path
) -> None:
    run_folder, paths = write_run(method="linear", lengths=[4]), pictures(4)
    (tmp_path / "parts").mkdir()
    parts = str(write_parts(tmp_path / "parts", think_folders, "clip"))
    thinking = ("--think", parts, "--set", "think.steps=4")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [COVRAY, "serve", "--adapter", run_folder, "--adapter", f"second={run_folder}", "--port", str(port)]
    server = subprocess.Popen([*command, *thinking, *SETTINGS], env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: answers(address, "/healthz"), "it answers", server)
        started = psutil.Process(server.pid).children(recursive=True)
        assert [a["name"] for a in httpx.get(f"{address}/v1/adapters").json()["adapters"]] == ["run", "second"]
        for process in (psutil.Process(server.pid), *started):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in LOOPBACK:
                    # Ray Serve's own, between its deployments: it listens everywhere, and answers to Ray's token only.
                    assert process.name().startswith("ray::Serve"), (process.name(), connection.laddr)
                    assert refuses_strangers(connection.laddr.port), process.name()

        def ask(number: int) -> httpx.Response:
            query = base64.b64encode(Path(paths[number % 4]).read_bytes()).decode()
            body = {"query": query, "seed": 5, "adapter": "second" if number > 3 else None}
            return httpx.post(f"{address}/v1/answers", json=body, timeout=300)

        with ThreadPoolExecutor(8) as clients:
            responses = list(clients.map(ask, range(8)))
        out = str(tmp_path / "out")
        engine = EngineConfig(device="cpu", batch=4, image_batch=4)
        record = generate(
            GenerateConfig(adapter=run_folder, queries=tuple(paths), out=out, engine=engine, batch=4, seed=5)
        )
        for number, response in enumerate(responses):
            assert response.status_code == 200, response.text
            expected = Path(out, record.answers[number % 4].folder, "answer.png").read_bytes()
            assert base64.b64decode(response.json()["picture"]) == expected

        query = base64.b64encode(Path(paths[0]).read_bytes()).decode()
        events = []
        with httpx.stream(
            "POST", f"{address}/v1/answers", json={"query": query}, headers={"accept": "text/event-stream"}, timeout=300
        ) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    events.append(json.loads(line.removeprefix("data: ")))
        assert len(events) == 4
        assert events[-1]["picture"] == responses[0].json()["picture"]
        assert [event["picture"] for event in events[:2]] == responses[0].json()["frames"]
        thought = httpx.post(f"{address}/v1/thoughts", json={"pictures": [query], "prompt": "a box"}, timeout=300)
        models = ThoughtModels(open_parts(ThinkServeConfig(folder=parts, steps=4), EngineConfig(device="cpu")))
        expected_thought = models.think(ThoughtQuery((decode(Path(paths[0]).read_bytes()),), prompt="a box"))
        assert thought.json() == expected_thought.model_dump(mode="json"), thought.text
        server.send_signal(signal.SIGTERM)
        _, shown = server.communicate(timeout=120)
        assert server.returncode == 143, shown
        assert "Traceback" not in shown
        _, alive = psutil.wait_procs(started, 10)
        assert alive == []
    finally:
        kill_all([server])
