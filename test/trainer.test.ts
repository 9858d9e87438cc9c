import './fake_native';
import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { before, test } from 'node:test';
import { CausalLM } from '../lib/causal_lm';
import { Dataset } from '../lib/dataset';
import type { StepMetrics } from '../lib/metrics';
import type { NativeBatch, NativeStepOptions } from '../lib/native';
import { Trainer, type TrainerOptions } from '../lib/trainer';
import type { FakeModel } from './fake_native';
import { temporaryFolder, writeTinyData, writeTinyModel } from './tiny_folder';

const folder = temporaryFolder();
let data: Dataset;
let evalData: Dataset;

before(async () => {
  await writeTinyModel(join(folder, 'model'));
  data = await Dataset.load(writeTinyData(join(folder, 'train.jsonl'), 21));
  evalData = await Dataset.load(writeTinyData(join(folder, 'test.jsonl'), 6, 3));
});

async function newModel(method = 'lora-da'): Promise<CausalLM> {
  const model = await CausalLM.load(join(folder, 'model'));
  await model.addLora({ rank: 2 }).initialize({ method }, data);
  return model;
}

const fake = (model: CausalLM) => model.native as unknown as FakeModel;
const lines = <T>(path: string) =>
  readFileSync(path, 'utf8')
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as T);

/** Trains and tells what the core was given. */
async function recordSteps(
  options: Partial<TrainerOptions>,
): Promise<{ batches: NativeBatch[]; options: NativeStepOptions }[]> {
  const model = await newModel();
  const steps: { batches: NativeBatch[]; options: NativeStepOptions }[] = [];
  const original = model.native.trainStep.bind(model.native);
  model.native.trainStep = (batches, stepOptions) => {
    steps.push({ batches, options: stepOptions });
    return original(batches, stepOptions);
  };
  await new Trainer(model, { data, ...options }).train();
  return steps;
}

test('a step gets gradAccum micro-batches of batchSize rows; the last group of an epoch may be incomplete', async () => {
  const steps = await recordSteps({ batchSize: 4, gradAccum: 2, epochs: 2 });
  const sizes = steps.map(({ batches }) => batches.map((batch) => batch.sequenceStarts.length - 1));
  const epoch = [
    [4, 4],
    [4, 4],
    [4, 1],
  ];
  assert.deepEqual(sizes, [...epoch, ...epoch]);
});

test('maxSteps goes over the data as often as it takes, in file order without shuffling', async () => {
  const steps = await recordSteps({ batchSize: 10, maxSteps: 5, shuffle: false });
  const firsts = steps.map(({ batches }) => Array.from(batches[0]!.inputIds.subarray(0, 2)));
  const starts = [0, 10, 20, 0, 10].map((row) => Array.from(data.row(row).inputIds.subarray(0, 2)));
  assert.deepEqual(firsts, starts);
});

test('balance deals out the rows of an epoch to micro-batches of about the same number of tokens', async () => {
  const tokens = async (options: Partial<TrainerOptions>) =>
    (await recordSteps({ batchSize: 4, gradAccum: 2, epochs: 1, ...options })).flatMap(({ batches }) =>
      batches.filter(({ sequenceStarts }) => sequenceStarts.length === 5).map(({ inputIds }) => inputIds.length),
    );
  const spread = (counts: number[]) => Math.max(...counts) - Math.min(...counts);
  const plain = await tokens({});
  const balanced = await tokens({ balance: true });
  assert.equal(balanced.length, plain.length);
  assert.ok(spread(balanced) < spread(plain), `${balanced} and ${plain}`);
});

test('the optimizer gets its constants, the schedule and the step number', async () => {
  const steps = await recordSteps({
    maxSteps: 4,
    warmupSteps: 2,
    learningRate: 1,
    scheduler: 'linear',
    weightDecay: 0.1,
    maxGradNorm: 2,
  });
  assert.deepEqual(
    steps.map(({ options }) => options.learningRate),
    [0, 0.5, 1, 0.5],
  );
  assert.deepEqual(
    steps.map(({ options }) => options.step),
    [1, 2, 3, 4],
  );
  const { beta1, beta2, epsilon, weightDecay, maxGradNorm, recompute } = steps[0]!.options;
  assert.deepEqual([beta1, beta2, epsilon, weightDecay, maxGradNorm, recompute], [0.9, 0.999, 1e-8, 0.1, 2, 'none']);
});

test('the next step is with the engine before the last one is read', async () => {
  const model = await newModel();
  const order: string[] = [];
  const original = model.native.trainStep.bind(model.native);
  model.native.trainStep = (batches, options) => {
    order.push(`submit ${options.step}`);
    return original(batches, options);
  };
  const trainer = new Trainer(model, { data, maxSteps: 3, batchSize: 4 });
  trainer.on('step', ({ step }) => order.push(`read ${step}`));
  await trainer.train();
  assert.deepEqual(order, ['submit 1', 'submit 2', 'read 1', 'submit 3', 'read 2', 'read 3']);
});

