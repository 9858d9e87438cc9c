/**
 * How long Node's event loop is held up while a model loads, trains and generates: the longest delay of a 5 ms timer, per phase.
 *
 *     npm run bench:event-loop -- [MODEL_FOLDER]
 */
import { existsSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { CausalLM, Dataset, Trainer } from '../lib/index';

const folder = process.argv[2] ?? join(homedir(), '.cache/lora-da/SmolLM2-135M-Instruct');

/** Runs a phase and prints its longest delay. */
async function phase<Result>(name: string, work: () => Promise<Result>): Promise<Result> {
  const delays = monitorEventLoopDelay({ resolution: 5 });
  delays.enable();
  const start = performance.now();
  const result = await work();
  delays.disable();
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  console.log(
    `${name.padEnd(10)} ${seconds.padStart(6)} s   longest delay ${(delays.max / 1e6 - 5).toFixed(1).padStart(6)} ms`,
  );
  return result;
}

async function main(): Promise<void> {
  if (!existsSync(folder)) {
    console.log(`skipped: no model in ${folder}`);
    return;
  }
  const rows = Array.from({ length: 2000 }, (_, i) => ({
    question: `What is ${i} plus ${i * 7} minus ${i % 13}?`,
    answer: `It is ${i + i * 7 - (i % 13)}, as you add first and take away then.`,
  }));
  const model = await phase('load', () => CausalLM.load(folder));
  const data = await phase('data', () => Dataset.load(rows, { tokenizer: model.tokenizer }));
  const adapter = model.addLora();
  await phase('init', () => adapter.initialize({ method: 'lora-da', samples: 64 }, data));
  await phase('train', () => new Trainer(model, { data, maxSteps: 10, batchSize: 16 }).train());
  await phase('generate', () => model.generate({ prompt: 'What is the capital of France?', maxNewTokens: 48 }));
  model.dispose();
}

main();
