"""The cluster files are taken by the checks of Ray and of Kubernetes, and keep their promises: pins, token, nodes."""

from __future__ import annotations

import copy
import functools
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import typer
import yaml
from ray.autoscaler._private.autoscaler import StandardAutoscaler
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.utils import parse_quantity
from ray.autoscaler._private.load_metrics import LoadMetrics
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema

from covray.cli.app import app
from covray.cli.cluster import submitted_config
from covray.config import BuildConfig, EvaluateConfig, ServeConfig, SweepConfig, TrainConfig, load_config
from covray.distributed.pool import on
from covray.serve.app import TOKEN_VARIABLE, application
from covray.serve.connections import CALLBACK, proxy_variables
from covray.sweeps.grid import grid_of
from tests.test_docs import keys

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("gpu.yaml", "local.yaml")
PAGE = ROOT / "docs" / "cluster.md"
MODELS = {"build": BuildConfig, "train": TrainConfig, "evaluate": EvaluateConfig, "sweep": SweepConfig}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return content


def workers(config: dict[str, Any]) -> dict[str, Any]:
    """The node types but the head's."""
    return {name: of for name, of in config["available_node_types"].items() if name != config["head_node_type"]}


# --- the launcher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launcher_takes_the_file(name: str) -> None:
    config = prepare_config(read(name))
    validate_config(config)
    commands = [line for key, lines in config.items() if key.endswith("_commands") for line in lines]
    # What a file leaves out comes from Ray's defaults, and those install into another Python, and another Ray.
    installs = [line for line in commands if "pip install" in line]
    assert installs
    assert all(line.startswith("~/covray/bin/pip install ") for line in installs)
    assert not any("://" in line for line in commands)


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_check_refuses_what_it_does_not_know(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(read(name) | {"idle_timeout": 10}))


@pytest.mark.parametrize("name", LAUNCHER)
def test_every_node_wants_the_token_and_none_shows_its_dashboard(name: str) -> None:
    config = read(name)
    heads, others = (
        [line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line] for kind in ("head", "worker")
    )
    assert len(heads) == len(others) == 1
    for line in (*heads, *others):
        before, _, options = line.partition("ray start ")
        assert before.split()[-1] == "RAY_AUTH_MODE=token"
        parsed = start.make_context("ray start", shlex.split(options)).params  # refuses an option that Ray has not
        assert parsed["object_spilling_directory"]
        assert parsed["head"] == (line in heads)
        assert parsed["dashboard_host"] in (None, "127.0.0.1", "localhost")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("export" in line and "RAY_AUTH_MODE=token" in line for line in config["setup_commands"])


def built_from() -> set[str]:
    """Return the files and folders of the repository that the package is built from."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, wheel = about["project"], about["tool"]["hatch"]["build"]["targets"]["wheel"]
    licences = {file for file in project["license-files"] if not file.startswith("covray/")}
    return {"covray", "pyproject.toml", project["readme"]} | licences | set(wheel["force-include"])


def test_what_is_copied_to_the_image_is_the_package_and_no_more() -> None:
    text = (CLUSTER / "kuberay" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY --chown=\S+ (.*) \S+$", text, re.MULTILINE)
    assert set(" ".join(copied).split()) == built_from()


@pytest.mark.parametrize("name", LAUNCHER)
def test_what_is_copied_to_the_nodes_is_the_package_and_no_more(name: str) -> None:
    mounts = {remote: local for remote, local in read(name)["file_mounts"].items() if local != "~/.ray/auth_token"}
    assert set(mounts.values()) == built_from()
    assert all(remote == f"~/project/{local}" and (ROOT / local).exists() for remote, local in mounts.items())


def test_machines_of_ones_own_are_set_up_as_those_of_the_cloud() -> None:
    gpu, local = read("gpu.yaml"), read("local.yaml")
    for key in ("setup_commands", "file_mounts", "rsync_exclude"):
        assert local[key] == gpu[key]
    # Its nodes have no types; so every one of them takes what is bound to one.
    for kind in ("head", "worker"):
        (line,) = (line for line in local[f"{kind}_start_ray_commands"] if "ray start" in line)
        resources = yaml.safe_load(re.search(r"--resources='(.*?)'", line)[1])  # type: ignore[index]
        assert set(resources) == set(workers(gpu))


def test_every_file_pins_the_tested_ray() -> None:
    texts = {path: path.read_text() for path in CLUSTER.rglob("*") if path.is_file()}
    pins = {
        path.name: re.findall(r"ray\[[\w,]+\]==([\w.]+)|rayproject/ray:([\d.]+)-|rayVersion: \"(.*)\"", text)
        for path, text in texts.items()
    }
    pinned = {"gpu.yaml", "local.yaml", "Dockerfile", "raycluster.yaml", "rayjob.yaml", "rayservice.yaml"}
    assert {name for name, found in pins.items() if found} == pinned
    assert {version for found in pins.values() for groups in found for version in groups if version} == {
        ray.__version__
    }


# --- the fake provider -----------------------------------------------------------------------------------------------


def test_the_fake_nodes_are_of_the_cloud_nodes_types() -> None:
    gpu, fake = read("gpu.yaml"), read("fake.yaml")
    for config in (gpu, fake):
        for of in config["available_node_types"].values():
            of["node_config"] = {}
    for key in ("available_node_types", "head_node_type", "max_workers", "upscaling_speed"):
        assert fake[key] == gpu[key]
    assert 0 < fake["idle_timeout_minutes"] < 1


def test_the_autoscaler_takes_the_fake_file_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    validate_config(read("fake.yaml"))
    autoscaler = StandardAutoscaler(str(CLUSTER / "fake.yaml"), LoadMetrics(), None, "test")
    head = autoscaler.config["head_node_type"]
    # Of another name, the head would be taken for a stranger, and another one started.
    assert [autoscaler.provider.node_tags(node)["ray-user-node-type"] for node in autoscaler.provider._nodes] == [head]


# --- which nodes come ------------------------------------------------------------------------------------------------


def nodes_for(config: dict[str, Any], demands: list[dict[str, float]]) -> dict[str, int]:
    """The nodes that Ray's second autoscaler starts for what waits: that of ``ray up``, and of KubeRay."""
    types = AutoscalingConfig(config, skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types.get_node_type_configs(),
        max_num_nodes=types.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(each) for each in demands]),
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def fake_nodes_for(config: dict[str, Any], demands: list[dict[str, float]]) -> dict[str, int]:
    """The same by Ray's first autoscaler, that of ``ray start``."""
    scorer = functools.partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
    types, head = config["available_node_types"], config["head_node_type"]
    found, rest = get_nodes_for(types, {head: 1}, head, config["max_workers"], demands, utilization_scorer=scorer)
    assert not rest
    return dict(found)


