import { randomBytes } from 'node:crypto';
import { type FileHandle, open, readFile, rename, unlink } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { LoraDaError } from './errors';

const codes: Record<string, 'FILE_NOT_FOUND'> = { ENOENT: 'FILE_NOT_FOUND', ENOTDIR: 'FILE_NOT_FOUND' };

const reasons: Record<string, string> = {
  ENOENT: 'no such file or folder',
  ENOTDIR: 'no such file or folder',
  EACCES: 'permission denied',
  EPERM: 'operation not permitted',
  EISDIR: 'is a folder, expected a file',
  ENOSPC: 'no space left on the device',
  EDQUOT: 'disk quota exceeded',
  EROFS: 'the file system is read-only',
  EMFILE: 'too many open files',
};

/**
 * A system error as an error of this package that names the file.
 *
 * @param error  what a file operation threw; an error of this package comes back as it is
 * @param file   the path to name
 * @param verb   what was tried, e.g. `read` or `write`
 */
export function fileError(error: unknown, file: string, verb: 'read' | 'write'): LoraDaError {
  if (error instanceof LoraDaError) return error;
  const system = error as NodeJS.ErrnoException;
  if (system.syscall === undefined) return new LoraDaError('INTERNAL', `${file}: ${system.message}`, { cause: error });
  const reason = reasons[system.code ?? ''] ?? system.code ?? system.message;
  return new LoraDaError(codes[system.code ?? ''] ?? 'IO_ERROR', `Cannot ${verb} ${file}: ${reason}`, { cause: error });
}

/**
 * Reads a small text file.
 *
 * @throws {LoraDaError} `FILE_NOT_FOUND`, `IO_ERROR`: names the file
 */
export async function readText(file: string): Promise<string> {
  try {
    const text = await readFile(file, 'utf8');
    return text.charCodeAt(0) === 0xfeff ? text.slice(1) : text;
  } catch (error) {
    throw fileError(error, file, 'read');
  }
}

/**
 * Reads a small JSON file that holds one object.
 *
 * @throws {LoraDaError} `FILE_NOT_FOUND`, `IO_ERROR`; `INVALID_FILE` where it is not JSON or not an object
 */
export async function readJsonObject(file: string): Promise<Record<string, unknown>> {
  const text = await readText(file);
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new LoraDaError('INVALID_FILE', `${file}: expected JSON: ${jsonReason(error)}`, { cause: error });
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new LoraDaError('INVALID_FILE', `${file}: expected a JSON object`);
  }
  return value as Record<string, unknown>;
}

/** As `readJsonObject`; undefined where there is no such file. */
export async function readOptionalJsonObject(file: string): Promise<Record<string, unknown> | undefined> {
  try {
    return await readJsonObject(file);
  } catch (error) {
    if (error instanceof LoraDaError && error.code === 'FILE_NOT_FOUND') return undefined;
    throw error;
  }
}

/** What JSON.parse complains about, without the excerpt of the text that newer versions of Node append. */
export function jsonReason(error: unknown): string {
  const position = /at position \d+/.exec((error as Error).message)?.[0];
  const kind = /Unexpected end/.test((error as Error).message) ? 'unexpected end' : 'unexpected character';
  return position ? `${kind} ${position}` : kind;
}

/**
 * Writes a file so that a reader sees the old content or the new, never a part: aside, flushed to the disk, renamed.
 *
 * @param file   path of the file
 * @param write  fills the new file through its handle
 * @throws {LoraDaError} `IO_ERROR`, `FILE_NOT_FOUND` (no such folder): names the file; nothing is left behind
 */
export async function writeAtomically(file: string, write: (handle: FileHandle) => Promise<void>): Promise<void> {
  const aside = join(dirname(file), `.${basename(file)}.${process.pid}.${randomBytes(4).toString('hex')}.tmp`);
  try {
    const handle = await open(aside, 'wx');
    try {
      await write(handle);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(aside, file);
    await syncDirectory(dirname(file));
  } catch (error) {
    await unlink(aside).catch(() => {});
    throw fileError(error, file, 'write');
  }
}

/** `writeAtomically` for a string or bytes. */
export function writeFileAtomically(file: string, content: string | Uint8Array): Promise<void> {
  return writeAtomically(file, (handle) => handle.writeFile(content));
}

/** Flushes a folder's entries, so that a rename in it survives a crash. */
export async function syncDirectory(directory: string): Promise<void> {
  const handle = await open(directory, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
