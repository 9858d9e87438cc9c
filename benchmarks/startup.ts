/**
 * How long a user waits: for `lora-da --help`, and from the start of a `lora-da train` process to the beginning and the end of
 * its first step, with a start that looks at no data. Runs the compiled command line (dist/cli.js) in processes of its own.
 *
 *     npm run bench:startup -- [--model DIR] [--dtype bfloat16] [--rows 64] [--data gsm8k] [--runs 5] [--threads 0] [--json]
 *
 * --rows  lines of question and answer in the small data file, made here.
 * --data  another file to measure too; gsm8k is the copy beside the checkout, left out where it is missing.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import type { Dtype } from '../lib/native';
import {
  BenchmarkError,
  describeMachine,
  dtypeList,
  heading,
  median,
  modelFolder,
  noModel,
  nonNegativeInteger,
  positiveInteger,
  root,
  runMain,
  table,
} from './harness';
import { dataFile } from './inputs';

const program = join(root, 'dist/cli.js');

/** Seconds from the start of the process. */
interface TrainTimes {
  firstStepBegins: number;
  firstStepEnds: number;
  processEnds: number;
}

interface Result {
  dtype: Dtype;
  data: string;
  /** Of each run. */
  runs: TrainTimes[];
}

function options() {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      dtype: { type: 'string', default: 'bfloat16' },
      rows: { type: 'string', default: '64' },
      data: { type: 'string', default: 'gsm8k' },
      runs: { type: 'string', default: '5' },
      threads: { type: 'string', default: '0' },
      json: { type: 'boolean', default: false },
    },
  });
  return {
    model: modelFolder(values.model),
    dtypes: dtypeList(values.dtype),
    rows: positiveInteger('rows', values.rows),
    data: values.data,
    runs: positiveInteger('runs', values.runs),
    threads: nonNegativeInteger('threads', values.threads),
    json: values.json,
  };
}

/** Runs Node.js with some arguments to its end; the clock's times around it in milliseconds. */
function timed(args: string[]): { began: number; ended: number } {
  const now = () => performance.timeOrigin + performance.now();
  const began = now();
  const { status, stderr, error } = spawnSync(process.execPath, args, { encoding: 'utf8' });
  const ended = now();
  if (error || status !== 0) throw new BenchmarkError(`${args[0]}: ${error?.message ?? stderr.trim()}`, 1);
  return { began, ended };
}

/** Seconds of a process, by run, after one of warm-up. */
function processSeconds(args: string[], runs: number): number[] {
  timed(args);
  return Array.from({ length: runs }, () => {
    const { began, ended } = timed(args);
    return (ended - began) / 1000;
  });
}

function smallData(folder: string, rows: number): string {
  const lines = Array.from({ length: rows }, (_, i) =>
    JSON.stringify({
      question: `A shop sells ${i + 3} apples in the morning and ${2 * i + 1} in the afternoon. How many is that in all?`,
      answer: `In the morning it is ${i + 3} and in the afternoon ${2 * i + 1}, so in all it is ${3 * i + 4}.`,
    }),
  );
  const file = join(folder, 'small.jsonl');
  writeFileSync(file, `${lines.join('\n')}\n`);
  return file;
}

/**
 * One run of one step. The line of metrics.jsonl is written when the step has ended, so the file's time of modification is that
 * moment; the step's own duration, tokens over tokens/s in the line, gives its beginning. File times tick every few milliseconds.
 */
function trainOnce(folder: string, model: string, data: string, dtype: Dtype, threads: number): TrainTimes {
  const out = join(folder, 'run');
  rmSync(out, { recursive: true, force: true });
  const args = ['--model', model, '--data', data, '--out', out, '--init', 'kaiming', '--max-steps', '1'];
  const { began, ended } = timed([program, 'train', ...args, '--dtype', dtype, '--threads', String(threads)]);
  const file = join(out, 'metrics.jsonl');
  const { tokens, tokensPerSecond } = JSON.parse(readFileSync(file, 'utf8'));
  const stepEnded = statSync(file).mtimeMs;
  return {
    firstStepBegins: (stepEnded - began) / 1000 - tokens / tokensPerSecond,
    firstStepEnds: (stepEnded - began) / 1000,
    processEnds: (ended - began) / 1000,
  };
}

function trainTimes(folder: string, model: string, data: string, dtype: Dtype, threads: number, runs: number) {
  trainOnce(folder, model, data, dtype, threads);
  return Array.from({ length: runs }, () => trainOnce(folder, model, data, dtype, threads));
}

function show({ dtype, data, runs }: Result): string {
  const line = (name: string, of: (times: TrainTimes) => number) => {
    const values = runs.map(of);
    return [
      name,
      ...[median(values), Math.min(...values), Math.max(...values)].map((value) => `${value.toFixed(2)} s`),
    ];
  };
  return table([
    [`train, ${dtype}, ${data}`, 'median', 'fastest', 'slowest'],
    line('first step begins', (times) => times.firstStepBegins),
    line('first step ends', (times) => times.firstStepEnds),
    line('process ends: adapter and report written', (times) => times.processEnds),
  ]);
}

async function main(): Promise<void> {
  const given = options();
  if (!existsSync(program)) throw new BenchmarkError('dist/cli.js is not there: run `npm run build:ts`', 1);
  const { peer: _, ...machine } = describeMachine(given.threads, undefined);
  console.log(
    heading({ ...machine, model: given.model ?? 'none', runs: `${given.runs} of each, after one of warm-up` }),
  );
  const commands = {
    'node alone': ['-e', '0'],
    'lora-da --help': [program, '--help'],
    'lora-da info': [program, 'info'],
  };
  const seconds = Object.entries(commands).map(([name, args]) => [name, processSeconds(args, given.runs)] as const);
  const milliseconds = (value: number) => `${(1000 * value).toFixed(0)} ms`;
  console.log(
    table([
      ['command', 'median', 'fastest', 'slowest'],
      ...seconds.map(([name, values]) => [
        name,
        ...[median(values), Math.min(...values), Math.max(...values)].map(milliseconds),
      ]),
    ]),
  );
  const results: Result[] = [];
  if (!given.model) console.log(noModel);
  const folder = mkdtempSync(join(tmpdir(), 'lora-da-startup-'));
  try {
    const large = dataFile(given.data);
    const sources = {
      [`${given.rows} rows`]: smallData(folder, given.rows),
      ...(large ? { [given.data]: large } : {}),
    };
    for (const dtype of given.model ? given.dtypes : []) {
      for (const [data, file] of Object.entries(sources)) {
        console.error(`${dtype}, ${data}`);
        const runs = trainTimes(folder, given.model!, file, dtype, given.threads, given.runs);
        results.push({ dtype, data, runs });
        console.log(show(results.at(-1)!));
      }
    }
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
  if (given.json) {
    console.log(JSON.stringify({ machine, model: given.model, commands: Object.fromEntries(seconds), results }));
  }
}

runMain(main);
