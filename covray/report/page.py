"""The page of a dataset: one HTML file with everything inside, to look at chains and to hand on."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

import numpy as np
from PIL import Image

from covray import storage
from covray.config import EngineConfig, TokenizerConfig
from covray.errors import ConfigError
from covray.report.sheets import ChainPictures, decode_chains, draw_sheet, quality_lines
from covray.tokens.shards import ChainDataset
from covray.tokens.tokenizer import load_tokenizer, require_same_codebook

_EXAMPLES = 20  # rejected pairs named per task and reason
_TILE_MIN_PX, _TILE_MAX_PX = 48, 128
_LOSSLESS_PX = 128  # small pictures are stored to the pixel, larger ones as a photograph is

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1c1f24; --faint: #667085;
  --rule: #e4e7ec; --accent: #3f6fd8; --warn: #b54708; --warn-paper: #fff4e5; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1c1f25; --ink: #e8eaee; --faint: #98a2b3;
  --rule: #2d323b; --accent: #8fb0ff; --warn: #fdb022; --warn-paper: #33260f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; display: flex; gap: 12px; align-items: baseline; }
h2 small { font-size: 13px; font-weight: 400; color: var(--faint); }
code { font: 12px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.faint { color: var(--faint); }
.badge { display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 12px; vertical-align: 4px;
  margin-left: 8px; color: var(--warn); background: var(--warn-paper); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.figures { display: flex; flex-wrap: wrap; margin: 20px 0 12px; }
.figures div { padding: 14px 28px 14px 20px; }
.figures b { display: block; font-size: 24px; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures span { color: var(--faint); font-size: 12px; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; padding: 16px 20px; }
.facts dt { color: var(--faint); } .facts dd { margin: 0; }
nav { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: center;
  padding: 10px 0; margin-top: 12px; background: var(--paper); border-bottom: 1px solid var(--rule); }
nav a { color: var(--accent); text-decoration: none; }
nav label { margin-left: auto; color: var(--faint); display: none; align-items: center; gap: 8px; }
.chain { display: flex; gap: 24px; padding: 16px 20px; margin-bottom: 12px; align-items: flex-start; }
.meta { flex: 0 0 196px; font-size: 12px; } .meta dl { margin: 10px 0 0; }
.meta dt { color: var(--faint); } .meta dd { margin: 0 0 4px; font-variant-numeric: tabular-nums; }
.strip { display: grid; gap: 6px; min-width: 0; overflow-x: auto; align-items: center; justify-items: center; }
.strip span, .fade span { font-size: 12px; color: var(--faint); }
.strip .method { justify-self: end; padding-right: 6px; color: var(--ink); }
img { display: block; width: var(--tile); height: var(--tile); border-radius: 6px; background: var(--rule); }
.fade { display: none; gap: 6px; justify-items: center; padding-left: 24px; border-left: 1px solid var(--rule); }
.fade div { position: relative; } .fade img + img { position: absolute; inset: 0; }
input[type=range] { accent-color: var(--accent); margin: 4px 0 0; }
.fade input { width: var(--tile); } nav input { width: 110px; }
.js .fade { display: grid; } .js nav label { display: flex; }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; font-weight: 500; color: var(--faint); font-size: 12px; }
th, td { padding: 8px 20px; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; } td.count { font-variant-numeric: tabular-nums; }
td li { overflow-wrap: anywhere; } td ul { margin: 6px 0; padding-left: 18px; } summary { cursor: pointer; }
"""

# The slider of a chain cross-fades between the two frames nearest to its alpha, for every method at once.
_SCRIPT = """
document.documentElement.classList.add('js');
document.querySelector('nav input').oninput = function () {
  document.documentElement.style.setProperty('--tile', this.value + 'px');
};
document.querySelectorAll('.chain').forEach(function (chain) {
  var slider = chain.querySelector('.fade input'), stops = slider.dataset.stops.split(',').map(Number);
  slider.oninput = function () {
    var at = Number(slider.value), next = 1;
    while (stops[next] < at) next++;
    chain.querySelectorAll('.fade div').forEach(function (pair) {
      var row = chain.querySelectorAll('.strip [data-row="' + pair.dataset.row + '"], .strip [data-row="all"]');
      var pictures = Array.from(row).sort(function (a, b) { return a.dataset.at - b.dataset.at; });
      pair.children[0].src = pictures[next - 1].src;
      pair.children[1].src = pictures[next].src;
      pair.children[1].style.opacity = (at - stops[next - 1]) / (stops[next] - stops[next - 1]);
    });
    chain.querySelector('.fade output').textContent = '\\u03b1 = ' + at.toFixed(2);
  };
  slider.oninput();
});
"""


