import { EventEmitter } from 'node:events';
import { join } from 'node:path';
import { checkAborted, expected } from './arguments';
import type { CausalLM, Evaluation } from './causal_lm';
import { parseOptions, type TrainingConfig, trainingSchema } from './config';
import type { Dataset } from './dataset';
import { LoraDaError } from './errors';
import { writeFileAtomically } from './files';
import {
  factorOptions,
  type InitializationOptions,
  type InitializationReport,
  resolveInitialization,
} from './initializations';
import type { LoraAdapter } from './lora_adapter';
import { type EvaluationMetrics, JsonLines, type StepMetrics } from './metrics';
import type { CollectionPlan, InitializationPhase, NativeFactors, NativeModelInfo, NativeStepResult } from './native';
import { writeReport } from './report';
import { checkRunFolder, makeFolder, removeLeftovers, runFiles } from './run_folder';
import { Sampler, type SamplerState } from './sampler';
import { learningRateAt, type Schedule, warmupStepsOf } from './schedule';
import {
  type Best,
  type Checkpoint,
  CheckpointStore,
  checkResumable,
  type RunIdentity,
  type TrainingState,
} from './training_state';

/** Options of {@link Trainer}. */
export interface TrainerOptions {
  /** Rows to train on. */
  data: Dataset;
  /** Rows of a micro-batch; 1 or more (default 8). */
  batchSize?: number;
  /** Micro-batches of an optimizer step; 1 or more (default 1). A last, incomplete group of an epoch also steps. */
  gradAccum?: number;
  /** Passes over the data; 1 or more (default 1). */
  epochs?: number;
  /** Optimizer steps, in place of epochs; the data are gone through as often as that takes. */
  maxSteps?: number;
  /** 0 or more (default 2e-4). */
  learningRate?: number;
  /** Course after warm-up: `cosine` (default), `linear` or `constant`. */
  scheduler?: 'cosine' | 'linear' | 'constant';
  /** Steps over which the rate rises from 0, in place of warmupRatio. */
  warmupSteps?: number;
  /** Part of all steps that is warm-up, 0 to 1, rounded up (default 0.03). */
  warmupRatio?: number;
  /** AdamW's decoupled decay; 0 or more (default 0). */
  weightDecay?: number;
  /** The gradient is scaled down to this norm; 0: no clipping (default 1). */
  maxGradNorm?: number;
  /** Of the order of the rows; 0 or more (default 42). */
  seed?: number;
  /** Shuffle the rows anew each epoch (default true). */
  shuffle?: boolean;
  /** Deal the rows out so that batches have about the same number of tokens, and steps take about the same time (default false). */
  balance?: boolean;
  /** Rows held out: evaluated before the first step, every evalSteps and at the end. */
  evalData?: Dataset;
  /** Steps between two evaluations; 1 or more (default: the steps of an epoch). */
  evalSteps?: number;
  /** Stop after this many evaluations without a better loss, and keep the best adapter; needs evalData (default: never). */
  earlyStop?: number;
  /** Run folder for checkpoints, metrics, adapter and report (default: none is written). */
  out?: string;
  /** Go on from the newest checkpoint in `out`; without one, start afresh (default false). */
  resume?: boolean;
  /** Steps between two checkpoints; 1 or more (default 100). There is one before the first step and one at the end too. */
  saveSteps?: number;
  /** Newest checkpoints to keep; 1 or more (default 2). */
  keepCheckpoints?: number;
  /** `layer`: keep only the inputs of layers and compute the rest again in backward (default `none`). */
  recompute?: 'none' | 'layer';
  /** Start the adapter with this when the run starts afresh (default: take it as it is). */
  initialize?: InitializationOptions;
  /** Written to the run folder's config.json in place of the trainer's own options. */
  config?: object;
}

/** A step as the `step` event tells it. */
export interface StepEvent extends StepMetrics {
  /** Optimizer steps of the whole run. */
  totalSteps: number;
}

/** An evaluation as the `evaluation` event tells it. */
export interface EvaluationEvent extends EvaluationMetrics {
  /** Whether no evaluation before had a lower loss. */
  best: boolean;
}

