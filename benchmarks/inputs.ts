/** What both sides of a benchmark read: a file of rows as `input_ids` + `labels`, and a PEFT folder to start from. */
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { writeAdapterFolder } from '../lib/adapter_folder';
import { openCheckpoint } from '../lib/checkpoint';
import { Dataset } from '../lib/dataset';
import type { DecoderSpec } from '../lib/native';
import { Random } from '../lib/random';
import { linearModules } from '../lib/target_modules';
import { Tokenizer } from '../lib/tokenizer';
import { BenchmarkError, root } from './harness';

interface Row {
  input_ids: number[];
  labels: number[];
}

/** Rows in a file, exactly as many as were asked for. */
export interface RowFile {
  file: string;
  rows: number;
  tokens: number;
  labelTokens: number;
  longest: number;
  /** Real tokens of each step of `batchSize` rows. */
  tokensOfSteps(batchSize: number): number[];
}

/** `4x256`: 4 rows of 256 tokens. */
export function parseShape(source: string): { rows: number; length: number } | undefined {
  const match = /^([1-9]\d*)x([1-9]\d*)$/.exec(source);
  return match ? { rows: Number(match[1]), length: Number(match[2]) } : undefined;
}

/** `gsm8k` stands for the copy beside the checkout; undefined where it is missing. */
export function dataFile(source: string): string | undefined {
  const file = source === 'gsm8k' ? join(root, '../shared/data/gsm8k/train.jsonl') : source;
  if (existsSync(file)) return file;
  if (source === 'gsm8k') return undefined;
  throw new BenchmarkError(
    `Expected ROWSxTOKENS, gsm8k or the path of a data file for --rows but received ${source}`,
    2,
  );
}

/** Rows for some training steps. */
export interface Work {
  /** As --rows named it. */
  source: string;
  data: RowFile;
  batchSize: number;
}

/** As many rows as the steps take, so that no side meets the end of an epoch; undefined where the data are missing. */
export async function prepareWork(
  inputs: Inputs,
  source: string,
  { steps, warmup, batchSize }: { steps: number; warmup: number; batchSize: number },
): Promise<Work | undefined> {
  const shape = parseShape(source);
  if (shape) {
    const data = inputs.randomRows(shape.rows * (warmup + steps), shape.length);
    return { source, data, batchSize: shape.rows };
  }
  const path = dataFile(source);
  if (!path) return undefined;
  return { source, data: await inputs.dataRows(path, batchSize * (warmup + steps)), batchSize };
}

/** Tokens and labels of its steps on average. */
export function meanStep({ data, batchSize }: Work): { tokens: number; labels: number } {
  const steps = data.rows / batchSize;
  return { tokens: data.tokens / steps, labels: data.labelTokens / steps };
}

/** A folder of temporary files for one model; removed by {@link Inputs.remove}. */
export class Inputs {
  readonly #folder = mkdtempSync(join(tmpdir(), 'lora-da-benchmark-'));
  #files = 0;

  private constructor(
    readonly model: string,
    readonly spec: DecoderSpec,
  ) {}

  static async open(model: string): Promise<Inputs> {
    return new Inputs(model, (await openCheckpoint(model)).spec);
  }

  remove(): void {
    rmSync(this.#folder, { recursive: true, force: true });
  }

  /** Random ids, every token labelled: the densest work there is. */
  randomRows(count: number, length: number): RowFile {
    const random = new Random(1);
    const rows = Array.from({ length: count }, () => {
      const ids = Array.from({ length }, () => random.below(this.spec.vocabSize));
      return { input_ids: ids, labels: ids };
    });
    return this.#write(rows);
  }

  /** The first rows of a data file as `lora-da train` reads them, prompts masked; a short file is gone through again. */
  async dataRows(path: string, count: number): Promise<RowFile> {
    const tokenizer = existsSync(join(this.model, 'tokenizer.json')) ? await Tokenizer.load(this.model) : undefined;
    const { vocabSize, maxPositions } = this.spec;
    const maxLength = Math.min(1024, maxPositions);
    const data = await Dataset.load(path, { tokenizer, vocabSize, maxLength, limit: count });
    const rows = Array.from({ length: count }, (_, i) => {
      const { inputIds, labels } = data.row(i % data.length);
      return { input_ids: Array.from(inputIds), labels: Array.from(labels) };
    });
    data.dispose();
    await tokenizer?.dispose();
    return this.#write(rows);
  }

  /** An adapter whose A and B are both not zero, so that every gradient of the first step is at work. */
  async adapter(rank = 8, alpha = 16): Promise<string> {
    const random = new Random(2);
    const uniform = (length: number, bound: number) =>
      Float32Array.from({ length }, () => (random.next() / 2 ** 31 - 1) * bound);
    const factors = [...linearModules(this.spec)].map(([module, linear]) => ({
      module,
      a: uniform(rank * linear.in, 1 / Math.sqrt(linear.in)),
      b: uniform(linear.out * rank, 1e-3),
    }));
    const directory = join(this.#folder, 'adapter');
    await writeAdapterFolder(directory, this.spec, { rank, alpha, rslora: true, factors, baseModel: this.model });
    return directory;
  }

  #write(rows: Row[]): RowFile {
    const file = join(this.#folder, `rows-${this.#files++}.jsonl`);
    writeFileSync(file, rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
    const lengths = rows.map((row) => row.input_ids.length);
    const labelled = rows.map(({ labels }) => labels.filter((label, i) => i > 0 && label !== -100).length);
    const sum = (values: number[]) => values.reduce((total, value) => total + value, 0);
    const longest = lengths.reduce((most, length) => Math.max(most, length), 0);
    const tokensOfSteps = (batchSize: number) =>
      Array.from({ length: rows.length / batchSize }, (_, step) =>
        sum(lengths.slice(step * batchSize, (step + 1) * batchSize)),
      );
    return { file, rows: rows.length, tokens: sum(lengths), labelTokens: sum(labelled), longest, tokensOfSteps };
  }
}
