/**
 * Trains a model beside PEFT in one run, both from one adapter on the same rows, each side in processes of its own and
 * the sides in turn, and prints tokens/s, peak memory, losses and their ratios, and our share of the limit: of what the
 * matrix products of a step alone come to (limit.cpp).
 *
 *     npm run bench:train -- [--model DIR] [--dtype bfloat16,float32] [--rows 4x256,gsm8k,FILE] [--steps 6] [--rounds 2]
 *                            [--warmup 1] [--batch-size 8] [--threads 0] [--prepack] [--no-limit] [--json]
 *
 * --rows  4x256: steps of 4 rows of 256 random tokens, all labelled; gsm8k or a data file: uneven rows with masked
 *         prompts, --batch-size of them a step (PEFT pads them to the longest). --json: the figures, as the last line.
 */
import { parseArgs } from 'node:util';
import { measureTraining, type Side, type TrainingResult } from './beside_peft';
import {
  describeMachine,
  describeModel,
  dtypeList,
  findPeer,
  gigabytes,
  heading,
  modelFolder,
  noModel,
  nonNegativeInteger,
  peerHint,
  positiveInteger,
  runMain,
  table,
} from './harness';
import { Inputs, meanStep, prepareWork, type Work } from './inputs';
import { hasLimit, limitHint } from './limit_program';

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
      prepack: { type: 'boolean', default: false },
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
    prepack: values.prepack,
    limit: values.limit && hasLimit(),
    json: values.json,
  };
}

type Options = ReturnType<typeof options>;

function show(result: TrainingResult): string {
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

function describeWork(work: Work, { steps, rounds, warmup }: Options): string {
  const { source, data, batchSize } = work;
  const perStep = Math.round(meanStep(work).tokens);
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
    const results: TrainingResult[] = [];
    for (const source of given.sources) {
      const work = await prepareWork(inputs, source, given);
      if (!work) {
        console.log(`\nRows ${source}: skipped, the data are not here`);
        continue;
      }
      console.log(`\n${describeWork(work, given)}`);
      for (const dtype of given.dtypes) {
        const result = measureTraining(inputs, work, dtype, adapter, peer, given);
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