/** Events of {@link Trainer} and what their listeners get. */
export interface TrainerEvents {
  /** Before the first step: where the run starts, after a resume not at 0. */
  start: [{ step: number; totalSteps: number; resumed: boolean }];
  initializationPlan: [CollectionPlan];
  initializationProgress: [{ phase: InitializationPhase; done: number; total: number }];
  initialization: [InitializationReport];
  step: [StepEvent];
  evaluationProgress: [{ done: number; total: number }];
  evaluation: [EvaluationEvent];
  checkpoint: [{ step: number; path: string }];
  /** Something that does not stop the run. */
  warning: [string];
}

/** What {@link Trainer.train} did. */
export interface TrainResult {
  /** Optimizer steps since the very start of the run. */
  steps: number;
  epochs: number;
  /** Why it ended. */
  reason: 'finished' | 'early-stop';
  /** Loss of the last step; null when no step was left to do. */
  loss: number | null;
  /** Tokens trained on by this call. */
  tokens: number;
  /** Wall time of this call, initialization and evaluations included. */
  seconds: number;
  /** First, last and best evaluation; null without evalData. */
  evaluation: { first: EvaluationMetrics; last: EvaluationMetrics; best: Best } | null;
  initialization: InitializationReport | null;
  /** The run folder and its report; null without `out`. */
  out: string | null;
  report: string | null;
}

interface PendingStep {
  step: number;
  epoch: number;
  learningRate: number;
  tokens: number;
  result: Promise<NativeStepResult>;
}

/** AdamW's constants, as in PyTorch. */
const adam = { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };

/** Everything about a run that moves while it runs. */
interface Progress {
  step: number;
  evaluatedStep: number;
  best: Best | null;
  first: EvaluationMetrics | null;
  last: EvaluationMetrics | null;
  evaluationsWithoutImprovement: number;
  loss: number | null;
  tokens: number;
}

/** The open files of a run folder. */
interface RunOutput {
  store: CheckpointStore;
  metrics: JsonLines;
  evaluations: JsonLines;
}

/**
 * Trains the adapter that is on a model: AdamW, one update for batchSize · gradAccum rows, loss divided by the label
 * tokens of the whole step. The same data, options, device and thread count give the same bits, whether the run was
 * stopped and resumed or not.
 *
 * With `out` it keeps a run folder: `metrics.jsonl` (a line a step), `evaluations.jsonl` (a line an evaluation),
 * `initialization.json`, `checkpoints/` (`step-N` to resume from, `best-N` with the adapter of the lowest held-out loss)
 * and, at the end, the adapter (with earlyStop the best, else the last one) and `report.html`.
 *
 * @example
 * ```ts
 * const trainer = new Trainer(model, { data, learningRate: 2e-4, epochs: 1, out: 'out' });
 * trainer.on('step', ({ step, loss }) => console.log(step, loss));
 * await trainer.train();
 * ```
 */
export class Trainer extends EventEmitter<TrainerEvents> {
  /** Optimizer steps of the run. */
  readonly totalSteps: number;
  readonly stepsPerEpoch: number;
  /** How the learning rate goes. */
  readonly schedule: Schedule;
  /** Options as resolved. */
  readonly training: TrainingConfig;
  readonly #model: CausalLM;
  readonly #options: TrainerOptions;
  readonly #evalSteps: number;
  #running = false;

  /**
   * @param model    with an adapter on it ({@link CausalLM.addLora} or {@link CausalLM.loadAdapter})
   * @param options  see {@link TrainerOptions}
   * @throws {LoraDaError} `INVALID_ARGUMENT` when an option is out of range or does not go with another
   */
  constructor(model: CausalLM, options: TrainerOptions) {
    super();
    const { data, evalData, out, resume = false, initialize, config, ...rest } = options;
    if (typeof data?.length !== 'number') throw expected('Dataset', 'data', data);
    if (data.length === 0) throw expected('Dataset of at least one row', 'data', data);
    if (out !== undefined && (typeof out !== 'string' || out === '')) throw expected('path of a folder', 'out', out);
    if (resume && out === undefined) throw expected('path of a folder', 'out', out);
    this.training = parseOptions(trainingSchema, rest);
    const { batchSize, gradAccum, epochs, maxSteps, warmupSteps, warmupRatio, earlyStop } = this.training;
    if (epochs !== undefined && maxSteps !== undefined) throw expected('either epochs or maxSteps', 'epochs', epochs);
    if (warmupSteps !== undefined && warmupRatio !== undefined) {
      throw expected('either warmupSteps or warmupRatio', 'warmupSteps', warmupSteps);
    }
    if (earlyStop !== undefined && !evalData) throw expected('Dataset, as earlyStop is set,', 'evalData', evalData);
    if (initialize) resolveInitialization(initialize);
    this.#model = model;
    this.#options = { ...options, resume };
    this.stepsPerEpoch = Math.ceil(data.length / (batchSize * gradAccum));
    this.totalSteps = maxSteps ?? (epochs ?? 1) * this.stepsPerEpoch;
    this.#evalSteps = this.training.evalSteps ?? this.stepsPerEpoch;
    const { scheduler, learningRate } = this.training;
    const warmup = warmupStepsOf(this.totalSteps, warmupSteps, warmupRatio ?? 0.03);
    this.schedule = { scheduler, learningRate, warmupSteps: warmup, totalSteps: this.totalSteps };
  }

