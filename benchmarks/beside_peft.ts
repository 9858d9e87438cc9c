/** Training with lora-da and with PEFT in one run, both from one adapter on the same rows, each side in processes of its own. */
import type { Dtype } from '../lib/native';
import { engineThreads, median, type Peer, runNode, runPython } from './harness';
import { type Inputs, meanStep, type Work } from './inputs';
import { type LimitFigures, measureLimit, middleRound } from './limit_program';
import type { TrainFigures } from './train_ours';

/** How often and for how long. */
export interface TrainingPlan {
  steps: number;
  warmup: number;
  rounds: number;
  threads: number;
  /** Our weights laid out once for each product. */
  prepack?: boolean;
  /** Measure the products alone too. */
  limit: boolean;
}

/** One side's rounds as one. */
export interface Side {
  tokensPerSecond: number;
  /** Slowest and fastest round. */
  range: [number, number];
  /** The largest of the rounds. */
  peakBytes: number;
  losses: number[];
}

export interface TrainingResult {
  rows: string;
  dtype: Dtype;
  ours: Side;
  peer: Side | null;
  ratios: { tokensPerSecond: number; peakBytes: number } | null;
  lossDifference: number | null;
  /** The products of a step of the same mean size alone, and our tokens/s over theirs. */
  limit: (LimitFigures & { share: number }) | null;
}

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

/** Our side, the limit and the peer in turn, so that a machine that drifts drifts for all of them. */
export function measureTraining(
  inputs: Inputs,
  work: Work,
  dtype: Dtype,
  adapter: string,
  peer: Peer | undefined,
  given: TrainingPlan,
): TrainingResult {
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
  const products = { spec: inputs.spec, dtype, ...meanStep(work), threads: engineThreads(threads) };
  const limits: LimitFigures[] = [];
  const ours: TrainFigures[] = [];
  const theirs: TrainFigures[] = [];
  for (let round = 1; round <= given.rounds; round++) {
    console.error(`${work.source} ${dtype}: round ${round} of ${given.rounds}`);
    ours.push(runNode<TrainFigures>('train_ours.ts', { ...child, prepack: given.prepack }));
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
