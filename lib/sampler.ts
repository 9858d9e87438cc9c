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

/** Swaps of a shuffle between two looks at the event loop: a few milliseconds. */
const SWAPS_PER_TURN = 1 << 17;

/**
 * The order in which rows are trained on: every row once an epoch, shuffled anew each epoch from the seed, or in file
 * order. A restored sampler draws the same rows as one that never stopped.
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
    readonly options: { seed: number; shuffle: boolean },
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
    this.#order ??= await this.#shuffled();
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
}
