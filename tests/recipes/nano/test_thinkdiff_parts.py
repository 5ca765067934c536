"""The nano parts of ThinkDiff: killed is not killed, what they learn from, and that the parts load and fit together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel

from covray.config import EngineConfig
from covray.config.think import LanguageModelConfig, PainterConfig
from covray.errors import ConfigError
from covray.io.model_folders import NANO_FOLDER
from covray.models.aligner.language import load_language_model
from covray.pairs.scenes.portrait_values import OBJECTS
from covray.pairs.scenes.portrait_values import held_out as held_out_cell
from covray.pairs.scenes.portraits import HELD_OUT_SPLIT, sample_portrait
from covray.recipes.nano import clip, judge, loop, painter, portrait_data, recipe, text, vlm
from covray.thinking.episodes import PORTRAITS
from covray.thinking.judge import WEIGHTS, load_judge
from covray.thinking.unet_painter import load_unet_painter
from tests.support.nano import make_small

CPU = torch.device("cpu")
COUNT = 60
STEPS = 3


class _Killed(Exception):
    pass


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the portraits and a text model of a few steps."""
    out = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patched:
        make_small(patched)
        recipe.train_model("text", out, STEPS, COUNT, 1, "cpu", 0)
        portrait_data.portrait_manifest(out, COUNT, 0)
    return out


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[f"{file.relative_to(folder)} {name}"] = tensor
    return tensors


@pytest.mark.parametrize("name", ["text", "painter", "clip", "judge"])
def test_killed_and_continued_gives_the_same_weights(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_small(monkeypatch)
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
        for shared in ("data", "text"):
            if shared != name:
                (tmp_path / folder / shared).symlink_to(family / shared)
    recipe.train_model(name, tmp_path / "whole", STEPS, COUNT, 1, "cpu", 0)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1.0)
    step = loop._Progress.step

    def killing(progress: loop._Progress, done: int, loss: float) -> None:
        if done == 2:
            raise _Killed
        step(progress, done, loss)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Progress, "step", killing)
        with pytest.raises(_Killed):
            recipe.train_model(name, tmp_path / "killed", STEPS, COUNT, 1, "cpu", 0)
    assert not (tmp_path / "killed" / name).exists()
    for count, seed in ((COUNT + 1, 0), (COUNT, 1)):
        with pytest.raises(ConfigError, match=f"was begun with --scenes {COUNT} --seed 0"):
            recipe.train_model(name, tmp_path / "killed", STEPS, count, 1, "cpu", seed)
    recipe.train_model(name, tmp_path / "killed", STEPS, COUNT, 1, "cpu", 0)
    whole, killed = _weights(tmp_path / "whole" / name), _weights(tmp_path / "killed" / name)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    with pytest.raises(ConfigError, match="already exists"):
        recipe.train_model(name, tmp_path / "killed", STEPS, COUNT, 1, "cpu", 0)
    _CHECKS[name](tmp_path / "killed" / name, family)


def _check_text(folder: Path, _: Path) -> None:
    loaded = load_language_model(LanguageModelConfig(path=str(folder)), torch.float32, CPU)
    ids = loaded.tokenizer("a red ball")["input_ids"]
    assert ids[-1] == loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.pad_token_id not in ids
    assert loaded.model.config.decoder_start_token_id == loaded.tokenizer.pad_token_id


def _check_painter(folder: Path, family: Path) -> None:
    config = PainterConfig(kind="unet", path=str(folder), steps=2, guidance=3.0)
    drawing = load_unet_painter(config, EngineConfig(threads=1), verify=False)
    states, mask = painter.CaptionEncoder(family / "text", CPU).encode(["A red ball.", ""])
    assert drawing.width == states.shape[-1]
    pictures = drawing.paint([states[0, mask[0]], states[1, mask[1]]])
    assert [picture.shape for picture in pictures] == [(1, 64, 64, 3)] * 2


