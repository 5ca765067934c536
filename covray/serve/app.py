"""``covray serve``: the deployments of Ray Serve, and the command that starts and drains them.

client --HTTP--> Door (reads, limits, counts) --> Replica (batches, generators)
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from covray.config import ServeConfig, load_config
from covray.distributed.metrics import LATENCY, REQUESTS, Recorder
from covray.distributed.session import ray_session
from covray.errors import ConfigError, one_line
from covray.generation.generator import Generator
from covray.generation.models import SharedModels
from covray.generation.resolving import resolve_generator
from covray.progress import stage
from covray.serve.answering import AbandonedError, Query, Waiting, answer_together, group, stream_answer
from covray.serve.connections import proxy_variables
from covray.serve.gallery import read_galleries, with_galleries
from covray.serve.http_api import Event, is_loopback, make_app
from covray.serve.schemas import AdapterInfo, Adapters, AnswerResponse, Refusal, ThoughtResponse
from covray.serve.thinking import ThoughtModels, ThoughtQuery, open_parts
from covray.tasks import TASKS

APPLICATION = "covray"
_ATTEMPTS = 4
"""How often a query is sent: an answer follows from the query alone, so it can be asked of another replica."""
_DRAIN_S = 60.0
_ADAPTERS = 4
"""Adapters beside the first that a replica keeps loaded; the one used longest ago makes room."""
_LEAST_TOKEN = 16
_ABANDONED = Refusal(reason="abandoned", message="nobody waits for the answer any longer")
"""What stands in for an answer that nobody reads."""
TOKEN_VARIABLE = "COVRAY_SERVE_TOKEN"
R = TypeVar("R")


class Replica:
    """Generators of several adapters, and the queries that wait for them.

    All computing is done by one thread, which also loads the models: torch's number of threads, on which the bits
    depend, belongs to a thread.
    """

    def __init__(self, config: ServeConfig):
        """Load the first adapter; others are loaded by their first query."""
        self._configs = config.generators()
        self._thread = ThreadPoolExecutor(1, "covray-generator")
        self._turn = asyncio.Lock()
        self._shared = SharedModels()  # adapters of one backbone: its weights are held once
        first = next(iter(self._configs.values()))
        self._first = self._thread.submit(Generator.load, first, self._shared).result()
        # Ray Serve reads both from the decorators only; the configuration is known later.
        self._answer_batch.set_max_batch_size(config.generator.batch)
        self._answer_batch.set_batch_wait_timeout_s(config.batch_wait_s)

    async def answer(self, query: Query) -> AnswerResponse | Refusal:
        """Return the answer to a query, which may share a batch with others.

        Once a call is cancelled, its query is not computed any further, unless its batch is computed for others.
        """
        with Waiting(query) as client:
            result: AnswerResponse | Refusal = await self._answer_batch(client)
        return result

    @serve.batch
    async def _answer_batch(self, clients: list[Waiting]) -> list[AnswerResponse | Refusal]:
        """Answer queries; those that share everything but the picture in one batch of the decoder."""
        results: list[AnswerResponse | Refusal] = [_ABANDONED] * len(clients)
        for numbers in group([client.query for client in clients]):
            async with self._turn:
                waiting = [number for number in numbers if not clients[number].is_over]
                answers = await self._answers([clients[number] for number in waiting])
            for number, answer in zip(waiting, answers, strict=True):
                results[number] = answer
        return results

    async def _answers(self, clients: list[Waiting]) -> list[AnswerResponse | Refusal]:
        """Return what answers the clients of one batch, while any of them waits."""
        if not clients:
            return []
        generator = await self._generator(clients[0].query.adapter)
        try:
            return await self._compute(functools.partial(answer_together, generator, clients))
        except AbandonedError:
            return [_ABANDONED] * len(clients)

    async def stream(self, query: Query) -> AsyncIterator[Event]:
        """Yield the pictures of one answer; other queries wait, since the decoder has one cache."""
        async with self._turn:
            generator = await self._generator(query.adapter)
            with Waiting(query) as client:  # once it leaves, the pass at work is the last
                events: Iterator[Event] = stream_answer(generator, client)
                try:
                    while (event := await self._compute(functools.partial(next, events, None))) is not None:
                        yield event
                finally:
                    self._thread.submit(events.close)  # type: ignore[attr-defined]

    async def _generator(self, adapter: str) -> Generator:
        """Return the generator of an adapter, loaded if need be."""
        # The first stays loaded; those that Ray Serve multiplexes may be unloaded for others.
        if adapter == next(iter(self._configs)):
            return self._first
        loaded: Generator = await self._load(adapter)
        return loaded

    @serve.multiplexed(max_num_models_per_replica=_ADAPTERS)
    async def _load(self, adapter: str) -> Generator:
        return await self._compute(functools.partial(Generator.load, self._configs[adapter], self._shared))

    async def _compute(self, work: Callable[[], R]) -> R:
        return await asyncio.wrap_future(self._thread.submit(work))


class ReplicaHandle:
    """The replicas as an ``Answerer``: a query whose replica dies is sent to another one."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def answer(self, query: Query) -> AnswerResponse | Refusal:
        """Return the answer, of another replica where one dies."""
        handle = self._handle.options(multiplexed_model_id=query.adapter)
        for _ in range(_ATTEMPTS - 1):
            try:
                result: AnswerResponse | Refusal = await _result_of(handle.answer.remote(query))
                return result
            except RayActorError:
                continue
        last: AnswerResponse | Refusal = await _result_of(handle.answer.remote(query))
        return last

    async def stream(self, query: Query) -> AsyncIterator[Event]:
        """Yield the events; after a replica's death those of another one from where the first ended."""
        handle = self._handle.options(multiplexed_model_id=query.adapter, stream=True)
        sent = 0
        for attempts_left in reversed(range(_ATTEMPTS)):
            number = 0
            events = handle.stream.remote(query)
            try:
                async for event in events:
                    # Events follow from the query: what a replica sent before it died, the next one sends again.
                    number += 1
                    if number > sent:
                        sent = number
                        yield event
                return
            except RayActorError:
                if not attempts_left:
                    raise
            except (asyncio.CancelledError, GeneratorExit):
                events.cancel()
                raise


