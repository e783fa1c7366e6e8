/**
 * Asks the server for a task, does it, sends the reply. A task is done in a fresh page: the page loads itself again
 * after each, or the browser is ended.
 */

import { measure } from "./measure.mjs";
import { browser, units } from "./units.mjs";

const DOES = { units, measure };

async function work() {
  const task = await next();
  const home = `task/${task.number}`;
  fetch(`${home}/alive`).catch(() => {}); // never ends: where it breaks, the server knows that this page is gone
  say(`Task ${task.number}: ${task.title}.`);
  navigator.wakeLock?.request("screen").catch(() => {}); // a phone that sleeps measures nothing
  const reply = { environment: browser(), ...(await DOES[task.does](task, home).catch(failure)) };
  await send(`${home}/reply`, reply);
  say("Done. Waiting for the next task.");
  location.reload();
}

/** The next task; the server lets the question wait while it has none. */
async function next() {
  for (;;) {
    const answer = await fetch("job");
    if (answer.status === 200) return answer.json();
    say("Waiting for a task.");
  }
}

async function send(address, reply) {
  // Not a number has no JSON; the server refuses what was made of it.
  const answer = await fetch(address, { method: "POST", body: JSON.stringify(reply) });
  if (!answer.ok) say(`The server refused the reply: ${answer.status}.`);
}

function failure(error) {
  if (error.status) return { status: error.status, reason: error.message };
  return { status: "failed", reason: `${error.name ?? "Error"}: ${error.message ?? error}` };
}

function say(text) {
  document.getElementById("state").textContent = text;
}

work().catch((error) => say(`Stopped: ${error}. Is vlmedge bench still running?`));
