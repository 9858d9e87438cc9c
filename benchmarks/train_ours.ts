/**
 * LoRA training with lora-da on a model folder: our side of train.ts. Takes the same rows in the same order as
 * peft_train.py, steps in the same way (clipping at 1, AdamW at a constant 2e-4) and prints one JSON line of the same form.
 */
import { parseArgs } from 'node:util';
import { CausalLM, Dataset, type Dtype, Trainer } from '../lib/index';
import { median, runMain } from './harness';

/** What either side prints. */
export interface TrainFigures {
  /** Median over the measured steps; padding is not counted as tokens. */
  tokensPerSecond: number;
  /** Of the measured steps, those after the warm-up. */
  stepSeconds: number[];
  /** Largest resident set of the process. */
  peakBytes: number;
  /** Of every step, the warm-up included. */
  losses: number[];
}

/** Steps as a user has them: from the end of one step to the end of the next, the layout of the rows included. */
export async function measureSteps(
  model: CausalLM,
  data: Dataset,
  options: { batchSize: number; steps: number; warmup: number },
): Promise<Omit<TrainFigures, 'peakBytes'>> {
  const { batchSize, steps, warmup } = options;
  const training = { learningRate: 2e-4, scheduler: 'constant', warmupSteps: 0, shuffle: false } as const;
  const trainer = new Trainer(model, { data, batchSize, maxSteps: warmup + steps, ...training });
  const losses: number[] = [];
  const stepSeconds: number[] = [];
  const rates: number[] = [];
  let before = 0;
  trainer.on('start', () => {
    before = performance.now();
  });
  trainer.on('step', ({ step, loss, tokens }) => {
    const now = performance.now();
    const seconds = (now - before) / 1000;
    before = now;
    losses.push(loss);
    if (step <= warmup) return;
    stepSeconds.push(seconds);
    rates.push(tokens / seconds);
  });
  await trainer.train();
  return { tokensPerSecond: median(rates), stepSeconds, losses };
}

/** ru_maxrss, which Node.js gives in KiB. */
export const peakBytes = () => process.resourceUsage().maxRSS * 1024;

/** The model and the rows that a benchmark process is told to work on. */
export async function loadWork(values: {
  model?: string;
  rows?: string;
  dtype: string;
  threads: string;
  prepack?: boolean;
}) {
  const model = await CausalLM.load(values.model!, {
    device: 'cpu',
    dtype: values.dtype as Dtype,
    threads: Number(values.threads),
    prepack: values.prepack ?? false,
  });
  const data = await Dataset.load(values.rows!, {
    vocabSize: model.spec.vocabSize,
    maxLength: model.spec.maxPositions,
    overlong: 'error',
  });
  return { model, data };
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      rows: { type: 'string' },
      adapter: { type: 'string' },
      dtype: { type: 'string', default: 'float32' },
      'batch-size': { type: 'string', default: '4' },
      steps: { type: 'string', default: '5' },
      warmup: { type: 'string', default: '1' },
      threads: { type: 'string', default: '0' },
      prepack: { type: 'boolean', default: false },
    },
  });
  const { model, data } = await loadWork(values);
  await model.loadAdapter(values.adapter!);
  const batchSize = Number(values['batch-size']);
  const figures = await measureSteps(model, data, {
    batchSize,
    steps: Number(values.steps),
    warmup: Number(values.warmup),
  });
  console.log(JSON.stringify({ ...figures, peakBytes: peakBytes() } satisfies TrainFigures));
  data.dispose();
  await model.dispose();
}

if (require.main === module) runMain(main);
