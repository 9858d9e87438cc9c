import assert from 'node:assert/strict';
import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { expectedTensors, openCheckpoint, readStopIds } from '../lib/checkpoint';
import { decoderSpec } from '../lib/families';
import { encodeFloats } from '../lib/float_bits';
import { mergeCheckpoint } from '../lib/merge';
import { readSafetensorsHeader, readTensor, type TensorData, writeSafetensors } from '../lib/safetensors';

const reference = join(__dirname, '..', '..', 'shared', 'reference');

const config = {
  model_type: 'llama',
  vocab_size: 12,
  hidden_size: 8,
  intermediate_size: 10,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  tie_word_embeddings: true,
  eos_token_id: 2,
};

let directory: string;
before(() => {
  directory = mkdtempSync(join(tmpdir(), 'lora-da-'));
});
after(() => rmSync(directory, { recursive: true }));

/** The tensors of a small Llama, each value different. */
function tensors(fields: Record<string, unknown> = {}): TensorData[] {
  let next = 0;
  return [...expectedTensors(decoderSpec({ ...config, ...fields }))].map(([name, shape]) => {
    const size = shape.reduce((product, n) => product * n, 1);
    return { name, shape, data: Float32Array.from({ length: size }, () => Math.sin(next++)) };
  });
}

async function folder(list: TensorData[], fields: Record<string, unknown> = {}): Promise<string> {
  const path = mkdtempSync(join(directory, 'model-'));
  writeFileSync(join(path, 'config.json'), JSON.stringify({ ...config, ...fields }));
  await writeSafetensors(join(path, 'model.safetensors'), list);
  return path;
}

/** The same in two shards; `map` may be changed before it is written. */
async function sharded(change: (map: Record<string, string>) => void = () => {}): Promise<string> {
  const path = mkdtempSync(join(directory, 'shards-'));
  writeFileSync(join(path, 'config.json'), JSON.stringify(config));
  const all = tensors();
  const map: Record<string, string> = {};
  for (const [i, part] of [all.slice(0, 7), all.slice(7)].entries()) {
    const name = `model-0000${i + 1}-of-00002.safetensors`;
    await writeSafetensors(join(path, name), part);
    for (const tensor of part) map[tensor.name] = name;
  }
  change(map);
  writeFileSync(join(path, 'model.safetensors.index.json'), JSON.stringify({ weight_map: map }));
  return path;
}

test('a folder opens with its spec, tensors and stop tokens', async () => {
  const checkpoint = await openCheckpoint(await folder(tensors()));
  assert.equal(checkpoint.tensors.length, 2 + 2 * 9);
  assert.deepEqual(checkpoint.stopIds, [2]);
  assert.match(checkpoint.fingerprint, /^[0-9a-f]{64}$/);
  const [embedding] = checkpoint.tensors;
  assert.deepEqual([embedding?.name, embedding?.shape], ['model.embed_tokens.weight', [12, 8]]);
});

test('a sharded folder gives the same tensors', async () => {
  const single = await openCheckpoint(await folder(tensors()));
  const shards = await openCheckpoint(await sharded());
  assert.deepEqual(
    shards.tensors.map(({ name, shape }) => [name, shape]),
    single.tensors.map(({ name, shape }) => [name, shape]),
  );
  assert.equal(shards.files.length, 2);
});

test('a folder of the bare decoder is understood', async () => {
  const bare = tensors().map((tensor) => ({ ...tensor, name: tensor.name.replace(/^model\./, '') }));
  const checkpoint = await openCheckpoint(await folder(bare));
  assert.ok(checkpoint.tensors.every(({ name }) => name.startsWith('model.')));
});

test('known extras are harmless', async () => {
  const extra = { name: 'model.layers.0.self_attn.rotary_emb.inv_freq', shape: [2], data: new Float32Array(2) };
  await openCheckpoint(await folder([...tensors(), extra]));
});

test('a tied head that equals the embedding is left out, one that differs is used', async () => {
  const all = tensors();
  const head = { ...all[0]!, name: 'lm_head.weight' };
  const equal = await openCheckpoint(await folder([...all, head]));
  assert.deepEqual([equal.spec.tiedHead, equal.tensors.length], [true, 20]);
  const other = { ...head, data: head.data.map((x) => x + 1) };
  const different = await openCheckpoint(await folder([...all, other]));
  assert.deepEqual([different.spec.tiedHead, different.tensors.length], [false, 21]);
});

