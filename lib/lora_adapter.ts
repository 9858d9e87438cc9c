import { dirname, resolve } from 'node:path';
import { type AdapterContent, loraScaling, writeAdapterFolder } from './adapter_folder';
import { checkAborted, expected } from './arguments';
import type { CausalLM } from './causal_lm';
import type { InitializationConfig } from './config';
import type { Dataset } from './dataset';
import { LoraDaError } from './errors';
import {
  type InitializationOptions,
  type InitializationReport,
  keepFactors,
  moduleReport,
  nativeInitialization,
  needsData,
  plainStart,
  resolveInitialization,
} from './initializations';
import { type MergeOptions, mergeCheckpoint } from './merge';
import type { CollectionPlan, InitializationPhase, NativeBatch, NativeFactors, NativeMoments } from './native';
import { firstRows, packRows } from './packing';
import { makeFolder } from './run_folder';

/** What a {@link LoraAdapter} is made of. @internal */
export interface LoraAdapterParts {
  rank: number;
  alpha: number;
  rslora: boolean;
  /** Sorted suffixes. */
  targetModules: string[];
  /** Full names. */
  modules: string[];
  origin: 'new' | 'loaded';
}

/** Options of a call that takes long. */
export interface LongCallOptions {
  signal?: AbortSignal;
  /** Phase by name, and how much of it is done. */
  onProgress?: (phase: InitializationPhase, done: number, total: number) => void;
  /** How the statistics will be collected and what that takes, before it begins; not called by a method without data. */
  onPlan?: (plan: CollectionPlan) => void;
}

/**
 * A LoRA adapter on a model: update = scaling · B A for each adapted module. Made by {@link CausalLM.addLora} or
 * {@link CausalLM.loadAdapter}.
 *
 * @example
 * ```ts
 * const adapter = model.addLora({ rank: 8 });
 * await adapter.initialize({ method: 'lora-da' }, data);
 * await adapter.save('out');
 * ```
 */
export class LoraAdapter {
  readonly rank: number;
  readonly alpha: number;
  readonly rslora: boolean;
  /** alpha/√r with rank-stabilised LoRA, else alpha/r. */
  readonly scaling: number;
  /** Suffixes of the adapted modules, sorted. */
  readonly targetModules: readonly string[];
  /** Full names of the adapted modules. */
  readonly modules: readonly string[];
  readonly #model: CausalLM;
  readonly #added: Promise<void>;
  readonly #origin: LoraAdapterParts['origin'];
  #initialization: InitializationReport | undefined;
  #started = false;

  /** @internal Use {@link CausalLM.addLora}. */
  constructor(model: CausalLM, parts: LoraAdapterParts) {
    this.#model = model;
    this.rank = parts.rank;
    this.alpha = parts.alpha;
    this.rslora = parts.rslora;
    this.scaling = loraScaling(parts.rank, parts.alpha, parts.rslora);
    this.targetModules = parts.targetModules;
    this.modules = parts.modules;
    this.#origin = parts.origin;
    this.#added = model.native.addLora({ rank: this.rank, scaling: this.scaling, modules: parts.modules });
    this.#added.catch(() => {});
  }

  /** What the last {@link initialize} found; undefined before. */
  get initialization(): InitializationReport | undefined {
    return this.#initialization;
  }

  /** Whether the factors are those of an initialization, a loaded adapter or a checkpoint, and not the zeros of a new one. */
  get started(): boolean {
    return this.#started;
  }

