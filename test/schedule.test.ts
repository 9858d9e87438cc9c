import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { Random } from '../lib/random';
import { Sampler } from '../lib/sampler';
import { learningRateAt, type Schedule, warmupStepsOf } from '../lib/schedule';

// Made with transformers 5.23: get_scheduler(name, …, num_warmup_steps, num_training_steps), get_last_lr() before each step.
const file = join(__dirname, 'fixtures/schedules/transformers.json');
const cases = JSON.parse(readFileSync(file, 'utf8')) as (Schedule & { rates: number[] })[];

for (const { rates, ...schedule } of cases) {
  const { scheduler, warmupSteps, totalSteps } = schedule;
  test(`${scheduler} with ${warmupSteps} of ${totalSteps} steps of warm-up has the rates of transformers`, () => {
    rates.forEach((rate, i) => {
      const ours = learningRateAt(schedule, i + 1);
      assert.ok(Math.abs(ours - rate) <= 1e-15 * schedule.learningRate, `step ${i + 1}: ${ours}, expected ${rate}`);
    });
  });
}

test('the first step of a warm-up has rate 0', () => {
  assert.equal(learningRateAt({ scheduler: 'linear', learningRate: 1, warmupSteps: 1, totalSteps: 5 }, 1), 0);
});

test('a warm-up ratio is rounded up to whole steps', () => {
  assert.equal(warmupStepsOf(101, undefined, 0.03), 4);
  assert.equal(warmupStepsOf(101, 0, 0.03), 0);
  assert.equal(warmupStepsOf(10, undefined, 0), 0);
});

test('a restored generator goes on with the same numbers', () => {
  const random = new Random(42);
  for (let i = 0; i < 5; i++) random.next();
  const copy = Random.restore(random.state());
  for (let i = 0; i < 100; i++) assert.equal(copy.next(), random.next());
});

test('numbers below a bound are spread evenly', () => {
  const random = new Random(1);
  const counts = new Array(10).fill(0);
  for (let i = 0; i < 20000; i++) counts[random.below(10)]++;
  for (const count of counts) assert.ok(Math.abs(count - 2000) < 200, String(counts));
});

test('an epoch has every row once, in an order that changes from epoch to epoch and with the seed', async () => {
  const epoch = async (sampler: Sampler) => sampler.next(1000);
  const sampler = new Sampler(50, { seed: 3, shuffle: true });
  const [first, second] = [await epoch(sampler), await epoch(sampler)];
  const other = await epoch(new Sampler(50, { seed: 4, shuffle: true }));
  for (const rows of [first, second, other]) {
    assert.deepEqual(
      rows.toSorted((a, b) => a - b),
      Array.from({ length: 50 }, (_, i) => i),
    );
  }
  assert.notDeepEqual(first, second);
  assert.notDeepEqual(first, other);
});

test('without shuffling rows come in file order and wrap around', async () => {
  const sampler = new Sampler(5, { seed: 3, shuffle: false });
  assert.deepEqual(await sampler.next(3), [0, 1, 2]);
  assert.deepEqual(await sampler.next(3), [3, 4]);
  assert.equal(sampler.epoch, 1);
  assert.deepEqual(await sampler.next(3), [0, 1, 2]);
});

/** Lengths like those of real rows: mostly short, a few long. */
const rowLength = (row: number) => 20 + ((row * 7919) % 400) + (row % 17 === 0 ? 900 : 0);

test('balanced batches have about the same number of tokens, and an epoch still has every row once', async () => {
  const batchSize = 8;
  const spread = async (sampler: Sampler) => {
    const tokens: number[] = [];
    const seen: number[] = [];
    while (seen.length < 500) {
      const rows = await sampler.next(batchSize);
      seen.push(...rows);
      if (rows.length === batchSize) tokens.push(rows.reduce((sum, row) => sum + rowLength(row), 0));
    }
    assert.deepEqual(
      seen.toSorted((a, b) => a - b),
      Array.from({ length: 500 }, (_, row) => row),
    );
    return Math.max(...tokens) / Math.min(...tokens);
  };
  for (const shuffle of [true, false]) {
    const options = { seed: 5, shuffle };
    assert.ok((await spread(new Sampler(500, options))) > 2);
    assert.ok((await spread(new Sampler(500, { ...options, balance: { batchSize, rowLength } }))) < 1.2);
  }
});

test('balanced rows stay near their place', async () => {
  const sampler = new Sampler(2000, { seed: 5, shuffle: false, balance: { batchSize: 4, rowLength } });
  const rows = await sampler.next(2000);
  for (const [place, row] of rows.entries()) assert.ok(Math.abs(place - row) < 4 * 32);
});

test('a sampler restored at any position draws the rows of one that never stopped', async () => {
  for (const balance of [undefined, { batchSize: 3, rowLength }]) {
    const options = { seed: 9, shuffle: true, balance };
    for (const drawn of [0, 1, 4, 5, 7]) {
      const straight = new Sampler(13, options);
      for (let i = 0; i < drawn; i++) await straight.next(3);
      const restored = new Sampler(13, options, JSON.parse(JSON.stringify(straight.state())));
      for (let i = 0; i < 12; i++) assert.deepEqual(await restored.next(3), await straight.next(3));
    }
  }
});
