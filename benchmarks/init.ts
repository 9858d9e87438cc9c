/**
 * Times the LoRA-DA start by its parts, in bfloat16 and float32, and gives it as a share of the time that plain training
 * takes over the same tokens in the same process; the collection also as a share of its limit, the matrix products alone (limit.cpp); beside the authors'
 * published code where peers.sh has fetched it or a checkout is named.
 *
 *     npm run bench:init -- [--model DIR] [--dtype bfloat16,float32] [--rows 32x160,gsm8k,FILE] [--samples 256]
 *                           [--rounds 1] [--steps 4] [--threads 0] [--peer-path CHECKOUT] [--no-peer] [--no-limit]
 *                           [--json]
 *
 * --rows   32x160: 32 samples of 160 random tokens, all labelled; gsm8k or a data file: its first --samples rows.
 * --steps  training steps of 8 rows, after one of warm-up, that the share is taken from.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import type { Dtype } from '../lib/native';
import { packedTokens } from '../lib/packing';
import {
  BenchmarkError,
  describeMachine,
  describeModel,
  dtypeList,
  engineThreads,
  findPeer,
  gigabytes,
  heading,
  median,
  modelFolder,
  noModel,
  nonNegativeInteger,
  type Peer,
  peerHint,
  positiveInteger,
  root,
  runMain,
  runNode,
  runPython,
  table,
} from './harness';
import type { InitFigures } from './init_ours';
import { dataFile, Inputs, parseShape, type RowFile } from './inputs';
import { hasLimit, type LimitFigures, limitHint, measureLimit, middleRound } from './limit_program';

/** What lora_da_authors.py prints. */
interface AuthorsFigures {
  gradientSeconds: number;
  fisherSeconds: number;
  peakBytes: number;
}

interface Result {
  rows: string;
  dtype: Dtype;
  tokens: number;
  /** Of each round. */
  ours: InitFigures[];
  /** Of each round; empty where the peer was skipped or failed. */
  authors: AuthorsFigures[];
  /** Why the authors' code came to no end, as it does where too few tokens make a Z that it cannot invert. */
  authorsFailure: string | null;
  /** The collection's products on batches of the same mean size, of each round; empty where it was skipped. */
  limits: LimitFigures[];
}

const batchSize = 8;

/** Where peers.sh puts the authors' code. */
const authorsCode = join(root, '.peers/LoRA-DA');
const isCheckout = (folder: string) => existsSync(join(folder, 'lora_da.py'));

function options() {
  const { values } = parseArgs({
    allowNegative: true,
    options: {
      model: { type: 'string' },
      dtype: { type: 'string', default: 'bfloat16,float32' },
      rows: { type: 'string', default: '32x160,gsm8k' },
      samples: { type: 'string', default: '256' },
      rounds: { type: 'string', default: '1' },
      steps: { type: 'string', default: '4' },
      threads: { type: 'string', default: '0' },
      limit: { type: 'boolean', default: true },
      peer: { type: 'boolean', default: true },
      'peer-path': { type: 'string' },
      json: { type: 'boolean', default: false },
    },
  });
  const given = values['peer-path'];
  if (given !== undefined && !isCheckout(given)) {
    throw new BenchmarkError(
      `--peer-path ${given} has no lora_da.py: expected a checkout of the authors' repository`,
      2,
    );
  }
  const peerPath = given ?? (isCheckout(authorsCode) ? authorsCode : undefined);
  return {
    model: modelFolder(values.model),
    dtypes: dtypeList(values.dtype),
    sources: values.rows.split(','),
    samples: positiveInteger('samples', values.samples),
    rounds: positiveInteger('rounds', values.rounds),
    steps: positiveInteger('steps', values.steps),
    threads: nonNegativeInteger('threads', values.threads),
    peerPath: values.peer ? peerPath : undefined,
    limit: values.limit && hasLimit(),
    json: values.json,
  };
}

type Options = ReturnType<typeof options>;

async function prepare(inputs: Inputs, source: string, samples: number): Promise<RowFile | undefined> {
  const shape = parseShape(source);
  if (shape) return inputs.randomRows(shape.rows, shape.length);
  const path = dataFile(source);
  return path === undefined ? undefined : inputs.dataRows(path, samples);
}

