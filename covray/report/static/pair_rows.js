// All pairs of the dataset, a list a column. Ids are texts: they have more digits than a number keeps.
class PairRows {
  constructor() { this.clear(); }

  clear() {
    this.id = []; this.task = []; this.split = []; this.reason = []; this.detail = []; this.figures = {};
  }

  get length() { return this.id.length; }

  // Add the rows of covray/report/pair_rows.py.
  add(packed) {
    if (!packed.count) return;
    const start = this.length;
    const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
    for (const id of new BigInt64Array(bytes(packed.pair_id))) this.id.push(String(id));
    for (const name of ['task', 'split', 'reason'])
      for (const index of new Uint16Array(bytes(packed[name]))) this[name].push(packed[name + 's'][index]);
    for (const [name, text] of Object.entries(packed.figures)) {
      const column = this.figures[name] ??= [];
      for (const value of new Float32Array(bytes(text))) column.push(value);
    }
    for (const [index, text] of Object.entries(packed.details)) this.detail[start + Number(index)] = text;
  }

  // Return the rows that a filter lets through, in its order. Unknown figures are never within bounds, and always last.
  select({ task, split, state, id, figure, from, to, sort, order }) {
    const lowest = from === '' ? -Infinity : Number(from), highest = to === '' ? Infinity : Number(to);
    const bounded = from !== '' || to !== '';
    const values = this.figures[figure] ?? [];
    const rows = [];
    for (let row = 0; row < this.length; row++) {
      if (task && this.task[row] !== task || split && this.split[row] !== split) continue;
      if (state === 'good' && this.reason[row] || state === 'rejected' && !this.reason[row]) continue;
      if (state.startsWith('=') && this.reason[row] !== state.slice(1)) continue;
      if (id && !this.id[row].startsWith(id)) continue;
      if (bounded && !(values[row] >= lowest && values[row] <= highest)) continue;
      rows.push(row);
    }
    const sign = order === 'down' ? -1 : 1;
    if (sort === 'id') {
      const ids = this.id.map(BigInt);
      rows.sort((a, b) => sign * (ids[a] < ids[b] ? -1 : Number(ids[a] > ids[b])));
    } else if (sort) {
      const keys = this.figures[sort] ?? [];
      rows.sort((a, b) => Number.isNaN(keys[a]) - Number.isNaN(keys[b]) || sign * (keys[a] - keys[b]) || a - b);
    } else if (sign < 0) rows.reverse();
    return rows;
  }

  // Return how many rows have each value of a column, as pairs by value.
  counts(name) {
    const counts = new Map();
    for (const value of this[name]) counts.set(value, (counts.get(value) ?? 0) + 1);
    return [...counts].sort(([a], [b]) => (a < b ? -1 : 1));
  }
}
