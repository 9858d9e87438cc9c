import { randomBytes } from 'node:crypto';
import { closeSync, fstatSync, openSync, readSync, unlinkSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { LoraDaError } from './errors';
import { fileError } from './files';

/** Tokens and labels of some rows, laid end to end; in memory, or in the spill file from byte `offset` on. */
interface Chunk {
  length: number;
  ids?: Int32Array;
  labels?: Int32Array;
  offset: number;
}

/** Rows of tokens. What exceeds a budget of memory goes to a temporary file that no name points to. */
export class TokenStore {
  private readonly chunks: Chunk[] = [];
  private chunkOfRow = new Uint32Array(1024);
  private startOfRow = new Uint32Array(1024);
  private lengthOfRow = new Uint32Array(1024);
  private labelsOfRow = new Uint32Array(1024);
  private rows = 0;
  private memory = 0;
  private spill: number | undefined;
  private spilled = 0;

  /** @param budget  bytes of tokens and labels to keep in memory */
  constructor(private readonly budget: number) {}

  get length(): number {
    return this.rows;
  }

  /** Bytes in the temporary file. */
  get spilledBytes(): number {
    return this.spilled;
  }

  /**
   * Takes over rows that lie end to end.
   *
   * @throws {LoraDaError} `IO_ERROR` where the temporary file cannot be written
   */
  append(ids: Int32Array, labels: Int32Array, lengths: Int32Array, labelCounts: Int32Array): void {
    if (lengths.length === 0) return;
    this.reserve(this.rows + lengths.length);
    let start = 0;
    for (let i = 0; i < lengths.length; i++) {
      const row = this.rows + i;
      this.chunkOfRow[row] = this.chunks.length;
      this.startOfRow[row] = start;
      this.lengthOfRow[row] = lengths[i]!;
      this.labelsOfRow[row] = labelCounts[i]!;
      start += lengths[i]!;
    }
    this.rows += lengths.length;
    this.chunks.push(this.keep(ids, labels));
  }

  rowLength(row: number): number {
    return this.lengthOfRow[row]!;
  }

  labelCount(row: number): number {
    return this.labelsOfRow[row]!;
  }

  /** Copies a row's tokens and labels to the given place. */
  copyRow(row: number, ids: Int32Array, labels: Int32Array, at: number): void {
    const chunk = this.chunks[this.chunkOfRow[row]!]!;
    const start = this.startOfRow[row]!;
    const length = this.lengthOfRow[row]!;
    if (chunk.ids && chunk.labels) {
      ids.set(chunk.ids.subarray(start, start + length), at);
      labels.set(chunk.labels.subarray(start, start + length), at);
      return;
    }
    this.read(ids.subarray(at, at + length), chunk.offset + 4 * start);
    this.read(labels.subarray(at, at + length), chunk.offset + 4 * (chunk.length + start));
  }

  dispose(): void {
    this.chunks.length = 0;
    if (this.spill !== undefined) closeSync(this.spill);
    this.spill = undefined;
  }

  private keep(ids: Int32Array, labels: Int32Array): Chunk {
    const bytes = ids.byteLength + labels.byteLength;
    if (this.memory + bytes <= this.budget) {
      this.memory += bytes;
      return { length: ids.length, ids, labels, offset: 0 };
    }
    const offset = this.spilled;
    this.write(ids);
    this.write(labels);
    return { length: ids.length, offset };
  }

  private write(values: Int32Array): void {
    try {
      this.spill ??= openUnlinked();
      const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
      for (let done = 0; done < bytes.length; ) {
        done += writeSync(this.spill, bytes, done, bytes.length - done, this.spilled + done);
      }
      this.spilled += bytes.length;
    } catch (error) {
      throw fileError(error, `the temporary file of tokens in ${tmpdir()}`, 'write');
    }
  }

  private read(values: Int32Array, position: number): void {
    const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
    for (let done = 0; done < bytes.length; ) {
      const read = readSync(this.spill!, bytes, done, bytes.length - done, position + done);
      if (read === 0) {
        const { size } = fstatSync(this.spill!);
        throw new LoraDaError('FILE_TRUNCATED', `The temporary file of tokens was cut to ${size} bytes`);
      }
      done += read;
    }
  }

  private reserve(rows: number): void {
    if (rows <= this.chunkOfRow.length) return;
    const capacity = Math.max(rows, 2 * this.chunkOfRow.length);
    this.chunkOfRow = grown(this.chunkOfRow, capacity);
    this.startOfRow = grown(this.startOfRow, capacity);
    this.lengthOfRow = grown(this.lengthOfRow, capacity);
    this.labelsOfRow = grown(this.labelsOfRow, capacity);
  }
}

function grown(values: Uint32Array, capacity: number): Uint32Array<ArrayBuffer> {
  const bigger = new Uint32Array(capacity);
  bigger.set(values);
  return bigger;
}

function openUnlinked(): number {
  const file = join(tmpdir(), `lora-da-tokens-${randomBytes(8).toString('hex')}`);
  const descriptor = openSync(file, 'wx+', 0o600);
  unlinkSync(file);
  return descriptor;
}