def _check_clip(folder: Path, _: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = tokenizer(["A red ball.", "A cone."], padding=True, return_tensors="pt")
    pixels = clip.normed(np.zeros((3, 64, 64, 3), np.uint8))
    processed = clip.new_image_processor()([np.zeros((64, 64, 3), np.uint8)], return_tensors="pt")["pixel_values"]
    assert torch.equal(processed[0], pixels[0])
    answer = model(pixel_values=pixels, input_ids=texts["input_ids"], attention_mask=texts["attention_mask"])
    assert answer.logits_per_image.shape == (3, 2)


def _check_judge(folder: Path, _: Path) -> None:
    loaded = load_judge(folder, CPU)
    for theme in PORTRAITS:
        (cell,) = loaded.choose(theme, [np.zeros((64, 64, 3), np.uint8)])
        assert cell.detail in theme.details
        assert cell.object in theme.objects
    assert (folder / WEIGHTS).is_file()
    assert (folder / judge.ACCURACIES).is_file()


_CHECKS: dict[str, Callable[[Path, Path], None]] = {
    "text": _check_text, "painter": _check_painter, "clip": _check_clip, "judge": _check_judge,
}  # fmt: skip


def test_a_saved_language_model_computes_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    from transformers import T5ForConditionalGeneration

    tokenizer = text.text_tokenizer(0)
    model = T5ForConditionalGeneration(text.new_config(tokenizer)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_language_model(LanguageModelConfig(path=str(tmp_path)), torch.float32, CPU)
    losses = []
    for own, known in ((model, tokenizer), (again.model, again.tokenizer)):
        with torch.no_grad():  # with gradients other kernels round otherwise
            losses.append(text.text_loss(own, known, ["a red"], ["ball stands on the ground"]))
    assert torch.equal(*losses)


def test_no_recipe_learns_from_a_held_out_cell(family: Path) -> None:
    parts = portrait_data.read_portraits(family / "data" / f"portraits-{COUNT}-0.parquet")
    for split, own in parts.items():
        held_out = [bool(portrait.held_out_themes()) for portrait in own.contents]
        assert not any(held_out) or split == HELD_OUT_SPLIT, split
        assert all(held_out) or split != HELD_OUT_SPLIT, split
    numbers = np.random.default_rng(0)
    sampled = [sample_portrait(numbers) for _ in range(200)]
    assert not any(portrait.held_out_themes() for portrait in sampled), "what the language model learns from"


def test_a_portrait_is_known_again_from_its_attributes_and_reworded(family: Path) -> None:
    (own, *_) = portrait_data.read_portraits(family / "data" / f"portraits-{COUNT}-0.parquet").values()
    wordings = {portrait_data.describe(own.contents[:1], np.random.default_rng(number))[0] for number in range(9)}
    assert len(wordings) > 1
    assert all(own.contents[0].solids[0].thing in wording for wording in wordings)


def test_vlm_and_language_model_have_one_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm, "TOKENIZED_PORTRAITS", 50)
    of_vlm, of_text = vlm.new_tokenizer(0).get_vocab(), text.text_tokenizer(0).get_vocab()
    assert of_vlm.items() <= of_text.items()
    assert len(of_text) == len(of_vlm) + 1 + text.GAPS


def test_a_painter_begins_with_all_of_the_prior_that_fits() -> None:
    shipped = load_file(NANO_FOLDER / "prior" / "unet" / "diffusion_pytorch_model.safetensors")
    own = painter.new_painter(256).state_dict()
    fresh = [name for name in own if not torch.equal(own[name], shipped[name].float())]
    assert fresh, "keys and values of another context"
    assert all(".attn2.to_" in name for name in fresh)


def test_gaps_lose_no_word() -> None:
    words = [f"w{number}" for number in range(31)]
    for seed in range(20):
        read, written = text.with_gaps(words, np.random.default_rng(seed))
        cut: dict[str, list[str]] = {}
        for token in written.split():
            if token.startswith("<gap_"):
                cut[token] = gap = []
            else:
                gap.append(token)
        whole: list[str] = []
        for token in read.split():
            whole += cut.get(token, [token])
        assert whole == words


def test_a_hidden_detail_is_no_lesson() -> None:
    numbers = np.random.default_rng(0)
    while True:
        portrait = sample_portrait(numbers)
        if portrait.style == "depth" and len(portrait.solids) == 1:
            break
    labels = dict(zip([theme.name for theme in PORTRAITS], judge.labels_of(portrait), strict=True))
    for theme in ("colour", "texture", "background"):
        assert labels[theme][0] == judge.UNKNOWN
    assert labels["style"][0] == PORTRAITS[3].details.index("depth")
    assert len({label[1] for label in labels.values()}) == 1, "the object is the same in all themes"
    unseen = judge.labels_of(portrait, only_held_out=True)
    assert all(detail == judge.UNKNOWN for detail, _ in unseen)


def test_only_the_judge_learns_held_out_cells_and_from_other_pictures_than_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    manifest = portrait_data.portrait_manifest(tmp_path, COUNT, 0)
    learned_by_others = portrait_data.read_portraits(manifest)["train"]
    assert (judge.labelled(learned_by_others, only_held_out=True)[1][..., 0] == judge.UNKNOWN).all()

    lessons = judge.lessons_of(portrait_data.PortraitVae(tmp_path, CPU), tmp_path, COUNT, 0)
    manifest = portrait_data.portrait_manifest(tmp_path, COUNT, 1, only_held_out=True)
    second = portrait_data.read_portraits(manifest)[HELD_OUT_SPLIT]
    assert len(second.contents) == COUNT
    held_out = judge.labelled(second, only_held_out=True)[1][..., 0] != judge.UNKNOWN
    assert held_out.any()
    count = len(held_out)
    assert (lessons["train"].labels[-count:, :, 0][held_out] != judge.UNKNOWN).all()

    # A held-out cell is met about as often as another.
    labels = lessons["train"].labels[:, 0]
    held, others = 0, 0
    for detail, thing in labels[labels[:, 0] != judge.UNKNOWN].tolist():
        if held_out_cell(PORTRAITS[0].name, PORTRAITS[0].details[detail], list(OBJECTS)[thing]):
            held += 1
        else:
            others += 1
    assert 0.5 < (held / 15) / (others / 85) < 2

    learned = {picture.numpy().tobytes() for picture in lessons["train"].pictures}
    for split in ("val", HELD_OUT_SPLIT):
        assert learned.isdisjoint(picture.numpy().tobytes() for picture in lessons[split].pictures)
