import { CausalLM } from '../causal_lm';
import { Dataset } from '../dataset';
import type { CommandContext } from './context';

interface ModelFlags {
  model: string;
  dtype: 'auto' | 'float32' | 'bfloat16';
  device: string;
  threads: number;
  prepack?: boolean;
}

interface DataFlags {
  maxLength: number;
  overlong: 'truncate' | 'drop' | 'error';
  trainOn: 'completion' | 'assistant' | 'all';
}

/** Loads the model of a command, uses it, and frees it whatever happens. */
export async function withModel<T>(
  { model: directory, dtype, device, threads, prepack = false }: ModelFlags,
  { signal, progress }: CommandContext,
  use: (model: CausalLM) => Promise<T>,
): Promise<T> {
  let started = false;
  const model = await CausalLM.load(directory, {
    dtype,
    device,
    threads,
    prepack,
    signal,
    onProgress: (done, total) => {
      if (!started) progress.begin('loading', total);
      started = true;
      progress.update(done);
    },
  });
  progress.end();
  const { deviceName, deviceNote } = model.info;
  if (deviceNote) progress.line(`Running on ${deviceName}: ${deviceNote}`);
  try {
    return await use(model);
  } finally {
    await model.dispose();
  }
}

/** Loads a file of examples and says how many rows were dropped. */
export async function loadData(
  path: string,
  { maxLength, overlong, trainOn }: DataFlags,
  model: CausalLM,
  { signal, progress }: CommandContext,
  limit?: number,
): Promise<Dataset> {
  let started = false;
  const data = await Dataset.load(path, {
    tokenizer: model.tokenizer,
    vocabSize: model.spec.vocabSize,
    maxLength,
    overlong,
    trainOn,
    signal,
    limit,
    onProgress: ({ rows, bytes, totalBytes }) => {
      if (!started) progress.begin('reading', totalBytes);
      started = true;
      progress.update(bytes, `${rows} rows`);
    },
  });
  progress.line(`${path}: ${describeRows(data)}`);
  return data;
}

function describeRows({ length, tokens, labelTokensTotal, dropped, truncated }: Dataset): string {
  const parts = [`${length} rows, ${tokens} tokens, ${labelTokensTotal} of them labels`];
  if (truncated > 0) parts.push(`${truncated} rows cut to --max-length`);
  if (dropped.overlong > 0) parts.push(`${dropped.overlong} rows over --max-length dropped`);
  if (dropped.unlabelled > 0) parts.push(`${dropped.unlabelled} rows without a label token dropped`);
  return parts.join('; ');
}
