import { mkdir, rename, rm, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { type AdapterContent, readAdapterFolder, writeAdapterFolder } from './adapter_folder';
import { LoraDaError } from './errors';
import { readJsonObject, syncDirectory, writeFileAtomically } from './files';
import type { InitializationReport } from './initializations';
import type { EvaluationMetrics } from './metrics';
import type { DecoderSpec, NativeFactors, NativeMoments } from './native';
import { namesIn, onDisk } from './run_folder';
import { readSafetensorsHeader, readTensors, writeSafetensors } from './safetensors';
import type { SamplerState } from './sampler';
import type { Schedule } from './schedule';

/** The evaluation with the lowest loss. */
export interface Best {
  step: number;
  loss: number;
}

/** What a run is, by field: a checkpoint goes on only in a run that is the same. */
export interface RunIdentity {
  /** Fields that decide the result. A difference is refused by name. */
  results: Record<string, unknown>;
  /** Fields that decide its last bits only. A difference is a warning. */
  lastBits: Record<string, unknown>;
}

/** A checkpoint's state.json: all of a run but factors and moments. */
export interface TrainingState {
  /** Optimizer steps that are done. */
  step: number;
  epoch: number;
  /** Order of the rows, position and random state. */
  sampler: SamplerState;
  schedule: Schedule;
  /** Step of the last evaluation; -1 before the first. */
  evaluatedStep: number;
  best: Best | null;
  first: EvaluationMetrics | null;
  last: EvaluationMetrics | null;
  evaluationsWithoutImprovement: number;
  /** Length of metrics.jsonl and evaluations.jsonl, which a resumed run cuts back to it. */
  metricsBytes: number;
  evaluationsBytes: number;
  initialization: InitializationReport | null;
  /** Hashes of base and data, and the options. */
  identity: RunIdentity;
}

/** A complete checkpoint on disk. */
export interface Checkpoint {
  path: string;
  state: TrainingState;
}

/** What a checkpoint holds beside its state. */
export interface CheckpointContent extends AdapterContent {
  moments: NativeMoments[];
}

interface StateFile extends TrainingState {
  format: number;
  /** Sizes of the other files: a folder that lacks some is not complete. */
  files: Record<string, number>;
}

const format = 1;
const stateName = 'state.json';
const momentsName = 'moments.safetensors';
const asidePrefix = '.tmp-';
const momentNames = ['aFirst', 'aSecond', 'bFirst', 'bSecond'] as const;

const folderName = (kind: 'step' | 'best', step: number) => `${kind}-${String(step).padStart(8, '0')}`;

/**
 * The `checkpoints` folder of a run: `step-N` to resume from, each a PEFT folder with moments.safetensors and state.json
 * beside the adapter, and `best-N`, a PEFT folder. Each is written aside, synced and renamed, so that one that is there is whole.
 */
export class CheckpointStore {
  constructor(
    readonly folder: string,
    readonly spec: DecoderSpec,
  ) {}

  /** The complete checkpoint of the highest step; undefined where there is none. */
  async newest(): Promise<Checkpoint | undefined> {
    const names = (await namesIn(this.folder)).filter((name) => /^step-\d+$/.test(name)).sort(byStep);
    for (const name of names.reverse()) {
      const state = await completeState(join(this.folder, name));
      if (state) return { path: join(this.folder, name), state };
    }
    return undefined;
  }

  /** Removes what an interrupted run left half done, and what lies after the checkpoint that the run goes on from. */
  async clean(from: Checkpoint | undefined): Promise<void> {
    const step = from?.state.step ?? -1;
    const stale = (name: string) => name.startsWith(asidePrefix) || stepOf(name) > step;
    for (const name of (await namesIn(this.folder)).filter(stale)) await this.#remove(name);
  }

  /**
   * Writes a checkpoint and then drops the older ones.
   *
   * @param keep  newest checkpoints to keep
   * @returns the checkpoint's path
   * @throws {LoraDaError} `IO_ERROR`, naming the path; the earlier checkpoints stay and nothing half written is left
   */
  async write(state: TrainingState, content: CheckpointContent, keep: number): Promise<string> {
    const { moments, ...adapter } = content;
    const path = await this.#writeFolder(folderName('step', state.step), async (aside) => {
      await writeAdapterFolder(aside, this.spec, adapter);
      await writeSafetensors(join(aside, momentsName), momentTensors(moments, adapter.rank));
      const file: StateFile = { format, ...state, files: await sizesIn(aside) };
      await writeFileAtomically(join(aside, stateName), `${JSON.stringify(file)}\n`);
    });
    await this.#prune(keep, state);
    return path;
  }

  /** Factors and moments of a checkpoint. @throws {LoraDaError} `INVALID_FILE`, `INVALID_TENSOR`, `IO_ERROR` */
  async read(checkpoint: Checkpoint): Promise<{ factors: NativeFactors[]; moments: NativeMoments[] }> {
    const { factors } = await readAdapterFolder(checkpoint.path, this.spec);
    const moments = await readMoments(join(checkpoint.path, momentsName), factors);
    return { factors, moments };
  }

  /** Keeps the adapter of the lowest held-out loss so far, as a PEFT folder. */
  async writeBest(step: number, adapter: AdapterContent): Promise<void> {
    await this.#writeFolder(folderName('best', step), (aside) => writeAdapterFolder(aside, this.spec, adapter));
  }

  /** The factors of the best evaluation. */
  async readBest(best: Best): Promise<NativeFactors[]> {
    return (await readAdapterFolder(join(this.folder, folderName('best', best.step)), this.spec)).factors;
  }

  async #writeFolder(name: string, fill: (aside: string) => Promise<void>): Promise<string> {
    const path = join(this.folder, name);
    const aside = join(this.folder, `${asidePrefix}${name}`);
    await onDisk(path, async () => {
      try {
        await rm(aside, { recursive: true, force: true });
        await mkdir(aside);
        await fill(aside);
        await syncDirectory(aside);
        await this.#remove(name);
        await rename(aside, path);
        await syncDirectory(this.folder);
      } catch (error) {
        await rm(aside, { recursive: true, force: true }).catch(() => {});
        throw error;
      }
    });
    return path;
  }

  /** Out of the way by a rename first: a kill in between leaves no folder that looks whole. */
  async #remove(name: string): Promise<void> {
    const path = join(this.folder, name);
    const away = join(this.folder, `${asidePrefix}old-${name}`);
    await rm(away, { recursive: true, force: true });
    const moved = await rename(path, away).then(
      () => true,
      () => false,
    );
    await rm(moved ? away : path, { recursive: true, force: true });
  }

  async #prune(keep: number, state: TrainingState): Promise<void> {
    const names = await namesIn(this.folder);
    const steps = names.filter((name) => /^step-\d+$/.test(name)).sort(byStep);
    const kept = steps.slice(-keep);
    const needed = new Set<number | undefined>([state.best?.step]);
    for (const name of kept) needed.add((await completeState(join(this.folder, name)))?.best?.step);
    const bests = names.filter((name) => /^best-\d+$/.test(name) && !needed.has(stepOf(name)));
    await onDisk(this.folder, async () => {
      for (const name of [...steps.slice(0, -keep), ...bests]) await this.#remove(name);
    });
  }
}

