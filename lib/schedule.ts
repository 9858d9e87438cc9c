import type { LearningRateSchedule } from './config';

/** How the learning rate goes up and down: as transformers' `get_*_schedule_with_warmup`. */
export interface Schedule {
  scheduler: LearningRateSchedule;
  learningRate: number;
  warmupSteps: number;
  totalSteps: number;
}

type Shape = (progress: number) => number;

/** Factor on the learning rate after warm-up; progress goes from 0 to 1 at the end of the run. */
const shapes: Record<LearningRateSchedule, Shape> = {
  cosine: (progress) => Math.max(0, 0.5 * (1 + Math.cos(Math.PI * progress))),
  linear: (progress) => Math.max(0, 1 - progress),
  constant: () => 1,
};

/**
 * Learning rate of one optimizer step.
 *
 * With warm-up the first step's rate is 0, as in transformers, and step warmupSteps + 1 has the full rate.
 *
 * @param step  1 for the first optimizer step
 *
 * @example
 * ```ts
 * learningRateAt({ scheduler: 'cosine', learningRate: 1e-2, warmupSteps: 3, totalSteps: 12 }, 2); // 0.00333…
 * ```
 */
export function learningRateAt(schedule: Schedule, step: number): number {
  const { scheduler, learningRate, warmupSteps, totalSteps } = schedule;
  const done = step - 1;
  if (done < warmupSteps) return learningRate * (done / Math.max(1, warmupSteps));
  const progress = (done - warmupSteps) / Math.max(1, totalSteps - warmupSteps);
  return learningRate * shapes[scheduler](progress);
}

/** Warm-up steps of a run: the number given, else the ratio of all steps, rounded up as transformers does. */
export function warmupStepsOf(totalSteps: number, warmupSteps: number | undefined, warmupRatio: number): number {
  return warmupSteps ?? Math.ceil(totalSteps * warmupRatio);
}
