import type { CausalLM } from '../causal_lm';
import { resolveTrainConfig, type TrainConfig } from '../config';
import type { Dataset } from '../dataset';
import { LoraDaError } from '../errors';
import {
  describePlan,
  type InitializationOptions,
  keepFactors,
  needsData,
  phaseNames,
  summarizeInitialization,
} from '../initializations';
import type { LoraAdapter } from '../lora_adapter';
import { estimateRun, type RunEstimate } from '../memory';
import { formatDuration } from '../progress';
import { checkRunFolder } from '../run_folder';
import { Trainer, type TrainResult } from '../trainer';
import type { CommandContext } from './context';
import { flagOf } from './flags';
import { loadData, withModel } from './load';

/** `lora-da train` */
export async function train(given: Record<string, unknown>, context: CommandContext): Promise<object> {
  const { config: file, ...flags } = given;
  const resolved = await resolveTrainConfig(flags, file as string | undefined, flagOf);
  const config = { ...resolved.config, init: startOf(resolved.config) };
  needsData(config.init);
  if (!config.dryRun) await checkRunFolder(config.out, config.resume);
  return withModel(config, context, async (model) => {
    const adapter = await addAdapter(model, config, resolved.given);
    const data = await loadData(config.data, config, model, context);
    const evalData =
      config.evalData === undefined ? undefined : await loadData(config.evalData, config, model, context);
    try {
      const trainer = makeTrainer(model, adapter, config, data, evalData);
      if (config.dryRun) return await dryRun(model, trainer, config, { data, evalData }, context);
      return await runTrainer(trainer, context);
    } finally {
      await data.dispose();
      await evalData?.dispose();
    }
  });
}

type Config = TrainConfig & { init: string };

/** LoRA-DA, unless there is an adapter to go on with. */
function startOf({ init, adapter }: TrainConfig): string {
  if (adapter === undefined) return init ?? 'lora-da';
  if (init !== undefined && init !== keepFactors) {
    throw new LoraDaError(
      'INVALID_ARGUMENT',
      `Expected none for --init, as --adapter gives the start, but received ${JSON.stringify(init)}`,
    );
  }
  return keepFactors;
}

async function addAdapter(model: CausalLM, config: Config, given: Set<string>): Promise<LoraAdapter> {
  if (config.adapter === undefined) return model.addLora(pick(config, ['rank', 'alpha', 'rslora', 'targetModules']));
  const adapter = await model.loadAdapter(config.adapter);
  for (const key of ['rank', 'alpha', 'rslora'] as const) {
    if (given.has(key) && config[key] !== adapter[key]) {
      throw new LoraDaError(
        'INVALID_ARGUMENT',
        `Expected ${adapter[key]} for ${flagOf(key)}, as ${config.adapter} says, but received ${config[key]}`,
      );
    }
  }
  return adapter;
}

function makeTrainer(
  model: CausalLM,
  adapter: LoraAdapter,
  config: Config,
  data: Dataset,
  evalData: Dataset | undefined,
): Trainer {
  const training = pick(config, [
    ...([
      'batchSize',
      'gradAccum',
      'epochs',
      'maxSteps',
      'learningRate',
      'scheduler',
      'warmupSteps',
      'warmupRatio',
    ] as const),
    ...([
      'weightDecay',
      'maxGradNorm',
      'seed',
      'shuffle',
      'balance',
      'evalSteps',
      'earlyStop',
      'saveSteps',
      'keepCheckpoints',
    ] as const),
    ...(['recompute', 'out', 'resume'] as const),
  ]);
  const initialize = initializationOf(config, data);
  return new Trainer(model, {
    ...training,
    data,
    evalData,
    initialize,
    config: asResolved(model, adapter, config, initialize),
  });
}

function initializationOf(config: Config, data: Dataset): InitializationOptions {
  const statistics = pick(config, [
    'samples',
    'tokenMask',
    'varianceWeight',
    'biasWeight',
    'gamma',
    'damping',
    'normalizeDelta',
    'plan',
    'memoryBudget',
  ]);
  return {
    method: config.init,
    ...statistics,
    population: config.population ?? data.length,
    outputDamping: config.outputDamping ?? config.damping,
    seed: config.seed,
  };
}

/** The run folder's config.json: every option with the value that counted; good for --config. */
function asResolved(model: CausalLM, adapter: LoraAdapter, config: Config, initialize: InitializationOptions): object {
  const { resume: _, dryRun: __, ...rest } = config;
  const { population, outputDamping } = initialize;
  const { device, dtype, threads } = model.info;
  return {
    ...rest,
    device,
    dtype,
    threads,
    ...pick(adapter, ['rank', 'alpha', 'rslora']),
    targetModules: [...adapter.targetModules],
    ...(rest.maxSteps === undefined ? { epochs: rest.epochs ?? 1 } : {}),
    ...(rest.warmupSteps === undefined ? { warmupRatio: rest.warmupRatio ?? 0.03 } : {}),
    population,
    outputDamping,
  };
}

