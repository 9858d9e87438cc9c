/** Reads a reference folder (see ../shared/reference/README.md) and loads its model. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { openCheckpoint } from '../../lib/checkpoint';
import { type DecoderSpec, type NativeBatch, type NativeModel, native } from '../../lib/native';
import { testDevice } from './device';

/** Beside the checkout, where there is one. LORA_DA_REFERENCE names another folder of the same layout. */
export const referenceRoot = process.env.LORA_DA_REFERENCE ?? join(__dirname, '../../../shared/reference');

export interface Row {
  input_ids: number[];
  labels: number[];
}

interface LoraDaCase {
  rank: number;
  tokenMask: 'attention' | 'labels';
  population: number;
  variance_weight: number;
  bias_weight?: number;
  gamma: number;
  damping?: number;
  normalize_delta?: boolean;
  modules: Record<string, { relativeGap: number; sigma: number; float32ProductError?: number; float32Angle?: number }>;
}

interface Trajectory {
  rank: number;
  alpha: number;
  rslora: boolean;
  weightDecay: number;
  steps: { loss: number; gradNorm: number; learningRate: number }[];
}

interface Expected {
  loss: number[];
  labelTokens: number[];
  loraDa: Record<string, LoraDaCase>;
  trajectories: Record<string, Trajectory>;
  greedy: { prompt: number[]; continuation: number[] }[];
}

/** float32 tensors of a safetensors file. */
export class Tensors {
  private readonly bytes: Buffer;
  private readonly header: Record<string, { data_offsets: [number, number] }>;
  private readonly start: number;

  constructor(path: string) {
    this.bytes = readFileSync(path);
    this.start = 8 + Number(this.bytes.readBigUInt64LE(0));
    this.header = JSON.parse(this.bytes.toString('utf8', 8, this.start));
  }

  get(name: string): Float32Array {
    const entry = this.header[name];
    if (!entry) throw new Error(`no tensor ${name}`);
    const [first, last] = entry.data_offsets;
    return new Float32Array(new Uint8Array(this.bytes.subarray(this.start + first, this.start + last)).buffer);
  }
}

export interface Reference {
  model: NativeModel;
  spec: DecoderSpec;
  rows: Row[];
  expected: Expected;
  tensors: Tensors;
  batch(rows: Row[]): NativeBatch;
  startFactors(model: NativeModel, label: string, options: Trajectory): Promise<void>;
}

export function batchOf(rows: Row[]): NativeBatch {
  const starts = [0];
  for (const row of rows) starts.push(starts.at(-1)! + row.input_ids.length);
  return {
    inputIds: Int32Array.from(rows.flatMap((row) => row.input_ids)),
    labels: Int32Array.from(rows.flatMap((row) => row.labels)),
    sequenceStarts: Int32Array.from(starts),
  };
}

/** Full names of all linear modules in layer order. */
export function allModules(spec: DecoderSpec): string[] {
  const linears = [...spec.attentionInputs, spec.attentionOutput, ...spec.mlpInputs, spec.mlpOutput];
  return Array.from({ length: spec.layers }, (_, layer) =>
    linears.map((linear) => `${spec.names.layer.replace('{i}', String(layer))}.${linear.name}`),
  ).flat();
}

/** The model of `directory` in float32, with the expected values of `expectedDirectory`. */
export async function loadReference(directory: string, expectedDirectory = directory): Promise<Reference> {
  const { spec, tensors } = await openCheckpoint(directory);
  const model = await native().loadModel(
    { spec, tensors, dtype: 'float32', device: testDevice, threads: 2, copyBudget: -1 },
    () => {},
  );
  const text = (name: string) => readFileSync(join(expectedDirectory, name), 'utf8');
  return {
    model,
    spec,
    rows: text('inputs.jsonl')
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as Row),
    expected: JSON.parse(text('expected.json')) as Expected,
    tensors: new Tensors(join(expectedDirectory, 'expected.safetensors')),
    batch: batchOf,
    async startFactors(target, label, options) {
      const modules = allModules(spec);
      const scaling = options.rslora ? options.alpha / Math.sqrt(options.rank) : options.alpha / options.rank;
      const stored = new Tensors(join(expectedDirectory, `adapter-${label}`, 'adapter_model.safetensors'));
      const factor = (module: string, name: string) => stored.get(`base_model.model.${module}.${name}.weight`);
      await target.addLora({ rank: options.rank, scaling, modules });
      await target.writeFactors(
        modules.map((module) => ({ module, a: factor(module, 'lora_A'), b: factor(module, 'lora_B') })),
      );
    },
  };
}
