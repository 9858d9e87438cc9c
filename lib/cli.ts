#!/usr/bin/env node
import { Command, CommanderError } from 'commander';
import type { CommandContext, CommandFunction } from './commands/context';
import { addFlags, commands, givenOptions } from './commands/flags';
import { LoraDaError } from './errors';

/** Loaded when they run: `--help` needs none of them. */
const functions: Record<string, () => CommandFunction> = {
  train: () => (require('./commands/train') as typeof import('./commands/train')).train,
  init: () => (require('./commands/init') as typeof import('./commands/init')).init,
  eval: () => (require('./commands/eval') as typeof import('./commands/eval')).evaluate,
  generate: () => (require('./commands/generate') as typeof import('./commands/generate')).generate,
  merge: () => (require('./commands/merge') as typeof import('./commands/merge')).merge,
  info: () => (require('./commands/info') as typeof import('./commands/info')).info,
};

const exitCodes = { done: 0, failed: 1, wrongUsage: 2, interrupted: 130 } as const;

/**
 * Runs the command line.
 *
 * @param argv  arguments after the program's name
 * @returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted
 *
 * @example
 * ```ts
 * process.exitCode = await main(['info', '--json']);
 * ```
 */
export async function main(argv: readonly string[]): Promise<number> {
  const program = new Command('lora-da')
    .description('LoRA fine-tuning of language models, started from data (LoRA-DA)')
    .version((require('../package.json') as { version: string }).version)
    .exitOverride()
    .configureOutput({ outputError: (text, write) => write(`${oneLine(text.replace(/^error: /, 'lora-da: '))}\n`) });
  for (const [name, { description, flags }] of Object.entries(commands)) {
    const command = program.command(name).description(description).allowExcessArguments(false).exitOverride();
    command.configureOutput(program.configureOutput());
    addFlags(command, flags);
    command.action(() => execute(name, command));
  }
  try {
    await program.parseAsync(argv, { from: 'user' });
    return exitCodes.done;
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? exitCodes.done : exitCodes.wrongUsage;
    process.stderr.write(`lora-da: ${messageOf(error)}\n`);
    if (argv.includes('--debug')) process.stderr.write(`${error instanceof Error ? error.stack : String(error)}\n`);
    return exitCodeOf(error);
  }
}

async function execute(name: string, command: Command): Promise<void> {
  const { json, debug: _, ...given } = givenOptions(command);
  const { createProgress } = require('./progress') as typeof import('./progress');
  const progress = createProgress();
  const { signal, release } = interruptible(() =>
    progress.line('Stopping after the step in flight; once more to stop at once'),
  );
  const print: CommandContext['print'] = (line) => {
    if (!json) process.stdout.write(`${line}\n`);
  };
  try {
    const result = await functions[name]!()(given, { signal, progress, print });
    progress.end();
    if (json) process.stdout.write(`${JSON.stringify(result)}\n`);
  } finally {
    progress.end();
    release();
  }
}

/** The first SIGINT (or SIGTERM) asks to stop, the second ends the process at once. */
function interruptible(onFirst: () => void): { signal: AbortSignal; release(): void } {
  const controller = new AbortController();
  const interrupt = () => {
    if (controller.signal.aborted) process.exit(exitCodes.interrupted);
    onFirst();
    controller.abort();
  };
  process.on('SIGINT', interrupt).on('SIGTERM', interrupt);
  return { signal: controller.signal, release: () => process.off('SIGINT', interrupt).off('SIGTERM', interrupt) };
}

function exitCodeOf(error: unknown): number {
  if (!(error instanceof LoraDaError)) return exitCodes.failed;
  if (error.code === 'ABORTED') return exitCodes.interrupted;
  return error.code === 'INVALID_ARGUMENT' ? exitCodes.wrongUsage : exitCodes.failed;
}

function messageOf(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error);
  return oneLine(
    error instanceof Error && 'code' in error ? message : `unexpected error: ${message} (--debug shows where)`,
  );
}

function oneLine(text: string): string {
  return text.trim().replace(/\s*\n\s*/g, ' ');
}

if (require.main === module) {
  // A reader that closes the pipe early (head) is no error.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => process.exit(error.code === 'EPIPE' ? 0 : 1));
  main(process.argv.slice(2)).then((code) => {
    process.stdout.write('', () => process.exit(code));
  });
}
