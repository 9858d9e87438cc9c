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
 * A worker thread that answers calls in their order. It keeps the process alive only while a call is under way, and begins with
 * the first.
 */
export class WorkerClient {
  private worker: Worker | undefined;
  private readonly waiting = new Map<number, Waiting>();
  private lastId = 0;
  private failure: LoraDaError | undefined;

  /**
   * @param name        file name without extension, in the folder of this file
   * @param workerData  handed to the worker
   */
  constructor(
    private readonly name: string,
    private readonly workerData: unknown,
  ) {}

  /** @throws {LoraDaError} what the worker answered; `DISPOSED` after dispose() */
  call<Result>(method: string, parameters: unknown, transfer: Transferable[] = []): Promise<Result> {
    if (this.failure) return Promise.reject(this.failure);
    const id = ++this.lastId;
    this.worker ??= this.start();
    const { worker } = this;
    if (this.waiting.size === 0) worker.ref();
    return new Promise<unknown>((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      worker.postMessage({ id, method, parameters } satisfies WorkerRequest, transfer);
    }) as Promise<Result>;
  }

  /** Ends the thread; calls under way reject with `DISPOSED`. */
  dispose(): void {
    this.fail(new LoraDaError('DISPOSED', 'Used after dispose()'));
    void this.worker?.terminate();
  }

  /** Gives the thread's memory back where no call is under way; the next call starts another. */
  rest(): void {
    if (!this.worker || this.waiting.size > 0) return;
    this.worker.removeAllListeners();
    void this.worker.terminate();
    this.worker = undefined;
  }

  private start(): Worker {
    const worker = startWorker(this.name, this.workerData);
    worker.unref();
    worker.on('message', (reply: WorkerReply) => this.settle(reply));
    worker.on('error', (error: NodeJS.ErrnoException) => this.fail(workerError(error)));
    worker.on('exit', () => this.fail(new LoraDaError('DISPOSED', 'The worker thread has ended')));
    return worker;
  }

  private settle({ id, result, error }: WorkerReply): void {
    const waiting = this.waiting.get(id);
    this.waiting.delete(id);
    if (this.waiting.size === 0) this.worker?.unref();
    if (error) waiting?.reject(new LoraDaError(error.code, error.message));
    else waiting?.resolve(result);
  }

  private fail(error: LoraDaError): void {
    this.failure ??= error;
    for (const { reject } of this.waiting.values()) reject(this.failure);
    this.waiting.clear();
    this.worker?.unref();
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
