import type { Dataset } from './dataset';

/** Tokens of one packed batch in evaluation and in the collection of statistics. */
export const packedTokens = 2048;

/**
 * Packs whole rows, in their order, into batches of at most `budget` tokens; a longer row is a batch of its own.
 *
 * @param rows    row numbers of the data set
 * @param budget  tokens a batch may hold (default 2048)
 */
export function* packRows(data: Dataset, rows: Iterable<number>, budget = packedTokens): Generator<number[]> {
  let batch: number[] = [];
  let tokens = 0;
  for (const row of rows) {
    const length = data.rowLength(row);
    if (batch.length > 0 && tokens + length > budget) {
      yield batch;
      batch = [];
      tokens = 0;
    }
    batch.push(row);
    tokens += length;
  }
  if (batch.length > 0) yield batch;
}

/** 0, 1, … count − 1 */
export function* firstRows(count: number): Generator<number> {
  for (let row = 0; row < count; row++) yield row;
}