  /**
   * Runs to the end, or goes on from where `out` stands.
   *
   * @param call.signal  stops it: the steps in flight are finished, a checkpoint is saved, and the promise rejects with `ABORTED`
   * @throws {LoraDaError} `NON_FINITE`, naming step and likely cause; `RESUME_MISMATCH`, naming the field; `IO_ERROR`;
   *   `INVALID_ARGUMENT` when `out` already holds a run; `ABORTED`; what {@link LoraAdapter.initialize} throws
   */
  async train(call: { signal?: AbortSignal } = {}): Promise<TrainResult> {
    if (this.#running)
      throw new LoraDaError('INVALID_ARGUMENT', 'Expected one call of train() at a time but received a second');
    const adapter = this.#model.adapter;
    if (!adapter)
      throw new LoraDaError(
        'INVALID_ARGUMENT',
        'Expected a model with an adapter: call addLora() or loadAdapter() first',
      );
    this.#running = true;
    this.#model.tokenizer?.client.rest(); // its vocabulary takes some 50 MB, and training needs ids only
    try {
      return await new Run(this, this.#model, adapter, this.#options, this.#evalSteps, call.signal).run();
    } finally {
      this.#running = false;
    }
  }
}

/** One call of {@link Trainer.train}. */
class Run {
  readonly #began = performance.now();
  readonly #identity: RunIdentity;
  readonly #progress: Progress = {
    step: 0,
    evaluatedStep: -1,
    best: null,
    first: null,
    last: null,
    evaluationsWithoutImprovement: 0,
    loss: null,
    tokens: 0,
  };
  #sampler: Sampler;
  #output: RunOutput | undefined;
  #initialization: InitializationReport | null = null;
  /** Submitted to the engine and not yet read. */
  #pending: PendingStep | undefined;
  #savedStep = -1;
  #bestFactors: NativeFactors[] | undefined;

  constructor(
    readonly trainer: Trainer,
    readonly model: CausalLM,
    readonly adapter: LoraAdapter,
    readonly options: TrainerOptions,
    readonly evalSteps: number,
    readonly signal: AbortSignal | undefined,
  ) {
    this.#sampler = this.#newSampler();
    this.#identity = this.#describe();
  }

  async run(): Promise<TrainResult> {
    await this.#start();
    try {
      await this.#evaluateIfDue();
      await this.#steps();
      return await this.#finish();
    } catch (error) {
      await this.#dropPending();
      throw this.signal?.aborted && isAborted(error) ? await this.#interrupt() : error;
    } finally {
      await this.#close();
    }
  }

  /** Where a run folder holds a checkpoint and may go on: there; else the initialization. */
  async #start(): Promise<void> {
    checkAborted(this.signal);
    const { out, resume = false } = this.options;
    if (out !== undefined) await checkRunFolder(out, resume);
    const store = out === undefined ? undefined : new CheckpointStore(join(out, runFiles.checkpoints), this.model.spec);
    const checkpoint = resume ? await store?.newest() : undefined;
    if (checkpoint) await this.#restore(store!, checkpoint);
    else await this.#initialize();
    if (store) await this.#openOutput(out!, store, checkpoint);
    const { step } = this.#progress;
    this.trainer.emit('start', { step, totalSteps: this.trainer.totalSteps, resumed: checkpoint !== undefined });
    if (!checkpoint) await this.#checkpoint();
  }

