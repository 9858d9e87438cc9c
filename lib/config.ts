import { z } from 'zod';
import { describe } from './arguments';
import { type ErrorCode, LoraDaError } from './errors';
import { readJsonObject } from './files';

/** Course of the learning rate after warm-up. */
export type LearningRateSchedule = 'cosine' | 'linear' | 'constant';

const positiveInteger = 'positive integer';
const wholeNumber = 'integer of 0 or more';
const positiveNumber = 'number greater than 0';
const nonNegativeNumber = 'number of 0 or more';

const text = (what = 'non-empty string') => z.string().min(1).describe(what);
const integerFrom = (minimum: number) => z.int().min(minimum);
const oneOf = <const T extends [string, ...string[]]>(values: T) => z.enum(values);
const listed = (values: string[]) => `one of ${values.join(', ')}`;

const dtypes = ['auto', 'float32', 'bfloat16'] as ['auto', 'float32', 'bfloat16'];
const schedules = ['cosine', 'linear', 'constant'] as ['cosine', 'linear', 'constant'];
const overlongRules = ['truncate', 'drop', 'error'] as ['truncate', 'drop', 'error'];
const trainedParts = ['completion', 'assistant', 'all'] as ['completion', 'assistant', 'all'];
const tokenMasks = ['attention', 'labels'] as ['attention', 'labels'];
const collectionPlans = ['auto', 'sample-major', 'layer-major'] as ['auto', 'sample-major', 'layer-major'];
const recomputeRules = ['none', 'layer'] as ['none', 'layer'];

// Every field ends in describe(): what it expects, in the words of its error message.

const modelFields = {
  model: text('path of a Hugging Face model folder'),
  dtype: oneOf(dtypes).default('auto').describe(listed(dtypes)),
  device: z
    .string()
    .regex(/^(auto|cpu|cuda(:\d+)?)$/)
    .default('auto')
    .describe('one of auto, cpu, cuda, cuda:N'),
  threads: integerFrom(0).default(0).describe(wholeNumber),
};

const prepackField = { prepack: z.boolean().default(false).describe('boolean') };

const loraFields = {
  rank: integerFrom(1).default(8).describe(positiveInteger),
  alpha: z.number().positive().default(16).describe(positiveNumber),
  rslora: z.boolean().default(true).describe('boolean'),
  targetModules: z
    .union([z.literal('all-linear'), z.array(z.string().min(1)).min(1)])
    .default('all-linear')
    .describe("'all-linear' or a list of module names"),
};

const seedField = { seed: integerFrom(0).default(42).describe(wholeNumber) };

const dataFields = {
  maxLength: integerFrom(1).default(1024).describe(positiveInteger),
  overlong: oneOf(overlongRules).default('truncate').describe(listed(overlongRules)),
  trainOn: oneOf(trainedParts).default('completion').describe(listed(trainedParts)),
};

const statisticsFields = {
  samples: integerFrom(1).default(256).describe(positiveInteger),
  tokenMask: oneOf(tokenMasks).default('attention').describe(listed(tokenMasks)),
  population: integerFrom(1).optional().describe(positiveInteger),
  varianceWeight: z.number().min(0).default(0.03).describe(nonNegativeNumber),
  biasWeight: z.number().min(0).default(1).describe(nonNegativeNumber),
  gamma: z.number().positive().default(1024).describe(positiveNumber),
  damping: z.number().min(0).default(1e-6).describe(nonNegativeNumber),
  outputDamping: z.number().min(0).optional().describe(nonNegativeNumber),
  normalizeDelta: z.boolean().default(true).describe('boolean'),
  plan: oneOf(collectionPlans).default('auto').describe(listed(collectionPlans)),
  memoryBudget: z.number().positive().optional().describe(positiveNumber),
};

