import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { loraScaling, readAdapterFolder, writeAdapterFolder } from '../lib/adapter_folder';
import { decoderSpec } from '../lib/families';
import { readSafetensorsHeader, readTensors, type TensorData, writeSafetensors } from '../lib/safetensors';
import { linearModules, resolveTargetModules } from '../lib/target_modules';

const reference = join(__dirname, '..', '..', 'shared', 'reference');
const spec = decoderSpec({
  model_type: 'llama',
  vocab_size: 12,
  hidden_size: 8,
  intermediate_size: 10,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  num_key_value_heads: 1,
});

let directory: string;
before(() => {
  directory = mkdtempSync(join(tmpdir(), 'lora-da-'));
});
after(() => rmSync(directory, { recursive: true }));

function factors(targets: 'all-linear' | string[] = ['q_proj', 'v_proj'], rank = 2) {
  const linears = linearModules(spec);
  let next = 0;
  const fill = (length: number) => Float32Array.from({ length }, () => Math.cos(next++));
  return resolveTargetModules(spec, targets).modules.map((module) => {
    const linear = linears.get(module)!;
    return { module, a: fill(rank * linear.in), b: fill(linear.out * rank) };
  });
}

/** A folder as lora-da writes it, with some fields of its configuration changed. */
async function folder(change: Record<string, unknown> = {}): Promise<string> {
  const path = mkdtempSync(join(directory, 'adapter-'));
  await writeAdapterFolder(path, spec, { rank: 2, alpha: 4, rslora: true, factors: factors() });
  const file = join(path, 'adapter_config.json');
  writeFileSync(file, JSON.stringify({ ...JSON.parse(readFileSync(file, 'utf8')), ...change }));
  return path;
}

/** The same with its tensors changed. */
async function withTensors(change: (tensors: TensorData[]) => TensorData[]): Promise<string> {
  const path = await folder();
  const file = join(path, 'adapter_model.safetensors');
  const infos = [...(await readSafetensorsHeader(file)).tensors.values()];
  const values = await readTensors(file, infos);
  await writeSafetensors(file, change(infos.map(({ name, shape }, i) => ({ name, shape, data: values[i]! }))));
  return path;
}

test('what is written is read', async () => {
  const path = join(directory, 'new', 'folder');
  const content = { rank: 2, alpha: 4, rslora: true, factors: factors(), baseModel: 'models/base' };
  await writeAdapterFolder(path, spec, content);
  const found = await readAdapterFolder(path, spec);
  assert.deepEqual(found.factors, content.factors);
  assert.deepEqual([found.rank, found.alpha, found.rslora, found.baseModel], [2, 4, true, 'models/base']);
  assert.equal(found.scaling, 4 / Math.sqrt(2));
  assert.deepEqual(found.suffixes, ['q_proj', 'v_proj']);
});

test("the configuration is PEFT's: explicit, sorted suffixes, and all that its reader asks for", async () => {
  const path = join(directory, 'all');
  await writeAdapterFolder(path, spec, { rank: 2, alpha: 4, rslora: false, factors: factors('all-linear') });
  const config = JSON.parse(readFileSync(join(path, 'adapter_config.json'), 'utf8'));
  assert.deepEqual(config.target_modules, [
    'down_proj',
    'gate_proj',
    'k_proj',
    'o_proj',
    'q_proj',
    'up_proj',
    'v_proj',
  ]);
  const { peft_type, task_type, r, lora_alpha, use_rslora, bias, fan_in_fan_out, inference_mode, lora_dropout } =
    config;
  assert.deepEqual(
    { peft_type, task_type, r, lora_alpha, use_rslora, bias, fan_in_fan_out, inference_mode, lora_dropout },
    {
      peft_type: 'LORA',
      task_type: 'CAUSAL_LM',
      r: 2,
      lora_alpha: 4,
      use_rslora: false,
      bias: 'none',
      fan_in_fan_out: false,
      inference_mode: true,
      lora_dropout: 0,
    },
  );
  const { tensors } = await readSafetensorsHeader(join(path, 'adapter_model.safetensors'));
  const info = tensors.get('base_model.model.model.layers.1.mlp.down_proj.lora_A.weight');
  assert.deepEqual(info?.shape, [2, 10]);
});

test('scaling is alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA', () => {
  assert.equal(loraScaling(16, 8, false), 0.5);
  assert.equal(loraScaling(16, 8, true), 2);
});

describe('target_modules may be', () => {
  const cases: [string, unknown][] = [
    ['suffixes', ['v_proj', 'q_proj']],
    ['names with their block', ['self_attn.q_proj', 'self_attn.v_proj']],
    ['suffixes of which some select nothing', ['q_proj', 'v_proj', 'query_key_value']],
    ['full names', [0, 1].flatMap((i) => ['q', 'v'].map((x) => `model.layers.${i}.self_attn.${x}_proj`))],
    ['a regular expression', '.*\\.self_attn\\.(q|v)_proj'],
  ];
  for (const [name, target_modules] of cases) {
    test(name, async () => {
      const { modules, suffixes } = await readAdapterFolder(await folder({ target_modules }), spec);
      assert.equal(modules.length, 4);
      assert.deepEqual(suffixes, ['q_proj', 'v_proj']);
    });
  }

  test('all-linear', async () => {
    const path = join(directory, 'linear');
    await writeAdapterFolder(path, spec, { rank: 2, alpha: 4, rslora: false, factors: factors('all-linear') });
    const file = join(path, 'adapter_config.json');
    writeFileSync(file, JSON.stringify({ ...JSON.parse(readFileSync(file, 'utf8')), target_modules: 'all-linear' }));
    assert.equal((await readAdapterFolder(path, spec)).modules.length, 14);
  });
});