function measure(
  inputs: Inputs,
  rows: RowFile,
  source: string,
  dtype: Dtype,
  peer: Peer | undefined,
  given: Options,
): Result {
  const { steps, threads, peerPath, rounds } = given;
  const result: Result = {
    rows: source,
    dtype,
    tokens: rows.tokens,
    ours: [],
    authors: [],
    authorsFailure: null,
    limits: [],
  };
  // The collection packs whole rows into batches of at most packedTokens.
  const batches = Math.ceil(rows.tokens / packedTokens);
  const products = {
    spec: inputs.spec,
    dtype,
    tokens: rows.tokens / batches,
    labels: rows.labelTokens / batches,
    threads: engineThreads(threads),
    collect: true,
  };
  const child = { model: inputs.model, rows: rows.file, dtype, threads };
  for (let round = 1; round <= rounds; round++) {
    console.error(`${source} ${dtype}: round ${round} of ${rounds}`);
    result.ours.push(runNode<InitFigures>('init_ours.ts', { ...child, steps, 'batch-size': batchSize }));
    if (given.limit) result.limits.push(measureLimit(products));
    if (!peer || result.authorsFailure) continue;
    try {
      result.authors.push(runPython<AuthorsFigures>(peer, 'lora_da_authors.py', { ...child, 'peer-path': peerPath }));
    } catch (error) {
      if (!(error instanceof BenchmarkError)) throw error;
      result.authorsFailure = error.message.split('\n').at(-1)!;
    }
  }
  return result;
}

const seconds = (value: number) => `${value.toFixed(2)} s`;
const times = (value: number) => `${value.toFixed(2)}×`;

function show({ dtype, tokens, ours, authors, authorsFailure, limits }: Result): string {
  const us = (figure: (round: InitFigures) => number) => median(ours.map(figure));
  const them = (figure: (round: AuthorsFigures) => number) => median(authors.map(figure));
  const whole = us((round) => round.seconds);
  const share = us((round) => round.seconds / (tokens / round.trainTokensPerSecond));
  const peak = Math.max(...ours.map((round) => round.peakBytes));
  const cells: string[][] = [
    [dtype, 'lora-da'],
    ['collect', seconds(us((round) => round.collectSeconds))],
    ['solve', seconds(us((round) => round.solveSeconds))],
    ['whole call', seconds(whole)],
    ['peak memory', gigabytes(peak)],
    ['plain training, tokens/s', us((round) => round.trainTokensPerSecond).toFixed(0)],
    ['start / training over the same tokens', times(share)],
  ];
  if (limits.length > 0) {
    const products = tokens / middleRound(limits).tokensPerSecond;
    cells.splice(2, 0, ["the collection's products alone", seconds(products)]);
    cells.splice(3, 0, [
      'share of that limit',
      `${((100 * products) / us((round) => round.collectSeconds)).toFixed(0)} %`,
    ]);
  }
  const failure = authorsFailure ? `\n  the authors' code failed: ${authorsFailure}` : '';
  if (authors.length === 0) return `${table(cells)}${failure}`;
  const theirs = them((round) => round.gradientSeconds + round.fisherSeconds);
  const theirPeak = Math.max(...authors.map((round) => round.peakBytes));
  const peer: string[][] = [
    [dtype, "authors' code", 'theirs / ours'],
    ['gradient pass', seconds(them((round) => round.gradientSeconds)), ''],
    ['Fisher passes and solve', seconds(them((round) => round.fisherSeconds)), ''],
    ['whole', seconds(theirs), times(theirs / whole)],
    ['peak memory', gigabytes(theirPeak), times(theirPeak / peak)],
  ];
  return `${table(cells)}\n${table(peer)}`;
}

function whyNoPeer(peerPath: string | undefined): string {
  if (peerPath === undefined)
    return "peer skipped: fetch the authors' code with `bash benchmarks/peers.sh`, or name a checkout with --peer-path";
  return `peer skipped: ${peerHint}`;
}

async function main(): Promise<void> {
  const given = options();
  if (!given.model) return console.log(noModel);
  const peer = given.peerPath === undefined ? undefined : findPeer();
  const inputs = await Inputs.open(given.model);
  try {
    const { peer: versions, ...rest } = describeMachine(given.threads, peer);
    const machine = peer ? { ...rest, peer: versions! } : rest;
    console.log(
      heading({
        ...machine,
        model: describeModel(inputs),
        start: 'lora-da, rank 8, every linear module',
      }),
    );
    if (!peer) console.log(whyNoPeer(given.peerPath));
    if (!hasLimit()) console.log(limitHint);
    const results: Result[] = [];
    for (const source of given.sources) {
      const rows = await prepare(inputs, source, given.samples);
      if (!rows) {
        console.log(`\nRows ${source}: skipped, the data are not here`);
        continue;
      }
      console.log(
        `\nRows ${source}: ${rows.rows} samples, ${rows.tokens} tokens, longest ${rows.longest}; rounds: ${given.rounds}`,
      );
      for (const dtype of given.dtypes) {
        const result = measure(inputs, rows, source, dtype, peer, given);
        results.push(result);
        console.log(show(result));
      }
    }
    if (given.json) console.log(JSON.stringify({ machine, model: given.model, results }));
  } finally {
    inputs.remove();
  }
}

runMain(main);
