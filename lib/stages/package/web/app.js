// The page: load, ask, measure.
import { Engine, fetchModel, forget, missing, needsCompat, shares } from './engine.js';
import { measure, median } from './measure.js';
import { messagesFor, render } from './prompt.js';
import { speak, t } from './words.js';

const $ = (id) => document.getElementById(id);
const show = (id, on = true) => { $(id).hidden = !on; };
const say = (id, text) => { $(id).textContent = text; };
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;
const state = { page: null, info: null, rows: null, engine: null, blobs: null, turns: [], busy: false, abort: null, posts: false };
window.workbook = state; // for tests and for curious readers

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}
const notice = (text) => $('notices').append(element('li', text));

/** Run one thing at a time; what fails is said where it was asked for. */
async function during(where, work) {
  if (state.busy) return;
  state.busy = true;
  const buttons = [...document.querySelectorAll('button:not(#stop)')];
  for (const button of buttons) button.disabled = true;
  try {
    await work();
  } catch (error) {
    say(where, t('It failed: {error}.', { error: sentence(error) }));
    console.error(error);
  } finally {
    for (const button of buttons) button.disabled = false;
    state.busy = false;
  }
}

function sentence(error) {
  const text = String(error?.message ?? error).replace(/[.。]$/, '');
  if (error instanceof RangeError || /memory|allocat|out of bounds/i.test(text)) return t('{text} – most likely the memory does not suffice: close other pages, or package a smaller file', { text });
  return text;
}

function warn() {
  if (!self.crossOriginIsolated) {
    notice(self.isSecureContext
      ? t('One thread only: the server does not send the headers COOP and COEP. Loading this page once more may help.')
      : t('One thread only, and nothing is kept for use offline: the address is plain http, not https or localhost.'));
  }
  if (needsCompat()) notice(t('This browser takes the slower build of the runtime (it lacks JSPI or 64-bit WebAssembly memory).'));
  const memory = navigator.deviceMemory;
  if (memory && state.page.bytes * 1.5 > memory * 1e9) notice(t('The model needs about {size}; this device reports {memory} GB of memory.', { size: megabytes(state.page.bytes * 1.5), memory }));
}

async function load() {
  show('progress');
  const { page } = state;
  const { blobs, stored, why } = await fetchModel(page, (bytes, total) => {
    $('progress').value = bytes / total;
    say('loaded', t('{part} of {whole}', { part: megabytes(bytes), whole: megabytes(total) }));
  });
  say('loaded', t('Starting the model …'));
  const engine = new Engine(page, state.info);
  const seconds = await engine.load(blobs);
  Object.assign(state, { engine, blobs });
  show('progress', false);
  show('load', false);
  const kept = stored ? t('Kept in this browser: the page also works without a network.') : t('Not kept in this browser: {why}.', { why });
  const started = { seconds: seconds.toFixed(2), threads: engine.threads, kept };
  say('loaded', engine.threads === 1 ? t('Loaded in {seconds} s, {threads} thread. {kept}', started) : t('Loaded in {seconds} s, {threads} threads. {kept}', started));
  show('forget', stored);
  show('asking');
  show('measuring');
}

function drawLabels(scores) {
  const parts = shares(scores), top = parts.indexOf(Math.max(...parts));
  $('labels').replaceChildren(...state.info.labels.map(({ name }, i) => {
    const row = element('div', undefined, i === top ? 'label best' : 'label');
    const line = element('div', undefined, 'name'), bar = element('div', undefined, 'bar'), filled = element('span');
    line.append(element('span', name), element('span', `${(100 * parts[i]).toFixed(1)} %`));
    filled.style.width = `${100 * parts[i]}%`;
    bar.append(filled);
    row.append(line, bar);
    return row;
  }));
}

async function classify(text) {
  const prompt = render(messagesFor(text, state.info), state.info, state.engine.addsBegin);
  const started = performance.now();
  const { scores, promptTokens, timings } = await state.engine.score(prompt);
  drawLabels(scores);
  const seconds = (performance.now() - started) / 1000;
  say('speed', t('{tokens} tokens read, {speed} tokens/s; {seconds} s in all. Probabilities of the labels against each other.', {
    tokens: promptTokens, speed: timings.prompt_per_second.toFixed(0), seconds: seconds.toFixed(2),
  }));
}

async function chat(text) {
  const { info, engine, turns } = state;
  const messages = [{ role: 'system', content: info.system }, ...turns, { role: 'user', content: text }];
  const own = element('div', '…', 'turn');
  $('conversation').append(element('div', text, 'turn user'), own);
  $('text').value = '';
  state.abort = new AbortController();
  show('stop');
  let written = '';
  try {
    const prompt = render(messages, info, engine.addsBegin);
    const timings = await engine.write(prompt, (all) => { own.textContent = written = all; }, {}, state.abort.signal);
    if (timings) {
      say('speed', t('{tokens} tokens at {speed} tokens/s; prompt at {prompt} tokens/s.', {
        tokens: timings.predicted_n, speed: timings.predicted_per_second.toFixed(1), prompt: timings.prompt_per_second.toFixed(0),
      }));
    }
  } catch (error) {
    if (!state.abort.signal.aborted) throw error;
    say('speed', t('Stopped.'));
  } finally {
    show('stop', false);
    own.textContent = written || t('(no text)');
  }
  turns.push({ role: 'user', content: text }, { role: 'assistant', content: written });
  show('clear');
}

