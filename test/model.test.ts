/** The project's own checkpoint against transformers (values: scripts/fixtures/model_cases.py). Runs where no reference folder is at hand. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { openCheckpoint } from '../lib/checkpoint';
import { type Dtype, native } from '../lib/native';
import { testDevice } from './support/device';
import { batchOf, type Row } from './support/reference';

interface Expected {
  rows: Row[];
  losses: number[];
  greedy: { prompt: number[]; continuation: number[] }[];
}

const expected = JSON.parse(readFileSync(join(__dirname, 'fixtures/model/tiny-llama.json'), 'utf8')) as Expected;

async function load(dtype: Dtype, copyBudget = -1) {
  const { spec, tensors } = await openCheckpoint(join(__dirname, 'fixtures/tiny-llama'));
  return native().loadModel({ spec, tensors, dtype, device: testDevice, threads: 2, copyBudget }, () => {});
}

for (const [name, dtype, copyBudget, tolerance] of [
  ['float32', 'float32', -1, 1e-4],
  ['float32 without packed weights', 'float32', 0, 1e-4],
  ['bfloat16', 'bfloat16', -1, 1e-2],
] as const) {
  test(`losses are those of transformers in ${name}`, async () => {
    const model = await load(dtype, copyBudget);
    const { losses } = await model.evaluate(batchOf(expected.rows));
    for (const [i, loss] of losses.entries())
      assert.ok(
        Math.abs(loss / expected.losses[i]! - 1) < tolerance,
        `sequence ${i}: ${loss}, expected ${expected.losses[i]}`,
      );
    await model.dispose();
  });
}

test('greedy continuations are those of transformers', async () => {
  const model = await load('float32');
  for (const { prompt, continuation } of expected.greedy) {
    const options = {
      inputIds: Int32Array.from(prompt),
      maxNewTokens: 12,
      temperature: 0,
      topP: 1,
      seed: 0,
      stopIds: new Int32Array(),
    };
    assert.deepEqual([...(await model.generate(options, () => {}))], continuation);
  }
  await model.dispose();
});
