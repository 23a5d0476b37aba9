// SPDX-License-Identifier: Apache-2.0
// Opens examples/web in a headless Chromium, completes texts as a person would, and keeps pictures of the page.
//
//     node open_page.mjs FOLDER_HOLDING_node_modules PATH_OF_CHROMIUM
//
// Reads {"url", "dark", "width", "runs": [{"text", "new_tokens", "recompute", "screenshot", "stop"}]} as JSON from stdin;
// writes {"versions", "facts", "failure", "answers", "requests", "messages"} to stdout. One answer a run: what the page
// shows; `stop`: press Stop as soon as it writes.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const modules = createRequire(join(process.argv[2], "package.json"));
const { chromium } = modules("playwright-core");
const request = JSON.parse(readFileSync(0, "utf8"));
const MINUTES = 60_000;

const QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const browser = await chromium.launch({
  executablePath: process.argv[3],
  args: ["--no-sandbox", "--disable-component-update", "--disable-sync", ...QUIET],
});
const viewport = { width: request.width ?? 960, height: 1000 };
const page = await browser.newPage({ viewport, colorScheme: request.dark ? "dark" : "light" });
const requests = [];
const messages = [];
page.on("request", (made) => requests.push(made.url()));
page.on("console", (message) => messages.push(`${message.type()}: ${message.text()}`));
page.on("pageerror", (error) => messages.push(`error: ${error}`));

await page.goto(request.url);
const failure = page.locator("#failure");
await Promise.race([
  page.locator("#start:enabled").waitFor({ timeout: 2 * MINUTES }),
  failure.waitFor({ timeout: 2 * MINUTES }),
]);

const answers = [];
const runs = (await failure.isVisible()) ? [] : request.runs;
for (const { text, new_tokens, recompute, screenshot, stop } of runs) {
  await page.fill("#new", String(new_tokens));
  await page.fill("#prompt", "");
  await page.locator("#counts", { hasText: /^0 tokens/ }).waitFor();
  await page.fill("#prompt", text);
  await page.locator("#counts", { hasNotText: /^0 tokens/ }).waitFor();
  await page.setChecked("#recompute", recompute);
  const counts = await page.textContent("#counts");
  await page.click("#start");
  if (stop) {
    await page.locator("#status", { hasText: /^Writing/ }).waitFor({ timeout: MINUTES });
    await page.click("#stop");
  }
  await Promise.race([
    page.locator("#details").waitFor({ timeout: 5 * MINUTES }),
    failure.waitFor({ timeout: 5 * MINUTES }),
  ]);
  answers.push({
    counts,
    failure: (await failure.isVisible()) ? await failure.innerText() : null,
    tokens: (await page.textContent("#tokens")).split(" ").filter(Boolean).map(Number),
    output: await page.innerText("#output"),
    outcome: await page.textContent("#outcome"),
  });
  if (screenshot) {
    await page.screenshot({ path: screenshot, fullPage: true });
  }
}
const told = (await failure.isVisible()) ? await failure.innerText() : null;
const facts = await page.textContent("#model");
const versions = { chromium: browser.version(), "playwright-core": modules("playwright-core/package.json").version };
await browser.close();
process.stdout.write(JSON.stringify({ versions, facts, failure: told, answers, requests, messages }));
