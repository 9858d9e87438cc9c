import { LoraDaError } from './errors';
import type { DecoderSpec, LinearSpec } from './native';
import { computeRope, ropeType } from './rope';

type Config = Record<string, unknown>;
type Activation = DecoderSpec['activation'];

/** The sizes that every row of the family table starts from. */
interface Sizes {
  hidden: number;
  intermediate: number;
  layers: number;
  heads: number;
  kvHeads: number;
  headDim: number;
}

/** One row of the table: everything in which a family differs from Llama. Defaults are those of transformers 5. */
interface Family {
  kvHeads?: number;
  headDim?: number;
  maxPositions: number;
  normEpsilon: number;
  tied?: boolean;
  normOffset?: number;
  scaledEmbedding?: boolean;
  headNorm?: boolean;
  partialRotary?: boolean;
  /** Projections are fused: `qkv_proj`, `gate_up_proj`. */
  fused?: boolean;
  /** `hidden_act` where config.json has none. */
  activation: string;
  activations: Record<string, Activation>;
  attentionBias(config: Reader): { inputs: boolean; output: boolean };
  mlpBias?(config: Reader): boolean;
  windows(config: Reader, layers: number): number[];
}

const exactActivations: Record<string, Activation> = {
  silu: 'silu',
  swish: 'silu',
  gelu: 'gelu',
  gelu_new: 'gelu_tanh',
  gelu_pytorch_tanh: 'gelu_tanh',
};

const noBias = () => ({ inputs: false, output: false });
const biasOnDemand = (config: Reader) => {
  const bias = config.boolean('attention_bias', false);
  return { inputs: bias, output: bias };
};
const full = (_: Reader, layers: number) => new Array<number>(layers).fill(0);

/** One window for all layers; null or absent as `fallback` says. */
const oneWindow = (fallback: number | null) => (config: Reader, layers: number) => {
  const window = config.has('sliding_window') ? config.optionalInteger('sliding_window') : fallback;
  return new Array<number>(layers).fill(window ?? 0);
};

/** Qwen: `layer_types` where it is given, else the layers from `max_window_layers` on; only with `use_sliding_window`. */
const windowsOfLaterLayers = (config: Reader, layers: number) => {
  const window = config.boolean('use_sliding_window', false)
    ? (config.optionalInteger('sliding_window', 4096) ?? 0)
    : 0;
  const first = config.integer('max_window_layers', 28, 0);
  const types = config.layerTypes(layers);
  if (!types) return Array.from({ length: layers }, (_, i) => (i >= first ? window : 0));
  if (window === 0 && types.includes('sliding_attention')) {
    throw config.invalid('sliding_window', 'a positive integer, because layer_types asks for sliding attention');
  }
  return types.map((type) => (type === 'sliding_attention' ? window : 0));
};

const families: Record<string, Family> = {
  llama: {
    maxPositions: 2048,
    normEpsilon: 1e-6,
    activation: 'silu',
    activations: exactActivations,
    attentionBias: biasOnDemand,
    mlpBias: (config) => config.boolean('mlp_bias', false),
    windows: full,
  },
  mistral: {
    kvHeads: 8,
    maxPositions: 131072,
    normEpsilon: 1e-6,
    activation: 'silu',
    activations: exactActivations,
    attentionBias: noBias,
    windows: oneWindow(4096),
  },
  qwen2: {
    kvHeads: 32,
    maxPositions: 32768,
    normEpsilon: 1e-6,
    activation: 'silu',
    activations: exactActivations,
    attentionBias: () => ({ inputs: true, output: false }),
    windows: windowsOfLaterLayers,
  },
  qwen3: {
    kvHeads: 32,
    headDim: 128,
    maxPositions: 32768,
    normEpsilon: 1e-6,
    headNorm: true,
    activation: 'silu',
    activations: exactActivations,
    attentionBias: biasOnDemand,
    windows: windowsOfLaterLayers,
  },
  gemma: {
    kvHeads: 16,
    headDim: 256,
    maxPositions: 8192,
    normEpsilon: 1e-6,
    tied: true,
    normOffset: 1,
    scaledEmbedding: true,
    activation: 'gelu_pytorch_tanh',
    // The first releases say "gelu" and mean the tanh approximation (transformers #29402).
    activations: { ...exactActivations, gelu: 'gelu_tanh' },
    attentionBias: biasOnDemand,
    windows: full,
  },
  phi3: {
    maxPositions: 4096,
    normEpsilon: 1e-5,
    partialRotary: true,
    fused: true,
    activation: 'silu',
    activations: exactActivations,
    attentionBias: noBias,
    windows: oneWindow(null),
  },
};

