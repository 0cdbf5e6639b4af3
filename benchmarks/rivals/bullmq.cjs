// See bullmq.py. NODE_PATH names the folder with bullmq in it.
'use strict';
const fs = require('fs');
const path = require('path');
const readline = require('readline');
const { Queue, Worker } = require('bullmq');

const url = new URL(process.env.BENCH_REDIS_URL);
const connection = { host: url.hostname, port: Number(url.port), maxRetriesPerRequest: null };
const STEP = 100;
let file = null;
let count = 0;

function write(line) {
  file ??= fs.openSync(path.join(process.env.BENCH_MARKS, String(process.pid)), 'a');
  fs.writeSync(file, line);
}

async function handle(job) {
  const now = process.hrtime.bigint(); // CLOCK_MONOTONIC, as Python's
  if (job.name === 'lap') write(`${now} ${now - BigInt(Math.round(job.data * 1e9))}\n`);
  else if (++count % STEP === 0) write(`${now} ${count}\n`);
}

async function send(task) {
  const queue = new Queue('bench', { connection, defaultJobOptions: { removeOnComplete: true } });
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const jobs = line.split(' ').map((word) => ({ name: task, data: Number(word) }));
    await (jobs.length === 1 ? queue.add(task, jobs[0].data) : queue.addBulk(jobs));
    process.stdout.write('\n');
  }
  await queue.close();
}

if (process.argv[2] === 'send') send(process.argv[3]);
else new Worker('bench', handle, { connection, concurrency: 200, removeOnComplete: { count: 0 } });
