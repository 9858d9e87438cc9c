/**
 * A native add-on of toy numbers, for tests of what lib/ does around it: factors are pulled towards values that follow from
 * the rows' ids, by real AdamW in float32. Deterministic; calls are queued as in the core.
 *
 * Loaded before the command line (`node --import tsx --require test/fake_native.ts`) it takes the add-on's place there.
 * Environment: `FAKE_STEP_MS` a step's duration, `FAKE_NAN_STEP` the step whose loss is not finite.
 */
import { setTimeout } from 'node:timers/promises';
import { LoraDaError } from '../lib/errors';
import type {
  NativeAddon,
  NativeBatch,
  NativeFactors,
  NativeLoraOptions,
  NativeModel,
  NativeModelOptions,
  NativeMoments,
  NativeStepOptions,
} from '../lib/native';

const stepMilliseconds = Number(process.env.FAKE_STEP_MS ?? 0);
const nanStep = Number(process.env.FAKE_NAN_STEP ?? 0);

interface ModuleState {
  factors: NativeFactors;
  moments: NativeMoments;
}

/** What a row pulls element i of the factors towards. */
const target = (hash: number, i: number) => Math.sin(hash * 1e-3 + i);

function hashOf(ids: Int32Array): number {
  let hash = 7;
  for (const id of ids) hash = (Math.imul(hash, 31) + id) | 0;
  return Math.abs(hash) % 10007;
}

function rowsOf(batch: NativeBatch): { ids: Int32Array; labelTokens: number }[] {
  return Array.from({ length: batch.sequenceStarts.length - 1 }, (_, i) => {
    const [start, end] = [batch.sequenceStarts[i]!, batch.sequenceStarts[i + 1]!];
    const labels = batch.labels.subarray(start + 1, end);
    return { ids: batch.inputIds.subarray(start, end), labelTokens: labels.filter((label) => label !== -100).length };
  });
}

const fakePlan = {
  plan: 'sample-major' as const,
  layersPerCheckpoint: 1,
  resident: 5000,
  statistics: 300,
  streams: 0,
  activations: 200,
  workspace: 100,
  total: 5600,
  budget: 1e9,
};

export class FakeModel implements NativeModel {
  readonly info;
  readonly calls: string[] = [];
  #modules: ModuleState[] = [];
  #queue: Promise<unknown> = Promise.resolve();
  #generation = 0;
  #disposed = false;

  constructor(readonly options: NativeModelOptions) {
    const dtype = options.dtype === 'auto' ? ('float32' as const) : options.dtype;
    this.info = {
      device: 'cpu',
      deviceName: 'cpu',
      deviceNote: '',
      dtype,
      threads: options.threads || 2,
      parameters: 1000,
      weightBytes: 4000,
    };
  }