describe('what lora-da lacks is refused by name', () => {
  const cases: [string, unknown][] = [
    ['use_dora', true],
    ['lora_bias', true],
    ['fan_in_fan_out', true],
    ['modules_to_save', ['lm_head']],
    ['rank_pattern', { q_proj: 4 }],
    ['alpha_pattern', { q_proj: 4 }],
    ['layers_to_transform', [0]],
    ['layers_to_transform', 0],
    ['layer_replication', [[0, 1]]],
    ['exclude_modules', ['q_proj']],
    ['trainable_token_indices', [1]],
    ['target_parameters', ['x']],
    ['bias', 'all'],
    ['peft_type', 'IA3'],
    ['task_type', 'SEQ_CLS'],
    ['init_lora_weights', 'pissa_niter_4'],
    ['target_modules covers lm_head', undefined],
  ];
  for (const [name, value] of cases) {
    test(`${name} ${JSON.stringify(value) ?? ''}`, async () => {
      const change = value === undefined ? { target_modules: ['q_proj', 'lm_head'] } : { [name]: value };
      const read = readAdapterFolder(await folder(change), spec);
      await assert.rejects(read, { code: 'UNSUPPORTED', message: new RegExp(`adapter_config\\.json: ${name}`) });
    });
  }
});

test('leftovers that change nothing are harmless', async () => {
  const change = {
    corda_config: { a: 1 },
    eva_config: {},
    loftq_config: {},
    init_lora_weights: 'eva',
    lora_dropout: 0.1,
    unknown: 3,
  };
  assert.equal((await readAdapterFolder(await folder(change), spec)).dropout, 0.1);
});

describe('malformed fields are named', () => {
  const cases: [string, unknown][] = [
    ['r', 0],
    ['lora_alpha', 'x'],
    ['use_rslora', 3],
    ['target_modules', []],
    ['target_modules', null],
  ];
  for (const [field, value] of cases) {
    test(`${field}: ${JSON.stringify(value)}`, async () => {
      const read = readAdapterFolder(await folder({ [field]: value }), spec);
      await assert.rejects(read, { code: 'INVALID_CONFIG', message: new RegExp(`expected .* for ${field}`) });
    });
  }

  test('targets that are not in the model', async () => {
    const read = readAdapterFolder(await folder({ target_modules: ['c_attn'] }), spec);
    await assert.rejects(read, {
      code: 'INVALID_CONFIG',
      message: /selects no module of the model; known are down_proj/,
    });
  });
});

describe('factors that do not fit are named', () => {
  const key = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight';
  const cases: [string, (list: TensorData[]) => TensorData[], RegExp][] = [
    [
      'missing',
      (list) => list.filter(({ name }) => name !== key),
      /lora_A\.weight is missing from .*expected shape \[2, 8\]/,
    ],
    ['extra', (list) => [...list, { ...list[0]!, name: key.replace('q_proj', 'k_proj') }], /k_proj.* does not belong/],
    [
      'misshapen',
      (list) => list.map((t) => (t.name === key ? { ...t, shape: [8, 2] } : t)),
      /expected shape \[2, 8\], found \[8, 2\]/,
    ],
  ];
  for (const [name, change, message] of cases) {
    test(name, async () => {
      await assert.rejects(readAdapterFolder(await withTensors(change), spec), { code: 'INVALID_TENSOR', message });
    });
  }
});

test('files that are missing or of another format are named', async () => {
  const path = await folder();
  rmSync(join(path, 'adapter_model.safetensors'));
  await assert.rejects(readAdapterFolder(path, spec), {
    code: 'FILE_NOT_FOUND',
    message: /adapter_model\.safetensors/,
  });
  writeFileSync(join(path, 'adapter_model.bin'), '');
  await assert.rejects(readAdapterFolder(path, spec), { code: 'UNSUPPORTED', message: /adapter_model\.bin/ });
  await assert.rejects(readAdapterFolder(directory, spec), { code: 'FILE_NOT_FOUND', message: /adapter_config\.json/ });
});

test('the reference adapters are read', { skip: existsSync(reference) ? false : `no ${reference}` }, async () => {
  for (const name of ['llama-tied', 'qwen2', 'qwen3', 'gemma', 'phi3', 'mistral', 'llama-rope3']) {
    const config = JSON.parse(readFileSync(join(reference, name, 'config.json'), 'utf8'));
    const adapter = await readAdapterFolder(join(reference, name, 'adapter-rslora'), decoderSpec(config));
    assert.deepEqual([adapter.rank, adapter.scaling], [4, 4], name);
    assert.equal(adapter.factors.length, 3 * (name === 'phi3' ? 4 : 7), name);
  }
});
