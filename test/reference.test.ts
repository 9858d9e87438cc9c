/**
 * Parity with ../shared/reference: values that transformers, PEFT and an independent float64 implementation of LoRA-DA gave.
 * Tolerances are those of the design: logits and losses 1e-4 relative, gradients 1e-4 of their norm, B·A 1e-3 of its norm, row spaces
 * 1e-3 rad where the eigenvalue gap permits, trajectories 1e-4 (loss), 1e-3 (gradient norm), 2e-3 (factors).
 */
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import type { NativeModel } from '../lib/native';
import { matrixProduct, relativeError, rowSpaceAngle } from './support/numbers';
import { allModules, loadReference, type Reference, referenceRoot } from './support/reference';

const families = ['llama-tied', 'llama-rope3', 'mistral', 'qwen2', 'qwen3', 'gemma', 'phi3'];
const folders = [...families, 'llama-outliers'];

for (const name of folders) {
  const directory = join(referenceRoot, name);
  describe(`reference ${name}`, { skip: existsSync(directory) ? false : 'the reference folder is not here' }, () => {
    const reference: Promise<Reference> = existsSync(directory) ? loadReference(directory) : new Promise(() => {});
    after(async () => (await reference).model.dispose());

    test('losses are those of transformers', async () => {
      const { model, rows, expected, batch } = await reference;
      const { losses, labelTokens } = await model.evaluate(batch(rows));
      assert.deepEqual([...labelTokens], expected.labelTokens);
      for (const [i, loss] of losses.entries())
        assert.ok(Math.abs(loss / expected.loss[i]! - 1) < 1e-4, `sequence ${i}: ${loss}`);
    });

    test('logits are those of transformers, with all sequences in one packed batch', async () => {
      const { model, spec, rows, tensors, batch } = await reference;
      const logits = await model.logits(batch(rows));
      let first = 0;
      for (const [i, row] of rows.entries()) {
        const count = row.input_ids.length * spec.vocabSize;
        const error = relativeError(logits.subarray(first, first + count), tensors.get(`logits.${i}`));
        assert.ok(error < 1e-4, `sequence ${i}: ${error}`);
        first += count;
      }
    });

    test('greedy continuations are those of transformers', async () => {
      const { model, expected } = await reference;
      for (const { prompt, continuation } of expected.greedy) {
        const ids = await model.generate(
          {
            inputIds: Int32Array.from(prompt),
            maxNewTokens: 12,
            temperature: 0,
            topP: 1,
            seed: 0,
            stopIds: new Int32Array(),
          },
          () => {},
        );
        assert.deepEqual([...ids], continuation);
      }
    });

    for (const mask of ['attention', 'labels'] as const) {
      test(`gradients, input moments and output factors are exact over ${mask} tokens`, async () => {
        const { model, rows, tensors, batch } = await reference;
        for (const found of await model.collect([batch(rows.slice(0, 7)), batch(rows.slice(7))], mask)) {
          const errors = {
            gradient: relativeError(found.gradient, tensors.get(`grad.${found.module}.weight`)),
            inputMoment: relativeError(found.inputMoment, tensors.get(`Z.${mask}.${found.module}`)),
            outputFactor: relativeError(found.outputFactor, tensors.get(`ydiag.${mask}.${found.module}`)),
          };
          for (const [what, error] of Object.entries(errors))
            assert.ok(error < 1e-4, `${found.module} ${what}: ${error}`);
        }
      });
    }

    const plans = ['sample-major', 'layer-major'] as const;
    for (const plan of plans)
      test(`LoRA-DA starts are those of the float64 implementation (${plan})`, async () => {
        const { model, spec, rows, expected, tensors, batch } = await reference;
        const modules = allModules(spec);
        for (const [label, options] of Object.entries(expected.loraDa)) {
          await model.addLora({ rank: options.rank, scaling: 8 / Math.sqrt(options.rank), modules });
          const damping = options.damping ?? 1e-6;
          const { modules: reports, collection } = await model.initialize(
            [batch(rows.slice(0, 9)), batch(rows.slice(9))],
            {
              method: 'lora-da',
              seed: 1,
              tokenMask: options.tokenMask,
              population: options.population,
              varianceWeight: options.variance_weight,
              biasWeight: options.bias_weight ?? 1,
              gamma: options.gamma,
              damping,
              outputDamping: damping,
              normalizeDelta: options.normalize_delta ?? true,
              plan,
              memoryBudget: 0,
            },
            () => {},
          );
          assert.deepEqual(
            reports.map((report) => report.module),
            modules,
          );
          assert.equal(collection!.plan, plan);
          for (const { module, a, b } of await model.readFactors()) {
            const facts = options.modules[module]!;
            const expectedA = tensors.get(`lora-da.${label}.${module}.lora_A`);
            const expectedB = tensors.get(`lora-da.${label}.${module}.lora_B`);
            // The harsh folder says how far float32 statistics alone move the result; five times that is allowed where it is more than 1e-3.
            const productLimit = Math.max(1e-3, 5 * (facts.float32ProductError ?? 0));
            const angleLimit = Math.max(1e-3, 5 * (facts.float32Angle ?? 0));
            const product = relativeError(
              matrixProduct(b, a, options.rank),
              matrixProduct(expectedB, expectedA, options.rank),
            );
            assert.ok(product < productLimit, `${label} ${module}: B·A is off by ${product}`);
            if (facts.relativeGap < 1e-3 && facts.float32Angle === undefined) continue;
            const angle = rowSpaceAngle(a, expectedA, options.rank);
            assert.ok(angle < angleLimit, `${label} ${module}: the row space is turned by ${angle}`);
          }
        }
      });

    for (const label of ['rslora', 'plain-decay'] as const) {
      // With outliers, float32 itself diverges: an error of 1e-7 in the first step grows about fivefold a step.
      const skip = name === 'llama-outliers' ? 'chaotic in float32' : false;
      test(`twelve AdamW steps follow PEFT (${label})`, { skip }, async () => {
        const { model, spec, rows, expected, tensors, batch, startFactors } = await reference;
        const options = expected.trajectories[label]!;
        await startFactors(model, label, options);
        for (const [i, step] of options.steps.entries()) {
          const pair = [rows[(2 * i) % rows.length]!, rows[(2 * i + 1) % rows.length]!];
          // One batch or two micro-batches, kept or recomputed activations: the step is the same.
          const batches = i % 2 ? [batch(pair)] : pair.map((row) => batch([row]));
          const result = await trainStep(
            model,
            batches,
            step.learningRate,
            options.weightDecay,
            i + 1,
            i % 3 ? 'none' : 'layer',
          );
          assert.ok(Math.abs(result.loss / step.loss - 1) < 1e-4, `step ${i + 1}: loss ${result.loss}`);
          assert.ok(
            Math.abs(result.gradNorm / step.gradNorm - 1) < 1e-3,
            `step ${i + 1}: gradient norm ${result.gradNorm}`,
          );
        }
        for (const { module, a, b } of await model.readFactors()) {
          for (const [factor, values] of [
            ['lora_A', a],
            ['lora_B', b],
          ] as const) {
            const error = relativeError(
              values,
              tensors.get(`trajectory.${label}.base_model.model.${module}.${factor}.weight`),
            );
            assert.ok(error < 2e-3, `${module} ${factor}: ${error}`);
          }
        }
        assert.equal((await model.readFactors()).length, allModules(spec).length);
      });
    }
  });
}

function trainStep(
  model: NativeModel,
  batches: Parameters<NativeModel['trainStep']>[0],
  learningRate: number,
  weightDecay: number,
  step: number,
  recompute: 'none' | 'layer',
) {
  return model.trainStep(batches, {
    learningRate,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weightDecay,
    maxGradNorm: 1,
    step,
    recompute,
  });
}

describe('the same weights in other files', () => {
  for (const [name, tolerance] of [
    ['llama-sharded', 1e-4],
    ['llama-bf16', 2e-2], // the weights themselves are rounded
  ] as const) {
    const directory = join(referenceRoot, name);
    test(`${name} gives the losses of llama-tied`, {
      skip: existsSync(directory) ? false : 'the reference folder is not here',
    }, async () => {
      const { model, rows, expected, batch } = await loadReference(directory, join(referenceRoot, 'llama-tied'));
      const { losses } = await model.evaluate(batch(rows));
      for (const [i, loss] of losses.entries())
        assert.ok(Math.abs(loss / expected.loss[i]! - 1) < tolerance, `sequence ${i}: ${loss}`);
      await model.dispose();
    });
  }
});
