import type { Progress } from '../progress';

/** What a command gets beside its options. */
export interface CommandContext {
  /** Fires on the first SIGINT. */
  signal: AbortSignal;
  /** On stderr. */
  progress: Progress;
  /** A line of the answer, on stdout; silent with --json. */
  print(line: string): void;
}

/** A command: options as given on the command line in, the object of --json out. */
export type CommandFunction = (given: Record<string, unknown>, context: CommandContext) => Promise<object>;
