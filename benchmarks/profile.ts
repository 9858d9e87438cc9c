/**
 * Where a training step's time goes: calls, milliseconds and rates by operation of the device, and what is left over. With
 * --init the same for a LoRA-DA start, with --generate for greedy decoding.
 *
 *     npm run bench:profile -- [--model DIR] [--dtype bfloat16] [--rows 4x256|gsm8k|1x4096|FILE] [--steps 5] [--warmup 2]
 *                              [--batch-size 8] [--threads 0] [--prepack] [--recompute none|layer] [--init | --generate 64] [--json]
 *
 * --init      instead of steps: the collection over --rows (as many rows as the steps would take) and the solve.
 * --generate  instead of steps: so many new tokens after a prompt of the first row's first 32 tokens.
 */
import { parseArgs } from 'node:util';
import { CausalLM } from '../lib/causal_lm';
import { openCheckpoint } from '../lib/checkpoint';
import { Dataset } from '../lib/dataset';
import {
  type Dtype,
  type NativeBatch,
  type NativeOperationProfile,
  type NativeStepOptions,
  native,
} from '../lib/native';
import {
  BenchmarkError,
  describeMachine,
  describeModel,
  dtypeList,
  heading,
  modelFolder,
  noModel,
  nonNegativeInteger,
  positiveInteger,
  runMain,
  table,
} from './harness';
import { Inputs, prepareWork, type Work } from './inputs';

type Recompute = NativeStepOptions['recompute'];

interface Result {
  rows: string;
  dtype: Dtype;
  /** What the figures are per: steps, starts or generated tokens. */
  unit: 'step' | 'start' | 'token';
  units: number;
  tokensPerUnit: number;
  /** Of all units, on the engine thread. */
  seconds: number;
  /** From a call's begin to its result in JavaScript, of all units. */
  callSeconds: number;
  operations: NativeOperationProfile[];
}

function options() {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      dtype: { type: 'string', default: 'bfloat16' },
      rows: { type: 'string', default: '4x256' },
      steps: { type: 'string', default: '5' },
      warmup: { type: 'string', default: '2' },
      'batch-size': { type: 'string', default: '8' },
      threads: { type: 'string', default: '0' },
      prepack: { type: 'boolean', default: false },
      recompute: { type: 'string', default: 'none' },
      init: { type: 'boolean', default: false },
      generate: { type: 'string', default: '0' },
      json: { type: 'boolean', default: false },
    },
  });
  const { recompute } = values;
  if (recompute !== 'none' && recompute !== 'layer') {
    throw new BenchmarkError(`Expected none or layer for --recompute but received ${JSON.stringify(recompute)}`, 2);
  }
  return {
    model: modelFolder(values.model),
    dtypes: dtypeList(values.dtype),
    sources: values.rows.split(','),
    steps: positiveInteger('steps', values.steps),
    warmup: nonNegativeInteger('warmup', values.warmup),
    batchSize: positiveInteger('batch-size', values['batch-size']),
    threads: nonNegativeInteger('threads', values.threads),
    prepack: values.prepack,
    recompute: recompute as Recompute,
    init: values.init,
    newTokens: nonNegativeInteger('generate', values.generate),
    json: values.json,
  };
}

type Options = ReturnType<typeof options>;

/** The public API has no such option: the engine is loaded here and put into a model by hand. */
async function loadProfiled(directory: string, dtype: Dtype, threads: number, prepack: boolean): Promise<CausalLM> {
  const checkpoint = await openCheckpoint(directory);
  const { spec, tensors } = checkpoint;
  const engine = await native().loadModel(
    { spec, tensors, dtype, device: 'cpu', threads, prepack, copyBudget: -1, profile: true },
    () => {},
  );
  return new CausalLM({ checkpoint, native: engine, stopIds: [] });
}

type Measured = Pick<Result, 'unit' | 'units' | 'tokensPerUnit' | 'seconds' | 'callSeconds' | 'operations'>;

async function profileSteps(model: CausalLM, data: Dataset, work: Work, given: Options): Promise<Measured> {
  const adam = { learningRate: 2e-4, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0, maxGradNorm: 1 };
  const batchOf = (step: number): NativeBatch =>
    data.batch(Array.from({ length: work.batchSize }, (_, i) => step * work.batchSize + i));
  const secondsOf: number[] = [];
  const callSeconds: number[] = [];
  let tokens = 0;
  for (let step = 0; step < given.warmup + given.steps; step++) {
    if (step === given.warmup) await model.native.resetProfile();
    const batch = batchOf(step);
    const began = performance.now();
    const result = await model.native.trainStep([batch], { ...adam, step: step + 1, recompute: given.recompute });
    if (step < given.warmup) continue;
    callSeconds.push((performance.now() - began) / 1000);
    secondsOf.push(result.seconds);
    tokens += batch.inputIds.length;
  }
  return {
    unit: 'step',
    units: given.steps,
    tokensPerUnit: tokens / given.steps,
    seconds: sum(secondsOf),
    callSeconds: sum(callSeconds),
    operations: await model.native.profile(),
  };
}

async function profileStart(model: CausalLM, data: Dataset): Promise<Measured> {
  await model.native.resetProfile();
  const began = performance.now();
  const { collectSeconds, solveSeconds } = await model.adapter!.initialize(
    { method: 'lora-da', samples: data.length },
    data,
  );
  return {
    unit: 'start',
    units: 1,
    tokensPerUnit: data.tokens,
    seconds: collectSeconds + solveSeconds,
    callSeconds: (performance.now() - began) / 1000,
    operations: await model.native.profile(),
  };
}