@pytest.mark.parametrize("name", ["gpu.yaml", "fake.yaml", "kuberay/raycluster.yaml"])
def test_what_names_a_node_type_brings_nodes_of_that_type(name: str) -> None:
    config = translated(read(name)) if "kuberay" in name else read(name)
    scheduled = fake_nodes_for if name == "fake.yaml" else nodes_for
    spot, on_demand = workers(config)
    assert (spot, on_demand.replace("-", "_")) == ("spot", "on_demand")
    one = {"CPU": 1.0, "GPU": 1.0}
    assert scheduled(config, [one | on("spot")] * 3) == {spot: 3}
    assert scheduled(config, [one | on("on_demand")] * 2) == {on_demand: 2}
    # Ray Data asks for GPUs without a type: while there are spot machines, none of the dearer ones comes.
    assert scheduled(config, [one] * 8) == {spot: 8}
    assert scheduled(config, [one] * 9) == {spot: 8, on_demand: 1}
    assert scheduled(config, []) == {}


# --- KubeRay ---------------------------------------------------------------------------------------------------------

STRING, COUNT, SWITCH, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {}
STRINGS = {"type": "object", "additionalProperties": STRING}


def exactly(required: str, **properties: Any) -> dict[str, Any]:
    """Schema of an object with these fields and no other."""
    return {
        "type": "object", "additionalProperties": False, "required": required.split(), "properties": properties,
    }  # fmt: skip