def view(
    dataset_path: str, out: str, *, limit_per_task: int = 8, tokenizer: TokenizerConfig | None = None
) -> list[str]:
    """Write what there is to see of a dataset: ``index.html``, and a contact sheet ``<task>.png`` a task.

    ``dataset_path``: a dataset folder, finished or not; ``out``: folder to write; ``limit_per_task``: chains shown of
    each task; ``tokenizer``: where the dataset's tokenizer is now, if it has moved. Returns the paths written. Raises
    DatasetError for no dataset, or a tokenizer with another codebook; WeightsError for one that cannot be loaded.
    """
    dataset = ChainDataset(dataset_path, unfinished=True)
    config = tokenizer or TokenizerConfig.model_validate(dataset.config["tokenizer"])
    vqgan = load_tokenizer(config, EngineConfig())
    require_same_codebook(dataset.fingerprints["codebook"], vqgan.codebook_fingerprint, config.path)
    if vqgan.tokens_per_image != dataset.tokens_per_image:
        raise ConfigError(
            f"tokenizer.size_px: {vqgan.size_px} gives {vqgan.tokens_per_image} tokens a picture, {dataset_path} has "
            f"{dataset.tokens_per_image}; give the size it was built with"
        )
    chains = decode_chains(dataset, vqgan, limit_per_task)
    written = []
    for task, group in groupby(chains, lambda chain: chain.task):
        of_task = list(group)
        subtitle = f"{dataset.path} · {len(of_task)} of its chains, decoded from their tokens"
        written.append(storage.join(out, f"{task}.png"))
        storage.write_bytes(written[-1], draw_sheet(of_task, _human(task), subtitle))
    written.append(storage.join(out, "index.html"))
    write_page(dataset, chains, written[-1])
    return written


