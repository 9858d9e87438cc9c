import { type ChildProcess, spawn } from 'node:child_process';
import { join } from 'node:path';

const root = join(__dirname, '..');

/** How a run of the command line ended. */
export interface CliResult {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

/** Options of {@link startCli}. */
export interface CliOptions {
  /** Environment on top of this process's. */
  env?: Record<string, string>;
  /** Use the toy core (default true). */
  fake?: boolean;
}

/** Starts the command line from its sources, by default with the toy core of fake_native.ts. */
export function startCli(args: string[], options: CliOptions = {}): { child: ChildProcess; ended: Promise<CliResult> } {
  const { env = {}, fake = true } = options;
  const preload = fake ? ['--require', join(root, 'test/fake_native.ts')] : [];
  const child = spawn(process.execPath, ['--require', 'tsx/cjs', ...preload, join(root, 'lib/cli.ts'), ...args], {
    cwd: root,
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout!.on('data', (text) => {
    stdout += text;
  });
  child.stderr!.on('data', (text) => {
    stderr += text;
  });
  const ended = new Promise<CliResult>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code, signal) => resolve({ code, signal, stdout, stderr }));
  });
  return { child, ended };
}

/** Runs the command line to its end. */
export function runCli(args: string[], options?: CliOptions): Promise<CliResult> {
  return startCli(args, options).ended;
}

/** The object of --json: the last line of stdout. */
export function jsonOf({ stdout }: CliResult): Record<string, unknown> {
  return JSON.parse(stdout.trimEnd().split('\n').at(-1)!) as Record<string, unknown>;
}
