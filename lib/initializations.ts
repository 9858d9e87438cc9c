import { type InitializationConfig, initializationSchema, parseOptions } from './config';
import { LoraDaError } from './errors';
import {
  type CollectionOrder,
  type CollectionPlan,
  type InitializationPhase,
  type NativeInitOptions,
  type NativeModuleReport,
  native,
} from './native';

/**
 * How {@link LoraAdapter.initialize} starts the factors. The defaults are those of the LoRA-DA paper.
 */
export interface InitializationOptions {
  /**
   * Row of the initialization table: `lora-da`, `kaiming` (PEFT's default: A uniform, B zero), `gaussian`, `orthogonal`, or
   * `none` (keep the factors of a loaded adapter; a new one starts as `kaiming`). Default `lora-da`.
   */
  method?: string;
  /** How many rows to look at, the first of the data set; 1 or more (default 256). */
  samples?: number;
  /** Tokens that the statistics count: `attention` (all, default) or `labels` (positions that predict a label). */
  tokenMask?: 'attention' | 'labels';
  /** N, the number of training samples; 1 or more (default: the rows of the data set). */
  population?: number;
  /** Weight of the sampling-noise term of Ω; 0 or more (default 0.03). */
  varianceWeight?: number;
  /** Weight of the displacement term of Ω; 0 or more (default 1). */
  biasWeight?: number;
  /** A and B are each divided by √gamma; greater than 0 (default 1024). */
  gamma?: number;
  /** Added to the diagonal of Z; 0 or more (default 1e-6). */
  damping?: number;
  /** Added to ydiag; 0 or more (default: damping). */
  outputDamping?: number;
  /** Divide Δ by its largest singular value (default true). */
  normalizeDelta?: boolean;
  /**
   * How the statistics are collected: `sample-major` (one pass over each batch, all modules at once), `layer-major` (all batches
   * through one layer at a time: far less memory, about a third more time) or `auto` (default): the first that fits the budget.
   * The factors are the same.
   */
  plan?: 'auto' | CollectionOrder;
  /** Bytes that the process may hold in all, the model included; greater than 0 (default: what it holds and 80 % of what is free). */
  memoryBudget?: number;
  /** Of the random starts; 0 or more (default 42). */
  seed?: number;
}

/** What an initialization found for one module; null where the method does not compute a figure. */
export interface ModuleReport {
  /** Full name, e.g. `model.layers.0.self_attn.q_proj`. */
  module: string;
  rank: number;
  /** Condition number of Zd = Z + damping·I (estimate). */
  conditionNumber: number | null;
  /** median(ydiag) / outputDamping: below 1, damping decides the output factor. */
  medianOutputOverDamping: number | null;
  /** Largest singular value of Δ before normalization. */
  sigma: number | null;
  /** Gap between the r-th and the next eigenvalue of Ω. */
  gap: number | null;
  /** The gap over the largest magnitude of an eigenvalue. */
  relativeGap: number | null;
  /** The r + 1 smallest eigenvalues of Ω, ascending. */
  eigenvalues: number[];
}

/** What {@link LoraAdapter.initialize} did. */
export interface InitializationReport {
  method: string;
  /** Options as resolved. */
  options: InitializationConfig;
  /** Rows that were looked at; 0 for a method without data. */
  samples: number;
  modules: ModuleReport[];
  /** How the statistics were collected, with the bytes that were planned for it; null for a method without data. */
  collection: CollectionPlan | null;
  collectSeconds: number;
  solveSeconds: number;
}

/** Method that keeps what an adapter has. */
export const keepFactors = 'none';
/** PEFT's default start. */
export const plainStart = 'kaiming';

