/**
 * Mutated inputs: whatever is wrong with a file, a command ends with exit status 0, 1 or 2, with one clear line where it fails, and
 * without a signal, a stack or a hang. `MUTATIONS` sets how many (default 500), `SEED` repeats a sequence.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { Random } from '../../lib/random';

const root = join(__dirname, '../..');
const cli = join(root, 'dist/cli.js');
const count = Number(process.env.MUTATIONS ?? 500);
const seed = Number(process.env.SEED ?? Date.now() % 1e6);
const work = mkdtempSync(join(tmpdir(), 'lora-da-mutation-'));
after(() => rmSync(work, { recursive: true }));

const model = join(root, 'test/fixtures/tiny-llama');
const data = join(root, 'examples/data/support-test.jsonl');

function run(args: string[]) {
  return spawnSync(process.execPath, [cli, ...args, '--threads', '1'], { encoding: 'utf8', timeout: 60_000 });
}

type Mutation = (bytes: Buffer, random: Random) => Buffer;

/** Replaces a random value of a JSON text by something else, or removes or doubles it. */
const mutateJson: Mutation = (bytes, random) => {
  const places: { parent: Record<string, unknown>; key: string }[] = [];
  const value = JSON.parse(bytes.toString('utf8')) as Record<string, unknown>;
  const walk = (parent: Record<string, unknown>, depth: number) => {
    for (const key of Object.keys(parent).slice(0, 40)) {
      places.push({ parent, key });
      if (parent[key] && typeof parent[key] === 'object' && depth < 3)
        walk(parent[key] as Record<string, unknown>, depth + 1);
    }
  };
  walk(value, 0);
  const { parent, key } = places[random.below(places.length)]!;
  const replacements = [
    null,
    -1,
    0,
    1e30,
    0.5,
    '',
    'x',
    [],
    {},
    true,
    [1, 'a'],
    Number.MAX_SAFE_INTEGER,
    '\u0000',
    '{{ 1 / 0 }}',
  ];
  if (random.below(4) === 0) delete parent[key];
  else if (random.below(6) === 0) parent[`${key}_`] = parent[key];
  else parent[key] = replacements[random.below(replacements.length)];
  return Buffer.from(JSON.stringify(value));
};

const flipBytes: Mutation = (bytes, random) => {
  const copy = Buffer.from(bytes);
  // Half of the flips fall into the first bytes, where headers are.
  for (let i = 0; i <= random.below(4); i++)
    copy[random.below(random.below(2) ? copy.length : Math.min(copy.length, 200))] = random.below(256);
  return copy;
};

const mutations: Mutation[] = [
  mutateJson,
  flipBytes,
  (bytes, random) => bytes.subarray(0, random.below(bytes.length)),
  (bytes, random) => Buffer.concat([bytes, Buffer.alloc(1 + random.below(100), random.below(256))]),
  (bytes, random) => {
    const at = random.below(bytes.length);
    return Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + 1 + random.below(50))]);
  },
  () => Buffer.alloc(0),
];

/** Mutates a random line of a JSONL file as JSON. */
const mutateRow: Mutation = (bytes, random) => {
  const lines = bytes.toString('utf8').trimEnd().split('\n');
  const at = random.below(lines.length);
  lines[at] = mutateJson(Buffer.from(lines[at]!), random).toString('utf8');
  return Buffer.from(lines.join('\n'));
};

test(`${count} mutated inputs end in a clear error or in success (seed ${seed})`, () => {
  const random = new Random(seed);
  const adapter = join(work, 'adapter');
  const made = run(['init', '--model', model, '--data', data, '--init', 'gaussian', '--out', adapter]);
  assert.equal(made.status, 0, made.stderr);

  const outcomes: Record<string, number> = {};
  for (let i = 0; i < count; i++) {
    const copies = {
      model: join(work, 'model'),
      adapter: join(work, 'mutated-adapter'),
      data: join(work, 'rows.jsonl'),
    };
    cpSync(model, copies.model, { recursive: true });
    cpSync(adapter, copies.adapter, { recursive: true });
    writeFileSync(copies.data, readFileSync(data, 'utf8').split('\n').slice(0, 6).join('\n'));
    const files = [
      ...readdirSync(copies.model).map((name) => join(copies.model, name)),
      ...readdirSync(copies.adapter)
        .filter((name) => name.startsWith('adapter_'))
        .map((name) => join(copies.adapter, name)),
      copies.data,
    ];
    const file = files[random.below(files.length)]!;
    const bytes = readFileSync(file);
    const isJson = file.endsWith('.json');
    const choices = file.endsWith('.jsonl')
      ? [mutateRow, mutateRow, ...mutations.slice(1)]
      : isJson
        ? [mutateJson, mutateJson, ...mutations]
        : mutations.slice(1);
    writeFileSync(file, choices[random.below(choices.length)]!(bytes, random));
    if (random.below(25) === 0) rmSync(file);

    const kept = existsSync(file) ? readFileSync(file) : undefined;
    const out = join(work, 'out');
    const base = ['--model', copies.model, '--adapter', copies.adapter];
    const commands = [
      ['eval', ...base, '--data', copies.data, '--json'],
      ['generate', ...base, '--prompt', 'Where is my order?', '--max-new-tokens', '3', '--json'],
      ['train', ...base, '--data', copies.data, '--out', out, '--max-steps', '1', '--batch-size', '2', '--json'],
      ['merge', ...base, '--out', out, '--json'],
    ];
    const { status, signal, stderr, stdout } = run(commands[random.below(commands.length)]!);
    const what = `mutation ${i} of ${file.slice(work.length + 1)}: status ${status}, signal ${signal}\n${stderr}`;
    outcomes[String(status)] = (outcomes[String(status)] ?? 0) + 1;
    assert.equal(signal, null, what);
    assert.ok(status === 0 || status === 1 || status === 2, what);
    assert.doesNotMatch(stderr, /^\s+at /m, what);
    assert.doesNotMatch(stderr, /INTERNAL|TypeError|RangeError|Cannot read properties/, what);
    if (status !== 0) assert.ok(stderr.trim().split('\n').at(-1)!.length > 10, what);
    if (status === 0) assert.doesNotThrow(() => JSON.parse(stdout.trimEnd().split('\n').at(-1)!), what);
    assert.deepEqual(existsSync(file) ? readFileSync(file) : undefined, kept, 'the input itself is left as it was');
    for (const folder of [copies.model, copies.adapter, out]) rmSync(folder, { recursive: true, force: true });
  }
  console.log('exit statuses', outcomes);
});