test('the run folder holds adapter, metrics, evaluations, configuration, report and checkpoints', async () => {
  const out = join(folder, 'run');
  const model = await newModel();
  const trainer = new Trainer(model, {
    data,
    evalData,
    out,
    maxSteps: 10,
    evalSteps: 4,
    saveSteps: 3,
    keepCheckpoints: 2,
    learningRate: 0.05,
  });
  const events: string[] = [];
  trainer.on('checkpoint', ({ step }) => events.push(`checkpoint ${step}`));
  trainer.on('evaluation', ({ step }) => events.push(`evaluation ${step}`));
  const result = await trainer.train();

  assert.deepEqual(readdirSync(out).sort(), [
    'adapter_config.json',
    'adapter_model.safetensors',
    'checkpoints',
    'config.json',
    'evaluations.jsonl',
    'initialization.json',
    'metrics.jsonl',
    'report.html',
  ]);
  const metrics = lines<StepMetrics>(join(out, 'metrics.jsonl'));
  assert.deepEqual(
    metrics.map(({ step }) => step),
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
  );
  assert.deepEqual(Object.keys(metrics[0]!), [
    'step',
    'epoch',
    'loss',
    'gradNorm',
    'learningRate',
    'tokens',
    'tokensPerSecond',
  ]);
  assert.equal(metrics[2]!.epoch, 1);
  assert.deepEqual(
    lines<{ step: number }>(join(out, 'evaluations.jsonl')).map(({ step }) => step),
    [0, 4, 8, 10],
  );
  assert.deepEqual(events, [
    'checkpoint 0',
    'evaluation 0',
    'checkpoint 3',
    'evaluation 4',
    'checkpoint 6',
    'evaluation 8',
    'checkpoint 9',
    'evaluation 10',
    'checkpoint 10',
  ]);
  const kept = readdirSync(join(out, 'checkpoints'))
    .filter((name) => name.startsWith('step'))
    .sort();
  assert.deepEqual(kept, ['step-00000009', 'step-00000010']);
  assert.equal(result.steps, 10);
  assert.equal(result.reason, 'finished');
  assert.ok(result.evaluation!.last.loss < result.evaluation!.first.loss);
});

test('early stop ends the run after evaluations without a better loss and keeps the best adapter', async () => {
  for (const out of [join(folder, 'early'), undefined]) {
    const model = await newModel();
    const losses = [5, 4, 3, 3.5, 3.2, 9, 9];
    const factors: Float32Array[] = [];
    model.evaluate = async () => {
      factors.push((await model.native.readFactors())[0]!.a);
      const loss = losses.shift()!;
      return { loss, perplexity: Math.exp(loss), labelTokens: 1 };
    };
    const result = await new Trainer(model, {
      data,
      evalData,
      out,
      maxSteps: 20,
      evalSteps: 2,
      earlyStop: 2,
      learningRate: 0.1,
    }).train();
    assert.equal(result.reason, 'early-stop');
    assert.equal(result.steps, 8);
    assert.deepEqual(result.evaluation!.best, { step: 4, loss: 3 });
    assert.deepEqual((await model.native.readFactors())[0]!.a, factors[2]);
    if (out) assert.ok(existsSync(join(out, 'checkpoints/best-00000004')));
  }
});

test('a loss that is not finite stops the run with step, likely cause and the checkpoint that is kept', async () => {
  const out = join(folder, 'nan');
  const model = await newModel();
  const original = model.native.trainStep.bind(model.native);
  model.native.trainStep = async (batches, options) => {
    const result = await original(batches, options);
    return options.step === 5 ? { ...result, loss: Number.NaN } : result;
  };
  const trainer = new Trainer(model, { data, out, maxSteps: 9, saveSteps: 2, learningRate: 3 });
  await assert.rejects(trainer.train(), {
    code: 'NON_FINITE',
    message: /^Step 5: .*learning rate \(.*\) is probably too high.*checkpoint of step 4 is kept/,
  });
  assert.ok(existsSync(join(out, 'checkpoints/step-00000004/state.json')));
  assert.ok(!existsSync(join(out, 'adapter_model.safetensors')));
});

test('an AbortSignal finishes what is in flight, saves a checkpoint and rejects with ABORTED', async () => {
  const out = join(folder, 'aborted');
  const model = await newModel();
  const controller = new AbortController();
  const trainer = new Trainer(model, { data, out, maxSteps: 50 });
  trainer.on('step', ({ step }) => step === 5 && controller.abort());
  await assert.rejects(trainer.train({ signal: controller.signal }), { code: 'ABORTED', message: /after step 6/ });
  assert.ok(existsSync(join(out, 'checkpoints/step-00000006/state.json')));
  assert.equal(lines(join(out, 'metrics.jsonl')).length, 6);
});

test('a folder that holds a run is refused, unless it is to go on', async () => {
  const out = join(folder, 'twice');
  const model = await newModel();
  await new Trainer(model, { data, out, maxSteps: 2 }).train();
  await assert.rejects(new Trainer(model, { data, out, maxSteps: 2 }).train(), {
    code: 'INVALID_ARGUMENT',
    message: /already holds a run/,
  });
  const result = await new Trainer(model, { data, out, maxSteps: 2, resume: true }).train();
  assert.equal(result.steps, 2);
});