  #enqueue<T>(name: string, work: () => T | Promise<T>): Promise<T> {
    this.calls.push(name);
    const generation = this.#generation;
    const result = this.#queue.then(() => {
      if (this.#disposed) throw new LoraDaError('DISPOSED', 'disposed');
      if (generation !== this.#generation) throw new LoraDaError('ABORTED', 'cancelled');
      return work();
    });
    this.#queue = result.catch(() => {});
    return result;
  }

  async #interruptible(milliseconds: number): Promise<void> {
    const generation = this.#generation;
    for (let waited = 0; waited < milliseconds; waited += 10) {
      await setTimeout(10);
      if (generation !== this.#generation) throw new LoraDaError('ABORTED', 'cancelled');
    }
  }

  #sizes(module: string): { in: number; out: number } {
    const { spec } = this.options;
    const all = [...spec.attentionInputs, spec.attentionOutput, ...spec.mlpInputs, spec.mlpOutput];
    return all.find(({ name }) => module.endsWith(name))!;
  }

  addLora({ rank, modules }: NativeLoraOptions) {
    return this.#enqueue('addLora', () => {
      this.#modules = modules.map((module) => {
        const size = this.#sizes(module);
        const zeros = (n: number) => new Float32Array(n);
        const [na, nb] = [rank * size.in, size.out * rank];
        const moments = { module, aFirst: zeros(na), aSecond: zeros(na), bFirst: zeros(nb), bSecond: zeros(nb) };
        return { factors: { module, a: zeros(na), b: zeros(nb) }, moments };
      });
    });
  }

  removeLora() {
    return this.#enqueue('removeLora', () => {
      this.#modules = [];
    });
  }

  readFactors() {
    return this.#enqueue('readFactors', () => structuredClone(this.#modules.map(({ factors }) => factors)));
  }

  writeFactors(all: NativeFactors[]) {
    const copy = structuredClone(all);
    return this.#enqueue('writeFactors', () => {
      this.#modules.forEach((state, i) => {
        state.factors = copy[i]!;
      });
    });
  }

  readMoments() {
    return this.#enqueue('readMoments', () => structuredClone(this.#modules.map(({ moments }) => moments)));
  }

  writeMoments(all: NativeMoments[]) {
    const copy = structuredClone(all);
    return this.#enqueue('writeMoments', () => {
      this.#modules.forEach((state, i) => {
        state.moments = copy[i]!;
      });
    });
  }

  trainStep(batches: NativeBatch[], options: NativeStepOptions) {
    return this.#enqueue('trainStep', async () => {
      if (stepMilliseconds > 0) await setTimeout(stepMilliseconds);
      if (options.step === nanStep) throw new LoraDaError('NON_FINITE', 'loss NaN');
      const rows = batches.flatMap(rowsOf);
      let gradNorm = 0;
      for (const { factors, moments } of this.#modules) {
        for (const [values, first, second] of [
          [factors.a, moments.aFirst, moments.aSecond],
          [factors.b, moments.bFirst, moments.bSecond],
        ] as const) {
          gradNorm += this.#update(values, first, second, rows, options);
        }
      }
      return { loss: this.#loss(rows), gradNorm: Math.sqrt(gradNorm), seconds: 0.01 };
    });
  }

  #update(
    values: Float32Array,
    first: Float32Array,
    second: Float32Array,
    rows: { ids: Int32Array }[],
    { learningRate, beta1, beta2, epsilon, step }: NativeStepOptions,
  ): number {
    const hashes = rows.map(({ ids }) => hashOf(ids));
    let square = 0;
    for (let i = 0; i < values.length; i++) {
      let gradient = 0;
      for (const hash of hashes) gradient += values[i]! - target(hash, i);
      gradient /= hashes.length;
      square += gradient * gradient;
      first[i] = beta1 * first[i]! + (1 - beta1) * gradient;
      second[i] = beta2 * second[i]! + (1 - beta2) * gradient * gradient;
      const corrected = Math.sqrt(second[i]! / (1 - beta2 ** step)) + epsilon;
      values[i] = values[i]! - (learningRate * first[i]!) / (1 - beta1 ** step) / corrected;
    }
    return square;
  }

  #loss(rows: { ids: Int32Array }[]): number {
    return rows.reduce((sum, row) => sum + this.#rowLoss(row.ids), 0) / rows.length;
  }

  #rowLoss(ids: Int32Array): number {
    const hash = hashOf(ids);
    const values = this.#modules[0]?.factors.a ?? new Float32Array(8);
    let sum = 0;
    for (let i = 0; i < values.length; i++) sum += (values[i]! - target(hash, i)) ** 2;
    return sum / values.length;
  }

  evaluate(batch: NativeBatch) {
    return this.#enqueue('evaluate', () => {
      const rows = rowsOf(batch);
      const losses = Float64Array.from(rows, ({ ids }) => this.#rowLoss(ids));
      return { losses, labelTokens: Int32Array.from(rows, ({ labelTokens }) => labelTokens) };
    });
  }

  logits(batch: NativeBatch) {
    const { vocabSize } = this.options.spec;
    return this.#enqueue('logits', () => Float32Array.from({ length: batch.inputIds.length * vocabSize }, (_, i) => i));
  }

  initialize(
    ...[batches, options, onProgress]: Parameters<NativeModel['initialize']>
  ): ReturnType<NativeModel['initialize']> {
    return this.#enqueue('initialize', async () => {
      onProgress('collect', batches.length, batches.length);
      await this.#interruptible(stepMilliseconds);
      const seed = batches.flatMap(rowsOf).reduce((sum, { ids }) => sum + hashOf(ids), options.seed);
      for (const { factors } of this.#modules) {
        factors.a.forEach((_, i, a) => {
          a[i] = Math.sin(seed + i) / Math.sqrt(options.gamma);
        });
        factors.b.fill(options.method === 'lora-da' ? 0.01 : 0);
      }
      onProgress('solve', this.#modules.length, this.#modules.length);
      const dataAware = options.method === 'lora-da';
      const modules = this.#modules.map(({ factors }, i) => ({
        module: factors.module,
        rank: 8,
        conditionNumber: dataAware ? 1e4 * (i + 1) : Number.NaN,
        medianOutputOverDamping: dataAware ? 3 / (i + 1) : Number.NaN,
        sigma: dataAware ? 10 + i : Number.NaN,
        gap: dataAware ? 0.1 : Number.NaN,
        relativeGap: dataAware ? 0.05 : Number.NaN,
        eigenvalues: Float64Array.from(dataAware ? [-1, 0.5] : []),
      }));
      return { modules, collection: dataAware ? fakePlan : null, collectSeconds: 0.5, solveSeconds: 0.25 };
    });
  }

  planInitialization(...[, { method }]: Parameters<NativeModel['planInitialization']>) {
    return this.#enqueue('planInitialization', () => (method === 'lora-da' ? fakePlan : null));
  }

  collect() {
    return this.#enqueue('collect', () => []);
  }

  generate(...[options, onToken]: Parameters<NativeModel['generate']>) {
    return this.#enqueue('generate', () => {
      const made: number[] = [];
      let id = options.inputIds.at(-1)!;
      while (made.length < options.maxNewTokens) {
        id = (id + 1) % this.options.spec.vocabSize;
        made.push(id);
        onToken(id);
        if (options.stopIds.includes(id)) break;
      }
      return Int32Array.from(made);
    });
  }

  mergedWeight(module: string) {
    const size = this.#sizes(module);
    return this.#enqueue('mergedWeight', () => new Float32Array(size.in * size.out));
  }

  profile() {
    return this.#enqueue('profile', () => []);
  }

  resetProfile() {
    return this.#enqueue('resetProfile', () => {});
  }

  async planMemory(tokens: number, labelTokens: number) {
    return { weights: 4000, activations: tokens * 100, adapters: 1000, workspace: labelTokens * 10, free: 1e9 };
  }

  cancel() {
    this.#generation++;
  }

  async dispose() {
    this.#disposed = true;
  }
}

const fakeCpu = {
  name: 'cpu',
  model: '',
  usable: true,
  reason: '',
  memory: 0,
  computeCapability: '',
  bfloat16: false,
};

export const fakeAddon: NativeAddon = {
  setErrorClass: () => {},
  loadModel: async (options, onProgress) => {
    onProgress(options.tensors.length, options.tensors.length);
    return new FakeModel(options);
  },
  devices: async () => ({ devices: [fakeCpu], libraries: {} }),
  info: () => ({
    isa: 'none',
    threads: 2,
    bfloat16: false,
    libraries: {},
    initializations: [
      { name: 'lora-da', gradient: true, inputMoment: true, outputFactor: true },
      { name: 'kaiming', gradient: false, inputMoment: false, outputFactor: false },
      { name: 'gaussian', gradient: false, inputMoment: false, outputFactor: false },
    ],
  }),
};

/** Puts the toy add-on in the place of the real one, in this process. */
export function installFakeNative(): void {
  const id = require.resolve('node-gyp-build');
  require.cache[id] = { id, filename: id, loaded: true, exports: () => fakeAddon } as unknown as NodeModule;
}

installFakeNative();
