import { type Command, Option } from 'commander';

/** How a flag's text becomes a value; what is no number stays text, for the schema to refuse by name. */
const parsers: Record<'number' | 'gigabytes' | 'text' | 'modules' | 'ids', (text: string) => unknown> = {
  number: (text: string) => (text.trim() !== '' && Number.isFinite(Number(text)) ? Number(text) : text),
  gigabytes: (text: string) => (Number(text) > 0 && Number.isFinite(Number(text)) ? Number(text) * 1e9 : text),
  text: (text: string) => text,
  modules: (text: string) => (text === 'all-linear' ? text : names(text)),
  ids: (text: string) => names(text).map((id) => parsers.number(id)),
};

const names = (text: string) => text.split(',').map((name) => name.trim());

/** Options whose flag is not just their name in kebab-case. */
const flagNames: Record<string, string> = {
  learningRate: '--lr',
  shuffle: '--no-shuffle',
  normalizeDelta: '--no-normalize-delta',
};

/** `batchSize` → `--batch-size`: what an option is called on the command line. */
export function flagOf(key: string): string {
  return flagNames[key] ?? `--${key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
}

type Flag = [flags: string, description: string, parser?: keyof typeof parsers];

const engine: Flag[] = [
  ['--model <dir>', 'Hugging Face model folder'],
  ['--device <name>', 'auto, cpu, cuda or cuda:N (default auto: CUDA where it can be used)'],
  ['--threads <n>', 'threads of the engine on the CPU (default: physical cores)', 'number'],
];

const model: Flag[] = [
  ...engine,
  ['--dtype <type>', 'auto, float32 or bfloat16 (default auto: bfloat16 where the device multiplies it)'],
];

const prepack: Flag[] = [
  ['--prepack', 'lay the weights out once as each product reads them: faster steps, more memory'],
];

const data: Flag[] = [
  ['--max-length <n>', 'tokens of a row at most (default 1024)', 'number'],
  ['--overlong <rule>', 'rows over it: truncate, drop or error (default truncate)'],
  ['--train-on <part>', 'tokens that are labels: completion, assistant or all (default completion)'],
];

const lora: Flag[] = [
  ['--rank <n>', 'rank r (default 8)', 'number'],
  ['--alpha <x>', 'alpha (default 16)', 'number'],
  ['--rslora', 'scaling = alpha/√r (default)'],
  ['--no-rslora', 'scaling = alpha/r'],
  ['--target-modules <list>', 'all-linear (default) or names, comma-separated', 'modules'],
];

const statistics: Flag[] = [
  ['--samples <n>', 'rows that the initialization looks at (default 256)', 'number'],
  ['--token-mask <mask>', 'tokens that it counts: attention or labels (default attention)'],
  ['--population <n>', 'number of training samples N (default: the rows of the data)', 'number'],
  ['--variance-weight <x>', 'weight of the sampling noise in Ω (default 0.03)', 'number'],
  ['--bias-weight <x>', 'weight of the displacement in Ω (default 1)', 'number'],
  ['--gamma <x>', 'A and B are each divided by √gamma (default 1024)', 'number'],
  ['--damping <x>', 'added to the diagonal of Z (default 1e-6)', 'number'],
  ['--output-damping <x>', 'added to ydiag (default: damping)', 'number'],
  ['--normalize-delta', 'divide Δ by its largest singular value (default)'],
  ['--no-normalize-delta', 'leave Δ as it is'],
  ['--plan <order>', 'of its collection: auto, sample-major or layer-major (default auto: by memory)'],
  ['--memory-budget <gb>', 'GB that the process may hold meanwhile (default: 80 % of what is free)', 'gigabytes'],
];

const seed: Flag[] = [['--seed <n>', 'of everything random (default 42)', 'number']];
const adapter: Flag[] = [['--adapter <dir>', 'PEFT adapter folder']];

const training: Flag[] = [
  ['--batch-size <n>', 'rows of a micro-batch (default 8)', 'number'],
  ['--grad-accum <n>', 'micro-batches of an optimizer step (default 1)', 'number'],
  ['--epochs <n>', 'passes over the data (default 1)', 'number'],
  ['--max-steps <n>', 'optimizer steps, in place of --epochs', 'number'],
  ['--lr <x>', 'learning rate (default 2e-4)', 'number'],
  ['--scheduler <name>', 'cosine, linear or constant (default cosine)'],
  ['--warmup-steps <n>', 'steps in which the rate rises from 0', 'number'],
  ['--warmup-ratio <x>', 'the same as a part of all steps (default 0.03)', 'number'],
  ['--weight-decay <x>', "AdamW's decay (default 0)", 'number'],
  ['--max-grad-norm <x>', 'clip the gradient to this norm; 0: never (default 1)', 'number'],
  ['--shuffle', 'shuffle the rows anew each epoch (default)'],
  ['--no-shuffle', 'take the rows in file order'],
  ['--balance', 'deal the rows out to batches of about the same number of tokens'],
  ['--eval-data <file>', 'rows held out'],
  ['--eval-steps <n>', 'steps between evaluations (default: an epoch)', 'number'],
  ['--early-stop <n>', 'stop after n evaluations without a better loss, keep the best', 'number'],
  ['--save-steps <n>', 'steps between checkpoints (default 100)', 'number'],
  ['--keep-checkpoints <n>', 'newest checkpoints to keep (default 2)', 'number'],
  ['--resume', 'go on from the newest checkpoint in --out; without one, start afresh'],
  ['--recompute <what>', 'none or layer: less memory, more time (default none)'],
  ['--dry-run', 'say what the run will need in memory and time, then stop'],
];

const common: Flag[] = [
  ['--json', 'print one JSON object as the last line of stdout'],
  ['--debug', 'print the stack of an error'],
];

/** The commands, what they say of themselves, and their flags. */
export const commands: Record<string, { description: string; flags: Flag[] }> = {
  train: {
    description: 'train a LoRA adapter on a file of examples',
    flags: [
      ...model,
      ...prepack,
      ['--data <file>', 'examples to train on'],
      ['--out <dir>', 'run folder: adapter, metrics, report, checkpoints'],
      ['--init <name>', 'start of the adapter (default lora-da; none with --adapter)'],
      ['--adapter <dir>', 'PEFT adapter folder to go on training'],
      ['--config <file>', 'JSON with these options in camelCase; flags win'],
      ...lora,
      ...training,
      ...data,
      ...statistics,
      ...seed,
    ],
  },
  init: {
    description: 'start an adapter from data, without training it',
    flags: [
      ...model,
      ...prepack,
      ['--data <file>', 'examples of the task'],
      ['--out <dir>', 'adapter folder to write'],
      ['--init <name>', 'lora-da (default), kaiming, gaussian, orthogonal, …'],
      ...lora,
      ...statistics,
      ...data,
      ...seed,
    ],
  },
  eval: {
    description: 'loss over the label tokens of a file of examples',
    flags: [...model, ...adapter, ['--data <file>', 'examples'], ['--per-example', "each row's loss too"], ...data],
  },
  generate: {
    description: 'continue a text',
    flags: [
      ...model,
      ...adapter,
      ['--prompt <text>', 'what a user says; goes through the chat template where there is one'],
      ['--messages <file>', 'JSON file with a list of {role, content}'],
      ['--raw <text>', 'text as it is'],
      ['--input-ids <list>', 'token ids, comma-separated', 'ids'],
      ['--max-new-tokens <n>', 'tokens to make at most (default 128)', 'number'],
      ['--temperature <x>', '0: greedy (default 0)', 'number'],
      ['--top-p <x>', 'sample from the likeliest tokens of this probability together (default 1)', 'number'],
      ...seed,
    ],
  },
  merge: {
    description: 'write the base model with the adapter in its weights',
    flags: [...engine, ...adapter, ['--out <dir>', 'model folder to write']],
  },
  info: { description: 'devices, libraries, build', flags: [] },
};

/** Adds the flags of a command and the common ones. */
export function addFlags(command: Command, flags: Flag[]): void {
  for (const [text, description, parser = 'text'] of [...flags, ...common]) {
    const option = new Option(text, description);
    if (option.required) option.argParser<unknown>(parsers[parser]);
    command.addOption(option);
  }
}

/** The options that were given on the command line, without commander's defaults, under the names of the API. */
export function givenOptions(command: Command): Record<string, unknown> {
  const given: Record<string, unknown> = {};
  for (const [key, value] of Object.entries(command.opts())) {
    if (command.getOptionValueSource(key) === 'cli') given[key === 'lr' ? 'learningRate' : key] = value;
  }
  return given;
}
