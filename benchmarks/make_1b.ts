/**
 * A model folder of Llama-3.2-1B's shape with random bfloat16 weights and SmolLM2's tokenizer, for memory and time at that size.
 * Tensors are made and written one after another, so that the script itself needs little memory.
 *
 * tsx benchmarks/make_1b.ts [--out .peers/llama-1b-random] [--tokenizer DIR] [--seed 1]
 */
import { copyFileSync, existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { expectedTensors } from '../lib/checkpoint';
import { decoderSpec } from '../lib/families';
import { writeAtomically } from '../lib/files';
import { encodeFloats } from '../lib/float_bits';
import { Random } from '../lib/random';
import { encodeHeader, writeAll } from '../lib/safetensors';
import { BenchmarkError, modelFolder, positiveInteger, root, runMain } from './harness';

/** config.json of meta-llama/Llama-3.2-1B. */
const config = {
  architectures: ['LlamaForCausalLM'],
  attention_bias: false,
  attention_dropout: 0,
  bos_token_id: 1,
  eos_token_id: 2,
  head_dim: 64,
  hidden_act: 'silu',
  hidden_size: 2048,
  initializer_range: 0.02,
  intermediate_size: 8192,
  max_position_embeddings: 131072,
  mlp_bias: false,
  model_type: 'llama',
  num_attention_heads: 32,
  num_hidden_layers: 16,
  num_key_value_heads: 8,
  rms_norm_eps: 1e-5,
  rope_scaling: {
    factor: 32,
    high_freq_factor: 4,
    low_freq_factor: 1,
    original_max_position_embeddings: 8192,
    rope_type: 'llama3',
  },
  rope_theta: 500000,
  tie_word_embeddings: true,
  torch_dtype: 'bfloat16',
  vocab_size: 128256,
};

const tokenizerFiles = ['tokenizer.json', 'tokenizer_config.json', 'generation_config.json'];

const chunkValues = 1 << 22;

/** Approximately normal (a sum of four uniform numbers), of the deviation that the configuration starts weights with; norms are 1. */
function fill(values: Float32Array, isNorm: boolean, random: Random): void {
  const scale = config.initializer_range * Math.sqrt(3);
  for (let i = 0; i < values.length; i++) {
    const [one, other] = [random.next(), random.next()];
    const sum = (one >>> 16) + (one & 0xffff) + (other >>> 16) + (other & 0xffff);
    values[i] = isNorm ? 1 : (sum / 0xffff - 2) * scale;
  }
}

async function writeWeights(file: string, tensors: Map<string, number[]>, seed: number): Promise<void> {
  const random = new Random(seed);
  const list = [...tensors].map(([name, shape]) => ({ name, shape, dtype: 'BF16' as const }));
  await writeAtomically(file, async (handle) => {
    await writeAll(handle, encodeHeader(list, { format: 'pt' }));
    for (const { shape } of list) {
      const count = shape.reduce((product, size) => product * size, 1);
      for (let first = 0; first < count; first += chunkValues) {
        const values = new Float32Array(Math.min(chunkValues, count - first));
        fill(values, shape.length === 1, random);
        await writeAll(handle, encodeFloats(values, 'BF16'));
      }
    }
  });
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      out: { type: 'string', default: join(root, '.peers/llama-1b-random') },
      tokenizer: { type: 'string' },
      seed: { type: 'string', default: '1' },
    },
  });
  const { out } = values;
  const tokenizer = modelFolder(values.tokenizer);
  if (!tokenizer)
    throw new BenchmarkError('Expected a tokenizer: run ../shared/tools/smollm2.sh, or give --tokenizer DIR', 1);
  mkdirSync(out, { recursive: true });
  for (const name of tokenizerFiles) {
    if (existsSync(join(tokenizer, name))) copyFileSync(join(tokenizer, name), join(out, name));
  }
  writeFileSync(join(out, 'config.json'), `${JSON.stringify(config, null, 2)}\n`);
  const tensors = expectedTensors(decoderSpec(config));
  await writeWeights(join(out, 'model.safetensors'), tensors, positiveInteger('seed', values.seed));
  console.log(out);
}

runMain(main);