/** Names of the decoder families that `decoderSpec` knows, as `model_type` in config.json spells them. */
export const knownFamilies: readonly string[] = Object.keys(families);

/**
 * Fields that change the numbers and that the core does not compute, with the values that change nothing. Null and absent
 * are always harmless.
 */
const refusedFields: Record<string, readonly unknown[]> = {
  quantization_config: [],
  num_local_experts: [0, 1],
  num_experts: [0, 1],
  n_routed_experts: [0],
  attn_logit_softcapping: [0],
  final_logit_softcapping: [0],
  attention_dropout: [0],
  resid_pdrop: [0],
  embd_pdrop: [0],
  hidden_dropout: [0],
  clip_qkv: [0],
  qk_layernorm: [false],
  rope_interleaved: [false],
  use_bidirectional_attention: [false],
  logits_scaling: [1],
  residual_multiplier: [1],
  embedding_multiplier: [1],
  no_rope_layers: [[]],
};

/**
 * What a config.json says about the decoder, as the data that the native core builds it from. Reads the older layout
 * (`rope_theta`, `rope_scaling`, `torch_dtype`) and the newer one (`rope_parameters`, `dtype`).
 *
 * With rope type `dynamic` or `longrope` the frequencies hold up to the pretrained length, and `maxPositions` is that length.
 *
 * @param config  the parsed config.json
 * @param file    its path, for messages
 * @throws {LoraDaError} `UNSUPPORTED` for a family, activation, rope type or field that the core does not compute,
 *   `INVALID_CONFIG` for a missing, malformed or inconsistent field; names file, field and what was expected
 * @example
 * ```ts
 * const spec = decoderSpec(JSON.parse(await readFile('model/config.json', 'utf8')), 'model/config.json');
 * ```
 */
export function decoderSpec(config: Config, file = 'config.json'): DecoderSpec {
  const reader = new Reader(config, file);
  const name = reader.string('model_type');
  const family = Object.hasOwn(families, name) ? families[name] : undefined;
  if (!family) {
    throw new LoraDaError(
      'UNSUPPORTED',
      `${file}: model_type ${JSON.stringify(name)} is not supported; known are ${knownFamilies.join(', ')}`,
    );
  }
  refuseFields(reader);
  const sizes = readSizes(reader, family);
  const maxPositions = reader.integer('max_position_embeddings', family.maxPositions, 1);
  const rope = readRope(reader, name, family, sizes.headDim, maxPositions);
  return {
    family: name,
    vocabSize: reader.integer('vocab_size', undefined, 1),
    hiddenSize: sizes.hidden,
    intermediateSize: sizes.intermediate,
    layers: sizes.layers,
    heads: sizes.heads,
    kvHeads: sizes.kvHeads,
    headDim: sizes.headDim,
    maxPositions: Math.min(maxPositions, rope.maxPositions),
    positionLimit: Number.isFinite(rope.maxPositions) ? rope.maxPositions : 0,
    normEpsilon: reader.positive('rms_norm_eps', family.normEpsilon),
    normOffset: family.normOffset ?? 0,
    embeddingScale: family.scaledEmbedding ? Math.sqrt(sizes.hidden) : 1,
    activation: readActivation(reader, name, family),
    headNorm: family.headNorm ?? false,
    attentionScale: 1 / Math.sqrt(sizes.headDim),
    windows: family.windows(reader, sizes.layers),
    inverseFrequencies: rope.inverseFrequencies,
    rotaryScale: rope.scale,
    tiedHead: reader.boolean('tie_word_embeddings', family.tied ?? false),
    ...linearSpecs(reader, family, sizes),
    names: {
      embedding: 'model.embed_tokens.weight',
      layer: 'model.layers.{i}',
      attentionNorm: 'input_layernorm.weight',
      mlpNorm: 'post_attention_layernorm.weight',
      queryNorm: 'self_attn.q_norm.weight',
      keyNorm: 'self_attn.k_norm.weight',
      finalNorm: 'model.norm.weight',
      head: 'lm_head.weight',
    },
  };
}

