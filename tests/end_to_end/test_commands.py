"""The commands as a user runs them: from files to a page, and every mistake in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from covray.chains.dataset import ChainDataset
from covray.pairs.manifest import ManifestWriter, Pair, Picture
from covray.recipes.nano.recipe import WEIGHTS
from tests.support.commands import FAST, compute, environment, error_line, run_together, tokens_of

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
Run = Callable[..., subprocess.CompletedProcess[str]]


def hostile_files(folder: Path) -> dict[str, str]:
    """Files that are not what they seem, and the reason each must be rejected with (empty: it is fine)."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8))
    picture.save(folder / "good.png")
    picture.save(folder / "good.jpg", quality=90)
    (folder / "truncated.jpg").write_bytes((folder / "good.jpg").read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("L").convert("I;16").save(folder / "sixteen.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(90)])
    Image.new("1", (12000, 12000)).save(folder / "bomb.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.resize((100, 50)).save(folder / "turned.jpg", exif=turned)
    return {
        "good.png": "", "truncated.jpg": "truncated", "empty.png": "empty", "text.png": "not_an_image",
        "palette.png": "", "cmyk.jpg": "", "sixteen.png": "", "alpha.png": "", "animated.gif": "animated",
        "bomb.png": "too_large", "turned.jpg": "label_shape", "absent.png": "missing",
        "../outside.png": "outside_root", "/etc/hostname": "outside_root",
    }  # fmt: skip


def test_bad_pairs_are_rows_with_their_reason(tmp_path: Path, run_on_ray: Run, run_here: Run) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside.png").write_bytes(b"secret")
    expected = hostile_files(root)
    lines = ["image,label,task"] + [f"{name},good.png,pose" for name in expected]
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    pairs, out = tmp_path / "pairs.parquet", tmp_path / "chains"
    run_here("pairs", "manifest", str(root / "list.csv"), "--out", str(pairs))
    done = run_on_ray("build", "--pairs", str(pairs), "--out", str(out), "--actors", "1", *FAST)
    assert "Traceback" not in done.stderr
    rows = list(ChainDataset(str(out)).rows(errors=True))
    assert len(rows) == len(expected)
    reasons = sorted("" if row["error"] is None else row["error"].split(":")[0] for row in rows)
    assert reasons == sorted(expected.values())
    audit = json.loads((out / "_audit.json").read_text())
    assert audit["asked"] == len(expected) == audit["written"] + audit["rejected"]
    assert audit["per_task"]["pose"]["reasons"]["outside_root"] == 2


def test_from_photographs_to_the_page(
    tmp_path: Path, scenes_manifest: Callable[..., Path], run_on_ray: Run, run_here: Run
) -> None:
    """By commands alone; those that need no Ray run in this process."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(photographs / f"{number}.png")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    run_here("pairs", "photos", str(photographs), "--out", str(pairs / "photos.parquet"))
    shutil.move(scenes_manifest(1), pairs / "scenes.parquet")
    out = tmp_path / "chains"
    done = run_on_ray("build", "--pairs", str(pairs), "--out", str(out), *FAST, "--keep-noise", "--json")
    audit = json.loads(done.stdout.splitlines()[-1])
    assert audit["written"] == 13
    assert audit["rejected"] == 0

    again = run_here("build", "--pairs", str(pairs), "--out", str(out), *FAST, "--keep-noise", "--json")
    assert json.loads(again.stdout.splitlines()[-1]) == audit, "a finished build is left as it is"
    whole = tokens_of(out)
    (shard,) = (out / "shards" / "task=depth").glob("*.parquet")
    shard.unlink()
    (out / "_audit.json").unlink()
    one_actor = ("--actors", "1", "--json")
    fixed = run_on_ray("build", "--pairs", str(pairs), "--out", str(out), *FAST, "--keep-noise", *one_actor)
    assert json.loads(fixed.stdout.splitlines()[-1])["rows_of_earlier_runs"] == 12
    assert tokens_of(out) == whole, "what was lost is made again, and nothing else"
    refused = run_here("build", "--pairs", str(pairs), "--out", str(out), "--lengths", "5", "--keep-noise", code=2)
    assert "lengths was [3], is [5]" in " ".join(refused.stderr.split())

    longer = tmp_path / "longer"
    from_noise = run_on_ray(
        "build", "--pairs", str(pairs), "--out", str(longer), "--lengths", "3,5", *FAST[2:], "--noise-from", str(out),
        *one_actor,
    )  # fmt: skip
    no_noise = compute(pairs, (3, 5))
    assert tokens_of(longer) == no_noise.tokens, "kept noise gives the same tokens"
    evaluations = json.loads(from_noise.stdout.splitlines()[-1])["unet_evaluations"]
    assert 0 < evaluations < no_noise.evaluations, "and costs no inversions"

    run_here("view", str(out))
    page = (out / "view" / "index.html").read_text()
    assert "data:image" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    described = json.loads(run_here("inspect", str(out), "--json").stdout.splitlines()[-1])
    assert (
        described["fingerprints"]["codebook"]
        == json.loads((out / "_dataset.json").read_text())["fingerprints"]["codebook"]
    )


_LISTENING = """
import json, psutil, ray
from covray.distributed.session import ray_session

with ray_session():
    ray.get(ray.remote(lambda: None).remote())
    own = [psutil.Process(), *psutil.Process().children(recursive=True)]
    print(json.dumps([each.laddr.ip for one in own for each in one.net_connections() if each.status == "LISTEN"]))
"""


def test_a_ray_of_our_own_listens_to_this_machine_only() -> None:
    said = subprocess.run(
        [sys.executable, "-c", _LISTENING], env=environment(), capture_output=True, text=True, check=True, timeout=300
    )
    addresses = json.loads(said.stdout)
    assert len(addresses) > 4
    assert set(addresses) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_a_bad_command_is_one_line_before_anything_starts(
    tmp_path: Path, scenes_manifest: Callable[..., Path], run_on_ray: partial[Any], run_here: Run
) -> None:
    pairs = str(scenes_manifest(1))
    incomplete = tmp_path / "prior"
    shutil.copytree(WEIGHTS / "prior", incomplete)
    (incomplete / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pickled = tmp_path / "vqgan"
    shutil.copytree(WEIGHTS / "vqgan", pickled)
    (pickled / "diffusion_pytorch_model.safetensors").rename(pickled / "diffusion_pytorch_model.bin")
    disguised = tmp_path / "disguised"
    shutil.copytree(WEIGHTS / "prior", disguised)
    scheduler = disguised / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("epsilon", "v_prediction"))
    with ManifestWriter(str(tmp_path / "twice.parquet")) as writer:
        writer.add(Pair("depth", "train", Picture(uri="a.png"), Picture(uri="b.png")))
    folder = tmp_path / "twice"
    folder.mkdir()
    for name in ("a.parquet", "b.parquet"):
        shutil.copy(tmp_path / "twice.parquet", folder / name)
    (tmp_path / "file").write_text("")

    def refused_at_once(*arguments: str, says: str) -> None:
        """No Ray is asked."""
        assert says in error_line(run_here("build", *arguments, code=2).stderr)

    out = str(tmp_path / "out")
    # Weights are checked where an actor would load them.
    says_of_weights = {
        ("--prior", str(incomplete)): "diffusion_pytorch_model.safetensors",
        ("--tokenizer", str(pickled)): "safetensors",
        ("--prior", str(disguised)): "v_prediction",
    }
    commands = [("build", "--pairs", pairs, "--out", out, *weights) for weights in says_of_weights]
    for done, says in zip(run_together(commands, **run_on_ray.keywords), says_of_weights.values(), strict=True):
        assert done.code == 2
        assert says in error_line(done.err)
    refused_at_once("--pairs", str(folder), "--out", out, says="twice")
    refused_at_once("--pairs", pairs, "--out", str(tmp_path / "file" / "out"), says="cannot be written")
    assert not os.path.exists(out), "nothing was begun"