/** Whether a method looks at data. @throws {LoraDaError} `INVALID_ARGUMENT`, listing the methods, for one that is not in the table */
export function needsData(method: string): boolean {
  const table = native().info().initializations;
  const row = table.find(({ name }) => name === method);
  if (row) return row.gradient || row.inputMoment || row.outputFactor;
  if (method === keepFactors) return false;
  const names = [...new Set([...table.map(({ name }) => name), keepFactors])].join(', ');
  throw new LoraDaError(
    'INVALID_ARGUMENT',
    `Expected one of ${names} for init but received ${JSON.stringify(method)} of type string`,
  );
}

/** Checks options and fills in the defaults. @throws {LoraDaError} `INVALID_ARGUMENT` */
export function resolveInitialization(options: InitializationOptions): InitializationConfig {
  return parseOptions(initializationSchema, options);
}

/** Options as the core takes them. @param rows number of training rows, N where none is given */
export function nativeInitialization(config: InitializationConfig, rows: number): NativeInitOptions {
  return {
    method: config.method,
    seed: config.seed,
    tokenMask: config.tokenMask,
    population: config.population ?? Math.max(1, rows),
    varianceWeight: config.varianceWeight,
    biasWeight: config.biasWeight,
    gamma: config.gamma,
    damping: config.damping,
    outputDamping: config.outputDamping ?? config.damping,
    normalizeDelta: config.normalizeDelta,
    plan: config.plan,
    memoryBudget: config.memoryBudget ?? 0,
  };
}

/** What the factors depend on: how the memory is used does not change them. */
export function factorOptions({ plan: _, memoryBudget: __, ...options }: InitializationConfig): object {
  return options;
}

/** What progress says. */
export const phaseNames: Record<InitializationPhase, string> = {
  collect: 'collecting statistics',
  solve: 'solving',
  layers: 'collecting and solving layer by layer',
};

const finite = (value: number) => (Number.isFinite(value) ? value : null);

/** The core's report with what JSON can hold; a method that looks at no data has nothing to say of it. */
export function moduleReport(found: NativeModuleReport, fromData: boolean): ModuleReport {
  const figure = (value: number) => (fromData ? finite(value) : null);
  return {
    module: found.module,
    rank: found.rank,
    conditionNumber: figure(found.conditionNumber),
    medianOutputOverDamping: figure(found.medianOutputOverDamping),
    sigma: figure(found.sigma),
    gap: figure(found.gap),
    relativeGap: figure(found.relativeGap),
    eigenvalues: fromData ? Array.from(found.eigenvalues) : [],
  };
}

/** One line: method, rows, time, and the worst conditioned module. */
export function summarizeInitialization(report: InitializationReport): string {
  if (report.method === keepFactors) return "none: the adapter's factors as they are";
  const seconds = (report.collectSeconds + report.solveSeconds).toFixed(1);
  const rows = report.samples > 0 ? ` from ${report.samples} rows` : '';
  const worst = report.modules.reduce<ModuleReport | undefined>(
    (most, module) => ((module.conditionNumber ?? 0) > (most?.conditionNumber ?? 0) ? module : most),
    undefined,
  );
  const condition = worst ? `; largest cond(Zd) ${worst.conditionNumber!.toExponential(1)} at ${worst.module}` : '';
  return `${report.method}: ${report.modules.length} modules${rows} in ${seconds} s${condition}`;
}

/** One line: the plan of the collection and what it takes. */
export function describePlan(collection: CollectionPlan): string {
  const size = (bytes: number) => `${(bytes / 1e9).toFixed(2)} GB`;
  const { plan, layersPerCheckpoint, resident, statistics, streams, activations, workspace, total } = collection;
  const kept = layersPerCheckpoint > 1 ? `, the input of one layer in ${layersPerCheckpoint} kept` : '';
  const parts = [
    `model ${size(resident)}`,
    `statistics ${size(statistics)}`,
    ...(streams > 0 ? [`residual streams ${size(streams)}`] : []),
    `activations ${size(activations)}`,
    `workspace ${size(workspace)}`,
  ];
  return `Collection ${plan}${kept}; planned memory ${size(total)}: ${parts.join(', ')}`;
}
