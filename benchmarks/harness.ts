/** What the benchmarks share: the model folder, the peer's Python, child processes that print JSON, figures for people. */
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, symlinkSync } from 'node:fs';
import { availableParallelism, cpus, homedir, release, totalmem } from 'node:os';
import { join } from 'node:path';
import { type DecoderSpec, type Dtype, native } from '../lib/native';

export const root = join(__dirname, '..');

/** Wrong usage or a child that failed: one line on stderr, no stack. */
export class BenchmarkError extends Error {
  constructor(
    message: string,
    readonly exitCode: 1 | 2,
  ) {
    super(message);
  }
}

/** Runs a benchmark's main function; what it throws ends the process with one line. */
export function runMain(main: () => Promise<void>): void {
  main().catch((error: Error & { code?: unknown }) => {
    console.error(`benchmark: ${error.message}`);
    const usage = typeof error.code === 'string' && error.code.startsWith('ERR_PARSE_ARGS');
    process.exitCode = error instanceof BenchmarkError ? error.exitCode : usage ? 2 : 1;
  });
}

export function positiveInteger(name: string, value: string): number {
  const number = Number(value);
  if (Number.isInteger(number) && number > 0) return number;
  throw new BenchmarkError(`Expected positive integer for --${name} but received ${JSON.stringify(value)}`, 2);
}

export function nonNegativeInteger(name: string, value: string): number {
  return value === '0' ? 0 : positiveInteger(name, value);
}

export function dtypeList(value: string): Dtype[] {
  return value.split(',').map((dtype) => {
    if (dtype === 'float32' || dtype === 'bfloat16') return dtype;
    throw new BenchmarkError(`Expected float32 or bfloat16 for --dtype but received ${JSON.stringify(dtype)}`, 2);
  });
}

/** The folder that was named, else the one that ../shared/tools/smollm2.sh makes; undefined where that has not been made. */
export function modelFolder(named: string | undefined): string | undefined {
  const folder = named ?? join(homedir(), '.cache/lora-da/SmolLM2-135M-Instruct');
  if (existsSync(join(folder, 'config.json'))) return folder;
  if (named === undefined) return undefined;
  throw new BenchmarkError(`--model ${named} has no config.json`, 2);
}

export const noModel = 'skipped: no model; make one with ../shared/tools/smollm2.sh or name a folder with --model';

export interface Peer {
  python: string;
  /** Version of each package. */
  versions: Record<string, string>;
}

const peerPackages = ['torch', 'transformers', 'peft'];

/** The Python of LORA_DA_PEER_PYTHON, else of .peers/venv; undefined where it lacks one of the peer's packages. */
export function findPeer(): Peer | undefined {
  const python = process.env.LORA_DA_PEER_PYTHON ?? join(root, '.peers/venv/bin/python');
  const script = `import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))`;
  const { status, stdout } = spawnSync(python, ['-c', script, ...peerPackages], { encoding: 'utf8' });
  return status === 0 ? { python, versions: JSON.parse(stdout) } : undefined;
}

export const peerHint = 'install it with `bash benchmarks/peers.sh`, or name a Python with LORA_DA_PEER_PYTHON';

/** Options of a child process; undefined and false ones are left out. */
export type ChildOptions = Record<string, string | number | boolean | undefined>;

function childArguments(options: ChildOptions): string[] {
  return Object.entries(options).flatMap(([name, value]) => {
    if (value === undefined || value === false) return [];
    return value === true ? [`--${name}`] : [`--${name}`, String(value)];
  });
}

/** Runs a program to its end and returns the JSON object on the last line of its output. */
function runChild<T>(program: string, args: string[]): T {
  const { status, signal, stdout, stderr, error } = spawnSync(program, args, {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 1 << 28,
  });
  if (error || status !== 0) {
    const why =
      error?.message ?? `${signal ?? `exit status ${status}`}\n${stderr.trimEnd().split('\n').slice(-8).join('\n')}`;
    throw new BenchmarkError(`${args.find((arg) => /\.(js|py)$/.test(arg)) ?? program}: ${why}`, 1);
  }
  return JSON.parse(stdout.trimEnd().split('\n').at(-1)!);
}

let compiled: string | undefined;

/**
 * The folder with our sides (`*_ours.ts`) and lib/ as JavaScript, which is what a user's process runs: a loader that compiles
 * TypeScript as it goes takes 50 MB there.
 */
function compileOurs(): string {
  if (compiled) return compiled;
  const folder = join(root, 'build/js');
  const compiler = join(root, 'node_modules/typescript/bin/tsc');
  const { status, stdout } = spawnSync(process.execPath, [compiler, '-p', join(root, 'benchmarks')], {
    encoding: 'utf8',
  });
  if (status !== 0) throw new BenchmarkError(`compiling benchmarks/*_ours.ts: ${stdout.trimEnd()}`, 1);
  if (!existsSync(join(folder, 'build'))) symlinkSync('..', join(folder, 'build')); // where the add-on is
  compiled = join(folder, 'benchmarks');
  return compiled;
}

/** A script of this folder in a Node.js of its own, so that its peak memory is its own. */
export function runNode<T>(script: string, options: ChildOptions): T {
  const file = join(compileOurs(), script.replace(/\.ts$/, '.js'));
  return runChild(process.execPath, [file, ...childArguments(options)]);
}

/** A script of this folder in the peer's Python. */
export function runPython<T>(peer: Peer, script: string, options: ChildOptions): T {
  return runChild(peer.python, [join(__dirname, script), ...childArguments(options)]);
}

/** Threads that our side takes for --threads, 0 being its own choice. */
export function engineThreads(threads: number): number {
  return threads > 0 ? threads : native().info().threads;
}

/** Where the figures come from: machine, versions, threads. */
export function describeMachine(threads: number, peer: Peer | undefined): Record<string, string> {
  const info = native().info();
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string };
  const list = (versions: Record<string, string>) =>
    Object.entries(versions)
      .map(([name, version]) => `${name} ${version}`)
      .join(', ');
  const memory = `${(totalmem() / 1e9).toFixed(0)} GB`;
  return {
    date: new Date().toISOString().slice(0, 10),
    machine: `${cpus()[0]?.model.trim()}, ${availableParallelism()} logical CPUs, ${memory}, ${process.platform} ${release()}`,
    threads: threads > 0 ? String(threads) : `each side's own choice (lora-da: ${info.threads})`,
    'lora-da': `${version}, ${info.isa}, ${list(info.libraries)}, Node.js ${process.versions.node}`,
    peer: peer ? list(peer.versions) : `skipped: ${peerHint}`,
  };
}

export function describeModel({ model, spec }: { model: string; spec: DecoderSpec }): string {
  return `${model} (${spec.family}, ${spec.layers} layers, hidden ${spec.hiddenSize})`;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((x, y) => x - y);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

export const gigabytes = (bytes: number) => `${(bytes / 1e9).toFixed(2)} GB`;

/** Rows of cells in columns: the first to the left, the others to the right. */
export function table(rows: readonly (readonly string[])[]): string {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)));
  const cell = (text: string, column: number) =>
    column === 0 ? text.padEnd(widths[column]!) : text.padStart(widths[column]!);
  return rows.map((row) => `  ${row.map(cell).join('  ').trimEnd()}`).join('\n');
}

export function heading(pairs: Record<string, string>): string {
  const width = Math.max(...Object.keys(pairs).map((name) => name.length));
  return Object.entries(pairs)
    .map(([name, value]) => `${name.padEnd(width)}  ${value}`)
    .join('\n');
}
