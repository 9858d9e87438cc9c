import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after } from 'node:test';
import { expectedTensors } from '../lib/checkpoint';
import { decoderSpec } from '../lib/families';
import { writeSafetensors } from '../lib/safetensors';

/** A temporary folder that goes when the tests of the file are done. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'lora-da-'));
  after(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

export const tinyConfig = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_size: 16,
  intermediate_size: 24,
  num_hidden_layers: 2,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  vocab_size: 64,
  max_position_embeddings: 128,
  rms_norm_eps: 1e-6,
  rope_theta: 10000,
  tie_word_embeddings: true,
  eos_token_id: 2,
  hidden_act: 'silu',
};

/** A Llama folder of a few kilobytes, without a tokenizer. */
export async function writeTinyModel(folder: string): Promise<string> {
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'config.json'), JSON.stringify(tinyConfig));
  const tensors = [...expectedTensors(decoderSpec(tinyConfig))].map(([name, shape], n) => {
    const data = Float32Array.from(
      { length: shape.reduce((a, b) => a * b, 1) },
      (_, i) => Math.sin(i * 0.37 + n) * 0.1,
    );
    return { name, shape, data };
  });
  await writeSafetensors(join(folder, 'model.safetensors'), tensors);
  return folder;
}

/** Rows of input_ids and labels, 5 to 12 tokens each. */
export function writeTinyData(path: string, rows = 40, salt = 0): string {
  const lines = Array.from({ length: rows }, (_, row) => {
    const ids = Array.from({ length: 5 + (row % 8) }, (_, i) => (row * 7 + i * 13 + salt) % 64);
    return JSON.stringify({ input_ids: ids, labels: ids.map((id, i) => (i < 2 ? -100 : id)) });
  });
  writeFileSync(path, `${lines.join('\n')}\n`);
  return path;
}