  async #initialize(): Promise<void> {
    const { initialize, data } = this.options;
    if (initialize) {
      const { signal, trainer } = this;
      const report = await this.adapter.initialize(initialize, data, {
        signal,
        onPlan: (plan) => trainer.emit('initializationPlan', plan),
        onProgress: (phase, done, total) => trainer.emit('initializationProgress', { phase, done, total }),
      });
      trainer.emit('initialization', report);
    } else if (!this.adapter.started) {
      throw new LoraDaError(
        'INVALID_ARGUMENT',
        'Expected an adapter that has been started: call initialize() first, or give the option initialize',
      );
    }
    this.#initialization = this.adapter.initialization ?? null;
  }

  #newSampler(state?: SamplerState): Sampler {
    const { data } = this.options;
    const { seed, shuffle, balance, batchSize } = this.trainer.training;
    const rowLength = (row: number) => data.rowLength(row);
    const options = { seed, shuffle, balance: balance ? { batchSize, rowLength } : undefined };
    return new Sampler(data.length, options, state);
  }

  async #restore(store: CheckpointStore, checkpoint: Checkpoint): Promise<void> {
    const { state } = checkpoint;
    for (const warning of checkResumable(checkpoint, this.#identity)) this.trainer.emit('warning', warning);
    const { factors, moments } = await store.read(checkpoint);
    await this.adapter.writeFactors(factors);
    await this.adapter.writeMoments(moments);
    this.#sampler = this.#newSampler(state.sampler);
    this.#initialization = state.initialization;
    this.#savedStep = state.step;
    const { step, evaluatedStep, best, first, last, evaluationsWithoutImprovement } = state;
    Object.assign(this.#progress, { step, evaluatedStep, best, first, last, evaluationsWithoutImprovement });
  }

  async #openOutput(out: string, store: CheckpointStore, checkpoint: Checkpoint | undefined): Promise<void> {
    await makeFolder(store.folder);
    await removeLeftovers(out);
    await store.clean(checkpoint);
    const config = this.options.config ?? this.#configuration(out);
    await writeFileAtomically(join(out, runFiles.config), `${JSON.stringify(config, null, 2)}\n`);
    if (this.#initialization) {
      await writeFileAtomically(
        join(out, runFiles.initialization),
        `${JSON.stringify(this.#initialization, null, 2)}\n`,
      );
    }
    const metrics = await JsonLines.open(join(out, runFiles.metrics), checkpoint?.state.metricsBytes ?? 0);
    const evaluations = await JsonLines.open(join(out, runFiles.evaluations), checkpoint?.state.evaluationsBytes ?? 0);
    this.#output = { store, metrics, evaluations };
  }

  /** One step is always with the engine while the next one's rows are laid out. */
  async #steps(): Promise<void> {
    const { totalSteps, training } = this.trainer;
    const rowsPerStep = training.batchSize * training.gradAccum;
    while (this.#progress.step < totalSteps && !this.#stoppedEarly()) {
      checkAborted(this.signal);
      const step = this.#progress.step + 1;
      const next = this.#submit(step, await this.#sampler.next(rowsPerStep));
      this.#progress.step = step;
      const before = this.#pending;
      this.#pending = next;
      if (before) await this.#settle(before);
      await this.#pauses(step);
    }
    await this.#settlePending();
  }

  /** What stops the flow after a step: an evaluation, a checkpoint. */
  async #pauses(step: number): Promise<void> {
    const saves = step % this.trainer.training.saveSteps === 0;
    if (!this.#evaluationDue() && !saves) return;
    await this.#settlePending();
    await this.#evaluateIfDue();
    if (saves) await this.#checkpoint();
  }

  #submit(step: number, rows: number[]): PendingStep {
    const { data } = this.options;
    const { batchSize, weightDecay, maxGradNorm, recompute } = this.trainer.training;
    const batches = [];
    for (let first = 0; first < rows.length; first += batchSize)
      batches.push(data.batch(rows.slice(first, first + batchSize)));
    const learningRate = learningRateAt(this.trainer.schedule, step);
    const result = this.model.native.trainStep(batches, {
      ...adam,
      learningRate,
      weightDecay,
      maxGradNorm,
      step,
      recompute,
    });
    result.catch(() => {});
    const tokens = batches.reduce((sum, batch) => sum + batch.inputIds.length, 0);
    return { step, epoch: this.#sampler.epoch, learningRate, tokens, result };
  }

  async #settlePending(): Promise<void> {
    const pending = this.#pending;
    this.#pending = undefined;
    if (pending) await this.#settle(pending);
  }

  async #settle(pending: PendingStep): Promise<void> {
    const { step, epoch, learningRate, tokens } = pending;
    const { loss, gradNorm, seconds } = await pending.result.catch((error) => {
      throw this.#explain(error, pending);
    });
    if (!Number.isFinite(loss) || !Number.isFinite(gradNorm)) {
      throw this.#explain(new LoraDaError('NON_FINITE', `loss ${loss}, gradient norm ${gradNorm}`), pending);
    }
    this.#progress.loss = loss;
    this.#progress.tokens += tokens;
    const metrics: StepMetrics = {
      step,
      epoch,
      loss,
      gradNorm,
      learningRate,
      tokens,
      tokensPerSecond: tokens / seconds,
    };
    const written = this.#output?.metrics.append(metrics);
    this.trainer.emit('step', { ...metrics, totalSteps: this.trainer.totalSteps });
    await written;
  }

  /** Names the step, the likely cause, and where the last good state lies. */
  #explain(error: unknown, { step, learningRate }: PendingStep): unknown {
    if (!(error instanceof LoraDaError) || error.code !== 'NON_FINITE') return error;
    const cause =
      learningRate === 0 || step === 1
        ? `the base weights, the adapter's start or the data give it (${this.model.info.dtype}) before any update`
        : `the learning rate (${learningRate}) is probably too high: lower it, or warm up longer`;
    const kept = this.#savedStep >= 0 ? `; the checkpoint of step ${this.#savedStep} is kept` : '';
    return new LoraDaError(
      'NON_FINITE',
      `Step ${step}: the loss or its gradient is not finite (${error.message}); ${cause}${kept}`,
      { cause: error },
    );
  }

  #evaluationDue(): boolean {
    const { step, evaluatedStep } = this.#progress;
    if (!this.options.evalData || evaluatedStep >= step) return false;
    return step % this.evalSteps === 0 || step === this.trainer.totalSteps;
  }

  async #evaluateIfDue(): Promise<void> {
    if (!this.#evaluationDue()) return;
    const began = performance.now();
    const { step } = this.#progress;
    const found = await this.model.evaluate(this.options.evalData!, {
      signal: this.signal,
      onProgress: (done, total) => this.trainer.emit('evaluationProgress', { done, total }),
    });
    await this.#record(step, found, (performance.now() - began) / 1000);
  }

  async #record(step: number, { loss, perplexity, labelTokens }: Evaluation, seconds: number): Promise<void> {
    const progress = this.#progress;
    const metrics: EvaluationMetrics = { step, epoch: this.#sampler.epoch, loss, perplexity, labelTokens, seconds };
    const best = progress.best === null || loss < progress.best.loss;
    if (best) await this.#keepBest(step);
    if (best) progress.best = { step, loss };
    progress.evaluationsWithoutImprovement = best ? 0 : progress.evaluationsWithoutImprovement + 1;
    progress.evaluatedStep = step;
    progress.first ??= metrics;
    progress.last = metrics;
    await this.#output?.evaluations.append(metrics);
    this.trainer.emit('evaluation', { ...metrics, best });
  }

  #stoppedEarly(): boolean {
    const { earlyStop } = this.trainer.training;
    return earlyStop !== undefined && this.#progress.evaluationsWithoutImprovement >= earlyStop;
  }

  /** Saves where the run stands, unless that is saved already. Nothing may be pending. */
  async #checkpoint(): Promise<void> {
    const output = this.#output;
    if (!output || (this.#savedStep === this.#progress.step && this.#savedStep > 0)) return;
    await output.metrics.sync();
    await output.evaluations.sync();
    const content = { ...(await this.adapter.content()), moments: await this.adapter.readMoments() };
    const { keepCheckpoints } = this.trainer.training;
    const path = await output.store.write(this.#state(output), content, keepCheckpoints);
    this.#savedStep = this.#progress.step;
    this.trainer.emit('checkpoint', { step: this.#savedStep, path });
  }

  #state(output: RunOutput): TrainingState {
    const { step, evaluatedStep, best, first, last, evaluationsWithoutImprovement } = this.#progress;
    return {
      step,
      epoch: this.#sampler.epoch,
      sampler: this.#sampler.state(),
      schedule: this.trainer.schedule,
      evaluatedStep,
      best,
      first,
      last,
      evaluationsWithoutImprovement,
      metricsBytes: output.metrics.bytes,
      evaluationsBytes: output.evaluations.bytes,
      initialization: this.#initialization,
      identity: this.#identity,
    };
  }

  async #finish(): Promise<TrainResult> {
    const { out } = this.options;
    await this.#checkpoint();
    const best = this.#progress.best;
    const { earlyStop } = this.trainer.training;
    if (earlyStop !== undefined && best && best.step !== this.#progress.step) await this.#takeBest(best);
    let report: string | null = null;
    if (out !== undefined) {
      await this.adapter.save(out);
      report = await writeReport(out);
    }
    const { first, last, step, loss, tokens } = this.#progress;
    return {
      steps: step,
      epochs: this.#sampler.epoch,
      reason: step < this.trainer.totalSteps ? 'early-stop' : 'finished',
      loss,
      tokens,
      seconds: (performance.now() - this.#began) / 1000,
      evaluation: first && last && best ? { first, last, best } : null,
      initialization: this.#initialization,
      out: out ?? null,
      report,
    };
  }

  /** On disk where there is a run folder; else in memory, and only where it will be wanted. */
  async #keepBest(step: number): Promise<void> {
    if (this.#output) return this.#output.store.writeBest(step, await this.adapter.content());
    if (this.trainer.training.earlyStop !== undefined) this.#bestFactors = await this.adapter.readFactors();
  }

  async #takeBest(best: Best): Promise<void> {
    const factors = this.#bestFactors ?? (await this.#output!.store.readBest(best));
    await this.adapter.writeFactors(factors);
  }

  /** Saves where an aborted run stands and says so. */
  async #interrupt(): Promise<LoraDaError> {
    const { step } = this.#progress;
    const { out } = this.options;
    if (!this.#output) return new LoraDaError('ABORTED', `Stopped on request after step ${step}`);
    await this.#checkpoint();
    await writeReport(out!);
    return new LoraDaError('ABORTED', `Stopped on request after step ${step}; go on from there with --resume (${out})`);
  }

  /** Lets what is with the engine finish: on an abort it counts, after an error it is dropped. */
  async #dropPending(): Promise<void> {
    if (this.signal?.aborted) return this.#settlePending();
    const pending = this.#pending;
    this.#pending = undefined;
    await pending?.result.catch(() => {});
  }

  async #close(): Promise<void> {
    await this.#output?.metrics.close();
    await this.#output?.evaluations.close();
  }

  /** config.json of a run that was not given one: what the trainer knows. */
  #configuration(out: string): object {
    const { rank, alpha, rslora, targetModules } = this.adapter;
    const init = this.#initialization?.method;
    return { model: this.model.directory, out, init, rank, alpha, rslora, targetModules, ...this.trainer.training };
  }

  /** What must be the same for a run to go on. */
  #describe(): RunIdentity {
    const { data, evalData, initialize } = this.options;
    const { training, schedule } = this.trainer;
    const { info, fingerprint } = this.model;
    const init = initialize ? resolveInitialization(initialize) : this.adapter.initialization?.options;
    return {
      results: {
        base: fingerprint,
        data: data.hash,
        evalData: evalData?.hash ?? null,
        dtype: info.dtype,
        rank: this.adapter.rank,
        alpha: this.adapter.alpha,
        rslora: this.adapter.rslora,
        targetModules: [...this.adapter.targetModules],
        batchSize: training.batchSize,
        gradAccum: training.gradAccum,
        steps: schedule.totalSteps,
        learningRate: schedule.learningRate,
        scheduler: schedule.scheduler,
        warmupSteps: schedule.warmupSteps,
        weightDecay: training.weightDecay,
        maxGradNorm: training.maxGradNorm,
        seed: training.seed,
        shuffle: training.shuffle,
        balance: training.balance,
        evalSteps: evalData ? this.evalSteps : null,
        earlyStop: training.earlyStop ?? null,
        init: init ? factorOptions(init) : null,
      },
      lastBits: info.device === 'cpu' ? { device: 'cpu', threads: info.threads } : { device: gpuModel(info) },
    };
  }
}

/** The GPU without its place among others: two of one kind give the same bits. */
function gpuModel({ device, deviceName }: NativeModelInfo): string {
  return deviceName.slice(device.length).trim();
}

function isAborted(error: unknown): boolean {
  return error instanceof LoraDaError && error.code === 'ABORTED';
}
