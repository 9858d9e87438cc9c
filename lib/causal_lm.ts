import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { readAdapterFolder } from './adapter_folder';
import { checkAborted, checkInteger, expected } from './arguments';
import { type Checkpoint, openCheckpoint } from './checkpoint';
import { generationSchema, loraSchema, modelSchema, parseOptions } from './config';
import type { Dataset } from './dataset';
import { LoraDaError } from './errors';
import { LoraAdapter } from './lora_adapter';
import {
  type DecoderSpec,
  type Dtype,
  type NativeBatch,
  type NativeModel,
  type NativeModelInfo,
  native,
} from './native';
import { firstRows, packRows } from './packing';
import { resolveTargetModules } from './target_modules';
import { Tokenizer } from './tokenizer';

/** Options of {@link CausalLM.load}. */
export interface LoadOptions {
  /** `auto` (default: CUDA where it can be used, else the CPU), `cpu`, `cuda` (the first GPU that can be used) or `cuda:N`. */
  device?: string;
  /** `auto` (default: bfloat16 where the device multiplies it), `float32` or `bfloat16`. */
  dtype?: Dtype | 'auto';
  /** Threads of the engine on the CPU; 0 (default): physical cores. Without effect on other devices. */
  threads?: number;
  /**
   * Lay the weights out at load as each product of a training step reads them, not in every step (default false). On the CPU, while
   * half of the free memory lasts: backward's copy takes as much as the weights again, and bfloat16 files are kept in float32
   * where that is `dtype`. The same numbers, to the bit. Without effect on other devices.
   */
  prepack?: boolean;
  signal?: AbortSignal;
  /** Called as tensors are mapped and prepared. */
  onProgress?: (done: number, total: number) => void;
}

/** Options of {@link CausalLM.addLora}. */
export interface LoraOptions {
  /** r, 1 or more (default 8). */
  rank?: number;
  /** Greater than 0 (default 16). */
  alpha?: number;
  /** scaling = alpha/√r (default true), else alpha/r. */
  rslora?: boolean;
  /** Suffixes of the modules to adapt, or `'all-linear'` (default): every linear module of the blocks. */
  targetModules?: 'all-linear' | string[];
}

/** Options of {@link CausalLM.evaluate}. */
export interface EvaluateOptions {
  /** Also return each row's own mean loss (default false). */
  perExample?: boolean;
  signal?: AbortSignal;
  /** Rows that are done, and all rows. */
  onProgress?: (done: number, total: number) => void;
}

/** Loss over a data set: mean over all label tokens. */
export interface Evaluation {
  loss: number;
  /** exp(loss) */
  perplexity: number;
  labelTokens: number;
  /** Each row's mean over its label tokens, in the order of the data set; with `perExample`. */
  perExample?: { loss: number; labelTokens: number }[];
}

/** Options of {@link CausalLM.generate}: exactly one of prompt, messages, raw and inputIds. */
export interface GenerateOptions {
  /** What a user says: goes through the chat template where there is one, else as `raw`. */
  prompt?: string;
  /** A conversation for the chat template. */
  messages?: { role: string; content: string }[];
  /** Text that is encoded as it is, with the special tokens of the tokenizer's configuration. */
  raw?: string;
  /** Token ids, used as they are. */
  inputIds?: number[] | Int32Array;
  /** 1 or more (default 128). */
  maxNewTokens?: number;
  /** 0 (default): greedy. */
  temperature?: number;
  /** Smallest set of tokens whose probability reaches topP; greater than 0, at most 1 (default 1: all). */
  topP?: number;
  /** Of the sampling; 0 or more (default 42). */
  seed?: number;
  /** Ids that end the text (default: the end-of-sequence ids of the model folder). */
  stopIds?: number[];
  signal?: AbortSignal;
  /** Called for each new token. */
  onToken?: (id: number) => void;
}

/** What {@link CausalLM.generate} made. */
export interface Generation {
  /** The new text without the stop token; null where the folder has no tokenizer. */
  text: string | null;
  /** The new ids, with the stop token that ended the text as the last (as in transformers). */
  tokenIds: number[];
}

/** What a {@link CausalLM} is made of. @internal */
export interface CausalLMParts {
  checkpoint: Checkpoint;
  native: NativeModel;
  tokenizer?: Tokenizer | undefined;
  stopIds: number[];
}

/**
 * A decoder-only language model from a Hugging Face folder, with its weights in native memory.
 *
 * @example
 * ```ts
 * using model = await CausalLM.load('models/SmolLM2-135M-Instruct', { device: 'auto', dtype: 'bfloat16' });
 * const { text } = await model.generate({ prompt: 'What is the capital of France?', maxNewTokens: 20 });
 * ```
 */
