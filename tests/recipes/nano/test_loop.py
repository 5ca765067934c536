"""The training loop: killed anywhere and started again, it ends where it would have ended."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from covray.errors import ConfigError, CovrayError
from covray.recipes.nano import loop

CPU = torch.device("cpu")
STEPS = 9


class _Killed(Exception):
    pass


def _model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 1))


def _loss(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
    pixels = torch.rand(2, 3, 8, 8, generator=generator)
    return (model(pixels).float() - pixels.flip(1)).square().mean()


def _train(out: Path, loss_of=_loss, seed: int = 0, **options) -> nn.Module:  # type: ignore[no-untyped-def]
    return loop.train(_model(), loss_of, loop.Run("tiny", out, STEPS, seed, CPU, 1e-2), **options)


def _same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("killed_at", [1, 4, STEPS - 1])
def test_killed_and_continued_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    whole = _train(tmp_path / "whole")
    saved_at = killed_at // 2  # what was done after the last save is done again

    def killing(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        if step == killed_at:
            raise _Killed
        monkeypatch.setattr(loop, "SAVE_EVERY_S", -1 if step == saved_at else 1e9)
        return _loss(model, step, generator)

    with pytest.raises(_Killed):
        _train(tmp_path / "killed", killing)
    steps: list[int] = []

    def counting(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        steps.append(step)
        return _loss(model, step, generator)

    assert _same(_train(tmp_path / "killed", counting), whole)
    assert steps == list(range(saved_at + 1, STEPS))


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    whole = _train(tmp_path)

    def never(*_: object) -> Tensor:
        raise AssertionError("a step was taken")

    assert _same(_train(tmp_path, never), whole)


def test_a_kill_during_a_save_leaves_the_save_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _train(tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1)
    save, saves = torch.save, [0]

    def torn(state: object, path: Path) -> None:
        save(state, path)
        saves[0] += 1
        if saves[0] == 4:
            path.write_bytes(path.read_bytes()[:100])
            raise _Killed

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", torn)
        with pytest.raises(_Killed):
            _train(tmp_path / "killed")
    assert _same(_train(tmp_path / "killed"), whole)


def test_a_damaged_state_is_named_and_not_trained_over(tmp_path: Path) -> None:
    _train(tmp_path)
    state = tmp_path / "tiny.state.pt"
    whole = state.read_bytes()
    for damaged in (b"", whole[:100], b"no zip archive"):
        state.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"tiny\.state\.pt: cannot be continued .* or delete the file"):
            _train(tmp_path)
        assert state.read_bytes() == damaged


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1, 2 * STEPS])
def test_a_state_is_not_continued_with_other_steps(tmp_path: Path, steps: int) -> None:
    """The learning rate of its steps came down for another end."""
    _train(tmp_path)
    state = (tmp_path / "tiny.state.pt").read_bytes()
    with pytest.raises(ConfigError, match=f"another number of steps than {steps}"):
        loop.train(_model(), _loss, loop.Run("tiny", tmp_path, steps, 0, CPU, 1e-2))
    assert (tmp_path / "tiny.state.pt").read_bytes() == state


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    _train(tmp_path)
    with pytest.raises(ConfigError, match="cannot be continued"):
        loop.train(nn.Conv2d(3, 3, 1), _loss, loop.Run("tiny", tmp_path, STEPS, 0, CPU, 1e-2))


def _not_a_number(loss: Tensor) -> Tensor:
    return loss * float("nan")


def _steep(loss: Tensor) -> Tensor:
    """The same value with a gradient that is not finite: a square root of zero."""
    return loss + (loss - loss.detach()).sqrt()


@pytest.mark.parametrize("spoil", [_not_a_number, _steep])
def test_what_is_not_finite_ends_the_training_and_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]
) -> None:
    whole = _train(tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1)

    def spoilt(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        loss = _loss(model, step, generator)
        return spoil(loss) if step == 4 else loss

    with pytest.raises(CovrayError, match=r"tiny: step 5: loss .* not finite"):
        _train(tmp_path / "spoilt", spoilt)
    assert _same(_train(tmp_path / "spoilt"), whole)


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    first = _train(tmp_path / "first")
    torch.manual_seed(123)  # the global generator has no say
    assert _same(_train(tmp_path / "second"), first)
    assert not _same(_train(tmp_path / "third", seed=1), first)


def test_the_average_is_returned_and_measured_at_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[nn.Module] = []
    trained: list[nn.Module] = []
    seen: list[Tensor] = []

    def on_step(model: nn.Module, step: int) -> None:
        trained[:] = [model]
        seen.append(model[0].weight.detach().clone())

    average = _train(tmp_path, measure=lambda model: measured.append(model) or "", on_step=on_step)
    weights = [*seen[1:], trained[0][0].weight.detach()]
    expected = weights[0]
    for weight in weights[1:]:
        expected = loop.EMA_DECAY * expected + (1 - loop.EMA_DECAY) * weight
    assert torch.allclose(average[0].weight, expected, atol=1e-6)
    assert measured == [average]
    assert average[0].weight.dtype == torch.float32


def test_it_learns(tmp_path: Path) -> None:
    losses: list[float] = []

    def watching(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        loss = _loss(model, 0, torch.Generator().manual_seed(0))
        losses.append(float(loss.detach()))
        return loss

    loop.train(_model(), watching, loop.Run("tiny", tmp_path, 150, 0, CPU, 1e-2))
    assert losses[-1] < 0.5 * losses[0]


def test_the_schedule_warms_up_and_comes_down_to_a_fiftieth() -> None:
    shares = [loop.schedule(step, 2000) for step in range(2000)]
    assert shares[0] == pytest.approx(1 / 200)
    assert all(late > early for early, late in itertools.pairwise(shares[:190]))
    assert max(shares) == pytest.approx(0.976, abs=0.005)
    assert all(late < early for early, late in itertools.pairwise(shares[200:]))
    assert shares[1000] == pytest.approx(0.51, abs=1e-3)
    assert shares[-1] == pytest.approx(0.02, abs=1e-4)


def test_batches_are_drawn_by_the_generator() -> None:
    pictures = torch.arange(10 * 4 * 4 * 3).remainder(256).to(torch.uint8).reshape(10, 4, 4, 3)
    first, again, other = (loop.draw(pictures, 6, torch.Generator().manual_seed(seed), CPU) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (6, 3, 4, 4)
    known = {tuple(picture.flatten().tolist()) for picture in pictures}
    back = first.permute(0, 2, 3, 1).mul(255).round().to(torch.uint8)
    assert all(tuple(picture.flatten().tolist()) in known for picture in back)


def test_psnr_of_a_known_error() -> None:
    first = torch.full((2, 3, 4, 4), 0.5)
    second = first.clone()
    second[1] += 0.1
    assert loop.psnr(first, second).tolist() == pytest.approx([99, 20], abs=1e-3)
