import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { jsonOf, runCli, startCli } from './run_cli';
import { temporaryFolder, writeTinyData, writeTinyModel } from './tiny_folder';

const folder = temporaryFolder();
const model = join(folder, 'model');
const data = join(folder, 'train.jsonl');
const adapter = join(folder, 'adapter');
const inFolder = (name: string) => join(folder, name);

before(async () => {
  await writeTinyModel(model);
  writeTinyData(data, 20);
  const { code, stderr } = await runCli(['init', '--model', model, '--data', data, '--out', adapter, '--rank', '2']);
  assert.equal(code, 0, stderr);
});

const oneLine = (stderr: string) => assert.match(stderr, /^lora-da: [^\n]+\n$/);

test('--help lists the commands and their flags', async () => {
  const { code, stdout } = await runCli(['--help']);
  assert.equal(code, 0);
  for (const command of ['train', 'init', 'eval', 'generate', 'merge', 'info'])
    assert.match(stdout, new RegExp(`  ${command} `));
  const train = await runCli(['train', '--help']);
  assert.equal(train.code, 0);
  for (const flag of ['--grad-accum', '--no-rslora', '--early-stop', '--dry-run', '--json', '--debug'])
    assert.ok(train.stdout.includes(flag), flag);
});

const wrongUsage: [name: string, args: string[], message: RegExp][] = [
  ['an unknown command', ['fly'], /unknown command 'fly'/],
  ['an unknown option', ['train', '--fly', '1'], /unknown option '--fly'/],
  ['an argument too many', ['info', 'more'], /too many arguments/],
  ['a value that is missing', ['train', '--model'], /argument missing/],
  [
    'a model that is missing',
    ['eval', '--data', 'x'],
    /path of a Hugging Face model folder for --model but received nothing/,
  ],
  [
    'a number out of range',
    ['train', '--model', 'm', '--data', 'd', '--out', 'o', '--rank', '0'],
    /positive integer for --rank but received 0/,
  ],
  [
    'a word for a number',
    ['train', '--model', 'm', '--data', 'd', '--out', 'o', '--lr', 'fast'],
    /for --lr but received "fast"/,
  ],
  ['an unknown device', ['eval', '--model', 'm', '--data', 'd', '--device', 'tpu'], /for --device but received "tpu"/],
  [
    'both lengths of a run',
    ['train', '--model', 'm', '--data', 'd', '--out', 'o', '--epochs', '1', '--max-steps', '1'],
    /either --epochs or --max-steps/,
  ],
  [
    'an initialization beside an adapter',
    ['train', '--model', 'm', '--data', 'd', '--out', 'o', '--adapter', 'a', '--init', 'lora-da'],
    /none for --init/,
  ],
  [
    'an unknown initialization',
    ['init', '--model', 'm', '--data', 'd', '--out', 'o', '--init', 'lora-xy'],
    /"lora-xy"/,
  ],
  [
    'an unknown plan of the collection',
    ['init', '--model', 'm', '--data', 'd', '--out', 'o', '--plan', 'module-major'],
    /one of auto, sample-major, layer-major for --plan but received "module-major"/,
  ],
  [
    'a memory budget that is no size',
    ['train', '--model', 'm', '--data', 'd', '--out', 'o', '--memory-budget', '0'],
    /number greater than 0 for --memory-budget but received "0"/,
  ],
  [
    'no text to go on from',
    ['generate', '--model', 'm'],
    /--prompt, --messages, --raw and --input-ids but received none/,
  ],
  [
    'two texts to go on from',
    ['generate', '--model', 'm', '--raw', 'a', '--prompt', 'b'],
    /received --prompt and --raw/,
  ],
];
for (const [name, args, message] of wrongUsage) {
  test(`${name} is wrong usage: exit 2 and one line`, async () => {
    const { code, stdout, stderr } = await runCli(args);
    assert.equal(code, 2, stderr);
    assert.match(stderr, message);
    oneLine(stderr);
    assert.equal(stdout, '');
  });
}

test('a failure is exit 1 and one line; the stack comes with --debug only', async () => {
  const args = ['eval', '--model', inFolder('nowhere'), '--data', data];
  const plain = await runCli(args);
  assert.equal(plain.code, 1);
  oneLine(plain.stderr);
  assert.match(plain.stderr, /nowhere/);
  const debug = await runCli([...args, '--debug']);
  assert.equal(debug.code, 1);
  assert.match(debug.stderr, /\n {4}at /);
});

