// The editor of boxes and ellipses: one SVG over the picture, one table below, the same shapes.
// props.value is JSON {load, rev, latents: {name: {base, parts}}}; every change raises rev and
// triggers 'moved'. The server checks everything again.
const FIELDS = {bbox: ['x1', 'y1', 'x2', 'y2'], blob: ['xc', 'yc', 'r_major', 'r_minor', 'theta']};
const LIST = {bbox: 'boxes', blob: 'ellipses'};
const NOUN = {bbox: 'box', blob: 'ellipse'};
const NS = 'http://www.w3.org/2000/svg';
const svg = element.querySelector('svg');
const table = element.querySelector('tbody');
const live = element.querySelector('.k-live');
const bar = element.querySelector('.k-tools');
let state = {load: -1, rev: 0, latents: {}};
let selected = null;
let drag = null;
let timer = null;

const limit = (value, low, high) => Math.min(Math.max(Math.round(value), low), high);
const colour = (index) => props.palette[index % props.palette.length];
const same = (a, b) => a && b && a.name === b.name && a.part === b.part && a.place === b.place;

function make(tag, attributes, parent) {
  const node = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.appendChild(node);
  return node;
}

function all() {
  const found = [];
  for (const [name, latent] of Object.entries(state.latents)) {
    latent.parts.forEach((part, index) => part[LIST[name]].forEach((numbers, place) => {
      found.push({name, part: index, place, phrase: part.phrase, numbers});
    }));
  }
  return found;
}

function describe(shape) {
  const numbers = FIELDS[shape.name].map((field, i) => field + ' ' + shape.numbers[i]);
  return NOUN[shape.name] + ' ' + shape.phrase + ': ' + numbers.join(', ');
}

// ---- what may not be: corners in order and inside, radii in order, angles below 180 ----------

function tidy(name, numbers) {
  if (name === 'bbox') {
    let [x1, y1, x2, y2] = numbers.map((value) => limit(value, 0, 1000));
    if (x1 > x2) [x1, x2] = [x2, x1];
    if (y1 > y2) [y1, y2] = [y2, y1];
    if (x1 === x2) x2 < 1000 ? x2++ : x1--;
    if (y1 === y2) y2 < 1000 ? y2++ : y1--;
    return [x1, y1, x2, y2];
  }
  let [xc, yc, major, minor, theta] = numbers;
  if (minor > major) [major, minor, theta] = [minor, major, theta + 90];
  theta = ((Math.round(theta) % 180) + 180) % 180;
  return [limit(xc, 0, 1000), limit(yc, 0, 1000), limit(major, 1, 1000), limit(minor, 1, 1000), theta];
}

function put(shape, numbers) {
  shape.numbers = tidy(shape.name, numbers);
  state.latents[shape.name].parts[shape.part][LIST[shape.name]][shape.place] = shape.numbers;
}

function moved(shape, numbers, dx, dy) {
  if (shape.name === 'bbox') {
    const [x1, y1, x2, y2] = numbers;
    dx = limit(dx, -x1, 1000 - x2);
    dy = limit(dy, -y1, 1000 - y2);
    return [x1 + dx, y1 + dy, x2 + dx, y2 + dy];
  }
  return [limit(numbers[0] + dx, 0, 1000), limit(numbers[1] + dy, 0, 1000), ...numbers.slice(2)];
}

function scaled(shape, numbers, by) {
  if (shape.name === 'bbox') {
    const [x1, y1, x2, y2] = numbers;
    return [x1 - by, y1 - by, Math.max(x2 + by, x1 - by + 2), Math.max(y2 + by, y1 - by + 2)];
  }
  const [xc, yc, major, minor, theta] = numbers;
  return [xc, yc, major + by, Math.max(minor + by, 1), theta];
}

