import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { decoderSpec, knownFamilies } from '../lib/families';
import { linearModules, resolveTargetModules, suffixesOf } from '../lib/target_modules';

const reference = join(__dirname, '..', '..', 'shared', 'reference');

const sizes = {
  vocab_size: 100,
  hidden_size: 64,
  intermediate_size: 96,
  num_hidden_layers: 3,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  max_position_embeddings: 256,
};

function spec(family: string, fields: Record<string, unknown> = {}) {
  return decoderSpec({ model_type: family, ...sizes, ...fields }, 'dir/config.json');
}

function refusal(family: string, fields: Record<string, unknown>): { code: string; message: string } {
  try {
    spec(family, fields);
  } catch (error) {
    return error as { code: string; message: string };
  }
  assert.fail('it was not refused');
}

describe('rotary tables are those of transformers', () => {
  const cases: Record<string, { config: Record<string, unknown>; inverseFrequencies: number[]; scale: number }> =
    JSON.parse(readFileSync(join(__dirname, 'fixtures', 'rope', 'expected.json'), 'utf8'));
  for (const [name, { config, inverseFrequencies, scale }] of Object.entries(cases)) {
    test(name, () => {
      const found = decoderSpec(config);
      const expected = inverseFrequencies;
      assert.equal(found.inverseFrequencies.length, expected.length);
      found.inverseFrequencies.forEach((value, i) => {
        assert.ok(Math.abs(value / expected[i]! - 1) < 2e-6, `${i}: ${value} is not ${expected[i]}`);
      });
      assert.ok(Math.abs(found.rotaryScale - scale) < 1e-12);
    });
  }
});

test('the rotary tables of longrope and dynamic hold up to the pretrained length', () => {
  const factors = { short_factor: new Array(8).fill(1), long_factor: new Array(8).fill(2) };
  const longrope = spec('phi3', {
    max_position_embeddings: 1024,
    original_max_position_embeddings: 128,
    rope_scaling: { type: 'longrope', ...factors },
  });
  assert.equal(longrope.maxPositions, 128);
  assert.equal(spec('llama', { rope_scaling: { type: 'dynamic', factor: 2 } }).maxPositions, 256);
});

test('the families differ as data', () => {
  const llama = spec('llama', { attention_bias: true, mlp_bias: true });
  assert.deepEqual(
    [...llama.attentionInputs, llama.attentionOutput, ...llama.mlpInputs, llama.mlpOutput].map(({ bias }) => bias),
    new Array(7).fill(true),
  );
  const qwen2 = spec('qwen2');
  assert.deepEqual(
    qwen2.attentionInputs.map(({ bias }) => bias),
    [true, true, true],
  );
  assert.equal(qwen2.attentionOutput.bias, false);
  const qwen3 = spec('qwen3');
  assert.deepEqual([qwen3.headNorm, qwen3.headDim], [true, 128]);
  const gemma = spec('gemma', { head_dim: 16 });
  assert.deepEqual(
    [gemma.normOffset, gemma.embeddingScale, gemma.tiedHead, gemma.activation],
    [1, 8, true, 'gelu_tanh'],
  );
  const phi3 = spec('phi3');
  assert.deepEqual(
    [...phi3.attentionInputs, ...phi3.mlpInputs],
    [
      { name: 'self_attn.qkv_proj', out: 128, in: 64, bias: false },
      { name: 'mlp.gate_up_proj', out: 192, in: 64, bias: false },
    ],
  );
  assert.equal(spec('llama').tiedHead, false);
});

test('absent fields take the defaults of transformers', () => {
  const { num_key_value_heads: _, max_position_embeddings: __, ...bare } = sizes;
  const llama = decoderSpec({ model_type: 'llama', ...bare });
  assert.deepEqual([llama.kvHeads, llama.maxPositions, llama.normEpsilon, llama.headDim], [4, 2048, 1e-6, 16]);
  const mistral = decoderSpec({ model_type: 'mistral', ...bare, num_attention_heads: 16, head_dim: null });
  assert.deepEqual([mistral.kvHeads, mistral.windows, mistral.headDim], [8, [4096, 4096, 4096], 4]);
  assert.equal(decoderSpec({ model_type: 'mistral', ...bare, num_key_value_heads: null }).kvHeads, 4);
});

test("Gemma's first releases say gelu and mean its tanh approximation", () => {
  assert.equal(spec('gemma', { hidden_act: 'gelu', head_dim: 16 }).activation, 'gelu_tanh');
  assert.equal(spec('llama', { hidden_act: 'gelu' }).activation, 'gelu');
});

test('sliding windows per layer', () => {
  assert.deepEqual(spec('mistral', { sliding_window: 8 }).windows, [8, 8, 8]);
  assert.deepEqual(spec('mistral', { sliding_window: null }).windows, [0, 0, 0]);
  assert.deepEqual(spec('phi3', { sliding_window: 32 }).windows, [32, 32, 32]);
  assert.deepEqual(spec('llama', { sliding_window: 32 }).windows, [0, 0, 0]);
  const window = { sliding_window: 16, max_window_layers: 1 };
  assert.deepEqual(spec('qwen2', { use_sliding_window: false, ...window }).windows, [0, 0, 0]);
  assert.deepEqual(spec('qwen2', { use_sliding_window: true, ...window }).windows, [0, 16, 16]);
  const layer_types = ['sliding_attention', 'full_attention', 'full_attention'];
  assert.deepEqual(spec('qwen3', { use_sliding_window: true, ...window, layer_types }).windows, [16, 0, 0]);
  assert.equal(refusal('qwen3', { layer_types }).code, 'INVALID_CONFIG');
});

