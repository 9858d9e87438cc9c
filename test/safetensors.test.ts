import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { decodeFloats, encodeFloats } from '../lib/float_bits';
import { readSafetensorsHeader, readTensor, writeSafetensors } from '../lib/safetensors';

let directory: string;
before(() => {
  directory = mkdtempSync(join(tmpdir(), 'lora-da-'));
});
after(() => rmSync(directory, { recursive: true }));

/** A file from a header (as JSON text or a value) and some bytes of data. */
function file(header: unknown, data: number, length?: bigint): string {
  const text = Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(length ?? BigInt(text.length));
  const path = join(directory, `${Math.random()}.safetensors`);
  writeFileSync(path, Buffer.concat([prefix, text, Buffer.alloc(data)]));
  return path;
}

const good = { dtype: 'F32', shape: [2, 3], data_offsets: [0, 24] };

test('what is written is read', async () => {
  const path = join(directory, 'a.safetensors');
  const data = Float32Array.from([1, -2.5, 3e-8, 4, 5, 6]);
  await writeSafetensors(path, [
    { name: 'b', shape: [2, 3], data },
    { name: 'a', shape: [3, 2], data, dtype: 'BF16' },
    { name: 'empty', shape: [0, 4], data: new Float32Array(0) },
  ]);
  const header = await readSafetensorsHeader(path);
  assert.deepEqual(header.metadata, { format: 'pt' });
  assert.equal(header.raw.length % 8, 0);
  assert.deepEqual(await readTensor(path, header.tensors.get('b')!), data);
  assert.deepEqual(header.tensors.get('a')?.shape, [3, 2]);
  assert.deepEqual((await readTensor(path, header.tensors.get('a')!))[1], -2.5);
  assert.equal((await readTensor(path, header.tensors.get('empty')!)).length, 0);
});

test('a failed write leaves the old file and nothing else', async () => {
  const folder = mkdtempSync(join(directory, 'w-'));
  const path = join(folder, 'x.safetensors');
  writeFileSync(path, 'old');
  const broken = {
    name: 'x',
    shape: [1],
    get data(): Float32Array {
      throw new Error('lost');
    },
  };
  await assert.rejects(writeSafetensors(path, [broken]));
  assert.equal(readFileSync(path, 'utf8'), 'old');
  assert.deepEqual(readdirSync(folder), ['x.safetensors']);
});

test('writing into a folder that does not exist names the file', async () => {
  const write = writeSafetensors(join(directory, 'none', 'x.safetensors'), []);
  await assert.rejects(write, { code: 'FILE_NOT_FOUND', message: /Cannot write .*none\/x\.safetensors/ });
});

test('a missing file is named', async () => {
  await assert.rejects(readSafetensorsHeader(join(directory, 'none')), { code: 'FILE_NOT_FOUND', message: /none/ });
});

describe('a truncated file is refused by name', () => {
  const cases: [string, () => string][] = [
    [
      'without a length',
      () => {
        const path = join(directory, 'short');
        writeFileSync(path, 'abc');
        return path;
      },
    ],
    ['within the header', () => file({ x: good }, 0, 1000n)],
    ['within the data', () => file({ x: good }, 23)],
  ];
  for (const [name, make] of cases) {
    test(name, async () => {
      const path = make();
      await assert.rejects(readSafetensorsHeader(path), (error: Error & { code: string }) => {
        assert.equal(error.code, 'FILE_TRUNCATED');
        assert.match(error.message, /is truncated: expected \d+ bytes, found \d+/);
        assert.ok(error.message.includes(path));
        return true;
      });
    });
  }
});

