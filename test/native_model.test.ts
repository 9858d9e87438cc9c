/** The native object's life: queueing, cancelling, disposing, worker threads. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import os from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { Worker } from 'node:worker_threads';
import { openCheckpoint } from '../lib/checkpoint';
import { type NativeBatch, type NativeModel, native } from '../lib/native';
import { testDevice } from './support/device';
import { allModules } from './support/reference';

const folder = join(__dirname, 'fixtures/tiny-llama');

async function load({ profile = false, prepack = false } = {}): Promise<{ model: NativeModel; modules: string[] }> {
  const { spec, tensors } = await openCheckpoint(folder);
  const dtype = 'float32';
  const options = { spec, tensors, dtype, device: testDevice, threads: 2, copyBudget: -1, profile, prepack } as const;
  return { model: await native().loadModel(options, () => {}), modules: allModules(spec) };
}

function batch(tokens: number): NativeBatch {
  const inputIds = Int32Array.from({ length: tokens }, (_, i) => (i * 37) % 1000);
  return { inputIds, labels: inputIds, sequenceStarts: Int32Array.from([0, tokens]) };
}

const step = {
  learningRate: 1e-3,
  beta1: 0.9,
  beta2: 0.999,
  epsilon: 1e-8,
  weightDecay: 0,
  maxGradNorm: 1,
  step: 1,
  recompute: 'none' as const,
};

test('progress of loading counts up to the whole model', async () => {
  const { spec, tensors } = await openCheckpoint(folder);
  const seen: number[][] = [];
  const options = { spec, tensors, dtype: 'float32' as const, device: testDevice, threads: 1, copyBudget: 0 };
  const model = await native().loadModel(options, (done, total) => seen.push([done, total]));
  assert.deepEqual(seen.at(-1), [spec.layers + 1, spec.layers + 1]);
  await model.dispose();
});

test('a profile counts the calls, seconds and flops of each operation and leaves results as they are', async () => {
  const profiled = await load({ profile: true });
  const plain = await load();
  const losses: number[] = [];
  for (const { model, modules } of [profiled, plain]) {
    await model.addLora({ rank: 4, scaling: 1, modules });
    if (model === profiled.model) await model.resetProfile();
    losses.push((await model.trainStep([batch(100)], step)).loss);
  }
  assert.equal(losses[0], losses[1]);
  const operations = new Map((await profiled.model.profile()).map((entry) => [entry.operation, entry]));
  const down = operations.get('linear+lora 384x128')!;
  assert.equal(down.calls, 4);
  assert.equal(down.flops, 4 * 2 * 128 * (384 * 128 + 4 * 128)); // 100 tokens are 128 rows
  assert.ok(down.seconds > 0);
  assert.equal(operations.get('adamw')!.calls, 1);
  await assert.rejects(plain.model.profile(), { code: 'INVALID_ARGUMENT' });
  await profiled.model.resetProfile();
  assert.deepEqual(await profiled.model.profile(), []);
  await profiled.model.dispose();
  await plain.model.dispose();
});

test('weights laid out once take more memory and give the same bits', async () => {
  const { isa } = native().info();
  const found: { weightBytes: number; losses: number[] }[] = [];
  for (const prepack of [false, true]) {
    const { model, modules } = await load({ prepack });
    await model.addLora({ rank: 4, scaling: 1, modules });
    const losses: number[] = [];
    for (let n = 1; n <= 3; n++) losses.push((await model.trainStep([batch(150)], { ...step, step: n })).loss);
    found.push({ weightBytes: model.info.weightBytes, losses });
    await model.dispose();
  }
  const [plain, prepacked] = found;
  assert.deepEqual(prepacked!.losses, plain!.losses);
  // The fixture is in float32: backward has a copy of all weights but those of the first layer that read the embedding.
  if (testDevice === 'cpu' && isa.startsWith('avx512')) {
    assert.ok(prepacked!.weightBytes > 1.8 * plain!.weightBytes, `${prepacked!.weightBytes}, ${plain!.weightBytes}`);
  }
});

test('cancel rejects the work in progress and in the queue, and later calls work again', async () => {
  const { model, modules } = await load();
  await model.addLora({ rank: 4, scaling: 1, modules });
  const pending = [1, 2, 3].map((n) => model.trainStep([batch(1500)], { ...step, step: n }));
  const settled = Promise.allSettled(pending);
  model.cancel();
  for (const result of await settled) {
    assert.equal(result.status, 'rejected');
    assert.equal((result.reason as { code: string }).code, 'ABORTED');
  }
  const { loss } = await model.trainStep([batch(64)], step);
  assert.ok(loss > 0);
  await model.dispose();
});

test('generation is cancelled between tokens', async () => {
  const { model } = await load();
  let tokens = 0;
  const options = {
    inputIds: Int32Array.of(1, 2, 3),
    maxNewTokens: 5000,
    temperature: 1,
    topP: 1,
    seed: 7,
    stopIds: new Int32Array(),
  };
  const generation = model.generate(options, () => {
    if (++tokens === 5) model.cancel();
  });
  await assert.rejects(generation, { code: 'ABORTED' });
  assert.ok(tokens >= 5 && tokens < 5000);
  await model.dispose();
});

test('the same seed samples the same tokens, another seed others', async () => {
  const { model } = await load();
  const sample = async (seed: number) => [
    ...(await model.generate(
      {
        inputIds: Int32Array.of(1, 2, 3),
        maxNewTokens: 24,
        temperature: 1.5,
        topP: 0.95,
        seed,
        stopIds: new Int32Array(),
      },
      () => {},
    )),
  ];
  const first = await sample(1);
  assert.deepEqual(await sample(1), first);
  assert.notDeepEqual(await sample(2), first);
  await model.dispose();
});

test('a tiny topP is greedy at any temperature', async () => {
  const { model } = await load();
  const run = async (temperature: number, topP: number) => [
    ...(await model.generate(
      { inputIds: Int32Array.of(5, 9, 30), maxNewTokens: 16, temperature, topP, seed: 3, stopIds: new Int32Array() },
      () => {},
    )),
  ];
  assert.deepEqual(await run(2, 1e-9), await run(0, 1));
  await model.dispose();
});

const loraDa = {
  method: 'lora-da',
  seed: 5,
  tokenMask: 'attention' as const,
  population: 100,
  varianceWeight: 0.03,
  biasWeight: 1,
  gamma: 1024,
  damping: 1e-3,
  outputDamping: 1e-3,
  normalizeDelta: true,
  plan: 'auto' as const,
  memoryBudget: 0,
};

test('both plans of the collection give the same bits and say what they take', async () => {
  const { model, modules } = await load();
  const starts = [];
  for (const plan of ['sample-major', 'layer-major'] as const) {
    await model.addLora({ rank: 4, scaling: 1, modules });
    const planned = await model.planInitialization([batch(90), batch(70)], { ...loraDa, plan });
    const phases = new Map<string, [done: number, total: number]>();
    const report = await model.initialize([batch(90), batch(70)], { ...loraDa, plan }, (phase, done, total) => {
      assert.equal(done, (phases.get(phase)?.[0] ?? 0) + 1);
      phases.set(phase, [done, total]);
    });
    assert.deepEqual([...phases.keys()], plan === 'layer-major' ? ['layers'] : ['collect', 'solve']);
    for (const [done, total] of phases.values()) assert.equal(done, total);
    const { resident, statistics, streams, activations, workspace, total, budget } = report.collection!;
    assert.equal(report.collection!.plan, plan);
    assert.equal(planned!.statistics, statistics);
    assert.equal(total, resident + statistics + streams + activations + workspace);
    assert.equal(streams > 0, plan === 'layer-major');
    assert.ok(budget > total);
    starts.push(await model.readFactors());
  }
  assert.deepEqual(starts[0], starts[1]);
  await model.dispose();
});

test('an initialization over its memory budget is refused, and the model goes on', async () => {
  const { model, modules } = await load();
  await model.addLora({ rank: 4, scaling: 1, modules });
  const started = model.initialize([batch(90)], { ...loraDa, memoryBudget: 1e6 }, () => {});
  await assert.rejects(started, {
    code: 'OUT_OF_MEMORY',
    message: /1 samples .* the memory budget is 0\.00 GB; fewer samples/,
  });
  assert.ok((await model.trainStep([batch(64)], step)).loss > 0);
  await model.dispose();
});

test('a step has the same bits each time', async () => {
  const run = async () => {
    const { model, modules } = await load();
    await model.addLora({ rank: 4, scaling: 1, modules });
    await model.initialize([], { ...loraDa, method: 'gaussian' }, () => {});
    for (let n = 1; n <= 3; n++) await model.trainStep([batch(300), batch(77)], { ...step, step: n });
    const factors = await model.readFactors();
    await model.dispose();
    return factors;
  };
  assert.deepEqual(await run(), await run());
});

test('calls after dispose are refused, dispose twice is not', async () => {
  const { model } = await load();
  await model.dispose();
  await model.dispose();
  await assert.rejects(model.evaluate(batch(8)), { name: 'LoraDaError', code: 'DISPOSED' });
});

test('a process with an idle model ends by itself', () => {
  const script = `
    const { openCheckpoint } = require('./lib/checkpoint');
    const { native } = require('./lib/native');
    openCheckpoint(${JSON.stringify(folder)}).then(({ spec, tensors }) =>
      native().loadModel({ spec, tensors, dtype: 'float32', device: ${JSON.stringify(testDevice)}, threads: 2, copyBudget: 0 }, () => {}));`;
  const { status, signal } = spawnSync(process.execPath, ['--require', 'tsx/cjs', '-e', script], {
    cwd: join(__dirname, '..'),
    timeout: 20_000,
  });
  assert.deepEqual({ status, signal }, { status: 0, signal: null });
});

test('the engine is a little nicer than a process that is nice already', { skip: process.platform !== 'linux' }, () => {
  const script = `
    const { openCheckpoint } = require('./lib/checkpoint');
    const { native } = require('./lib/native');
    const { readdirSync, readFileSync } = require('node:fs');
    (async () => {
      const { spec, tensors } = await openCheckpoint(${JSON.stringify(folder)});
      await native().loadModel({ spec, tensors, dtype: 'float32', device: 'cpu', threads: 1, copyBudget: 0 }, () => {});
      // The 19th field, the 17th after the name in brackets.
      const nice = (task) => Number(readFileSync('/proc/self/task/' + task + '/stat', 'utf8').split(') ')[1].split(' ')[16]);
      console.log([...new Set(readdirSync('/proc/self/task').map(nice))].sort((a, b) => a - b).join(' '));
    })();`;
  const before = os.getPriority();
  const { stdout, stderr } = spawnSync(
    'nice',
    ['-n', '3', process.execPath, '--require', 'tsx/cjs', '--eval', script],
    { cwd: join(__dirname, '..'), encoding: 'utf8' },
  );
  assert.equal(stdout.trim(), `${Math.min(19, before + 3)} ${Math.min(19, before + 8)}`, stderr);
});

test('a worker thread that is ended in the middle of a step does not take the process down', async () => {
  const script = `
    require('tsx/cjs');
    const { parentPort } = require('node:worker_threads');
    const { openCheckpoint } = require('./lib/checkpoint');
    const { native } = require('./lib/native');
    const inputIds = Int32Array.from({ length: 3000 }, (_, i) => i % 1000);
    openCheckpoint(${JSON.stringify(folder)}).then(async ({ spec, tensors }) => {
      const model = await native().loadModel({ spec, tensors, dtype: 'float32', device: ${JSON.stringify(testDevice)}, threads: 2, copyBudget: 0 }, () => {});
      const batch = { inputIds, labels: inputIds, sequenceStarts: Int32Array.of(0, inputIds.length) };
      parentPort.postMessage((await model.evaluate(batch)).losses[0]);
      for (;;) await model.evaluate(batch);
    });`;
  const losses = [];
  for (let round = 0; round < 2; round++) {
    const worker = new Worker(script, { eval: true });
    losses.push(
      await new Promise<number>((resolve, reject) => {
        worker.once('message', resolve);
        worker.once('error', reject);
      }),
    );
    await worker.terminate();
  }
  assert.ok(losses[0]! > 0);
  assert.equal(losses[0], losses[1]);
});
