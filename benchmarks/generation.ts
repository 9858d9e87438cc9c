/**
 * Greedy generation of one sequence beside transformers: tokens/s of both, and ours as a share of what the memory's bandwidth
 * allows, as each new token reads every weight once.
 *
 *     npm run bench:generation -- [--model DIR] [--dtype bfloat16] [--prompt-tokens 32] [--new-tokens 128] [--repeats 3]
 *                                 [--rounds 2] [--threads 0] [--json]
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import type { DecoderSpec, Dtype } from '../lib/native';
import { linearModules } from '../lib/target_modules';
import { Tokenizer } from '../lib/tokenizer';
import type { GenerationFigures } from './generation_ours';
import {
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
  runMain,
  runNode,
  runPython,
  table,
} from './harness';
import { Inputs } from './inputs';
import { hasLimit, limitHint, measureBandwidth } from './limit_program';

/** One side's rounds as one. */
interface Side {
  /** New tokens over the whole call's time. */
  tokensPerSecond: number;
  /** Of the tokens after the first: without the pass over the prompt. */
  decodePerSecond: number;
  firstSeconds: number;
  peakBytes: number;
  tokens: number[];
}

interface Result {
  dtype: Dtype;
  ours: Side;
  peer: Side | null;
  /** tokensPerSecond, ours over the peer's. */
  ratio: number | null;
  /** Bytes per second that memory gives to reads; null where bench_limit is missing. */
  bandwidth: number | null;
  weightBytesPerToken: number;
  /** Of the bandwidth, from decodePerSecond. */
  share: number | null;
}

function options() {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      dtype: { type: 'string', default: 'bfloat16' },
      'prompt-tokens': { type: 'string', default: '32' },
      'new-tokens': { type: 'string', default: '128' },
      repeats: { type: 'string', default: '3' },
      rounds: { type: 'string', default: '2' },
      threads: { type: 'string', default: '0' },
      json: { type: 'boolean', default: false },
    },
  });
  return {
    model: modelFolder(values.model),
    dtypes: dtypeList(values.dtype),
    promptTokens: positiveInteger('prompt-tokens', values['prompt-tokens']),
    newTokens: positiveInteger('new-tokens', values['new-tokens']),
    repeats: positiveInteger('repeats', values.repeats),
    rounds: positiveInteger('rounds', values.rounds),
    threads: nonNegativeInteger('threads', values.threads),
    json: values.json,
  };
}

type Options = ReturnType<typeof options>;

const text =
  'The harbour was quiet before sunrise. Boats came back one after another, and the people on the quay counted them as they ' +
  'had done every morning for as long as anyone there could remember, until all of them were in.';

/** The first ids of a text, again from its beginning where it is too short; counting ids where there is no tokenizer. */
async function makePrompt(model: string, count: number): Promise<number[]> {
  if (!existsSync(join(model, 'tokenizer.json'))) return Array.from({ length: count }, (_, i) => i + 1);
  const tokenizer = await Tokenizer.load(model);
  const ids = Array.from(await tokenizer.encode(text));
  await tokenizer.dispose();
  return Array.from({ length: count }, (_, i) => ids[i % ids.length]!);
}

/** Every linear module and the head once; the cache, small at these lengths, is not counted. */
function weightBytes(spec: DecoderSpec, dtype: Dtype): number {
  const linears = [...linearModules(spec).values()].reduce((sum, linear) => sum + linear.in * linear.out, 0);
  return (linears + spec.vocabSize * spec.hiddenSize) * (dtype === 'bfloat16' ? 2 : 4);
}

function together(rounds: GenerationFigures[]): Side {
  const seconds = median(rounds.flatMap((round) => round.seconds));
  const firstSeconds = median(rounds.flatMap((round) => round.firstSeconds));
  const { tokens } = rounds[0]!;
  return {
    tokensPerSecond: tokens.length / seconds,
    decodePerSecond: (tokens.length - 1) / (seconds - firstSeconds),
    firstSeconds,
    peakBytes: Math.max(...rounds.map((round) => round.peakBytes)),
    tokens,
  };
}

