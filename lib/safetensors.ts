import { type FileHandle, open } from 'node:fs/promises';
import { LoraDaError } from './errors';
import { fileError, jsonReason, writeAtomically } from './files';
import { bytesPerValue, decodeFloats, encodeFloats } from './float_bits';
import type { FileDtype } from './native';

/** Longest header that the format allows. */
const maxHeaderBytes = 100_000_000;

const dtypeBytes: Record<string, number> = {
  BOOL: 1,
  U8: 1,
  I8: 1,
  F8_E4M3: 1,
  F8_E5M2: 1,
  U16: 2,
  I16: 2,
  F16: 2,
  BF16: 2,
  U32: 4,
  I32: 4,
  F32: 4,
  U64: 8,
  I64: 8,
  F64: 8,
};

/** One tensor as the header declares it. */
export interface TensorInfo {
  name: string;
  /** As the file spells it: `F32`, `BF16`, `I64` … */
  dtype: string;
  shape: number[];
  /** First byte, from the start of the file. */
  offset: number;
  bytes: number;
}

/** A checked header. */
export interface SafetensorsHeader {
  file: string;
  /** Bytes of the whole file. */
  size: number;
  /** The header's bytes as they are in the file. */
  raw: Buffer;
  metadata: Record<string, string>;
  /** By name, in the order of the data. */
  tensors: Map<string, TensorInfo>;
}

/** A tensor to write. */
export interface TensorData {
  name: string;
  shape: number[];
  data: Float32Array;
  /** Type in the file (default F32). */
  dtype?: FileDtype;
}

/**
 * Reads the header of a safetensors file and checks all of it before any byte of data is trusted: the length field, the
 * JSON, every dtype, shape and byte range, and that the ranges cover the file without gap or overlap.
 *
 * @throws {LoraDaError} `FILE_NOT_FOUND`, `IO_ERROR`, `FILE_TRUNCATED` (shorter than the header says), `INVALID_FILE`;
 *   names the file, the tensor and what was expected
 */
export async function readSafetensorsHeader(file: string): Promise<SafetensorsHeader> {
  const { raw, size } = await readRawHeader(file);
  const json = parseHeader(file, raw);
  const dataStart = 8 + raw.length;
  const infos = Object.entries(json)
    .filter(([name]) => name !== '__metadata__')
    .map(([name, entry]) => checkEntry(file, name, entry, dataStart))
    .sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
  checkCoverage(file, infos, dataStart, size);
  return {
    file,
    size,
    raw,
    metadata: checkMetadata(file, json.__metadata__),
    tensors: new Map(infos.map((info) => [info.name, info])),
  };
}

/**
 * Reads one tensor as float32.
 *
 * @throws {LoraDaError} `INVALID_TENSOR` for a type other than F32, F16 or BF16; `FILE_TRUNCATED`, `IO_ERROR`
 */
export async function readTensor(file: string, info: TensorInfo): Promise<Float32Array> {
  const [values] = await readTensors(file, [info]);
  return values!;
}

/** As `readTensor`, for several tensors of one file. */
export async function readTensors(file: string, infos: readonly TensorInfo[]): Promise<Float32Array[]> {
  const out: Float32Array[] = [];
  await withFile(file, async (handle) => {
    for (const info of infos) {
      if (!isFileDtype(info.dtype)) {
        throw new LoraDaError(
          'INVALID_TENSOR',
          `${file}: expected F32, F16 or BF16 for tensor ${info.name}, found ${info.dtype}`,
        );
      }
      out.push(decodeFloats(await readExactly(handle, file, info.offset, info.bytes), info.dtype));
    }
  });
  return out;
}

/** True for the types that the core reads: F32, F16, BF16. */
export function isFileDtype(dtype: string): dtype is FileDtype {
  return Object.hasOwn(bytesPerValue, dtype);
}

