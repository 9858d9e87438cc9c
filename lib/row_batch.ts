import { LoraDaError } from './errors';
import { jsonReason } from './files';
import { countLabels, encodeRow, type RowOptions } from './rows';
import type { TextCodec } from './text_codec';

/** A stretch of a data file that holds whole rows, or rows from memory. */
export type RowSource =
  | { kind: 'lines'; bytes: Uint8Array }
  /** Elements of a JSON array: element i is bytes[bounds[2i] … bounds[2i + 1]), from line lines[i] on. */
  | { kind: 'elements'; bytes: Uint8Array; bounds: Uint32Array; lines: Uint32Array }
  | { kind: 'objects'; rows: unknown[] };

/** Why rows are not in the data set. */
export interface DroppedRows {
  /** Longer than maxLength. */
  overlong: number;
  /** No label token left. */
  unlabelled: number;
}

/** Rows as tokens, laid end to end. */
export interface RowBatch {
  ids: Int32Array;
  labels: Int32Array;
  lengths: Int32Array;
  labelCounts: Int32Array;
  dropped: DroppedRows;
  truncated: number;
  /** Rows seen, kept or not. */
  seen: number;
  /** Lines that the source ends, for `lines`. */
  lines: number;
  /** The row that stopped the work: its line (from 0 within `lines`, absolute for `elements`) or number. */
  failure?: { at: number; code: LoraDaError['code']; message: string };
}

/** Parses and encodes all rows of a source. Runs in a worker thread. */
export function encodeRows(source: RowSource, options: RowOptions, codec: TextCodec | undefined): RowBatch {
  const builder = new BatchBuilder(options, codec);
  if (source.kind === 'objects') {
    for (const [i, row] of source.rows.entries()) builder.add(i, () => row);
  }
  if (source.kind === 'lines') builder.addLines(source.bytes);
  if (source.kind === 'elements') {
    const { bytes, bounds, lines } = source;
    for (let i = 0; i < lines.length; i++) {
      builder.add(lines[i]!, () => parse(decodeText(bytes.subarray(bounds[2 * i], bounds[2 * i + 1]))));
    }
  }
  return builder.finish();
}

class BatchBuilder {
  private ids = new Int32Array(1 << 14);
  private labels = new Int32Array(1 << 14);
  private size = 0;
  private lines = 0;
  private seen = 0;
  private truncated = 0;
  private readonly lengths: number[] = [];
  private readonly labelCounts: number[] = [];
  private readonly dropped: DroppedRows = { overlong: 0, unlabelled: 0 };
  private failure: RowBatch['failure'];

  constructor(
    private readonly options: RowOptions,
    private readonly codec: TextCodec | undefined,
  ) {}

  addLines(bytes: Uint8Array): void {
    let text: string | undefined;
    try {
      text = decodeText(bytes);
    } catch {
      // Some line is not UTF-8: take them one by one, to find it.
      this.addLinesOneByOne(bytes);
      return;
    }
    for (let begin = 0; begin < text.length && !this.failure; ) {
      const found = text.indexOf('\n', begin);
      const end = found < 0 ? text.length : found;
      const line = text.slice(begin, end);
      if (!isBlank(line)) this.add(this.lines, () => parse(line));
      if (found >= 0) this.lines++;
      begin = end + 1;
    }
  }

  private addLinesOneByOne(bytes: Uint8Array): void {
    for (let begin = 0; begin < bytes.length && !this.failure; ) {
      const found = bytes.indexOf(10, begin);
      const end = found < 0 ? bytes.length : found;
      const line = bytes.subarray(begin, end);
      this.add(this.lines, () => parse(decodeText(line)), true);
      if (found >= 0) this.lines++;
      begin = end + 1;
    }
  }

  /** @param at  what a failure names: line or number of the row */
  add(at: number, read: () => unknown, skipBlank = false): void {
    if (this.failure) return;
    try {
      const value = read();
      if (skipBlank && value === undefined) return;
      this.seen++;
      const { ids, labels } = encodeRow(value, this.options, this.codec);
      this.append(ids, labels);
    } catch (error) {
      const known = error instanceof LoraDaError;
      this.failure = { at, code: known ? error.code : 'INTERNAL', message: (error as Error).message };
    }
  }

  private append(ids: ArrayLike<number>, labels: ArrayLike<number>): void {
    const { maxLength, overlong } = this.options;
    let length = ids.length;
    if (length > maxLength) {
      if (overlong === 'error') {
        throw new LoraDaError('INVALID_DATA', `expected at most ${maxLength} tokens (maxLength), found ${length}`);
      }
      if (overlong === 'drop') {
        this.dropped.overlong++;
        return;
      }
      length = maxLength;
    }
    const labelCount = countLabels(labels, length);
    if (labelCount === 0) {
      this.dropped.unlabelled++;
      return;
    }
    if (length < ids.length) this.truncated++;
    this.reserve(length);
    for (let i = 0; i < length; i++) {
      this.ids[this.size + i] = ids[i]!;
      this.labels[this.size + i] = labels[i]!;
    }
    this.size += length;
    this.lengths.push(length);
    this.labelCounts.push(labelCount);
  }

  private reserve(length: number): void {
    if (this.size + length <= this.ids.length) return;
    const capacity = Math.max(this.ids.length * 2, this.size + length);
    this.ids = grown(this.ids, capacity, this.size);
    this.labels = grown(this.labels, capacity, this.size);
  }

  finish(): RowBatch {
    return {
      ids: this.ids.slice(0, this.size),
      labels: this.labels.slice(0, this.size),
      lengths: Int32Array.from(this.lengths),
      labelCounts: Int32Array.from(this.labelCounts),
      dropped: this.dropped,
      truncated: this.truncated,
      seen: this.seen,
      lines: this.lines,
      failure: this.failure,
    };
  }
}

function grown(values: Int32Array, capacity: number, used: number): Int32Array<ArrayBuffer> {
  const bigger = new Int32Array(capacity);
  bigger.set(values.subarray(0, used));
  return bigger;
}

function parse(text: string): unknown {
  if (isBlank(text)) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new LoraDaError('INVALID_DATA', `expected a JSON object, ${jsonReason(error)}`);
  }
}

function decodeText(bytes: Uint8Array): string {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new LoraDaError('INVALID_DATA', 'expected UTF-8 text');
  }
}

function isBlank(line: string): boolean {
  return line.length < 1000 && line.trim().length === 0;
}
