/**
 * A run that is killed with SIGKILL at random moments, again and again, and resumed each time ends in the bytes of one that was never
 * stopped. `KILLS` sets how often (default 20), `SEED` repeats a sequence of moments.
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { Random } from '../../lib/random';

const root = join(__dirname, '../..');
const kills = Number(process.env.KILLS ?? 20);
const seed = Number(process.env.SEED ?? Date.now() % 1e6);
const work = mkdtempSync(join(tmpdir(), 'lora-da-kill-'));
after(() => rmSync(work, { recursive: true }));

const rows = Array.from({ length: 40 }, (_, i) => {
  const ids = Array.from({ length: 20 + (i % 30) }, (_, t) => (i * 31 + t * t * 7) % 1000);
  return JSON.stringify({ input_ids: ids, labels: ids });
});
const data = join(work, 'rows.jsonl');
writeFileSync(data, rows.join('\n'));

/** Trains into `out`; with `killAfter`, in milliseconds, kills it then. Resolves to whether it ended by itself. */
function train(out: string, killAfter?: number): Promise<boolean> {
  const args = [
    '--model',
    join(root, 'test/fixtures/tiny-llama'),
    '--data',
    data,
    '--eval-data',
    data,
    '--out',
    out,
    '--resume',
  ];
  const options = [
    '--init',
    'lora-da',
    '--epochs',
    '6',
    '--batch-size',
    '2',
    '--grad-accum',
    '2',
    '--save-steps',
    '4',
    '--eval-steps',
    '15',
  ];
  const child = spawn(process.execPath, [
    join(root, 'dist/cli.js'),
    'train',
    ...args,
    ...options,
    '--dtype',
    'float32',
    '--lr',
    '1e-3',
  ]);
  let errors = '';
  child.stderr.on('data', (text) => {
    errors += text;
  });
  const timer = killAfter === undefined ? undefined : setTimeout(() => child.kill('SIGKILL'), killAfter);
  return new Promise((resolve, reject) => {
    child.on('close', (status, signal) => {
      clearTimeout(timer);
      if (status === 0) resolve(true);
      else if (signal === 'SIGKILL') resolve(false);
      else reject(new Error(`exit ${status}, signal ${signal}: ${errors}`));
    });
  });
}

/** What must be the same: the adapter's bytes, and the metrics without their times. */
function outcome(out: string) {
  const lines = (name: string) =>
    readFileSync(join(out, name), 'utf8')
      .trimEnd()
      .split('\n')
      .map((line) => ({ ...JSON.parse(line), tokensPerSecond: 0, seconds: 0 }));
  return {
    adapter: createHash('sha256')
      .update(readFileSync(join(out, 'adapter_model.safetensors')))
      .digest('hex'),
    metrics: lines('metrics.jsonl'),
    evaluations: lines('evaluations.jsonl'),
  };
}

test(`${kills} kills at random moments leave no trace (seed ${seed})`, async () => {
  const random = new Random(seed);
  const undisturbed = join(work, 'undisturbed');
  const start = performance.now();
  assert.ok(await train(undisturbed));
  const whole = performance.now() - start;

  let killed = 0;
  for (let round = 0; killed < kills; round++) {
    const out = join(work, `killed-${round}`);
    while (killed < kills && !(await train(out, 100 + random.below(Math.ceil(whole * 0.6))))) killed++;
    assert.ok(await train(out));
    assert.deepEqual(outcome(out), outcome(undisturbed), `round ${round}`);
  }
});