test('train writes a run folder and ends with the path of the report', async () => {
  const out = inFolder('run');
  const { code, stdout, stderr } = await runCli([
    'train',
    '--model',
    model,
    '--data',
    data,
    '--out',
    out,
    '--rank',
    '2',
  ]);
  assert.equal(code, 0, stderr);
  assert.match(stdout, /Initialization: lora-da: 14 modules from 20 rows/);
  assert.equal(stdout.trimEnd().split('\n').at(-1), `Report: ${join(out, 'report.html')}`);
  const config = JSON.parse(readFileSync(join(out, 'config.json'), 'utf8'));
  assert.deepEqual(
    [config.init, config.rank, config.epochs, config.population, config.outputDamping],
    ['lora-da', 2, 1, 20, 1e-6],
  );
});

test('the config.json of a run repeats the run', async () => {
  const out = inFolder('run-again');
  const { code, stderr } = await runCli(['train', '--config', join(inFolder('run'), 'config.json'), '--out', out]);
  assert.equal(code, 0, stderr);
  const read = (run: string) => readFileSync(join(run, 'adapter_model.safetensors'));
  assert.ok(read(out).equals(read(inFolder('run'))));
});

test('train --json prints one object as the last line, with --adapter as the start', async () => {
  const out = inFolder('from-adapter');
  const result = await runCli([
    'train',
    '--model',
    model,
    '--data',
    data,
    '--out',
    out,
    '--adapter',
    adapter,
    '--max-steps',
    '2',
    '--json',
  ]);
  assert.equal(result.code, 0, result.stderr);
  assert.equal(result.stdout.split('\n').length, 2);
  const { steps, initialization, report } = jsonOf(result);
  assert.deepEqual(
    [steps, (initialization as { method: string }).method, report],
    [2, 'none', join(out, 'report.html')],
  );
  const config = JSON.parse(readFileSync(join(out, 'config.json'), 'utf8'));
  assert.deepEqual([config.init, config.rank], ['none', 2]);
});

test("a rank that is not the adapter's is refused", async () => {
  const result = await runCli([
    'train',
    '--model',
    model,
    '--data',
    data,
    '--out',
    inFolder('x'),
    '--adapter',
    adapter,
    '--rank',
    '4',
  ]);
  assert.equal(result.code, 2);
  assert.match(result.stderr, /Expected 2 for --rank, as .*adapter says, but received 4/);
});

test('train --dry-run tells memory and time and writes nothing', async () => {
  const out = inFolder('dry');
  const result = await runCli(['train', '--model', model, '--data', data, '--out', out, '--dry-run', '--json']);
  assert.equal(result.code, 0, result.stderr);
  const { memory, seconds, steps } = jsonOf(result) as {
    memory: Record<string, number> & { initialization: unknown };
    seconds: Record<string, number>;
    steps: number;
  };
  assert.equal(steps, 3);
  assert.equal(memory.total, memory.weights! + memory.activations! + memory.adapters! + memory.workspace!);
  assert.equal((memory.initialization as { plan: string }).plan, 'sample-major');
  assert.ok(seconds.total! > 0);
  assert.ok(!existsSync(out));
});

test('nothing is written when the data are bad', async () => {
  const bad = inFolder('bad.jsonl');
  writeFileSync(bad, '{"input_ids": [1, 2], "labels": [1]}\n');
  const out = inFolder('never');
  const { code, stderr } = await runCli(['train', '--model', model, '--data', bad, '--out', out]);
  assert.equal(code, 1);
  oneLine(stderr.split('\n').slice(-2).join('\n'));
  assert.match(stderr, /bad.jsonl:1/);
  assert.ok(!existsSync(out));
});

test('init --json reports every module', async () => {
  const out = inFolder('init');
  const result = await runCli([
    'init',
    '--model',
    model,
    '--data',
    data,
    '--out',
    out,
    '--samples',
    '3',
    '--population',
    '1000',
    '--json',
  ]);
  assert.equal(result.code, 0, result.stderr);
  const { method, samples, modules, collection } = jsonOf(result) as {
    method: string;
    samples: number;
    modules: object[];
    collection: { plan: string; total: number };
  };
  assert.deepEqual([method, samples, modules.length, collection.plan], ['lora-da', 3, 14, 'sample-major']);
  assert.ok(collection.total > 0);
  assert.deepEqual(Object.keys(modules[0]!), [
    'module',
    'rank',
    'conditionNumber',
    'medianOutputOverDamping',
    'sigma',
    'gap',
    'relativeGap',
    'eigenvalues',
  ]);
  assert.deepEqual(readdirSync(out).sort(), ['adapter_config.json', 'adapter_model.safetensors']);
});

test('init needs data only where the method looks at them', async () => {
  const plain = await runCli(['init', '--model', model, '--out', inFolder('plain'), '--init', 'kaiming']);
  assert.equal(plain.code, 0, plain.stderr);
  const aware = await runCli(['init', '--model', model, '--out', inFolder('aware')]);
  assert.equal(aware.code, 2);
  assert.match(aware.stderr, /for --data but received/);
});

