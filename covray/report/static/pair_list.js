// The list of all pairs: filters, order and page are in the address, so that a view can be passed on.
const pairList = (() => {
  const section = document.getElementById('pairs'), get = (id) => document.getElementById(id);
  const fields = [...get('filters').querySelectorAll('[name]')];
  const field = Object.fromEntries(fields.map((element) => [element.name, element]));
  const isServed = 'served' in section.dataset;
  const rows = new PairRows();
  const opened = new Set(), closed = new Set(), drawn = new Map();
  const figureHeads = [...section.querySelectorAll('th[data-figure]')];
  const POLL_MS = 2000;
  let selected = [], page = 0, generation = -1, shards = 0;

  const count = (number) => number.toLocaleString('en');
  const readable = (name) => name.charAt(0).toUpperCase() + name.slice(1).replaceAll('_', ' ');
  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  function filter() { return Object.fromEntries(fields.map(({ name, value }) => [name, value.trim()])); }

  function remember() {
    const changed = fields.filter((place) => place.value && !(place === field.figure && isUnbounded()));
    const state = new URLSearchParams(changed.map(({ name, value }) => [name, value]));
    if (page) state.set('page', page + 1);
    const text = String(state);
    if (text || location.hash.includes('=')) history.replaceState(null, '', '#' + (text || 'pairs'));
  }

  function isUnbounded() { return !field.from.value && !field.to.value; }

  function initial(place) { return place === field.figure ? figureHeads[0].dataset.figure : ''; }

  function recall() {
    if (!location.hash.includes('=')) return false;
    const state = new URLSearchParams(location.hash.slice(1));
    for (const place of fields) {
      const value = state.get(place.name) ?? initial(place);
      if (place.tagName === 'SELECT' && value && ![...place.options].some((option) => option.value === value))
        place.append(new Option(value, value));
      place.value = value;
    }
    page = Math.max(0, Number(state.get('page') ?? 1) - 1) || 0;
    return true;
  }

  // Options keep what is chosen, also where a growing list has no such row yet.
  function fillOptions(select, place, counts, prefix = '', name = readable) {
    const chosen = select.value;
    for (const option of [...place.children]) if (option.value || place !== select) option.remove();
    for (const [value, number] of counts)
      if (value) place.append(new Option(`${name(value)} (${count(number)})`, prefix + value));
    if (chosen && ![...select.options].some(({ value }) => value === chosen)) place.append(new Option(chosen, chosen));
    select.value = chosen;
  }

  function fillFilters() {
    const { task, split, state } = field, reasons = rows.counts('reason');
    fillOptions(task, task, rows.counts('task'));
    fillOptions(split, split, rows.counts('split'), '', (name) => name);
    fillOptions(state, get('reasons'), reasons, '=', (name) => name.replaceAll('_', ' '));
    for (const head of figureHeads) {
      const known = (rows.figures[head.dataset.figure] ?? []).some((value) => !Number.isNaN(value));
      section.classList.toggle('no-' + head.dataset.figure, !known);
    }
  }

  function select(announce = true) {
    selected = rows.select(filter());
    page = Math.min(page, Math.max(0, pages() - 1));
    show();
    if (announce) get('result').textContent = summary();
  }

  function summary() {
    if (!rows.length) return isServed ? 'No pair is written yet.' : 'The dataset has no pairs.';
    if (!selected.length) return `None of ${count(rows.length)} pairs fits the filters.`;
    if (selected.length === rows.length) return `${count(rows.length)} pairs`;
    return `${count(selected.length)} of ${count(rows.length)} pairs`;
  }

  const rowsAPage = () => Number(get('rows-a-page').value);
  const pages = () => Math.ceil(selected.length / rowsAPage());
  const isOpen = (id) => opened.has(id) || get('all').checked && !closed.has(id);

  function show() {
    get('shown').textContent = summary();
    get('page-number').textContent = selected.length ? `${count(page + 1)} / ${count(pages())}` : '';
    get('previous').disabled = page === 0;
    get('next').disabled = page >= pages() - 1;
    const { sort, order } = field;
    for (const head of figureHeads) {
      const sorted = head.dataset.figure === sort.value;
      if (sorted) head.setAttribute('aria-sort', order.value ? 'descending' : 'ascending');
      else head.removeAttribute('aria-sort');
    }
    const start = page * rowsAPage(), body = get('rows'), parts = [], kept = new Set();
    for (const row of selected.slice(start, start + rowsAPage())) {
      const id = rows.id[row];
      kept.add(id);
      if (!drawn.has(id)) drawn.set(id, drawRow(row));
      const { line, detail } = drawn.get(id), open = isOpen(id);
      line.querySelector('button').setAttribute('aria-expanded', open);
      parts.push(line);
      if (open) parts.push(detail(row));
    }
    for (const id of drawn.keys()) if (!kept.has(id)) drawn.delete(id);
    if (parts.length === body.children.length && parts.every((part, at) => part === body.children[at])) return;
    const focused = document.activeElement;
    body.replaceChildren(...parts);
    if (focused && focused.isConnected && section.contains(focused)) focused.focus({ preventScroll: true });
  }

  function drawRow(row) {
    const line = element('tr'), id = rows.id[row], name = element('th');
    const button = element('button', id, 'pair');
    name.scope = 'row';
    button.type = 'button';
    button.onclick = () => {
      const open = isOpen(id);
      opened.delete(id); closed.delete(id);
      (open ? closed : opened).add(id);
      show();
    };
    name.append(button);
    line.append(name, element('td', readable(rows.task[row])), element('td', rows.split[row]));
    for (const { dataset } of figureHeads) {
      const value = rows.figures[dataset.figure]?.[row], cell = element('td', digits(value), 'number');
      cell.dataset.figure = dataset.figure;
      line.append(cell);
    }
    line.append(element('td', rows.reason[row].replaceAll('_', ' '), 'reason'));
    let made;
    return { line, detail: (at) => made ??= drawDetail(at) };
  }

  function digits(value) {
    if (value === undefined || Number.isNaN(value)) return '–';
    return value >= 10 ? value.toFixed(1) : value.toFixed(2);
  }

  function drawDetail(row) {
    const line = element('tr', undefined, 'detail'), cell = element('td'), place = element('div');
    cell.colSpan = 99;
    cell.append(place);
    line.append(cell);
    if (rows.reason[row]) place.append(element('p', [rows.reason[row], rows.detail[row]].filter(Boolean).join(': '), 'wrong'));
    else if (isServed) load(place, rows.id[row]);
    else showHeld(place, rows.id[row]);
    return line;
  }

  function showHeld(place, id) {
    const held = document.querySelector(`section:not(#pairs) [data-pair="${id}"]`);
    if (held) addChain(place, held.cloneNode(true));
    else {
      const text = element('p', 'This file holds the pictures of some pairs only. To see this one: ', 'faint');
      text.append(element('code', `covray view ${section.dataset.path} --pair ${id}`), ', or ', element('code', '--serve'));
      place.append(text);
    }
  }

  function addChain(place, chain) {
    chain.classList.remove('card');
    place.replaceChildren(chain);
    startSlider(chain);
  }

  async function load(place, id) {
    place.replaceChildren(element('p', 'Decoding…', 'faint'));
    try {
      const response = await fetch(`pair?id=${id}`), text = await response.text();
      if (!response.ok) throw new Error(text);
      // The server escapes every value, and the policy of the page runs no script of it.
      const holder = element('template');
      holder.innerHTML = text;
      addChain(place, holder.content.querySelector('.chain'));
    } catch (error) {
      place.replaceChildren(element('p', `${error.message}. Close and open the row to try again.`, 'wrong'));
      drawn.delete(id);
    }
  }

  async function poll() {
    try {
      const response = await fetch(`rows?generation=${generation}&shards=${shards}`);
      if (!response.ok) throw new Error(await response.text());
      take(await response.json());
    } catch (error) {
      get('live').textContent = error instanceof TypeError ? 'the server does not answer' : error.message;
      get('live').className = 'wrong';
    }
    setTimeout(poll, POLL_MS);
  }

  function take(answer) {
    const isFirst = generation < 0;
    ({ generation, shards } = answer);
    if (answer.again) rows.clear();
    rows.add(answer.rows);
    const rejected = rows.length - (rows.counts('reason').find(([reason]) => !reason)?.[1] ?? 0);
    const facts = `${count(rows.length - rejected)} written, ${count(rejected)} rejected`;
    get('live').textContent = answer.finished ? `finished: ${facts}` : `live: ${facts} so far`;
    get('live').className = answer.finished ? '' : 'live';
    if (answer.finished) document.querySelector('header .badge')?.remove();
    if (!answer.rows.count && !answer.again) return;
    fillFilters();
    select(isFirst);
  }

  function change() {
    page = 0;
    select();
    remember();
  }

  get('filters').oninput = change;
  get('clear').onclick = () => {
    for (const place of fields) place.value = initial(place);
    change();
  };
  for (const head of figureHeads) head.querySelector('button').onclick = () => {
    const { sort, order } = field, again = sort.value === head.dataset.figure;
    order.value = again && !order.value ? 'down' : '';
    sort.value = head.dataset.figure;
    change();
  };
  get('previous').onclick = () => { page--; show(); remember(); };
  get('next').onclick = () => { page++; show(); remember(); };
  get('rows-a-page').onchange = () => { page = 0; show(); };
  get('all').onchange = () => { opened.clear(); closed.clear(); show(); };
  window.addEventListener('hashchange', () => { if (recall()) select(); });

  recall();
  if (isServed) { get('all').checked = true; poll(); } else {
    rows.add(JSON.parse(get('data').content.textContent));
    fillFilters();
    select(false);
  }
  return rows;
})();