async function runTrainer(trainer: Trainer, context: CommandContext): Promise<object> {
  followTrainer(trainer, context);
  const result = await trainer.train({ signal: context.signal });
  context.progress.end();
  for (const line of summaryLines(result)) context.print(line);
  const { initialization, ...rest } = result;
  return {
    ...rest,
    initialization: initialization && {
      ...pick(initialization, ['method', 'samples', 'collection', 'collectSeconds', 'solveSeconds']),
      modules: initialization.modules.length,
    },
  };
}

/** Shows what happens as it happens. */
function followTrainer(trainer: Trainer, { progress }: CommandContext): void {
  let phase = '';
  const during = (name: string, total: number) => {
    if (phase !== name) progress.begin(name, total);
    phase = name;
  };
  const line = (text: string) => {
    progress.line(text);
    phase = '';
  };
  trainer.on('initializationPlan', (plan) => line(describePlan(plan)));
  trainer.on('initializationProgress', ({ phase: part, done, total }) => {
    during(phaseNames[part], total);
    progress.update(done);
  });
  trainer.on('initialization', (report) => line(`Initialization: ${summarizeInitialization(report)}`));
  trainer.on('start', ({ step, totalSteps, resumed }) => {
    if (resumed) line(`Going on after step ${step} of ${totalSteps}`);
  });
  trainer.on('step', ({ step, totalSteps, loss, tokensPerSecond }) => {
    during('training', totalSteps);
    progress.update(step, `loss ${loss.toFixed(4)} · ${Math.round(tokensPerSecond)} tokens/s`);
  });
  trainer.on('evaluationProgress', ({ done, total }) => {
    during('evaluating', total);
    progress.update(done);
  });
  trainer.on('evaluation', ({ step, loss, perplexity, best }) =>
    line(
      `Step ${step}: held-out loss ${loss.toFixed(4)}, perplexity ${perplexity.toFixed(3)}${best && step > 0 ? ' (best)' : ''}`,
    ),
  );
  trainer.on('warning', (text) => line(`Warning: ${text}`));
}

function summaryLines({
  steps,
  epochs,
  loss,
  tokens,
  seconds,
  reason,
  evaluation,
  initialization,
  out,
  report,
}: TrainResult): string[] {
  const lines: string[] = [];
  if (initialization) lines.push(`Initialization: ${summarizeInitialization(initialization)}`);
  const end = reason === 'early-stop' ? ', stopped early,' : '';
  const last = loss === null ? '' : `; last step's loss ${loss.toFixed(4)}`;
  lines.push(
    `Trained ${steps} steps (${epochs.toFixed(2)} epochs)${end} with ${tokens} tokens in ${formatDuration(seconds)}${last}`,
  );
  if (evaluation) {
    const { first, last: final, best } = evaluation;
    lines.push(
      `Held-out loss ${first.loss.toFixed(4)} → ${final.loss.toFixed(4)} (perplexity ${first.perplexity.toFixed(3)} → ${final.perplexity.toFixed(3)}); best ${best.loss.toFixed(4)} at step ${best.step}`,
    );
  }
  lines.push(`Adapter: ${out}`, `Report: ${report}`);
  return lines;
}

async function dryRun(
  model: CausalLM,
  trainer: Trainer,
  config: Config,
  { data, evalData }: { data: Dataset; evalData: Dataset | undefined },
  { print }: CommandContext,
): Promise<RunEstimate> {
  const samples = needsData(config.init) ? config.samples : 0;
  const initialize = initializationOf(config, data);
  const estimate = await estimateRun(model, trainer, data, { samples, initialize, evalData });
  const { memory, seconds } = estimate;
  const size = (bytes: number) => `${(bytes / 2 ** 20).toFixed(0)} MiB`;
  print(
    `Memory  ${size(memory.total)}: weights ${size(memory.weights)}, activations ${size(memory.activations)}, adapters ${size(memory.adapters)}, workspace ${size(memory.workspace)}${freeBeside(memory, size)}`,
  );
  if (memory.initialization) print(`Start   ${describePlan(memory.initialization)}`);
  print(
    `Time    ${formatDuration(seconds.total)}: initialization ${formatDuration(seconds.initialization)}, training ${formatDuration(seconds.training)}, evaluation ${formatDuration(seconds.evaluation)} (${Math.round(estimate.tokensPerSecond)} tokens/s in a short step)`,
  );
  print(`Work    ${estimate.steps} steps over ${estimate.rows} rows, ${estimate.tokens} tokens`);
  return estimate;
}

function freeBeside({ activations, workspace, free }: RunEstimate['memory'], size: (bytes: number) => string): string {
  if (free === 0) return '';
  const enough = activations + workspace <= free;
  return `; ${size(free)} free beside the model${enough ? '' : ': not enough, a smaller --batch-size or --max-length, or --recompute layer, takes less'}`;
}

function pick<T extends object, K extends keyof T>(from: T, keys: readonly K[]): Pick<T, K> {
  return Object.fromEntries(keys.map((key) => [key, from[key]])) as Pick<T, K>;
}