function pulled(shape, numbers, handle, x, y) {
  if (shape.name === 'bbox') {
    const next = numbers.slice();
    next[handle[0] === 'w' ? 0 : 2] = x;
    next[handle[1] === 'n' ? 1 : 3] = y;
    return next;
  }
  const [xc, yc, major, minor, theta] = numbers;
  const angle = theta * Math.PI / 180;
  const dx = x - xc, dy = yc - y;
  const along = Math.abs(dx * Math.cos(angle) + dy * Math.sin(angle));
  const across = Math.abs(dy * Math.cos(angle) - dx * Math.sin(angle));
  if (handle === 'major') return [xc, yc, Math.max(along, minor), minor, theta];
  if (handle === 'minor') return [xc, yc, major, Math.min(across, major), theta];
  return [xc, yc, major, minor, Math.atan2(dy, dx) * 180 / Math.PI];
}

function handles(shape) {
  if (shape.name === 'bbox') {
    const [x1, y1, x2, y2] = shape.numbers;
    return [['wn', x1, y1], ['en', x2, y1], ['ws', x1, y2], ['es', x2, y2]];
  }
  const [xc, yc, major, minor, theta] = shape.numbers;
  const angle = theta * Math.PI / 180, cos = Math.cos(angle), sin = Math.sin(angle);
  return [
    ['major', xc - major * cos, yc + major * sin],
    ['minor', xc - minor * sin, yc - minor * cos],
    ['turn', xc + (major + 60) * cos, yc - (major + 60) * sin],
  ];
}

// ---- drawing -----------------------------------------------------------------------------------

function draw() {
  const focused = svg.contains(document.activeElement);
  svg.replaceChildren();
  make('image', {href: props.image || '', width: 1000, height: 1000, class: 'k-under'}, svg);
  const found = all();
  let picked = null;
  for (const shape of found) {
    const chosen = same(shape, selected);
    const group = make('g', {
      tabindex: 0, role: 'button', 'aria-label': describe(shape), 'aria-pressed': chosen,
      class: chosen ? 'k-shape k-chosen' : 'k-shape', style: 'color:' + colour(shape.part),
    }, svg);
    group.shape = shape;
    sketch(shape, group);
    if (chosen) picked = group;
  }
  if (picked) {
    // Drawn once more above the others; the group itself keeps its place in the order of Tab.
    const front = make('g', {
      class: 'k-front', 'aria-hidden': true, style: 'color:' + colour(picked.shape.part),
    }, svg);
    front.shape = picked.shape;
    sketch(front.shape, front);
    for (const [handle, x, y] of handles(front.shape)) {
      const knob = make('circle', {cx: x, cy: y, r: 18, class: 'k-knob k-' + handle}, front);
      knob.handle = handle;
      make('circle', {cx: x, cy: y, r: 42, class: 'k-reach'}, front).handle = handle;
    }
    if (focused) focusChosen();
  }
  rows(found);
  for (const button of bar.querySelectorAll('[data-add]')) {
    button.hidden = !(button.dataset.add in state.latents);
  }
  element.querySelector('.k-editor').hidden = !Object.keys(state.latents).length;
}

function focusChosen() {
  const group = svg.querySelector('.k-chosen');
  if (group) group.focus({preventScroll: true});
}

function sketch(shape, group) {
  outline(shape, group, 'k-casing');
  outline(shape, group, 'k-line');
  // At the end that is farther from the middle, so that 24 letters have room at any width.
  const [x, y] = shape.numbers, end = shape.name === 'bbox' ? shape.numbers[2] : x;
  const right = x + end > 1000;
  const label = make('text', {
    x: right ? Math.max(end - 26, 610) : Math.min(x + 26, 390),
    y: Math.min(y + 50, 985), 'text-anchor': right ? 'end' : 'start',
  }, group);
  label.textContent = shape.phrase.length > 24 ? shape.phrase.slice(0, 22) + '…' : shape.phrase;
}

function outline(shape, parent, kind) {
  if (shape.name === 'bbox') {
    const [x, y, x2, y2] = shape.numbers;
    make('rect', {x, y, width: x2 - x, height: y2 - y, class: kind}, parent);
    return;
  }
  const [cx, cy, rx, ry, theta] = shape.numbers;
  const turn = 'rotate(' + -theta + ' ' + cx + ' ' + cy + ')';
  make('ellipse', {cx, cy, rx, ry, transform: turn, class: kind}, parent);
  make('line', {x1: cx - rx, y1: cy, x2: cx + rx, y2: cy, transform: turn, class: kind}, parent);
}

