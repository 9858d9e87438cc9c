/**
 * Trains a model beside PEFT in one run, both from one adapter on the same rows, each side in processes of its own and
 * the sides in turn, and prints tokens/s, peak memory, losses and their ratios, and our share of the limit: of what the
 * matrix products of a step alone come to (limit.cpp).
 *
 *     npm run bench:train -- [--model DIR] [--dtype bfloat16,float32] [--rows 4x256,gsm8k,FILE] [--steps 6] [--rounds 2]
 *                            [--warmup 1] [--batch-size 8] [--threads 0] [--no-limit] [--json]
 *
 * --rows  4x256: steps of 4 rows of 256 random tokens, all labelled; gsm8k or a data file: uneven rows with masked
 *         prompts, --batch-size of them a step (PEFT pads them to the longest). --json: the figures, as the last line.
 */
import { parseArgs } from 'node:util';
import { type Dtype, native } from '../lib/native';
import {
  describeMachine,
  describeModel,
  dtypeList,
  findPeer,
  gigabytes,
  heading,
  median,
  modelFolder,
  noModel,
  nonNegativeInteger,
  type Peer,
  peerHint,
  positiveInteger,
  runMain,
  runNode,
  runPython,
  table,
} from './harness';
import { Inputs, prepareWork, type Work } from './inputs';
import { hasLimit, type LimitFigures, limitHint, measureLimit, middleRound } from './limit';
import type { TrainFigures } from './train_ours';

/** One side's rounds as one. */
interface Side {
  tokensPerSecond: number;
  /** Slowest and fastest round. */
  range: [number, number];
  /** The largest of the rounds. */
  peakBytes: number;
  losses: number[];
}

interface Result {
  rows: string;
  dtype: Dtype;
  ours: Side;
  peer: Side | null;
  ratios: { tokensPerSecond: number; peakBytes: number } | null;
  lossDifference: number | null;
  /** The products of a step of the same mean size alone, and our tokens/s over theirs. */
  limit: (LimitFigures & { share: number }) | null;
}

function options() {
  const { values } = parseArgs({
    allowNegative: true,
    options: {
      model: { type: 'string' },
      dtype: { type: 'string', default: 'bfloat16,float32' },
      rows: { type: 'string', default: '4x256' },
      steps: { type: 'string', default: '6' },
      rounds: { type: 'string', default: '2' },
      warmup: { type: 'string', default: '1' },
      'batch-size': { type: 'string', default: '8' },
      threads: { type: 'string', default: '0' },
      limit: { type: 'boolean', default: true },
      json: { type: 'boolean', default: false },
    },
  });
  return {
    model: modelFolder(values.model),
    dtypes: dtypeList(values.dtype),
    sources: values.rows.split(','),
    steps: positiveInteger('steps', values.steps),
    rounds: positiveInteger('rounds', values.rounds),
    warmup: positiveInteger('warmup', values.warmup),
    batchSize: positiveInteger('batch-size', values['batch-size']),
    threads: nonNegativeInteger('threads', values.threads),
    limit: values.limit && hasLimit(),
    json: values.json,
  };
}

type Options = ReturnType<typeof options>;

function together(rounds: TrainFigures[], tokensPerStep: number[], warmup: number): Side {
  const rates = rounds.flatMap(({ stepSeconds }) => stepSeconds.map((s, step) => tokensPerStep[warmup + step]! / s));
  const medians = rounds.map(({ tokensPerSecond }) => tokensPerSecond);
  return {
    tokensPerSecond: median(rates),
    range: [Math.min(...medians), Math.max(...medians)],
    peakBytes: Math.max(...rounds.map((round) => round.peakBytes)),
    losses: rounds[0]!.losses,
  };
}

function largestDifference(ours: number[], peer: number[]): number {
  return Math.max(...ours.map((loss, step) => Math.abs(loss - peer[step]!) / Math.abs(peer[step]!)));
}

