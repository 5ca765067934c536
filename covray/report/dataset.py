"""The page of a dataset: one HTML file with everything inside, to look at chains and to hand on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from covray.chains.compatibility import require_same_tokens
from covray.chains.dataset import ChainDataset
from covray.config import EngineConfig, TokenizerConfig
from covray.errors import ConfigError, one_line
from covray.io import storage
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.report.contact_sheets import ChainPictures, decode_chains, draw_sheet, quality_lines
from covray.report.html import TILE_MIN_PX, document, duration, facts, figures, human, img, navigation

_EXAMPLES = 20  # rejected pairs named per task and reason
_TILE_MAX_PX = 128  # at first; the page has a slider

_STYLE = """
.chain { display: flex; gap: 24px; padding: 16px 20px; margin-bottom: 12px; align-items: flex-start; }
.meta { flex: 0 0 196px; font-size: 12px; } .meta dl { margin: 10px 0 0; }
.meta dt { color: var(--faint); } .meta dd { margin: 0 0 4px; font-variant-numeric: tabular-nums; }
.strip { display: grid; gap: 6px; min-width: 0; overflow-x: auto; align-items: center; justify-items: center; }
.strip span, .fade span { font-size: 12px; color: var(--faint); }
.strip .method { justify-self: end; padding-right: 6px; color: var(--ink); }
img { width: var(--tile); height: var(--tile); }
.fade { display: none; gap: 6px; justify-items: center; padding-left: 24px; border-left: 1px solid var(--rule); }
.fade div { position: relative; } .fade img + img { position: absolute; inset: 0; }
.fade input { width: var(--tile); } .js .fade { display: grid; }
td li { overflow-wrap: anywhere; } td ul { margin: 6px 0; padding-left: 18px; }
"""

# The slider of a chain cross-fades between the two frames nearest to its alpha, for every method at once.
_SCRIPT = """
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
    DatasetError for no dataset, or a tokenizer with another codebook; WeightsError for one that cannot be loaded;
    ConfigError for an ``out`` that cannot be written.
    """
    dataset = ChainDataset(dataset_path, unfinished=True)
    storage.require_writable(out)
    config = tokenizer or TokenizerConfig.model_validate(dataset.config["tokenizer"])
    vqgan = load_tokenizer(config, EngineConfig())
    require_same_tokens(dataset, vqgan, config.path)
    chains = decode_chains(dataset, vqgan, limit_per_task)
    written = []
    try:
        for task, group in groupby(chains, lambda chain: chain.task):
            of_task = list(group)
            subtitle = f"{dataset.path} · {len(of_task)} of its chains, decoded from their tokens"
            written.append(storage.join(out, f"{task}.png"))
            storage.write_bytes(written[-1], draw_sheet(of_task, human(task), subtitle))
        written.append(storage.join(out, "index.html"))
        write_page(dataset, chains, written[-1])
    except OSError as error:  # the disk may have become full
        raise ConfigError(f"{written[-1]}: cannot be written ({one_line(error)}); give another --out") from error
    return written


def write_page(dataset: ChainDataset, chains: Sequence[ChainPictures], out: str) -> None:
    """Write the page of ``dataset`` with the pictures of ``chains`` (grouped by task) to the file ``out``.

    It holds all it needs, loads nothing, and runs no script but its own, whatever the dataset's texts are.
    """
    # As large as lets the longest chain be seen from end to end: 840 px are left for it and for the cross-fade.
    columns = len(dataset.alphas) + 3
    tile_px = max(TILE_MIN_PX, min(_TILE_MAX_PX, 840 // columns - 6))
    rejects = _rejects(dataset)
    groups = [(task, list(group)) for task, group in groupby(chains, lambda chain: chain.task)]
    links = [(task, human(task)) for task, _ in groups]
    if rejects:
        links.append(("rejected", "Rejected"))
    parts = [*_header(dataset), navigation(links, tile_px)]
    for task, of_task in groups:
        rows = dataset.audit.per_task[task].written if dataset.audit and task in dataset.audit.per_task else None
        shown = f"{len(of_task)} shown" + (f" of {rows:,}" if rows is not None else "")
        parts.append(f'<section id="{escape(task)}"><h2>{escape(human(task))} <small>{shown}</small></h2>')
        parts += [_chain(chain) for chain in of_task]
        parts.append("</section>")
    parts += _rejects_table(rejects)
    page = document(f"Chains of {dataset.path}", parts, tile_px=tile_px, style=_STYLE, script=_SCRIPT)
    storage.write_bytes(out, page)


def _header(dataset: ChainDataset) -> Iterable[str]:
    audit, config = dataset.audit, dataset.config
    badge = "" if audit else '<span class="badge">unfinished</span>'
    yield f'<header><h1>Chains of vision{badge}</h1><code class="faint">{escape(dataset.path)}</code>'
    counts = {"pairs asked for": "asked", "pairs written": "written", "pairs rejected": "rejected"}
    tiles = [(f"{getattr(audit, key):,}" if audit else "–", name) for name, key in counts.items()]
    if audit and audit.chains_per_s is not None:
        tiles.append((f"{audit.chains_per_s:.3g}", "chains a second"))
    if audit and audit.seconds is not None:
        tiles.append((duration(audit.seconds), "build time"))
    tiles.append((str(dataset.tokens_per_image), "tokens a picture"))
    yield figures(tiles)
    lines = [
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
        lines.append(("Left out", f"{len(dataset.unreadable)} shards that cannot be read"))
    yield facts(lines, codes=("", "Codebook")) + "</header>"


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
        cells.append(img(picture, name, f'style="{place}" data-row="all" data-at="{at}"'))
    for row, (method, frames) in enumerate(chain.frames.items()):
        for column, (alpha, frame) in enumerate(zip(chain.alphas, frames, strict=True)):
            place = f"grid-area: {row + 2} / {column + 3}"
            attributes = f'style="{place}" data-row="{row}" data-at="{alpha}"'
            cells.append(img(frame, f"{method}, alpha {alpha:.3g}", attributes))
    quality = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in quality_lines(chain))
    fades = "".join(f'<div data-row="{row}"><img alt=""><img alt=""></div>' for row in range(rows))
    return (
        f'<article class="chain card"><div class="meta"><code>{chain.pair_id}</code>'
        f'<div class="faint">{escape(chain.split)}</div><dl>{quality}</dl></div>'
        f'<div class="strip" style="grid-template-columns: max-content repeat({len(stops)}, var(--tile))">'
        f"{''.join(cells)}</div>"
        f'<div class="fade"><span><output></output></span>{fades}<input type="range" min="0" max="1" step="0.01" '
        f'value="0.5" data-stops="{",".join(map(str, stops))}" aria-label="alpha"></div></article>'
    )


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
            f'<tr><td>{escape(human(task))}</td><td><code>{escape(reason)}</code></td><td class="count">{count:,}</td>'
            f"<td><details{opened}><summary>{which}</summary><ul>{items}</ul></details></td></tr>"
        )
    yield "</table></div></section>"