/**
 * Writes a safetensors file atomically: aside, flushed to the disk, renamed.
 *
 * @param tensors   written in this order
 * @param metadata  strings for `__metadata__` (default `{ format: 'pt' }`, which transformers asks for)
 * @throws {LoraDaError} `IO_ERROR`: names the file; nothing is left behind
 */
export async function writeSafetensors(
  file: string,
  tensors: readonly TensorData[],
  metadata: Record<string, string> = { format: 'pt' },
): Promise<void> {
  const header = encodeHeader(
    tensors.map(({ name, shape, dtype = 'F32' }) => ({ name, shape, dtype })),
    metadata,
  );
  await writeAtomically(file, async (handle) => {
    await handle.write(header);
    for (const { data, dtype = 'F32' } of tensors) await writeAll(handle, encodeFloats(data, dtype));
  });
}

/** The length field and the padded JSON for tensors that follow one another in this order. */
export function encodeHeader(
  tensors: readonly { name: string; shape: number[]; dtype: FileDtype }[],
  metadata: Record<string, string>,
): Buffer {
  let end = 0;
  const json: Record<string, unknown> = { __metadata__: metadata };
  for (const { name, shape, dtype } of tensors) {
    const begin = end;
    end += shape.reduce((product, n) => product * n, bytesPerValue[dtype]);
    json[name] = { dtype, shape, data_offsets: [begin, end] };
  }
  const text = Buffer.from(JSON.stringify(json));
  const header = Buffer.alloc(8 + Math.ceil(text.length / 8) * 8, ' ');
  header.writeBigUInt64LE(BigInt(header.length - 8));
  text.copy(header, 8);
  return header;
}

/** Writes all of `bytes` at the handle's position. */
export async function writeAll(handle: FileHandle, bytes: Uint8Array): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    const { bytesWritten } = await handle.write(bytes, done, Math.min(bytes.length - done, 1 << 26));
    done += bytesWritten;
  }
}

/** Runs `use` with the file open for reading; errors of the system name the file. */
export async function withFile<T>(file: string, use: (handle: FileHandle) => Promise<T>): Promise<T> {
  let handle: FileHandle | undefined;
  try {
    handle = await open(file, 'r');
    return await use(handle);
  } catch (error) {
    throw fileError(error, file, 'read');
  } finally {
    await handle?.close();
  }
}

/**
 * Reads `bytes` bytes at `offset`.
 *
 * @throws {LoraDaError} `FILE_TRUNCATED` where the file ends before them
 */
export async function readExactly(handle: FileHandle, file: string, offset: number, bytes: number): Promise<Buffer> {
  const buffer = Buffer.allocUnsafe(bytes);
  for (let done = 0; done < bytes; ) {
    const { bytesRead } = await handle.read(buffer, done, Math.min(bytes - done, 1 << 26), offset + done);
    if (bytesRead === 0) throw truncated(file, offset + bytes, offset + done);
    done += bytesRead;
  }
  return buffer;
}

function truncated(file: string, expected: number, found: number): LoraDaError {
  return new LoraDaError('FILE_TRUNCATED', `${file} is truncated: expected ${expected} bytes, found ${found}`);
}

function malformed(file: string, what: string, cause?: unknown): LoraDaError {
  return new LoraDaError('INVALID_FILE', `${file} is not a valid safetensors file: ${what}`, { cause });
}

async function readRawHeader(file: string): Promise<{ raw: Buffer; size: number }> {
  return withFile(file, async (handle) => {
    const stat = await handle.stat();
    if (!stat.isFile()) throw malformed(file, 'expected a regular file');
    if (stat.size < 8) throw truncated(file, 8, stat.size);
    const length = (await readExactly(handle, file, 0, 8)).readBigUInt64LE();
    if (length > maxHeaderBytes || length < 2n) {
      throw malformed(file, `expected a header length from 2 to ${maxHeaderBytes} bytes, found ${length}`);
    }
    if (8 + Number(length) > stat.size) throw truncated(file, 8 + Number(length), stat.size);
    return { raw: await readExactly(handle, file, 8, Number(length)), size: stat.size };
  });
}