const trainingFields = {
  batchSize: integerFrom(1).default(8).describe(positiveInteger),
  gradAccum: integerFrom(1).default(1).describe(positiveInteger),
  epochs: integerFrom(1).optional().describe(positiveInteger),
  maxSteps: integerFrom(1).optional().describe(positiveInteger),
  learningRate: z.number().min(0).default(2e-4).describe(nonNegativeNumber),
  scheduler: oneOf(schedules).default('cosine').describe(listed(schedules)),
  warmupSteps: integerFrom(0).optional().describe(wholeNumber),
  warmupRatio: z.number().min(0).max(1).optional().describe('number of 0 to 1'),
  weightDecay: z.number().min(0).default(0).describe(nonNegativeNumber),
  maxGradNorm: z.number().min(0).default(1).describe(nonNegativeNumber),
  shuffle: z.boolean().default(true).describe('boolean'),
  balance: z.boolean().default(false).describe('boolean'),
  evalSteps: integerFrom(1).optional().describe(positiveInteger),
  earlyStop: integerFrom(1).optional().describe(positiveInteger),
  saveSteps: integerFrom(1).default(100).describe(positiveInteger),
  keepCheckpoints: integerFrom(1).default(2).describe(positiveInteger),
  recompute: oneOf(recomputeRules).default('none').describe(listed(recomputeRules)),
  ...seedField,
};

/** Options of {@link CausalLM.load} as the schema sees them. */
export const modelSchema = z.strictObject({
  dtype: modelFields.dtype,
  device: modelFields.device,
  threads: modelFields.threads,
  ...prepackField,
});
/** Options of {@link CausalLM.addLora}. */
export const loraSchema = z.strictObject(loraFields);
/** Options of {@link LoraAdapter.initialize}, without the method. */
export const initializationSchema = z.strictObject({
  method: text('name of an initialization').default('lora-da').describe('name of an initialization'),
  ...statisticsFields,
  ...seedField,
});
/** Options of {@link Trainer} that say how to train. */
export const trainingSchema = z.strictObject(trainingFields);

const initField = text('name of an initialization').optional().describe('name of an initialization');

/** Everything `lora-da train` and its --config file understand. */
export const trainSchema = z.strictObject({
  ...modelFields,
  ...prepackField,
  data: text('path of a data file'),
  out: text('path of a folder'),
  init: initField,
  adapter: text().optional().describe('path of an adapter folder'),
  ...loraFields,
  ...dataFields,
  ...statisticsFields,
  ...trainingFields,
  evalData: text().optional().describe('path of a data file'),
  resume: z.boolean().default(false).describe('boolean'),
  dryRun: z.boolean().default(false).describe('boolean'),
});

/** Everything `lora-da init` understands. */
export const initSchema = z.strictObject({
  ...modelFields,
  ...prepackField,
  data: text().optional().describe('path of a data file'),
  out: text('path of a folder'),
  init: text('name of an initialization').default('lora-da').describe('name of an initialization'),
  ...loraFields,
  ...dataFields,
  ...statisticsFields,
  ...seedField,
});

/** Everything `lora-da eval` understands. */
export const evalSchema = z.strictObject({
  ...modelFields,
  ...dataFields,
  data: text('path of a data file'),
  adapter: text().optional().describe('path of an adapter folder'),
  perExample: z.boolean().default(false).describe('boolean'),
});

const generationFields = {
  maxNewTokens: integerFrom(1).default(128).describe(positiveInteger),
  temperature: z.number().min(0).default(0).describe(nonNegativeNumber),
  topP: z.number().gt(0).max(1).default(1).describe('number greater than 0, at most 1'),
  ...seedField,
};

/** Options of {@link CausalLM.generate} that say how to sample. */
export const generationSchema = z.strictObject(generationFields);

/** Everything `lora-da generate` understands. */
export const generateSchema = z.strictObject({
  ...modelFields,
  adapter: text().optional().describe('path of an adapter folder'),
  prompt: z.string().optional().describe('string'),
  raw: z.string().optional().describe('string'),
  messages: text().optional().describe('path of a JSON file of messages'),
  inputIds: z.array(integerFrom(0)).min(1).optional().describe('comma-separated token ids of 0 or more'),
  ...generationFields,
});

/** Everything `lora-da merge` understands. */
export const mergeSchema = z.strictObject({
  model: modelFields.model,
  device: modelFields.device,
  threads: modelFields.threads,
  adapter: text('path of an adapter folder'),
  out: text('path of a folder'),
});

/** The resolved options of `lora-da train`. */
export type TrainConfig = z.output<typeof trainSchema>;
/** The resolved options of how to train. */
export type TrainingConfig = z.output<typeof trainingSchema>;
/** The resolved options of an initialization. */
export type InitializationConfig = z.output<typeof initializationSchema>;

/** How errors of {@link parseOptions} speak: their code, and what a field is called where the user wrote it. */
export interface OptionSource {
  code?: ErrorCode;
  /** `batchSize` → `--batch-size` on the command line. */
  nameOf?: (key: string) => string;
  /** Ends the message: ` in run.json`. */
  where?: string;
}

