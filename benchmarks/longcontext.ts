/**
 * Long sequences: steps of one sequence of 1024, 2048 and 4096 tokens beside PEFT, tokens/s and peak memory of each.
 *
 *     npm run bench:longcontext -- [--model DIR] [--dtype bfloat16] [--lengths 1024,2048,4096] [--steps 2] [--warmup 1]
 *                                  [--rounds 1] [--threads 0] [--json]
 */
import { parseArgs } from 'node:util';
import type { Dtype } from '../lib/native';
import { measureTraining, type TrainingResult } from './beside_peft';
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
import { Inputs, prepareWork } from './inputs';

function options() {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      dtype: { type: 'string', default: 'bfloat16' },
      lengths: { type: 'string', default: '1024,2048,4096' },
      steps: { type: 'string', default: '2' },
      warmup: { type: 'string', default: '1' },
      rounds: { type: 'string', default: '1' },
      threads: { type: 'string', default: '0' },
      json: { type: 'boolean', default: false },
    },
  });
  return {
    model: modelFolder(values.model),
    dtypes: dtypeList(values.dtype),
    lengths: values.lengths.split(',').map((length) => positiveInteger('lengths', length)),
    steps: positiveInteger('steps', values.steps),
    warmup: positiveInteger('warmup', values.warmup),
    rounds: positiveInteger('rounds', values.rounds),
    threads: nonNegativeInteger('threads', values.threads),
    batchSize: 1,
    limit: false,
    json: values.json,
  };
}

interface Line {
  length: number;
  result: TrainingResult;
}

function show(dtype: Dtype, lines: Line[]): string {
  const cells = [[dtype, 'tokens/s lora-da', 'PEFT', 'ratio', 'peak lora-da', 'PEFT', 'ratio']];
  for (const { length, result } of lines) {
    const { ours, peer, ratios } = result;
    cells.push([
      `1x${length}`,
      ours.tokensPerSecond.toFixed(0),
      peer ? peer.tokensPerSecond.toFixed(0) : '-',
      ratios ? `${ratios.tokensPerSecond.toFixed(2)}×` : '-',
      gigabytes(ours.peakBytes),
      peer ? gigabytes(peer.peakBytes) : '-',
      ratios ? `${ratios.peakBytes.toFixed(2)}×` : '-',
    ]);
  }
  return table(cells);
}

async function main(): Promise<void> {
  const given = options();
  if (!given.model) return console.log(noModel);
  const peer = findPeer();
  const inputs = await Inputs.open(given.model);
  try {
    const machine = describeMachine(given.threads, peer);
    const plan = `${given.rounds} rounds of ${given.steps} steps after ${given.warmup} of warm-up, one sequence a step`;
    console.log(heading({ ...machine, model: describeModel(inputs), plan }));
    if (!peer) console.log(`peer skipped: ${peerHint}`);
    const adapter = await inputs.adapter();
    const results: Line[] = [];
    for (const dtype of given.dtypes) {
      const lines: Line[] = [];
      for (const length of given.lengths) {
        const work = await prepareWork(inputs, `1x${length}`, given);
        lines.push({ length, result: measureTraining(inputs, work!, dtype, adapter, peer, given) });
      }
      results.push(...lines);
      console.log(show(dtype, lines));
    }
    if (given.json) console.log(JSON.stringify({ machine, model: given.model, results }));
  } finally {
    inputs.remove();
  }
}

runMain(main);