test('an unknown family is refused by name, with the known ones', () => {
  const { code, message } = refusal('mamba', {});
  assert.equal(code, 'UNSUPPORTED');
  assert.match(message, /^dir\/config\.json: model_type "mamba" is not supported; known are llama, mistral, qwen2/);
  assert.equal(refusal('constructor', {}).code, 'UNSUPPORTED');
});

describe('what the core does not compute is refused by name', () => {
  const cases: [string, string, Record<string, unknown>][] = [
    ['quantization_config', 'llama', { quantization_config: { quant_method: 'gptq' } }],
    ['num_local_experts', 'mistral', { num_local_experts: 8 }],
    ['attn_logit_softcapping', 'gemma', { attn_logit_softcapping: 50, head_dim: 16 }],
    ['attention_dropout', 'llama', { attention_dropout: 0.1 }],
    ['rope_interleaved', 'llama', { rope_interleaved: true }],
    ['hidden_act', 'llama', { hidden_act: 'relu' }],
    ['rope type "cubic"', 'llama', { rope_scaling: { rope_type: 'cubic' } }],
    ['partial_rotary_factor', 'llama', { partial_rotary_factor: 0.5 }],
    ['layer type "linear_attention"', 'qwen3', { layer_types: new Array(3).fill('linear_attention') }],
    ['use_bidirectional_attention', 'gemma', { use_bidirectional_attention: true, head_dim: 16 }],
  ];
  for (const [name, family, fields] of cases) {
    test(name, () => {
      const { code, message } = refusal(family, fields);
      assert.equal(code, 'UNSUPPORTED');
      assert.ok(message.includes(name), message);
      assert.ok(message.includes('dir/config.json'), message);
    });
  }
});

test('fields that change nothing are harmless', () => {
  const fields = { quantization_config: null, num_local_experts: 1, attention_dropout: 0.0, rope_interleaved: false };
  assert.equal(spec('llama', { ...fields, query_pre_attn_scalar: 256, torch_dtype: 'bfloat16' }).family, 'llama');
});

describe('malformed fields are named', () => {
  const cases: [string, Record<string, unknown>][] = [
    ['hidden_size', { hidden_size: 0 }],
    ['hidden_size', { hidden_size: '64' }],
    ['num_hidden_layers', { num_hidden_layers: undefined }],
    ['num_hidden_layers', { num_hidden_layers: 2_000_000_000 }],
    ['num_key_value_heads', { num_key_value_heads: 3 }],
    ['head_dim', { head_dim: 7 }],
    ['rms_norm_eps', { rms_norm_eps: -1 }],
    ['tie_word_embeddings', { tie_word_embeddings: 'yes' }],
    ['rope_theta', { rope_theta: 'big' }],
    ['factor', { rope_scaling: { type: 'linear' } }],
    ['vocab_size', { vocab_size: 1.5 }],
  ];
  for (const [field, fields] of cases) {
    test(`${field}: ${JSON.stringify(fields)}`, () => {
      const { code, message } = refusal('llama', fields);
      assert.equal(code, 'INVALID_CONFIG');
      assert.match(message, new RegExp(`dir/config.json: expected .* for ${field}`));
    });
  }
});

test('every reference configuration is read', { skip: existsSync(reference) ? false : `no ${reference}` }, () => {
  for (const name of readdirSync(reference)) {
    const file = join(reference, name, 'config.json');
    if (!existsSync(file)) continue;
    const found = decoderSpec(JSON.parse(readFileSync(file, 'utf8')), file);
    assert.ok(knownFamilies.includes(found.family));
    assert.equal(found.layers, 3);
  }
});

describe('target modules', () => {
  const llama = spec('llama');

  test('all-linear is every linear module of the layers, in their order, without the head', () => {
    const { modules, suffixes } = resolveTargetModules(llama, 'all-linear');
    assert.equal(modules.length, 21);
    assert.deepEqual(modules.slice(0, 3), [
      'model.layers.0.self_attn.q_proj',
      'model.layers.0.self_attn.k_proj',
      'model.layers.0.self_attn.v_proj',
    ]);
    assert.deepEqual(suffixes, ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']);
  });

  test('names select by suffix or in full', () => {
    const { modules, suffixes } = resolveTargetModules(llama, ['v_proj', 'model.layers.1.self_attn.q_proj']);
    assert.deepEqual(modules, [
      'model.layers.0.self_attn.v_proj',
      'model.layers.1.self_attn.q_proj',
      'model.layers.1.self_attn.v_proj',
      'model.layers.2.self_attn.v_proj',
    ]);
    assert.deepEqual(suffixes, ['model.layers.1.self_attn.q_proj', 'v_proj']);
    assert.deepEqual(suffixesOf(llama, modules), suffixes);
  });

  test('an unknown name is refused with the known ones', () => {
    assert.throws(() => resolveTargetModules(llama, ['q_proj', 'qkv_proj']), {
      code: 'INVALID_ARGUMENT',
      message: /"qkv_proj" is not in the model; known are down_proj, gate_proj, .*all-linear/,
    });
    assert.throws(() => resolveTargetModules(llama, []), { code: 'INVALID_ARGUMENT' });
  });

  test("a part of a name is not a suffix, as in PEFT's rule", () => {
    assert.throws(() => resolveTargetModules(llama, ['proj']), { code: 'INVALID_ARGUMENT' });
    assert.equal(linearModules(llama).get('model.layers.2.mlp.down_proj')?.in, 96);
  });
});