/**
 * Checks options against a schema and fills in the defaults.
 *
 * @throws {LoraDaError} `INVALID_ARGUMENT` (or the source's code): *Expected positive integer for batchSize but received -1 of type number*
 */
export function parseOptions<T extends z.ZodObject>(
  schema: T,
  options: unknown,
  source: OptionSource = {},
): z.output<T> {
  const { code = 'INVALID_ARGUMENT', nameOf = (key) => key, where = '' } = source;
  const parsed = schema.safeParse(options, { reportInput: true });
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  if (issue.code === 'unrecognized_keys') {
    throw new LoraDaError(code, `Unknown option ${nameOf(issue.keys[0]!)}${where}`);
  }
  const key = String(issue.path[0] ?? '');
  if (key === '')
    throw new LoraDaError(code, `Expected an object of options but received ${describe(options)}${where}`);
  const what = descriptionOf(schema.shape[key]);
  const value = (options as Record<string, unknown>)[key];
  const received = value === undefined ? 'nothing' : describe(value);
  throw new LoraDaError(code, `Expected ${what} for ${nameOf(key)} but received ${received}${where}`);
}

/** What a field expects; optional() of partial() hides the description of the schema inside. */
function descriptionOf(schema: unknown): string {
  if (schema instanceof z.ZodOptional) return schema.description ?? descriptionOf(schema.unwrap());
  return schema instanceof z.ZodType ? (schema.description ?? 'another value') : 'another value';
}

/** Options of which one replaces the other: the one given nearer to the user wins. */
const alternatives: [string, string][] = [
  ['epochs', 'maxSteps'],
  ['warmupSteps', 'warmupRatio'],
];

/** Names of the command line that a configuration file may use too. */
const aliases: Record<string, string> = { lr: 'learningRate' };

function refuseBoth(options: Record<string, unknown>, source: OptionSource): void {
  const { code = 'INVALID_ARGUMENT', nameOf = (key: string) => key, where = '' } = source;
  for (const [one, other] of alternatives) {
    if (options[one] !== undefined && options[other] !== undefined) {
      throw new LoraDaError(code, `Expected either ${nameOf(one)} or ${nameOf(other)} but received both${where}`);
    }
  }
}

/**
 * Options of `train` from a configuration file and from flags; flags win.
 *
 * @param flags   options given on the command line; undefined ones count as not given
 * @param file    path of a JSON file with the same names, optional
 * @param nameOf  what an option is called on the command line
 * @returns the options with defaults, and the names of those that were given
 * @throws {LoraDaError} `INVALID_ARGUMENT` for a flag, `INVALID_CONFIG` for the file: names the option;
 *   `FILE_NOT_FOUND`, `INVALID_FILE` when the file is not a JSON object
 *
 * @example
 * ```ts
 * const { config } = await resolveTrainConfig({ model: 'models/SmolLM2-135M', data: 'train.jsonl', out: 'out' }, 'run.json');
 * ```
 */
export async function resolveTrainConfig(
  flags: Record<string, unknown>,
  file?: string,
  nameOf?: (key: string) => string,
): Promise<{ config: TrainConfig; given: Set<string> }> {
  const given = Object.fromEntries(Object.entries(flags).filter(([, value]) => value !== undefined));
  const flagSource: OptionSource = { nameOf };
  refuseBoth(given, flagSource);
  const fromFile = file === undefined ? {} : await readConfigFile(file);
  for (const [one, other] of alternatives) {
    if (given[one] !== undefined) delete fromFile[other];
    if (given[other] !== undefined) delete fromFile[one];
  }
  const all = { ...fromFile, ...given };
  return { config: parseOptions(trainSchema, all, flagSource), given: new Set(Object.keys(all)) };
}

async function readConfigFile(file: string): Promise<Record<string, unknown>> {
  const source: OptionSource = { code: 'INVALID_CONFIG', where: ` in ${file}` };
  const options: Record<string, unknown> = {};
  for (const [key, value] of Object.entries(await readJsonObject(file))) {
    const name = aliases[key] ?? key;
    if (name in options) throw new LoraDaError('INVALID_CONFIG', `Option ${name} is given twice in ${file}`);
    options[name] = value;
  }
  parseOptions(trainSchema.partial(), options, source);
  refuseBoth(options, source);
  return options;
}