/**
 * Compares a checkpoint with the run that wants to go on from it.
 *
 * @returns warnings: differences that change the last bits only (device, threads)
 * @throws {LoraDaError} `RESUME_MISMATCH`, naming the first field that differs
 */
export function checkResumable(checkpoint: Checkpoint, now: RunIdentity): string[] {
  const then = checkpoint.state.identity;
  const different = differences(then.results, now.results)[0];
  if (different) {
    const [field, before, after] = different;
    throw new LoraDaError(
      'RESUME_MISMATCH',
      `Cannot resume from ${checkpoint.path}: ${field} was ${JSON.stringify(before)} and is ${JSON.stringify(after)} now`,
    );
  }
  // A field that only one of two devices has says nothing that the device's name does not.
  return differences(then.lastBits, now.lastBits)
    .filter(([, before, after]) => before !== null && after !== null)
    .map(
      ([field, before, after]) =>
        `${field} was ${JSON.stringify(before)} and is ${JSON.stringify(after)} now: the last bits of the results may differ from a run that never stopped`,
    );
}

/** Fields that differ, those inside an object by their own name. */
function differences(then: Record<string, unknown>, now: Record<string, unknown>): [string, unknown, unknown][] {
  const found: [string, unknown, unknown][] = [];
  for (const field of new Set([...Object.keys(then), ...Object.keys(now)])) {
    const [before, after] = [then[field] ?? null, now[field] ?? null];
    if (isRecord(before) && isRecord(after)) found.push(...differences(before, after));
    else if (JSON.stringify(before) !== JSON.stringify(after)) found.push([field, before, after]);
  }
  return found;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** The state of a checkpoint folder if all its files are there in full. */
async function completeState(path: string): Promise<StateFile | undefined> {
  try {
    const state = (await readJsonObject(join(path, stateName))) as unknown as StateFile;
    if (state.format !== format) return undefined;
    for (const [name, bytes] of Object.entries(state.files)) {
      if ((await stat(join(path, name))).size !== bytes) return undefined;
    }
    return state;
  } catch {
    return undefined;
  }
}

async function sizesIn(folder: string): Promise<Record<string, number>> {
  const sizes: Record<string, number> = {};
  for (const name of (await namesIn(folder)).sort()) sizes[name] = (await stat(join(folder, name))).size;
  return sizes;
}

function momentTensors(moments: NativeMoments[], rank: number) {
  return moments.flatMap((moment) =>
    momentNames.map((name) => {
      const data = moment[name];
      const other = data.length / rank;
      return { name: `${moment.module}.${name}`, shape: name.startsWith('a') ? [rank, other] : [other, rank], data };
    }),
  );
}

async function readMoments(file: string, factors: NativeFactors[]): Promise<NativeMoments[]> {
  const { tensors } = await readSafetensorsHeader(file);
  const infos = factors.flatMap(({ module }) =>
    momentNames.map((name) => {
      const info = tensors.get(`${module}.${name}`);
      if (!info) throw new LoraDaError('INVALID_TENSOR', `${file}: tensor ${module}.${name} is missing`);
      return info;
    }),
  );
  const values = await readTensors(file, infos);
  return factors.map(({ module }, i) => {
    const [aFirst, aSecond, bFirst, bSecond] = values.slice(4 * i, 4 * i + 4) as [
      Float32Array,
      Float32Array,
      Float32Array,
      Float32Array,
    ];
    return { module, aFirst, aSecond, bFirst, bSecond };
  });
}

function stepOf(name: string): number {
  return Number(/^(?:step|best)-(\d+)$/.exec(basename(name))?.[1] ?? Number.NaN);
}

function byStep(one: string, other: string): number {
  return stepOf(one) - stepOf(other);
}