test('an output folder that cannot be written is refused before the long work', async () => {
  const model = await newModel();
  const calls = fake(model).calls.length;
  const trainer = new Trainer(model, { data, out: '/proc/lora-da', maxSteps: 2, initialize: { method: 'lora-da' } });
  await assert.rejects(trainer.train(), (error: { code: string; message: string }) => {
    assert.match(error.code, /IO_ERROR|FILE_NOT_FOUND/);
    assert.match(error.message, /\/proc\/lora-da/);
    return true;
  });
  assert.equal(fake(model).calls.length, calls);
});

test('an adapter that was never started is refused', async () => {
  const model = await CausalLM.load(join(folder, 'model'));
  model.addLora();
  await assert.rejects(new Trainer(model, { data, maxSteps: 1 }).train(), {
    code: 'INVALID_ARGUMENT',
    message: /initialize/,
  });
});

test('options that do not go together are refused', async () => {
  const model = await newModel();
  const cases: [Partial<TrainerOptions>, RegExp][] = [
    [{ epochs: 1, maxSteps: 1 }, /either epochs or maxSteps/],
    [{ warmupSteps: 1, warmupRatio: 0.1 }, /either warmupSteps or warmupRatio/],
    [{ earlyStop: 1 }, /evalData/],
    [{ resume: true }, /for out/],
    [{ batchSize: 0 }, /positive integer for batchSize/],
    [{ data: [] as never }, /Dataset/],
  ];
  for (const [options, message] of cases) {
    assert.throws(() => new Trainer(model, { data, ...options }), { code: 'INVALID_ARGUMENT', message });
  }
});

test('the initialization looks at the first rows, in file order, whole', async () => {
  const model = await CausalLM.load(join(folder, 'model'));
  const adapter = model.addLora({ rank: 2 });
  let seen: NativeBatch[] = [];
  let population = 0;
  const original = model.native.initialize.bind(model.native);
  model.native.initialize = (batches, options, onProgress) => {
    seen = batches;
    population = options.population;
    return original(batches, options, onProgress);
  };
  const report = await adapter.initialize({ method: 'lora-da', samples: 3 }, data);
  assert.deepEqual(
    Array.from(seen[0]!.inputIds),
    [0, 1, 2].flatMap((row) => Array.from(data.row(row).inputIds)),
  );
  assert.equal(population, data.length);
  assert.equal(report.samples, 3);
  assert.equal(report.modules.length, adapter.modules.length);
});

test('none keeps the factors of a loaded adapter and starts a new one as PEFT does', async () => {
  const saved = join(folder, 'saved');
  const model = await newModel();
  await model.adapter!.save(saved);
  const loaded = await model.loadAdapter(saved);
  const before = await loaded.readFactors();
  await loaded.initialize({ method: 'none' });
  assert.deepEqual(await loaded.readFactors(), before);

  const fresh = model.addLora({ rank: 2 });
  const report = await fresh.initialize({ method: 'none' });
  assert.equal(report.method, 'kaiming');
  const [first] = await fresh.readFactors();
  assert.ok(first!.a.some((value) => value !== 0) && first!.b.every((value) => value === 0));
});

test('an unknown initialization is refused with the list of known ones', async () => {
  const model = await newModel();
  await assert.rejects(model.adapter!.initialize({ method: 'lora-xy' }, data), {
    code: 'INVALID_ARGUMENT',
    message: /one of lora-da, kaiming, gaussian, none for init but received "lora-xy"/,
  });
});

test('a model that was disposed of is refused', async () => {
  const model = await newModel();
  await model.dispose();
  await assert.rejects(model.generate({ inputIds: [1] }), { code: 'DISPOSED' });
  assert.throws(() => model.addLora(), { code: 'DISPOSED' });
});

test('generate stops at the end-of-sequence id, which is the last of tokenIds', async () => {
  const model = await newModel();
  assert.deepEqual(await model.generate({ inputIds: [62], maxNewTokens: 20 }), { text: null, tokenIds: [63, 0, 1, 2] });
  await assert.rejects(model.generate({ inputIds: [64] }), { code: 'INVALID_ARGUMENT', message: /token id below 64/ });
  await assert.rejects(model.generate({ raw: 'x' }), { code: 'UNSUPPORTED', message: /tokenizer/ });
  await assert.rejects(model.generate({}), { code: 'INVALID_ARGUMENT', message: /exactly one of/ });
});

test('evaluate gives the mean over all label tokens and each row on its own', async () => {
  const model = await newModel();
  const { loss, labelTokens, perExample, perplexity } = await model.evaluate(evalData, { perExample: true });
  const sum = perExample!.reduce((total, row) => total + row.loss * row.labelTokens, 0);
  assert.equal(labelTokens, evalData.labelTokensTotal);
  assert.ok(Math.abs(loss - sum / labelTokens) < 1e-12);
  assert.equal(perplexity, Math.exp(loss));
  assert.equal(perExample!.length, evalData.length);
});
