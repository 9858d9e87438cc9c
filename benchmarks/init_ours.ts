/**
 * A LoRA-DA start with lora-da on a model folder, then a few plain training steps over the same rows in the same process:
 * our side of init.ts. Prints one JSON line.
 */
import { parseArgs } from 'node:util';
import { runMain } from './harness';
import { loadWork, measureSteps, peakBytes } from './train_ours';

export interface InitFigures {
  collectSeconds: number;
  solveSeconds: number;
  /** The whole call as its caller sees it. */
  seconds: number;
  /** Largest resident set of the process when the start was done, before any training. */
  peakBytes: number;
  /** Of the training steps that follow. */
  trainTokensPerSecond: number;
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      rows: { type: 'string' },
      dtype: { type: 'string', default: 'float32' },
      threads: { type: 'string', default: '0' },
      'batch-size': { type: 'string', default: '8' },
      steps: { type: 'string', default: '4' },
      warmup: { type: 'string', default: '1' },
    },
  });
  const { model, data } = await loadWork(values);
  const adapter = model.addLora({ rank: 8, alpha: 16 });
  const began = performance.now();
  const { collectSeconds, solveSeconds } = await adapter.initialize({ method: 'lora-da', samples: data.length }, data);
  const seconds = (performance.now() - began) / 1000;
  const peak = peakBytes();
  const options = {
    batchSize: Number(values['batch-size']),
    steps: Number(values.steps),
    warmup: Number(values.warmup),
  };
  const { tokensPerSecond } = await measureSteps(model, data, options);
  const figures: InitFigures = {
    collectSeconds,
    solveSeconds,
    seconds,
    peakBytes: peak,
    trainTokensPerSecond: tokensPerSecond,
  };
  console.log(JSON.stringify(figures));
  data.dispose();
  await model.dispose();
}

runMain(main);
