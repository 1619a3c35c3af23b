// The model in this browser, through wllama (llama.cpp in WebAssembly). Nothing is fetched from another host.
import { t } from './words.js';
import { Wllama } from './wllama/index.min.js';

const FORCE = 1e4; // logits; the log-probabilities that come back are those without it

/** Whether the browser has what wllama needs; a sentence for what is missing, else null. */
export function missing() {
  if (typeof WebAssembly !== 'object') return t('This browser has no WebAssembly. Use a current Chrome, Firefox or Safari.');
  const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
  if (!WebAssembly.validate(new Uint8Array(simd))) return t('This browser has no WebAssembly SIMD, which the model needs. Use a newer browser or phone (Chrome 91, Firefox 89, Safari 16.4 or later).');
  return null;
}

/** Without these two, wllama takes its slower build for Safari and older browsers. */
export function needsCompat() {
  if (!WebAssembly.Suspending) return true;
  try {
    new WebAssembly.Memory({ address: 'i64', initial: 1n });
    return false;
  } catch {
    return true;
  }
}

/** The parts of the model as blobs, from the browser's storage or the server; told(bytes, total) while they come. */
export async function fetchModel(page, told) {
  const store = await openStore(page.sha256);
  const blobs = [];
  let before = 0, stored = store !== null, why = store ? '' : t('this address gives no storage (http from another machine, or a private window)');
  for (const part of page.parts) {
    const key = `/${part.sha256}`; // not its address: workbook serve gives the same file a new one each time
    const kept = store && (await store.match(key));
    const blob = kept ? await kept.blob() : await download(part, (bytes) => told(before + bytes, page.bytes));
    if (blob.size !== part.bytes) throw new Error(t('{url} came with {size} of {bytes} bytes. Load the page again.', { ...part, size: blob.size }));
    if (store && !kept) {
      try {
        await store.put(key, new Response(blob));
      } catch (error) {
        [stored, why] = [false, t('the browser refused the storage ({error})', { error: error.message })];
      }
    }
    blobs.push(blob);
    before += blob.size;
    told(before, page.bytes);
  }
  return { blobs, stored, why };
}

async function openStore(sha256) {
  try {
    await navigator.storage?.persist?.();
    return await caches.open(`model-${sha256}`);
  } catch {
    return null;
  }
}

/** Remove every model and page of this origin from the browser. */
export async function forget() {
  for (const name of await caches.keys()) if (/^(model-|page )/.test(name)) await caches.delete(name);
  for (const worker of (await navigator.serviceWorker?.getRegistrations()) ?? []) await worker.unregister();
}

async function download(part, told) {
  const response = await fetch(part.url);
  if (!response.ok) throw new Error(t('{url}: the server answers {status}', { url: part.url, status: response.status }));
  if (!response.body) return response.blob();
  const pieces = [];
  let bytes = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return new Blob(pieces);
    pieces.push(value);
    bytes += value.length;
    told(bytes);
  }
}

export class Engine {
  constructor(page, info) {
    Object.assign(this, { page, info, wllama: null, seconds: 0, compat: needsCompat() });
  }

  /** Load the model, again if it is loaded; the seconds that took. */
  async load(blobs) {
    await this.wllama?.exit();
    const silent = { debug() {}, log() {}, warn() {}, error: console.error };
    this.wllama = new Wllama({ default: './wllama/wllama.wasm' }, { suppressNativeLog: true, logger: silent });
    this.wllama.setCompat({ worker: new URL('./wllama/compat.js', location.href).href, wasm: './wllama/compat.wasm' });
    const parts = blobs.map((blob, i) => new File([blob], this.page.parts[i].url.split('/').at(-1)));
    const started = performance.now();
    await this.wllama.loadModel(parts, {
      n_ctx: this.info.n_ctx, n_parallel: 1, n_gpu_layers: 0, flash_attn: true, warmup: false,
    });
    this.seconds = (performance.now() - started) / 1000;
    this.ends = new Set(this.wllama.getLoadedContextInfo().list_tokens_eog);
    this.addsBegin = this.wllama.mustAddBosToken();
    return this.seconds;
  }

  get threads() { return this.wllama.isMultithread() ? this.wllama.getNumThreads() : 1; }

  /** Greedy answer to a prompt, in pieces: onText(all of it so far). The timings of llama.cpp's server. */
  async write(prompt, onText, options = {}, abortSignal = undefined) {
    let text = '', timings = null;
    const onData = (chunk) => {
      timings = chunk.timings ?? timings;
      onText((text += chunk.choices[0]?.text ?? ''));
    };
    const asked = { prompt, temperature: 0, max_tokens: this.info.max_tokens, ...options };
    await this.wllama.createCompletion({ ...asked, stream: true, onData, abortSignal });
    return timings;
  }

  /**
   * Token ids of the greedy answer, without the one that ends it, and the number of tokens of the prompt.
   * Throws where the answer is cut inside a character: the runtime cannot return such a text.
   */
  async ids(prompt, max_tokens) {
    const asked = { prompt, temperature: 0, max_tokens, cache_prompt: false, verbose: true, return_tokens: true };
    const answer = await this.wllama.createCompletion(asked);
    return { ids: answer.__verbose.tokens.filter((id) => !this.ends.has(id)), promptTokens: answer.usage.prompt_tokens };
  }

  /** Log-probability (nats) of every label as the answer to a prompt, in the order of model_info.json. */
  async score(prompt) {
    const scores = [], asked = { temperature: 0, max_tokens: 1, logprobs: 1, cache_prompt: true };
    let first = null;
    for (const { ids, name } of this.info.labels) {
      let total = 0, given = prompt;
      for (const id of ids) { // token by token, each given those before it
        const answer = await this.wllama.createCompletion({ ...asked, prompt: given, logit_bias: [[id, FORCE]] });
        const [step] = answer.choices[0].logprobs.content;
        if (step.id !== id) throw new Error(t('the label {name} cannot be scored: token {id} came back as {other}', { name, id, other: step.id }));
        total += step.logprob;
        given += step.token;
        first ??= answer;
      }
      scores.push(total);
    }
    return { scores, promptTokens: first.usage.prompt_tokens, timings: first.timings };
  }
}

/** Shares from log-probabilities. */
export function shares(scores) {
  const top = Math.max(...scores);
  const raised = scores.map((score) => Math.exp(score - top));
  const sum = raised.reduce((a, b) => a + b);
  return raised.map((value) => value / sum);
}
