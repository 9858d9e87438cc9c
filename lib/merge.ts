import { randomBytes } from 'node:crypto';
import { copyFile, cp, type FileHandle, mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { basename, dirname, extname, join, resolve } from 'node:path';
import { checkAborted } from './arguments';
import type { Checkpoint } from './checkpoint';
import { LoraDaError } from './errors';
import { fileError, syncDirectory } from './files';
import { encodeFloats } from './float_bits';
import type { FileDtype } from './native';
import { readExactly, readSafetensorsHeader, type TensorInfo, withFile, writeAll } from './safetensors';

/** Options of `mergeCheckpoint`. */
export interface MergeOptions {
  /** Stops the work; the output folder does not appear. */
  signal?: AbortSignal;
  /** Bytes of weights written so far, and of all. */
  onProgress?: (done: number, total: number) => void;
}

const weightExtensions = new Set(['.safetensors', '.bin', '.pt', '.pth', '.gguf', '.ckpt', '.h5', '.msgpack', '.onnx']);
const copyBlockBytes = 16 << 20;
const encodeBlockValues = 1 << 20;

/**
 * Writes a copy of a checkpoint folder whose adapted modules carry the adapter: W + scaling · B A in float32, rounded to the
 * type that the file stores. Sharding, index, configuration and tokenizer stay as they are. One tensor at a time is in
 * memory. The folder is made aside and renamed, so that it appears whole or not at all.
 *
 * @param checkpoint    the base
 * @param out           path of the new folder; must not exist, or be empty
 * @param modules       full names of the adapted modules
 * @param mergedWeight  gives W + scaling · B A of one of them, [out, in] row-major
 * @throws {LoraDaError} `INVALID_ARGUMENT` where `out` holds something, `NON_FINITE` for a merged weight that its type cannot
 *   hold, `IO_ERROR`, `FILE_TRUNCATED`, `ABORTED`
 * @example
 * ```ts
 * await mergeCheckpoint(checkpoint, 'merged', adapter.modules, (module) => native.mergedWeight(module));
 * ```
 */
export async function mergeCheckpoint(
  checkpoint: Checkpoint,
  out: string,
  modules: readonly string[],
  mergedWeight: (module: string) => Promise<Float32Array>,
  options: MergeOptions = {},
): Promise<void> {
  const target = resolve(out);
  await checkOutput(target, out);
  const aside = join(dirname(target), `.${basename(target)}.${randomBytes(4).toString('hex')}.tmp`);
  try {
    await mkdir(aside, { recursive: true });
    const merge = new Merge(checkpoint, aside, modules, mergedWeight, options);
    await merge.run();
    await copyOtherFiles(checkpoint.directory, aside);
    await syncDirectory(aside);
    checkAborted(options.signal);
    await rename(aside, target);
    await syncDirectory(dirname(target));
  } catch (error) {
    await rm(aside, { recursive: true, force: true });
    throw fileError(error, out, 'write');
  }
}

/** One run over the files of a checkpoint. Headers are copied: names, types and shapes do not change. */
class Merge {
  private readonly moduleOfTensor: Map<string, string>;
  private readonly names = new Map<string, string>();
  private total = 0;
  private done = 0;

  constructor(
    private readonly checkpoint: Checkpoint,
    private readonly directory: string,
    modules: readonly string[],
    private readonly mergedWeight: (module: string) => Promise<Float32Array>,
    private readonly options: MergeOptions,
  ) {
    this.moduleOfTensor = new Map(modules.map((module) => [`${module}.weight`, module]));
    for (const { file, offset, name } of checkpoint.tensors) this.names.set(`${file}:${offset}`, name);
  }

  async run(): Promise<void> {
    for (const file of this.checkpoint.files) this.total += (await stat(file)).size;
    for (const file of this.checkpoint.files) await this.writeFile(file);
  }

  private async writeFile(file: string): Promise<void> {
    const header = await readSafetensorsHeader(file);
    const output = join(this.directory, basename(file));
    await withFile(file, async (source) => {
      const target = await open(output, 'wx');
      try {
        await this.copy(source, target, file, 0, 8 + header.raw.length);
        for (const info of header.tensors.values()) {
          const module = this.moduleOfTensor.get(this.names.get(`${file}:${info.offset}`) ?? '');
          if (module === undefined) await this.copy(source, target, file, info.offset, info.bytes);
          else await this.writeMerged(target, module, info);
        }
        await target.sync();
      } catch (error) {
        throw fileError(error, output, 'write');
      } finally {
        await target.close();
      }
    });
  }

  private async copy(
    source: FileHandle,
    target: FileHandle,
    file: string,
    offset: number,
    bytes: number,
  ): Promise<void> {
    for (let done = 0; done < bytes; done += copyBlockBytes) {
      const block = Math.min(copyBlockBytes, bytes - done);
      await writeAll(target, await readExactly(source, file, offset + done, block));
      this.advance(block);
    }
  }

  /** In blocks, so that the event loop is free in between. */
  private async writeMerged(target: FileHandle, module: string, info: TensorInfo): Promise<void> {
    const values = await this.mergedWeight(module);
    if (values.length !== info.shape.reduce((product, n) => product * n, 1)) {
      throw new LoraDaError(
        'INTERNAL',
        `The merged weight of ${module} has ${values.length} values, expected [${info.shape}]`,
      );
    }
    const dtype = info.dtype as FileDtype;
    for (let begin = 0; begin < values.length; begin += encodeBlockValues) {
      const block = values.subarray(begin, begin + encodeBlockValues);
      checkRange(block, dtype, module);
      const bytes = encodeFloats(block, dtype);
      await writeAll(target, bytes);
      this.advance(bytes.length);
    }
  }

  private advance(bytes: number): void {
    checkAborted(this.options.signal);
    this.done += bytes;
    this.options.onProgress?.(this.done, this.total);
  }
}

/** Largest magnitudes that round to a finite value. */
const limits: Record<FileDtype, number> = { F32: Number.MAX_VALUE, F16: 65519, BF16: 3.3961e38 };

function checkRange(values: Float32Array, dtype: FileDtype, module: string): void {
  const limit = limits[dtype];
  for (const value of values) {
    if (Math.abs(value) <= limit) continue;
    throw new LoraDaError('NON_FINITE', `The merged weight of ${module} holds ${value}, which ${dtype} cannot`);
  }
}

async function checkOutput(target: string, shown: string): Promise<void> {
  const entries = await readdir(target).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    if (error.code === 'ENOTDIR') return [basename(target)];
    throw fileError(error, shown, 'write');
  });
  if (entries.length > 0) {
    throw new LoraDaError(
      'INVALID_ARGUMENT',
      `${shown} exists already; expected a new or an empty folder for the output`,
    );
  }
}

/** Configuration, tokenizer, templates, licence: everything but weights. */
async function copyOtherFiles(from: string, to: string): Promise<void> {
  for (const name of await readdir(from)) {
    const source = join(from, name);
    const found = await stat(source);
    if (found.isDirectory() && name === 'additional_chat_templates')
      await cp(source, join(to, name), { recursive: true });
    if (found.isFile() && !weightExtensions.has(extname(name))) await copyFile(source, join(to, name));
  }
}
