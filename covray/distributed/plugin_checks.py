"""Whether the nodes of a cluster have the plug-ins that a command uses, before it starts there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from covray.errors import ConfigError, last_line
from covray.methods import frame_makers
from covray.plugins import missing_packages
from covray.progress import stage
from covray.tasks import REGISTRY
from covray.tasks.metrics import metric_registry


def used_plugins(tasks: Iterable[str], methods: Iterable[str] = (), metrics: Iterable[str] = ()) -> dict[str, str]:
    """Return what a description records of the plug-ins among tasks, methods and metrics; empty where all are covray's.

    Returns:
        Package and version, such as ``my-package 1.0``, by kind and name, such as ``task matting``.
    """
    return REGISTRY.packages(tasks) | frame_makers().packages(methods) | metric_registry().packages(metrics)


def require_on_nodes(used: Mapping[str, str]) -> None:
    """Refuse a cluster of which a node lacks a plug-in, has another version of it, or cannot load it.

    Args:
        used: As ``used_plugins`` returns it. Nodes are asked only where there is any.

    Raises:
        ConfigError: In one line that names the node and the plug-in.
    """
    if not used:
        return
    # A worker unpickles the function by its name where covray is installed, and needs no more than its arguments.
    ask = ray.remote(num_cpus=0, max_retries=1)(problem_here)
    addresses, answers = [], []
    for node in ray.nodes():
        if node["Alive"]:
            # Soft: where a node goes meanwhile, another one answers in its place.
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
            addresses.append(node["NodeManagerAddress"])
            answers.append(ask.options(scheduling_strategy=there).remote(dict(used)))
    with stage("looking for the plug-ins on the nodes"):
        for address, answer in zip(addresses, answers, strict=True):
            try:
                problem = ray.get(answer)
            except ray.exceptions.RayError as error:
                problem = last_line(error)
            if problem:
                raise ConfigError(f"node {address}: {problem}; every node needs the same packages")


def problem_here(used: Mapping[str, str]) -> str:
    """Return why a plug-in of ``used`` cannot be used on this machine; empty where all can."""
    missing = missing_packages(used)
    if missing:
        return missing[0]
    registries = {registry.noun: registry for registry in (REGISTRY, metric_registry(), frame_makers())}
    for use in used:
        noun, _, name = use.partition(" ")
        try:
            registries[noun].find(name)
        except ConfigError as error:
            return str(error)
    return ""
