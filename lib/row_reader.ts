import type { FileHandle } from 'node:fs/promises';
import { extname } from 'node:path';
import { LoraDaError } from './errors';
import type { RowSource } from './row_batch';
import { withFile } from './safetensors';

/** Bytes that are read, and sent to a worker, at a time. */
const blockBytes = 1 << 20;
/** A longer row is taken for a file that is not JSONL. */
const longestRowBytes = 256 << 20;

/** A source of rows with the place that its failures count from. */
export interface PlacedSource {
  source: RowSource;
  /** Bytes of the file up to its end. */
  position: number;
}

const formats: Record<string, string> = {
  '.csv': 'CSV',
  '.tsv': 'TSV',
  '.parquet': 'Parquet',
  '.arrow': 'Arrow',
  '.gz': 'gzip',
  '.zst': 'Zstandard',
};

/**
 * Reads a JSONL file, or one JSON array, in blocks that hold whole rows. The first character tells which it is. The rows are
 * parsed elsewhere; here they are only told apart, so that a file of any size passes through in a few megabytes.
 *
 * @throws {LoraDaError} `FILE_NOT_FOUND`, `IO_ERROR`; `UNSUPPORTED` for other formats; `INVALID_DATA` for a row of more than
 *   256 MiB, an array that does not end, or something after its end
 */
export async function readRows(
  file: string,
  use: (next: PlacedSource, fileBytes: number) => Promise<boolean>,
): Promise<void> {
  const format = formats[extname(file).toLowerCase()];
  if (format)
    throw new LoraDaError('UNSUPPORTED', `${file}: ${format} is not supported; expected JSONL or a JSON array`);
  await withFile(file, async (handle) => {
    const stat = await handle.stat();
    if (stat.isDirectory()) throw new LoraDaError('INVALID_DATA', `${file}: expected a file, found a folder`);
    let splitter: Splitter | undefined;
    for await (const { block, position } of readBlocks(handle)) {
      splitter ??= chooseSplitter(block, file);
      const source = splitter?.push(block);
      if (source && !(await use({ source, position }, stat.size))) return;
    }
    const last = splitter?.end();
    if (last) await use({ source: last, position: stat.size }, stat.size);
  });
}

async function* readBlocks(handle: FileHandle): AsyncGenerator<{ block: Buffer; position: number }> {
  let position = 0;
  for (;;) {
    // Memory of its own, so that it can be handed to another thread.
    const block = Buffer.from(new ArrayBuffer(blockBytes));
    const { bytesRead } = await handle.read(block, 0, blockBytes, position);
    if (bytesRead === 0) return;
    const skip = position === 0 ? byteOrderMark(block) : 0;
    position += bytesRead;
    yield { block: block.subarray(skip, bytesRead), position };
  }
}

function byteOrderMark(block: Buffer): number {
  return block[0] === 0xef && block[1] === 0xbb && block[2] === 0xbf ? 3 : 0;
}

interface Splitter {
  push(block: Buffer): RowSource | undefined;
  end(): RowSource | undefined;
}

/** Undefined while there is nothing but white space. */
function chooseSplitter(block: Buffer, file: string): Splitter | undefined {
  const first = block.find((byte) => !isSpace(byte));
  if (first === undefined) return new LineSplitter(file);
  return first === 0x5b ? new ArraySplitter(file) : new LineSplitter(file);
}

/** Cuts after the last line feed of what has come. */
class LineSplitter implements Splitter {
  private carried: Buffer[] = [];
  private carriedBytes = 0;

  constructor(private readonly file: string) {}

  push(block: Buffer): RowSource | undefined {
    const end = block.lastIndexOf(10) + 1;
    if (end === 0) {
      this.carry(block);
      return undefined;
    }
    const bytes = joined([...this.carried, block.subarray(0, end)]);
    this.carried = [];
    this.carriedBytes = 0;
    this.carry(Buffer.from(block.subarray(end)));
    return { kind: 'lines', bytes };
  }

