import { mkdir, open, readdir, rm, rmdir, stat } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { LoraDaError } from './errors';
import { fileError } from './files';

/** Names in a run folder (`--out` of train). */
export const runFiles = {
  config: 'config.json',
  metrics: 'metrics.jsonl',
  evaluations: 'evaluations.jsonl',
  initialization: 'initialization.json',
  report: 'report.html',
  checkpoints: 'checkpoints',
  adapter: 'adapter_model.safetensors',
} as const;

/** Runs work on a path; a failure of the system names it. */
export async function onDisk<T>(path: string, work: () => Promise<T>, verb: 'read' | 'write' = 'write'): Promise<T> {
  try {
    return await work();
  } catch (error) {
    throw fileError(error, path, verb);
  }
}

/** Names in a folder; none where it does not exist. */
export async function namesIn(folder: string): Promise<string[]> {
  try {
    return await readdir(folder);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw fileError(error, folder, 'read');
  }
}

/**
 * Makes a folder and those above it, one by one: Node's own `recursive` never returns where the system answers ENOENT for a
 * folder whose parent exists (as /proc does).
 *
 * @returns the folders that were made, outermost first
 * @throws {LoraDaError} `IO_ERROR`, `FILE_NOT_FOUND`: names the folder
 */
export async function makeFolder(folder: string): Promise<string[]> {
  const missing: string[] = [];
  for (let path = resolve(folder); !(await exists(path)); path = dirname(path)) missing.unshift(path);
  for (const path of missing) {
    await onDisk(folder, () =>
      mkdir(path).catch((error) => {
        if (error.code !== 'EEXIST') throw error;
      }),
    );
  }
  return missing;
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}

/**
 * Makes sure, before the long work, that a folder can be written: makes it and a file in it, and takes both away again.
 *
 * @throws {LoraDaError} `IO_ERROR`, with path and reason
 */
export async function checkWritable(folder: string): Promise<void> {
  await onDisk(folder, async () => {
    const made = await makeFolder(folder);
    try {
      const probe = join(folder, `.lora-da-${process.pid}`);
      const handle = await open(probe, 'w');
      try {
        await handle.writeFile('x');
      } finally {
        await handle.close();
        await rm(probe, { force: true });
      }
    } finally {
      for (const path of made.reverse()) await rmdir(path).catch(() => {});
    }
  });
}

/** What a process that was killed leaves in a folder: the probe above, and files that were being written aside. */
const leftover = /^\.(lora-da-\d+|.+\.\d+\.[0-9a-f]{8}\.tmp)$/;

/** Removes what an earlier run, killed while it wrote, has left in its folder. */
export async function removeLeftovers(folder: string): Promise<void> {
  const names = (await namesIn(folder)).filter((name) => leftover.test(name));
  await onDisk(folder, async () => {
    for (const name of names) await rm(join(folder, name), { force: true });
  });
}

/** Whether a folder already holds a run or an adapter that a new run would overwrite. */
export async function holdsRun(folder: string): Promise<boolean> {
  const names = new Set(await namesIn(folder));
  if (names.has(runFiles.adapter) || names.has(runFiles.metrics)) return true;
  return (await namesIn(join(folder, runFiles.checkpoints))).some((name) => name.startsWith('step-'));
}

/**
 * Refuses an output folder that cannot be written, or that holds a run which was not asked to go on.
 *
 * @throws {LoraDaError} `IO_ERROR`; `INVALID_ARGUMENT` when it holds a run and `resume` is false
 */
export async function checkRunFolder(folder: string, resume: boolean): Promise<void> {
  await checkFolder(folder);
  if (!resume && (await holdsRun(folder))) {
    throw new LoraDaError(
      'INVALID_ARGUMENT',
      `${folder} already holds a run: give another --out, or --resume to go on with it`,
    );
  }
  await checkWritable(folder);
}

async function checkFolder(folder: string): Promise<void> {
  const existing = await stat(folder).catch(() => undefined);
  if (existing && !existing.isDirectory()) {
    throw new LoraDaError('IO_ERROR', `Cannot write ${folder}: it is a file, not a folder`);
  }
}
