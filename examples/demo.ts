/**
 * The main job on what the repository carries: a tiny pretrained model learns to answer a shop's customers, once started
 * from LoRA-DA and once from plain LoRA, with the same rows, order, seed and steps, each at the learning rate that suits it.
 *
 *     npm run demo                    # or: npx tsx examples/demo.ts [FOLDER]
 *
 * Run folders go to FOLDER (default: lora-da-demo in the system's folder for temporary files), where those of an earlier demo are replaced.
 */
import { readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { CausalLM, Dataset, Trainer, type TrainResult } from '../lib/index';

const root = join(__dirname, '..');
const modelFolder = join(root, 'test/fixtures/tiny-llama');
const out = process.argv[2] ?? join(tmpdir(), 'lora-da-demo');
// Starts are compared fairly when each has its own best rate: of 2e-3, 5e-3 and 1e-2, 5e-3 is best for both. LoRA-DA has the
// paper's options.
const starts = [
  { method: 'lora-da', learningRate: 5e-3 },
  { method: 'kaiming', learningRate: 5e-3 },
];
const training = { batchSize: 8, maxSteps: 120, seed: 42, evalSteps: 40 };

interface Row {
  messages: { role: string; content: string }[];
}

const rowsOf = (name: string) =>
  readFileSync(join(root, 'examples/data', name), 'utf8')
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as Row);

const indent = (text: string | null) => (text ?? '').trim().replace(/^/gm, '    ');

async function answer(model: CausalLM, row: Row): Promise<string> {
  const { text } = await model.generate({ messages: row.messages.slice(0, 1), maxNewTokens: 80 });
  return indent(text);
}

/** Trains a fresh adapter from one start. */
async function train(
  model: CausalLM,
  start: (typeof starts)[number],
  data: Dataset,
  evalData: Dataset,
): Promise<TrainResult> {
  const { method, learningRate } = start;
  model.addLora({ rank: 8, alpha: 16 });
  const folder = join(out, method);
  const trainer = new Trainer(model, {
    ...training,
    learningRate,
    data,
    evalData,
    out: folder,
    initialize: { method },
  });
  trainer.on('initialization', ({ collectSeconds, solveSeconds }) =>
    console.log(`  started in ${(collectSeconds + solveSeconds).toFixed(1)} s`),
  );
  trainer.on('evaluation', ({ step, loss }) =>
    console.log(`  step ${String(step).padStart(3)}: held-out loss ${loss.toFixed(4)}`),
  );
  return trainer.train();
}

async function main(): Promise<void> {
  for (const { method } of starts) rmSync(join(out, method), { recursive: true, force: true });
  const model = await CausalLM.load(modelFolder, { dtype: 'float32' });
  const data = await Dataset.load(join(root, 'examples/data/support-train.jsonl'), { tokenizer: model.tokenizer });
  const evalData = await Dataset.load(join(root, 'examples/data/support-test.jsonl'), { tokenizer: model.tokenizer });
  console.log(`${model.info.parameters} parameters, ${data.length} rows to train on, ${evalData.length} held out`);

  const question = rowsOf('support-test.jsonl')[0]!;
  const before = await model.evaluate(evalData);
  const answers = [{ title: 'before training', text: await answer(model, question) }];
  const results: { method: string; result: TrainResult }[] = [];
  for (const start of starts) {
    const { method, learningRate } = start;
    console.log(`\nTraining from ${method}: ${training.maxSteps} steps, learning rate ${learningRate}`);
    results.push({ method, result: await train(model, start, data, evalData) });
    answers.push({ title: `after training from ${method}`, text: await answer(model, question) });
  }

  console.log(`\nA customer writes\n${indent(question.messages[0]!.content)}`);
  console.log(`The desk should answer\n${indent(question.messages[1]!.content)}`);
  for (const { title, text } of answers) console.log(`Answer ${title}\n${text}`);

  console.log('\nHeld-out loss        before    after');
  for (const { method, result } of results) {
    const after = result.evaluation!.last.loss.toFixed(4);
    console.log(`  ${method.padEnd(16)} ${before.loss.toFixed(4).padStart(8)} ${after.padStart(8)}`);
  }
  console.log(`\nReport: ${results[0]!.result.report}`);
  data.dispose();
  evalData.dispose();
  await model.dispose();
}

main().catch((error) => {
  console.error(`demo: ${error.message}`);
  process.exitCode = 1;
});