  end(): RowSource | undefined {
    return this.carriedBytes > 0 ? { kind: 'lines', bytes: joined(this.carried) } : undefined;
  }

  private carry(block: Buffer): void {
    if (block.length === 0) return;
    this.carried.push(block);
    this.carriedBytes += block.length;
    if (this.carriedBytes > longestRowBytes) throw tooLong(this.file);
  }
}

const [quote, backslash, comma, lineFeed] = [0x22, 0x5c, 0x2c, 10];

/** Tells the elements of the outermost array apart by its commas; whether they are JSON is for the parser to say. */
class ArraySplitter implements Splitter {
  private carried: Buffer = Buffer.alloc(0);
  private depth = 0;
  private inString = false;
  private escaped = false;
  private line = 0;
  private elementLine = 0;
  private any = false;
  private done = false;

  constructor(private readonly file: string) {}

  push(block: Buffer): RowSource | undefined {
    const start = this.carried.length;
    const bytes = start === 0 ? block : joined([this.carried, block]);
    const bounds: number[] = [];
    const lines: number[] = [];
    let begin = 0;
    const finish = (end: number) => {
      bounds.push(begin, end);
      lines.push(this.elementLine);
      this.any = true;
    };
    for (let i = start; i < bytes.length; i++) {
      const byte = bytes[i]!;
      if (byte === lineFeed) this.line++;
      if (this.inString) {
        if (this.escaped) this.escaped = false;
        else if (byte === backslash) this.escaped = true;
        else if (byte === quote) this.inString = false;
      } else if (isSpace(byte)) {
        if (i === begin) {
          begin = i + 1;
          this.elementLine = this.line;
        }
      } else if (this.done) {
        throw this.bad('expected nothing after the end of the array');
      } else if (byte === quote) {
        this.inString = true;
      } else if (byte === 0x5b || byte === 0x7b) {
        if (this.depth++ === 0) {
          begin = i + 1;
          this.elementLine = this.line;
        }
      } else if (byte === 0x5d || byte === 0x7d) {
        if (--this.depth === 0) {
          if (byte === 0x7d) throw this.bad('expected ] at the end of the array, found }');
          if (this.any || i > begin) finish(i);
          this.done = true;
          begin = i + 1;
        }
      } else if (byte === comma && this.depth === 1) {
        finish(i);
        begin = i + 1;
        this.elementLine = this.line;
      }
    }
    this.carried = Buffer.from(bytes.subarray(begin));
    if (this.carried.length > longestRowBytes) throw tooLong(this.file);
    if (lines.length === 0) return undefined;
    return { kind: 'elements', bytes, bounds: Uint32Array.from(bounds), lines: Uint32Array.from(lines) };
  }

  end(): undefined {
    if (!this.done) throw this.bad('expected ] at the end of the array, found the end of the file');
    return undefined;
  }

  private bad(message: string): LoraDaError {
    return new LoraDaError('INVALID_DATA', `${this.file}:${this.line + 1}: ${message}`);
  }
}

function tooLong(file: string): LoraDaError {
  return new LoraDaError(
    'INVALID_DATA',
    `${file}: expected one JSON object per line, found more than 256 MiB without an end`,
  );
}

/** One buffer with memory of its own, also where it is a single part. */
function joined(parts: Buffer[]): Buffer {
  if (parts.length === 1 && parts[0]!.buffer.byteLength >= blockBytes) return parts[0]!;
  const total = parts.reduce((sum, part) => sum + part.length, 0);
  const out = Buffer.from(new ArrayBuffer(total));
  let offset = 0;
  for (const part of parts) {
    out.set(part, offset);
    offset += part.length;
  }
  return out;
}

function isSpace(byte: number): boolean {
  return byte === 0x20 || byte === 10 || byte === 13 || byte === 9;
}
