/** The matrix products of a step alone (limit.cpp): the figure that training and the start are a share of. */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { DecoderSpec, Dtype } from '../lib/native';
import { BenchmarkError, median, root } from './harness';

const program = join(root, 'build/bench_limit');

export const limitHint = 'limit skipped: build/bench_limit is not there; build it with `npm run build:native`';

/** Whether the build of this checkout has made the program. */
export const hasLimit = () => existsSync(program);

/** What the program prints. */
export interface LimitFigures {
  /** Median of the sweeps. */
  seconds: number;
  tokensPerSecond: number;
  gigaflops: number;
  /** Rows of the head's chunks, the fastest that were tried. */
  headChunk: number;
  threads: number;
  /** Seconds of each kind of product. */
  parts: { forward: number; inputGrad: number; head: number; gradient: number; moment: number };
}

export interface LimitWork {
  spec: DecoderSpec;
  dtype: Dtype;
  /** Rows of a step's products. */
  tokens: number;
  /** Rows that go through the head. */
  labels: number;
  threads: number;
  sweeps?: number;
  /** Add the products of the LoRA-DA collection. */
  collect?: boolean;
}

function run<T>(args: string[]): T {
  const { status, signal, stdout, stderr, error } = spawnSync(program, args, { encoding: 'utf8' });
  if (error || status !== 0) {
    throw new BenchmarkError(`bench_limit: ${error?.message ?? (stderr.trim() || `ended by ${signal}`)}`, 1);
  }
  return JSON.parse(stdout);
}

const width = (linears: { out: number }[]) => linears.reduce((sum, { out }) => sum + out, 0);

export function measureLimit({ spec, dtype, tokens, labels, threads, sweeps = 3, collect }: LimitWork): LimitFigures {
  const numbers = {
    hidden: spec.hiddenSize,
    intermediate: spec.intermediateSize,
    query: spec.heads * spec.headDim,
    qkv: width(spec.attentionInputs),
    vocab: spec.vocabSize,
    layers: spec.layers,
    tokens: Math.round(tokens),
    labels: Math.max(1, Math.round(labels)),
    threads,
    sweeps,
  };
  const args = Object.entries(numbers).flatMap(([name, value]) => [`--${name}`, String(value)]);
  return run([...args, '--dtype', dtype, ...(collect ? ['--collect'] : [])]);
}

/** Several rounds as one: the median round. */
export function middleRound(rounds: LimitFigures[]): LimitFigures {
  const seconds = median(rounds.map((round) => round.seconds));
  const closest = (round: LimitFigures) => Math.abs(round.seconds - seconds);
  return rounds.reduce((best, round) => (closest(round) < closest(best) ? round : best));
}

/** Bytes per second that all threads together read from memory. */
export function measureBandwidth(threads: number): number {
  return run<{ bytesPerSecond: number }>(['--bandwidth', '--threads', String(threads)]).bytesPerSecond;
}
