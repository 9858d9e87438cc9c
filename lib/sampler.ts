import { setImmediate } from 'node:timers/promises';
import { Random, type RandomState } from './random';

/** Where a {@link Sampler} stands, as a checkpoint keeps it. */
export interface SamplerState {
  /** Whole passes over the data that are done. */
  epoch: number;
  /** Rows of the current pass that have been drawn. */
  position: number;
  /** The generator as it was before the current pass was shuffled. */
  random: RandomState;
}

/** Rows are dealt out to batches of about the same number of tokens. */
export interface Balance {
  /** Rows of a batch. */
  batchSize: number;
  /** Tokens of a row. */
  rowLength(row: number): number;
}

export interface SamplerOptions {
  seed: number;
  shuffle: boolean;
  /** Default: rows come as the shuffle has them. */
  balance?: Balance;
}

/** Batches among which rows are dealt out at a time, so that a row stays near its place in the shuffle. */
const BALANCED_BATCHES = 32;

/** Swaps of a shuffle between two looks at the event loop: a few milliseconds. */
const SWAPS_PER_TURN = 1 << 17;

/**
 * The order in which rows are trained on: every row once an epoch, shuffled anew each epoch from the seed, or in file
 * order; then, where batches are to be balanced, rows change places with others nearby. A restored sampler draws the same rows as one that never stopped.
 *
 * @example
 * ```ts
 * const sampler = new Sampler(100, { seed: 42, shuffle: true });
 * await sampler.next(8); // eight row numbers, fewer at the end of an epoch
 * ```
 */
export class Sampler {
  #random: Random;
  #before: RandomState;
  #order: Uint32Array | undefined;
  #epoch = 0;
  #position = 0;

  constructor(
    readonly rows: number,
    readonly options: SamplerOptions,
    state?: SamplerState,
  ) {
    this.#random = state ? Random.restore(state.random) : new Random(options.seed);
    this.#before = this.#random.state();
    this.#epoch = state?.epoch ?? 0;
    this.#position = state?.position ?? 0;
  }

  /** Passes over the data so far, with the fraction of the current one. */
  get epoch(): number {
    return this.#epoch + this.#position / this.rows;
  }

  state(): SamplerState {
    return { epoch: this.#epoch, position: this.#position, random: [...this.#before] };
  }

  /** The next `count` rows; fewer when the epoch ends, and the next call begins a new one. */
  async next(count: number): Promise<number[]> {
    this.#order ??= await this.#balanced(await this.#shuffled());
    const end = Math.min(this.rows, this.#position + count);
    const rows = Array.from(this.#order.subarray(this.#position, end));
    this.#position = end;
    if (end === this.rows) this.#startEpoch();
    return rows;
  }

  #startEpoch(): void {
    this.#epoch++;
    this.#position = 0;
    this.#before = this.#random.state();
    if (this.options.shuffle) this.#order = undefined;
  }

  /** Fisher–Yates, a slice at a time so that millions of rows do not hold up the event loop. */
  async #shuffled(): Promise<Uint32Array> {
    const order = Uint32Array.from({ length: this.rows }, (_, row) => row);
    if (!this.options.shuffle) return order;
    for (let i = this.rows - 1; i > 0; i--) {
      const j = this.#random.below(i + 1);
      const swapped = order[i]!;
      order[i] = order[j]!;
      order[j] = swapped;
      if (i % SWAPS_PER_TURN === 0) await setImmediate();
    }
    return order;
  }

  async #balanced(order: Uint32Array): Promise<Uint32Array> {
    const { balance } = this.options;
    if (!balance) return order;
    const window = BALANCED_BATCHES * balance.batchSize;
    for (let first = 0; first < order.length; first += window) {
      dealOut(order.subarray(first, first + window), balance);
      await setImmediate();
    }
    return order;
  }
}

/** The longest rows first, each to the batch that has the fewest tokens and room left; the last batch may be smaller. */
function dealOut(rows: Uint32Array, { batchSize, rowLength }: Balance): void {
  const byLength = Array.from(rows, (row) => ({ row, tokens: rowLength(row) })).sort((a, b) => b.tokens - a.tokens);
  const batches = Array.from({ length: Math.ceil(rows.length / batchSize) }, (_, i) => ({
    first: i * batchSize,
    room: Math.min(batchSize, rows.length - i * batchSize),
    tokens: 0,
  }));
  for (const { row, tokens } of byLength) {
    const open = batches.filter(({ room }) => room > 0);
    const batch = open.reduce((least, other) => (other.tokens < least.tokens ? other : least));
    rows[batch.first++] = row;
    batch.room--;
    batch.tokens += tokens;
  }
}
