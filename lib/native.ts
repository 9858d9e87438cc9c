/**
 * The types of the native add-on (bindings/) and its loader. Nothing here computes; the classes of lib/ check arguments
 * before they call in, and native code then assumes valid input.
 */

import { LoraDaError } from './errors';

export type Dtype = 'float32' | 'bfloat16';
export type FileDtype = 'F32' | 'F16' | 'BF16';

/** One linear module of a decoder layer, as the checkpoint names it (`self_attn.q_proj`). */
export interface LinearSpec {
  /** Name within the layer, e.g. `self_attn.q_proj`. */
  name: string;
  out: number;
  in: number;
  bias: boolean;
}

/**
 * A decoder as data: everything in which the families differ. Made from config.json by lib/families.ts, read by native/model.
 * The attention inputs write side by side into one row [q | k | v], the MLP inputs into one row [gate | up]; a fused
 * projection (Phi-3) is then simply one module that fills the whole row.
 */
export interface DecoderSpec {
  family: string;
  vocabSize: number;
  hiddenSize: number;
  intermediateSize: number;
  layers: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  maxPositions: number;
  /** Longest sequence that the rotary frequencies hold for (dynamic, longrope: the pretrained length); 0: any. */
  positionLimit: number;
  normEpsilon: number;
  /** Added to every norm weight when it is loaded: 1 for Gemma, 0 elsewhere. */
  normOffset: number;
  /** Embeddings are multiplied by it: sqrt(hiddenSize) for Gemma, 1 elsewhere. */
  embeddingScale: number;
  activation: 'silu' | 'gelu_tanh' | 'gelu';
  /** RMSNorm on each query and key head (Qwen3): `self_attn.q_norm`, `self_attn.k_norm`. */
  headNorm: boolean;
  /** softmax(attentionScale · q kᵀ) */
  attentionScale: number;
  /** Per layer: 0 for full causal attention, else the sliding window in tokens (a query sees itself and window-1 before). */
  windows: number[];
  /** Inverse frequencies of the rotary embedding after scaling, headDim/2 (or fewer: partial rotary) entries. */
  inverseFrequencies: number[];
  /** Multiplies cos and sin (YaRN, longrope); 1 elsewhere. */
  rotaryScale: number;
  tiedHead: boolean;
  attentionInputs: LinearSpec[];
  attentionOutput: LinearSpec;
  mlpInputs: LinearSpec[];
  mlpOutput: LinearSpec;
  /** Tensor names in the checkpoint; `{i}` stands for the layer. */
  names: {
    embedding: string;
    layer: string;
    attentionNorm: string;
    mlpNorm: string;
    queryNorm: string;
    keyNorm: string;
    finalNorm: string;
    head: string;
  };
}

/** Where one tensor of the checkpoint lies: checked against the header, to be mapped by the core. */
export interface TensorSource {
  name: string;
  file: string;
  dtype: FileDtype;
  shape: number[];
  /** First byte, from the start of the file. */
  offset: number;
  bytes: number;
}

/** Sequences laid end to end without padding (native code rounds the rows up). */
export interface NativeBatch {
  inputIds: Int32Array;
  /** -100: not a label. Position t predicts labels[t + 1] of its own sequence. */
  labels: Int32Array;
  /** First token of each sequence, then the total: sequences + 1 entries. */
  sequenceStarts: Int32Array;
}

export interface NativeModelOptions {
  spec: DecoderSpec;
  tensors: TensorSource[];
  dtype: Dtype | 'auto';
  device: string;
  /** 0: physical cores. */
  threads: number;
  /** Bytes that copies of the weights may take in place of the mapped file; negative: decide by free memory. */
  copyBudget: number;
  /** Lay weights out at load as each product of a step reads them (default false); see {@link CausalLM.load}. */
  prepack?: boolean;
  /** Count and time every operation, for {@link NativeModel.profile} (default false). Costs a little time itself. */
  profile?: boolean;
}

export interface NativeModelInfo {
  /** `cpu` or `cuda:N`. */
  device: string;
  /** With the GPU's own name: `cuda:0 NVIDIA H100 80GB HBM3`. */
  deviceName: string;
  /** Why `auto` passed over CUDA although there is a driver for it; empty otherwise. */
  deviceNote: string;
  dtype: Dtype;
  /** Of the engine on the CPU; 0 on another device, where they have no part in the results. */
  threads: number;
  parameters: number;
  weightBytes: number;
}

export interface NativeLoraOptions {
  rank: number;
  scaling: number;
  /** Full names of the adapted modules without prefix, e.g. `model.layers.0.self_attn.q_proj`. */
  modules: string[];
}

/** One module's factors: a [rank, in], b [out, rank], row-major float32. */
export interface NativeFactors {
  module: string;
  a: Float32Array;
  b: Float32Array;
}