async def _result_of(response: DeploymentResponse[R]) -> R:
    """Return what a replica answers; where nobody waits for it any longer, the replica is told."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


class ThinkReplica:
    """ThinkDiff's models; all computing is done by one thread, which also loads them, as in ``Replica``."""

    def __init__(self, config: ServeConfig):
        """Load the models."""
        self._thread = ThreadPoolExecutor(1, "covray-thinker")
        self._models = self._thread.submit(self._load, config).result()

    @staticmethod
    def _load(config: ServeConfig) -> ThoughtModels:
        return ThoughtModels(open_parts(config.think, config.generator.engine))

    async def think(self, query: ThoughtQuery) -> ThoughtResponse | Refusal:
        """Return what is thought and drawn. A query that is cancelled before its turn is never begun."""
        return await asyncio.wrap_future(self._thread.submit(self._models.think, query))


class ThinkHandle:
    """The thinking replica as a ``ThoughtAnswerer``: a query whose replica dies is sent to the next one."""

    def __init__(self, handle: DeploymentHandle, variant: str):
        self._handle, self.variant = handle, variant

    async def think(self, query: ThoughtQuery) -> ThoughtResponse | Refusal:
        """Return what is thought and drawn."""
        for _ in range(_ATTEMPTS - 1):
            try:
                result: ThoughtResponse | Refusal = await _result_of(self._handle.think.remote(query))
                return result
            except RayActorError:
                continue
        last: ThoughtResponse | Refusal = await _result_of(self._handle.think.remote(query))
        return last


def build_application(config: ServeConfig, adapters: Adapters, token: str | None, gpus: float) -> serve.Application:
    """Return the deployments, after reading the adapters' galleries.

    Args:
        config: Of the server.
        adapters: What answers.
        token: That requests must bring.
        gpus: Of one replica.
    """
    galleries = read_galleries(config)
    adapters = with_galleries(adapters, galleries)
    replicas = config.replicas
    replica = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=config.limits.queue,
        autoscaling_config={
            "min_replicas": replicas.min, "max_replicas": replicas.max, "target_ongoing_requests": replicas.queries,
        },
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=_DRAIN_S,
    )  # fmt: skip

    variant = None
    deployed = [replica.bind(config)]
    if config.think.folder is not None:
        variant = open_parts(config.think, config.generator.engine).aligner.variant
        thinker = serve.deployment(
            ThinkReplica,
            name="Thinker",
            max_ongoing_requests=config.limits.queue,
            ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": gpus},
            graceful_shutdown_timeout_s=_DRAIN_S,
        )
        deployed.append(thinker.bind(config))

    def build_door() -> Any:
        handle = ReplicaHandle(serve.get_deployment_handle("Replica", app_name=APPLICATION))
        thinker = None
        if variant is not None:
            thinker = ThinkHandle(serve.get_deployment_handle("Thinker", app_name=APPLICATION), variant)
        return make_app(config, adapters, handle, token, record_request, thinker, galleries)

    class Door:
        def __init__(self, *replicas: DeploymentHandle):
            pass  # they are here so that Ray Serve deploys them

    door = serve.deployment(
        # Made in the door's own process: FastAPI's application cannot be pickled.
        serve.ingress(build_door)(Door),
        name="Door",
        # One process counts all requests, and refuses beyond the queue itself, with the reason.
        num_replicas=1,
        max_ongoing_requests=4 * config.limits.queue + 1000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_DRAIN_S,
    )
    return door.bind(*deployed)