async function profileGeneration(model: CausalLM, data: Dataset, newTokens: number): Promise<Measured> {
  const inputIds = data.row(0).inputIds.slice(0, 32);
  const generate = (maxNewTokens: number, onToken?: () => void) =>
    model.generate({ inputIds, maxNewTokens, stopIds: [], onToken });
  await generate(4);
  await model.native.resetProfile();
  const began = performance.now();
  await generate(newTokens);
  const seconds = (performance.now() - began) / 1000;
  const operations = await model.native.profile();
  return { unit: 'token', units: newTokens, tokensPerUnit: 1, seconds, callSeconds: seconds, operations };
}

async function measure(inputs: Inputs, work: Work, dtype: Dtype, adapter: string, given: Options): Promise<Result> {
  const model = await loadProfiled(inputs.model, dtype, given.threads, given.prepack);
  const data = await Dataset.load(work.data.file, {
    vocabSize: model.spec.vocabSize,
    maxLength: model.spec.maxPositions,
    overlong: 'error',
  });
  if (given.init) model.addLora({ rank: 8, alpha: 16 });
  else await model.loadAdapter(adapter);
  const measured = given.init
    ? await profileStart(model, data)
    : given.newTokens > 0
      ? await profileGeneration(model, data, given.newTokens)
      : await profileSteps(model, data, work, given);
  data.dispose();
  await model.dispose();
  return { rows: work.source, dtype, ...measured };
}

const sum = (values: number[]) => values.reduce((total, value) => total + value, 0);

/** Kinds of operations by their names; the first that fits counts. */
const kinds: [string, RegExp][] = [
  ['products with frozen weights', /^linear/],
  ['head and loss', /^headLoss|^sumLosses/],
  ["LoRA's thin products", /^matmul lora/],
  ['attention', /^attention/],
  ["the start's statistics", /^matmul TN|^secondMoment|^squareSum/],
  ['dense algebra', /^matmul|^cholesky|^symmetricProduct|^lowestEigenpairs/],
  ['optimizer', /^gradNorm|^adamw/],
  ['memory', /^allocate|^upload|^download|^zero|^copy|^prepare/],
  ['elementwise', /./],
];

function byKind(operations: NativeOperationProfile[]): [string, number][] {
  const seconds = new Map(kinds.map(([kind]) => [kind, 0]));
  for (const { operation, seconds: own } of operations) {
    const [kind] = kinds.find(([, pattern]) => pattern.test(operation))!;
    seconds.set(kind, seconds.get(kind)! + own);
  }
  return [...seconds].filter(([, own]) => own > 0).sort((a, b) => b[1] - a[1]);
}

function show({ dtype, unit, units, tokensPerUnit, seconds, callSeconds, operations }: Result): string {
  const inside = sum(operations.map((operation) => operation.seconds));
  const milliseconds = (value: number) => ((1000 * value) / units).toFixed(2);
  const share = (value: number) => `${((100 * value) / seconds).toFixed(1)} %`;
  const rate = (amount: number, time: number) => (amount > 0 && time > 0 ? (amount / time / 1e9).toFixed(1) : '-');
  const cells = [[dtype, `calls/${unit}`, `ms/${unit}`, 'share', 'GFLOP/s', 'GB/s']];
  for (const { operation, calls, seconds: own, flops, bytes } of [...operations].sort(
    (a, b) => b.seconds - a.seconds,
  )) {
    const callsPerUnit = calls / units;
    const count = Number.isInteger(callsPerUnit) ? String(callsPerUnit) : callsPerUnit.toFixed(2);
    cells.push([operation, count, milliseconds(own), share(own), rate(flops, own), rate(bytes, own)]);
  }
  cells.push(['outside any operation', '', milliseconds(seconds - inside), share(seconds - inside), '', '']);
  cells.push([
    `whole ${unit}`,
    '',
    milliseconds(seconds),
    share(seconds),
    rate(sum(operations.map((o) => o.flops)), seconds),
    '',
  ]);
  cells.push(['way to the engine and back', '', milliseconds(callSeconds - seconds), '', '', '']);
  const summary = [['by kind', `ms/${unit}`, 'share']];
  for (const [kind, own] of byKind(operations)) summary.push([kind, milliseconds(own), share(own)]);
  return `${table(cells)}\n${table(summary)}\n  ${((tokensPerUnit * units) / seconds).toFixed(0)} tokens/s`;
}

async function main(): Promise<void> {
  const given = options();
  if (!given.model) return console.log(noModel);
  const inputs = await Inputs.open(given.model);
  try {
    const { peer: _, ...machine } = describeMachine(given.threads, undefined);
    console.log(
      heading({
        ...machine,
        model: describeModel(inputs),
        adapter: 'rank 8, alpha 16, rsLoRA, every linear module',
        recompute: given.recompute,
      }),
    );
    const adapter = await inputs.adapter();
    const results: Result[] = [];
    for (const source of given.sources) {
      const work = await prepareWork(inputs, source, given);
      if (!work) {
        console.log(`\nRows ${source}: skipped, the data are not here`);
        continue;
      }
      console.log(`\nRows ${source}: ${work.batchSize} a step, ${given.steps} steps after ${given.warmup} of warm-up`);
      for (const dtype of given.dtypes) {
        const result = await measure(inputs, work, dtype, adapter, given);
        results.push(result);
        console.log(show(result));
      }
    }
    if (given.json) console.log(JSON.stringify({ machine, model: given.model, results }));
  } finally {
    inputs.remove();
  }
}

runMain(main);
