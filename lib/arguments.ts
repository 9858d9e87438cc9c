import { LoraDaError } from './errors';

/** `-1 of type number`, `"x" of type string`: how an error shows what it received. */
export function describe(value: unknown): string {
  if (value === null) return 'null of type object';
  if (Array.isArray(value)) return `[${value.slice(0, 4).join(', ')}${value.length > 4 ? ', …' : ''}] of type array`;
  if (typeof value === 'string') {
    return `${JSON.stringify(value.length > 60 ? `${value.slice(0, 60)}…` : value)} of type string`;
  }
  if (typeof value === 'object') return `${value.constructor?.name ?? 'Object'} of type object`;
  if (typeof value === 'function') return `${value.name || 'function'} of type function`;
  return `${String(value)} of type ${typeof value}`;
}

/**
 * The one form of every argument error.
 *
 * @example
 * ```ts
 * throw expected('positive integer', 'width', -1);
 * // Expected positive integer for width but received -1 of type number
 * ```
 */
export function expected(what: string, name: string, received: unknown): LoraDaError {
  return new LoraDaError('INVALID_ARGUMENT', `Expected ${what} for ${name} but received ${describe(received)}`);
}

/** @throws {LoraDaError} `INVALID_ARGUMENT` unless value is an integer of at least `minimum`. */
export function checkInteger(name: string, value: unknown, minimum = Number.MIN_SAFE_INTEGER): void {
  if (Number.isSafeInteger(value) && (value as number) >= minimum) return;
  const words: Record<number, string> = { 0: 'integer of 0 or more', 1: 'positive integer' };
  throw expected(words[minimum] ?? 'integer', name, value);
}

/** @throws {LoraDaError} `INVALID_ARGUMENT` unless value is a finite number from `minimum` to `maximum`. */
export function checkNumber(name: string, value: unknown, minimum: number, maximum: number): void {
  if (typeof value === 'number' && Number.isFinite(value) && value >= minimum && value <= maximum) return;
  const range = maximum === Number.POSITIVE_INFINITY ? `${minimum} or more` : `${minimum} to ${maximum}`;
  throw expected(`number of ${range}`, name, value);
}

/** @throws {LoraDaError} `INVALID_ARGUMENT` unless value is a string that is not empty. */
export function checkString(name: string, value: unknown): void {
  if (typeof value !== 'string' || value === '') throw expected('non-empty string', name, value);
}

/** @throws {LoraDaError} `ABORTED` when the signal has fired. */
export function checkAborted(signal?: AbortSignal): void {
  if (signal?.aborted) throw new LoraDaError('ABORTED', 'Stopped on request', { cause: signal.reason });
}
