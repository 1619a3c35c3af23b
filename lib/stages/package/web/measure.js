// "Measure this phone": loading, speed, and whether it answers as the machine that packed the model did.
import { messagesFor, render } from './prompt.js';
import { sha256 } from './sha256.js';
import { t } from './words.js';

const LOADS = 3, RUNS = 5, PROMPT = 128, WRITTEN = 32;

export const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};
const best = (values) => values.indexOf(Math.max(...values));
const margins = (values) => values.map((value) => value - Math.max(...values));

/** All measurements; told(sentence) while they run. The keys are checked by `workbook serve --phone`. */
export async function measure(engine, blobs, rows, told) {
  told(t('Computing the file’s SHA-256 …'));
  const { page } = engine;
  const digest = page.parts.length === 1 ? await sha256(blobs) : await partsDigest(page, blobs);
  if (digest !== page.sha256) throw new Error(t('the file’s SHA-256 is not that of the packaged file. Clear this page’s storage and load it again'));
  const load = { seconds: [engine.seconds] };
  while (load.seconds.length < LOADS) {
    told(t('Loading, run {run} of {runs} …', { run: load.seconds.length + 1, runs: LOADS }));
    load.seconds.push(await engine.load(blobs));
  }
  const speed = await speeds(engine, told);
  const checks = await answers(engine, blobs, told);
  return {
    format: 1, run: engine.page.run, file: engine.page.file, sha256: digest, measured: new Date().toISOString(),
    device: await device(), load, ...speed, checks, rows: await compareRows(engine, rows, told),
    runtime: { wllama: engine.page.wllama, threads: engine.threads, isolated: self.crossOriginIsolated === true, compat: engine.compat },
  };
}

/** The whole file's digest stands for its parts when every part has the digest that was packed. */
async function partsDigest(page, blobs) {
  for (const [i, part] of page.parts.entries()) if ((await sha256([blobs[i]])) !== part.sha256) return '';
  return page.sha256;
}

async function speeds(engine, told) {
  const check = engine.info.checks[0];
  const question = render(messagesFor(check.text, engine.info), engine.info, engine.addsBegin);
  const copies = Math.ceil(PROMPT / check.prompt_ids.length);
  const long = question.repeat(copies);
  const prompt = { tokens: 0, tokens_per_second: [] }, generation = { tokens: 0, tokens_per_second: [] };
  for (let run = 0; run <= RUNS; run++) { // the first one warms up
    told(run ? t('Speed, run {run} of {runs} …', { run, runs: RUNS }) : t('Speed, warming up …'));
    const read = await engine.write(long, () => {}, { max_tokens: 1, cache_prompt: false });
    const wrote = await engine.write(question, () => {}, { max_tokens: WRITTEN, ignore_eos: true, cache_prompt: false });
    if (!run) continue;
    [prompt.tokens, generation.tokens] = [read.prompt_n, wrote.predicted_n];
    prompt.tokens_per_second.push(read.prompt_per_second);
    generation.tokens_per_second.push(wrote.predicted_per_second);
  }
  return { prompt, generation };
}

/** The stored prompts of model_info.json: greedy tokens against the stored ones, up to the first difference. */
async function answers(engine, blobs, told) {
  const found = { n: 0, exact: 0, tokens: 0, same_tokens: 0, prompts_as_stored: 0 };
  for (const check of engine.info.checks) {
    told(t('Answering check {check} of {checks} …', { check: found.n + 1, checks: engine.info.checks.length }));
    const prompt = render(messagesFor(check.text, engine.info), engine.info, engine.addsBegin);
    const { ids, promptTokens, stored } = await greedy(engine, blobs, prompt, check);
    let same = 0;
    while (same < stored.length && ids[same] === stored[same]) same++;
    found.n += 1;
    found.exact += same === stored.length && ids.length === same;
    found.tokens += stored.length;
    found.same_tokens += same;
    found.prompts_as_stored += promptTokens === check.prompt_ids.length;
  }
  return found;
}

/** The greedy answer to a stored prompt; a text cut inside a character is asked for again, a token shorter. */
async function greedy(engine, blobs, prompt, check) {
  for (let cut = 0; ; cut++) {
    const most = engine.page.checked_tokens - cut;
    try {
      return { ...(await engine.ids(prompt, most)), stored: check.ids.slice(0, most) };
    } catch (error) {
      if (cut === 3 || most === 1) throw error;
      await engine.load(blobs); // what the failure left behind is not known
    }
  }
}

/** Labels and margins of the packaged rows against the stored ones. */
async function compareRows(engine, rows, told) {
  const found = { n: 0, agree: 0, largest_gap_nats: null, source: rows.source };
  for (const row of engine.info.labels.length ? rows.rows : []) {
    told(t('Row {row} of {rows} …', { row: found.n + 1, rows: rows.rows.length }));
    const prompt = render(messagesFor(row.text, engine.info), engine.info, engine.addsBegin);
    const { scores } = await engine.score(prompt);
    const [here, stored] = [margins(scores), margins(row.labels)];
    found.n += 1;
    found.agree += best(scores) === best(row.labels);
    found.largest_gap_nats = Math.max(found.largest_gap_nats ?? 0, ...here.map((value, i) => Math.abs(value - stored[i])));
  }
  return found;
}

async function device() {
  const data = navigator.userAgentData;
  const more = data?.getHighEntropyValues ? await data.getHighEntropyValues(['model', 'platformVersion', 'architecture']).catch(() => ({})) : {};
  const brands = (data?.brands ?? []).filter(({ brand }) => !/not.?a.?brand/i.test(brand)).map(({ brand, version }) => `${brand} ${version}`);
  const fallback = /\(([^)]*)\)/.exec(navigator.userAgent)?.[1] ?? 'unknown device';
  return {
    name: more.model || [data?.platform, more.architecture].filter(Boolean).join(' ') || fallback,
    browser: brands.join(', ') || navigator.userAgent.split(' ').slice(-2).join(' '),
    user_agent: navigator.userAgent, cores: navigator.hardwareConcurrency ?? null, memory_gb: navigator.deviceMemory ?? null,
  };
}