export class CausalLM {
  /** @internal */
  readonly checkpoint: Checkpoint;
  /** The folder's tokenizer; undefined where it has none. */
  readonly tokenizer: Tokenizer | undefined;
  /** @internal */
  readonly native: NativeModel;
  readonly #stopIds: number[];
  #adapter: LoraAdapter | undefined;
  #disposed: Promise<void> | undefined;

  /** @internal Use {@link CausalLM.load}. */
  constructor(parts: CausalLMParts) {
    this.checkpoint = parts.checkpoint;
    this.native = parts.native;
    this.tokenizer = parts.tokenizer;
    this.#stopIds = parts.stopIds;
  }

  /**
   * Loads a model folder: config.json, safetensors files and, where it has one, the tokenizer.
   *
   * @param directory        path of the folder
   * @param options.device   `auto` (default: CUDA where it can be used, else the CPU), `cpu`, `cuda` or `cuda:N`
   * @param options.dtype    `auto` (default), `float32` or `bfloat16`
   * @param options.threads  of the engine on the CPU: 0 (default: physical cores) or more
   * @param options.prepack  lay weights out once for training, in more memory (default false)
   * @throws {LoraDaError} `FILE_NOT_FOUND`, `INVALID_CONFIG`, `UNSUPPORTED` (family), `INVALID_TENSOR`, `INVALID_FILE`,
   *   `FILE_TRUNCATED`, `DEVICE_UNAVAILABLE`, `OUT_OF_MEMORY`, `ABORTED`
   *
   * @example
   * ```ts
   * const model = await CausalLM.load('models/SmolLM2-135M-Instruct', { dtype: 'float32' });
   * console.log(model.info.parameters);
   * await model.dispose();
   * ```
   */
  static async load(directory: string, options: LoadOptions = {}): Promise<CausalLM> {
    const { signal, onProgress = () => {}, ...rest } = options;
    const { device, dtype, threads, prepack } = parseOptions(modelSchema, rest);
    checkAborted(signal);
    const checkpoint = await openCheckpoint(directory, { signal });
    checkAborted(signal);
    const { spec, tensors, stopIds } = checkpoint;
    const hasTokenizer = await exists(join(directory, 'tokenizer.json'));
    // Side by side: each takes a thread of its own.
    const [tokenizer, engine] = await Promise.allSettled([
      hasTokenizer ? Tokenizer.load(directory, { signal }) : undefined,
      native().loadModel({ spec, tensors, dtype, device, threads, prepack, copyBudget: -1 }, onProgress),
    ]);
    try {
      checkAborted(signal);
      return new CausalLM({
        checkpoint,
        native: resultOf(engine),
        tokenizer: resultOf(tokenizer),
        stopIds: [...new Set([...stopIds, ...(resultOf(tokenizer)?.eosIds ?? [])])],
      });
    } catch (error) {
      for (const loaded of [tokenizer, engine]) if (loaded.status === 'fulfilled') await loaded.value?.dispose();
      throw error;
    }
  }

  /** The folder that the model was loaded from. */
  get directory(): string {
    return this.checkpoint.directory;
  }

  /** config.json of the folder. */
  get config(): Record<string, unknown> {
    return this.checkpoint.config;
  }

  /** The decoder's shapes and names. */
  get spec(): DecoderSpec {
    return this.checkpoint.spec;
  }

  /** Hash that tells one base model from another. */
  get fingerprint(): string {
    return this.checkpoint.fingerprint;
  }

  /** Device, number type, threads and size of the loaded model. */
  get info(): NativeModelInfo {
    return this.native.info;
  }

  /** The adapter that is on the model, if any. */
  get adapter(): LoraAdapter | undefined {
    return this.#adapter;
  }

