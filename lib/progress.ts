import { SingleBar } from 'cli-progress';

/** Seconds between two lines where there is no terminal. */
const secondsPerLine = 10;

/** What is shown of a long piece of work. */
export interface Progress {
  /** Begins a phase; one that is under way ends. */
  begin(phase: string, total: number): void;
  /** @param detail short figures for the end of the line: `loss 1.234 · 812 tokens/s` */
  update(done: number, detail?: string): void;
  /** Ends the phase. */
  end(): void;
  /** A line that stays. */
  line(text: string): void;
}

type Output = NodeJS.WritableStream & { isTTY?: boolean };

/**
 * Progress for people: a bar that moves on a terminal, plain lines now and then elsewhere.
 *
 * @param output  where it goes (default stderr)
 *
 * @example
 * ```ts
 * const progress = createProgress();
 * progress.begin('training', 100);
 * progress.update(1, 'loss 2.31');
 * progress.end();
 * ```
 */
export function createProgress(output: Output = process.stderr): Progress {
  return output.isTTY ? new BarProgress(output) : new LineProgress(output);
}

/** `1 h 05 min`, `3 min 20 s`, `12 s` */
export function formatDuration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const pad = (value: number) => String(value).padStart(2, '0');
  if (whole >= 3600) return `${Math.floor(whole / 3600)} h ${pad(Math.floor((whole % 3600) / 60))} min`;
  if (whole >= 60) return `${Math.floor(whole / 60)} min ${pad(whole % 60)} s`;
  return `${whole} s`;
}

/** Time that is left, from the pace since the phase began. */
class Pace {
  readonly #began = performance.now();
  #first: number | undefined;

  left(done: number, total: number): string {
    this.#first ??= done;
    const made = done - this.#first;
    if (made <= 0) return '';
    const seconds = ((performance.now() - this.#began) / 1000 / made) * (total - done);
    return done >= total ? '' : `${formatDuration(seconds)} left`;
  }
}

const joined = (...parts: (string | undefined)[]) => parts.filter(Boolean).join(' · ');

class BarProgress implements Progress {
  #bar: SingleBar | undefined;
  #pace = new Pace();
  #total = 0;

  constructor(readonly output: Output) {}

  begin(phase: string, total: number): void {
    this.end();
    this.#total = total;
    this.#pace = new Pace();
    this.#bar = new SingleBar({
      stream: this.output,
      format: `${phase} {bar} {value}/{total}{detail}`,
      barCompleteChar: '█',
      barIncompleteChar: '░',
      barsize: 24,
      fps: 8,
      hideCursor: true,
      gracefulExit: false,
      clearOnComplete: false,
      stopOnComplete: false,
    });
    this.#bar.start(total, 0, { detail: '' });
  }

  update(done: number, detail?: string): void {
    const shown = joined(detail, this.#pace.left(done, this.#total));
    this.#bar?.update(done, { detail: shown === '' ? '' : ` · ${shown}` });
  }

  end(): void {
    this.#bar?.stop();
    this.#bar = undefined;
  }

  line(text: string): void {
    this.end();
    this.output.write(`${text}\n`);
  }
}

class LineProgress implements Progress {
  #phase = '';
  #total = 0;
  #pace = new Pace();
  #written = 0;

  constructor(readonly output: Output) {}

  begin(phase: string, total: number): void {
    this.#phase = phase;
    this.#total = total;
    this.#pace = new Pace();
    this.#written = performance.now();
  }

  update(done: number, detail?: string): void {
    const now = performance.now();
    const left = this.#pace.left(done, this.#total);
    if (now - this.#written < secondsPerLine * 1000) return;
    this.#written = now;
    this.output.write(`${joined(`${this.#phase} ${done}/${this.#total}`, detail, left)}\n`);
  }

  end(): void {}

  line(text: string): void {
    this.output.write(`${text}\n`);
  }
}