function rows(found) {
  const key = found.map((shape) => [shape.name, shape.part, shape.place].join('.')).join(' ');
  if (table.dataset.key !== state.load + ' ' + key) {
    table.replaceChildren(...found.map(row));
    table.dataset.key = state.load + ' ' + key;
  }
  found.forEach((shape, index) => {
    const line = table.children[index];
    line.shape = shape;
    line.classList.toggle('k-chosen', Boolean(same(shape, selected)));
    const inputs = line.querySelectorAll('input');
    [shape.phrase, ...shape.numbers].forEach((value, i) => {
      if (inputs[i] !== document.activeElement) inputs[i].value = value;
    });
  });
}

function row(shape) {
  const line = document.createElement('tr');
  const name = document.createElement('input');
  name.type = 'text';
  name.maxLength = 500;
  name.setAttribute('aria-label', 'name of ' + NOUN[shape.name] + ' ' + (shape.part + 1));
  cell(line).append(name);
  FIELDS[shape.name].forEach((field) => {
    const input = document.createElement('input');
    input.type = 'number';
    input.min = 0;
    input.max = field === 'theta' ? 179 : 1000;
    input.setAttribute('aria-label', field + ' of ' + NOUN[shape.name] + ' ' + (shape.part + 1));
    const box = cell(line);
    const small = document.createElement('small');
    small.textContent = field;
    box.append(small, input);
  });
  const button = document.createElement('button');
  button.type = 'button';
  button.textContent = 'Delete';
  button.setAttribute('aria-label', 'delete ' + NOUN[shape.name] + ' ' + (shape.part + 1));
  cell(line).append(button);
  return line;
}

function cell(line) {
  return line.appendChild(document.createElement('td'));
}

// ---- changes -----------------------------------------------------------------------------------

function say(words) {
  live.textContent = words;
}

function commit() {
  clearTimeout(timer);
  timer = null;
  state.rev++;
  props.value = JSON.stringify(state);
  trigger('moved');
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(commit, 300);
}

function choose(shape) {
  selected = shape && {name: shape.name, part: shape.part, place: shape.place};
}

function add(name) {
  const parts = state.latents[name].parts;
  const last = parts[parts.length - 1];
  const at = last && !last[LIST[name]].length ? parts.length - 1 : parts.length;
  const numbers = name === 'bbox' ? [350, 350, 650, 650] : [500, 500, 200, 120, 0];
  parts.splice(at, 0, {phrase: 'a new object', [LIST[name]]: [numbers]});
  choose({name, part: at, place: 0});
  draw();
  say('added; give it a name in the table');
  commit();
}

function remove(shape) {
  const place = all().findIndex((other) => same(other, shape));
  const inTable = table.contains(document.activeElement);
  const parts = state.latents[shape.name].parts;
  if (all().filter((other) => other.name === shape.name).length === 1) {
    say('the only ' + NOUN[shape.name] + ' cannot be deleted');
    return;
  }
  parts[shape.part][LIST[shape.name]].splice(shape.place, 1);
  if (!parts[shape.part][LIST[shape.name]].length) parts.splice(shape.part, 1);
  // The keyboard goes on from the shape that stands there now, in the table or in the picture.
  const left = all();
  choose(left[Math.min(place, left.length - 1)]);
  draw();
  if (inTable) table.querySelector('.k-chosen button').focus();
  else focusChosen();
  say('deleted');
  commit();
}

function point(event) {
  const box = svg.getBoundingClientRect();
  return [(event.clientX - box.left) * 1000 / box.width, (event.clientY - box.top) * 1000 / box.height];
}

svg.addEventListener('pointerdown', (event) => {
  const group = event.target.closest('g');
  if (!group || !group.shape) {
    choose(null);
    draw();
    return;
  }
  const handle = event.target.handle;
  choose(group.shape);
  drag = {shape: group.shape, from: point(event), numbers: group.shape.numbers.slice(), handle, far: false};
  svg.setPointerCapture(event.pointerId);
  draw();
  focusChosen();
  event.preventDefault();
});

