/** Four unsigned 32-bit words: all that a {@link Random} is, as a checkpoint keeps it. */
export type RandomState = [number, number, number, number];

/**
 * A small random generator (sfc32, Chris Doty-Humphrey's Small Fast Counting generator) whose state can be saved: the
 * same seed gives the same numbers on every platform, and a restored state goes on where it was.
 *
 * @example
 * ```ts
 * const random = new Random(42);
 * random.below(6); // 0 … 5
 * const copy = Random.restore(random.state());
 * ```
 */
export class Random {
  #a: number;
  #b: number;
  #c: number;
  #counter: number;

  /** @param seed any integer; its low and high 32 bits are both used */
  constructor(seed: number) {
    this.#a = 0;
    this.#b = seed >>> 0;
    this.#c = Math.floor(seed / 2 ** 32) >>> 0;
    this.#counter = 1;
    for (let i = 0; i < 15; i++) this.next();
  }

  static restore(state: RandomState): Random {
    const random = new Random(0);
    [random.#a, random.#b, random.#c, random.#counter] = state;
    return random;
  }

  state(): RandomState {
    return [this.#a >>> 0, this.#b >>> 0, this.#c >>> 0, this.#counter >>> 0];
  }

  /** The next unsigned 32-bit integer. */
  next(): number {
    const sum = (((this.#a + this.#b) | 0) + this.#counter) | 0;
    this.#counter = (this.#counter + 1) | 0;
    this.#a = this.#b ^ (this.#b >>> 9);
    this.#b = (this.#c + (this.#c << 3)) | 0;
    this.#c = (((this.#c << 21) | (this.#c >>> 11)) + sum) | 0;
    return sum >>> 0;
  }

  /** An integer from 0 to bound − 1, each as likely (values of an incomplete last round are drawn again). */
  below(bound: number): number {
    const limit = 2 ** 32 - (2 ** 32 % bound);
    for (;;) {
      const value = this.next();
      if (value < limit) return value % bound;
    }
  }
}
