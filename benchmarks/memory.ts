/**
 * Peak memory of training beside PEFT, and what ours goes to: the memory plan's weights, activations, adapters and workspace,
 * Node.js itself, and the rest that no plan names.
 *
 *     npm run bench:memory -- [--model DIR] [--dtype bfloat16,float32] [--rows 4x256,gsm8k,FILE] [--steps 3] [--warmup 1]
 *                             [--batch-size 8] [--threads 0] [--json]
 */
import { parseArgs } from 'node:util';
import type { Dtype } from '../lib/native';
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
  type Peer,
  peerHint,
  positiveInteger,
  runMain,
  runNode,
  runPython,
  table,
} from './harness';
import { Inputs, prepareWork, type Work } from './inputs';
import type { MemoryFigures } from './memory_ours';
import type { TrainFigures } from './train_ours';

interface Result {
  rows: string;
  dtype: Dtype;
  ours: MemoryFigures;
  peerBytes: number | null;
}

function options() {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      dtype: { type: 'string', default: 'bfloat16,float32' },
      rows: { type: 'string', default: '4x256,gsm8k' },
      steps: { type: 'string', default: '3' },
      warmup: { type: 'string', default: '1' },
      'batch-size': { type: 'string', default: '8' },
      threads: { type: 'string', default: '0' },
      json: { type: 'boolean', default: false },
    },
  });
  return {
    model: modelFolder(values.model),
    dtypes: dtypeList(values.dtype),
    sources: values.rows.split(','),
    steps: positiveInteger('steps', values.steps),
    warmup: positiveInteger('warmup', values.warmup),
    batchSize: positiveInteger('batch-size', values['batch-size']),
    threads: nonNegativeInteger('threads', values.threads),
    json: values.json,
  };
}

type Options = ReturnType<typeof options>;

function measure(
  model: string,
  work: Work,
  dtype: Dtype,
  adapter: string,
  peer: Peer | undefined,
  given: Options,
): Result {
  const { steps, warmup, threads } = given;
  const child = { model, rows: work.data.file, adapter, dtype, 'batch-size': work.batchSize, steps, warmup, threads };
  console.error(`${work.source} ${dtype}`);
  const ours = runNode<MemoryFigures>('memory_ours.ts', child);
  const peerBytes = peer ? runPython<TrainFigures>(peer, 'peft_train.py', child).peakBytes : null;
  return { rows: work.source, dtype, ours, peerBytes };
}

function show({ dtype, ours, peerBytes }: Result): string {
  const { plan, nodeBytes, loadedPeakBytes, peakBytes } = ours;
  const planned = plan.weights + plan.activations + plan.adapters + plan.workspace;
  const share = (bytes: number) => `${((100 * bytes) / peakBytes).toFixed(0)} %`;
  const line = (name: string, bytes: number) => [name, gigabytes(bytes), share(bytes)];
  const cells = [
    [dtype, 'lora-da', ''],
    line('peak', peakBytes),
    line('  weights, planned', plan.weights),
    line('  activations, planned', plan.activations),
    line('  adapters, planned', plan.adapters),
    line('  workspace, planned', plan.workspace),
    line('  Node.js before loading', nodeBytes),
    line('  the rest, in no plan', peakBytes - planned - nodeBytes),
    line('peak of loading alone', loadedPeakBytes),
  ];
  if (peerBytes === null) return table(cells);
  return `${table(cells)}\n  PEFT ${gigabytes(peerBytes)}: lora-da takes ${(peakBytes / peerBytes).toFixed(2)}× of it`;
}

async function main(): Promise<void> {
  const given = options();
  if (!given.model) return console.log(noModel);
  const peer = findPeer();
  const inputs = await Inputs.open(given.model);
  try {
    const machine = describeMachine(given.threads, peer);
    console.log(heading({ ...machine, model: describeModel(inputs) }));
    if (!peer) console.log(`peer skipped: ${peerHint}`);
    const adapter = await inputs.adapter();
    const results: Result[] = [];
    for (const source of given.sources) {
      const work = await prepareWork(inputs, source, given);
      if (!work) {
        console.log(`\nRows ${source}: skipped, the data are not here`);
        continue;
      }
      const largest = Math.max(...work.data.tokensOfSteps(work.batchSize));
      console.log(`\nRows ${source}: ${work.batchSize} a step, ${largest} real tokens in the largest step`);
      for (const dtype of given.dtypes) {
        const result = measure(given.model, work, dtype, adapter, peer, given);
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
