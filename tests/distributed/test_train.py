"""What ``covray train`` refuses before a worker starts, and ``covray train --plan`` with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from covray.config import TrainConfig, load_config
from covray.distributed.lock import FolderLock
from covray.distributed.train import train
from covray.distributed.train_checks import plan_train
from covray.errors import ConfigError, CovrayError, DatasetError, WeightsError
from covray.io import storage
from covray.io.storage import Folder
from covray.models.lvm.adapter import save_adapter
from covray.models.lvm.backbone import backbone_facts, load_backbone
from covray.training.metrics_log import MetricsLog
from tests.support.trainings import STEPS


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every refusal here comes before Ray is started."""

    def started() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("covray.distributed.train.ray_session", started)


def refused(config: TrainConfig, kind: type[CovrayError], message: str) -> None:
    """Assert that the training is refused in one line, and its plan too."""
    for command in (plan_train, train):
        with pytest.raises(kind, match=message) as error:
            command(config)
        assert "\n" not in str(error.value)


def test_what_cannot_be_trained_is_refused_in_one_line(
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    refused(tiny_config(data=str(tmp_path / "absent")), DatasetError, "not a dataset")
    refused(tiny_config(sentences__lengths=[4]), DatasetError, "--length 3,4")
    refused(tiny_config(sentences__pairs=[3]), ConfigError, r"3 pictures x \(3 \+ 1\) chains x 16 tokens = 192")
    refused(tiny_config(sentences__split="test"), DatasetError, "no good pairs in split test")
    refused(tiny_config(sentences__validation_split="test"), DatasetError, "no good pairs in split test")
    refused(tiny_config(sentences__tasks=["depth", "pose"]), DatasetError, "pose has 0 good pairs")
    refused(tiny_config(workers__count=6), ConfigError, "6 workers, but a step of 480 tokens has 5 sentences of 96")
    refused(tiny_config(compute__deepspeed="zero9"), ConfigError, "zero9 is none of")
    refused(tiny_config(backbone__scale="300m"), ConfigError, "scale 300m")
    small = LlamaConfig(
        vocab_size=110, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    small.save_pretrained(tmp_path / "small")
    description = tmp_path / "chains" / "_dataset.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"codes": 64}))
    refused(tiny_config(backbone__path=str(tmp_path / "small")), DatasetError, "64 codes, the backbone knows 10")
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_an_adapter_to_go_on_from_is_checked_before_anything_starts(
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    config = tiny_config()
    facts = backbone_facts(config.backbone)

    def write(folder: str, **changes: Any) -> str:
        lora = config.lora.model_copy(update=changes)
        model = load_backbone(
            facts, config.backbone, lora, dtype=torch.float32, device=torch.device("cpu"), seed=0
        )  # fmt: skip
        save_adapter(model, str(tmp_path / folder), "backbone")
        return str(tmp_path / folder)

    refused(tiny_config(lora__path=str(tmp_path / "absent")), WeightsError, "adapter_config.json or .* is missing")
    other = write("other", rank=8, targets=("q_proj",))
    refused(tiny_config(lora__path=other), ConfigError, "lora.rank was 8, is 4; lora.targets was")
    refused(tiny_config(lora__path=other, lora__rank=8), ConfigError, "lora.targets was")
    same = write("same")
    weights = tmp_path / "same" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("nan")}, weights)
    refused(tiny_config(lora__path=same), WeightsError, "values that are not finite")
    save_file(tensors | {name: tensors[name][:, :3].contiguous()}, weights)
    refused(tiny_config(lora__path=same), WeightsError, "the adapter of this backbone")
    save_file(tensors, weights)
    begun(config)
    refused(tiny_config(lora__path=same), ConfigError, "adapter was None, is '[0-9a-f]{64}'")


def begun(config: TrainConfig, **changes: Any) -> None:
    """A run folder as the driver and the first worker begin it."""
    run = {
        "version": 1,
        "config": config.model_dump(mode="json"),
        "identity": config.identity(),
        "fingerprints": {"backbone": "other", "codebook": "other", "data": "other"},
        "mlflow_run_id": None,
    }
    storage.write_json(f"{config.out}/_run.json", run | changes)
    MetricsLog(config.out, None).close()


def test_a_run_of_another_configuration_is_refused_with_what_differs(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    begun(tiny_config())
    refused(
        tiny_config(lora__rank=8, optimizer__learning_rate=0.5),
        ConfigError,
        "lora.rank was 4, is 8; optimizer.learning_rate was 0.01, is 0.5",
    )
    refused(tiny_config(), ConfigError, "backbone was 'other'")
    # What only orders sums may change, and what is left open agrees with what was resolved.
    refused(
        tiny_config(compute__dtype="auto", compute__deepspeed="auto", workers__count=2), ConfigError, "backbone was"
    )


def test_a_folder_that_holds_something_else_is_refused(
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    refused(tiny_config(), DatasetError, "holds files that covray train did not write")
    for out in (str(tmp_path / "run" / "thesis.txt"), "/proc/run"):
        refused(tiny_config(out=out), ConfigError, "cannot be written")
    remote = tiny_config(tracking__uri=None).model_copy(update={"out": f"file://{tmp_path}/remote"})
    refused(remote, ConfigError, "beside a remote run there can be no mlflow.db")
    for content, message in (
        ("{", "cannot be read"),
        ("{}", "is of version None"),
        ('{"version": 2}', "is of version 2"),
        ('{"version": 1}', "lacks config"),
    ):
        (tmp_path / "run" / "_run.json").write_text(content)
        refused(tiny_config(), ConfigError, f"_run.json: {message}")


def test_a_plan_needs_no_weights_and_leaves_nothing_behind(
    tiny_config: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    assert plan_train(tiny_config()).steps == STEPS
    options = {"backbone__scale": "300m", "backbone__path": "owner/not-downloaded", "backbone__init": "pretrained"}
    planned = plan_train(tiny_config(**options))
    assert planned.parameters > 250e6
    assert not (tmp_path / "run").exists()


def test_a_plan_of_a_begun_run_compares_what_it_can_without_the_weights(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    options = {"backbone__scale": "300m", "backbone__path": "owner/not-downloaded", "backbone__init": "pretrained"}
    config = tiny_config(**options)
    begun(config)
    with pytest.raises(ConfigError, match="begun with another configuration: codebook was 'other', is ") as error:
        plan_train(config)
    assert "backbone was" not in str(error.value)


def test_the_nano_scale_trains_as_its_configuration_file_says() -> None:
    file = Path(__file__).parents[2] / "configs" / "train" / "nano.yaml"
    places = {"data": "chains", "out": "run"}
    expected = load_config(TrainConfig, file, places).optimizer
    assert load_config(TrainConfig, None, places).with_defaults_of_scale().optimizer == expected
    given = load_config(TrainConfig, None, places | {"optimizer.batch_tokens": 512}).with_defaults_of_scale().optimizer
    assert (given.batch_tokens, given.learning_rate) == (512, expected.learning_rate)
    large = load_config(TrainConfig, None, places | {"backbone.scale": "7b"})
    assert large.with_defaults_of_scale() == large


def test_a_run_begun_before_the_scale_had_defaults_continues_with_its_own(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    options = {"data": tiny_config().data, "out": tiny_config().out, "tracking.uri": "none"}
    options |= {"backbone.init": "random", "sentences.lengths": [3]}
    begun(load_config(TrainConfig, None, options))
    # What is refused is the data that the test names: everything else agrees.
    with pytest.raises(ConfigError, match=r"begun with another configuration: (backbone|codebook) was 'other'"):
        plan_train(load_config(TrainConfig, None, options).with_defaults_of_scale())
    other = options | {"optimizer.batch_tokens": 8192}
    with pytest.raises(ConfigError, match=r"optimizer\.batch_tokens was 172032, is 8192"):
        plan_train(load_config(TrainConfig, None, other).with_defaults_of_scale())


def test_a_second_training_in_a_folder_at_work_is_refused(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config()
    with (
        FolderLock(Folder(config.out), "covray train"),
        pytest.raises(DatasetError, match=r"covray train \(process \d+ on .*\) is at work in this folder"),
    ):
        train(config)
