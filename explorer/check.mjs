// Opens a page of export.py in Chromium, clicks through all of it, and fails if anything is wrong.
//
//     node explorer/check.mjs docs/explorer.html            checks the page
//     node explorer/check.mjs docs/explorer.html FOLDER     also writes pictures of it to FOLDER
//
// The page must follow people through training, as docs/explorer.html does. The environment variable CHROMIUM
// names the browser. The script talks to it through a pipe, in the Chrome DevTools Protocol: each message is
// JSON and ends with a zero byte.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [page, folder] = process.argv.slice(2);
if (!page) {
  console.error("error: name the page: node explorer/check.mjs docs/explorer.html");
  process.exit(2);
}
const WIDTH = 1280, HEIGHT = 800; // a screen that shows all of the page
const SMALL = [[1366, 650], [1000, 760], [400, 800]];

// --- the browser -------------------------------------------------------------------------------------------

const profile = mkdtempSync(join(tmpdir(), "explorer-"));
const browser = spawn(process.env.CHROMIUM ?? "chromium", [
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
  "--no-first-run", "--remote-debugging-pipe", `--user-data-dir=${profile}`, "about:blank",
], {stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"]});
browser.on("error", error => {
  rmSync(profile, {recursive: true, force: true});
  console.error(`error: cannot start the browser (${error.code}): set CHROMIUM to the path of Chromium`);
  process.exit(2);
});

const waiting = new Map(), problems = [], requests = [];
let session, onLoad, lastId = 0, received = "";
setTimeout(() => {
  console.error("error: the browser has not answered for two minutes");
  browser.kill();
  process.exit(1);
}, 120_000).unref();

browser.stdio[4].on("data", bytes => {
  received += bytes;
  const messages = received.split("\0");
  received = messages.pop();
  for (const message of messages.map(text => JSON.parse(text))) {
    if (message.id) {
      const {done, failed} = waiting.get(message.id);
      message.error ? failed(new Error(message.error.message)) : done(message.result);
    } else {
      onEvent(message.method, message.params);
    }
  }
});

function onEvent(method, params) {
  if (method === "Page.loadEventFired") onLoad?.();
  if (method === "Runtime.exceptionThrown") problems.push(params.exceptionDetails.exception?.description);
  if (method === "Runtime.consoleAPICalled") problems.push(`console.${params.type}`);
  if (method === "Log.entryAdded") problems.push(params.entry.text);
  if (method === "Network.requestWillBeSent") requests.push(params.request.url);
}

function send(method, params = {}) {
  const id = ++lastId;
  browser.stdio[3].write(JSON.stringify({id, method, params, sessionId: session}) + "\0");
  return new Promise((done, failed) => waiting.set(id, {done, failed}));
}

// --- what a reader does ------------------------------------------------------------------------------------

async function evaluate(expression) {
  const {result, exceptionDetails} = await send("Runtime.evaluate", {expression, returnByValue: true});
  assert.equal(exceptionDetails, undefined, `${expression}: ${exceptionDetails?.exception?.description}`);
  return result.value;
}

const text = selector => evaluate(`document.querySelector(${JSON.stringify(selector)}).textContent`);

async function click(selector) {
  const [x, y] = await evaluate(`(() => {
    const node = document.querySelector(${JSON.stringify(selector)});
    node.scrollIntoView({block: "nearest"});
    const box = node.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  })()`);
  for (const type of ["mouseMoved", "mousePressed", "mouseReleased"]) {
    const button = type === "mouseMoved" ? "none" : "left";
    await send("Input.dispatchMouseEvent", {type, x, y, button, clickCount: 1});
  }
}

async function press(key) {
  const letter = key.length === 1 ? {text: key} : {};
  await send("Input.dispatchKeyEvent", {type: "keyDown", key, ...letter});
  await send("Input.dispatchKeyEvent", {type: "keyUp", key});
}

async function setValue(selector, value, event) {
  await evaluate(`(() => {
    const node = document.querySelector(${JSON.stringify(selector)});
    node.value = ${JSON.stringify(value)};
    node.dispatchEvent(new Event(${JSON.stringify(event)}, {bubbles: true}));
  })()`);
}

async function picture(name) {
  if (!folder) return;
  const {data} = await send("Page.captureScreenshot", {format: "png"});
  writeFileSync(join(folder, `${name}.png`), Buffer.from(data, "base64"));
}

async function setSize(width, height) {
  await send("Emulation.setDeviceMetricsOverride", {width, height, deviceScaleFactor: 1, mobile: false});
}

async function checkSize(when) { // all of the page is visible on one screen
  const root = "document.scrollingElement";
  const [width, height] = await evaluate(`[${root}.scrollWidth, ${root}.scrollHeight]`);
  assert.ok(width <= WIDTH && height <= HEIGHT, `${when}, the page has ${width} x ${height} pixels`);
}

// --- the walk through the page -----------------------------------------------------------------------------

async function openPage() {
  const {targetInfos} = await send("Target.getTargets");
  const {targetId} = targetInfos.find(target => target.type === "page");
  session = (await send("Target.attachToTarget", {targetId, flatten: true})).sessionId;
  for (const domain of ["Runtime", "Log", "Network", "Page"]) await send(`${domain}.enable`);
  await setSize(WIDTH, HEIGHT);
  const loaded = new Promise(done => { onLoad = done; });
  await send("Page.navigate", {url: pathToFileURL(resolve(page)).href});
  await loaded;
}

async function walk() {
  await checkSize("at the start");
  await picture("light");
  const firstAnswer = await text("#answer b"), otherAnswer = await text("#other-answer b");
  assert.equal((await text("#answer")).includes("right"), true);

  await click("#token-0");
  assert.equal(await text("#tokens [aria-pressed=true]"), await text("#token-0"));
  await click("#head-1");
  const slot = await text("#rows tr.chosen td:nth-child(2)");
  await press("ArrowDown");
  assert.notEqual(await text("#rows tr.chosen td:nth-child(2)"), slot);
  await press("ArrowUp");
  assert.equal(await text("#rows tr.chosen td:nth-child(2)"), slot);
  assert.ok((await text("#example")).includes(slot));
  await press("ArrowRight");
  assert.equal(await text("#tokens [aria-pressed=true]"), await text("#token-1"));
  const before = await text("#map") + await text("#example");
  await press("l");
  await press("h");
  assert.notEqual(await text("#map") + await text("#example"), before);

  // switch off what the last name reads: this answer changes, the other one does not
  await setValue("#person", await evaluate(`document.querySelector("#person").value`), "change");
  await click("#off-all");
  assert.notEqual(await text("#answer b"), firstAnswer);
  assert.equal(await text("#other-answer b"), otherAnswer);
  assert.ok((await text("#on-all")).includes((await text("#off-all")).match(/\d+/)[0]));
  await checkSize("with rows off");
  await picture("off");
  await click("#on-all");
  assert.equal(await text("#answer b"), firstAnswer);
  const tokens = await evaluate(`document.querySelectorAll("[id^=token-]").length`);
  for (let i = 0; i < tokens; i++) { // without a memory, the answer is nonsense, and may be long
    await click(`#token-${i}`);
    await click("#off-all");
  }
  assert.equal(await evaluate(`document.querySelector("#answer b").className`), "lost");
  await checkSize("with a long answer");
  await click("#on-all");
  await press("x");
  assert.ok((await text("#on-all")).includes("(1 off)"));
  await click("#row-0");
  assert.ok((await text("#on-all")).includes("(0 off)"));
  await click("#corner [data-rank='3']");
  assert.equal(await evaluate(`document.querySelector("#rows tr.chosen").dataset.rank`), "3");
  await click("#rows tr:nth-child(6) td:nth-child(2)");
  assert.equal(await evaluate(`document.querySelector("#rows tr.chosen").dataset.rank`), "5");
  await click("#map [data-rank='0']");
  assert.equal(await evaluate(`document.querySelector("#rows tr.chosen").dataset.rank`), "0");

  await setValue("#step", "0", "input");
  assert.match(await text("#past-text"), /read at step/);
  assert.match(await text("#step-text"), /recall\s+(0|<1)%[^]* born\?/);
  assert.equal(await evaluate(`document.querySelector("#corner").closest("[inert]") !== null`), true);
  await checkSize("at an early checkpoint");
  await picture("training");
  await setValue("#step", "1000", "input"); // the browser takes the highest value

  await setValue("#prompt", await evaluate(`promptOf(people[3], 1)`), "input"); // typed, but known
  assert.deepEqual(await evaluate(`[state.person, state.question]`), [3, 1]);
  await setValue("#prompt", await evaluate("`The job of ${people[3].name} is`"), "input");
  assert.equal(await evaluate(`people[3].name.endsWith(tokenText(state.token))`), true);
  await setValue("#prompt", await evaluate(`promptOf({...people[3], name: "Zork Blat"}, 1)`), "input");
  assert.equal(await text("#tokens [aria-pressed=true]"), "t"); // an unknown name is cut into letters
  assert.match(await text("#answer"), /a memory always returns something/);
  assert.equal(await evaluate(`document.querySelector("#answer b").className`), "");
  await picture("unknown");

  await evaluate(`document.querySelector("#prompt").select()`);
  await send("Input.insertText", {text: "Wo 😀 wohnt\\tniemand?"});
  assert.equal(await evaluate(`document.querySelector("#person").value`), "");
  assert.match(await text("#tokens"), /\?/);
  await setValue("#prompt", " ", "input"); // a new line stands for no text
  assert.equal(await text("#token-0"), "⏎");
  await setValue("#person", "0", "change");
  await setValue("#question", "1", "change");
  await setValue("#other", "2", "change");
  assert.match(await text("#answer"), /right|wrong/);

  for (const word of await evaluate(`[...document.querySelectorAll("dfn")].map(node => node.dataset.term)`)) {
    await evaluate(`document.querySelector("dfn[data-term='${word}']").focus()`);
    assert.ok((await text("#explanation")).includes(": "), `${word} has no explanation`);
    await evaluate(`document.activeElement.blur()`);
  }

  await setValue("#person", "3", "change");
  for (const [width, height] of SMALL) { // nothing is too wide; switches, answers and footer are in sight
    await setSize(width, height);
    await evaluate(`scrollTo(0, 0)`);
    await click("#off-all");
    assert.equal(await evaluate(`document.scrollingElement.scrollWidth`), width);
    const bottom = id => evaluate(`document.querySelector("${id}").getBoundingClientRect().bottom`);
    const footer = height - await evaluate(`document.querySelector("footer").offsetHeight`);
    assert.equal(await bottom("footer"), height);
    for (const id of ["#off-all", "#answer", "#other-answer"]) {
      assert.ok(await bottom(id) <= footer, `${id} is out of sight: ${width} x ${height}`);
    }
    await picture(`${width}`);
    await click("#on-all");
  }
  await setSize(WIDTH, HEIGHT);

  const light = await evaluate(`getComputedStyle(document.body).backgroundColor`);
  await send("Emulation.setEmulatedMedia", {features: [{name: "prefers-color-scheme", value: "dark"}]});
  assert.notEqual(await evaluate(`getComputedStyle(document.body).backgroundColor`), light);
  await picture("dark");
  assert.deepEqual(problems, [], "the console has messages");
  assert.deepEqual(requests.filter(url => !/^(file|data):/.test(url)), [], "the page uses the network");
}

try {
  await openPage();
  await walk();
  console.log(`${page}: no errors`);
} catch (error) {
  console.error(error.message, problems);
  process.exitCode = 1;
} finally {
  session = undefined;
  await send("Browser.close").catch(() => {});
  await new Promise(done => browser.exitCode === null ? browser.on("exit", done) : done());
  rmSync(profile, {recursive: true, force: true});
}
