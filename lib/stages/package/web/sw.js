// Use without a network: the page's small files are kept as they were last seen; the model's parts the page keeps itself.
const NAME = `page ${self.registration.scope}`;
const FILES = ['./', 'index.html', 'style.css', 'app.js', 'engine.js', 'measure.js', 'prompt.js', 'sha256.js', 'words.js', 'words.json', 'page.json', 'rows.json',
  '../model_info.json', 'wllama/index.min.js', ...(compat() ? ['wllama/compat.js', 'wllama/compat.wasm'] : ['wllama/wllama.wasm'])];

/** As needsCompat of engine.js: which of the two builds this browser takes. */
function compat() {
  try {
    new WebAssembly.Memory({ address: 'i64', initial: 1n });
    return !WebAssembly.Suspending;
  } catch {
    return true;
  }
}

self.addEventListener('install', (event) => {
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(FILES)).then(() => self.skipWaiting()));
});
self.addEventListener('activate', (event) => event.waitUntil(self.clients.claim()));

/** The answer with the headers that several threads need, for servers that do not send them. */
function isolated(response) {
  if (response.status === 0) return response;
  const headers = new Headers(response.headers);
  headers.set('Cross-Origin-Opener-Policy', 'same-origin');
  headers.set('Cross-Origin-Embedder-Policy', 'require-corp');
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

async function answer(request) {
  const cache = await caches.open(NAME);
  try {
    const fresh = await fetch(request);
    if (fresh.status === 200) await cache.put(request, fresh.clone());
    return isolated(fresh);
  } catch (error) {
    const kept = await cache.match(request, { ignoreSearch: true });
    if (kept) return isolated(kept);
    throw error;
  }
}

self.addEventListener('fetch', (event) => {
  const { request } = event;
  const own = new URL(request.url).origin === location.origin;
  if (request.method === 'GET' && own && !request.url.endsWith('.gguf')) event.respondWith(answer(request));
});
