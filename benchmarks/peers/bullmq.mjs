// BullMQ, at its best: `concurrency`, and `addBulk` with 1,000 jobs. Finished jobs are kept, its default.
//
// The command line of peer.py: node peers/bullmq.mjs describe | submit COUNT | stamp COUNT | work

import { appendFileSync } from "node:fs";
import { createRequire } from "node:module";
import { setTimeout as sleep } from "node:timers/promises";
import { Queue, Worker } from "bullmq";
import IORedis from "ioredis";

const BULK = 1000;
const STAMP_EVERY_MS = 20;

const connection = new IORedis(process.env.BENCH_REDIS_URL ?? "redis://127.0.0.1:6379", {
  maxRetriesPerRequest: null,
  lazyConnect: true,
});
const now = () => (performance.timeOrigin + performance.now()) / 1000;

async function run(job) {
  if (job.name === "add") return job.data.a + job.data.b;
  appendFileSync(process.env.BENCH_STAMPS, `${(now() - job.data.sent).toFixed(6)}\n`);
}

async function submit(jobs, count) {
  for (let start = 0; start < count; start += BULK) {
    const length = Math.min(BULK, count - start);
    await jobs.addBulk(Array.from({ length }, (_, number) => ({ name: "add", data: { a: number, b: 1 } })));
  }
}

const commands = {
  describe: () => ({
    version: createRequire(import.meta.url)("bullmq/package.json").version,
    worker: ["work"],
    finished: ["ZCARD", "bull:bench:completed"],
    jobs: 40000,
  }),
  async submit(count) {
    const jobs = new Queue("bench", { connection });
    await submit(jobs, 1); // the connection is made, the scripts are loaded
    const begun = performance.now();
    await submit(jobs, count - 1);
    return (performance.now() - begun) / 1000;
  },
  async stamp(count) {
    const jobs = new Queue("bench", { connection });
    for (let number = 0; number < count; number++) {
      await jobs.add("stamp", { sent: now() });
      await sleep(STAMP_EVERY_MS);
    }
    return null;
  },
};

const [command, count] = process.argv.slice(2);
if (command === "work") {
  new Worker("bench", run, { connection, concurrency: 10 });
} else {
  console.log(JSON.stringify(await commands[command](Number(count))));
  process.exit();
}
