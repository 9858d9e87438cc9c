import { join } from 'node:path';
import { type Transferable, Worker } from 'node:worker_threads';
import { type ErrorCode, LoraDaError } from './errors';

/** What goes to a worker thread. */
export interface WorkerRequest {
  id: number;
  method: string;
  parameters: unknown;
}

/** What comes back. */
export interface WorkerReply {
  id: number;
  result?: unknown;
  error?: { code: ErrorCode; message: string };
}

interface Waiting {
  resolve(value: unknown): void;
  reject(error: Error): void;
}

/**
 * A worker thread that answers calls in their order. It keeps the process alive only while a call is under way.
 */
export class WorkerClient {
  private readonly worker: Worker;
  private readonly waiting = new Map<number, Waiting>();
  private lastId = 0;
  private failure: LoraDaError | undefined;

  /**
   * @param name        file name without extension, in the folder of this file
   * @param workerData  handed to the worker
   */
  constructor(name: string, workerData: unknown) {
    this.worker = startWorker(name, workerData);
    this.worker.unref();
    this.worker.on('message', (reply: WorkerReply) => this.settle(reply));
    this.worker.on('error', (error: NodeJS.ErrnoException) => this.fail(workerError(error)));
    this.worker.on('exit', () => this.fail(new LoraDaError('DISPOSED', 'The worker thread has ended')));
  }

  /** @throws {LoraDaError} what the worker answered; `DISPOSED` after dispose() */
  call<Result>(method: string, parameters: unknown, transfer: Transferable[] = []): Promise<Result> {
    if (this.failure) return Promise.reject(this.failure);
    const id = ++this.lastId;
    if (this.waiting.size === 0) this.worker.ref();
    return new Promise<unknown>((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, method, parameters } satisfies WorkerRequest, transfer);
    }) as Promise<Result>;
  }

  /** Ends the thread; calls under way reject with `DISPOSED`. */
  dispose(): void {
    this.fail(new LoraDaError('DISPOSED', 'Used after dispose()'));
    void this.worker.terminate();
  }

  private settle({ id, result, error }: WorkerReply): void {
    const waiting = this.waiting.get(id);
    this.waiting.delete(id);
    if (this.waiting.size === 0) this.worker.unref();
    if (error) waiting?.reject(new LoraDaError(error.code, error.message));
    else waiting?.resolve(result);
  }

  private fail(error: LoraDaError): void {
    this.failure ??= error;
    for (const { reject } of this.waiting.values()) reject(this.failure);
    this.waiting.clear();
    this.worker.unref();
  }
}

/** A checkout runs the TypeScript sources through tsx, which has to be registered in each thread; the package runs JavaScript. */
function startWorker(name: string, workerData: unknown): Worker {
  if (!__filename.endsWith('.ts')) return new Worker(join(__dirname, `${name}.js`), { workerData });
  const file = JSON.stringify(join(__dirname, `${name}.ts`));
  return new Worker(`require('tsx/cjs'); require(${file});`, { eval: true, workerData, execArgv: [] });
}

function workerError(error: NodeJS.ErrnoException): LoraDaError {
  const code = error.code === 'ERR_WORKER_OUT_OF_MEMORY' ? 'OUT_OF_MEMORY' : 'INTERNAL';
  return new LoraDaError(code, `A worker thread failed: ${error.message}`, { cause: error });
}