describe('tensors that do not fit are named with what was expected', () => {
  const cases: [string, (list: TensorData[]) => TensorData[], RegExp][] = [
    [
      'missing',
      (list) => list.slice(0, -1),
      /Tensor model\.norm\.weight is missing from .*model\.safetensors, expected shape \[8\]/,
    ],
    [
      'extra',
      (list) => [...list, { name: 'model.layers.2.x', shape: [1], data: new Float32Array(1) }],
      /Tensor model\.layers\.2\.x of .* is not part of a llama model/,
    ],
    [
      'misshapen',
      (list) => list.map((t, i) => (i === 0 ? { ...t, shape: [8, 12] } : t)),
      /model\.embed_tokens\.weight of .*: expected shape \[12, 8\], found \[8, 12\]/,
    ],
  ];
  for (const [name, change, message] of cases) {
    test(name, async () => {
      const path = await folder(change(tensors()));
      await assert.rejects(openCheckpoint(path), { code: 'INVALID_TENSOR', message });
    });
  }

  test('of the wrong type', async () => {
    const path = await folder(tensors());
    const file = join(path, 'model.safetensors');
    writeFileSync(file, Buffer.from(readFileSync(file).toString('latin1').replace('"F32"', '"I32"'), 'latin1'));
    await assert.rejects(openCheckpoint(path), {
      code: 'INVALID_TENSOR',
      message: /expected F32, F16 or BF16, found I32/,
    });
  });
});

describe('an index that does not fit the shards is refused', () => {
  const cases: [string, string, (map: Record<string, string>) => void, RegExp][] = [
    [
      'a tensor in the wrong shard',
      'INVALID_TENSOR',
      (map) => {
        map['model.norm.weight'] = 'model-00001-of-00002.safetensors';
      },
      /model\.norm\.weight is missing from .*00001/,
    ],
    [
      'a tensor that the index lacks',
      'INVALID_TENSOR',
      (map) => {
        delete map['model.norm.weight'];
      },
      /model\.norm\.weight of .*00002.* is absent according to/,
    ],
    [
      'a shard that is not there',
      'FILE_NOT_FOUND',
      (map) => {
        map['model.norm.weight'] = 'other.safetensors';
      },
      /other\.safetensors/,
    ],
    [
      'a shard outside the folder',
      'INVALID_FILE',
      (map) => {
        map['model.norm.weight'] = '../x.safetensors';
      },
      /in the same folder for model\.norm\.weight/,
    ],
  ];
  for (const [name, code, change, message] of cases) {
    test(name, async () => {
      await assert.rejects(openCheckpoint(await sharded(change)), { code, message });
    });
  }
});

describe('a folder that is not a checkpoint is refused', () => {
  test('no folder', () =>
    assert.rejects(openCheckpoint(join(directory, 'none')), { code: 'FILE_NOT_FOUND', message: /none/ }));

  test('no config.json', () =>
    assert.rejects(openCheckpoint(mkdtempSync(join(directory, 'e-'))), {
      code: 'FILE_NOT_FOUND',
      message: /config\.json/,
    }));

  test('no weights', async () => {
    const path = await folder(tensors());
    rmSync(join(path, 'model.safetensors'));
    await assert.rejects(openCheckpoint(path), { code: 'FILE_NOT_FOUND', message: /expected model\.safetensors or/ });
    writeFileSync(join(path, 'pytorch_model.bin'), '');
    await assert.rejects(openCheckpoint(path), { code: 'UNSUPPORTED', message: /pytorch_model\.bin/ });
  });

  test('a config.json that is not JSON', async () => {
    const path = await folder(tensors());
    writeFileSync(join(path, 'config.json'), '{"model_type"');
    await assert.rejects(openCheckpoint(path), { code: 'INVALID_FILE', message: /config\.json: expected JSON/ });
  });

  test('a file instead of a folder', async () => {
    const path = join(await folder(tensors()), 'config.json');
    await assert.rejects(openCheckpoint(path), { code: 'INVALID_FILE', message: /expected a Hugging Face folder/ });
  });
});

