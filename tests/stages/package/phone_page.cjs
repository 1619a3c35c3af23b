// Drives the phone page: node phone_page.cjs MODULES BROWSER ADDRESS TEXT [measure] [compat] [without=PID of the server] → JSON on stdout.
const [modules, executablePath, address, text, ...wanted] = process.argv.slice(2);
const { chromium } = require(`${modules}/playwright-core`);

async function main() {
  const browser = await chromium.launch({ executablePath, args: ['--no-sandbox'] });
  const page = await browser.newPage({ viewport: { width: 390, height: 844 } });
  const errors = [], hosts = new Set();
  page.on('pageerror', (error) => errors.push(error.message));
  page.on('request', (request) => { if (request.url().startsWith('http')) hosts.add(new URL(request.url()).hostname); });
  if (wanted.includes('compat')) await page.addInitScript(() => { delete WebAssembly.Suspending; });
  const ask = async () => {
    await page.waitForSelector('#load:not([disabled])');
    await page.click('#load');
    await page.waitForSelector('#asking:not([hidden])', { timeout: 60000 });
    await page.fill('#text', text);
    await page.click('#send');
    await page.waitForFunction(() => document.querySelector('#speed').textContent && !document.querySelector('#send').disabled, null, { timeout: 60000 });
    return page.evaluate(() => ({
      shares: [...document.querySelectorAll('.label .name span:last-child')].map((each) => parseFloat(each.textContent)),
      written: document.querySelector('.turn:not(.user)')?.textContent ?? '', speed: document.querySelector('#speed').textContent,
    }));
  };
  await page.goto(address);
  const seen = await ask();
  if (wanted.includes('measure')) {
    await page.click('#measure');
    await page.waitForFunction(() => /Done|failed/.test(document.querySelector('#measure-status').textContent), null, { timeout: 150000 });
    seen.status = await page.textContent('#measure-status');
    await page.waitForFunction(() => document.querySelector('#sent').textContent, null, { timeout: 10000 }).catch(() => {});
    seen.sent = await page.textContent('#sent');
    seen.result = await page.evaluate(() => window.workbook.result ?? null);
  }
  const server = wanted.find((each) => each.startsWith('without='));
  if (server) { // the server ends, then the page is loaded again
    await page.evaluate(() => navigator.serviceWorker.ready);
    process.kill(Number(server.split('=')[1]), 'SIGTERM');
    const gone = () => fetch(address).then(() => false, () => true);
    while (!(await gone())) await new Promise((resolve) => setTimeout(resolve, 100));
    await page.reload();
    seen.offline = await ask();
  }
  const wide = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
  await browser.close();
  console.log(JSON.stringify({ ...seen, errors, wide, hosts: [...hosts] }));
}

main().catch((error) => { console.error(error); process.exit(1); });
