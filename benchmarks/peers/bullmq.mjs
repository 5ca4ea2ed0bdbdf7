// BullMQ, at its best: `concurrency`, `addBulk`, and one Node process or two. Finished jobs are kept, its default.
//
// The command line of peer.py: node peers/bullmq.mjs describe | submit WAY COUNT [SIZE] | stamp COUNT | work

import { appendFileSync } from "node:fs";
import { createRequire } from "node:module";
import { setTimeout as sleep } from "node:timers/promises";
import { Queue, Worker } from "bullmq";
import IORedis from "ioredis";

const CONCURRENCY = Number(process.env.BENCH_CONCURRENCY ?? 10);
const SUBMITTERS = 32;
const STAMP_EVERY_MS = 20;

const redis = () =>
  new IORedis(process.env.BENCH_REDIS_URL ?? "redis://127.0.0.1:6379", { maxRetriesPerRequest: null });
const queue = () => new Queue("bench", { connection: redis() });
const now = () => (performance.timeOrigin + performance.now()) / 1000;

async function run(job) {
  if (job.name === "add") return job.data.a + job.data.b;
  appendFileSync(process.env.BENCH_STAMPS, `${(now() - job.data.sent).toFixed(6)}\n`);
}

const ways = {
  async one(jobs, count) {
    for (let number = 0; number < count; number++) await jobs.add("add", { a: number, b: 1 });
  },
  async tasks(jobs, count) {
    const submitter = async (first) => {
      for (let number = first; number < count; number += SUBMITTERS) await jobs.add("add", { a: number, b: 1 });
    };
    await Promise.all(Array.from({ length: SUBMITTERS }, (_, first) => submitter(first)));
  },
  async bulk(jobs, count, size) {
    for (let start = 0; start < count; start += size) {
      const length = Math.min(size, count - start);
      await jobs.addBulk(Array.from({ length }, (_, number) => ({ name: "add", data: { a: number, b: 1 } })));
    }
  },
};

const commands = {
  describe() {
    return {
      version: createRequire(import.meta.url)("bullmq/package.json").version,
      settings: [
        { label: "concurrency 10", worker: ["work"], several: false, copies: 1, concurrency: 10 },
        { label: "2 processes of 5", worker: ["work"], several: true, copies: 2, concurrency: 5 },
      ],
      finished: ["ZCARD", "bull:bench:completed"],
      ways: Object.keys(ways),
      stamps: true,
      jobs: 40000,
    };
  },
  async submit(way, count, size) {
    const jobs = queue();
    await ways[way](jobs, 1, size); // the connection is made, the scripts are loaded
    const begun = performance.now();
    await ways[way](jobs, count - 1, size);
    return (((performance.now() - begun) / 1000) * count) / (count - 1);
  },
  async stamp(count) {
    const jobs = queue();
    for (let number = 0; number < count; number++) {
      await jobs.add("stamp", { sent: now() });
      await sleep(STAMP_EVERY_MS);
    }
    return null;
  },
};

const [command, ...words] = process.argv.slice(2);
if (command === "work") {
  new Worker("bench", run, { connection: redis(), concurrency: CONCURRENCY });
} else {
  const told = await commands[command](...words.map((word) => (Number.isNaN(Number(word)) ? word : Number(word))));
  console.log(JSON.stringify(told));
  process.exit();
}