const spread = (values, digits, unit) => t('{median} {unit} ({least} to {most}, {runs} runs)', {
  median: median(values).toFixed(digits), unit, least: Math.min(...values).toFixed(digits), most: Math.max(...values).toFixed(digits), runs: values.length,
});

function drawResult(result) {
  const { device, runtime, load, prompt, generation, checks, rows } = result;
  const lines = [
    [t('device'), device.name], [t('browser'), device.browser],
    [t('threads'), runtime.compat ? t('{threads}, slower build', { threads: runtime.threads }) : runtime.threads],
    [t('load'), spread(load.seconds, 2, 's')], [t('prompt, {tokens} tokens', prompt), spread(prompt.tokens_per_second, 0, 'tokens/s')],
    [t('generation, {tokens} tokens', generation), spread(generation.tokens_per_second, 1, 'tokens/s')],
    [t('answers as stored'), t('{exact} of {n}; {same_tokens} of {tokens} tokens', checks)],
  ];
  if (rows.n) {
    const gap = rows.largest_gap_nats.toFixed(3);
    lines.push([t('labels as stored'), t('{agree} of {n}; margins differ by at most {gap} nats', { ...rows, gap })], [t('rows'), t(rows.source)]);
  }
  $('result').replaceChildren(...lines.map(([name, value]) => {
    const line = element('tr');
    line.append(element('th', name), element('td', value));
    return line;
  }));
  show('result');
}

async function send(result) {
  if (!state.posts) return;
  const response = await fetch('../result', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(result) }).catch((error) => ({ ok: false, status: error.message }));
  say('sent', response.ok ? t('Sent to the machine that serves this page.') : t('Not sent ({status}); download it instead.', response));
}

async function remove() {
  await forget();
  show('forget', false);
  say('loaded', t('Removed from this browser; it works until the page is closed.'));
}

async function measureAll() {
  const result = await measure(state.engine, state.blobs, state.rows, (text) => say('measure-status', text));
  state.result = result;
  say('measure-status', t('Done.'));
  drawResult(result);
  const link = $('download');
  link.href = URL.createObjectURL(new Blob([JSON.stringify(result, null, 1)], { type: 'application/json' }));
  link.download = `${result.file.replace(/\.gguf$/, '')}-phone.json`;
  link.hidden = false;
  await send(result);
}

function prepare() {
  const { page, info } = state, labelled = info.labels.length > 0;
  document.title = page.title;
  say('title', page.title);
  say('about', t('{file}, {size}. Run {run}. It runs in this browser; nothing that you type leaves it.', { ...page, size: megabytes(page.bytes) }));
  for (const text of page.notes) notice(t(text));
  say('asking-title', labelled ? t('Classify a text') : t('Chat'));
  say('send', labelled ? t('Classify') : t('Send'));
  say('load', t('Load the model ({size})', { size: megabytes(page.bytes) }));
  say('measure-about', labelled
    ? t('Speed over several runs, and {rows} packaged rows against the stored answers ({source}). Takes a minute or more; keep the page open.', { rows: state.rows.rows.length, source: t(state.rows.source) })
    : t('Speed over several runs, and the packaged questions against the stored answers. Takes a minute or more; keep the page open.'));
  for (const text of info.examples) {
    const button = element('button', text);
    button.onclick = () => { $('text').value = text; };
    $('examples').append(button);
  }
  $('load').onclick = () => during('loaded', load);
  $('forget').onclick = () => during('loaded', remove);
  $('measure').onclick = () => during('measure-status', measureAll);
  $('stop').onclick = () => state.abort?.abort();
  $('clear').onclick = () => { state.turns = []; $('conversation').replaceChildren(); show('clear', false); };
  $('form').onsubmit = (event) => {
    event.preventDefault();
    const text = $('text').value.trim();
    if (text) during('speed', () => (labelled ? classify(text) : chat(text)));
  };
}

async function start() {
  await speak();
  const lack = missing();
  if (lack) { say('about', lack); return; }
  const read = async (url) => {
    const response = await fetch(url);
    if (!response.ok) throw new Error(t('{url}: the server answers {status}', { url, status: response.status }));
    state.posts = response.headers.get('X-Workbook-Phone') === '1';
    return response.json();
  };
  try {
    [state.page, state.info, state.rows] = await Promise.all(['page.json', '../model_info.json', 'rows.json'].map(read));
  } catch (error) {
    say('about', t('The package is not complete here ({error}). Serve the whole package folder, not web/ alone, e.g. with workbook serve --phone.', { error: error.message }));
    return;
  }
  warn();
  prepare();
  $('load').disabled = false;
  try {
    await navigator.serviceWorker?.register('sw.js');
  } catch (error) {
    notice(t('The page is not kept for use offline ({error}).', { error: error.message }));
  }
}

start();