  /**
   * Starts the factors, from data where the method looks at data. LoRA-DA: arXiv 2510.24561.
   *
   * @param options  method and its figures, see {@link InitializationOptions}; by default LoRA-DA as its paper sets it
   * @param data     examples of the target task, of which the first `samples` are used; not needed by methods without data
   * @param call.signal      stops it; the factors stay as they were
   * @param call.onPlan      called before the collection with its plan in bytes
   * @param call.onProgress  phase (`collect`, then `solve`; or `layers`, both by turns), done, total
   * @returns per module cond(Zd), median(ydiag)/damping, σ and the gap after the r-th eigenvalue
   * @throws {LoraDaError} `NOT_POSITIVE_DEFINITE`, naming the module, when damping is too small for its statistics;
   *   `INVALID_ARGUMENT`; `NON_FINITE`; `OUT_OF_MEMORY` where no plan fits the budget, before anything is collected; `ABORTED`
   *
   * @example
   * ```ts
   * const report = await adapter.initialize({ method: 'lora-da', samples: 256, varianceWeight: 0.03 }, data);
   * console.log(report.modules[0].conditionNumber);
   * ```
   */
  async initialize(
    options: InitializationOptions = {},
    data?: Dataset,
    call: LongCallOptions = {},
  ): Promise<InitializationReport> {
    const config = checkedInitialization(options, data);
    await this.#ready();
    checkAborted(call.signal);
    if (config.method === keepFactors && this.#origin === 'loaded') {
      return this.#report({
        method: keepFactors,
        options: config,
        samples: 0,
        modules: [],
        collection: null,
        collectSeconds: 0,
        solveSeconds: 0,
      });
    }
    const { native } = this.#model;
    const { method, samples, batches, nativeOptions } = initializationWork(config, data);
    if (call.onPlan) {
      const plan = await native.planInitialization(batches, nativeOptions);
      if (plan) call.onPlan(plan);
    }
    const found = await this.#stoppable(call.signal, () =>
      native.initialize(batches, nativeOptions, call.onProgress ?? (() => {})),
    );
    const { collection, collectSeconds, solveSeconds } = found;
    const modules = found.modules.map((module) => moduleReport(module, samples > 0));
    return this.#report({ method, options: config, samples, modules, collection, collectSeconds, solveSeconds });
  }

  /**
   * The plan that {@link initialize} would follow with these options and data: how the statistics will be collected, and the bytes
   * that it takes. Nothing is collected.
   *
   * @returns null for a method that looks at no data
   * @throws {LoraDaError} `OUT_OF_MEMORY` where no plan fits the budget; `INVALID_ARGUMENT`
   *
   * @example
   * ```ts
   * const plan = await adapter.planInitialization({ samples: 256, memoryBudget: 10e9 }, data);
   * console.log(plan?.plan, plan?.total); // 'layer-major' 8830000000
   * ```
   */
  async planInitialization(options: InitializationOptions = {}, data?: Dataset): Promise<CollectionPlan | null> {
    const config = checkedInitialization(options, data);
    await this.#ready();
    const { batches, nativeOptions } = initializationWork(config, data);
    return this.#model.native.planInitialization(batches, nativeOptions);
  }

  /**
   * Writes the adapter as a PEFT folder: adapter_model.safetensors, then adapter_config.json, each whole or not at all.
   *
   * @param directory  is made where it does not exist
   * @throws {LoraDaError} `IO_ERROR` when the system refuses (disk full, read-only), `DISPOSED`
   *
   * @example
   * ```ts
   * await adapter.save('out'); // PeftModel.from_pretrained(base, 'out')
   * ```
   */
  async save(directory: string): Promise<void> {
    if (typeof directory !== 'string' || directory === '') throw expected('non-empty string', 'directory', directory);
    await makeFolder(directory);
    await writeAdapterFolder(directory, this.#model.spec, await this.content());
  }

  /**
   * Writes a copy of the base model's folder with W + scaling · B A in place of W for each adapted module.
   *
   * @param directory  must not exist, or be empty
   * @throws {LoraDaError} `INVALID_ARGUMENT` where the folder holds something, `NON_FINITE`, `IO_ERROR`, `ABORTED`
   *
   * @example
   * ```ts
   * await adapter.merge('merged'); // AutoModelForCausalLM.from_pretrained('merged')
   * ```
   */
  async merge(directory: string, options: MergeOptions = {}): Promise<void> {
    if (typeof directory !== 'string' || directory === '') throw expected('non-empty string', 'directory', directory);
    await this.#ready();
    await makeFolder(dirname(resolve(directory)));
    const { checkpoint, native } = this.#model;
    await mergeCheckpoint(checkpoint, directory, this.modules, (module) => native.mergedWeight(module), options);
  }

  /** What an adapter folder holds. @internal */
  async content(): Promise<AdapterContent> {
    const { rank, alpha, rslora } = this;
    return { rank, alpha, rslora, factors: await this.readFactors(), baseModel: this.#model.directory };
  }

  /** Copies of the factors, one entry a module. */
  async readFactors(): Promise<NativeFactors[]> {
    await this.#ready();
    return this.#model.native.readFactors();
  }

  /** Sets the factors. @internal */
  async writeFactors(factors: NativeFactors[]): Promise<void> {
    await this.#ready();
    await this.#model.native.writeFactors(factors);
    this.#started = true;
  }

  /** Copies of the optimizer's moments. @internal */
  async readMoments(): Promise<NativeMoments[]> {
    await this.#ready();
    return this.#model.native.readMoments();
  }

  /** Sets the optimizer's moments. @internal */
  async writeMoments(moments: NativeMoments[]): Promise<void> {
    await this.#ready();
    await this.#model.native.writeMoments(moments);
  }

  async #ready(): Promise<void> {
    await this.#added;
    if (this.#model.adapter !== this) {
      throw new LoraDaError('DISPOSED', 'The adapter was used after another one took its place on the model');
    }
  }

  #report(report: InitializationReport): InitializationReport {
    this.#initialization = report;
    this.#started = true;
    return report;
  }

  async #stoppable<T>(signal: AbortSignal | undefined, work: () => Promise<T>): Promise<T> {
    const cancel = () => this.#model.native.cancel();
    signal?.addEventListener('abort', cancel, { once: true });
    try {
      return await work();
    } catch (error) {
      checkAborted(signal);
      throw error;
    } finally {
      signal?.removeEventListener('abort', cancel);
    }
  }
}

function checkedInitialization(options: InitializationOptions, data: Dataset | undefined): InitializationConfig {
  const config = resolveInitialization(options);
  if (needsData(config.method) && !data) throw expected(`data set for the method ${config.method}`, 'data', data);
  return config;
}

/** What an initialization hands to the core. */
function initializationWork(config: InitializationConfig, data: Dataset | undefined) {
  const method = config.method === keepFactors ? plainStart : config.method;
  const samples = needsData(method) ? Math.min(config.samples, data!.length) : 0;
  const batches: NativeBatch[] = [];
  if (samples > 0) for (const rows of packRows(data!, firstRows(samples))) batches.push(data!.batch(rows));
  return { method, samples, batches, nativeOptions: { ...nativeInitialization(config, data?.length ?? 1), method } };
}
