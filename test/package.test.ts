/** The package as its users see it: both module systems, types, published files. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { test } from 'node:test';

const root = join(__dirname, '..');

function run(args: string[]): string {
  const { status, stdout, stderr } = spawnSync(process.execPath, args, { cwd: root, encoding: 'utf8' });
  assert.equal(status, 0, stderr);
  return stdout.trim();
}

test('CommonJS users get the classes', () => {
  assert.equal(run(['-p', "Object.keys(require('lora-da')).includes('CausalLM')"]), 'true');
});

test('ESM users get the same names', () => {
  const script =
    "import { CausalLM, Dataset, Trainer, LoraDaError } from 'lora-da'; console.log(CausalLM.name, Dataset.name, Trainer.name, LoraDaError.name)";
  assert.equal(run(['--input-type=module', '-e', script]), 'CausalLM Dataset Trainer LoraDaError');
});

test('the package description is consistent with its files', () => {
  const report = run(['node_modules/publint/src/cli.js', '--strict']);
  assert.match(report, /All good!/);
});