function refuseFields(reader: Reader): void {
  for (const [field, harmless] of Object.entries(refusedFields)) {
    const value = reader.get(field);
    if (value === undefined || value === null) continue;
    const text = JSON.stringify(value);
    if (harmless.some((other) => JSON.stringify(other) === text)) continue;
    const shown = typeof value === 'object' ? '' : ` ${text}`;
    const hint = field === 'quantization_config' ? '; expected a checkpoint in F32, F16 or BF16' : '';
    throw new LoraDaError('UNSUPPORTED', `${reader.file}: ${field}${shown} is not supported${hint}`);
  }
}

function readSizes(reader: Reader, family: Family): Sizes {
  const hidden = reader.integer('hidden_size', undefined, 1);
  const heads = reader.count('num_attention_heads', undefined);
  const kvHeads = reader.integer(
    'num_key_value_heads',
    reader.has('num_key_value_heads') ? heads : (family.kvHeads ?? heads),
    1,
  );
  if (heads % kvHeads !== 0) throw reader.invalid('num_key_value_heads', `a divisor of num_attention_heads (${heads})`);
  if (!reader.get('head_dim') && family.headDim === undefined && hidden % heads !== 0) {
    throw reader.invalid('hidden_size', `a multiple of num_attention_heads (${heads}), because head_dim is not given`);
  }
  const headDim = reader.count('head_dim', family.headDim ?? hidden / heads);
  if (headDim % 2 !== 0) throw reader.invalid('head_dim', 'an even number');
  return {
    hidden,
    intermediate: reader.integer('intermediate_size', undefined, 1),
    layers: reader.count('num_hidden_layers', undefined),
    heads,
    kvHeads,
    headDim,
  };
}

function readActivation(reader: Reader, name: string, family: Family): Activation {
  const own = reader.get('hidden_act') ?? reader.get('hidden_activation') ?? family.activation;
  const activation =
    typeof own === 'string' && Object.hasOwn(family.activations, own) ? family.activations[own] : undefined;
  if (activation) return activation;
  const known = Object.keys(family.activations).join(', ');
  throw new LoraDaError(
    'UNSUPPORTED',
    `${reader.file}: hidden_act ${JSON.stringify(own)} is not supported for ${name}; known are ${known}`,
  );
}

function readRope(reader: Reader, name: string, family: Family, headDim: number, maxPositions: number) {
  const found = reader.get('rope_scaling') || reader.get('rope_parameters') || {};
  if (typeof found !== 'object' || Array.isArray(found)) throw reader.invalid('rope_parameters', 'an object');
  const parameters = { ...(found as Config) };
  if (Object.values(parameters).some((value) => typeof value === 'object' && value !== null && !Array.isArray(value))) {
    throw new LoraDaError('UNSUPPORTED', `${reader.file}: rope_parameters that differ by layer type are not supported`);
  }
  const partial = parameters.partial_rotary_factor ?? reader.get('partial_rotary_factor') ?? 1;
  if (typeof partial !== 'number' || !(partial > 0 && partial <= 1)) {
    throw reader.invalid('partial_rotary_factor', 'a number above 0 and at most 1');
  }
  if (partial !== 1 && !family.partialRotary) {
    throw new LoraDaError(
      'UNSUPPORTED',
      `${reader.file}: partial_rotary_factor ${partial} is not supported for ${name}`,
    );
  }
  const dimension = Math.trunc(headDim * partial);
  if (dimension < 2 || dimension % 2 !== 0) {
    throw reader.invalid('partial_rotary_factor', `a factor that leaves an even part of head_dim (${headDim})`);
  }
  if (name === 'phi3') {
    // Older Phi-3 files call longrope "su" or "yarn".
    if (['su', 'yarn'].includes(ropeType(parameters))) parameters.rope_type = 'longrope';
    if (!['default', 'longrope'].includes(ropeType(parameters))) {
      throw new LoraDaError(
        'UNSUPPORTED',
        `${reader.file}: rope type ${JSON.stringify(ropeType(parameters))} is not supported for phi3; known are default, longrope`,
      );
    }
  }
  const theta = parameters.rope_theta ?? reader.get('rope_theta') ?? 10000;
  if (typeof theta !== 'number' || !(theta > 1)) throw reader.invalid('rope_theta', 'a number above 1');
  const original =
    reader.get('original_max_position_embeddings') ??
    parameters.original_max_position_embeddings ??
    (name === 'phi3' ? 4096 : maxPositions);
  if (typeof original !== 'number' || !(original > 0)) {
    throw reader.invalid('original_max_position_embeddings', 'a positive integer');
  }
  return computeRope({ file: reader.file, parameters, theta, dimension, maxPositions, originalMaxPositions: original });
}

