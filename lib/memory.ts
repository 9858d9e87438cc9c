import type { CausalLM } from './causal_lm';
import type { Dataset } from './dataset';
import type { InitializationOptions } from './initializations';
import type { CollectionPlan, NativeBatch } from './native';
import type { Trainer } from './trainer';

/** Tokens of the step that is timed. */
const timedTokens = 512;
/** A token of the collection pass costs about this much of one in a training step: 6.9·P flops to 4·P. */
const collectionCost = 6.9 / 4;
/** A token of an evaluation: 2·P flops to 4·P. */
const evaluationCost = 0.5;

/** What a run will need, as `train --dry-run` tells it. Bytes and seconds. */
export interface RunEstimate {
  steps: number;
  rows: number;
  /** Tokens that the run trains on. */
  tokens: number;
  memory: {
    weights: number;
    activations: number;
    adapters: number;
    workspace: number;
    total: number;
    /** What the device has free now, with weights and adapters in place; 0 where unknown. */
    free: number;
    /** What the start takes at its peak, the model included, in bytes; null where it looks at no data. */
    initialization: CollectionPlan | null;
  };
  /** From a short step that was measured. */
  tokensPerSecond: number;
  seconds: { initialization: number; training: number; evaluation: number; total: number };
}

/** Options of {@link estimateRun}. */
export interface EstimateOptions {
  /** Rows that the initialization looks at; 0 when it looks at none. */
  samples: number;
  /** How the adapter will be started, for the plan of its memory. */
  initialize: InitializationOptions;
  evalData?: Dataset;
}

/**
 * Memory and time that a run will need: the core's memory plan for the largest micro-batch that can come up, and the time
 * of one short step. Leaves the factors as they are, but not the optimizer's moments: meant for a dry run.
 *
 * @param trainer  of the run, not started
 *
 * @example
 * ```ts
 * const initialize = { method: 'lora-da', samples: 256 };
 * const { memory, seconds } = await estimateRun(model, trainer, data, { samples: 256, initialize });
 * ```
 */
export async function estimateRun(
  model: CausalLM,
  trainer: Trainer,
  data: Dataset,
  options: EstimateOptions,
): Promise<RunEstimate> {
  const { batchSize, recompute } = trainer.training;
  const lengths = Array.from({ length: data.length }, (_, row) => row).sort(
    (a, b) => data.rowLength(b) - data.rowLength(a),
  );
  const largest = lengths.slice(0, batchSize);
  const tokens = sum(largest, (row) => data.rowLength(row));
  const labels = Math.max(
    1,
    sum(largest, (row) => data.labelTokens(row)),
  );
  const plan = await model.native.planMemory(tokens, labels, data.rowLength(largest[0]!), recompute);
  const memory = {
    ...plan,
    total: plan.weights + plan.activations + plan.adapters + plan.workspace,
    initialization: (await model.adapter?.planInitialization(options.initialize, data)) ?? null,
  };

  const tokensPerSecond = await measureStep(model, trainer, data);
  const perRow = data.tokens / data.length;
  const trained = (trainer.totalSteps / trainer.stepsPerEpoch) * data.tokens;
  const { evalData } = options;
  const evaluations = evalData
    ? Math.floor(trainer.totalSteps / (trainer.training.evalSteps ?? trainer.stepsPerEpoch)) + 2
    : 0;
  const initialization = (Math.min(options.samples, data.length) * perRow * collectionCost) / tokensPerSecond;
  const training = trained / tokensPerSecond;
  const evaluation = (evaluations * (evalData?.tokens ?? 0) * evaluationCost) / tokensPerSecond;
  return {
    steps: trainer.totalSteps,
    rows: data.length,
    tokens: Math.round(trained),
    memory,
    tokensPerSecond,
    seconds: { initialization, training, evaluation, total: initialization + training + evaluation },
  };
}

/** Tokens per second of a short step; the first one also warms up. */
async function measureStep(model: CausalLM, trainer: Trainer, data: Dataset): Promise<number> {
  const rows: number[] = [];
  let tokens = 0;
  for (let row = 0; row < data.length && tokens < timedTokens; row++) {
    rows.push(row);
    tokens += data.rowLength(row);
  }
  const batch: NativeBatch = data.batch(rows);
  const { recompute, maxGradNorm } = trainer.training;
  const options = { learningRate: 0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0, maxGradNorm, recompute };
  await model.native.trainStep([batch], { ...options, step: 1 });
  const { seconds } = await model.native.trainStep([batch], { ...options, step: 2 });
  return batch.inputIds.length / seconds;
}

function sum(rows: number[], of: (row: number) => number): number {
  return rows.reduce((total, row) => total + of(row), 0);
}
