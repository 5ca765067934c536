"""``covray doctor``: what this machine, or the cluster that RAY_ADDRESS names, has and lacks, and what to do about it.

A check never ends the command: a check that fails is a finding. Nothing is downloaded, and no Ray is started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from covray.distributed.session import cluster_address
from covray.doctor import machine, models, ray, storage
from covray.doctor.findings import EXPECTED_ERRORS, Finding, error_finding


def examine(path: str = ".", prior: str = "nano", tokenizer: str = "nano", backbone: str = "nano") -> Iterator[Finding]:
    """Check this machine, and the cluster that RAY_ADDRESS names. Nothing is raised: a check that fails is a finding.

    Args:
        path: Where datasets and runs are to go, on any storage that covray knows. 16 MiB are written there, read and
            deleted.
        prior: ``nano``, a folder, or a hub id.
        tokenizer: As ``prior``.
        backbone: As ``prior``.

    Yields:
        The findings, as they are made.
    """
    address = cluster_address()
    checks: dict[str, Callable[[], Sequence[Finding]]] = {
        "packages": machine.check_packages,
        "processor": machine.check_processor,
        "GPU": machine.check_gpus,
        "compiler": machine.check_compiler,
        "disk": ray.check_disks,
        "storage": lambda: storage.check_storage(path),
        "weights": lambda: models.check_weights(prior, tokenizer, backbone),
        "token": ray.check_token,
    }
    # A cluster has its ports already; a machine without one may become a head.
    if address is not None:
        checks["cluster"] = lambda: ray.check_cluster(address)
    else:
        checks["ports"] = ray.check_ports
    for name, check in checks.items():
        try:
            yield from check()
        except EXPECTED_ERRORS as error:
            yield error_finding(name, error)