function linearSpecs(reader: Reader, family: Family, sizes: Sizes) {
  const { hidden, intermediate, heads, kvHeads, headDim } = sizes;
  const attention = family.attentionBias(reader);
  const mlpBias = family.mlpBias?.(reader) ?? false;
  const linear = (name: string, out: number, input: number, bias: boolean): LinearSpec => ({
    name,
    out,
    in: input,
    bias,
  });
  const query = heads * headDim;
  const key = kvHeads * headDim;
  return {
    attentionInputs: family.fused
      ? [linear('self_attn.qkv_proj', query + 2 * key, hidden, attention.inputs)]
      : [
          linear('self_attn.q_proj', query, hidden, attention.inputs),
          linear('self_attn.k_proj', key, hidden, attention.inputs),
          linear('self_attn.v_proj', key, hidden, attention.inputs),
        ],
    attentionOutput: linear('self_attn.o_proj', hidden, query, attention.output),
    mlpInputs: family.fused
      ? [linear('mlp.gate_up_proj', 2 * intermediate, hidden, mlpBias)]
      : [linear('mlp.gate_proj', intermediate, hidden, mlpBias), linear('mlp.up_proj', intermediate, hidden, mlpBias)],
    mlpOutput: linear('mlp.down_proj', hidden, intermediate, mlpBias),
  };
}

/** Reads fields of one config.json; every complaint names the file, the field and what was expected. */
class Reader {
  constructor(
    private readonly config: Config,
    readonly file: string,
  ) {}

  get(field: string): unknown {
    return Object.hasOwn(this.config, field) ? this.config[field] : undefined;
  }

  has(field: string): boolean {
    return Object.hasOwn(this.config, field);
  }

  invalid(field: string, what: string): LoraDaError {
    const value = this.get(field);
    const shown = value === undefined ? 'it is missing' : `found ${JSON.stringify(value).slice(0, 80)}`;
    return new LoraDaError('INVALID_CONFIG', `${this.file}: expected ${what} for ${field}, ${shown}`);
  }

  string(field: string): string {
    const value = this.get(field);
    if (typeof value !== 'string' || value === '') throw this.invalid(field, 'a string');
    return value;
  }

  /** An integer from `minimum` to `maximum`; null counts as absent. */
  integer(field: string, fallback: number | undefined, minimum: number, maximum = 2 ** 31 - 1): number {
    const value = this.get(field) ?? fallback;
    if (Number.isInteger(value) && (value as number) >= minimum && (value as number) <= maximum) return value as number;
    throw this.invalid(field, `an integer from ${minimum} to ${maximum}`);
  }

  /** A number of layers, heads or components of a head: lists of that length are made from it. */
  count(field: string, fallback: number | undefined): number {
    return this.integer(field, fallback, 1, 65536);
  }

  optionalInteger(field: string, fallback: number | null = null): number | null {
    if (!this.has(field)) return fallback;
    return this.get(field) === null ? null : this.integer(field, undefined, 1);
  }

  positive(field: string, fallback: number): number {
    const value = this.get(field) ?? fallback;
    if (typeof value === 'number' && Number.isFinite(value) && value > 0) return value;
    throw this.invalid(field, 'a positive number');
  }

  boolean(field: string, fallback: boolean): boolean {
    const value = this.get(field) ?? fallback;
    if (typeof value === 'boolean') return value;
    throw this.invalid(field, 'true or false');
  }

  layerTypes(layers: number): string[] | undefined {
    const types = this.get('layer_types');
    if (types === undefined || types === null) return undefined;
    if (!Array.isArray(types) || types.length !== layers) {
      throw this.invalid('layer_types', `one entry for each of the ${layers} layers`);
    }
    for (const type of types) {
      if (type === 'full_attention' || type === 'sliding_attention') continue;
      throw new LoraDaError('UNSUPPORTED', `${this.file}: layer type ${JSON.stringify(type)} is not supported`);
    }
    return types;
  }
}