def fields(kind: dict[str, Any], names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


GROUP = {"template": ANY, "rayStartParams": STRINGS, "resources": STRINGS, "labels": STRINGS}
CLUSTER_SPEC = exactly(
    "headGroupSpec",
    rayVersion=STRING,
    authOptions=exactly("", mode={"enum": ["disabled", "token"]}, secretName=STRING, enableK8sTokenAuth=SWITCH),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=exactly(
        "",
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
        imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
        **fields(ANY, "resources image securityContext env envFrom volumeMounts command args"),
    ),
    headGroupSpec=exactly(
        "template rayStartParams",
        **GROUP,
        **fields(ANY, "headService ingressOptions serviceType"),
        enableIngress=SWITCH,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": exactly(
            "groupName minReplicas maxReplicas template rayStartParams",
            **GROUP,
            groupName={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},  # part of the pods' names
            **fields(COUNT, "replicas minReplicas maxReplicas idleTimeoutSeconds priority numOfHosts"),
            suspend=SWITCH,
            scaleStrategy=ANY,
        ),
    },
    suspend=SWITCH,
    managedBy=STRING,
    **fields(ANY, "upgradeStrategy headServiceAnnotations gcsFaultToleranceOptions historyServerOptions"),
    **fields(ANY, "networkPolicy tlsOptions"),
)
JOB_SPEC = exactly(
    "entrypoint rayClusterSpec",
    rayClusterSpec=CLUSTER_SPEC,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    **fields(STRING, "entrypoint runtimeEnvYAML jobId entrypointResources managedBy"),
    **fields(COUNT, "backoffLimit activeDeadlineSeconds preRunningDeadlineSeconds ttlSecondsAfterFinished"),
    **fields(SWITCH, "shutdownAfterJobFinishes suspend"),
    **fields(ANY, "submitterPodTemplate submitterConfig metadata clusterSelector deletionStrategy"),
    **fields(ANY, "entrypointNumCpus entrypointNumGpus"),
)
SERVICE_SPEC = exactly(
    "serveConfigV2 rayClusterConfig",
    serveConfigV2=STRING,
    rayClusterConfig=CLUSTER_SPEC,
    **fields(
        COUNT, "serviceUnhealthySecondThreshold deploymentUnhealthySecondThreshold rayClusterDeletionDelaySeconds"
    ),
    **fields(ANY, "serveService upgradeStrategy"),
    **fields(SWITCH, "excludeHeadPodFromServeSvc suspend"),
    managedBy=STRING,
)
SPECS = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC, "RayService": SERVICE_SPEC}
"""Fields of KubeRay's ray.io/v1, as the API reference of 1.7 lists them; pods are Kubernetes' own."""
MANIFESTS = ("kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kuberay/rayservice.yaml")


