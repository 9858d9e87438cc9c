import { createHash } from 'node:crypto';
import { stat } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { checkAborted, checkInteger, expected } from './arguments';
import { LoraDaError } from './errors';
import { fileError } from './files';
import type { NativeBatch } from './native';
import type { DroppedRows, RowBatch, RowSource } from './row_batch';
import { readRows } from './row_reader';
import type { RowOptions, TrainOn } from './rows';
import { TokenStore } from './token_store';
import type { Tokenizer } from './tokenizer';
import { WorkerClient } from './worker_client';

/** How far loading has come. */
export interface DatasetProgress {
  /** Rows kept so far. */
  rows: number;
  /** Bytes of the file read, and all of them; both 0 for rows from memory. */
  bytes: number;
  totalBytes: number;
}

/** Options of `Dataset.load`. */
export interface DatasetOptions {
  /** Encodes rows of text; without it rows have to be `input_ids` + `labels`. */
  tokenizer?: Tokenizer | undefined;
  /** Rows longer than this many tokens are treated as `overlong` says, 1 or more (default 1024). */
  maxLength?: number;
  /** What happens to rows over `maxLength`: the end is cut off, the row is left out, or loading fails (default `truncate`). */
  overlong?: 'truncate' | 'drop' | 'error';
  /**
   * Which tokens are labels: `completion` and `assistant` say the same, the completion of a row of prompt and completion and
   * the assistant's turns of a row of messages; `all` says every token (default `completion`). Rows of `text` have no prompt,
   * rows of `input_ids` bring their labels.
   */
  trainOn?: TrainOn;
  /** Ids from here on are errors (default: the tokenizer's size). */
  vocabSize?: number;
  /** Keep the first so many rows, 1 or more (default all). */
  limit?: number;
  /** Worker threads (default: one for each core, fewer for small files). */
  threads?: number;
  /** Bytes of tokens to keep in memory; the rest goes to a temporary file without a name (default 1 GiB). */
  memoryBudget?: number;
  /** Stops the work; rejects with `ABORTED`. */
  signal?: AbortSignal;
  onProgress?: (progress: DatasetProgress) => void;
}

/** One row. Position t predicts labels[t + 1]; -100 is no label. */
export interface DatasetRow {
  inputIds: Int32Array;
  labels: Int32Array;
}

/** A further worker thread pays for its start from this many bytes on. */
const bytesPerThread = 4 << 20;
const rowsPerSource = 1024;
const defaultMemoryBudget = 1 << 30;

/**
 * Examples as tokens and labels. docs/data.md says which rows are understood and how each becomes tokens.
 *
 * @example
 * ```ts
 * const data = await Dataset.load('train.jsonl', { tokenizer: model.tokenizer, maxLength: 512 });
 * console.log(data.length, data.labelTokensTotal, data.dropped);
 * const batch = data.batch([0, 1, 2]);
 * data.dispose();
 * ```
 */
export class Dataset {
  private disposed = false;

  private constructor(
    private readonly store: TokenStore,
    /** Tokens of all rows. */
    readonly tokens: number,
    /** Label tokens of all rows: labels from the second position of a row on. */
    readonly labelTokensTotal: number,
    /** Rows that were left out, by reason. */
    readonly dropped: Readonly<DroppedRows>,
    /** Rows that were cut to `maxLength`. */
    readonly truncated: number,
    /** sha256 over the lengths, ids and labels of all rows. */
    readonly hash: string,
  ) {}

  /**
   * Reads rows from a JSONL file, a file of one JSON array, or memory. Files of any size are streamed; parsing and encoding run
   * in worker threads. The result does not depend on their number.
   *
   * @param source  path of the file, or rows as objects
   * @throws {LoraDaError} `INVALID_DATA` naming file, line and field for a malformed row or an empty file, `NO_LABELS` where no
   *   row has a label token left, `FILE_NOT_FOUND`, `IO_ERROR`, `UNSUPPORTED` (CSV, Parquet), `INVALID_ARGUMENT`, `ABORTED`
   */
  static async load(source: string | Iterable<unknown>, options: DatasetOptions = {}): Promise<Dataset> {
    checkOptions(source, options);
    checkAborted(options.signal);
    const loader = new Loader(typeof source === 'string' ? source : 'rows', options, typeof source === 'string');
    try {
      if (typeof source === 'string') await loader.readFile(source);
      else await loader.readMemory(source);
      const result = await loader.finish();
      return new Dataset(
        result.store,
        result.tokens,
        result.labelTokens,
        result.dropped,
        result.truncated,
        result.hash,
      );
    } catch (error) {
      loader.store.dispose();
      throw error;
    } finally {
      loader.closeWorkers();
    }
  }

