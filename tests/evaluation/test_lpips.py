"""LPIPS agrees with torchmetrics', given the same AlexNet, and its weights are found, checked and never downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as reference
from torch import nn

from covray.errors import WeightsError
from covray.evaluation.lpips import ALEXNET, find_alexnet, load_lpips


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """The convolutional part of AlexNet (Krizhevsky 2014) with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


@pytest.fixture
def weights(features: nn.Sequential, tmp_path: Path) -> Path:
    path = tmp_path / "alexnet.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("size", [(64, 64), (100, 37)])
def test_it_is_torchmetrics_lpips(
    features: nn.Sequential, weights: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda net, pretrained: features)
    theirs = reference._LPIPS(pretrained=True, net="alex").eval()
    ours = load_lpips(weights)
    first, second = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    tensors = [torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1 for picture in (first, second)]
    with torch.no_grad():
        assert ours(first, second) == pytest.approx(float(theirs(*tensors)), rel=1e-5)
    assert ours(first, second) == pytest.approx(ours(second, first), rel=1e-5)
    assert ours(first, first) == 0


def test_weights_that_are_something_else_are_refused_in_one_line(tmp_path: Path, weights: Path) -> None:
    for name, data in (("text.pth", b"no weights"), ("empty.pth", b""), (ALEXNET, weights.read_bytes())):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsError, match=name) as caught:
            load_lpips(tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="is not torchvision's AlexNet"):
        load_lpips(tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"absent\.pth: no such file; give alexnet"):
        load_lpips(tmp_path / "absent.pth")
    with pytest.raises(WeightsError, match=r"list\.pth: holds a list, not tensors by name"):
        load_lpips(tmp_path / "list.pth")
    trunk = torch.load(weights)
    halves = {name: tensor.half() for name, tensor in trunk.items()}
    narrow = trunk | {"features.3.weight": trunk["features.3.weight"][:, :60]}
    for name, tensors in (("half.pth", halves), ("narrow.pth", narrow)):
        torch.save(tensors, tmp_path / name)
        with pytest.raises(WeightsError, match=rf"{name}: is not torchvision's AlexNet \("):
            load_lpips(tmp_path / name)
    trunk["features.10.bias"][3] = torch.nan
    torch.save(trunk, tmp_path / "nan.pth")
    with pytest.raises(WeightsError, match=r"nan\.pth: holds values that are not finite"):
        load_lpips(tmp_path / "nan.pth")


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "ran"),)  # type: ignore[return-value]

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError):
        load_lpips(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_it_is_found_where_torch_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_alexnet() is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ALEXNET).touch()
    assert find_alexnet() == tmp_path / "checkpoints" / ALEXNET
