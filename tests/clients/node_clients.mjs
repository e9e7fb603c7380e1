// HTTP clients of node against builtin:echo: node_clients.mjs CLIENT PORT. One line a behaviour: its name, then `ok` or why not.
// `echo` has 4 MiB as its limit for bodies (see scripts/clients).

import assert from "node:assert";
import http from "node:http";
import { createRequire } from "node:module";
import { setTimeout as sleep } from "node:timers/promises";

const [client, portText] = process.argv.slice(2);
const port = Number(portText);
const MIB = 1 << 20;
const pieces = Array.from({ length: 100 }, (_, n) => `${String(n).padStart(6, "0")}\n`.repeat(1000));
const whole = pieces.join("");

async function text(stream, pause = 0) {
  let all = "";
  for await (const piece of stream) {
    all += piece;
    if (pause) await sleep(pause);
  }
  return all;
}

function nodeHttp() {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  const ask = (options, write) =>
    new Promise((resolve, reject) => {
      const request = http.request({ host: "127.0.0.1", port, agent, path: "/", ...options }, resolve);
      request.on("error", reject);
      write ? write(request) : request.end();
    });
  return {
    async keep_alive() {
      const remotes = new Set();
      for (let n = 0; n < 5; n++) remotes.add(JSON.parse(await text(await ask({}))).remote);
      assert.equal(remotes.size, 1);
    },
    async chunked() {
      const answer = await ask({ method: "POST" }, (request) => {
        for (const piece of pieces) request.write(piece);
        request.end();
      });
      assert.equal(JSON.parse(await text(answer)).body, whole);
    },
    async expect() {
      let continued = false;
      const headers = { Expect: "100-continue", "Content-Length": whole.length };
      const answer = await ask({ method: "POST", headers }, (request) => {
        request.on("continue", () => ((continued = true), request.end(whole)));
        request.flushHeaders();
      });
      assert.equal(JSON.parse(await text(answer)).body, whole);
      assert(continued);
    },
    async early() {
      const answer = await ask({ method: "POST", headers: { "Content-Length": 20 * MIB } }, (request) => request.end(Buffer.alloc(20 * MIB)));
      assert.equal(answer.statusCode, 413);
      await text(answer);
      assert.equal((await ask({})).statusCode, 200, "the next request finds a connection of its own");
    },
    async slow_read() {
      const answer = await ask({ method: "POST" }, (request) => request.end("x".repeat(3 * MIB)));
      const all = await text(answer, 5);
      assert.equal(all.length, Number(answer.headers["content-length"]));
    },
  };
}

function undici() {
  const { Client, request } = createRequire(`${process.env.NODE_CLIENTS}/`)("undici");
  const one = (pipelining) => new Client(`http://127.0.0.1:${port}`, { pipelining });
  const remotesOf = async (client, count) => {
    const answers = Array.from({ length: count }, (_, n) => client.request({ path: `/${n}`, method: "GET" }));
    const seen = await Promise.all(answers.map(async (answer) => JSON.parse(await (await answer).body.text())));
    seen.forEach((echo, n) => assert.equal(echo.path, `/${n}`));
    await client.close();
    return new Set(seen.map((echo) => echo.remote)).size;
  };
  return {
    async keep_alive() {
      assert.equal(await remotesOf(one(1), 5), 1);
    },
    async pipelining() {
      assert.equal(await remotesOf(one(10), 100), 1);
    },
    async chunked() {
      const answer = await request(`http://127.0.0.1:${port}/`, { method: "POST", body: pieces.values().map?.((p) => Buffer.from(p)) ?? pieces.map((p) => Buffer.from(p)) });
      assert.equal(JSON.parse(await answer.body.text()).body, whole);
    },
    async early() {
      const answer = await request(`http://127.0.0.1:${port}/`, { method: "POST", body: Buffer.alloc(20 * MIB) });
      assert.equal(answer.statusCode, 413);
      await answer.body.dump();
    },
    async slow_read() {
      const answer = await request(`http://127.0.0.1:${port}/`, { method: "POST", body: "x".repeat(3 * MIB) });
      const all = await text(answer.body, 5);
      assert.equal(all.length, Number(answer.headers["content-length"]));
    },
  };
}

const behaviours = { "node http": nodeHttp, undici }[client]();
for (const [name, behave] of Object.entries(behaviours)) {
  try {
    await Promise.race([behave(), sleep(60_000).then(() => assert.fail("no end after 60 s"))]);
    console.log(name, "ok");
  } catch (error) {
    console.error(error);
    console.log(name, String(error).replaceAll("\n", " ").slice(0, 200));
  }
}
process.exit(0);
