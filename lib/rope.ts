import { LoraDaError } from './errors';

/** The rotary embedding of a checkpoint, as numbers. */
export interface Rope {
  /** One per rotated pair: dimension/2 entries. */
  inverseFrequencies: number[];
  /** Multiplies cos and sin. */
  scale: number;
  /** Longest sequence for which these frequencies hold; Infinity where they hold for every length. */
  maxPositions: number;
}

/** What the scaling formulas need. `dimension` is the number of rotated components of a head. */
export interface RopeInput {
  file: string;
  parameters: Record<string, unknown>;
  theta: number;
  dimension: number;
  maxPositions: number;
  originalMaxPositions: number;
}

/**
 * Scaling formulas by `rope_type`, as transformers 5 has them (modeling_rope_utils.py), in double precision.
 *
 * `dynamic` and `longrope` change their frequencies with the length of the sequence. Both are computed here for
 * sequences up to the length that the model was pretrained with, and `maxPositions` says so.
 */
const formulas: Record<string, (input: RopeInput) => Rope> = {
  default: (input) => unlimited(plainFrequencies(input)),

  linear: (input) => {
    const factor = number(input, 'factor');
    return unlimited(plainFrequencies(input).map((frequency) => frequency / factor));
  },

  dynamic: (input) => ({ ...unlimited(plainFrequencies(input)), maxPositions: input.maxPositions }),

  llama3: (input) => {
    const factor = number(input, 'factor');
    const low = number(input, 'low_freq_factor');
    const high = number(input, 'high_freq_factor');
    const original = input.originalMaxPositions;
    return unlimited(
      plainFrequencies(input).map((frequency) => {
        const wavelength = (2 * Math.PI) / frequency;
        if (wavelength < original / high) return frequency;
        if (wavelength > original / low) return frequency / factor;
        const smooth = (original / wavelength - low) / (high - low);
        return ((1 - smooth) * frequency) / factor + smooth * frequency;
      }),
    );
  },

  // YaRN, arXiv 2309.00071
  yarn: (input) => {
    const { parameters, dimension, theta, originalMaxPositions } = input;
    const factor = number(input, 'factor', input.maxPositions / originalMaxPositions);
    const correction = (rotations: number) =>
      (dimension * Math.log(originalMaxPositions / (rotations * 2 * Math.PI))) / (2 * Math.log(theta));
    let low = correction(number(input, 'beta_fast', 32));
    let high = correction(number(input, 'beta_slow', 1));
    if (parameters.truncate !== false) {
      low = Math.floor(low);
      high = Math.ceil(high);
    }
    low = Math.max(low, 0);
    high = Math.min(high, dimension - 1);
    if (low === high) high += 0.001;
    const frequencies = plainFrequencies(input).map((frequency, i) => {
      const extrapolated = 1 - Math.min(Math.max((i - low) / (high - low), 0), 1);
      return (frequency / factor) * (1 - extrapolated) + frequency * extrapolated;
    });
    return { inverseFrequencies: frequencies, scale: yarnScale(input, factor), maxPositions: Number.POSITIVE_INFINITY };
  },

  // LongRoPE (Phi-3): the short factors hold up to the original length.
  longrope: (input) => {
    const original = input.originalMaxPositions;
    const short = numbers(input, 'short_factor');
    numbers(input, 'long_factor');
    const factor = number(input, 'factor', input.maxPositions / original);
    const scale = factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(original));
    return {
      inverseFrequencies: plainFrequencies(input).map((frequency, i) => frequency / short[i]!),
      scale: number(input, 'attention_factor', scale),
      maxPositions: Math.min(original, input.maxPositions),
    };
  },
};

/**
 * Inverse frequencies for the rope type that `input.parameters` names.
 *
 * @throws {LoraDaError} `UNSUPPORTED` for a type that is not known, `INVALID_CONFIG` for a missing or malformed field
 */
export function computeRope(input: RopeInput): Rope {
  const type = ropeType(input.parameters);
  const formula = Object.hasOwn(formulas, type) ? formulas[type] : undefined;
  if (!formula) {
    throw new LoraDaError(
      'UNSUPPORTED',
      `${input.file}: rope type ${JSON.stringify(type)} is not supported; known are ${Object.keys(formulas).join(', ')}`,
    );
  }
  const rope = formula(input);
  if (!rope.inverseFrequencies.every(Number.isFinite) || !Number.isFinite(rope.scale)) {
    throw new LoraDaError('INVALID_CONFIG', `${input.file}: the rope parameters give frequencies that are not finite`);
  }
  return rope;
}

/** `rope_type`, or `type` as older files call it. */
export function ropeType(parameters: Record<string, unknown>): string {
  return String(parameters.rope_type ?? parameters.type ?? 'default');
}

function plainFrequencies({ theta, dimension }: RopeInput): number[] {
  return Array.from({ length: dimension / 2 }, (_, i) => theta ** (-(2 * i) / dimension));
}

function unlimited(inverseFrequencies: number[]): Rope {
  return { inverseFrequencies, scale: 1, maxPositions: Number.POSITIVE_INFINITY };
}

function yarnScale(input: RopeInput, factor: number): number {
  const { mscale, mscale_all_dim } = input.parameters;
  const grown = (weight: number) => (factor <= 1 ? 1 : 0.1 * weight * Math.log(factor) + 1);
  const suggested =
    mscale && mscale_all_dim ? grown(number(input, 'mscale')) / grown(number(input, 'mscale_all_dim')) : grown(1);
  return number(input, 'attention_factor', suggested);
}

function number({ file, parameters }: RopeInput, name: string, fallback?: number): number {
  const value = parameters[name] ?? fallback;
  if (typeof value === 'number' && Number.isFinite(value) && value > 0) return value;
  throw new LoraDaError('INVALID_CONFIG', `${file}: expected a positive number for ${name} of the rope parameters`);
}

function numbers({ file, parameters, dimension }: RopeInput, name: string): number[] {
  const value = parameters[name];
  const good =
    Array.isArray(value) && value.length === dimension / 2 && value.every((x) => Number.isFinite(x) && x > 0);
  if (good) return value;
  throw new LoraDaError(
    'INVALID_CONFIG',
    `${file}: expected ${dimension / 2} positive numbers for ${name} of the rope parameters`,
  );
}
