/**
 * The matrix products of a training step, or of a start's collection, alone: the most that the library gives.
 *
 *     npm run bench:limit -- [--model DIR] [--rows 4x256|gsm8k|FILE] [--batch-size 8] [--dtype bfloat16,float32] [--collect]
 *                            [--sweeps 3] [--threads 0] [--json]
 */
import { parseArgs } from 'node:util';
import {
  describeMachine,
  describeModel,
  dtypeList,
  engineThreads,
  heading,
  modelFolder,
  noModel,
  nonNegativeInteger,
  positiveInteger,
  runMain,
  table,
} from './harness';
import { Inputs, meanStep, prepareWork } from './inputs';
import { hasLimit, type LimitFigures, limitHint, measureLimit } from './limit_program';

/** Of whose mean the products of rows of uneven length are. */
const meanOfSteps = 8;

function options() {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      rows: { type: 'string', default: '4x256' },
      'batch-size': { type: 'string', default: '8' },
      dtype: { type: 'string', default: 'bfloat16,float32' },
      collect: { type: 'boolean', default: false },
      sweeps: { type: 'string', default: '3' },
      threads: { type: 'string', default: '0' },
      json: { type: 'boolean', default: false },
    },
  });
  return {
    model: modelFolder(values.model),
    rows: values.rows,
    batchSize: positiveInteger('batch-size', values['batch-size']),
    dtypes: dtypeList(values.dtype),
    collect: values.collect,
    sweeps: positiveInteger('sweeps', values.sweeps),
    threads: nonNegativeInteger('threads', values.threads),
    json: values.json,
  };
}

function show(dtype: string, { tokensPerSecond, gigaflops, parts }: LimitFigures): string {
  const named = Object.entries(parts).filter(([, seconds]) => seconds > 0);
  return table([
    [dtype, 'tokens/s', 'GFLOP/s', ...named.map(([name]) => `${name}, s`)],
    [
      'products alone',
      tokensPerSecond.toFixed(0),
      gigaflops.toFixed(0),
      ...named.map(([, seconds]) => seconds.toFixed(3)),
    ],
  ]);
}

async function main(): Promise<void> {
  const given = options();
  if (!given.model) return console.log(noModel);
  if (!hasLimit()) return console.log(limitHint);
  const inputs = await Inputs.open(given.model);
  try {
    const work = await prepareWork(inputs, given.rows, { steps: meanOfSteps, warmup: 0, batchSize: given.batchSize });
    if (!work) return console.log(`Rows ${given.rows}: skipped, the data are not here`);
    const step = meanStep(work);
    const machine = describeMachine(given.threads, undefined);
    const rows = `${given.rows}: ${step.tokens.toFixed(0)} tokens a step, ${step.labels.toFixed(0)} labelled`;
    console.log(heading({ ...machine, model: describeModel(inputs), rows }));
    const threads = engineThreads(given.threads);
    const results = given.dtypes.map((dtype) => {
      const { spec } = inputs;
      const figures = measureLimit({ spec, dtype, ...step, threads, sweeps: given.sweeps, collect: given.collect });
      console.log(show(dtype, figures));
      return { dtype, ...figures };
    });
    if (given.json) console.log(JSON.stringify({ machine, model: given.model, rows: given.rows, results }));
  } finally {
    inputs.remove();
  }
}

runMain(main);
