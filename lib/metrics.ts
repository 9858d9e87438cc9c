import { createReadStream } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import { onDisk } from './run_folder';

/** One line of metrics.jsonl: an optimizer step. */
export interface StepMetrics {
  /** 1 for the first optimizer step. */
  step: number;
  /** Passes over the data after this step, with a fraction. */
  epoch: number;
  /** Cross-entropy of the step, mean over its label tokens, before its update. */
  loss: number;
  /** L2 norm of the adapter's gradient before clipping. */
  gradNorm: number;
  learningRate: number;
  /** Tokens of the step. */
  tokens: number;
  tokensPerSecond: number;
}

/** One line of evaluations.jsonl: the held-out loss after a step. */
export interface EvaluationMetrics {
  /** 0: before the first update. */
  step: number;
  epoch: number;
  loss: number;
  perplexity: number;
  labelTokens: number;
  seconds: number;
}

/** A file of JSON lines that grows; what was appended lies with the system at once, so that a killed process loses none. */
export class JsonLines {
  #bytes: number;
  #last: Promise<void> = Promise.resolve();

  private constructor(
    readonly path: string,
    readonly handle: FileHandle,
    bytes: number,
  ) {
    this.#bytes = bytes;
  }

  /** Opens or makes a file and cuts it to its first `keep` bytes. */
  static async open(path: string, keep: number): Promise<JsonLines> {
    return onDisk(path, async () => {
      const handle = await open(path, 'a+');
      const { size } = await handle.stat();
      if (size > keep) await handle.truncate(keep);
      return new JsonLines(path, handle, Math.min(size, keep));
    });
  }

  /** Bytes of the file with all lines appended so far. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Appends a line; lines keep their order without being waited for. */
  append(value: object): Promise<void> {
    const line = Buffer.from(`${JSON.stringify(value)}\n`);
    this.#bytes += line.length;
    this.#last = this.#last.then(() => onDisk(this.path, () => this.handle.appendFile(line)));
    this.#last.catch(() => {});
    return this.#last;
  }

  /** Waits for all lines and for the disk. */
  async sync(): Promise<void> {
    await this.#last;
    await onDisk(this.path, () => this.handle.sync());
  }

  async close(): Promise<void> {
    try {
      await this.#last;
    } finally {
      await this.handle.close();
    }
  }
}

/** Reads a file of JSON lines; a last line cut short is left out, a missing file has none. */
export async function* readJsonLines<T>(path: string): AsyncGenerator<T> {
  const stream = createReadStream(path);
  const missing = new Promise<boolean>((resolve) => {
    stream.once('open', () => resolve(false));
    stream.once('error', () => resolve(true));
  });
  if (await missing) return;
  for await (const line of createInterface({ input: stream, crlfDelay: Number.POSITIVE_INFINITY })) {
    if (line === '') continue;
    try {
      yield JSON.parse(line) as T;
    } catch {
      return;
    }
  }
}