function measure(inputs: Inputs, prompt: number[], dtype: Dtype, peer: Peer | undefined, given: Options): Result {
  const { model, spec } = inputs;
  const { repeats, threads, newTokens } = given;
  const child = { model, prompt: prompt.join(','), dtype, repeats, threads, 'new-tokens': newTokens };
  const ours: GenerationFigures[] = [];
  const theirs: GenerationFigures[] = [];
  const bandwidths: number[] = [];
  for (let round = 1; round <= given.rounds; round++) {
    console.error(`${dtype}: round ${round} of ${given.rounds}`);
    ours.push(runNode<GenerationFigures>('generation_ours.ts', child));
    if (hasLimit()) bandwidths.push(measureBandwidth(engineThreads(threads)));
    if (peer) theirs.push(runPython<GenerationFigures>(peer, 'generation_peer.py', child));
  }
  const us = together(ours);
  const them = peer ? together(theirs) : null;
  const bandwidth = bandwidths.length > 0 ? median(bandwidths) : null;
  const weightBytesPerToken = weightBytes(spec, dtype);
  return {
    dtype,
    ours: us,
    peer: them,
    ratio: them && us.tokensPerSecond / them.tokensPerSecond,
    bandwidth,
    weightBytesPerToken,
    share: bandwidth && (us.decodePerSecond * weightBytesPerToken) / bandwidth,
  };
}

function sameTokens(ours: number[], theirs: number[]): string {
  const first = ours.findIndex((id, i) => id !== theirs[i]);
  return first < 0
    ? `all ${ours.length} tokens are the same`
    : `the first ${first} of ${ours.length} tokens are the same`;
}

function show({ dtype, ours, peer, bandwidth, weightBytesPerToken, share }: Result): string {
  const line = (name: string, of: (side: Side) => number, format: (value: number) => string) => [
    name,
    format(of(ours)),
    peer ? format(of(peer)) : '-',
    peer ? `${(of(ours) / of(peer)).toFixed(2)}×` : '-',
  ];
  const rate = (value: number) => value.toFixed(1);
  const cells = [
    [dtype, 'lora-da', 'transformers', 'ratio'],
    line('tokens/s, the whole call', (side) => side.tokensPerSecond, rate),
    line('tokens/s after the first', (side) => side.decodePerSecond, rate),
    line(
      'first token',
      (side) => side.firstSeconds,
      (value) => `${(1000 * value).toFixed(0)} ms`,
    ),
    line('peak memory', (side) => side.peakBytes, gigabytes),
  ];
  const lines = [table(cells)];
  if (peer) lines.push(`  ${sameTokens(ours.tokens, peer.tokens)}`);
  if (bandwidth && share) {
    lines.push(
      `  limit: ${gigabytes(bandwidth)}/s over ${gigabytes(weightBytesPerToken)} of weights a token are ` +
        `${(bandwidth / weightBytesPerToken).toFixed(1)} tokens/s; lora-da has ${(100 * share).toFixed(0)} % of it`,
    );
  }
  return lines.join('\n');
}

async function main(): Promise<void> {
  const given = options();
  if (!given.model) return console.log(noModel);
  const peer = findPeer();
  const inputs = await Inputs.open(given.model);
  try {
    const machine = describeMachine(given.threads, peer);
    const plan =
      `greedy, a prompt of ${given.promptTokens} tokens, ${given.newTokens} new ones; ` +
      `${given.rounds} rounds of ${given.repeats} calls after one of warm-up`;
    console.log(heading({ ...machine, model: describeModel(inputs), plan }));
    if (!peer) console.log(`peer skipped: ${peerHint}`);
    if (!hasLimit()) console.log(limitHint);
    const prompt = await makePrompt(given.model, given.promptTokens);
    const results: Result[] = [];
    for (const dtype of given.dtypes) {
      const result = measure(inputs, prompt, dtype, peer, given);
      results.push(result);
      console.log(show(result));
    }
    if (given.json) console.log(JSON.stringify({ machine, model: given.model, results }));
  } finally {
    inputs.remove();
  }
}

runMain(main);
