import './fake_native';
import assert from 'node:assert/strict';
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { before, test } from 'node:test';
import { setTimeout } from 'node:timers/promises';
import { Random } from '../lib/random';
import { runCli, startCli } from './run_cli';
import { temporaryFolder, writeTinyData, writeTinyModel } from './tiny_folder';

const folder = temporaryFolder();
const model = join(folder, 'model');
const data = join(folder, 'train.jsonl');
const evalData = join(folder, 'test.jsonl');
const straight = join(folder, 'straight');
const slow = { env: { FAKE_STEP_MS: '35' } };
const steps = 40;

const base = ['--model', model, '--data', data, '--eval-data', evalData, '--batch-size', '4', '--grad-accum', '2'];
const training = [
  '--max-steps',
  String(steps),
  '--lr',
  '0.05',
  '--eval-steps',
  '7',
  '--save-steps',
  '5',
  '--rank',
  '2',
];
const trainInto = (out: string, ...more: string[]) => ['train', ...base, ...training, '--out', out, ...more];

before(async () => {
  await writeTinyModel(model);
  writeTinyData(data, 45);
  writeTinyData(evalData, 9, 4);
  const { code, stderr } = await runCli(trainInto(straight));
  assert.equal(code, 0, stderr);
});

/** Lines without the figures that are times. */
function timeless(path: string): unknown[] {
  const lines = readFileSync(path, 'utf8').trimEnd().split('\n');
  return lines.map((line) => ({ ...JSON.parse(line), tokensPerSecond: 0, seconds: 0 }));
}

function assertSameRun(out: string): void {
  const adapter = (run: string) => readFileSync(join(run, 'adapter_model.safetensors'));
  assert.ok(adapter(out).equals(adapter(straight)), 'adapter_model.safetensors differs');
  const last = `checkpoints/step-${String(steps).padStart(8, '0')}/moments.safetensors`;
  assert.ok(readFileSync(join(out, last)).equals(readFileSync(join(straight, last))), 'moments differ');
  for (const name of ['metrics.jsonl', 'evaluations.jsonl']) {
    assert.deepEqual(timeless(join(out, name)), timeless(join(straight, name)), name);
  }
  assert.ok(existsSync(join(out, 'report.html')));
  assert.deepEqual(
    readdirSync(join(out, 'checkpoints')).filter((name) => name.startsWith('.')),
    [],
  );
}

test('a run killed at random moments ends in the bytes of one that never stopped', { timeout: 120_000 }, async () => {
  const out = join(folder, 'killed');
  const random = new Random(process.pid);
  let kills = 0;
  for (let attempt = 0; attempt < 30; attempt++) {
    const { child, ended } = startCli(trainInto(out, '--resume'), slow);
    if (kills < 8) {
      await setTimeout(600 + random.below(900));
      child.kill('SIGKILL');
    }
    const { code, signal, stderr } = await ended;
    if (signal === 'SIGKILL') kills++;
    else assert.equal(code, 0, stderr);
    if (code === 0) break;
  }
  assert.ok(kills > 0);
  assertSameRun(out);
});

test('SIGINT saves a checkpoint and exits 130; the run resumed from it ends the same', {
  timeout: 60_000,
}, async () => {
  const out = join(folder, 'interrupted');
  const { child, ended } = startCli(trainInto(out), slow);
  while (!existsSync(join(out, 'checkpoints/step-00000005'))) await setTimeout(10);
  child.kill('SIGINT');
  const { code, stderr } = await ended;
  assert.equal(code, 130, stderr);
  assert.match(stderr, /Stopped on request after step \d+; go on from there with --resume/);
  const after = Number(/after step (\d+);/.exec(stderr)![1]);
  assert.ok(existsSync(join(out, `checkpoints/step-${String(after).padStart(8, '0')}/state.json`)));
  const resumed = await runCli(trainInto(out, '--resume'));
  assert.equal(resumed.code, 0, resumed.stderr);
  assert.match(resumed.stderr, new RegExp(`Going on after step ${after} of ${steps}`));
  assertSameRun(out);
});

test('a second SIGINT ends the process at once with 130', { timeout: 30_000 }, async () => {
  const out = join(folder, 'twice');
  const { child, ended } = startCli(trainInto(out), { env: { FAKE_STEP_MS: '3000' } });
  while (!existsSync(join(out, 'checkpoints/step-00000000'))) await setTimeout(10);
  const began = performance.now();
  child.kill('SIGINT');
  await setTimeout(200);
  child.kill('SIGINT');
  assert.equal((await ended).code, 130);
  assert.ok(performance.now() - began < 2500);
});

test('--resume without a checkpoint starts afresh', async () => {
  const out = join(folder, 'afresh');
  const { code, stderr } = await runCli(trainInto(out, '--resume'));
  assert.equal(code, 0, stderr);
  assertSameRun(out);
});

test('--resume of a finished run leaves the same run', async () => {
  const out = join(folder, 'finished');
  cpSync(straight, out, { recursive: true });
  const { code, stderr } = await runCli(trainInto(out, '--resume'));
  assert.equal(code, 0, stderr);
  assertSameRun(out);
});

test('a checkpoint that is not whole is passed over', async () => {
  const out = join(folder, 'damaged');
  cpSync(straight, out, { recursive: true });
  rmSync(join(out, 'adapter_model.safetensors'));
  truncateSync(join(out, `checkpoints/step-${String(steps).padStart(8, '0')}/moments.safetensors`), 1000);
  mkdirSync(join(out, 'checkpoints/.tmp-step-00000020'));
  writeFileSync(join(out, '.adapter_model.safetensors.123.0a1b2c3d.tmp'), 'cut');
  const { code, stderr } = await runCli(trainInto(out, '--resume'));
  assert.equal(code, 0, stderr);
  assert.match(stderr, /Going on after step 35/);
  assertSameRun(out);
});

const other = join(folder, 'other.jsonl');
const mismatches: [name: string, flags: string[], field: RegExp][] = [
  ['learning rate', ['--lr', '0.06'], /learningRate was 0.05 and is 0.06 now/],
  ['rank', ['--rank', '3'], /rank was 2 and is 3 now/],
  ['data', ['--data', other], /data was "/],
  ['initialization', ['--damping', '1e-4'], /damping was 0.000001 and is 0.0001 now/],
  ['seed', ['--seed', '1'], /seed was 42 and is 1 now/],
  ['number of steps', ['--max-steps', '41'], /steps was 40 and is 41 now/],
];
for (const [name, flags, field] of mismatches) {
  test(`another ${name} is refused by name and nothing is touched`, async () => {
    writeTinyData(other, 45, 1);
    const before = readFileSync(join(straight, 'metrics.jsonl'));
    const { code, stderr } = await runCli([...trainInto(straight, '--resume'), ...flags]);
    assert.equal(code, 1, stderr);
    assert.match(stderr, field);
    assert.ok(before.equals(readFileSync(join(straight, 'metrics.jsonl'))));
  });
}

test('what does not change the result may differ; threads are a warning', async () => {
  const out = join(folder, 'lenient');
  cpSync(straight, out, { recursive: true });
  writeFileSync(join(out, 'metrics.jsonl'), readFileSync(join(out, 'metrics.jsonl')));
  const more = '--resume --save-steps 3 --keep-checkpoints 1 --threads 1 --prepack --plan layer-major'.split(' ');
  const { code, stderr } = await runCli(trainInto(out, ...more));
  assert.equal(code, 0, stderr);
  assert.match(stderr, /Warning: threads was 2 and is 1 now/);
});