def write_page(dataset: ChainDataset, chains: Sequence[ChainPictures], out: str) -> None:
    """Write the page of ``dataset`` with the pictures of ``chains`` (grouped by task) to the file ``out``.

    It holds all it needs, loads nothing, and runs no script but its own, whatever the dataset's texts are.
    """
    script_hash = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    # As large as lets the longest chain be seen from end to end: 840 px are left for it and for the cross-fade.
    columns = len(dataset.alphas) + 3
    tile_px = max(_TILE_MIN_PX, min(_TILE_MAX_PX, 840 // columns - 6))
    rejects = _rejects(dataset)
    groups = [(task, list(group)) for task, group in groupby(chains, lambda chain: chain.task)]
    links = [f'<a href="#{escape(task)}">{escape(_human(task))}</a>' for task, _ in groups]
    if rejects:
        links.append('<a href="#rejected">Rejected</a>')
    parts = [
        f'<!doctype html>\n<html lang="en" style="--tile: {tile_px}px"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Chains of {escape(dataset.path)}</title><style>{_STYLE}</style></head><body><main>",
        *_header(dataset),
        f"<nav>{' '.join(links)}<label>picture size <input type='range' aria-label='picture size' ",
        f"min='{_TILE_MIN_PX}' max='256' value='{tile_px}'></label></nav>",
    ]
    for task, of_task in groups:
        rows = dataset.audit["per_task"].get(task, {}).get("written") if dataset.audit else None
        shown = f"{len(of_task)} shown" + (f" of {rows:,}" if rows is not None else "")
        parts.append(f'<section id="{escape(task)}"><h2>{escape(_human(task))} <small>{shown}</small></h2>')
        parts += [_chain(chain) for chain in of_task]
        parts.append("</section>")
    parts += [*_rejects_table(rejects), f"</main><script>{_SCRIPT}</script></body></html>\n"]
    storage.write_bytes(out, "".join(parts).encode())


def _header(dataset: ChainDataset) -> Iterable[str]:
    audit, config = dataset.audit, dataset.config
    badge = "" if audit else '<span class="badge">unfinished</span>'
    yield f'<header><h1>Chains of vision{badge}</h1><code class="faint">{escape(dataset.path)}</code>'
    figures = {"pairs asked for": "asked", "pairs written": "written", "pairs rejected": "rejected"}
    tiles = [(f"{audit[key]:,}" if audit else "–", name) for name, key in figures.items()]
    if audit and audit.get("chains_per_s") is not None:
        tiles.append((f"{audit['chains_per_s']:.3g}", "chains a second"))
    if audit and audit.get("seconds") is not None:
        tiles.append((_duration(audit["seconds"]), "build time"))
    tiles.append((str(dataset.tokens_per_image), "tokens a picture"))
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{name}</span></div>" for value, name in tiles)
    yield f'<div class="figures card">{boxes}</div>'
    facts = [
        ("Chain lengths", ", ".join(map(str, config["lengths"]))),
        ("Methods", ", ".join(dataset.methods)),
        ("Alphas", ", ".join(f"{alpha:.3g}" for alpha in dataset.alphas) or "none"),
        ("Prior", f"{config['prior']['path']}, {config['prior']['steps']} DDIM steps"),
        ("", dataset.fingerprints["prior"]),
        ("Tokenizer", config["tokenizer"]["path"]),
        ("", dataset.fingerprints["tokenizer"]),
        ("Codebook", dataset.fingerprints["codebook"]),
    ]
    if dataset.unreadable:
        facts.append(("Left out", f"{len(dataset.unreadable)} shards that cannot be read"))
    lines = "".join(f"<dt>{name}</dt><dd>{_fact(name, value)}</dd>" for name, value in facts)
    yield f'<dl class="facts card">{lines}</dl></header>'


def _fact(name: str, value: str) -> str:
    return f'<code class="faint">{escape(value)}</code>' if name in ("", "Codebook") else escape(value)


def _chain(chain: ChainPictures) -> str:
    """One chain: figures, pictures with a row a method between the two ends, and the cross-fade."""
    methods = list(chain.frames) or ["none"]
    rows = len(methods)
    stops = [0.0, *chain.alphas, 1.0]
    cells = ["<span></span><span>source</span>"]
    cells += [f"<span>α = {alpha:.3g}</span>" for alpha in chain.alphas]
    cells.append("<span>label</span>")
    for row, method in enumerate(methods):
        cells.append(f'<span class="method" style="grid-area: {row + 2} / 1">{escape(method)}</span>')
    ends = ((chain.source, "source", 0.0, 2), (chain.label, "label", 1.0, len(stops) + 1))
    for picture, name, at, column in ends:
        place = f"grid-area: 2 / {column} / span {rows}"
        cells.append(_img(picture, name, f'style="{place}" data-row="all" data-at="{at}"'))
    for row, (method, frames) in enumerate(chain.frames.items()):
        for column, (alpha, frame) in enumerate(zip(chain.alphas, frames, strict=True)):
            place = f"grid-area: {row + 2} / {column + 3}"
            attributes = f'style="{place}" data-row="{row}" data-at="{alpha}"'
            cells.append(_img(frame, f"{method}, alpha {alpha:.3g}", attributes))
    figures = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in quality_lines(chain))
    fades = "".join(f'<div data-row="{row}"><img alt=""><img alt=""></div>' for row in range(rows))
    return (
        f'<article class="chain card"><div class="meta"><code>{chain.pair_id}</code>'
        f'<div class="faint">{escape(chain.split)}</div><dl>{figures}</dl></div>'
        f'<div class="strip" style="grid-template-columns: max-content repeat({len(stops)}, var(--tile))">'
        f"{''.join(cells)}</div>"
        f'<div class="fade"><span><output></output></span>{fades}<input type="range" min="0" max="1" step="0.01" '
        f'value="0.5" data-stops="{",".join(map(str, stops))}" aria-label="alpha"></div></article>'
    )


def _img(picture: np.ndarray, alt: str, attributes: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", lossless=len(picture) <= _LOSSLESS_PX, quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" title="{escape(alt)}" {attributes} src="data:image/webp;base64,{data}">'


def _rejects(dataset: ChainDataset) -> dict[tuple[str, str], tuple[int, list[tuple[int, str]]]]:
    """Per task and reason: how many pairs, and the first of them with their detail."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for row in dataset.rows(["pair_id", "task", "error"], errors=True):
        if row["error"] is None:
            continue
        reason, _, detail = row["error"].partition(":")
        key = (row["task"], reason)
        counts[key] += 1
        if counts[key] <= _EXAMPLES:
            examples.setdefault(key, []).append((row["pair_id"], detail.strip()))
    return {key: (counts[key], examples[key]) for key in sorted(counts)}


def _rejects_table(rejects: dict[tuple[str, str], tuple[int, list[tuple[int, str]]]]) -> Iterable[str]:
    if not rejects:
        return
    total = sum(count for count, _ in rejects.values())
    yield f'<section id="rejected"><h2>Rejected <small>{total:,} pairs without tokens</small></h2>'
    yield '<div class="card"><table><tr><th>Task</th><th>Reason</th><th>Pairs</th><th>Which</th></tr>'
    for (task, reason), (count, examples) in rejects.items():
        items = "".join(f"<li><code>{pair_id}</code> {escape(detail)}</li>" for pair_id, detail in examples)
        which = "pair ids" if count <= len(examples) else f"the first {len(examples)} pair ids"
        opened = " open" if count <= 3 else ""
        yield (
            f'<tr><td>{escape(_human(task))}</td><td><code>{escape(reason)}</code></td><td class="count">{count:,}</td>'
            f"<td><details{opened}><summary>{which}</summary><ul>{items}</ul></details></td></tr>"
        )
    yield "</table></div></section>"


def _human(task: str) -> str:
    return task.replace("_", " ").capitalize()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