def check_ray_part(manifest: dict[str, Any]) -> None:
    spec = SPECS[manifest["kind"]]
    jsonschema.validate(
        manifest, exactly("apiVersion kind metadata spec", apiVersion={"const": "ray.io/v1"}, kind=STRING,
                          metadata=exactly("name", name=STRING, namespace=STRING, labels=STRINGS), spec=spec)
    )  # fmt: skip


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec.get("rayClusterSpec", spec.get("rayClusterConfig", spec))


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def translated(manifest: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler reads in it; the namespace is what ``kubectl`` adds."""
    metadata = manifest["metadata"] | {"namespace": "default"}
    resource = {"metadata": metadata, "spec": cluster_of(manifest)}
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)
    return config


def check_pod(template: dict[str, Any], version: str) -> None:
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
    kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", MANIFESTS)
def test_the_pods_are_kubernetes_pods(name: str, version: str) -> None:
    for group in groups(read(name)):
        check_pod(group["template"], version)


@pytest.mark.parametrize(
    ("path", "right", "wrong"),
    [
        ((), "tolerations", "toleration"),
        (("containers", 0), "envFrom", "envfrom"),
        (("containers", 0, "resources"), "limits", "limit"),
        (("containers", 0, "volumeMounts", 0), "mountPath", "mountpath"),
        (("volumes", 0, "emptyDir"), "sizeLimit", "sizelimit"),
    ],
)
def test_a_misspelt_field_of_a_pod_is_refused(path: tuple[str | int, ...], right: str, wrong: str) -> None:
    template = copy.deepcopy(groups(read("kuberay/raycluster.yaml"))[1]["template"])
    part = functools.reduce(lambda value, key: value[key], path, template["spec"])
    part[wrong] = part.pop(right)
    with pytest.raises(kubernetes_validate.ValidationError, match=wrong):
        check_pod(template, "1.30")


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_ray_part_has_fields_that_kuberay_knows(name: str) -> None:
    manifest = read(name)
    check_ray_part(manifest)
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "covray-token"}
    assert cluster["enableInTreeAutoscaling"]
    options = {option for parameter in start.params for option in parameter.opts}
    for group in groups(manifest):
        assert {f"--{name}" for name in group["rayStartParams"]} <= options


@pytest.mark.parametrize(
    ("path", "right", "wrong"),
    [
        ((), "authOptions", "authOption"),
        (("authOptions",), "secretName", "secret"),
        (("autoscalerOptions",), "idleTimeoutSeconds", "idleTimeoutMinutes"),
        (("workerGroupSpecs", 0), "maxReplicas", "maxReplica"),
        (("headGroupSpec",), "rayStartParams", "rayStartParam"),
    ],
)
def test_a_misspelt_field_of_the_ray_part_is_refused(path: tuple[str | int, ...], right: str, wrong: str) -> None:
    manifest = read("kuberay/rayjob.yaml")
    part = functools.reduce(lambda value, key: value[key], path, cluster_of(manifest))
    part[wrong] = part.pop(right)
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        check_ray_part(manifest)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_gets_what_it_asks_for_and_its_object_store_fits(name: str) -> None:
    for group in groups(read(name)):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        asked = container["resources"]
        assert asked["requests"] == asked["limits"]
        memory, disk = (parse_quantity(asked["limits"][each]) for each in ("memory", "ephemeral-storage"))
        sizes = {volume["name"]: parse_quantity(volume["emptyDir"]["sizeLimit"]) for volume in spec["volumes"]}
        places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        parameters = group["rayStartParams"]
        assert int(parameters["object-store-memory"]) < sizes[places["/dev/shm"]] < memory / 2
        assert sizes[places[parameters["object-spilling-directory"]]] < disk
        shared = [volume["emptyDir"].get("medium") for volume in spec["volumes"]]
        assert shared.count("Memory") == 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberays_groups_are_the_launchers_node_types(name: str) -> None:
    config, gpu = translated(read(name)), read("gpu.yaml")
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]
    assert config["idle_timeout_minutes"] == gpu["idle_timeout_minutes"]
    assert config["max_workers"] == gpu["max_workers"]
    for (name, mine), (other, theirs) in zip(workers(config).items(), workers(gpu).items(), strict=True):
        assert name.replace("-", "_") == other
        mine["resources"].pop("memory")
        for key in ("resources", "min_workers", "max_workers"):
            assert mine[key] == theirs[key]
        assert mine.get("priority") == theirs.get("priority")


def test_a_job_runs_on_the_cluster_of_the_other_file() -> None:
    cluster, job = read("kuberay/raycluster.yaml"), read("kuberay/rayjob.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in (*groups(cluster), *groups(job))}
    assert len(images) == 1


def test_a_service_serves_on_the_cluster_of_the_other_file_and_wants_its_token() -> None:
    cluster, service = read("kuberay/raycluster.yaml"), read("kuberay/rayservice.yaml")
    for pair in zip(groups(service), groups(cluster), strict=True):
        mine, theirs = copy.deepcopy(pair)  # groups share what an anchor names
        (container,) = mine["template"]["spec"]["containers"]
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert values == {TOKEN_VARIABLE: None, CALLBACK: proxy_variables(30.0)[CALLBACK]}
        for group in (mine, theirs):
            for key in ("env", "ports"):
                group["template"]["spec"]["containers"][0].pop(key, None)
        assert mine == theirs
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (one,) = deployed.applications
    module, _, name = one.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is application
    assert load_config(ServeConfig, None, one.args).replicas.gpus == 0.5
    assert deployed.http_options.port == 8000


# --- the commands that are shown -------------------------------------------------------------------------------------


def shown(text: str) -> Iterator[list[str]]:
    """Every covray command of a page or of a file's comments, in words."""
    lines = "\n".join(line.strip().removeprefix("#").strip() for line in text.splitlines())
    for line in lines.replace("\\\n", " ").splitlines():
        if line.startswith("covray "):
            yield shlex.split(line, comments=True)


SHOWN = [
    pytest.param(words, id=f"{path.name}-{number}")
    for path in (PAGE, *sorted((ROOT / "docs" / "tutorials").glob("*.md")), *sorted(CLUSTER.rglob("*.yaml")))
    for number, words in enumerate(shown(path.read_text()))
]


@pytest.mark.parametrize("words", SHOWN)
def test_a_command_that_is_shown_is_taken(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    root = typer.main.get_command(app).make_context("covray", ["doctor"])
    arguments = words[words.index("covray") + 1 :]
    if arguments[0] == "submit":
        context = root.command.commands["submit"].make_context("submit", arguments[1:])  # type: ignore[attr-defined]
        arguments = [context.params["step"], *context.args]
    if arguments[0] not in MODELS or "--resume" in arguments:
        root.command.commands[arguments[0]].make_context(arguments[0], arguments[1:])  # type: ignore[attr-defined]
        return
    config = submitted_config(root, arguments[0], arguments[1:])
    assert isinstance(config, MODELS[arguments[0]])
    if isinstance(config, SweepConfig):  # what it passes on is checked where the job runs
        # The buckets shown are nobody's: nothing has begun there, and their pairs cannot be counted.
        monkeypatch.setattr("covray.io.storage.exists", lambda path: False)
        monkeypatch.setattr("covray.sweeps.grid.require_pairs", lambda *pairs: None)
        assert grid_of(config).trials


def test_the_entrypoint_of_a_job_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(read("kuberay/rayjob.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "covray"]
    test_a_command_that_is_shown_is_taken(words, monkeypatch)


def test_the_page_names_keys_that_there_are() -> None:
    known = {key for model in MODELS.values() for key in keys(model)}
    known |= {f"{step}.{key}" for step, model in MODELS.items() for key in keys(model)}  # as a sweep names them
    sections = {key.partition(".")[0] for key in known if "." in key}
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", PAGE.read_text())
    named = [key for key in named if key.partition(".")[0] in sections]
    assert named
    assert set(named) <= known