function measure(
  inputs: Inputs,
  work: Work,
  dtype: Dtype,
  adapter: string,
  peer: Peer | undefined,
  given: Options,
): Result {
  const { steps, warmup, threads } = given;
  const { data, batchSize } = work;
  const child = {
    model: inputs.model,
    rows: data.file,
    adapter,
    dtype,
    'batch-size': batchSize,
    steps,
    warmup,
    threads,
  };
  const stepCount = data.rows / batchSize;
  const products = {
    spec: inputs.spec,
    dtype,
    tokens: data.tokens / stepCount,
    labels: data.labelTokens / stepCount,
    threads: threads > 0 ? threads : native().info().threads,
  };
  const limits: LimitFigures[] = [];
  const ours: TrainFigures[] = [];
  const theirs: TrainFigures[] = [];
  for (let round = 1; round <= given.rounds; round++) {
    console.error(`${work.source} ${dtype}: round ${round} of ${given.rounds}`);
    ours.push(runNode<TrainFigures>('train_ours.ts', child));
    if (given.limit) limits.push(measureLimit(products));
    if (peer) theirs.push(runPython<TrainFigures>(peer, 'peft_train.py', child));
  }
  const tokensPerStep = data.tokensOfSteps(batchSize);
  const us = together(ours, tokensPerStep, warmup);
  const limit = limits.length > 0 ? middleRound(limits) : null;
  const them = peer ? together(theirs, tokensPerStep, warmup) : null;
  return {
    rows: work.source,
    dtype,
    ours: us,
    peer: them,
    ratios: them && {
      tokensPerSecond: us.tokensPerSecond / them.tokensPerSecond,
      peakBytes: us.peakBytes / them.peakBytes,
    },
    lossDifference: them && largestDifference(us.losses, them.losses),
    limit: limit && { ...limit, share: us.tokensPerSecond / limit.tokensPerSecond },
  };
}

function show(result: Result): string {
  const { ours, peer, ratios, lossDifference, dtype, limit } = result;
  const rate = ({ tokensPerSecond, range }: Side) =>
    `${tokensPerSecond.toFixed(0)} (${range.map((value) => value.toFixed(0)).join('–')})`;
  const cells: string[][] = [[dtype, 'lora-da', 'PEFT', 'ratio']];
  cells.push(['tokens/s', rate(ours), peer ? rate(peer) : '-', ratios ? `${ratios.tokensPerSecond.toFixed(2)}×` : '-']);
  cells.push([
    'peak memory',
    gigabytes(ours.peakBytes),
    peer ? gigabytes(peer.peakBytes) : '-',
    ratios ? `${ratios.peakBytes.toFixed(2)}×` : '-',
  ]);
  ours.losses.forEach((loss, step) => {
    cells.push([`loss, step ${step + 1}`, loss.toFixed(5), peer ? peer.losses[step]!.toFixed(5) : '-', '']);
  });
  const difference =
    lossDifference === null ? [] : [`  largest relative difference of a loss: ${lossDifference.toExponential(1)}`];
  const share = limit
    ? [
        `  limit: the products alone ${limit.tokensPerSecond.toFixed(0)} tokens/s (${limit.gigaflops.toFixed(0)} GFLOP/s); ` +
          `lora-da has ${(100 * limit.share).toFixed(0)} % of it`,
      ]
    : [];
  return [table(cells), ...difference, ...share].join('\n');
}

function describeWork({ source, data, batchSize }: Work, { steps, rounds, warmup }: Options): string {
  const perStep = Math.round(data.tokens / (data.rows / batchSize));
  return (
    `Rows ${source}: ${batchSize} a step, ${perStep} real tokens (${((100 * data.labelTokens) / data.tokens).toFixed(0)} % labelled), ` +
    `longest row ${data.longest}; ${rounds} rounds of ${steps} steps after ${warmup} of warm-up`
  );
}

async function main(): Promise<void> {
  const given = options();
  if (!given.model) return console.log(noModel);
  const peer = findPeer();
  const inputs = await Inputs.open(given.model);
  try {
    const machine = describeMachine(given.threads, peer);
    console.log(
      heading({
        ...machine,
        model: describeModel(inputs),
        adapter: 'rank 8, alpha 16, rsLoRA, every linear module',
      }),
    );
    if (!peer) console.log(`peer skipped: ${peerHint}`);
    if (!hasLimit()) console.log(limitHint);
    const adapter = await inputs.adapter();
    const results: Result[] = [];
    for (const source of given.sources) {
      const work = await prepareWork(inputs, source, given);
      if (!work) {
        console.log(`\nRows ${source}: skipped, the data are not here`);
        continue;
      }
      console.log(`\n${describeWork(work, given)}`);
      for (const dtype of given.dtypes) {
        const result = measure(inputs, work, dtype, adapter, peer, given);
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
