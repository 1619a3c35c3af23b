// The page's words in the language of the browser: English, or what words.json says in Chinese.
const FILE = 'words.json';
let words = {};

/** Of English and Chinese the one that the browser names first. */
const wanted = () => (navigator.languages ?? [navigator.language ?? '']).find((each) => /^(zh|en)\b/i.test(each)) ?? 'en';

/** Look the words up, and translate what stands in the page already. */
export async function speak() {
  if (!/^zh/i.test(wanted())) return;
  const response = await fetch(FILE).catch(() => null);
  if (!response?.ok) return; // a package without them
  words = (await response.json()).zh;
  document.documentElement.lang = 'zh-CN';
  for (const each of document.querySelectorAll('[data-t]')) each.textContent = t(each.textContent.trim());
}

/** An English text with {values}, in the language of the page. */
export function t(text, values = {}) {
  return (words[text] ?? text).replace(/\{(\w+)\}/g, (all, name) => values[name] ?? all);
}