  /**
   * Puts a new LoRA adapter on the model, in place of an earlier one. Its factors are zero until
   * {@link LoraAdapter.initialize} starts them.
   *
   * @param options.rank           r, 1 or more (default 8)
   * @param options.alpha          greater than 0 (default 16)
   * @param options.rslora         scaling = alpha/√r (default true), else alpha/r
   * @param options.targetModules  `'all-linear'` (default) or suffixes such as `['q_proj', 'v_proj']`
   * @throws {LoraDaError} `INVALID_ARGUMENT` when an option is out of range or a suffix names no linear module
   *
   * @example
   * ```ts
   * const adapter = model.addLora({ rank: 8, alpha: 16, rslora: true, targetModules: 'all-linear' });
   * ```
   */
  addLora(options: LoraOptions = {}): LoraAdapter {
    this.#checkAlive();
    const { rank, alpha, rslora, targetModules } = parseOptions(loraSchema, options);
    const { modules, suffixes } = resolveTargetModules(this.spec, targetModules);
    return this.#attach(
      new LoraAdapter(this, { rank, alpha, rslora, targetModules: suffixes, modules, origin: 'new' }),
    );
  }

  /**
   * Puts an adapter from a PEFT folder on the model, in place of an earlier one.
   *
   * @param directory  folder with adapter_config.json and adapter_model.safetensors
   * @throws {LoraDaError} `FILE_NOT_FOUND`, `INVALID_CONFIG`, `INVALID_TENSOR`, or `UNSUPPORTED`, which names what the adapter asks for
   *
   * @example
   * ```ts
   * const adapter = await model.loadAdapter('out');
   * ```
   */
  async loadAdapter(directory: string): Promise<LoraAdapter> {
    this.#checkAlive();
    const { rank, alpha, rslora, suffixes, modules, factors } = await readAdapterFolder(directory, this.spec);
    const adapter = new LoraAdapter(this, { rank, alpha, rslora, targetModules: suffixes, modules, origin: 'loaded' });
    this.#attach(adapter);
    await adapter.writeFactors(factors);
    return adapter;
  }

  /** Takes the adapter off the model: what follows is the base model's. */
  async removeAdapter(): Promise<void> {
    this.#checkAlive();
    this.#adapter = undefined;
    await this.native.removeLora();
  }

  /**
   * Mean cross-entropy over the label tokens of a data set, with the adapter that is on the model.
   *
   * @param data                 rows to evaluate
   * @param options.perExample   also return each row's loss (default false)
   * @throws {LoraDaError} `ABORTED`, `NON_FINITE` when a row's loss is not a finite number
   *
   * @example
   * ```ts
   * const { loss, perplexity } = await model.evaluate(await Dataset.load('test.jsonl', { tokenizer: model.tokenizer }));
   * ```
   */
  async evaluate(data: Dataset, options: EvaluateOptions = {}): Promise<Evaluation> {
    this.#checkAlive();
    const { perExample = false, signal, onProgress } = options;
    const examples: { loss: number; labelTokens: number }[] = [];
    let sum = 0;
    let labelTokens = 0;
    let done = 0;
    const read = async ({ rows, result }: Running) => {
      const { losses, labelTokens: counts } = await result;
      rows.forEach((row, i) => {
        const count = counts[i]!;
        const loss = losses[i]!;
        if (count > 0 && !Number.isFinite(loss)) {
          throw new LoraDaError(
            'NON_FINITE',
            `The loss of row ${row + 1} is ${loss}: the base weights or the adapter's factors hold values that are not finite or far too large`,
          );
        }
        sum += count > 0 ? loss * count : 0;
        labelTokens += count;
        if (perExample) examples.push({ loss, labelTokens: count });
      });
      done += rows.length;
      onProgress?.(done, data.length);
    };
    let running: Running | undefined;
    for (const rows of packRows(data, firstRows(data.length))) {
      checkAborted(signal);
      const next = { rows, result: handled(this.native.evaluate(data.batch(rows))) };
      if (running) await read(running);
      running = next;
    }
    if (running) await read(running);
    const loss = sum / labelTokens;
    return { loss, perplexity: Math.exp(loss), labelTokens, ...(perExample ? { perExample: examples } : {}) };
  }

  /**
   * Continues a text.
   *
   * @param options  exactly one of prompt, messages, raw and inputIds; see {@link GenerateOptions}
   * @throws {LoraDaError} `INVALID_ARGUMENT`, `UNSUPPORTED` when text needs a tokenizer or messages a chat template that the folder lacks, `ABORTED`
   *
   * @example
   * ```ts
   * const { text } = await model.generate({ prompt: 'Hello', maxNewTokens: 32, temperature: 0.7, topP: 0.9, seed: 1 });
   * ```
   */
  async generate(options: GenerateOptions): Promise<Generation> {
    this.#checkAlive();
    const { prompt, messages, raw, inputIds, stopIds = this.#stopIds, signal, onToken = () => {}, ...rest } = options;
    const sampling = parseOptions(generationSchema, rest);
    const ids = await this.#promptIds({ prompt, messages, raw, inputIds });
    checkAborted(signal);
    const cancel = () => this.native.cancel();
    signal?.addEventListener('abort', cancel, { once: true });
    try {
      const made = await this.native.generate(
        { inputIds: ids, ...sampling, stopIds: Int32Array.from(stopIds) },
        onToken,
      );
      const tokenIds = Array.from(made);
      const stop = tokenIds.findIndex((id) => stopIds.includes(id));
      const spoken = stop < 0 ? tokenIds : tokenIds.slice(0, stop);
      return { text: this.tokenizer ? await this.tokenizer.decode(spoken) : null, tokenIds };
    } catch (error) {
      checkAborted(signal);
      throw error;
    } finally {
      signal?.removeEventListener('abort', cancel);
    }
  }

  /**
   * Logits of every token of some sequences: large; for tests and verification.
   *
   * @param rows  token ids of each sequence
   * @returns for each sequence its tokens × vocabSize values, row-major
   *
   * @example
   * ```ts
   * const [logits] = await model.logits([[1, 2, 3]]);
   * ```
   */
  async logits(rows: number[][]): Promise<Float32Array[]> {
    this.#checkAlive();
    if (!Array.isArray(rows) || rows.length === 0) throw expected('list of token id lists', 'rows', rows);
    for (const row of rows) this.#checkIds('rows', row);
    const starts = Int32Array.from({ length: rows.length + 1 }, () => 0);
    rows.forEach((row, i) => {
      starts[i + 1] = starts[i]! + row.length;
    });
    const inputIds = Int32Array.from(rows.flat());
    const batch: NativeBatch = { inputIds, labels: new Int32Array(inputIds.length).fill(-100), sequenceStarts: starts };
    const all = await this.native.logits(batch);
    const { vocabSize } = this.spec;
    return rows.map((_, i) => all.subarray(starts[i]! * vocabSize, starts[i + 1]! * vocabSize));
  }

  /** Frees the native memory, the engine thread and the tokenizer; later calls reject with `DISPOSED`. */
  dispose(): Promise<void> {
    this.#disposed ??= (async () => {
      await this.native.dispose();
      await this.tokenizer?.dispose();
    })();
    return this.#disposed;
  }

  [Symbol.dispose](): void {
    this.dispose().catch(() => {});
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  #attach(adapter: LoraAdapter): LoraAdapter {
    this.#adapter = adapter;
    return adapter;
  }

  #checkAlive(): void {
    if (this.#disposed) throw new LoraDaError('DISPOSED', 'The model was used after dispose()');
  }

  #checkIds(name: string, ids: ArrayLike<number>): void {
    if (typeof ids?.length !== 'number' || ids.length === 0) throw expected('list of at least one token id', name, ids);
    for (let i = 0; i < ids.length; i++) {
      checkInteger(name, ids[i], 0);
      if (ids[i]! >= this.spec.vocabSize) throw expected(`token id below ${this.spec.vocabSize}`, name, ids[i]);
    }
  }

  async #promptIds(input: Pick<GenerateOptions, 'prompt' | 'messages' | 'raw' | 'inputIds'>): Promise<Int32Array> {
    const given = Object.entries(input).filter(([, value]) => value !== undefined);
    if (given.length !== 1) {
      const names = given.map(([name]) => name).join(' and ') || 'none';
      throw new LoraDaError(
        'INVALID_ARGUMENT',
        `Expected exactly one of prompt, messages, raw and inputIds but received ${names}`,
      );
    }
    if (input.inputIds !== undefined) {
      this.#checkIds('inputIds', input.inputIds);
      return Int32Array.from(input.inputIds);
    }
    const ids = Int32Array.from(await this.#encode(input));
    this.#checkIds(given[0]![0], ids);
    return ids;
  }

  async #encode({
    prompt,
    messages,
    raw,
  }: Pick<GenerateOptions, 'prompt' | 'messages' | 'raw'>): Promise<ArrayLike<number>> {
    const tokenizer = this.tokenizer;
    if (!tokenizer) {
      throw new LoraDaError('UNSUPPORTED', `${this.directory} has no tokenizer.json: give token ids instead of text`);
    }
    const conversation =
      messages ?? (prompt !== undefined && tokenizer.hasChatTemplate ? [{ role: 'user', content: prompt }] : undefined);
    if (!conversation) return tokenizer.encode(raw ?? prompt!);
    if (!tokenizer.hasChatTemplate) {
      throw new LoraDaError('UNSUPPORTED', `${this.directory} has no chat template: give raw text instead of messages`);
    }
    const rendered = await tokenizer.applyChatTemplate(conversation, { addGenerationPrompt: true });
    return tokenizer.encode(rendered, { addSpecialTokens: false });
  }
}

interface Running {
  rows: number[];
  result: ReturnType<NativeModel['evaluate']>;
}

/** A promise whose rejection is looked at later, or never when an earlier one fails. */
function handled<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => {});
  return promise;
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}

function resultOf<T>(settled: PromiseSettledResult<T>): T {
  if (settled.status === 'rejected') throw settled.reason;
  return settled.value;
}
