import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { flagOf } from '../lib/commands/flags';
import { initializationSchema, loraSchema, parseOptions, resolveTrainConfig, trainingSchema } from '../lib/config';
import { temporaryFolder } from './tiny_folder';

const needed = { model: 'm', data: 'd', out: 'o' };
const folder = temporaryFolder();

function configFile(content: unknown): string {
  const file = join(folder, `config-${Math.random()}.json`);
  writeFileSync(file, typeof content === 'string' ? content : JSON.stringify(content));
  return file;
}

test('the defaults of train are those of the design', async () => {
  const { config } = await resolveTrainConfig(needed);
  assert.deepEqual(
    [config.rank, config.alpha, config.rslora, config.targetModules, config.learningRate, config.scheduler],
    [8, 16, true, 'all-linear', 2e-4, 'cosine'],
  );
  assert.deepEqual(
    [config.weightDecay, config.maxGradNorm, config.batchSize, config.gradAccum, config.maxLength, config.seed],
    [0, 1, 8, 1, 1024, 42],
  );
  assert.deepEqual([config.dtype, config.device, config.threads], ['auto', 'auto', 0]);
});

test('flags win over the configuration file', async () => {
  const file = configFile({ rank: 4, learningRate: 1e-3 });
  const { config } = await resolveTrainConfig({ ...needed, rank: 16, alpha: undefined }, file);
  assert.deepEqual([config.rank, config.learningRate, config.alpha], [16, 1e-3, 16]);
});

test('a flag replaces its alternative from the file', async () => {
  const file = configFile({ epochs: 3, warmupRatio: 0.1 });
  const { config } = await resolveTrainConfig({ ...needed, maxSteps: 10, warmupSteps: 2 }, file);
  assert.deepEqual(
    [config.epochs, config.maxSteps, config.warmupRatio, config.warmupSteps],
    [undefined, 10, undefined, 2],
  );
});

test('lr in the file means learningRate', async () => {
  const { config } = await resolveTrainConfig(needed, configFile({ lr: 0.5 }));
  assert.equal(config.learningRate, 0.5);
});

const refused: [name: string, file: unknown, code: string, message: RegExp][] = [
  ['an unknown key', { lernRate: 1 }, 'INVALID_CONFIG', /Unknown option lernRate in .*json/],
  [
    'a value out of range',
    { batchSize: 0 },
    'INVALID_CONFIG',
    /Expected positive integer for batchSize but received 0 of type number in/,
  ],
  [
    'a value of the wrong type',
    { shuffle: 'yes' },
    'INVALID_CONFIG',
    /Expected boolean for shuffle but received "yes" of type string/,
  ],
  ['epochs and maxSteps together', { epochs: 1, maxSteps: 1 }, 'INVALID_CONFIG', /either epochs or maxSteps/],
  ['a file that is no object', [1], 'INVALID_FILE', /JSON object/],
  ['a file that is no JSON', '{', 'INVALID_FILE', /JSON/],
];
for (const [name, content, code, message] of refused) {
  test(`a configuration file with ${name} is refused by name`, async () => {
    await assert.rejects(resolveTrainConfig(needed, configFile(content)), { code, message });
  });
}

test('a configuration file that does not exist is refused by name', async () => {
  await assert.rejects(resolveTrainConfig(needed, '/nowhere/run.json'), {
    code: 'FILE_NOT_FOUND',
    message: /nowhere\/run.json/,
  });
});

test('errors of the command line name the flag', async () => {
  await assert.rejects(resolveTrainConfig({ ...needed, gradAccum: 'x' }, undefined, flagOf), {
    code: 'INVALID_ARGUMENT',
    message: 'Expected positive integer for --grad-accum but received "x" of type string',
  });
  await assert.rejects(resolveTrainConfig({ ...needed, learningRate: -1 }, undefined, flagOf), {
    message: /for --lr but received -1/,
  });
  await assert.rejects(resolveTrainConfig({ data: 'd', out: 'o' }, undefined, flagOf), {
    message: 'Expected path of a Hugging Face model folder for --model but received nothing',
  });
});

test('options out of range are refused in one form', () => {
  const cases: [() => unknown, string][] = [
    [() => parseOptions(loraSchema, { rank: 0 }), 'Expected positive integer for rank but received 0 of type number'],
    [
      () => parseOptions(loraSchema, { rank: 2.5 }),
      'Expected positive integer for rank but received 2.5 of type number',
    ],
    [
      () => parseOptions(loraSchema, { alpha: Number.NaN }),
      'Expected number greater than 0 for alpha but received NaN of type number',
    ],
    [
      () => parseOptions(loraSchema, { targetModules: [] }),
      "Expected 'all-linear' or a list of module names for targetModules but received [] of type array",
    ],
    [
      () => parseOptions(initializationSchema, { gamma: 0 }),
      'Expected number greater than 0 for gamma but received 0 of type number',
    ],
    [
      () => parseOptions(trainingSchema, { scheduler: 'cos' }),
      'Expected one of cosine, linear, constant for scheduler but received "cos" of type string',
    ],
    [
      () => parseOptions(trainingSchema, { warmupRatio: 2 }),
      'Expected number of 0 to 1 for warmupRatio but received 2 of type number',
    ],
    [() => parseOptions(trainingSchema, { foo: 2 }), 'Unknown option foo'],
    [() => parseOptions(trainingSchema, null), 'Expected an object of options but received null of type object'],
  ];
  for (const [call, message] of cases) assert.throws(call, { code: 'INVALID_ARGUMENT', message });
});
