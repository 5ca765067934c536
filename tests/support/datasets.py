"""A tiny tokenizer, and datasets of chains written without a diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covray.chains.shard_rows import frame_order, shard_schema, union_alphas
from covray.io import storage

CODES = 64
TOKENS = 16


@pytest.fixture(scope="session")
def vqgan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQModel folder with random weights: pictures of 16 px, 4x4 = 16 tokens, 64 codes that lie where latents do."""
    import torch
    from diffusers import VQModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VQModel(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            vq_embed_dim=4,
            num_vq_embeddings=CODES,
            norm_num_groups=4,
            sample_size=16,
            lookup_from_codebook=True,
        )
        with torch.no_grad():
            latents = model.encode(torch.rand(CODES, 3, 16, 16)).latents
            model.quantize.embedding.weight.copy_(latents[:, :, 1, 2])
    folder = tmp_path_factory.mktemp("vqgan")
    model.save_pretrained(folder)
    return folder


def chain_rows(
    per_task: Mapping[str, int], methods: tuple[str, ...], alphas: tuple[float, ...], rejects: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Rows of the shard schema with random tokens; ``rejects`` gives the error of the row of that number."""
    generator = np.random.default_rng(0)

    def tokens() -> list[int]:
        return [int(code) for code in generator.integers(0, CODES, TOKENS)]

    rows = []
    for task, count in per_task.items():
        for _ in range(count):
            number = len(rows)
            pair_id = int(generator.integers(-(2**62), 2**62))
            row: dict[str, Any] = {"pair_id": pair_id, "task": task, "split": "val" if number % 4 == 3 else "train"}
            if number in rejects:
                row["error"] = rejects[number]
            else:
                row["source"], row["label"] = tokens(), tokens()
                row["frames"] = [
                    {"method": method, "alpha": alpha, "tokens": tokens()}
                    for method, alpha in frame_order(methods, alphas)
                ]
                row["quality"] = {
                    "source_noise_rms": 1.0,
                    "label_noise_rms": 0.5 + number / 10,
                    "source_psnr": 25.0 if number % 2 else None,
                    "label_psnr": None,
                    "diffusion_path": 1.5,
                    "linear_path": 1.0,
                }
            rows.append(row)
    return rows


@pytest.fixture
def write_dataset(tmp_path: Path, vqgan_folder: Path) -> Callable[..., tuple[str, list[dict[str, Any]]]]:
    """Writes a dataset folder as a build does, and gives its path and its rows."""

    def write(
        per_task: Mapping[str, int],
        *,
        lengths: tuple[int, ...] = (4,),
        methods: tuple[str, ...] = ("diffusion", "linear"),
        rejects: Mapping[int, str] | None = None,
        finished: bool = True,
        task_in_files: bool = True,
    ) -> tuple[str, list[dict[str, Any]]]:
        from covray.config import TokenizerConfig
        from covray.models.tokenizer.vqgan import EngineConfig, load_tokenizer

        tokenizer = load_tokenizer(TokenizerConfig(path=str(vqgan_folder)), EngineConfig())
        out = str(tmp_path / "chains")
        rows = chain_rows(per_task, methods, union_alphas(lengths), rejects or {})
        config = {
            "pairs": "pairs.parquet",
            "out": out,
            "lengths": list(lengths),
            "alphas": [],
            "methods": list(methods),
            "prior": {"path": "nano", "revision": None, "size_px": None, "steps": 50},
            "tokenizer": {"path": str(vqgan_folder), "revision": None, "size_px": None},
            "keep_noise": False,
        }
        fingerprints = {
            "prior": "0123456789abcdef" * 4,
            "tokenizer": tokenizer.fingerprint,
            "codebook": tokenizer.codebook_fingerprint,
        }
        storage.write_json(
            f"{out}/_dataset.json",
            {
                "version": 1,
                "config": config,
                "identity": {key: config[key] for key in ("lengths", "methods", "prior", "tokenizer")},
                "fingerprints": fingerprints,
                "latent_shape": [4, 2, 2],
                "tokenizer_size_px": 16,
                "tokens_per_image": TOKENS,
            },
        )
        schema = shard_schema(keep_noise=False)
        for task in per_task:
            of_task = [row for row in rows if row["task"] == task]
            folder = Path(out, "shards", f"task={task}")
            folder.mkdir(parents=True)
            for part, half in enumerate((of_task[: len(of_task) // 2], of_task[len(of_task) // 2 :])):
                table = pa.Table.from_pylist(half, schema)
                pq.write_table(table if task_in_files else table.drop_columns("task"), folder / f"part-{part}.parquet")
        if finished:
            from covray.chains.audit import audit_dataset

            asked = np.array([row["pair_id"] for row in rows])
            usage = {"seconds": 4.0, "chains_per_s": 2.5, "busy_share": 0.9}
            audit_dataset(out, asked).model_copy(update=usage).write(out)
        return out, rows

    return write


def append_pairs(out: str, per_task: Mapping[str, int], methods: tuple[str, ...], lengths: tuple[int, ...]) -> None:
    """Make a dataset of ``write_dataset`` a version larger, as ``covray build --append`` does."""
    from covray.chains.audit import audit_dataset
    from covray.chains.dataset import ChainDataset, shard_folder
    from covray.chains.records import AppendedPairs, DatasetRecord, PairSet
    from covray.distributed.versions import earlier_counts

    before, record = ChainDataset(out), DatasetRecord.read(out)
    version = before.version + 1
    rows = chain_rows(per_task, methods, union_alphas(lengths), {})
    ids = [row["pair_id"] for row in before.rows(["pair_id"], errors=True)]
    for row in rows:
        row["pair_id"] += version  # other pairs than those of the first version
        ids.append(row["pair_id"])
        folder = Path(out, shard_folder(version), f"task={row['task']}")
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist([row], shard_schema(keep_noise=False)).drop_columns("task")
        pq.write_table(table, folder / f"{row['pair_id']}.parquet")
    pairs = PairSet(rows=len(ids), sha256=f"{version:064}")
    appended = [*(record.appended or ()), AppendedPairs(manifest="more.parquet", pairs=pairs)]
    record.model_copy(update={"appended": appended}).write(out)
    audit = audit_dataset(out, np.array(ids), None, version)
    counts = [*earlier_counts(storage.Folder(out), version), audit.counts()]
    audit.model_copy(update={"versions": counts}).write(out)