test('eval --json has the mean, and each row', async () => {
  const result = await runCli(['eval', '--model', model, '--adapter', adapter, '--data', data, '--json']);
  assert.equal(result.code, 0, result.stderr);
  const found = jsonOf(result) as { perExample: object[] };
  assert.deepEqual(Object.keys(found), ['loss', 'perplexity', 'labelTokens', 'perExample']);
  assert.equal(found.perExample.length, 20);
  assert.deepEqual(Object.keys(found.perExample[0]!), ['loss', 'labelTokens']);
});

test('generate --json from ids, in a folder without a tokenizer', async () => {
  const result = await runCli([
    'generate',
    '--model',
    model,
    '--input-ids',
    '10,11',
    '--max-new-tokens',
    '3',
    '--json',
  ]);
  assert.equal(result.code, 0, result.stderr);
  assert.deepEqual(jsonOf(result), { text: null, tokenIds: [12, 13, 14] });
});

test('messages that are none are refused by file and field', async () => {
  const file = inFolder('messages.json');
  writeFileSync(file, '[{"role": "user"}]');
  const { code, stderr } = await runCli(['generate', '--model', model, '--messages', file]);
  assert.equal(code, 1);
  assert.match(stderr, /messages.json: expected a string for content of message 1/);
});

test('merge writes a model folder', async () => {
  const out = inFolder('merged');
  const { code, stderr } = await runCli(['merge', '--model', model, '--adapter', adapter, '--out', out]);
  assert.equal(code, 0, stderr);
  assert.deepEqual(readdirSync(out).sort(), ['config.json', 'model.safetensors']);
});

test('info --json lists devices and initializations', async () => {
  const result = await runCli(['info', '--json']);
  assert.equal(result.code, 0, result.stderr);
  const { core } = jsonOf(result) as { core: { devices: object[]; initializations: { name: string }[] } };
  assert.equal(core.devices.length, 1);
  assert.ok(core.initializations.some(({ name }) => name === 'lora-da'));
});

test('an output folder that is a file is refused before the model is loaded', async () => {
  const out = inFolder('file');
  writeFileSync(out, '');
  const { code, stderr } = await runCli(['train', '--model', inFolder('nowhere'), '--data', data, '--out', out]);
  assert.equal(code, 1);
  assert.match(stderr, /Cannot write .*file: it is a file, not a folder/);
});

test('SIGINT during the initialization exits 130 and leaves nothing', async () => {
  const out = inFolder('stopped');
  const args = ['train', '--model', model, '--data', data, '--out', out];
  const { child, ended } = startCli(args, { env: { FAKE_STEP_MS: '1500' } });
  child.stderr!.once('data', () => setTimeout(() => child.kill('SIGINT'), 100));
  assert.equal((await ended).code, 130);
  assert.ok(!existsSync(out));
});

/** A file system of its own, where the machine lets us; undefined elsewhere. */
function mounted(name: string, options: string): string | undefined {
  const place = inFolder(name);
  mkdirSync(place);
  const { status } = spawnSync('mount', ['-t', 'tmpfs', '-o', options, 'tmpfs', place]);
  if (status === 0) after(() => spawnSync('umount', ['-l', place]));
  return status === 0 ? place : undefined;
}

test('a disk that is full is an error with the path, and no checkpoint is half written', async (t) => {
  const place = mounted('full', 'size=120k');
  if (!place) return t.skip('mount is not permitted');
  const args = [
    'train',
    '--model',
    model,
    '--data',
    data,
    '--out',
    join(place, 'out'),
    '--max-steps',
    '9',
    '--save-steps',
    '1',
  ];
  const { code, stderr } = await runCli(args);
  assert.equal(code, 1, stderr);
  assert.match(stderr, /lora-da: Cannot write .*full\/out.*: no space left on the device\n$/);
  const checkpoints = join(place, 'out/checkpoints');
  for (const name of readdirSync(checkpoints)) {
    assert.match(name, /^step-/);
    assert.ok(existsSync(join(checkpoints, name, 'state.json')));
  }
});

test('a file system that is read-only is refused before the model is loaded', async (t) => {
  const place = mounted('read-only', 'ro');
  if (!place) return t.skip('mount is not permitted');
  const { code, stderr } = await runCli([
    'train',
    '--model',
    inFolder('nowhere'),
    '--data',
    data,
    '--out',
    join(place, 'out'),
  ]);
  assert.equal(code, 1);
  assert.match(stderr, /^lora-da: Cannot write .*read-only\/out: the file system is read-only\n$/);
});