/** Optimizer state of one module, in the order and shapes of its factors. */
export interface NativeMoments {
  module: string;
  aFirst: Float32Array;
  aSecond: Float32Array;
  bFirst: Float32Array;
  bSecond: Float32Array;
}

export interface NativeStepOptions {
  learningRate: number;
  beta1: number;
  beta2: number;
  epsilon: number;
  weightDecay: number;
  /** 0: no clipping. */
  maxGradNorm: number;
  /** 1 for the first update. */
  step: number;
  recompute: 'none' | 'layer';
}

export interface NativeStepResult {
  /** Summed cross-entropy of the step divided by its label tokens. */
  loss: number;
  /** L2 norm of the adapters' gradients before clipping. */
  gradNorm: number;
  seconds: number;
}

export interface NativeEvaluation {
  /** Mean cross-entropy over each sequence's label tokens (NaN where it has none). */
  losses: Float64Array;
  labelTokens: Int32Array;
}

export interface NativeInitOptions {
  method: string;
  seed: number;
  tokenMask: 'attention' | 'labels';
  population: number;
  varianceWeight: number;
  biasWeight: number;
  gamma: number;
  damping: number;
  outputDamping: number;
  normalizeDelta: boolean;
  plan: 'auto' | CollectionOrder;
  /** Bytes that the process may hold in all; 0: decide by what is free. */
  memoryBudget: number;
}

/** One pass over each batch with the statistics of all modules at once, or all batches through one layer at a time. */
export type CollectionOrder = 'sample-major' | 'layer-major';

/** What an initialization does by turns: both in one, counted together, in layer-major order. */
export type InitializationPhase = 'collect' | 'solve' | 'layers';

/** The memory plan that an initialization followed, in bytes, each part at its largest. */
export interface CollectionPlan {
  plan: CollectionOrder;
  /** Layer-major: every n-th layer's input is kept from the first forward pass, the others are made again; 1: all are kept. */
  layersPerCheckpoint: number;
  /** The process with the model before the initialization. */
  resident: number;
  statistics: number;
  /** Residual streams of all batches, in layer-major order. */
  streams: number;
  activations: number;
  workspace: number;
  total: number;
  /** What the plan was chosen for. */
  budget: number;
}

/** What the initialization found for one module. Figures that a method does not compute are NaN. */
export interface NativeModuleReport {
  module: string;
  rank: number;
  /** Condition number of Zd = Z + damping I (estimate). */
  conditionNumber: number;
  /** median(ydiag) / outputDamping */
  medianOutputOverDamping: number;
  /** Largest singular value of delta before normalization. */
  sigma: number;
  /** Gap between the r-th and the next eigenvalue of omega. */
  gap: number;
  /** gap over the largest magnitude of an eigenvalue. */
  relativeGap: number;
  /** The r + 1 smallest eigenvalues of omega, ascending. */
  eigenvalues: Float64Array;
}

export interface NativeInitResult {
  modules: NativeModuleReport[];
  /** Null for a method that looks at no data. */
  collection: CollectionPlan | null;
  collectSeconds: number;
  solveSeconds: number;
}

export interface NativeGenerateOptions {
  inputIds: Int32Array;
  maxNewTokens: number;
  /** 0: greedy. */
  temperature: number;
  /** 1: all tokens. */
  topP: number;
  seed: number;
  stopIds: Int32Array;
}

/** What the calls of one operation took since the model was loaded or the profile reset. */
export interface NativeOperationProfile {
  /** Name and, for products, the shape of the weight (in x out) or of the result. */
  operation: string;
  calls: number;
  seconds: number;
  /** Of products, attention and dense algebra; 0 elsewhere. */
  flops: number;
  /** Read and written, caches not considered. */
  bytes: number;
}

export interface NativeMemoryPlan {
  weights: number;
  activations: number;
  adapters: number;
  workspace: number;
  /** Memory of the device that is free now, with weights and adapters in place; 0 where unknown. */
  free: number;
}

/**
 * A loaded model with its engine thread. Methods return promises that settle when the engine has done the work; calls
 * are queued in order and may be made before earlier ones have settled.
 */
