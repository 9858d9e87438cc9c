import type { FileDtype } from './native';

/** Bytes of one value in a file. */
export const bytesPerValue: Record<FileDtype, number> = { F32: 4, F16: 2, BF16: 2 };

const word = new Float32Array(1);
const bits = new Uint32Array(word.buffer);

/**
 * Values of a tensor as float32, from its bytes (little-endian, as in the file).
 *
 * @param bytes  the tensor's bytes; they are copied
 */
export function decodeFloats(bytes: Uint8Array, dtype: FileDtype): Float32Array {
  const copy = bytes.slice();
  if (dtype === 'F32') return new Float32Array(copy.buffer, copy.byteOffset, copy.byteLength / 4);
  const halves = new Uint16Array(copy.buffer, copy.byteOffset, copy.byteLength / 2);
  const out = new Float32Array(halves.length);
  if (dtype === 'BF16') {
    const outBits = new Uint32Array(out.buffer);
    for (let i = 0; i < halves.length; i++) outBits[i] = halves[i]! << 16;
  } else {
    for (let i = 0; i < halves.length; i++) out[i] = halfToFloat(halves[i]!);
  }
  return out;
}

/** Bytes of float32 values in the given type, rounded to the nearest, ties to even. */
export function encodeFloats(values: Float32Array, dtype: FileDtype): Uint8Array {
  if (dtype === 'F32') return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  const halves = new Uint16Array(values.length);
  if (dtype === 'BF16') {
    const source = new Uint32Array(values.buffer, values.byteOffset, values.length);
    for (let i = 0; i < halves.length; i++) halves[i] = floatBitsToBfloat(source[i]!);
  } else {
    for (let i = 0; i < halves.length; i++) halves[i] = floatToHalf(values[i]!);
  }
  return new Uint8Array(halves.buffer);
}

function floatBitsToBfloat(x: number): number {
  if ((x & 0x7fffffff) > 0x7f800000) return (x >>> 16) | 0x40; // NaN stays NaN
  return (x + 0x7fff + ((x >>> 16) & 1)) >>> 16;
}

function halfToFloat(half: number): number {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >>> 10) & 0x1f;
  const fraction = half & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1024 + fraction) * 2 ** (exponent - 25);
}

function floatToHalf(value: number): number {
  word[0] = value;
  const x = bits[0]!;
  const sign = (x >>> 16) & 0x8000;
  const magnitude = x & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520 and above round to infinity
  if (magnitude < 0x38800000) {
    // Below 2^-14 the step is 2^-24; float32 addition of 0.5 rounds to it, ties to even.
    word[0] = Math.abs(value) + 0.5;
    return sign | (bits[0]! - 0x3f000000);
  }
  return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
}
