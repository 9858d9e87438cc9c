import { createHash, type Hash } from 'node:crypto';
import { access, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { checkAborted } from './arguments';
import { LoraDaError } from './errors';
import { decoderSpec } from './families';
import { fileError, readJsonObject, readOptionalJsonObject, readText } from './files';
import type { DecoderSpec, TensorSource } from './native';
import { isFileDtype, readExactly, readSafetensorsHeader, type SafetensorsHeader, withFile } from './safetensors';
import { linearSpecsOf } from './target_modules';

/** A Hugging Face folder whose configuration and tensors have been checked against each other. */
export interface Checkpoint {
  directory: string;
  /** config.json as it is. */
  config: Record<string, unknown>;
  spec: DecoderSpec;
  /** Every tensor that the decoder needs, named as `spec.names` and the linear modules say. */
  tensors: TensorSource[];
  /** The safetensors files, in the order of their names. */
  files: string[];
  /** Tokens that end a generation, from generation_config.json and config.json; may be empty. */
  stopIds: number[];
  /** sha256 over config.json and, for each file, its name, size, header and sampled blocks of its data. */
  fingerprint: string;
}

const singleFile = 'model.safetensors';
const indexFile = 'model.safetensors.index.json';

/** Tensors that older checkpoints carry and that nobody needs. */
const harmlessExtras = [/(^|\.)rotary_emb\.inv_freq$/, /(^|\.)masked_bias$/, /(^|\.)position_ids$/];

/** Files up to this size enter the fingerprint as a whole, larger ones as blocks at even distances. */
const wholeFileBytes = 8 << 20;
const sampledBlocks = 64;
const sampledBlockBytes = 64 << 10;

/**
 * Opens a Hugging Face folder: config.json and model.safetensors, or shards with model.safetensors.index.json. Reads
 * headers only; the weights stay on the disk.
 *
 * A folder saved from the bare decoder (names without `model.`) is understood. A tied `lm_head.weight` is left out where it
 * equals the embedding, and used where it does not, as transformers does.
 *
 * @param directory  path of the folder
 * @param options.signal  stops the work; rejects with `ABORTED`
 * @throws {LoraDaError} `FILE_NOT_FOUND`, `FILE_TRUNCATED`, `INVALID_FILE`, `IO_ERROR`; `INVALID_CONFIG`, `UNSUPPORTED`;
 *   `INVALID_TENSOR` for one that is missing, extra, misshapen or of the wrong type: names tensor and file, expected and found
 * @example
 * ```ts
 * const { spec, tensors } = await openCheckpoint('models/SmolLM2-135M');
 * ```
 */
export async function openCheckpoint(directory: string, options: { signal?: AbortSignal } = {}): Promise<Checkpoint> {
  await checkDirectory(directory);
  const configFile = join(directory, 'config.json');
  const config = await readJsonObject(configFile);
  const spec = decoderSpec(config, configFile);
  const headers = await readHeaders(directory, options.signal);
  const { tensors, tiedHead } = await matchTensors(directory, spec, headers);
  return {
    directory,
    config,
    spec: { ...spec, tiedHead },
    tensors,
    files: headers.map(({ file }) => file),
    stopIds: await readStopIds(directory, config),
    fingerprint: await fingerprint(await readText(configFile), headers, options.signal),
  };
}

/** Names and shapes of the tensors that the decoder needs. */
export function expectedTensors(spec: DecoderSpec): Map<string, number[]> {
  const { names, hiddenSize, vocabSize, headDim } = spec;
  const expected = new Map<string, number[]>([[names.embedding, [vocabSize, hiddenSize]]]);
  for (let i = 0; i < spec.layers; i++) {
    const layer = names.layer.replace('{i}', String(i));
    expected.set(`${layer}.${names.attentionNorm}`, [hiddenSize]);
    expected.set(`${layer}.${names.mlpNorm}`, [hiddenSize]);
    if (spec.headNorm) {
      expected.set(`${layer}.${names.queryNorm}`, [headDim]);
      expected.set(`${layer}.${names.keyNorm}`, [headDim]);
    }
    for (const linear of linearSpecsOf(spec)) {
      expected.set(`${layer}.${linear.name}.weight`, [linear.out, linear.in]);
      if (linear.bias) expected.set(`${layer}.${linear.name}.bias`, [linear.out]);
    }
  }
  expected.set(names.finalNorm, [hiddenSize]);
  if (!spec.tiedHead) expected.set(names.head, [vocabSize, hiddenSize]);
  return expected;
}

/**
 * Tokens that end a generation: `eos_token_id` of generation_config.json, else of config.json; a number or a list there.
 *
 * @throws {LoraDaError} `INVALID_CONFIG` where it is neither
 */
export async function readStopIds(directory: string, config?: Record<string, unknown>): Promise<number[]> {
  const generationFile = join(directory, 'generation_config.json');
  const generation = await readOptionalJsonObject(generationFile);
  const own = generation?.eos_token_id ?? undefined;
  const base = config ?? (await readOptionalJsonObject(join(directory, 'config.json'))) ?? {};
  const value = own ?? base.eos_token_id ?? [];
  const ids = Array.isArray(value) ? value : [value];
  if (ids.every((id) => Number.isInteger(id) && id >= 0)) return ids as number[];
  const file = own === undefined ? join(directory, 'config.json') : generationFile;
  throw new LoraDaError('INVALID_CONFIG', `${file}: expected a token id or a list of them for eos_token_id`);
}

async function checkDirectory(directory: string): Promise<void> {
  let found: Awaited<ReturnType<typeof stat>>;
  try {
    found = await stat(directory);
  } catch (error) {
    throw fileError(error, directory, 'read');
  }
  if (!found.isDirectory()) {
    throw new LoraDaError('INVALID_FILE', `${directory}: expected a Hugging Face folder, found a file`);
  }
}

async function exists(file: string): Promise<boolean> {
  return access(file).then(
    () => true,
    () => false,
  );
}

async function readHeaders(directory: string, signal?: AbortSignal): Promise<SafetensorsHeader[]> {
  const single = join(directory, singleFile);
  if (await exists(single)) return [await readSafetensorsHeader(single)];
  const index = join(directory, indexFile);
  if (await exists(index)) return readShards(directory, index, signal);
  for (const other of ['pytorch_model.bin', 'pytorch_model.bin.index.json', 'consolidated.safetensors']) {
    if (await exists(join(directory, other))) {
      throw new LoraDaError('UNSUPPORTED', `${join(directory, other)} is not supported; expected ${singleFile}`);
    }
  }
  throw new LoraDaError('FILE_NOT_FOUND', `${directory}: expected ${singleFile} or ${indexFile}, found neither`);
}

async function readShards(directory: string, index: string, signal?: AbortSignal): Promise<SafetensorsHeader[]> {
  const { weight_map: map } = await readJsonObject(index);
  if (typeof map !== 'object' || map === null || Array.isArray(map)) {
    throw new LoraDaError('INVALID_FILE', `${index}: expected an object for weight_map`);
  }
  const entries = Object.entries(map);
  for (const [tensor, shard] of entries) {
    if (typeof shard === 'string' && shard === basename(shard) && shard.endsWith('.safetensors')) continue;
    throw new LoraDaError(
      'INVALID_FILE',
      `${index}: expected the name of a safetensors file in the same folder for ${tensor}`,
    );
  }
  const headers: SafetensorsHeader[] = [];
  for (const shard of [...new Set(Object.values(map) as string[])].sort()) {
    checkAborted(signal);
    headers.push(await readSafetensorsHeader(join(directory, shard)));
  }
  const byName = new Map(headers.map((header) => [basename(header.file), header]));
  for (const [tensor, shard] of entries as [string, string][]) {
    if (!byName.get(shard)!.tensors.has(tensor)) {
      throw invalid(`tensor ${tensor} is missing from ${join(directory, shard)}, where ${indexFile} places it`);
    }
  }
  for (const header of headers) {
    for (const tensor of header.tensors.keys()) {
      const placed = Object.hasOwn(map, tensor) ? (map as Record<string, string>)[tensor] : undefined;
      if (placed === basename(header.file) || isHarmless(tensor)) continue;
      throw invalid(
        `tensor ${tensor} of ${header.file} is ${placed ? `in ${placed}` : 'absent'} according to ${indexFile}`,
      );
    }
  }
  return headers;
}

async function matchTensors(directory: string, spec: DecoderSpec, headers: SafetensorsHeader[]) {
  const found = collect(headers, spec);
  const expected = expectedTensors(spec);
  const head = spec.names.head;
  let tiedHead = spec.tiedHead;
  if (tiedHead && found.has(head)) {
    checkShape(found.get(head)!, [spec.vocabSize, spec.hiddenSize]);
    const embedding = found.get(spec.names.embedding);
    if (embedding && !(await sameBytes(embedding, found.get(head)!))) {
      tiedHead = false;
      expected.set(head, [spec.vocabSize, spec.hiddenSize]);
    }
  }
  const tensors: TensorSource[] = [];
  for (const [name, shape] of expected) {
    const source = found.get(name);
    if (!source) {
      const where = headers.length === 1 ? headers[0]!.file : directory;
      throw invalid(`tensor ${name} is missing from ${where}, expected shape [${shape.join(', ')}]`);
    }
    checkShape(source, shape);
    tensors.push(source);
  }
  for (const source of found.values()) {
    if (!expected.has(source.name) && !isHarmless(source.name) && source.name !== head) {
      throw invalid(`tensor ${source.name} of ${source.file} is not part of a ${spec.family} model of this size`);
    }
  }
  return { tensors, tiedHead };
}

/** All tensors by the name that the decoder uses; a folder of the bare decoder lacks the `model.` in front. */
function collect(headers: SafetensorsHeader[], spec: DecoderSpec): Map<string, TensorSource> {
  const prefix = 'model.';
  const bare =
    !headers.some(({ tensors }) => tensors.has(spec.names.embedding)) &&
    headers.some(({ tensors }) => tensors.has(spec.names.embedding.slice(prefix.length)));
  const found = new Map<string, TensorSource>();
  for (const { file, tensors } of headers) {
    for (const info of tensors.values()) {
      const name = bare && info.name !== spec.names.head ? prefix + info.name : info.name;
      if (!isFileDtype(info.dtype)) {
        if (isHarmless(name)) continue;
        throw invalid(`tensor ${info.name} of ${file}: expected F32, F16 or BF16, found ${info.dtype}`);
      }
      if (found.has(name)) throw invalid(`tensor ${info.name} is in ${found.get(name)!.file} and in ${file}`);
      found.set(name, { name, file, dtype: info.dtype, shape: info.shape, offset: info.offset, bytes: info.bytes });
    }
  }
  return found;
}

function checkShape(source: TensorSource, expected: number[]): void {
  if (source.shape.length === expected.length && source.shape.every((n, i) => n === expected[i])) return;
  throw invalid(
    `tensor ${source.name} of ${source.file}: expected shape [${expected.join(', ')}], found [${source.shape.join(', ')}]`,
  );
}

function isHarmless(name: string): boolean {
  return harmlessExtras.some((pattern) => pattern.test(name));
}

function invalid(message: string): LoraDaError {
  return new LoraDaError('INVALID_TENSOR', message[0]!.toUpperCase() + message.slice(1));
}

async function sameBytes(a: TensorSource, b: TensorSource): Promise<boolean> {
  if (a.dtype !== b.dtype || a.bytes !== b.bytes) return false;
  return withFile(a.file, (first) =>
    withFile(b.file, async (second) => {
      const step = 4 << 20;
      for (let done = 0; done < a.bytes; done += step) {
        const bytes = Math.min(step, a.bytes - done);
        const left = await readExactly(first, a.file, a.offset + done, bytes);
        if (!left.equals(await readExactly(second, b.file, b.offset + done, bytes))) return false;
      }
      return true;
    }),
  );
}

async function fingerprint(config: string, headers: SafetensorsHeader[], signal?: AbortSignal): Promise<string> {
  const hash = createHash('sha256').update(config);
  for (const header of headers) {
    checkAborted(signal);
    hash.update(`\n${basename(header.file)} ${header.size}\n`).update(header.raw);
    await hashSamples(hash, header);
  }
  return hash.digest('hex');
}

async function hashSamples(hash: Hash, { file, size, raw }: SafetensorsHeader): Promise<void> {
  const start = 8 + raw.length;
  const data = size - start;
  await withFile(file, async (handle) => {
    if (data <= wholeFileBytes) {
      hash.update(await readExactly(handle, file, start, data));
      return;
    }
    for (let block = 0; block < sampledBlocks; block++) {
      const offset = start + Math.floor((block / (sampledBlocks - 1)) * (data - sampledBlockBytes));
      hash.update(await readExactly(handle, file, offset, sampledBlockBytes));
    }
  });
}