svg.addEventListener('pointermove', (event) => {
  if (!drag) return;
  const [x, y] = point(event), [x0, y0] = drag.from;
  drag.far = drag.far || Math.hypot(x - x0, y - y0) > 3;
  if (!drag.far) return;
  put(drag.shape, drag.handle
    ? pulled(drag.shape, drag.numbers, drag.handle, x, y)
    : moved(drag.shape, drag.numbers, x - x0, y - y0));
  draw();
});

function drop() {
  if (!drag) return;
  const {shape, far} = drag;
  drag = null;
  if (far) {
    say(describe(shape));
    commit();
  } else {
    load();
  }
}
svg.addEventListener('pointerup', drop);
svg.addEventListener('pointercancel', drop);

// Chromium makes an <svg> that listens to focus itself a stop of Tab.
element.addEventListener('focusin', (event) => {
  const group = event.target.closest('g');
  if (group && group.shape && !same(group.shape, selected)) {
    choose(group.shape);
    draw();
  }
});

svg.addEventListener('keydown', (event) => {
  const group = event.target.closest('g');
  if (!group || !group.shape) return;
  const shape = group.shape, step = event.shiftKey ? 50 : 10, old = shape.numbers;
  const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (way) put(shape, moved(shape, old, way[0] * step, way[1] * step));
  else if (event.key === '+' || event.key === '=') put(shape, scaled(shape, old, step));
  else if (event.key === '-' || event.key === '_') put(shape, scaled(shape, old, -step));
  else if (shape.name === 'blob' && event.key === '[') put(shape, [...old.slice(0, 4), old[4] + 5]);
  else if (shape.name === 'blob' && event.key === ']') put(shape, [...old.slice(0, 4), old[4] - 5]);
  else if (event.key === 'Delete' || event.key === 'Backspace') remove(shape);
  else if (event.key === 'Enter') rename(shape);
  else return;
  event.preventDefault();
  if (event.key.length === 1 || way) {
    draw();
    say(describe(shape));
    soon();
  }
});

function rename(shape) {
  const line = [...table.children].find((other) => same(other.shape, shape));
  if (line) line.querySelector('input').focus();
}

svg.addEventListener('dblclick', (event) => {
  const group = event.target.closest('g');
  if (group && group.shape) rename(group.shape);
});

bar.addEventListener('click', (event) => {
  const button = event.target.closest('[data-add]');
  if (button) add(button.dataset.add);
});

table.addEventListener('change', (event) => {
  const line = event.target.closest('tr'), shape = line.shape;
  const inputs = [...line.querySelectorAll('input')];
  if (event.target === inputs[0]) {
    const words = inputs[0].value.trim();
    if (words) state.latents[shape.name].parts[shape.part].phrase = words;
  } else {
    const numbers = inputs.slice(1).map((input, i) => {
      const value = input.valueAsNumber;
      return Number.isFinite(value) ? value : shape.numbers[i];
    });
    put(shape, numbers);
  }
  choose(shape);
  draw();
  // Drawing leaves the field in use as it is; here it must show what was made of it.
  event.target.value = [line.shape.phrase, ...line.shape.numbers][inputs.indexOf(event.target)];
  commit();
});

table.addEventListener('click', (event) => {
  if (event.target.closest('button')) remove(event.target.closest('tr').shape);
});

// ---- what the server says ----------------------------------------------------------------------

function load() {
  let next;
  try {
    next = JSON.parse(props.value || '{}');
  } catch (error) {
    return;
  }
  if (!next.latents) return;
  if (next.load !== state.load) {
    // Another picture: what is being dragged is not on it.
    drag = null;
    clearTimeout(timer);
    timer = null;
    choose(null);
  } else if (drag || timer || next.rev < state.rev) {
    return;  // an answer to an older state must not undo what was dragged since
  }
  state = next;
  draw();
}

watch(['value', 'image'], () => {
  load();
  const under = svg.querySelector('.k-under');
  if (under) under.setAttribute('href', props.image || '');
});
load();
draw();