def record_request(status: int, seconds: float) -> None:
    """Record a request on the metrics port of this node's Ray."""
    _recorder.add(REQUESTS, 1, status=str(status))
    _recorder.observe(LATENCY, seconds, status=str(status))


_recorder = Recorder()


def application(arguments: dict[str, Any]) -> serve.Application:
    """Return the deployments to Ray Serve, whose own configuration names this function as ``import_path``.

    So a cluster of KubeRay serves without a command (``cluster/kuberay/rayservice.yaml``). Its address is open to
    others, and the token is in COVRAY_SERVE_TOKEN.

    Args:
        arguments: Keys of ``covray serve``'s configuration; host and port are the cluster's.

    Raises:
        CovrayError: A run cannot be used, or there is no token.
    """
    config = load_config(ServeConfig, None, arguments)
    token = os.environ.get(TOKEN_VARIABLE)
    if token is None:
        raise ConfigError(f"{TOKEN_VARIABLE}: is not set; others can reach this cluster, so requests need a token")
    _require_long(token)
    return build_application(config, _adapters(config), token, _gpus(config))


def require_servable(config: ServeConfig, token: str | None) -> Adapters:
    """Return the adapters that ``config`` would serve.

    Raises:
        CovrayError: A run cannot be used, the port is taken, or the address needs a token.
    """
    if token is not None:
        _require_long(token)
    if token is None and not is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host}: others can reach it; set a token in COVRAY_SERVE_TOKEN, or leave --host out"
        )
    adapters = _adapters(config)
    # Opened here only to be checked; replicas open them again.
    if config.think.folder is not None:
        open_parts(config.think, config.generator.engine)
    _require_free(config.host, config.port)
    return adapters


def run(config: ServeConfig, token: str | None, ready: Callable[[str], None]) -> None:
    """Serve until the process is interrupted; then finish the requests at work and end all that was started.

    Args:
        config: Of the server.
        token: That requests must bring; None: none is needed.
        ready: Called with the address once it answers.

    Raises:
        CovrayError: See ``require_servable``; or no replica starts.
    """
    adapters = require_servable(config, token)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with ray_session(proxy_variables(config.limits.upload_s)):
        deployments = build_application(config, adapters, token, _gpus(config))
        try:
            with stage("loading the models"):
                options = HTTPOptions(host=config.host, port=config.port)
                serve.start(proxy_location="HeadOnly", http_options=options, logging_config={"log_level": "ERROR"})
                serve.run(deployments, name=APPLICATION, logging_config={"log_level": "ERROR"})
            host = f"[{config.host}]" if ":" in config.host else config.host
            ready(f"http://{host}:{config.port}")
            # Until a signal.
            threading.Event().wait()
        except (RuntimeError, TimeoutError) as error:
            raise ConfigError(f"no replica started ({one_line(error)}); see --debug for Ray's logs") from error
        finally:
            with stage("finishing the requests at work"):
                serve.delete(APPLICATION)  # the proxy still sends their answers
                serve.shutdown()


def _adapters(config: ServeConfig) -> Adapters:
    """Return what ``config`` would serve, without galleries. Raises CovrayError for a run that cannot be used."""
    infos = []
    for name, generator in config.generators().items():
        resolved = resolve_generator(generator)
        classes = None
        if resolved.classes is not None:
            classes = tuple(map(str, resolved.classes.get("classes", ())))
        info = AdapterInfo(
            name=name, task=resolved.task, pictures=resolved.length, classes=classes, examples=resolved.most_examples
        )
        infos.append(info)
    return Adapters(adapters=tuple(infos), tasks=tuple(TASKS))


def _gpus(config: ServeConfig) -> float:
    """Return the GPUs of a replica."""
    if config.replicas.gpus is not None:
        return config.replicas.gpus
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def _require_long(token: str) -> None:
    if len(token) < _LEAST_TOKEN:
        raise ConfigError(f"--token: is shorter than {_LEAST_TOKEN} characters; make one with openssl rand -hex 32")


def _require_free(host: str, port: int) -> None:
    """Refuse an address on which nobody can listen. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: an address that a server has just left can be taken again.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except UnicodeError as error:  # of a name with an empty part, or too long a one
        raise ConfigError(f"--host {host}: is no name of a host; give an address here") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port}: another program listens there; give another port") from error
        raise ConfigError(f"--host {host}: cannot be listened on ({one_line(error)}); give an address here") from error