  /** Number of rows. */
  get length(): number {
    return this.store.length;
  }

  /** Tokens of row i. */
  rowLength(i: number): number {
    this.check(i);
    return this.store.rowLength(i);
  }

  /** Label tokens of row i: labels from its second position on. */
  labelTokens(i: number): number {
    this.check(i);
    return this.store.labelCount(i);
  }

  /** Row i, copied. */
  row(i: number): DatasetRow {
    this.check(i);
    const length = this.store.rowLength(i);
    const row = { inputIds: new Int32Array(length), labels: new Int32Array(length) };
    this.store.copyRow(i, row.inputIds, row.labels, 0);
    return row;
  }

  /**
   * Rows laid end to end, in the order given.
   *
   * @throws {LoraDaError} `INVALID_ARGUMENT` for an index that is not in the data set, `DISPOSED`
   */
  batch(indices: ArrayLike<number>): NativeBatch {
    const sequenceStarts = new Int32Array(indices.length + 1);
    for (let i = 0; i < indices.length; i++) {
      sequenceStarts[i + 1] = sequenceStarts[i]! + this.rowLength(indices[i]!);
    }
    const tokens = sequenceStarts[indices.length]!;
    const batch: NativeBatch = { inputIds: new Int32Array(tokens), labels: new Int32Array(tokens), sequenceStarts };
    for (let i = 0; i < indices.length; i++) {
      this.store.copyRow(indices[i]!, batch.inputIds, batch.labels, sequenceStarts[i]!);
    }
    return batch;
  }

  /** Frees the tokens and the temporary file; later calls throw `DISPOSED`. */
  dispose(): void {
    if (!this.disposed) this.store.dispose();
    this.disposed = true;
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  private check(i: number): void {
    if (this.disposed) throw new LoraDaError('DISPOSED', 'The data set was used after dispose()');
    if (!Number.isInteger(i) || i < 0 || i >= this.store.length) {
      throw expected(`row number from 0 to ${this.store.length - 1}`, 'index', i);
    }
  }
}

/** Sends sources of rows to the workers and takes the results in their order. */
class Loader {
  readonly store: TokenStore;
  private readonly rowOptions: RowOptions;
  private readonly limit: number;
  private readonly own: WorkerClient[] = [];
  private clients: WorkerClient[] = [];
  private readonly pending: Promise<{ batch: RowBatch; position: number }>[] = [];
  private sent = 0;
  private tokens = 0;
  private labelTokens = 0;
  private seen = 0;
  private place = 0;
  private totalBytes = 0;
  private truncated = 0;
  private readonly dropped: DroppedRows = { overlong: 0, unlabelled: 0 };
  private readonly hashes = { lengths: createHash('sha256'), ids: createHash('sha256'), labels: createHash('sha256') };

  constructor(
    private readonly name: string,
    private readonly options: DatasetOptions,
    private readonly isFile: boolean,
  ) {
    this.store = new TokenStore(options.memoryBudget ?? defaultMemoryBudget);
    this.limit = options.limit ?? Number.POSITIVE_INFINITY;
    this.rowOptions = {
      maxLength: options.maxLength ?? 1024,
      overlong: options.overlong ?? 'truncate',
      trainOn: options.trainOn ?? 'completion',
      vocabSize: options.vocabSize,
    };
  }

  async readFile(file: string): Promise<void> {
    const { size } = await stat(file).catch((error) => {
      throw fileError(error, file, 'read');
    });
    this.totalBytes = size;
    this.openWorkers(size / bytesPerThread);
    await readRows(file, ({ source, position }) => this.send(source, position));
    await this.drain(0);
    if (this.seen === 0) throw new LoraDaError('INVALID_DATA', `${file}: expected at least one row, found none`);
  }

  async readMemory(rows: Iterable<unknown>): Promise<void> {
    this.openWorkers(Array.isArray(rows) ? rows.length / (8 * rowsPerSource) : 1);
    let part: unknown[] = [];
    for (const row of rows) {
      part.push(row);
      if (part.length < rowsPerSource) continue;
      if (!(await this.send({ kind: 'objects', rows: part }, 0))) return;
      part = [];
    }
    if (part.length > 0) await this.send({ kind: 'objects', rows: part }, 0);
    await this.drain(0);
    if (this.seen === 0) throw new LoraDaError('INVALID_DATA', 'Expected at least one row, found none');
  }

  async finish() {
    const { dropped, truncated, store, tokens, labelTokens } = this;
    if (store.length === 0) throw this.noLabels();
    const hash = createHash('sha256');
    for (const part of Object.values(this.hashes)) hash.update(part.digest());
    return { store, tokens, labelTokens, dropped, truncated, hash: hash.digest('hex') };
  }