test('the fingerprint follows the weights and the configuration, not the place', async () => {
  const path = await folder(tensors());
  const { fingerprint } = await openCheckpoint(path);
  const copy = join(directory, 'copy');
  cpSync(path, copy, { recursive: true });
  assert.equal((await openCheckpoint(copy)).fingerprint, fingerprint);
  const file = join(copy, 'model.safetensors');
  const bytes = readFileSync(file);
  bytes[bytes.length - 1]! ^= 1;
  writeFileSync(file, bytes);
  assert.notEqual((await openCheckpoint(copy)).fingerprint, fingerprint);
});

test('stop tokens come from generation_config.json before config.json', async () => {
  const path = await folder(tensors());
  writeFileSync(join(path, 'generation_config.json'), '{"eos_token_id": [3, 4]}');
  assert.deepEqual(await readStopIds(path), [3, 4]);
  writeFileSync(join(path, 'generation_config.json'), '{"eos_token_id": "x"}');
  await assert.rejects(readStopIds(path), {
    code: 'INVALID_CONFIG',
    message: /generation_config\.json: .* for eos_token_id/,
  });
});

test('every reference folder opens', { skip: existsSync(reference) ? false : `no ${reference}` }, async () => {
  const single = await openCheckpoint(join(reference, 'llama-tied'));
  const shards = await openCheckpoint(join(reference, 'llama-sharded'));
  const names = (checkpoint: typeof single) => checkpoint.tensors.map(({ name }) => name);
  assert.deepEqual(names(shards), names(single));
  for (const name of readdirSync(reference)) {
    if (existsSync(join(reference, name, 'config.json'))) await openCheckpoint(join(reference, name));
  }
});

describe('merging', () => {
  const module = 'model.layers.1.self_attn.q_proj';
  const merged = Float32Array.from({ length: 64 }, (_, i) => i / 3);

  test('replaces the adapted weights and nothing else, shard by shard', async () => {
    const path = await sharded();
    writeFileSync(join(path, 'tokenizer.json'), '{}');
    writeFileSync(join(path, 'pytorch_model.bin'), 'old weights');
    const out = join(directory, 'merged');
    const checkpoint = await openCheckpoint(path);
    const progress: number[] = [];
    await mergeCheckpoint(checkpoint, out, [module], async () => merged, { onProgress: (done) => progress.push(done) });
    const again = await openCheckpoint(out);
    for (const [i, source] of again.tensors.entries()) {
      const values = await readTensor(source.file, source);
      const before = checkpoint.tensors[i]!;
      const expected = source.name === `${module}.weight` ? merged : await readTensor(before.file, before);
      assert.deepEqual(values, expected, source.name);
    }
    assert.deepEqual(
      readdirSync(out).sort(),
      readdirSync(path)
        .filter((name) => name !== 'pytorch_model.bin')
        .sort(),
    );
    assert.equal(
      progress.at(-1),
      again.files.reduce((sum, file) => sum + readFileSync(file).length, 0),
    );
  });

  test('rounds to the type of the file', async () => {
    const path = await folder(tensors().map((tensor) => ({ ...tensor, dtype: 'BF16' as const })));
    const out = join(directory, 'merged-bf16');
    await mergeCheckpoint(await openCheckpoint(path), out, [module], async () => merged);
    const { file, tensors: infos } = await readSafetensorsHeader(join(out, 'model.safetensors'));
    const info = infos.get(`${module}.weight`)!;
    const bytes = readFileSync(file).subarray(info.offset, info.offset + info.bytes);
    assert.deepEqual(new Uint8Array(bytes), encodeFloats(merged, 'BF16'));
  });

  test('refuses a folder that holds something', async () => {
    const path = await folder(tensors());
    const merge = mergeCheckpoint(await openCheckpoint(path), path, [], async () => merged);
    await assert.rejects(merge, { code: 'INVALID_ARGUMENT', message: /exists already/ });
  });

  test('leaves nothing behind when it fails', async () => {
    const parent = mkdtempSync(join(directory, 'parent-'));
    const checkpoint = await openCheckpoint(await folder(tensors()));
    const nan = mergeCheckpoint(checkpoint, join(parent, 'out'), [module], async () => merged.map(() => Number.NaN));
    await assert.rejects(nan, { code: 'NON_FINITE', message: new RegExp(module) });
    const signal = AbortSignal.abort();
    const aborted = mergeCheckpoint(checkpoint, join(parent, 'out'), [module], async () => merged, { signal });
    await assert.rejects(aborted, { code: 'ABORTED' });
    assert.deepEqual(readdirSync(parent), []);
  });
});