export interface NativeModel {
  readonly info: NativeModelInfo;
  /** Adds adapters (B = 0, A = 0); replaces earlier ones and their optimizer state. */
  addLora(options: NativeLoraOptions): Promise<void>;
  removeLora(): Promise<void>;
  readFactors(): Promise<NativeFactors[]>;
  writeFactors(factors: NativeFactors[]): Promise<void>;
  readMoments(): Promise<NativeMoments[]>;
  writeMoments(moments: NativeMoments[]): Promise<void>;
  /** Forward, backward and one optimizer update over all micro-batches. Rejects with NON_FINITE and leaves the factors as they were. */
  trainStep(batches: NativeBatch[], options: NativeStepOptions): Promise<NativeStepResult>;
  evaluate(batch: NativeBatch): Promise<NativeEvaluation>;
  /** Logits of every token, [tokens, vocabSize] row-major. For tests and verification: large. */
  logits(batch: NativeBatch): Promise<Float32Array>;
  /** The plan that {@link initialize} would follow, before anything is allocated; null for a method without data. */
  planInitialization(batches: NativeBatch[], options: NativeInitOptions): Promise<CollectionPlan | null>;
  /** Collects what the method needs over the batches, computes the factors of every adapted module and sets them. */
  initialize(
    batches: NativeBatch[],
    options: NativeInitOptions,
    onProgress: (phase: InitializationPhase, done: number, total: number) => void,
  ): Promise<NativeInitResult>;
  /** Statistics of one pass, for tests: per adapted module gradient [out, in], inputMoment [in, in], outputFactor [out]. */
  collect(
    batches: NativeBatch[],
    tokenMask: 'attention' | 'labels',
  ): Promise<{ module: string; gradient: Float32Array; inputMoment: Float64Array; outputFactor: Float64Array }[]>;
  generate(options: NativeGenerateOptions, onToken: (id: number) => void): Promise<Int32Array>;
  /** W + scaling · B A of one adapted module in float32, [out, in]. */
  mergedWeight(module: string): Promise<Float32Array>;
  /** Bytes that a step over `tokens` tokens with `labelTokens` labels and sequences of at most `maxLength` will hold. */
  planMemory(
    tokens: number,
    labelTokens: number,
    maxLength: number,
    recompute: 'none' | 'layer',
  ): Promise<NativeMemoryPlan>;
  /** By operation, where the model was loaded with `profile`. */
  profile(): Promise<NativeOperationProfile[]>;
  resetProfile(): Promise<void>;
  /** Stops the work in progress and what is queued: their promises reject with ABORTED. Later calls work again. */
  cancel(): void;
  /** Frees everything; later calls reject with DISPOSED. */
  dispose(): Promise<void>;
}

export interface NativeInfo {
  isa: string;
  threads: number;
  bfloat16: boolean;
  libraries: Record<string, string>;
  /** Rows of the initialization table and what each one needs. */
  initializations: { name: string; gradient: boolean; inputMoment: boolean; outputFactor: boolean }[];
}

/** A device of the machine. */
export interface NativeDevice {
  /** What `device` takes: `cpu`, `cuda:0`; `cuda` where there is none. */
  name: string;
  /** The GPU's name; empty for the CPU. */
  model: string;
  usable: boolean;
  /** Why it is not usable; empty otherwise. */
  reason: string;
  /** Bytes in all; 0 for the CPU. */
  memory: number;
  /** `9.0`; empty for the CPU. */
  computeCapability: string;
  /** Multiplies bfloat16 matrices in hardware: what dtype `auto` goes by. */
  bfloat16: boolean;
}

/** The machine's devices, the CPU first, and the CUDA libraries with their versions. */
export interface NativeDevices {
  devices: NativeDevice[];
  libraries: Record<string, string>;
}

export interface NativeAddon {
  /** Maps, checks and prepares the weights on the engine thread. */
  loadModel(options: NativeModelOptions, onProgress: (done: number, total: number) => void): Promise<NativeModel>;
  info(): NativeInfo;
  /** Opens the CUDA libraries where there are any, on a thread of its own. */
  devices(): Promise<NativeDevices>;
  /** The class of the errors that promises reject with: `new (code, message)`. Set once, by {@link native}. */
  setErrorClass(errorClass: typeof LoraDaError): void;
}

let loaded: NativeAddon | undefined;

/**
 * OpenMP's threads wait for each other by spinning, by default for milliseconds: where another process takes one of the cores,
 * a step then takes several times as long. Its runtime reads the variable once, when it is loaded.
 */
function withOpenMpDefaults<T>(load: () => T): T {
  const { GOMP_SPINCOUNT, OMP_WAIT_POLICY } = process.env;
  if (GOMP_SPINCOUNT !== undefined || OMP_WAIT_POLICY !== undefined) return load();
  process.env.GOMP_SPINCOUNT = '10000';
  try {
    return load();
  } finally {
    delete process.env.GOMP_SPINCOUNT;
  }
}

/** The add-on: a prebuilt binary where there is one, else the one built in this checkout. */
export function native(): NativeAddon {
  if (!loaded) {
    loaded = withOpenMpDefaults(() => require('node-gyp-build')(`${__dirname}/..`) as NativeAddon);
    loaded.setErrorClass(LoraDaError);
  }
  return loaded;
}