function parseHeader(file: string, raw: Buffer): Record<string, unknown> {
  let text: string;
  let json: unknown;
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(raw);
    json = JSON.parse(text);
  } catch (error) {
    const reason = error instanceof SyntaxError ? jsonReason(error) : 'not UTF-8';
    throw malformed(file, `expected JSON in the header, ${reason}`, error);
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw malformed(file, 'expected a JSON object in the header');
  }
  const duplicate = duplicateKey(text);
  if (duplicate !== undefined) throw malformed(file, `tensor ${JSON.stringify(duplicate)} is declared twice`);
  return json as Record<string, unknown>;
}

/** The first key of the outermost object that stands there twice (JSON.parse keeps the last and says nothing). */
function duplicateKey(json: string): string | undefined {
  const seen = new Set<string>();
  const strings = /"(?:[^"\\]|\\.)*"|[{}[\]]/g;
  let depth = 0;
  for (let match = strings.exec(json); match; match = strings.exec(json)) {
    const token = match[0];
    if (token === '{' || token === '[') depth++;
    else if (token === '}' || token === ']') depth--;
    else if (depth === 1 && /^\s*:/.test(json.slice(strings.lastIndex, strings.lastIndex + 8))) {
      const key = JSON.parse(token) as string;
      if (seen.has(key)) return key;
      seen.add(key);
    }
  }
  return undefined;
}

function checkMetadata(file: string, metadata: unknown): Record<string, string> {
  if (metadata === undefined || metadata === null) return {};
  if (typeof metadata !== 'object' || Object.values(metadata).some((value) => typeof value !== 'string')) {
    throw malformed(file, 'expected strings in __metadata__');
  }
  return metadata as Record<string, string>;
}

function checkEntry(file: string, name: string, entry: unknown, dataStart: number): TensorInfo {
  const shown = name.length > 200 ? `${name.slice(0, 200)}…` : name;
  const bad = (what: string) => malformed(file, `tensor ${shown}: ${what}`);
  if (typeof entry !== 'object' || entry === null) throw bad('expected an object with dtype, shape and data_offsets');
  const { dtype, shape, data_offsets: offsets } = entry as Record<string, unknown>;
  const size = typeof dtype === 'string' && Object.hasOwn(dtypeBytes, dtype) ? dtypeBytes[dtype] : undefined;
  if (size === undefined) {
    throw bad(`expected a dtype among ${Object.keys(dtypeBytes).join(', ')}, found ${JSON.stringify(dtype) ?? 'none'}`);
  }
  if (!isListOfSizes(shape)) throw bad('expected a list of integers of 0 or more for shape');
  if (!isListOfSizes(offsets) || offsets.length !== 2 || offsets[1]! < offsets[0]!) {
    throw bad('expected [begin, end] with begin not after end for data_offsets');
  }
  const expected = shape.reduce((product, n) => product * n, size);
  const [begin, end] = offsets as [number, number];
  if (!Number.isSafeInteger(expected) || end - begin !== expected) {
    throw bad(`expected ${expected} bytes for ${dtype} [${shape.join(', ')}], found ${end - begin}`);
  }
  return { name, dtype: dtype as string, shape, offset: dataStart + begin, bytes: expected };
}

function isListOfSizes(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0);
}

function checkCoverage(file: string, infos: TensorInfo[], dataStart: number, size: number): void {
  let end = dataStart;
  for (const info of infos) {
    if (info.offset !== end) {
      const kind = info.offset < end ? 'overlaps the tensor before it' : 'leaves a gap before it';
      throw malformed(file, `tensor ${info.name}: its data ${kind}`);
    }
    end += info.bytes;
  }
  if (end > size) throw truncated(file, end, size);
  if (end < size) throw malformed(file, `expected ${end} bytes, found ${size - end} more after the last tensor`);
}