describe('a malformed file is refused', () => {
  const cases: [string, () => string, RegExp][] = [
    ['header length beyond the limit', () => file({}, 0, 2n ** 62n), /header length from 2/],
    ['header length of 0', () => file('', 8, 0n), /header length from 2/],
    ['header that is not JSON', () => file('{"x": ', 0), /expected JSON in the header/],
    ['header that is a list', () => file([], 0), /expected a JSON object/],
    [
      'header that is not UTF-8',
      () => {
        const path = file('"aa"', 0);
        const b = readFileSync(path);
        b[9] = 0xff;
        writeFileSync(path, b);
        return path;
      },
      /not UTF-8/,
    ],
    ['entry that is a number', () => file({ x: 3 }, 0), /tensor x: expected an object/],
    [
      'unknown dtype',
      () => file({ x: { ...good, dtype: 'F31' } }, 24),
      /tensor x: expected a dtype among .*found "F31"/,
    ],
    ['negative size', () => file({ x: { ...good, shape: [-2, -3] } }, 24), /tensor x: expected a list of integers/],
    [
      'shape that overflows',
      () => file({ x: { ...good, shape: [2 ** 40, 2 ** 40] } }, 24),
      /tensor x: expected \S+ bytes/,
    ],
    [
      'shape and bytes that disagree',
      () => file({ x: { ...good, shape: [2, 2] } }, 24),
      /tensor x: expected 16 bytes for F32 \[2, 2\], found 24/,
    ],
    [
      'range that runs backwards',
      () => file({ x: { ...good, data_offsets: [24, 0] } }, 24),
      /tensor x: expected \[begin, end\]/,
    ],
    ['gap', () => file({ x: { ...good, data_offsets: [4, 28] } }, 28), /tensor x: its data leaves a gap/],
    ['overlap', () => file({ x: good, y: { ...good, data_offsets: [12, 36] } }, 36), /tensor y: its data overlaps/],
    ['bytes after the last tensor', () => file({ x: good }, 30), /found 6 more after the last tensor/],
    [
      'the same name twice',
      () => file(`{"x":${JSON.stringify(good)},"x":${JSON.stringify(good)}}`, 24),
      /"x" is declared twice/,
    ],
    ['metadata that is not strings', () => file({ __metadata__: { a: 1 }, x: good }, 24), /strings in __metadata__/],
  ];
  for (const [name, make, message] of cases) {
    test(name, async () => {
      const path = make();
      await assert.rejects(readSafetensorsHeader(path), { code: 'INVALID_FILE', message });
    });
  }
});

test('a tensor of integers is not read as floats', async () => {
  const path = file({ x: { ...good, dtype: 'I32' } }, 24);
  const { tensors } = await readSafetensorsHeader(path);
  await assert.rejects(readTensor(path, tensors.get('x')!), { code: 'INVALID_TENSOR', message: /tensor x, found I32/ });
});

test('a file that shrinks after its header was read is an error', async () => {
  const path = file({ x: good }, 24);
  const { tensors } = await readSafetensorsHeader(path);
  writeFileSync(path, readFileSync(path).subarray(0, -4));
  await assert.rejects(readTensor(path, tensors.get('x')!), { code: 'FILE_TRUNCATED' });
});

describe('16-bit floats', () => {
  test('every float16 survives the way through float32', () => {
    const halves = Uint16Array.from({ length: 65536 }, (_, i) => i).filter(
      (x) => (x & 0x7c00) !== 0x7c00 || !(x & 0x3ff),
    );
    const bytes = new Uint8Array(halves.buffer);
    assert.deepEqual(new Uint16Array(encodeFloats(decodeFloats(bytes, 'F16'), 'F16').buffer), halves);
  });

  test('every bfloat16 survives the way through float32', () => {
    const halves = Uint16Array.from({ length: 65536 }, (_, i) => i).filter(
      (x) => (x & 0x7f80) !== 0x7f80 || !(x & 0x7f),
    );
    const bytes = new Uint8Array(halves.buffer);
    assert.deepEqual(new Uint16Array(encodeFloats(decodeFloats(bytes, 'BF16'), 'BF16').buffer), halves);
  });

  test('rounding is to the nearest, ties to even', () => {
    const f16 = (x: number) => decodeFloats(encodeFloats(Float32Array.of(x), 'F16'), 'F16')[0];
    assert.equal(f16(2049), 2048);
    assert.equal(f16(2051), 2052);
    assert.equal(f16(65519), 65504);
    assert.equal(f16(65520), Number.POSITIVE_INFINITY);
    assert.equal(f16(2 ** -25), 0);
    assert.equal(f16(3 * 2 ** -25), 2 ** -23);
    assert.equal(f16(-(2 ** -24)), -(2 ** -24));
    const bf16 = (x: number) => decodeFloats(encodeFloats(Float32Array.of(x), 'BF16'), 'BF16')[0];
    assert.equal(bf16(257), 256);
    assert.equal(bf16(259), 260);
    assert.ok(Number.isNaN(bf16(Number.NaN)) && Number.isNaN(f16(Number.NaN)));
  });
});