  closeWorkers(): void {
    for (const client of this.own) client.dispose();
  }

  private openWorkers(useful: number): void {
    const threads = this.options.threads ?? availableParallelism();
    const count = Math.max(1, Math.min(threads, Math.ceil(useful)));
    const { tokenizer } = this.options;
    if (tokenizer) this.clients.push(tokenizer.client);
    while (this.clients.length < count) {
      const client = new WorkerClient('tokenizer_worker', { directory: tokenizer?.directory });
      this.own.push(client);
      this.clients.push(client);
    }
  }

  /** False where no more rows are wanted. */
  private async send(source: RowSource, position: number): Promise<boolean> {
    checkAborted(this.options.signal);
    const client = this.clients[this.sent++ % this.clients.length]!;
    const buffer = source.kind === 'objects' ? undefined : source.bytes.buffer;
    const transfer = buffer instanceof ArrayBuffer ? [buffer] : [];
    const result = client
      .call<RowBatch>('rows', { source, options: this.rowOptions }, transfer)
      .then((batch) => ({ batch, position }));
    result.catch(() => {});
    this.pending.push(result);
    await this.drain(2 * this.clients.length);
    return this.store.length < this.limit;
  }

  /** Takes results until at most `most` are under way. */
  private async drain(most: number): Promise<void> {
    while (this.pending.length > most) {
      const { batch, position } = await this.pending.shift()!;
      checkAborted(this.options.signal);
      if (this.store.length < this.limit) this.take(batch, position);
    }
  }

  private take(batch: RowBatch, position: number): void {
    const kept = Math.min(batch.lengths.length, this.limit - this.store.length);
    const wanted = kept === batch.lengths.length ? batch : firstRows(batch, kept);
    const { ids, labels, lengths, labelCounts } = wanted;
    this.hashes.lengths.update(bytesOf(lengths));
    this.hashes.ids.update(bytesOf(ids));
    this.hashes.labels.update(bytesOf(labels));
    this.store.append(ids, labels, lengths, labelCounts);
    this.tokens += ids.length;
    for (const count of labelCounts) this.labelTokens += count;
    this.dropped.overlong += batch.dropped.overlong;
    this.dropped.unlabelled += batch.dropped.unlabelled;
    this.truncated += batch.truncated;
    this.seen += batch.seen;
    if (batch.failure && this.store.length < this.limit) throw this.failure(batch.failure);
    this.place += this.isFile ? batch.lines : batch.seen;
    this.options.onProgress?.({ rows: this.store.length, bytes: position, totalBytes: this.totalBytes });
  }

  private failure({ at, code, message }: NonNullable<RowBatch['failure']>): LoraDaError {
    const place = this.isFile ? `${this.name}:${this.place + at + 1}` : `rows[${this.place + at}]`;
    return new LoraDaError(code, `${place}: ${message}`);
  }

  private noLabels(): LoraDaError {
    const { overlong, unlabelled } = this.dropped;
    const why = `${unlabelled} without a label token${overlong > 0 ? `, ${overlong} over maxLength` : ''}`;
    return new LoraDaError('NO_LABELS', `${this.name}: no row is left to train on: ${why}`);
  }
}

function firstRows(batch: RowBatch, rows: number): RowBatch {
  const lengths = batch.lengths.slice(0, rows);
  const tokens = lengths.reduce((sum, length) => sum + length, 0);
  return {
    ...batch,
    lengths,
    ids: batch.ids.slice(0, tokens),
    labels: batch.labels.slice(0, tokens),
    labelCounts: batch.labelCounts.slice(0, rows),
  };
}

function bytesOf(values: Int32Array): Uint8Array {
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}

function checkOptions(source: unknown, options: DatasetOptions): void {
  if (
    typeof source === 'string' ? source === '' : typeof (source as Iterable<unknown>)?.[Symbol.iterator] !== 'function'
  ) {
    throw expected('path of a file or rows', 'source', source);
  }
  checkInteger('maxLength', options.maxLength ?? 1024, 1);
  checkInteger('threads', options.threads ?? 1, 1);
  checkInteger('limit', options.limit ?? 1, 1);
  checkInteger('vocabSize', options.vocabSize ?? 1, 1);
  checkInteger('memoryBudget', options.memoryBudget ?? 0, 0);
  checkChoice('overlong', options.overlong ?? 'truncate', ['truncate', 'drop', 'error']);
  checkChoice('trainOn', options.trainOn ?? 'completion', ['completion', 'assistant', 'all']);
}

function checkChoice(name: string, value: string, choices: string[]): void {
  if (!choices.includes(value)) throw expected(`one of ${choices.join(', ')}`, name, value);
}
