/**
 * Trains a few steps with lora-da and tells what its memory goes to: our side of memory.ts. Prints one JSON line.
 */
import { parseArgs } from 'node:util';
import { type NativeMemoryPlan, native } from '../lib/native';
import { runMain } from './harness';
import { loadWork, measureSteps, peakBytes } from './train_ours';

export interface MemoryFigures {
  /** Resident set before the model is loaded: Node.js, its code, the add-on's libraries. */
  nodeBytes: number;
  /** Largest resident set when the model and the adapter were loaded. */
  loadedPeakBytes: number;
  /** Largest resident set of the whole process. */
  peakBytes: number;
  /** What the engine says that the largest step holds. */
  plan: NativeMemoryPlan;
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      rows: { type: 'string' },
      adapter: { type: 'string' },
      dtype: { type: 'string', default: 'float32' },
      'batch-size': { type: 'string', default: '4' },
      steps: { type: 'string', default: '2' },
      warmup: { type: 'string', default: '1' },
      threads: { type: 'string', default: '0' },
    },
  });
  native().info(); // loads the add-on and its libraries
  const nodeBytes = process.memoryUsage.rss();
  const { model, data } = await loadWork(values);
  await model.loadAdapter(values.adapter!);
  const loadedPeakBytes = peakBytes();
  const batchSize = Number(values['batch-size']);
  const plans: NativeMemoryPlan[] = [];
  for (let first = 0; first < data.length; first += batchSize) {
    const { inputIds, labels } = data.batch(Array.from({ length: batchSize }, (_, i) => first + i));
    const labelTokens = labels.filter((label) => label !== -100).length;
    plans.push(await model.native.planMemory(inputIds.length, labelTokens, model.spec.maxPositions, 'none'));
  }
  const plan = plans.reduce((most, other) => (other.activations > most.activations ? other : most));
  await measureSteps(model, data, { batchSize, steps: Number(values.steps), warmup: Number(values.warmup) });
  const figures: MemoryFigures = { nodeBytes, loadedPeakBytes, peakBytes: peakBytes(), plan };
  console.log(JSON.stringify(figures));
  data.dispose();
  await model.dispose();
}

runMain(main);
