import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { writeReport } from '../lib/report';
import { temporaryFolder } from './tiny_folder';

function runFolder(steps: number): string {
  const folder = temporaryFolder();
  const lines = Array.from({ length: steps }, (_, i) => ({
    step: i + 1,
    epoch: i / 10,
    loss: 3 / (i + 1),
    gradNorm: 1,
    learningRate: 1e-4,
    tokens: 100,
    tokensPerSecond: 50,
  }));
  writeFileSync(join(folder, 'metrics.jsonl'), lines.map((line) => `${JSON.stringify(line)}\n`).join(''));
  writeFileSync(
    join(folder, 'config.json'),
    JSON.stringify({ model: '/models/</title><script>alert(1)</script>', data: '<b>x</b>' }),
  );
  const evaluation = { step: 0, epoch: 0, loss: 2.5, perplexity: 12.2, labelTokens: 99, seconds: 1 };
  writeFileSync(join(folder, 'evaluations.jsonl'), `${JSON.stringify(evaluation)}\n`);
  const module = {
    rank: 8,
    conditionNumber: 1e5,
    medianOutputOverDamping: 0.5,
    sigma: 3,
    gap: null,
    relativeGap: 0.1,
    eigenvalues: [],
  };
  const modules = [0, 1].map((layer) => ({ module: `model.layers.${layer}.self_attn.q_proj`, ...module }));
  const options = { tokenMask: 'attention', damping: 1e-6, gamma: 1024 };
  writeFileSync(
    join(folder, 'initialization.json'),
    JSON.stringify({ method: 'lora-da', options, samples: 4, modules, collectSeconds: 1, solveSeconds: 1 }),
  );
  return folder;
}

interface ReportData {
  steps: Record<string, number[]>;
  modules: { layers: number[]; names: string[]; figures: Record<string, (number | null)[][]> };
}

function dataOf(html: string): ReportData {
  return JSON.parse(/<script type="application\/json" id="data">(.*?)<\/script>/s.exec(html)![1]!) as ReportData;
}

test('the report is one file that loads nothing', async () => {
  const html = readFileSync(await writeReport(runFolder(20)), 'utf8');
  assert.doesNotMatch(html, /<link|<script[^>]+src=|@import|url\((?!["']?data:)/);
  assert.match(html, /uPlot/);
});

test('what users named is escaped', async () => {
  const html = readFileSync(await writeReport(runFolder(3)), 'utf8');
  assert.doesNotMatch(html, /<script>alert|<b>x<\/b>/);
  assert.match(html, /&lt;b&gt;x&lt;\/b&gt;/);
});

test('the report holds every step of a short run and each module', async () => {
  const { steps, modules } = dataOf(readFileSync(await writeReport(runFolder(20)), 'utf8'));
  assert.equal(steps.step!.length, 20);
  assert.equal(steps.loss![0], 3);
  assert.deepEqual(modules.layers, [0, 1]);
  assert.deepEqual(modules.names, ['q_proj']);
  assert.deepEqual(modules.figures.conditionNumber, [[1e5, 1e5]]);
});

test('a long run is averaged over neighbouring steps and stays in order', async () => {
  const { steps } = dataOf(readFileSync(await writeReport(runFolder(20_000)), 'utf8'));
  const at = steps.step!;
  assert.ok(at.length <= 6000, String(at.length));
  assert.ok(at.every((step, i) => i === 0 || step > at[i - 1]!));
  assert.equal(at.at(-1), 20_000);
  assert.equal(steps.loss!.length, at.length);
});

test('a run folder without evaluations, initialization or steps has a report too', async () => {
  const folder = temporaryFolder();
  const html = readFileSync(await writeReport(folder), 'utf8');
  assert.match(html, /<h2>Training<\/h2>/);
  assert.doesNotMatch(html, /What the initialization found/);
});

test('a last line cut short by a kill is left out', async () => {
  const folder = runFolder(5);
  const metrics = join(folder, 'metrics.jsonl');
  writeFileSync(metrics, `${readFileSync(metrics, 'utf8')}{"step":6,"lo`);
  assert.equal(dataOf(readFileSync(await writeReport(folder), 'utf8')).steps.step!.length, 5);
});
